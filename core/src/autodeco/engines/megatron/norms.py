"""Norms that megatron-core's layers do not have: behind a block, and over all heads at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class NormedResidual(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """Norms what a block gives before it is added to the residual stream.

    It stands in the place of megatron-core's bias-dropout-add, and is called like it.

    Args:
        config: A TransformerConfig.
        norm: The norm's class or spec.
    """

    def __init__(self, config: Any, norm: Any) -> None:
        super().__init__(config=config)
        self.norm = build_module(
            norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Returns the function that adds."""

        def add(block: tuple[Tensor, Tensor | None], residual: Tensor, _: float) -> Tensor:
            out, bias = block
            normed: Tensor = self.norm(out if bias is None else out + bias)
            return residual + normed

        return add


class AllHeadsNorm(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """RMS norm over the heads of all tensor ranks together.

    Args:
        width: Of all heads.
        config: A TransformerConfig.
        eps: Added to the mean of squares.
        **_: What megatron-core gives norms besides.
    """

    def __init__(self, width: int, config: Any, eps: float, **_: Any) -> None:
        super().__init__(config=config)
        self.width, self.eps = width, eps
        ranks = config.tensor_model_parallel_size
        self.group = parallel_state.get_tensor_model_parallel_group() if ranks > 1 else None
        self.weight = nn.Parameter(torch.empty(width // ranks, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Returns [s, b, heads, width of one] of this rank's heads, normed."""
        flat = x.flatten(2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.group is not None:
            dist.all_reduce(squares, group=self.group)
        normed = flat * torch.rsqrt(squares / self.width + self.eps)
        return (normed * self.weight).to(x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Says where megatron-core's checkpoints have the weight: split over tensor ranks."""
        entries: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            {"weight": self.weight}, prefix, {"weight": 0}, sharded_offsets
        )
        return entries
