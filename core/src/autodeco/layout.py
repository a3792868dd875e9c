"""How a model is spread over ranks: the sizes, how they are written, and which are possible."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from autodeco.errors import PluginError, UsageError

if TYPE_CHECKING:
    from autodeco.family import ModelShape

_KEYS = {
    "tp": "tensor",
    "pp": "pipeline",
    "ep": "expert",
    "cp": "context",
    "first": "first_stage_layers",
    "last": "last_stage_layers",
}


@dataclass(frozen=True)
class ParallelLayout:
    """How a model is spread over GPUs.

    Attributes:
        tensor: Ranks that split every matrix.
        pipeline: Stages that split the layers.
        expert: Ranks that split the experts.
        context: Ranks that split the sequence.
        first_stage_layers: Layers of the first stage; None: even.
        last_stage_layers: Layers of the last stage; None: even.
        gpus: GPUs of the run that the layout was made for.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    context: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    gpus: int = 1

    @classmethod
    def parse(cls, text: str) -> ParallelLayout:
        """Reads a layout as ``--layout`` has it: ``tp=1,pp=8,ep=8,first=18,last=10``.

        Raises:
            UsageError: An unknown key (the nearest is suggested), or a value that is no positive
                whole number.
        """
        values: dict[str, int] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            key, _, value = part.partition("=")
            if key not in _KEYS:
                near = get_close_matches(key, _KEYS, n=1)
                raise UsageError(
                    f"layout: unknown key {key!r}",
                    where=text,
                    fix=f"did you mean {near[0]!r}?" if near else f"use {', '.join(_KEYS)}",
                )
            if not re.fullmatch("[0-9]{1,9}", value) or int(value) < 1:
                raise UsageError(
                    f"layout: {part!r} is no positive whole number",
                    where=text,
                    fix=f"write {key}=1 or more",
                )
            if _KEYS[key] in values:
                raise UsageError(f"layout: {key} is given twice", where=text, fix="remove one")
            values[_KEYS[key]] = int(value)
        return replace(cls(), **values)

    def __str__(self) -> str:
        """Writes it as `parse` reads it; sizes of 1 are left out."""
        given = {key: getattr(self, name) for key, name in _KEYS.items()}
        return ",".join(f"{k}={v}" for k, v in given.items() if v and v > 1) or "tp=1"

    @property
    def model_ranks(self) -> int:
        """Returns the ranks that hold one copy of the model (experts may span more)."""
        return self.tensor * self.pipeline * self.context

    @property
    def is_parallel(self) -> bool:
        """Returns whether the model itself is split."""
        return self.model_ranks * self.expert > 1

    @property
    def expert_tensor(self) -> int:
        """Returns the ranks that split each expert: experts are split or spread, not both."""
        return 1 if self.expert > 1 else self.tensor

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Returns the number of layers of each pipeline stage.

        Raises:
            PluginError: The layers cannot be spread so; the message has the arithmetic.
        """
        first, last = self.first_stage_layers, self.last_stage_layers
        fixed = [n for n in (first, last) if n is not None]
        middle, rest = self.pipeline - len(fixed), num_layers - sum(fixed)
        empty = middle > 0 and rest < middle
        if middle < 0 or rest < 0 or empty or (middle and rest % middle) or (not middle and rest):
            raise PluginError(
                f"{num_layers} layers do not fit {self.pipeline} pipeline stages"
                f" (first {first or 'even'}, last {last or 'even'}): {rest} layers over {middle}"
                " stages",
                fix="change the layout so that the middle stages get equal numbers of layers",
            )
        inner = [rest // middle] * middle if middle else []
        return tuple(([first] if first else []) + inner + ([last] if last else []))

    def data_ranks(self, shape: ModelShape, world_size: int) -> int:
        """Proves that the layout is possible, before any process meets another.

        Args:
            shape: The model's.
            world_size: All processes.

        Returns:
            The data-parallel size.

        Raises:
            UsageError: It is not; the message has the arithmetic of everything that is wrong.
        """
        wrong = [*self._indivisible(shape), *self._unfit_world(world_size)]
        try:
            self.stage_layers(shape.num_layers)
        except PluginError as error:
            wrong.append(error.what)
        if wrong:
            raise UsageError(
                f"the layout {self} is impossible here: " + "; ".join(wrong),
                where=f"{world_size} processes, {shape.num_layers} layers, {shape.num_heads} heads",
                fix="change --layout, or start another number of processes",
            )
        return world_size // self.model_ranks

    def _indivisible(self, shape: ModelShape) -> list[str]:
        """Returns what tensor and expert ranks cannot split evenly."""
        parts = {
            "query heads": (shape.num_heads, self.tensor),
            "key and value heads": (shape.num_kv_heads, self.tensor),
            "feed-forward columns": (shape.ffn_size, self.tensor),
            "vocabulary rows": (shape.vocab_size, self.tensor),
            "experts": (shape.num_experts, self.expert),
            "columns of an expert": (shape.expert_ffn_size, self.expert_tensor),
        }
        wrong = [f"{n} {what} over {r} ranks" for what, (n, r) in parts.items() if n % r]
        if self.expert > 1 and not shape.num_experts:
            wrong.append(f"ep={self.expert}, and the model has no experts")
        return wrong

    def _unfit_world(self, world_size: int) -> list[str]:
        """Returns why the processes do not make up whole copies of the model."""
        product = f"tp {self.tensor} x pp {self.pipeline} x cp {self.context} = {self.model_ranks}"
        if world_size % self.model_ranks:
            return [f"{product} does not divide {world_size} processes"]
        stage = world_size // self.pipeline
        if stage % self.expert:
            return [
                f"ep={self.expert} does not divide the {stage} ranks of a pipeline stage "
                f"({world_size} processes / pp {self.pipeline})"
            ]
        return []
