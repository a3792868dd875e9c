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

    _weights: tuple[Tensor, Tensor] | None = None
    _biases: tuple[Tensor, Tensor] | None = None

    def stack(self) -> None:
        """Moves the experts' weights into one block a layer; call it once they are loaded."""
        config = self.config
        if not config.gated_linear_unit or not _has_grouped_product(
            self.local_experts[0].linear_fc1.weight
        ):
            return
        self._weights = self._stacked("weight")
        if config.add_bias_linear:
            self._biases = self._stacked("bias")

    def _stacked(self, name: str) -> tuple[Tensor, Tensor]:
        blocks = []
        for layer in ("linear_fc1", "linear_fc2"):
            tensors = [getattr(getattr(expert, layer), name) for expert in self.local_experts]
            shape = (len(tensors), *tensors[0].shape)
            block = torch.empty(shape, dtype=tensors[0].dtype, device=tensors[0].device)
            for place, tensor in zip(block, tensors, strict=True):
                place.copy_(tensor.data)
                tensor.data = place  # the old storage goes as the new one is filled
            blocks.append(block)
        return blocks[0], blocks[1]

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, probabilities: Tensor) -> Any:
        """Applies each expert to its tokens.

        Args:
            hidden: [n, d], sorted by expert.
            tokens_per_expert: int64 [experts].
            probabilities: [n], the router's weight of each token.

        Returns:
            [n, d] and None: biases are in it.
        """
        if self._weights is None or not len(hidden):
            return super().forward(hidden, tokens_per_expert, probabilities)
        counts = tokens_per_expert.to(hidden.device)
        ends = counts.cumsum(0).to(torch.int32)
        inner = _product(hidden, self._weights[0], ends)
        if self._biases is not None:
            inner += self._biases[0].repeat_interleave(counts, 0, output_size=len(hidden))
        inner = self._gate(inner)
        # as megatron-core does: the router's weight in float32, before the second product
        scale = probabilities.unsqueeze(-1)
        out = _product((inner * scale).to(hidden.dtype), self._weights[1], ends)
        if self._biases is not None:
            bias = self._biases[1].repeat_interleave(counts, 0, output_size=len(hidden))
            out += (bias * scale).to(out.dtype)
        return out, None

    def _gate(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, dim=-1)
        limit = self.config.activation_func_clamp_value
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if self.config.glu_linear_offset:
            up = up + self.config.glu_linear_offset
        gated: Tensor = self.config.activation_func(gate) * up
        return gated


def _has_grouped_product(weight: Tensor) -> bool:
    return weight.is_cuda and weight.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")


def _product(rows: Tensor, block: Tensor, ends: Tensor) -> Tensor:
    """Rows [n, k] times the transposed weight [m, k] of their group; groups end at `ends`."""
    product: Tensor = torch._grouped_mm(rows, block.transpose(-2, -1), offs=ends)
    return product
