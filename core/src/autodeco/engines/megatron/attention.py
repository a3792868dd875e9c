"""Core attention on torch's scaled_dot_product_attention: no [s, s] scores are kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from autodeco.engines.megatron.context import order_of_gathered


class SdpaCoreAttention(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """Causal attention with grouped queries, in the place of megatron-core's DotProductAttention.

    Sequences are padded on the right, so causality alone keeps pads out, and torch takes its
    fastest kernel. Context-parallel ranks gather keys and values, which with grouped queries are
    few, and attend with their own queries.

    Args:
        config: A TransformerConfig.
        softmax_scale: Default: 1 / sqrt(head width).
        pg_collection: megatron-core's process groups; ``cp`` splits the sequence.
        **_: What DotProductAttention takes besides.

    Raises:
        ValueError: The config asks for sinks or a window.
    """

    def __init__(
        self,
        config: Any,
        *,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        refused = {
            "softmax_type": config.softmax_type != "vanilla",
            "window_size": config.window_size is not None,
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        }
        for name, asked in refused.items():
            if asked:
                raise ValueError(f"SdpaCoreAttention does not do {name}={getattr(config, name)}")
        self.scale = softmax_scale
        self.group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **_: Any
    ) -> Tensor:
        """Attends.

        Args:
            query: [s, b, heads, width].
            key, value: [s, b, groups, width].
            attention_mask: Must be None.

        Returns:
            [s, b, heads * width].
        """
        if attention_mask is not None:
            raise ValueError("SdpaCoreAttention is causal and takes no mask")
        if self.group is None:
            return self._attend(query, key, value)
        return self._attend_in_context(query, *self._whole(key, value))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries of the last positions of the keys, causally."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        attend = torch.nn.functional.scaled_dot_product_attention
        if q.shape[2] == k.shape[2]:
            out = attend(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        else:
            mask = causal_lower_right(q.shape[2], k.shape[2])
            out = attend(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3).flatten(2)

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
