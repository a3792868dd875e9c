"""Core attention on torch's kernels: no [s, s] scores are kept."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.nn.attention.bias import causal_lower_right

from autodeco.engines.megatron.context import order_of_gathered
from autodeco.engines.megatron.rotary import MicrobatchRotary, rotate

_BLOCK = 256  # queries whose scores are held at once, where torch has no kernel
_LONG = 1024  # tokens of a sequence, on average, from which sdpa's own kernel is the faster
_GQA: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
)


@dataclass(frozen=True)
class Microbatch:
    """What all attention layers of a stage have to know of the microbatch in hand.

    Attributes:
        cos, sin: [s, 1, 1, width / 2] of this rank's positions; None: nothing is rotated here.
        bounds: Where each of the sequences that are laid end to end begins, and the last one ends;
            empty: sequences stand beside each other, padded.
        cu_seqlens: The same on the device, int32.
        angles: float32 [s, 1, 1, width / 2], for attention that rotates itself; `scale` multiplies
            its cosines and sines.
        scale: See `angles`.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    bounds: tuple[int, ...] = ()
    cu_seqlens: Tensor | None = None
    angles: Tensor | None = None
    scale: float = 1.0

    def rotate(self, x: Tensor) -> Tensor:
        """Applies the rotary embedding."""
        if self.cos is None or self.sin is None:
            return x
        return rotate(x, self.cos, self.sin)


