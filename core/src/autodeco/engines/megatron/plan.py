"""Plans a run on GPUs that are not there: every rank's model, memory and share of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from autodeco.engines.megatron import engine as engine_module
from autodeco.engines.megatron.compat import apply_cures
from autodeco.engines.megatron.engine import MegatronEngine
from autodeco.engines.megatron.landing import Landing, Ledger
from autodeco.engines.megatron.loading import Place
from autodeco.engines.megatron.memory import (
    META,
    RankMemory,
    as_if_on_a_gpu,
    measure,
    replaced,
)
from autodeco.engines.megatron.settings import transformer_config
from autodeco.errors import EnvironmentProblem
from autodeco.family import Architecture
from autodeco.hookspecs import ImportedWeights
from autodeco.layout import ParallelLayout
from autodeco.weights import BoundWeightMap

GIB = 2**30
NOT_MODELLED = (
    "the CUDA context and loaded kernels (0.5 to 1 GiB)",
    "NCCL's buffers (up to 2 GiB, more with more groups)",
    "fragmentation of the allocator",
    "scratch inside single kernels (sorting), but for cuBLAS's 32 MiB",
    "rotary tables of up to 31 further sequence lengths, which megatron-core keeps",
    "a router that prefers some experts: their rank needs more",
    "the moment of loading, when a layer's experts are there twice",
    "host memory, and the time that anything takes",
)


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
        architecture: The model's.
        config: Its ``config.json``.
        bound: The weight map, bound to the checkpoint's tensor names.
        gpus: GPUs of the run, one rank each.
        gpu_memory: Bytes of one GPU.
        reserve: Bytes of it that are kept free for `NOT_MODELLED`.
        micro_batch_tokens: Tokens of a microbatch.
        max_length: Longest sequence; one that is longer than `micro_batch_tokens` stands alone.
        dtype: Of the backbone.
        objective: A name of `OBJECTIVES`.
    """

    architecture: Architecture
    config: Mapping[str, Any]
    bound: BoundWeightMap
    gpus: int
    gpu_memory: int
    reserve: int
    micro_batch_tokens: int = 16384
    max_length: int = 6144
    dtype: torch.dtype = torch.bfloat16
    objective: str = "nll"

    @property
    def budget(self) -> int:
        """Returns the bytes of a GPU that a rank may allocate."""
        return self.gpu_memory - self.reserve

    @property
    def microbatch(self) -> tuple[int, int]:
        """Returns rows and length of the largest microbatch."""
        rows = max(1, self.micro_batch_tokens // self.max_length)
        return rows, max(self.max_length, self.micro_batch_tokens // rows)

    @property
    def chosen_experts(self) -> float:
        """Returns the experts of a token by all experts."""
        shape = self.bound.shape
        return shape.experts_per_token / shape.num_experts if shape.num_experts else 0.0


@dataclass(frozen=True)
class RankPlan:
    """A rank, and those that are like it but for their data- or context-parallel place.

    Attributes:
        ranks: Their numbers.
        stage: Pipeline stage.
        place: Tensor and expert place.
        layers: First and last layer, counted from 0.
        embedding: It holds the embedding.
        output: It holds the final norm and the output layer.
        parameters: Elements of its parameters.
        memory: Its bytes.
    """

    ranks: tuple[int, ...]
    stage: int
    place: Place
    layers: tuple[int, int]
    embedding: bool
    output: bool
    parameters: int
    memory: RankMemory

    def arithmetic(self) -> str:
        """Returns how the peak comes about, in GiB."""
        m = self.memory
        terms = {"weights": m.weights, "heads": m.heads}
        if m.forward + m.pipeline >= m.objective:
            terms |= {"forward": m.forward, "pipeline": m.pipeline}
        else:
            terms |= {"objective": m.objective}
        text = " + ".join(f"{name} {size / GIB:.2f}" for name, size in terms.items())
        return f"stage {self.stage}: {text} = {m.peak / GIB:.2f} GiB"


@dataclass(frozen=True)
class LayoutPlan:
    """One layout, planned.

    Attributes:
        layout: The layout.
        data_ranks: Shares that the data is cut into.
        ranks: Every distinct rank.
        budget: Bytes that a rank may allocate.
        landing: The proof over all ranks; None where only one rank of each kind was built.
    """

    layout: ParallelLayout
    data_ranks: int
    ranks: tuple[RankPlan, ...]
    budget: int
    landing: Landing | None = None

    @property
    def largest(self) -> RankPlan:
        """Returns the rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.memory.peak)

    @property
    def fits(self) -> bool:
        """Returns whether every rank's peak is within the budget."""
        return self.largest.memory.peak <= self.budget

    def verdict(self) -> str:
        """Returns the arithmetic of the largest rank against the card."""
        sign = "<=" if self.fits else ">"
        return f"{self.largest.arithmetic()} {sign} {self.budget / GIB:.2f} GiB"


def plan_layout(request: Request, layout: ParallelLayout) -> LayoutPlan:
    """Builds every distinct rank and proves that the checkpoint lands once in each copy.

    Raises:
        UsageError: The layout is impossible; the message has the arithmetic.
        WeightsError: A tensor lands nowhere, in part or twice.
        EnvironmentProblem: This process is already one of a group.
    """
    data_ranks = layout.data_ranks(request.bound.shape, request.gpus)
    ledger = Ledger(request.bound, layout, request.gpus)
    ranks = _Ranks(request, layout)
    same: dict[tuple[int, Place], list[int]] = {}
    for rank in range(request.gpus):
        with _standing_at(layout, rank, request.gpus):
            same.setdefault(_where(), []).append(rank)
    plans = []
    for (_, place), members in same.items():
        model, plan = ranks.build(tuple(members))
        ledger.enter(model, place, len(members))
        plans.append(plan)
    return LayoutPlan(layout, data_ranks, tuple(plans), request.budget, ledger.close())


def sketch_layout(request: Request, layout: ParallelLayout) -> LayoutPlan:
    """Builds one rank of every kind of pipeline stage: enough to know whether the layout fits.

    Raises:
        UsageError: The layout is impossible.
        EnvironmentProblem: This process is already one of a group.
    """
    data_ranks = layout.data_ranks(request.bound.shape, request.gpus)
    layers = layout.stage_layers(request.bound.shape.num_layers)
    last = layout.pipeline - 1
    kinds = {(stage == 0, stage == last, layers[stage]): stage for stage in range(last + 1)}
    ranks = _Ranks(request, layout)
    size = request.gpus // layout.pipeline  # of a stage; its ranks follow each other
    plans = tuple(ranks.build((stage * size,))[1] for stage in sorted(kinds.values()))
    return LayoutPlan(layout, data_ranks, plans, request.budget)


@dataclass
class _Ranks:
    """Builds ranks; the memory of those that have the same parameters is measured once."""

    request: Request
    layout: ParallelLayout
    measured: dict[Any, RankMemory] = field(default_factory=dict)

    def build(self, ranks: tuple[int, ...]) -> tuple[Any, RankPlan]:
        """Returns the model and the plan of the first of some ranks that are alike."""
        request = self.request
        with _standing_at(self.layout, ranks[0], request.gpus), as_if_on_a_gpu():
            engine = self._engine()
            stage, place = _where()
            parameters = dict(engine._model.named_parameters())
            kind = (engine.first, engine.last, tuple((n, p.shape) for n, p in parameters.items()))
            if kind not in self.measured:
                rows, length = request.microbatch
                self.measured[kind] = measure(
                    engine, rows, length, request.objective, request.chosen_experts
                )
        numbers = [layer.layer_number - 1 for layer in engine._model.decoder.layers]
        return engine._model, RankPlan(
            ranks=ranks,
            stage=stage,
            place=place,
            layers=(min(numbers), max(numbers)),
            embedding=engine.first,
            output=engine.last,
            parameters=sum(p.numel() for p in parameters.values()),
            memory=self.measured[kind],
        )

    def _engine(self) -> MegatronEngine:
        """Makes the engine as on a GPU, without weights and bytes."""
        request = self.request
        gpu = torch.device("cuda")
        stand_ins: dict[str, Any] = {
            "read_json": lambda path: request.config,
            "load_stage": lambda *_: None,
            "transformer_config": lambda *given: transformer_config(*(*given[:-1], gpu)),
        }
        with ExitStack() as stack:
            for name, value in stand_ins.items():
                stack.enter_context(replaced(engine_module, name, value))
            stack.enter_context(META)
            engine = MegatronEngine(
                ImportedWeights(Path(), "hf", request.bound, request.bound.shape),
                request.architecture,
                self.layout,
                META,
                request.dtype,
            )
        engine._together = None  # nobody is there to agree with
        return engine


def _where() -> tuple[int, Place]:
    return int(parallel_state.get_pipeline_model_parallel_rank()), engine_module._place()


@contextmanager
def _standing_at(layout: ParallelLayout, rank: int, ranks: int) -> Iterator[None]:
    """Makes this process stand for one rank of many; its groups send nothing to nobody."""
    if dist.is_initialized():
        raise EnvironmentProblem(
            "this process is one of a process group; a plan needs a process of its own",
            fix="run autodeco plan alone, not under torchrun",
        )
    apply_cures()
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine_module.form_groups(layout, torch.device("cpu"))
            yield
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()  # type: ignore[attr-defined]
