"""What a rank would allocate on its GPU, found by running its own code on the meta device.

The engine, its model, the heads and the objective are the real ones; their tensors have shapes and
no bytes. Every storage is counted while it lives, so the peak is that of the code and of no
formula. What the code asks of the data (which experts, which labels) is answered by assumption:
see `ASSUMED`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autodeco.engines.base import TokenBatch
from autodeco.engines.megatron import attention, experts
from autodeco.engines.megatron.engine import MegatronEngine
from autodeco.heads import closed_form, kernels
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.heads.objective import OBJECTIVES, objective_sums

META = torch.device("meta")
ASSUMED = (
    "every token of the microbatch predicts one",
    "the router spreads tokens evenly over experts and ranks",
    "every label lies behind a token's 256 largest logits, and 4096 of them settle every token",
    "bfloat16 and float16: flash attention; float32 with grouped queries: torch's plain attention",
    "Triton is installed (it comes with torch's CUDA builds)",
)
_ABSENT = object()
_BLOCK = 512  # the CUDA allocator gives out multiples of this
_CUBLAS_BYTES = 32 * 2**20  # its workspace on Hopper; 8 MiB before


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors on the meta device while they live.

    Args:
        chosen: The share of a router's table that is true: experts of a token by all experts.

    Attributes:
        live: Bytes now.
        peak: The most there were since `restart`.
    """

    def __init__(self, chosen: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.chosen, self.live, self.peak = chosen, 0, 0
        self._held: dict[int, Any] = {}

    def restart(self) -> int:
        """Returns the peak so far and measures anew."""
        peak, self.peak = self.peak, self.live
        return peak

    def hold(self, tensors: Iterator[Tensor] | list[Any]) -> None:
        """Counts tensors until their storage goes."""
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device == META:
                self._hold(tensor.untyped_storage())

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK

        def release(_: Any) -> None:
            del self._held[key]
            self.live -= size

        self._held[key] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation and counts what it returns."""
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func.overloadpacket)
        out = NotImplemented
        if answer is not None and isinstance(args[0], Tensor) and args[0].device == META:
            out = answer(self, *args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        self.hold(tree_leaves(out))
        return out


def _chosen_values(mode: Allocations, values: Tensor, mask: Tensor) -> Tensor:
    return values.new_empty(round(mask.numel() * mode.chosen))


def _all_rows(mode: Allocations, mask: Tensor) -> Tensor:
    return torch.empty(mask.numel(), mask.dim(), dtype=torch.int64, device=META)


def _no_rows(mode: Allocations, values: Tensor, indices: list[Tensor | None]) -> Any:
    if any(index is not None and index.dtype == torch.bool for index in indices):
        return values.new_empty(0, *values.shape[1:])
    return NotImplemented


def _number(mode: Allocations, value: Tensor) -> Any:
    """A number that ends every check well: finite, and beyond any count of tokens."""
    if value.dtype == torch.bool:
        return True
    return 0.0 if value.is_floating_point() else 2**62


def _host_copy(mode: Allocations, value: Tensor, **kwargs: Any) -> Any:
    if kwargs.get("device") is not None and kwargs["device"].type == "cpu":
        return torch.zeros(value.shape, dtype=kwargs.get("dtype") or value.dtype)
    return NotImplemented


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.masked_select: _chosen_values,
    torch.ops.aten.nonzero: _all_rows,
    torch.ops.aten.index: _no_rows,
    torch.ops.aten._local_scalar_dense: _number,
    torch.ops.aten._to_copy: _host_copy,
}


@contextmanager
def as_if_on_a_gpu() -> Iterator[None]:
    """Lets the engine run on the meta device by the paths that it takes on a GPU."""
    plain_attention = torch.nn.functional.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scale = {"scale": kwargs.get("scale")}
        out: Tensor
        if q.dtype != torch.float32 and q.shape[-1] == v.shape[-1]:
            out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, **scale)[0]
        elif q.shape[1] == k.shape[1]:
            efficient = torch.ops.aten._scaled_dot_product_efficient_attention
            out = efficient(q, k, v, None, False, 0.0, True, **scale)[0]
        else:
            out = plain_attention(q, k, v, *args, **kwargs)
        return out

    def sums(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.zeros(6, len(logits), dtype=torch.float32, device=logits.device)

    with ExitStack() as stack:
        for place, name, value in (
            (torch, "autocast", lambda *_, **__: nullcontext()),  # knows no meta device
            (torch.cuda, "current_device", lambda: META),
            (torch.nn.functional, "scaled_dot_product_attention", attend),
            (attention, "causal_lower_right", lambda queries, keys: None),
            (attention, "has_kernel", lambda query: query.dtype != torch.float32),
            (closed_form, "has_kernel", lambda device, dtype: dtype != torch.float64),
            (kernels, "sums_over_vocabulary", sums),
            (experts, "_has_grouped_product", lambda weight: weight.dtype == torch.bfloat16),
            (moe_utils, "te_general_gemm", None),  # Transformer Engine's knows no meta device
            (MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", object()),
            (MoEAlltoAllTokenDispatcher, "_maybe_dtoh_and_synchronize", _even_counts),
        ):
            stack.enter_context(replaced(place, name, value))
        yield


@contextmanager
def replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    """Gives a module's or a class's attribute another value for the time of the context."""
    before = getattr(place, name, _ABSENT)
    setattr(place, name, value)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(place, name)
        else:
            setattr(place, name, before)


def _even_counts(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """Stands in for the copy of the router's counts to the CPU: the same for all experts."""
    if point != self.cuda_dtoh_point:
        return tokens_per_expert
    sent = self.routing_map.shape[0] * self.config.moe_router_topk
    splits = _evenly(sent, self.ep_size)
    received = torch.tensor([_evenly(n, self.num_local_experts) for n in splits])
    if self.ep_size > 1 or self.tp_size > 1:
        self.input_splits = self.output_splits = np.array(splits)
        self.output_splits_tp = np.array([sent] * self.tp_size)
    self.num_global_tokens_per_local_expert = received.repeat(self.tp_size, 1)
    return self.num_global_tokens_per_local_expert.sum(0)


def _evenly(count: int, parts: int) -> list[int]:
    return [count // parts + (place < count % parts) for place in range(parts)]


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank allocates on its GPU.

    Attributes:
        weights: Parameters and buffers of the stage.
        heads: The heads, their gradients and Adam's moments; on every rank.
        forward: The largest moment of one microbatch's forward pass, without `pipeline`.
        pipeline: What came from the stage before and what is on its way to the next one.
        objective: The largest moment of the objective, hidden states included.
    """

    weights: int
    heads: int
    forward: int
    pipeline: int
    objective: int

    @property
    def peak(self) -> int:
        """Returns the largest sum of what lives at once."""
        return self.weights + self.heads + max(self.forward + self.pipeline, self.objective)


def measure(
    engine: MegatronEngine, rows: int, length: int, objective: str, chosen: float
) -> RankMemory:
    """Runs two microbatches, the objective on the second; call it inside `as_if_on_a_gpu`.

    Args:
        engine: On the meta device.
        rows: Sequences of a microbatch.
        length: Tokens of each.
        objective: A name of `OBJECTIVES`.
        chosen: Experts of a token by all experts; 0 for a dense model.
    """
    allocations = Allocations(chosen)
    allocations.hold([*engine._model.parameters(), *engine._model.buffers()])
    weights = allocations.live
    with allocations:
        heads, _optimizer = _trainable_heads(engine.hidden_size)
        kept = allocations.live - weights
        allocations.restart()
        forward = loss = pipeline = 0
        batches = [_batch(rows, length)] * 2
        for number, hidden in enumerate(engine.hidden_states(batches)):
            forward = max(forward, allocations.restart())
            pipeline = _travelling(engine)
            if hidden is not None and number == 1:
                objective_sums(
                    heads,
                    hidden,
                    engine.output_weight(),
                    OBJECTIVES[objective],
                    seed=0,
                    epoch=0,
                    backward=True,
                )
                loss = allocations.restart()
    base = weights + kept
    workspace = _CUBLAS_BYTES
    return RankMemory(
        weights,
        kept,
        forward - base - pipeline + workspace,
        pipeline,
        loss - base + workspace if loss else 0,
    )


def _trainable_heads(hidden_size: int) -> tuple[DecodingHeads, Any]:
    heads = DecodingHeads(HeadsConfig(hidden_size)).to(META)
    optimizer = torch.optim.AdamW(heads.parameters(), foreach=False)
    for parameter in heads.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return heads, optimizer


def _travelling(engine: MegatronEngine) -> int:
    """Bytes of the hidden states between this stage and its neighbours."""
    sent = engine._sent[1] if engine._sent is not None else None
    tensors = [t for t in (engine._model.decoder.input_tensor, sent) if t is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _batch(rows: int, length: int) -> TokenBatch:
    predict = torch.ones(rows, length, dtype=torch.bool)
    predict[:, -1] = False
    return TokenBatch(
        ids=torch.zeros(rows * length, dtype=torch.int64),
        positions=torch.arange(length).repeat(rows),
        cu_seqlens=torch.arange(rows + 1, dtype=torch.int32) * length,
        predict=predict.flatten(),
        sample_id=torch.arange(rows).repeat_interleave(length),
    )
