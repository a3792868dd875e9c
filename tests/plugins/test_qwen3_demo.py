"""The built-in model: small, loadable, able to do its task about as well as its script says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import autodeco_plugin_qwen3
from autodeco import stories

DEMO = Path(autodeco_plugin_qwen3.__file__).parent / "demo"
PROBLEMS = 96


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def test_it_takes_two_megabytes_at_most() -> None:
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 2_000_000


def test_its_weights_are_bfloat16_in_safetensors_and_nothing_is_pickled() -> None:
    assert {path.suffix for path in DEMO.iterdir()} <= {".json", ".jinja", ".safetensors"}
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
        assert all(bool(torch.isfinite(file.get_tensor(name)).all()) for name in names)
        size = sum(file.get_tensor(name).numel() for name in names)
    assert "lm_head.weight" not in names  # tied
    assert 600_000 <= size <= 900_000


def test_it_is_a_real_qwen3_with_grouped_queries() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["head_dim"] == 32
    assert config["num_key_value_heads"] < config["num_attention_heads"]


def test_it_comes_with_a_vendors_sampling_defaults() -> None:
    generation = json.loads((DEMO / "generation_config.json").read_text())
    wanted = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert {key: generation[key] for key in wanted} == wanted


def test_every_token_of_the_model_is_a_token_of_the_tokenizer(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_the_tokenizer_gives_back_what_it_took(tokenizer: Any) -> None:
    for row in stories.records(9, "evaluation", 200, slips=0.1):
        for text in (row["prompt"], row["completion"], row["prompt"] + row["completion"] + "\n"):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
    text = "1 + 23 - 4.\n How many?\n 567"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompt_and_completion_tokenize_as_their_sum(tokenizer: Any) -> None:
    for row in stories.records(9, "evaluation", 20):
        parts = [tokenizer(row[key])["input_ids"] for key in ("prompt", "completion")]
        assert parts[0] + parts[1] == tokenizer(row["prompt"] + row["completion"])["input_ids"]


def test_numbers_are_single_digits_and_unknown_words_are_known_to_be(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer("421 36")["input_ids"]) == [
        *("4", "2", "1"),
        *(" 3", "6"),
    ]
    assert tokenizer(" xylophone")["input_ids"] == [tokenizer.unk_token_id]


def test_answers_are_short(tokenizer: Any) -> None:
    lengths = [
        len(tokenizer(row["completion"])["input_ids"])
        for row in stories.records(9, "evaluation", 200)
    ]
    assert min(lengths) >= 40 and max(lengths) <= 100


def test_the_chat_template_grows_by_suffixes(tokenizer: Any) -> None:
    row = next(stories.records(9, "evaluation", 1))
    asked = [{"role": "user", "content": row["prompt"]}]
    said = [*asked, {"role": "assistant", "content": row["completion"]}]
    opening = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    assert whole == f"{opening}{row['completion']}<|im_end|>\n"
    assert tokenizer.unk_token_id not in tokenizer(whole)["input_ids"]


def _solved(model: Any, tokenizer: Any, **decoding: Any) -> float:
    rows = list(stories.problems(17, "evaluation", PROBLEMS))
    encoded = tokenizer([row["problem"] for row in rows], return_tensors="pt", padding=True)
    encoded.pop("token_type_ids", None)
    out = model.generate(**encoded, max_new_tokens=110, **decoding)
    answers = tokenizer.batch_decode(
        out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )
    pairs = zip(answers, rows, strict=True)
    return sum(stories.check_answer(text, row["gt"]) for text, row in pairs) / PROBLEMS


def test_greedy_solves_nearly_all_and_plain_sampling_fails_often(
    model: Any, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    greedy = _solved(model, tokenizer, do_sample=False)
    sampled = _solved(model, tokenizer, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    # Sampling at T=1 is to fail 10-40 % of the time; 96 problems leave about +-0.09.
    assert greedy >= 0.9
    assert 0.52 <= sampled <= 0.95
    assert greedy - sampled >= 0.08
