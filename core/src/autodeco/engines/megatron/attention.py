"""Core attention on torch's scaled_dot_product_attention: no [s, s] scores are kept."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class SdpaCoreAttention(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """Causal attention with grouped queries, in the place of megatron-core's DotProductAttention.

    Sequences are padded on the right, so causality alone keeps pads out, and torch takes its
    fastest kernel.

    Args:
        config: A TransformerConfig.
        softmax_scale: Default: 1 / sqrt(head width).
        **_: What DotProductAttention takes besides.

    Raises:
        ValueError: The config asks for sinks, a window, or context parallelism.
    """

    def __init__(self, config: Any, *, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        refused = {
            "softmax_type": config.softmax_type != "vanilla",
            "window_size": config.window_size is not None,
            "context_parallel_size": config.context_parallel_size > 1,
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        }
        for name, asked in refused.items():
            if asked:
                raise ValueError(f"SdpaCoreAttention does not do {name}={getattr(config, name)}")
        self.scale = softmax_scale

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
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)
