"""Checks of the logits: stock transformers, the hf engine, and the megatron engine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autodeco.engines.base import Engine, HiddenBatch, TokenBatch
from autodeco.errors import WeightsError
from autodeco.family import ModelPreset
from autodeco.testing.checks import CheckFailed
from autodeco.testing.context import Context, quiet
from autodeco.training.batching import pack
from autodeco.training.data import Sample

# The first is long enough for windows and rotary scaling; together they reach every expert.
LENGTHS = (170, 23, 64)
TOLERANCE = 5e-5


@dataclass(frozen=True)
class Difference:
    """How far two engines are from each other.

    Attributes:
        largest: The largest difference of a logit.
        limit: What it may be.
        where: Preset and engines.
    """

    largest: float
    limit: float
    where: str

    def check(self, fix: str) -> None:
        """Raises unless it is within its limit.

        Raises:
            CheckFailed: It is not, or is no number.
        """
        if not self.largest <= self.limit:
            raise CheckFailed(
                f"logits differ by {self.largest:.1e}, more than {self.limit:.1e}",
                where=self.where,
                fix=fix,
            )


def some_batch(vocabulary: int, seed: int = 0) -> TokenBatch:
    """Returns sequences of `LENGTHS` random tokens; all but the last ones predict."""
    random = np.random.default_rng(seed)
    return pack(
        [
            Sample(
                number,
                random.integers(0, vocabulary, length).astype(np.int32),
                np.arange(length) < length - 1,
                number + 1,
            )
            for number, length in enumerate(LENGTHS)
        ]
    )


def logits_of(engine: Engine, batch: TokenBatch) -> Tensor:
    """Returns an engine's logits [m, V] of a batch, in float32."""
    (hidden,) = engine.hidden_states([batch])
    assert isinstance(hidden, HiddenBatch)
    return (hidden.h @ engine.output_weight().weight.T).float()


def stock_model(path: Path, **changes: Any) -> Any:
    """Loads a checkpoint as transformers does by itself, some keys of its configuration changed.

    Raises:
        CheckFailed: A tensor is missing or left over.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        config = AutoConfig.from_pretrained(str(path), local_files_only=True)
        for key, value in changes.items():
            setattr(config, key, value)
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise CheckFailed(
                f"transformers reports {problem.replace('_', ' ')}: {min(map(str, info[problem]))}",
                where=str(path),
                fix="correct the names and sizes in the weight map",
            )
    return model.eval()


@torch.no_grad()
def stock_logits(model: Any, batch: TokenBatch) -> Tensor:
    """Returns transformers' logits [m, V], one sequence after the other, without padding."""
    bounds = batch.cu_seqlens.tolist()
    parts = []
    for start, stop in pairwise(bounds):
        ids = batch.ids[start:stop]
        parts.append(model(input_ids=ids[None], use_cache=False).logits[0])
    return torch.cat(parts)[batch.predict].float()


def reference(context: Context, preset: ModelPreset, *, large: bool = False) -> Path:
    """Returns a checkpoint that stock transformers loads on CPU: `Context.model`, decoded."""
    path = context.model(preset, large=large)
    tensors = context.tensors(path)
    place = context.work / f"plain-{path.name}"
    return place if place.exists() else context.plain(path, place, tensors)


def compare(found: Tensor, wanted: Tensor, where: str, *, large: bool = False) -> Difference:
    """Returns the difference of two sets of logits; those of large activations may be large."""
    limit = TOLERANCE * max(1.0, float(wanted.std())) if large else TOLERANCE
    return Difference(float((found - wanted).abs().max()), limit, where)


def of_hf(context: Context) -> str:
    """Stock transformers against the hf engine, on usual and on large activations."""
    found: list[tuple[bool, Difference]] = []
    for preset in context.random_presets:
        batch = some_batch(preset.shape.vocab_size)
        for large in (False, True):
            try:
                wanted = stock_logits(stock_model(reference(context, preset, large=large)), batch)
                mine = logits_of(context.engine(preset, "hf", large=large), batch)
            except WeightsError as error:
                where = f"preset {preset.name}, {error.where}"
                raise CheckFailed(error.what, where=where, fix=error.fix) from error
            _alive(wanted, preset)
            difference = compare(
                mine, wanted, f"preset {preset.name}{', large' * large}", large=large
            )
            difference.check("the hf engine loads another model: check the storage formats")
            found.append((large, difference))
    return _said(found)


def _alive(logits: Tensor, preset: ModelPreset) -> None:
    """Logits that are all alike would be alike in every engine."""
    spread = float(logits.std(dim=0).mean())
    if not spread > 0.1:
        raise CheckFailed(
            f"the logits hardly depend on the tokens: they vary by {spread:.1e}",
            where=f"preset {preset.name}",
            fix="give the random preset sizes at which hidden states keep their scale",
        )


def _said(found: list[tuple[bool, Difference]]) -> str:
    worst = []
    for large in (False, True):
        _, most = max((f for f in found if f[0] == large), key=lambda f: f[1].largest)
        worst.append(f"{most.largest:.1e} (limit {most.limit:.1e})")
    return (
        f"sequences of {', '.join(map(str, LENGTHS))} tokens differ by {worst[0]} at most, "
        f"with large activations by {worst[1]}"
    )


def of_megatron(context: Context) -> str:
    """The hf engine against the megatron engine, packed."""
    found: list[tuple[bool, Difference]] = []
    for preset in context.megatron_presets():
        batch = some_batch(preset.shape.vocab_size)
        for large in (False, True):
            where = f"preset {preset.name}{', large activations' * large}, megatron against hf"
            wanted = logits_of(context.engine(preset, "hf", large=large), batch)
            engine = context.engine(preset, "megatron", large=large)
            difference = compare(logits_of(engine, batch), wanted, where, large=large)
            difference.check(
                "a rule of the weight map fills the wrong parameter or packs it otherwise, or the "
                "architecture's `megatron` fields do not say what the model does"
            )
            found.append((large, difference))
    return _said(found)
