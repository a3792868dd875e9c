"""Training data: the three schemas, every error with file and line, boundary, end, splits."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import save_tiny, tiny_model
from tokenizers_made import BOS, CHATML, END, EOS, byte_bpe, words_of, write_lines

from autodeco.decoding.problems import Problem, problem_prompts
from autodeco.errors import DataError
from autodeco.training.data import Sample, SampleSet, load_samples, split_held_out
from autodeco.training.tokenization import eos_token_ids, load_tokenizer, tokenize_prompt

TOKENIZER = byte_bpe(template=CHATML)
EOS_ID, END_ID = (TOKENIZER.convert_tokens_to_ids(token) for token in (EOS, END))
VOCABULARY = len(TOKENIZER)
GOOD = '{"prompt": "a", "completion": "b"}'


def load(path: Path, *lines: Any, tokenizer: Any = TOKENIZER, **options: Any) -> SampleSet:
    texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    values = {"vocab_size": VOCABULARY, "max_length": 64, "eos_token_ids": (EOS_ID, END_ID)}
    return load_samples(
        write_lines(path / "train.jsonl", *texts), tokenizer, **{**values, **options}
    )


def learned(sample: Sample) -> list[int]:
    """The tokens that some position predicts."""
    return sample.ids[1:][sample.predict[:-1]].tolist()


def test_prompt_and_completion(tmp_path: Path) -> None:
    (sample,) = load(tmp_path, {"prompt": "x: ", "completion": "yz"}).samples
    assert words_of(TOKENIZER, sample.ids) == ["x", ":", " ", "y", "z", EOS]
    assert words_of(TOKENIZER, learned(sample)) == ["y", "z", EOS]
    assert sample.ids.dtype == np.int32 and sample.predict.dtype == np.bool_


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    (sample,) = load(tmp_path, {"inputs": {"p_ids": [9, 8], "r_ids": [7, 6]}}).samples
    assert sample.ids.tolist() == [9, 8, 7, 6, EOS_ID]
    assert learned(sample) == [7, 6, EOS_ID]


def test_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    (sample,) = load(tmp_path, {"messages": chat}).samples
    text = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert TOKENIZER.decode(sample.ids) == text
    assert words_of(TOKENIZER, learned(sample)) == ["y", "e", "s", END]


def test_bug_text_behind_the_end_of_the_turn_was_learned(tmp_path: Path) -> None:
    record = {"prompt": "<|im_start|>assistant\n", "completion": "yes<|im_end|>\n"}
    (sample,) = load(tmp_path, record).samples
    assert words_of(TOKENIZER, learned(sample)) == ["y", "e", "s", END]


def test_bug_columns_of_null_were_taken_for_a_schema(tmp_path: Path) -> None:
    record = {"prompt": "x", "completion": "y", "messages": None, "inputs": None, "tools": None}
    (sample,) = load(tmp_path, record).samples
    assert words_of(TOKENIZER, learned(sample)) == ["y", EOS]


def test_the_held_out_split_can_be_capped(tmp_path: Path) -> None:
    samples = load(tmp_path, *[GOOD] * 40)
    train, held_out = split_held_out(samples, 0.5, 0, 3)
    assert (len(train.samples), len(held_out.samples)) == (37, 3)


@pytest.mark.parametrize(("prompt", "completion"), [(1, 1), (1, 4), (5, 1), (3, 7)])
def test_positions_that_predict(tmp_path: Path, prompt: int, completion: int) -> None:
    record = {"inputs": {"p_ids": [10] * prompt, "r_ids": [11] * (completion - 1) + [END_ID]}}
    (sample,) = load(tmp_path, record).samples
    assert sample.predict.nonzero()[0].tolist() == list(range(prompt - 1, prompt + completion - 1))


def test_schemas_may_be_mixed_and_samples_keep_line_and_id(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    ids = {"inputs": {"p_ids": [9], "r_ids": [8]}}
    found = load(
        tmp_path, GOOD, "", {"messages": chat}, "   ", ids, b"\xef\xbb\xbf" + GOOD.encode()
    )
    assert [(s.id, s.line) for s in found.samples] == [(0, 1), (2, 3), (4, 5), (5, 6)]
    assert found.path == tmp_path / "train.jsonl" and not found.dropped


BAD = {
    "malformed JSON": ('{"prompt": "a", ', "malformed JSON", "one JSON object a line"),
    "two objects": ('{"prompt": "a"} {}', "malformed JSON", "one JSON object a line"),
    "nested too deep": ("[" * 99999, "malformed JSON", "one JSON object a line"),
    "a number of 5,000 digits": (
        '{"inputs": {"p_ids": [1], "r_ids": [' + "1" * 5000 + "]}}",
        "malformed JSON",
        "one JSON object a line",
    ),
    "a list": ("[1, 2]", "a list, not an object", "one JSON object a line"),
    "a number": ("3", "a int, not an object", "one JSON object a line"),
    "null": ("null", "a NoneType, not an object", "one JSON object a line"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8", "UTF-8 encoding"),
    "half a character": (
        '{"prompt": "\\ud800", "completion": "b"}',
        "half a character",
        "write the whole character",
    ),
    "no completion": ('{"prompt": "a"}', "'completion' is missing", '{"prompt", "completion"}'),
    "no prompt": ('{"completion": "a"}', "'prompt' is missing", '{"prompt", "completion"}'),
    "no key": ("{}", "'prompt' is missing (there: none)", '{"prompt", "completion"}'),
    "misspelt key": ('{"promt": "a", "completion": "b"}', "there: promt", "did you mean 'promt'"),
    "completion of a number": (
        '{"prompt": "a", "completion": 1}',
        "a int, not text",
        "JSON string",
    ),
    "prompt of null": ('{"prompt": null, "completion": "b"}', "'prompt' is missing", "completion"),
    "two schemas": (
        '{"prompt": "a", "completion": "b", "inputs": {"p_ids": [1], "r_ids": [1]}}',
        "several schemas: inputs, completion",
        "leave one",
    ),
    "prompt of a list": ('{"prompt": ["a"], "completion": "b"}', "a list, not text", "string"),
    "empty completion": ('{"prompt": "a", "completion": ""}', "completion is empty", "remove"),
    "empty prompt": ('{"prompt": "", "completion": "b"}', "prompt has no token", "give a prompt"),
    "inputs of a list": ('{"inputs": [1]}', "inputs is no object", "p_ids"),
    "no r_ids": ('{"inputs": {"p_ids": [1]}}', "inputs.r_ids is no list", "token ids"),
    "ids of text": ('{"inputs": {"p_ids": ["a"], "r_ids": [1]}}', "inputs.p_ids", "token ids"),
    "ids of truth": ('{"inputs": {"p_ids": [true], "r_ids": [1]}}', "inputs.p_ids", "token ids"),
    "ids of fractions": ('{"inputs": {"p_ids": [1.0], "r_ids": [1]}}', "inputs.p_ids", "token"),
    "empty r_ids": ('{"inputs": {"p_ids": [1], "r_ids": []}}', "completion is empty", "remove"),
    "empty p_ids": ('{"inputs": {"p_ids": [], "r_ids": [1]}}', "prompt has no token", "prompt"),
    "an id too large": (
        f'{{"inputs": {{"p_ids": [1], "r_ids": [2, {VOCABULARY}]}}}}',
        f"token id {VOCABULARY} at position 2 is outside 0..{VOCABULARY - 1}",
        "another model",
    ),
    "an id of 2**40": (
        '{"inputs": {"p_ids": [1099511627776], "r_ids": [2]}}',
        "token id 1099511627776 at position 0",
        "another model",
    ),
    "a negative id": ('{"inputs": {"p_ids": [1], "r_ids": [-1]}}', "token id -1", "another model"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_names_file_and_line_and_what_to_do(tmp_path: Path, name: str) -> None:
    line, what, fix = BAD[name]
    with pytest.raises(DataError) as caught:
        load(tmp_path, GOOD, "", line, GOOD)
    assert what in caught.value.what
    assert str(caught.value.where).startswith(f"{tmp_path / 'train.jsonl'}:3")
    assert fix in str(caught.value.fix)


def test_malformed_json_names_the_column(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, '{"prompt" "a"}')
    assert str(caught.value.where).endswith("train.jsonl:1:11")


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_a_file_without_samples_is_an_error(tmp_path: Path, lines: Sequence[str]) -> None:
    with pytest.raises(DataError, match="no sample is left: the file is empty") as caught:
        load(tmp_path, *lines)
    assert caught.value.where == str(tmp_path / "train.jsonl") and caught.value.fix


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot read the data") as caught:
            load_samples(path, TOKENIZER, vocab_size=VOCABULARY, max_length=9)
        assert caught.value.where == str(path)


def test_over_long_samples_are_dropped_whole_and_counted(tmp_path: Path) -> None:
    lines = [{"prompt": "x", "completion": "y" * count} for count in (1, 6, 7, 8, 3)]
    found = load(tmp_path, *lines, max_length=8)  # prompt and end-of-turn token count, too
    assert [s.id for s in found.samples] == [0, 1, 4]
    assert found.dropped == {"longer than --max-length 8": 2}
    with pytest.raises(DataError, match=r"no sample is left: .*--max-length 2.*5"):
        load(tmp_path, *lines, max_length=2)


def test_end_of_turn_token_is_learned_by_default(tmp_path: Path) -> None:
    record = {"prompt": "x", "completion": "y"}
    (sample,) = load(tmp_path, record).samples
    assert learned(sample)[-1] == EOS_ID
    (without,) = load(tmp_path, record, eos_loss=False).samples
    assert without.ids.tolist() == sample.ids.tolist()
    assert words_of(TOKENIZER, learned(without)) == ["y"]


@pytest.mark.parametrize("end", [EOS, END])
def test_end_of_turn_token_is_not_doubled(tmp_path: Path, end: str) -> None:
    text = {"prompt": "x", "completion": "y" + end}
    ids = {"inputs": {"p_ids": [9], "r_ids": [8, TOKENIZER.convert_tokens_to_ids(end)]}}
    for sample in load(tmp_path, text, ids).samples:
        tokens = words_of(TOKENIZER, sample.ids)
        assert tokens[-1] == end and sum(token in (EOS, END) for token in tokens) == 1
    for sample in load(tmp_path, text, ids, eos_loss=False).samples:
        assert sample.ids[-1] not in learned(sample) and len(learned(sample)) == 1


def test_end_alone_is_nothing_to_learn_when_it_is_not_in_the_loss(tmp_path: Path) -> None:
    lines = [{"prompt": "x", "completion": END}, {"prompt": "x", "completion": "y"}]
    found = load(tmp_path, *lines, eos_loss=False)
    assert [s.id for s in found.samples] == [1]
    assert found.dropped == {"nothing to learn from (only the end-of-turn token)": 1}
    assert len(load(tmp_path, *lines).samples) == 2


def test_a_prompt_gets_one_bos_whether_it_spells_it_out_or_not(tmp_path: Path) -> None:
    tokenizer = byte_bpe(bos=True)
    lines = [{"prompt": prompt, "completion": "y"} for prompt in ("x", BOS + "x")]
    for sample in load(tmp_path, *lines, tokenizer=tokenizer).samples:
        assert words_of(tokenizer, sample.ids) == [BOS, "x", "y", EOS]
    assert tokenizer(BOS + "x")["input_ids"].count(0) == 2  # what is avoided


def test_nothing_is_added_where_the_tokenizer_adds_no_bos(tmp_path: Path) -> None:
    for sample in load(tmp_path, GOOD).samples:
        assert words_of(TOKENIZER, sample.ids) == ["a", "b", EOS]


def test_a_prompt_is_not_ended_by_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_bpe(bos=True, trailing_eos=True)
    assert tokenizer("x")["input_ids"][-1] == EOS_ID
    lines = [{"prompt": prompt, "completion": "y"} for prompt in ("x", BOS + "x")]
    for sample in load(tmp_path, *lines, tokenizer=tokenizer).samples:
        assert words_of(tokenizer, sample.ids) == [BOS, "x", "y", EOS]
    spelled = {"prompt": f"{BOS}x{EOS}", "completion": "y"}
    (sample,) = load(tmp_path, spelled, tokenizer=tokenizer).samples
    assert words_of(tokenizer, sample.ids) == [BOS, "x", EOS, "y", EOS]


@pytest.mark.parametrize("bos", [False, True])
def test_the_boundary_is_the_one_that_generation_has(tmp_path: Path, bos: bool) -> None:
    tokenizer = byte_bpe(bos=bos)
    texts = [("xab", "c"), ("1", "23"), ("q\n", "\n12"), ("a", "bc"), (BOS + "12", "3")]
    lines = [{"prompt": prompt, "completion": rest} for prompt, rest in texts]
    joined = 0
    for (prompt, rest), sample in zip(
        texts, load(tmp_path, *lines, tokenizer=tokenizer).samples, strict=True
    ):
        given = problem_prompts([Problem(prompt, "-", None, 1)], tokenizer)[0]
        assert given == tokenize_prompt(tokenizer, prompt)
        answer = tokenizer(rest, add_special_tokens=False)["input_ids"]
        assert sample.ids.tolist() == [*given, *answer, EOS_ID]
        assert int(sample.predict.argmax()) == len(given) - 1
        joined += tokenizer(prompt + rest)["input_ids"] != [*given, *answer]
    assert joined >= 4  # together, merges cross the boundary


def test_a_tokenizer_that_does_not_fit_the_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"ids up to {VOCABULARY - 1}.* ends at {VOCABULARY - 2}"):
        load(tmp_path, GOOD, vocab_size=VOCABULARY - 1)
    assert load(tmp_path, GOOD, vocab_size=VOCABULARY).samples
    assert load(tmp_path, GOOD, vocab_size=VOCABULARY + 99).samples  # padded rows are usual


def test_a_checkpoint_without_tokenizer_does_not_get_an_empty_one(tmp_path: Path) -> None:
    model = save_tiny(tiny_model(), tmp_path / "model")
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no tokenizer beside the checkpoint") as caught:
        load_tokenizer(model)
    assert caught.value.where == str(model) and caught.value.fix
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer cannot be loaded"):
        load_tokenizer(model)
    byte_bpe().save_pretrained(model)
    assert load_tokenizer(model).get_vocab() == byte_bpe().get_vocab()


def test_every_token_that_ends_an_answer_is_known_the_tokenizers_own_first(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 5}')
    assert eos_token_ids(tmp_path, TOKENIZER) == (EOS_ID, END_ID, 5)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    assert eos_token_ids(tmp_path, TOKENIZER) == (EOS_ID,)


def many(count: int) -> SampleSet:
    ids, predict = np.zeros(2, dtype=np.int32), np.array([True, False])
    return SampleSet(
        tuple(Sample(i, ids, predict, i + 1) for i in range(count)), {"long": 3}, Path("x.jsonl")
    )


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(100, 0.1, 10), (3, 0.01, 1), (2, 0.99, 1)]
)
def test_the_split_is_disjoint_whole_and_deterministic(
    count: int, fraction: float, held: int
) -> None:
    samples = many(count)
    train, held_out = (
        [s.id for s in part.samples] for part in split_held_out(samples, fraction, seed=3)
    )
    assert len(held_out) == held and sorted(train + held_out) == list(range(count))
    assert train == sorted(train) and held_out == sorted(held_out)
    shuffled = list(samples.samples)
    random.Random(0).shuffle(shuffled)
    again = split_held_out(SampleSet(tuple(shuffled), {}, samples.path), fraction, seed=3)
    assert sorted(s.id for s in again[1].samples) == held_out


def test_another_seed_holds_out_others_and_drops_are_counted_once() -> None:
    first, second = (split_held_out(many(100), 0.1, seed)[1] for seed in (0, 1))
    assert {s.id for s in first.samples} != {s.id for s in second.samples}
    train, held_out = split_held_out(many(100), 0.1, 0)
    assert train.dropped == {"long": 3} and held_out.dropped == {}


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.5), (9, 0.0), (9, 1.0), (9, -0.1)])
def test_a_split_that_leaves_nothing_is_an_error(count: int, fraction: float) -> None:
    with pytest.raises(DataError, match="cannot hold out") as caught:
        split_held_out(many(count), fraction, 0)
    assert "--eval-data" in str(caught.value.fix)
