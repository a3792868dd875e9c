"""Experts in two grouped matrix products instead of a loop over all of them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor


class GroupedExperts(SequentialMLP):  # type: ignore[misc]  # megatron-core is untyped
    """megatron-core's experts, whose weights lie in two blocks and are multiplied in one call each.

    The parameters keep their names and shapes; `stack` only moves them into shared storage. Where
    torch has no grouped product (on CPU, in float32), the loop is used.
    """

    _first: Tensor | None = None
    _second: Tensor | None = None

    def stack(self) -> None:
        """Moves the experts' weights into one block a layer; call it once they are loaded."""
        if not _has_grouped_product(self.local_experts[0].linear_fc1.weight):
            return
        blocks = []
        for name in ("linear_fc1", "linear_fc2"):
            weights = [getattr(expert, name).weight for expert in self.local_experts]
            shape = (len(weights), *weights[0].shape)
            block = torch.empty(shape, dtype=weights[0].dtype, device=weights[0].device)
            for place, weight in zip(block, weights, strict=True):
                place.copy_(weight.data)
                weight.data = place  # the old storage goes as the new one is filled
            blocks.append(block)
        self._first, self._second = blocks

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, probabilities: Tensor) -> Any:
        """Applies each expert to its tokens.

        Args:
            hidden: [n, d], sorted by expert.
            tokens_per_expert: int64 [experts].
            probabilities: [n], the router's weight of each token.

        Returns:
            [n, d] and None (there are no biases).
        """
        if self._first is None or self._second is None or not len(hidden):
            return super().forward(hidden, tokens_per_expert, probabilities)
        ends = tokens_per_expert.to(hidden.device).cumsum(0).to(torch.int32)
        inner = _product(hidden, self._first, ends)
        gate, up = inner.chunk(2, dim=-1)
        # as megatron-core does: the router's weight in float32, before the second product
        inner = torch.nn.functional.silu(gate) * up
        inner = (inner * probabilities.unsqueeze(-1)).to(hidden.dtype)
        return _product(inner, self._second, ends), None


def _has_grouped_product(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")


def _product(rows: Tensor, block: Tensor, ends: Tensor) -> Tensor:
    """Rows [n, k] times the transposed weight [m, k] of their group; groups end at `ends`."""
    product: Tensor = torch._grouped_mm(rows, block.transpose(-2, -1), offs=ends)
    return product
