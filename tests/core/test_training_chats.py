"""Chats: the checkpoint's own template, its arguments, and loss on assistant tokens alone."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers_made import (
    CHATML,
    EFFORT,
    END,
    EOS,
    MARKED,
    THINKING,
    byte_bpe,
    words_of,
    write_lines,
)

from autodeco.decoding.problems import Problem, problem_prompts
from autodeco.errors import DataError
from autodeco.inputs import Inputs
from autodeco.job import Job
from autodeco.training.data import Sample, SampleSet, load_samples

SYSTEM, ASK, MORE = (
    {"role": role, "content": text}
    for role, text in (("system", "s"), ("user", "q"), ("user", "w"))
)


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def load(path: Path, tokenizer: Any, *records: Any, **options: Any) -> SampleSet:
    lines = [json.dumps(r if isinstance(r, dict) else {"messages": r}) for r in records]
    ends = tuple(tokenizer.convert_tokens_to_ids(token) for token in (EOS, END))
    return load_samples(
        write_lines(path / "chat.jsonl", *lines),
        tokenizer,
        vocab_size=len(tokenizer),
        max_length=200,
        eos_token_ids=ends,
        **options,
    )


def runs(tokenizer: Any, sample: Sample) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    found, last = [], -2
    for position in sample.predict.nonzero()[0].tolist():
        if position != last + 1:
            found.append([])
        found[-1].append(sample.ids[position + 1])
        last = position
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_every_assistant_turn_is_learned_and_nothing_else(tmp_path: Path, template: str) -> None:
    tokenizer = byte_bpe(template=template)
    chat = [SYSTEM, ASK, answer("one"), MORE, answer("two three")]
    (sample,) = load(tmp_path, tokenizer, chat).samples
    assert runs(tokenizer, sample) == ["one" + END, "two three" + END]
    (without,) = load(tmp_path, tokenizer, chat, eos_loss=False).samples
    assert runs(tokenizer, without) == ["one", "two three"]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(sample.ids) == tokenizer.decode(without.ids) == text


def test_two_assistant_turns_in_a_row_are_both_learned(tmp_path: Path) -> None:
    tokenizer = byte_bpe(template=CHATML)
    (sample,) = load(tmp_path, tokenizer, [ASK, answer("one"), answer("two")]).samples
    assert runs(tokenizer, sample) == ["one" + END, "two" + END]


def test_a_chat_gets_no_bos_beside_the_templates(tmp_path: Path) -> None:
    tokenizer = byte_bpe(bos=True, trailing_eos=True, template="{{ bos_token }}" + CHATML)
    (sample,) = load(tmp_path, tokenizer, [ASK, answer("y")]).samples
    assert words_of(tokenizer, sample.ids).count("<s>") == 1
    assert words_of(tokenizer, sample.ids)[-1] == "\n" and EOS not in runs(tokenizer, sample)[0]


def test_the_boundary_of_an_answer_is_generations_though_merges_cross_it(tmp_path: Path) -> None:
    tokenizer = byte_bpe(template=CHATML)
    for text in ("\nabc", "abc"):
        (sample,) = load(tmp_path, tokenizer, [ASK, answer(text)]).samples
        given = problem_prompts([Problem("q", "-", None, 1)], tokenizer, chat=True)[0]
        assert sample.ids[: len(given)].tolist() == given
        assert int(sample.predict.argmax()) == len(given) - 1
        assert runs(tokenizer, sample) == [text + END]
    whole = tokenizer.apply_chat_template([ASK, answer("\n")], tokenize=False)
    assert "\n\n" in words_of(tokenizer, tokenizer(whole)["input_ids"])  # a merge would cross it
    turns = [ASK, answer("\none"), MORE, answer("\ntwo")]
    found = load(tmp_path, tokenizer, turns)
    assert runs(tokenizer, found.samples[0]) == ["\none" + END, "\ntwo" + END]
    assert found.skipped_turns == 0


def test_enable_thinking_reaches_the_template(tmp_path: Path) -> None:
    tokenizer = byte_bpe(template=THINKING)
    chat = [ASK, answer("yes")]
    (default,) = load(tmp_path, tokenizer, chat).samples
    assert runs(tokenizer, default) == ["<think></think>yes" + END]
    (off,) = load(
        tmp_path, tokenizer, chat, chat_template_kwargs={"enable_thinking": False}
    ).samples
    assert runs(tokenizer, off) == ["yes" + END]
    thoughtful = [ASK, answer("yes", reasoning_content="hm")]
    (thought,) = load(tmp_path, tokenizer, thoughtful).samples
    assert runs(tokenizer, thought) == ["<think>hm</think>yes" + END]


def test_reasoning_effort_reaches_the_template(tmp_path: Path) -> None:
    tokenizer = byte_bpe(template=EFFORT)
    for effort in ("low", "high"):
        options = {"chat_template_kwargs": {"reasoning_effort": effort}}
        (sample,) = load(tmp_path, tokenizer, [ASK, answer("y")], **options).samples
        assert f"effort {effort}" in tokenizer.decode(sample.ids)
        assert runs(tokenizer, sample) == ["y" + END]


def test_tools_reach_the_template(tmp_path: Path) -> None:
    tokenizer = byte_bpe(
        template="{%- if tools -%}{{ tools[0].function.name }}{%- endif -%}" + CHATML
    )
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    record = {"messages": [ASK, answer("y")], "tools": tools}
    (sample,) = load(tmp_path, tokenizer, record).samples
    assert tokenizer.decode(sample.ids).startswith("weather")


def test_turns_that_the_template_rewrites_are_context_and_counted(tmp_path: Path) -> None:
    tokenizer = byte_bpe(template=THINKING)
    chat = [ASK, answer("one", reasoning_content="h"), MORE, answer("two", reasoning_content="i")]
    found = load(tmp_path, tokenizer, chat, [ASK, answer("three")])
    assert runs(tokenizer, found.samples[0]) == ["<think>i</think>two" + END]
    assert found.skipped_turns == 1 and not found.dropped


BAD_CHATS = {
    "no list": ("hello", "messages is no list", "give a list"),
    "an empty list": ([], "an empty one", "give a list"),
    "a message of text": (["hi"], "message 0 has no role", '"role"'),
    "no role": ([ASK, {"content": "x"}], "message 1 has no role", '"role"'),
    "no content": ([{"role": "user"}, answer("x")], "message 0 (user) has no content", "content"),
    "content of a number": (
        [ASK, {"role": "assistant", "content": 5}],
        "message 1 (assistant) has a int as content",
        '"content"',
    ),
    "empty completion": ([ASK, answer("")], "the completion is empty", "remove the line"),
    "no answer": ([ASK, answer("x"), MORE], "the last message is of 'user'", "end the messages"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
@pytest.mark.parametrize("lenient", [False, True])
def test_an_error_in_a_chat_names_file_and_line(tmp_path: Path, name: str, lenient: bool) -> None:
    template = "{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}" if lenient else CHATML
    messages, what, fix = BAD_CHATS[name]
    tokenizer = byte_bpe(template=template)
    with pytest.raises(DataError) as caught:
        load(tmp_path, tokenizer, [ASK, answer("x")], {"messages": messages})
    assert what in caught.value.what and fix in str(caught.value.fix)
    assert caught.value.where == f"{tmp_path / 'chat.jsonl'}:2"


def test_a_template_that_raises_is_an_error_with_file_and_line(tmp_path: Path) -> None:
    tokenizer = byte_bpe(template="{{ raise_exception('only one user') }}")
    with pytest.raises(DataError, match="template refuses the messages: only one user") as caught:
        load(tmp_path, tokenizer, [ASK, answer("x")])
    assert caught.value.where == f"{tmp_path / 'chat.jsonl'}:1"
    assert "--chat-template-kwargs" in str(caught.value.fix)


def test_without_a_template_the_other_schema_is_proposed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no chat template") as caught:
        load(tmp_path, byte_bpe(), [ASK, answer("x")])
    assert caught.value.where and '{"prompt", "completion"}' in str(caught.value.fix)


def test_a_template_under_which_the_answer_cannot_be_found_is_an_error(tmp_path: Path) -> None:
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>bot\n'")
    with pytest.raises(DataError, match="renders the last turn differently") as caught:
        load(tmp_path, byte_bpe(template=template), [ASK, answer("x")])
    assert caught.value.where and "{% generation %}" in str(caught.value.fix)


def held_out_job(path: Path, **changes: Any) -> Inputs:
    byte_bpe(template=THINKING).save_pretrained(path / "model")
    (path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    (path / "model" / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    lines = [json.dumps({"prompt": "x", "completion": "y" * count}) for count in range(1, 13)]
    chat = [ASK, answer("one"), MORE, answer("two")]
    data = write_lines(path / "train.jsonl", *lines, json.dumps({"messages": chat}))
    values = {"model": path / "model", "data": data, "held_out": 0.25, **changes}
    return Inputs(Job(**values), "tiny", None)


def test_what_is_left_out_is_said_aloud(tmp_path: Path) -> None:
    screen = io.StringIO()
    inputs = held_out_job(tmp_path, max_length=11, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(DataError):  # fewer rows than ids
        inputs.load_training_data(5, Console(file=screen))
    inputs.load_training_data(300, Console(file=screen, width=200))
    assert "train.jsonl: 9 samples, 54 tokens to learn from" in screen.getvalue()
    assert "4 samples dropped: longer than --max-length 11" in screen.getvalue()
    held_out_job(tmp_path).load_training_data(300, Console(file=screen, width=200))
    assert "1 earlier assistant turns are context only" in screen.getvalue()


def test_the_jobs_template_arguments_and_eos_loss_reach_the_data(tmp_path: Path) -> None:
    own, tokenizer = tmp_path / "train.jsonl", byte_bpe(template=THINKING)

    def learned(**changes: Any) -> list[str]:
        inputs = held_out_job(tmp_path, eval_data=own, **changes)
        return runs(tokenizer, inputs.load_training_data(300, Console(quiet=True))[0].samples[-1])

    assert learned() == ["<think></think>two" + END]
    assert learned(chat_template_kwargs={"enable_thinking": False}) == ["two" + END]
    assert learned(eos_loss=False) == ["<think></think>two"]


def test_held_out_samples_are_a_split_or_the_eval_data(tmp_path: Path) -> None:
    console = Console(quiet=True)
    train, held_out = held_out_job(tmp_path).load_training_data(300, console)
    assert (len(train.samples), len(held_out.samples)) == (10, 3)
    assert not {s.id for s in train.samples} & {s.id for s in held_out.samples}
    own = write_lines(tmp_path / "eval.jsonl", '{"prompt": "a", "completion": "b"}')
    train, held_out = held_out_job(tmp_path, eval_data=own).load_training_data(300, console)
    assert (len(train.samples), len(held_out.samples)) == (13, 1)
    assert held_out.path == own
