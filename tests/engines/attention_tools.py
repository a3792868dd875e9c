"""A core attention of 8 heads in 2 groups, of width 64, for tests."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from autodeco.engines.megatron.attention import SdpaCoreAttention


def core_attention(
    *, window: int | None = None, sinks: bool = False, dtype: torch.dtype = torch.float32
) -> SdpaCoreAttention:
    """Builds it; `window` is how many keys before its own a query sees."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=512,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=64,
        params_dtype=dtype,
        softmax_type="learnable" if sinks else "vanilla",
        window_size=None if window is None else (window, 0),
        bf16=dtype == torch.bfloat16,
    )
    module = SdpaCoreAttention(config, 1, pg_collection=SimpleNamespace(cp=None))
    if module.softmax_offset is not None:
        module.softmax_offset.data = torch.linspace(-2, 3, 8).to(dtype)
    return module.requires_grad_(False)