class SdpaCoreAttention(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """Causal attention with grouped queries, in the place of megatron-core's DotProductAttention.

    It rotates queries and keys itself, since it knows each token's position. Padded sequences are
    padded on the right, where causality alone keeps pads out; packed ones do not see each other.
    Context-parallel ranks gather keys and values, which with grouped queries are few, and attend
    with their own queries.

    Args:
        config: A TransformerConfig; of it: the window and which layers have it, learned sinks.
        layer_number: From 1.
        softmax_scale: Default: 1 / sqrt(head width).
        pg_collection: megatron-core's process groups; ``cp`` splits the sequence.
        **_: What DotProductAttention takes besides.

    Raises:
        ValueError: The config asks for what is not done.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.rotates = not config.multi_latent_attention  # that one has done it
        self.group = pg_collection.cp if config.context_parallel_size > 1 else None
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = int(config.window_size[0]) if windowed else None
        self.softmax_offset: nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
        refused = {
            "softmax_type": config.softmax_type not in ("vanilla", "learnable"),
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
            "context_parallel_size": self.group is not None
            and (windowed or self.softmax_offset is not None),
        }
        for name, asked in refused.items():
            if asked:
                raise ValueError(f"SdpaCoreAttention does not do {name}={getattr(config, name)}")
        self.microbatch = Microbatch()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Says where megatron-core's checkpoints have the sinks: split over tensor ranks."""
        if self.softmax_offset is None:
            return {}
        state = {"softmax_offset": self.softmax_offset}
        entries: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state, prefix, {"softmax_offset": 0}, sharded_offsets
        )
        return entries

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **_: Any
    ) -> Tensor:
        """Attends.

        Args:
            query: [s, b, heads, width], not rotated.
            key, value: [s, b, groups, width].
            attention_mask: Must be None.

        Returns:
            [s, b, heads * width].
        """
        if attention_mask is not None:
            raise ValueError("SdpaCoreAttention is causal and takes no mask")
        now = self.microbatch
        if self.rotates:
            query, key = now.rotate(query), now.rotate(key)
        if self.group is not None:
            out = self._attend_in_context(query, *self._whole(key, value))
        elif now.cu_seqlens is not None and self._packed_is_faster(query, now.bounds):
            longest = max(b - a for a, b in pairwise(now.bounds))
            flat = (query[:, 0], key[:, 0], value[:, 0])
            out = self._attend_packed(*flat, now.cu_seqlens, longest)[:, None]
        elif now.bounds:
            parts = [
                self._attend(query[a:b], key[a:b], value[a:b]) for a, b in pairwise(now.bounds)
            ]
            out = torch.cat(parts)
        else:
            out = self._attend(query, key, value)
        return out.flatten(2)

    def _packed_is_faster(self, query: Tensor, bounds: tuple[int, ...]) -> bool:
        """Whether one call for all sequences beats one for each: not where each fills the GPU."""
        if not has_kernel(query):
            return False
        long = bounds[-1] >= _LONG * (len(bounds) - 1)
        return self.window is not None or self.softmax_offset is not None or not long

    def _attend_packed(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int
    ) -> Tensor:
        """Sequences end to end, [n, heads, width], in one call of flash attention."""
        left = -1 if self.window is None else self.window
        width = value.shape[-1]
        if width < query.shape[-1]:  # latent attention; the kernel wants like widths
            value = nn.functional.pad(value, (0, query.shape[-1] - width))
        out, lse = varlen.varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest,
            return_aux=varlen.AuxRequest(lse=True), scale=self.scale, window_size=(left, 0), **_GQA,
        )  # fmt: skip
        if self.softmax_offset is not None:
            if lse.shape[0] != len(out):  # as torch 2.11 gives it: [heads, n]
                lse = lse.t()
            # one more score in the denominator: exp(lse) / (exp(lse) + exp(sink))
            out = out * torch.sigmoid(lse - self.softmax_offset.float())[..., None].to(out.dtype)
        return out[..., :width]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [s, b, heads, width] of the last positions of the keys, causally."""
        if self.window is not None or self.softmax_offset is not None:
            return self._attend_in_blocks(query, key, value)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        attend = torch.nn.functional.scaled_dot_product_attention
        if q.shape[2] == k.shape[2]:
            out = attend(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        else:
            mask = causal_lower_right(q.shape[2], k.shape[2])
            out = attend(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3)

    def _attend_in_blocks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Windows and sinks by plain products, a block of queries at a time; softmax in float32."""
        length = len(query)
        reach = length if self.window is None else self.window
        rows = []
        for start in range(0, length, _BLOCK):
            stop, first = min(length, start + _BLOCK), max(0, start - reach)
            scores = _scores(query[start:stop], key[first:stop], self.scale)
            here = torch.arange(start, stop, device=query.device)[:, None]
            there = torch.arange(first, stop, device=query.device)
            scores.masked_fill_((there > here) | (there < here - reach), -torch.inf)
            scores = scores.flatten(1, 2)  # [b, heads, queries, keys]
            if self.softmax_offset is not None:
                sink = self.softmax_offset.float()[:, None, None].expand(*scores.shape[:3], 1)
                scores = torch.cat((scores, sink), dim=-1)
            share = scores.softmax(-1)[..., : stop - first].to(value.dtype)
            share = torch.unflatten(share, 1, (value.shape[2], -1))
            rows.append(torch.einsum("bgrqk,kbgw->qbgrw", share, value[first:stop]).flatten(2, 3))
        return torch.cat(rows)

    def _attend_in_context(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries of this rank's two chunks, each against all that stands before its end."""
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        chunk = query.shape[0] // 2
        ends = ((rank + 1) * chunk, (2 * ranks - rank) * chunk)
        parts = [
            self._attend(mine, key[:end], value[:end])
            for mine, end in zip(torch.split(query, chunk), ends, strict=True)
        ]
        return torch.cat(parts)

    def _whole(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all ranks in the order of their positions."""
        mine = torch.stack((key, value), dim=1)
        ranks = dist.get_world_size(self.group)
        parts = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(parts, mine, group=self.group)
        everyone = torch.cat(parts)
        order = order_of_gathered(ranks, everyone.shape[0]).to(key.device)
        whole = everyone.index_select(0, order)
        return whole[:, 0], whole[:, 1]


def announce(model: nn.Module, now: Microbatch) -> None:
    """Tells a stage's attention layers what the next microbatch is made of."""
    for module in model.modules():
        if isinstance(module, SdpaCoreAttention):
            module.microbatch = now
        elif isinstance(module, MicrobatchRotary):
            module.angles, module.scale = now.angles, now.scale


def has_kernel(query: Tensor) -> bool:
    """Whether torch attends within packed sequences in one call here."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """float32 [b, groups, queries of a group, q, k] of [q, b, heads, w] and [k, b, groups, w]."""
    grouped = torch.unflatten(query, 2, (key.shape[2], -1))
    scale = scale if scale is not None else query.shape[-1] ** -0.5
    scores: Tensor = torch.einsum("qbgrw,kbgw->bgrqk", grouped, key)
    return scores.float() * scale
