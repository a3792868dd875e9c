"""Shows training samples as the trainer sees them: kept, masked and dropped tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from autodeco.engines.base import HiddenBatch
from autodeco.engines.hf import HFEngine
from autodeco.engines.select import choose_device, choose_dtype
from autodeco.heads.random import keep_mask
from autodeco.training.batching import pack
from autodeco.training.data import Sample, load_samples
from autodeco.training.tokenization import eos_token_ids, load_tokenizer

KEPT, MASKED, DROPPED = "kept", "masked", "dropped"
_STYLES = {KEPT: "bold green", MASKED: "dim", DROPPED: "strike yellow"}


@dataclass(frozen=True)
class ShownSample:
    """One sample, token by token.

    Attributes:
        id: The sample's id.
        line: Its line in the file.
        tokens: The tokens' text.
        states: For each token kept (in the loss), masked (context) or dropped (predicted right,
            and drawn to be left out).
    """

    id: int
    line: int
    tokens: tuple[str, ...]
    states: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return dict(vars(self))

    def render(self) -> Text:
        """Returns the coloured tokens under a head line with the counts."""
        counts = {state: self.states.count(state) for state in _STYLES}
        head = f"sample {self.id}, line {self.line}: {len(self.tokens)} tokens"
        text = Text.assemble((head, "bold"))  # bold as the style of all would undo dim
        for state, count in counts.items():
            text.append("  ")
            text.append(f"{count} {state}", style=_STYLES[state])
        text.append("\n")
        for token, state in zip(self.tokens, self.states, strict=True):
            safe = "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in token)
            text.append(safe, style=_STYLES[state])
        text.append("\n")
        return text


def show_samples(
    path: Path,
    model: Path,
    *,
    limit: int,
    max_length: int,
    eos_loss: bool,
    drop: float,
    seed: int,
    chat_template_kwargs: Mapping[str, Any],
) -> list[ShownSample]:
    """Reads the data as the trainer does and marks each token.

    The backbone runs only when something can be dropped, since that depends on its arg-max.

    Args:
        path: The data.
        model: The checkpoint.
        limit: Samples shown, from the first.
        max_length: Longer samples are left out, as in training.
        eos_loss: Whether the end-of-turn token is learned from.
        drop: Share of correctly predicted tokens that is dropped, as in the first epoch.
        seed: Of that draw.
        chat_template_kwargs: For the chat template.

    Raises:
        DataError: The data or the tokenizer cannot be used.
        WeightsError: The checkpoint cannot be read.
    """
    from autodeco.files import read_object

    tokenizer = load_tokenizer(model)
    vocab_size = read_object(model / "config.json").get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1:
        vocab_size = len(tokenizer)
    samples = load_samples(
        path,
        tokenizer,
        vocab_size=vocab_size,
        max_length=max_length,
        chat_template_kwargs=chat_template_kwargs,
        eos_loss=eos_loss,
        eos_token_ids=eos_token_ids(model, tokenizer),
    )
    chosen = samples.samples[:limit]
    dropped = _dropped(model, chosen, drop, seed) if drop > 0 else {}
    return [_show(sample, tokenizer, dropped) for sample in chosen]


def _show(sample: Sample, tokenizer: Any, dropped: dict[tuple[int, int], bool]) -> ShownSample:
    states = [MASKED]
    for position in range(len(sample.ids) - 1):
        if not sample.predict[position]:
            states.append(MASKED)
        else:
            states.append(DROPPED if dropped.get((sample.id, position)) else KEPT)
    tokens = tuple(tokenizer.decode([token]) for token in sample.ids.tolist())
    return ShownSample(sample.id, sample.line, tokens, tuple(states))


def _dropped(
    model: Path, samples: tuple[Sample, ...], drop: float, seed: int
) -> dict[tuple[int, int], bool]:
    device = choose_device("auto")
    engine = HFEngine(model, device, choose_dtype("auto", model, device))
    weight = engine.output_weight().weight
    result: dict[tuple[int, int], bool] = {}
    for hidden in engine.hidden_states(pack([sample]) for sample in samples):
        assert isinstance(hidden, HiddenBatch)
        right = (hidden.h @ weight.T).argmax(dim=-1) == hidden.label
        kept = keep_mask(seed, 0, hidden.sample_id, hidden.token_index, drop)
        keys = zip(hidden.sample_id.tolist(), hidden.token_index.tolist(), strict=True)
        result |= dict(zip(keys, (right & ~kept.to(torch.bool)).tolist(), strict=True))
    return result
