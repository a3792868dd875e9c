"""Which layouts fit some GPUs, best first, and why the others do not.

The rule: the fewest ranks that work on one token, ``pp * max(tp, ep)``; among equals the least
talk, in the order tensor (two sums in every layer), expert (two exchanges in every layer), pipeline
(one message a stage and microbatch).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from autodeco.engines.megatron.plan import GIB, LayoutPlan, Request, sketch_layout
from autodeco.errors import UsageError
from autodeco.layout import ParallelLayout

_MAX_TENSOR = 8  # tensor ranks talk in every layer and stay inside a machine


@dataclass(frozen=True)
class Refused:
    """A layout that cannot be.

    Attributes:
        layout: The layout.
        reason: With the arithmetic.
    """

    layout: ParallelLayout
    reason: str


@dataclass(frozen=True)
class Search:
    """What was found.

    Attributes:
        fitting: Best first.
        refused: In the same order.
        unseen: Layouts behind the last one that was looked at.
    """

    fitting: tuple[LayoutPlan, ...]
    refused: tuple[Refused, ...]
    unseen: int


def find_layouts(request: Request, limit: int) -> Search:
    """Looks for layouts in the order of the rule until `limit` of them fit."""
    candidates = sorted(set(_candidates(request)), key=_cost)
    fitting: list[LayoutPlan] = []
    refused: list[Refused] = []
    for layout in candidates:
        if len(fitting) == limit:
            break
        reason = _too_heavy(request, layout)
        if reason is None:
            try:
                plan = sketch_layout(request, layout)
            except UsageError as error:
                reason = error.what
            else:
                if plan.fits:
                    fitting.append(plan)
                    continue
                reason = plan.verdict()
        refused.append(Refused(layout, reason))
    unseen = len(candidates) - len(fitting) - len(refused)
    return Search(tuple(fitting), tuple(refused), unseen)


def _cost(layout: ParallelLayout) -> tuple[int, ...]:
    together = layout.pipeline * max(layout.tensor, layout.expert)
    return together, layout.tensor, layout.expert, layout.pipeline


def reason_of(layout: ParallelLayout) -> str:
    """Returns where a layout stands in the rule, in words."""
    together, tensor, expert, pipeline = _cost(layout)
    parts = [f"{together} ranks work on a token" if together > 1 else "a rank has the whole model"]
    parts += [f"2 sums over {tensor} ranks a layer"] if tensor > 1 else []
    parts += [f"2 exchanges over {expert} ranks a layer"] if expert > 1 else []
    parts += [f"{pipeline} stages, each sends a microbatch on"] if pipeline > 1 else []
    return ", ".join(parts)


def _candidates(request: Request) -> Iterator[ParallelLayout]:
    shape, gpus = request.bound.shape, request.gpus
    for tensor in _divisors(gpus):
        if tensor > _MAX_TENSOR:
            continue
        for pipeline in _divisors(gpus // tensor):
            if pipeline > shape.num_layers:
                continue
            experts = [n for n in _divisors(gpus // pipeline) if n == 1 or shape.num_experts]
            for expert in experts:
                if expert <= max(1, shape.num_experts):
                    layout = ParallelLayout(tensor, pipeline, expert)
                    yield _with_uneven_ends(layout, shape.num_layers)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _with_uneven_ends(layout: ParallelLayout, layers: int) -> ParallelLayout:
    """Gives the first and the last stage what the middle ones cannot share evenly."""
    stages = layout.pipeline
    if layers % stages == 0:
        return layout
    if stages == 2:
        return replace(layout, first_stage_layers=layers - layers // 2)
    middle = -(-layers // stages)
    while layers - (stages - 2) * middle < 2:
        middle -= 1
    ends = layers - (stages - 2) * middle
    return replace(layout, first_stage_layers=ends - ends // 2, last_stage_layers=ends // 2)


def _too_heavy(request: Request, layout: ParallelLayout) -> str | None:
    """Refuses by the weights alone: the average rank holds more than a rank may allocate."""
    whole = {True: 0, False: 0}
    for rule in request.bound.rules:
        size = sum(prod(part.size) for part in rule.parts)
        whole[rule.of_expert] += size * request.dtype.itemsize
    spread = layout.expert * layout.expert_tensor
    mean = (whole[False] / layout.tensor + whole[True] / spread) / layout.pipeline
    if mean <= request.budget:
        return None
    text = f"{whole[False] / GIB:.1f} / tp {layout.tensor}"
    if whole[True]:
        text = f"({text} + experts {whole[True] / GIB:.1f} / {spread})"
    text = f"weights {text} / pp {layout.pipeline} = {mean / GIB:.1f} GiB on the average rank"
    return f"{text} > {request.budget / GIB:.1f} GiB"
