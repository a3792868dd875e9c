"""Problems: the file's rules, every error with file and line, and how a text becomes a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers_made import BOS, CHATML, END, EOS, THINKING, byte_bpe, words_of, write_lines

from autodeco.decoding.answers import check
from autodeco.decoding.problems import (
    FORMATS,
    Problem,
    choose_format,
    load_problems,
    problem_prompts,
)
from autodeco.errors import DataError, UsageError
from autodeco.training.tokenization import tokenize_prompt

GOOD = '{"problem": "1+1=", "gt": "2"}'
ASK = {"role": "user", "content": "q"}


def load(path: Path, *lines: Any, **options: Any) -> list[Problem]:
    texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    return load_problems(write_lines(path / "problems.jsonl", *texts), **options)


def asked(text: str) -> Problem:
    return Problem(text, "-", None, 1)


def test_text_and_ground_truth_and_the_line_that_they_stand_on(tmp_path: Path) -> None:
    found = load(tmp_path, GOOD, "", "  \t", {"problem": "ä\n ", "gt": " 3 ", "id": 9})
    assert found == [Problem("1+1=", "2", None, 1), Problem("ä\n ", " 3 ", None, 4)]


def test_lines_may_end_as_on_windows_and_the_last_may_lack_its_end(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(f"{GOOD}\r\n\r\n{GOOD}".encode())
    assert [(p.gt, p.line) for p in load_problems(path)] == [("2", 1), ("2", 3)]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\x0cd"
    line = json.dumps({"problem": text, "gt": "1"}, ensure_ascii=False)
    assert [(p.problem, p.line) for p in load(tmp_path, line, GOOD)] == [(text, 1), ("1+1=", 2)]


def test_messages_are_kept_and_a_text_beside_them_too(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "s"}, ASK]
    plain, both = load(
        tmp_path, {"messages": chat, "gt": "2"}, {"messages": [ASK], "problem": "q", "gt": "2"}
    )
    assert plain == Problem("", "2", tuple(chat), 1)
    assert both == Problem("q", "2", (ASK,), 2)


@pytest.mark.parametrize(
    ("gt", "text"),
    [(7, "7"), (-3, "-3"), (0, "0"), (0.5, "0.5"), (2.0, "2.0"), (10**20, str(10**20))],
)
def test_a_number_may_stand_as_ground_truth(tmp_path: Path, gt: float, text: str) -> None:
    (problem,) = load(tmp_path, {"problem": "q", "gt": gt})
    assert problem.gt == text and check(f"so {text}", problem.gt)


@pytest.mark.parametrize(
    ("written", "answer"),
    [("0.00001", "0.00001"), ("-2.5e-7", "-0.00000025"), ("1e22", "1" + "0" * 22)],
)
def test_bug_a_small_number_as_ground_truth_could_not_be_answered(
    tmp_path: Path, written: str, answer: str
) -> None:
    """It became "1e-05", which no answer is equal to."""
    (problem,) = load(tmp_path, f'{{"problem": "q", "gt": {written}}}')
    assert check(f"The answer is {answer}.", problem.gt)


def test_a_limit_stops_before_the_lines_behind_it_are_looked_at(tmp_path: Path) -> None:
    lines = [GOOD, "", GOOD, "{not JSON"]
    assert [p.line for p in load(tmp_path, *lines, limit=2)] == [1, 3]
    assert len(load(tmp_path, *lines, limit=1)) == 1
    assert len(load(tmp_path, GOOD, GOOD, limit=99)) == 2
    for limit in (3, None):
        with pytest.raises(DataError, match="malformed JSON"):
            load(tmp_path, *lines, limit=limit)


BAD = {
    "cut short": ('{"problem": "a", ', "malformed JSON", "one JSON object a line"),
    "two objects": (GOOD + GOOD, "malformed JSON", "one JSON object a line"),
    "a list": ('["problem"]', "not a JSON object", "one JSON object a line"),
    "null": ("null", "not a JSON object", "one JSON object a line"),
    "no gt": ('{"problem": "a"}', "no ground truth", "give 'gt'"),
    "gt of null": ('{"problem": "a", "gt": null}', "no ground truth", "text or number"),
    "gt of truth": ('{"problem": "a", "gt": true}', "no ground truth", "text or number"),
    "gt of a list": ('{"problem": "a", "gt": ["1"]}', "no ground truth", "text or number"),
    "blank gt": ('{"problem": "a", "gt": " \\n"}', "no ground truth", "text or number"),
    "no problem": ('{"gt": "1"}', "no problem text", "'problem' or 'messages'"),
    "empty problem": ('{"problem": "", "gt": "1"}', "no problem text", "'problem' or 'messages'"),
    "problem of a number": ('{"problem": 3, "gt": "1"}', "no problem text", "'problem'"),
    "no message": ('{"messages": [], "gt": "1"}', "'messages' is not a list", '"role": "user"'),
    "messages of text": ('{"messages": "q", "gt": "1"}', "'messages' is not a list", '"role"'),
    "message of text": ('{"messages": ["q"], "gt": "1"}', "'messages' is not a list", '"role"'),
    "no role": ('{"messages": [{"content": "q"}], "gt": 1}', "messages with a role", '"role"'),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_file_and_line_and_what_to_do(tmp_path: Path, name: str) -> None:
    line, what, fix = BAD[name]
    with pytest.raises(DataError) as caught:
        load(tmp_path, GOOD, "", line, GOOD)
    assert what in caught.value.what and fix in str(caught.value.fix)
    assert str(caught.value.where).startswith(f"{tmp_path / 'problems.jsonl'}:3")


def test_malformed_json_names_the_column(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, GOOD, '{"problem" 1}')
    assert str(caught.value.where).endswith("problems.jsonl:2:12")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"problem": "a", "gt": ' + "1" * 5000 + "}", "malformed JSON"),
        ("[" * 99_999, "malformed JSON"),
        ('{"problem": "\\ud800", "gt": "1"}', "half a character"),
        ('{"messages": [{"role": "user", "content": "\\udc00"}], "gt": "1"}', "half a character"),
        ('{"problem": "a", "gt": NaN}', "no ground truth"),
        ('{"problem": "a", "gt": Infinity}', "no ground truth"),
    ],
)
def test_bug_these_lines_were_a_traceback_or_passed(tmp_path: Path, line: str, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        load(tmp_path, GOOD, line)
    assert str(caught.value.where).startswith(f"{tmp_path / 'problems.jsonl'}:2")
    assert caught.value.fix


def test_a_whole_character_written_as_two_escapes_is_no_half(tmp_path: Path) -> None:
    (problem,) = load(tmp_path, '{"problem": "\\ud83d\\ude00", "gt": "1"}')
    assert problem.problem == "\U0001f600"


def test_a_file_that_has_no_problems_or_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no problems") as caught:
        load(tmp_path, "", "  ")
    assert caught.value.where == str(tmp_path / "problems.jsonl") and caught.value.fix
    for path in (tmp_path / "nothing.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot read the problems") as caught:
            load_problems(path)
        assert caught.value.where == str(path) and "--problems" in str(caught.value.fix)
    with pytest.raises(DataError, match="cannot read the problems") as caught:
        load(tmp_path, GOOD, b'{"problem": "\xff", "gt": "1"}')
    assert "UTF-8" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("template", "texts", "chosen"),
    [
        (None, ["q"], "text"),
        (None, [f"{END}q"], "text"),
        (CHATML, ["q", "w"], "chat"),
        (CHATML, ["a < b | c <s", "<im_start>"], "chat"),
        (CHATML, [EOS], "text"),
        (CHATML, [f"{BOS}q"], "text"),
        (CHATML, ["ends so" + EOS], "text"),
    ],
)
def test_auto_is_chat_unless_a_text_spells_a_special_token(
    template: str | None, texts: list[str], chosen: str
) -> None:
    tokenizer = byte_bpe(template=template)
    problems = [asked(text) for text in texts]
    assert choose_format(problems, tokenizer) == chosen
    assert choose_format(problems, tokenizer, "auto") == chosen


@pytest.mark.parametrize("special", [True, False])
def test_bug_a_text_in_the_templates_own_marks_was_put_through_the_template_again(
    special: bool,
) -> None:
    """Marks of a turn are often neither BOS nor EOS, and some are no special tokens at all."""
    tokenizer = byte_bpe(template=CHATML)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=special), AddedToken("plain")])
    assert not {"<|turn|>", "<|im_start|>", END} & set(tokenizer.all_special_tokens)
    assert choose_format([asked("q"), asked("<|turn|>user\nq")], tokenizer) == "text"
    assert choose_format([asked(f"<|im_start|>user\nq{END}")], tokenizer) == "text"
    assert choose_format([asked("plain words, not <turn>")], tokenizer) == "chat"


@pytest.mark.parametrize("wanted", ["text", "chat"])
def test_who_asks_for_a_format_gets_it(wanted: str) -> None:
    for template in (None, CHATML):
        tokenizer = byte_bpe(template=template)
        for text in ("q", f"{BOS}q"):
            assert choose_format([asked(text)], tokenizer, wanted) == wanted


def test_bug_an_unknown_format_was_taken_as_text() -> None:
    with pytest.raises(UsageError, match="'chatt'") as caught:
        choose_format([asked("q")], byte_bpe(template=CHATML), "chatt")
    assert all(name in str(caught.value.fix) for name in FORMATS)


def test_a_tokenizer_without_a_word_on_templates_or_special_tokens_is_asked_as_text() -> None:
    class Bare:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text] + [0] * add_special_tokens}

    assert choose_format([asked("q")], Bare()) == "text"
    assert problem_prompts([asked("ab")], Bare()) == [[97, 98, 0]]


@pytest.mark.parametrize("text", ["q", BOS + "q"])
def test_a_text_gets_one_bos_whether_it_spells_it_out_or_not(text: str) -> None:
    tokenizer = byte_bpe(bos=True)
    (ids,) = problem_prompts([asked(text)], tokenizer)
    assert words_of(tokenizer, ids) == [BOS, "q"]
    assert words_of(byte_bpe(), problem_prompts([asked("q")], byte_bpe())[0]) == ["q"]


@pytest.mark.parametrize("text", ["q", BOS + "q"])
def test_bug_a_prompt_ended_with_the_end_token_of_a_tokenizer_that_adds_one(text: str) -> None:
    """Training takes it off; an evaluation asked the model to go on after its own end."""
    tokenizer = byte_bpe(bos=True, trailing_eos=True)
    assert tokenizer("q")["input_ids"][-1] == tokenizer.eos_token_id
    (ids,) = problem_prompts([asked(text)], tokenizer)
    assert words_of(tokenizer, ids) == [BOS, "q"]
    assert ids == tokenize_prompt(tokenizer, text, [tokenizer.eos_token_id])
    (spelled,) = problem_prompts([asked(f"{BOS}q{EOS}")], tokenizer)
    assert words_of(tokenizer, spelled) == [BOS, "q", EOS]


def test_a_chat_prompt_is_the_template_as_it_is() -> None:
    tokenizer = byte_bpe(bos=True, trailing_eos=True, template="{{ bos_token }}" + CHATML)
    expected = f"{BOS}<|im_start|>user\nq{END}\n<|im_start|>assistant\n"
    by_text, by_messages = problem_prompts(
        [asked("q"), Problem("ignored", "-", (ASK,), 2)], tokenizer, chat=True
    )
    assert by_text == by_messages == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(by_text) == expected and by_text.count(tokenizer.bos_token_id) == 1


def test_messages_go_through_the_template_even_where_texts_do_not() -> None:
    tokenizer = byte_bpe(template=CHATML)
    chat, text = problem_prompts([Problem("", "-", (ASK,), 1), asked("q")], tokenizer, chat=False)
    assert tokenizer.decode(chat).startswith("<|im_start|>user\nq")
    assert tokenizer.decode(text) == "q"


def test_the_templates_arguments_reach_it() -> None:
    tokenizer = byte_bpe(template=THINKING)

    def prompt(kwargs: Any) -> str:
        ids = problem_prompts([asked("q")], tokenizer, chat=True, chat_template_kwargs=kwargs)[0]
        return str(tokenizer.decode(ids))

    assert prompt(None) == prompt({"enable_thinking": True}) == prompt({})
    assert prompt({"enable_thinking": False}) == prompt(None) + "<think></think>"


def test_a_missing_template_is_an_error_that_names_the_line() -> None:
    for problem, chat in (
        (Problem("", "-", (ASK,), 12), False),
        (Problem("q", "-", None, 12), True),
    ):
        with pytest.raises(DataError, match="need a chat template") as caught:
            problem_prompts([asked("q"), problem] if not chat else [problem], byte_bpe(), chat=chat)
        assert "line 12" in str(caught.value.where) and caught.value.fix


@pytest.mark.parametrize(
    ("template", "message", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", ASK, "roles must alternate"),
        (CHATML, {"role": "user"}, "content"),
        (CHATML, {"role": 3, "content": "q"}, "str"),
    ],
)
def test_bug_a_template_that_refuses_messages_was_a_traceback(
    template: str, message: dict[str, Any], said: str
) -> None:
    problem = Problem("", "-", (message,), 5)
    with pytest.raises(DataError, match=f"template refuses the messages.*{said}") as caught:
        problem_prompts([problem], byte_bpe(template=template))
    assert "line 5" in str(caught.value.where) and "roles" in str(caught.value.fix)
