"""`autodeco data show`: kept, masked and dropped tokens, told apart by colour, safely printed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from tiny import tiny_model
from tokenizers_made import CHATML, byte_bpe, write_lines

from autodeco.cli.tools import add_tool_commands
from autodeco.heads.random import keep_mask
from autodeco.training.show import ShownSample, show_samples

GREEN, DIM, STRUCK = "\x1b[1;32m", "\x1b[2m", "\x1b[9;33m"
KNOWN = (
    {"prompt": "xab", "completion": "c12"},
    {"prompt": "abc", "completion": "abcabc"},
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shown")
    tokenizer = byte_bpe(template=CHATML)
    tiny_model(vocab_size=len(tokenizer), eos_token_id=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def written(path: Path, *records: Any) -> Path:
    return write_lines(path / "data.jsonl", *(json.dumps(record) for record in records))


def shown(path: Path, model: Path, *records: Any, **options: Any) -> list[ShownSample]:
    values: dict[str, Any] = {
        "limit": 9,
        "max_length": 64,
        "eos_loss": True,
        "drop": 0.0,
        "seed": 0,
        "chat_template_kwargs": {},
        **options,
    }
    return show_samples(written(path, *records), model, **values)


def command(*arguments: object) -> Any:
    group = click.Group()
    add_tool_commands(group)
    return CliRunner().invoke(group, ["data", "show", *map(str, arguments)])


def terminal(sample: ShownSample, width: int = 200) -> str:
    """What a terminal is given."""
    screen = io.StringIO()
    console = Console(
        file=screen, force_terminal=True, color_system="standard", width=width, no_color=False
    )
    console.print(sample.render())
    return screen.getvalue()


def test_context_is_masked_and_the_completion_is_kept(tmp_path: Path, model: Path) -> None:
    first, second = shown(tmp_path, model, *KNOWN)
    assert first.tokens == ("x", "ab", "c", "12", "<eos>")
    assert first.states == ("masked", "masked", "kept", "kept", "kept")
    assert (first.id, first.line, second.id, second.line) == (0, 1, 1, 2)
    assert second.states == ("masked", "kept", "kept", "kept")
    (without, _) = shown(tmp_path, model, *KNOWN, eos_loss=False)
    assert without.states == ("masked", "masked", "kept", "kept", "masked")
    assert [sample.line for sample in shown(tmp_path, model, *KNOWN, limit=1)] == [1]


def forced(model: Path, prompt: str, count: int) -> list[int]:
    """What the model itself says next, greedily; so its arg-max is the label."""
    from transformers import AutoModelForCausalLM

    base, tokenizer = AutoModelForCausalLM.from_pretrained(model), byte_bpe()
    ids = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(base(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("seed", [0, 5])
def test_dropped_are_predicted_tokens_that_the_draw_leaves_out(
    tmp_path: Path, model: Path, seed: int
) -> None:
    ids = forced(model, "x", 24)
    greedy = {"inputs": {"p_ids": ids[:1], "r_ids": ids[1:]}}
    wrong = {"inputs": {"p_ids": ids[:1], "r_ids": [(i + 1) % 250 + 4 for i in ids[1:9]]}}
    first, second = shown(tmp_path, model, greedy, wrong, drop=0.6, seed=seed)
    index = torch.arange(24)
    kept = keep_mask(seed, 0, torch.zeros_like(index), index, 0.6)
    assert first.states[0] == "masked"
    assert first.states[1:25] == tuple("kept" if k else "dropped" for k in kept.tolist())
    assert 3 < first.states.count("dropped") < 24
    assert second.states.count("dropped") == 0  # what is not predicted is never dropped
    everything = shown(tmp_path, model, greedy, drop=1.0)[0]
    assert everything.states[1:25] == ("dropped",) * 24


def test_the_three_states_have_three_colours_and_are_counted() -> None:
    sample = ShownSample(7, 8, ("aa", "bb", "cc"), ("masked", "kept", "dropped"))
    text = terminal(sample)
    for style, token in ((DIM, "aa"), (GREEN, "bb"), (STRUCK, "cc")):
        assert f"{style}{token}\x1b[0m" in text
    assert "sample 7, line 8: 3 tokens" in text
    for style, count in ((GREEN, "1 kept"), (DIM, "1 masked"), (STRUCK, "1 dropped")):
        assert f"{style}{count}\x1b[0m" in text


@pytest.mark.parametrize(
    "hostile", ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "a\rb", "\x08", "\x7f", "\u202e", "\x00"]
)
def test_control_characters_do_not_reach_the_terminal(hostile: str) -> None:
    text = terminal(ShownSample(0, 1, ("A", hostile, "\n\tZ"), ("kept", "kept", "kept")))
    for style in (GREEN, DIM, STRUCK, "\x1b[1m", "\x1b[0m"):
        text = text.replace(style, "")  # the colours themselves
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert "\ufffd" in text and "A" in text and "Z" in text


def test_markup_in_the_data_is_printed_as_it_is() -> None:
    assert "[red]x[/]" in terminal(ShownSample(0, 1, ("[red]x[/]",), ("kept",)))


def test_the_command_prints_samples(tmp_path: Path, model: Path) -> None:
    path = written(tmp_path, *KNOWN, {"prompt": "z", "completion": "\x1b[31mevil"})
    result = command("--data", path, "--model", model)
    assert result.exit_code == 0, result.output
    assert "sample 0, line 1: 5 tokens  3 kept  2 masked  0 dropped" in result.output
    assert "xabc12<eos>" in result.output and "sample 2, line 3" in result.output
    assert "\x1b" not in result.output and "\ufffd[31mevil" in result.output
    assert "sample 1" not in command("--data", path, "--model", model, "--limit", 1).output


def test_the_command_prints_json(tmp_path: Path, model: Path) -> None:
    result = command("--data", written(tmp_path, *KNOWN), "--model", model, "--json")
    first = json.loads(result.output)[0]
    assert first["tokens"] == ["x", "ab", "c", "12", "<eos>"] and first["line"] == 1
    assert first["states"] == ["masked", "masked", "kept", "kept", "kept"]


@pytest.mark.parametrize("kwargs", ["{", "[1]", "3", '"x"'])
def test_template_arguments_that_are_no_object_are_refused(
    tmp_path: Path, model: Path, kwargs: str
) -> None:
    path = written(tmp_path, *KNOWN)
    result = command("--data", path, "--model", model, "--chat-template-kwargs", kwargs)
    assert result.exit_code == 2 and "--chat-template-kwargs" in result.output
