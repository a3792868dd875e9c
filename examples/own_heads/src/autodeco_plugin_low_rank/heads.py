"""Heads whose first layer is a product of two thin matrices while they train."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from autodeco.heads.modules import DecodingHeads, Head, HeadsConfig

RANK = 16
WIDTH = 128


class LowRankLinear(nn.Module):
    """A linear layer whose weight is ``up`` [w, r] times ``down`` [r, n]."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, inputs, generator=generator) * inputs**-0.5)
        self.up = nn.Parameter(torch.randn(outputs, RANK, generator=generator) * RANK**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs))

    @property
    def weight(self) -> Tensor:
        """The weight [w, n] of the plain layer."""
        return self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        """[m, n] -> [m, w]."""
        return functional.linear(functional.linear(x, self.down), self.up, self.bias)


class LowRankHeads(DecodingHeads):
    """The two heads, or one of them, of low rank.

    Args:
        hidden_size: d.
        heads, enhanced_features: As `HeadsConfig`.
        seed: Of the draw.
    """

    def __init__(self, hidden_size: int, heads: str, enhanced_features: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(HeadsConfig(hidden_size, heads, enhanced_features, WIDTH), generator)
        for head in self._heads():
            first = cast(nn.Linear, head.mlp[0])
            head.mlp[0] = LowRankLinear(first.in_features, WIDTH, generator)

    def _heads(self) -> list[Head]:
        return [head for head in (self.temp_head, self.top_p_head) if head is not None]

    @torch.no_grad()
    def plain(self) -> DecodingHeads:
        """Returns the usual heads, of the same width, that give the same T and P."""
        heads = DecodingHeads(self.config)
        state = {n: t for n, t in self.state_dict().items() if not n.endswith((".down", ".up"))}
        for name, module in self.named_modules():
            if isinstance(module, LowRankLinear):
                state[f"{name}.weight"] = module.weight
        heads.load_state_dict(state)
        return heads
