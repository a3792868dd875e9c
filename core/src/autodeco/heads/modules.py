"""The temperature head and the top-p head, in float32 whatever the backbone's dtype.

Tensor names and shapes are those of the published heads (arXiv 2510.26697), so that a published
file loads as it is: ``temp_head.mlp.{0,2}.{weight,bias}``, ``top_p_head.mlp.{0,2}.{weight,bias}``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from autodeco.errors import UsageError
from autodeco.heads.warp import TEMPERATURE_FLOOR

HEADS_CHOICES = ("both", "temperature", "top-p")
FEATURES = ("max p", "entropy", "variance of p", "top-5 sum")
TOP_SUM = 5


@dataclass(frozen=True)
class HeadsConfig:
    """Shape of the heads.

    Attributes:
        hidden_size: d, the size of the backbone's last hidden state.
        heads: "both", "temperature" (P is then 1) or "top-p" (T is then 1).
        enhanced_features: whether the top-p head reads the four features of softmax(z/T)
            (input d + 5) or only [h, T] (input d + 1).
        intermediate_size: width of the hidden layer.
    """

    hidden_size: int
    heads: str = "both"
    enhanced_features: bool = True
    intermediate_size: int = 256

    def __post_init__(self) -> None:
        if self.heads not in HEADS_CHOICES:
            raise UsageError(
                f"unknown heads {self.heads!r}", fix=f"use one of {', '.join(HEADS_CHOICES)}"
            )

    @property
    def top_p_input_size(self) -> int:
        """Width of the top-p head's input: [h, T] and, if enhanced, the four features."""
        return self.hidden_size + 1 + (len(FEATURES) if self.enhanced_features else 0)


class Head(nn.Module):
    """Linear(n, w) ReLU Linear(w, 1) Sigmoid; maps [m, n] to [m]."""

    def __init__(self, input_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(input_size, intermediate_size, dtype=torch.float32),
            nn.ReLU(),
            nn.Linear(intermediate_size, 1, dtype=torch.float32),
            nn.Sigmoid(),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the head computes in: float32, but for tests in float64."""
        return cast(nn.Linear, self.mlp[0]).weight.dtype

    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw weights and biases from U(-1/sqrt(fan in), 1/sqrt(fan in)), on the CPU."""
        for layer in (self.mlp[0], self.mlp[2]):
            linear = cast(nn.Linear, layer)
            bound = linear.in_features**-0.5
            for parameter in (linear.weight, linear.bias):
                drawn = torch.empty(parameter.shape, dtype=torch.float32)
                drawn.uniform_(-bound, bound, generator=generator)
                with torch.no_grad():
                    parameter.copy_(drawn)

    def forward(self, x: Tensor) -> Tensor:
        """[m, n] in the head's dtype -> [m] in (0, 1)."""
        return cast(Tensor, self.mlp(x)).squeeze(-1)


class DecodingHeads(nn.Module):
    """The heads that a :class:`HeadsConfig` asks for; a missing one is the constant 1.

    The parameters stay float32: ``.to(torch.bfloat16)`` of this module, or of a model around it,
    moves them but does not cast them.

    Args:
        config: their shape.
        generator: a CPU generator to draw the initial weights from; default torch's global one.
    """

    def __init__(self, config: HeadsConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.intermediate_size
        self.temp_head = Head(config.hidden_size, width) if config.heads != "top-p" else None
        self.top_p_head = (
            Head(config.top_p_input_size, width) if config.heads != "temperature" else None
        )
        for head in (self.temp_head, self.top_p_head):
            if head is not None:
                head.initialize(generator)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return cast(Any, super())._apply(keep_dtype, recurse)

    @property
    def needs_features(self) -> bool:
        """Whether :meth:`top_p` reads its ``features``."""
        return self.top_p_head is not None and self.config.enhanced_features

    def temperature(self, h: Tensor) -> Tensor:
        """T of each row, floored at 1e-4 with gradient 0 below; ones without the head.

        Args:
            h: [m, d] last hidden states, any float dtype.

        Returns:
            float32 [m] in [1e-4, 2].
        """
        if self.temp_head is None:
            return torch.ones(h.shape[:-1], dtype=torch.float32, device=h.device)
        with torch.autocast(h.device.type, enabled=False):
            t = 2.0 * self.temp_head(h.to(self.temp_head.dtype))
        return cast(Tensor, t).clamp_min(TEMPERATURE_FLOOR)

    def top_p(self, h: Tensor, temperature: Tensor, features: Tensor | None) -> Tensor:
        """P of each row; ones without the head.

        Args:
            h: [m, d] last hidden states, any float dtype.
            temperature: float32 [m], what :meth:`temperature` gave.
            features: float32 [m, 4] of :func:`distribution_features`; ignored, and may be None,
                where :attr:`needs_features` is false.

        Returns:
            float32 [m] in [0, 1].
        """
        if self.top_p_head is None:
            return torch.ones(h.shape[:-1], dtype=torch.float32, device=h.device)
        dtype = self.top_p_head.dtype
        columns = [h.to(dtype), temperature.to(dtype).unsqueeze(-1)]
        if self.config.enhanced_features:
            if features is None:
                raise ValueError("heads with enhanced features need the features of softmax(z/T)")
            columns.append(features.to(dtype))
        with torch.autocast(h.device.type, enabled=False):
            return cast(Tensor, self.top_p_head(torch.cat(columns, dim=-1)))

    @torch.no_grad()
    def predict(self, h: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """T and P for decoding.

        Args:
            h: [m, d] last hidden states. logits: [m, V] of the same rows. Any float dtype.

        Returns:
            float32 T [m] and P [m].
        """
        t = self.temperature(h)
        features = distribution_features(logits, t) if self.needs_features else None
        return t, self.top_p(h, t, features)


@torch.no_grad()
def distribution_features(logits: Tensor, temperature: Tensor) -> Tensor:
    """What the top-p head sees of p = softmax(z/T).

    Args:
        logits: [m, V], any float dtype. temperature: [m], floored at 1e-4.

    Returns:
        float32 [m, 4]: max p, entropy in nats, variance of p (unbiased, over V), sum of the
        five largest p.
    """
    z = logits.float()
    x = z - z.amax(-1, keepdim=True)
    t = temperature.float().clamp_min(TEMPERATURE_FLOOR)
    top = torch.topk(x, min(TOP_SUM, x.shape[-1]), dim=-1).values.div_(t.unsqueeze(-1)).exp_()
    e = (x / t.unsqueeze(-1)).exp_()
    total = e.sum(-1)
    variance = ((e * e).sum(-1) / total**2 - 1.0 / x.shape[-1]).clamp_min(0.0)
    variance = variance / max(1, x.shape[-1] - 1)
    # A token that was ruled out (-inf) has p = 0 and adds nothing to the entropy.
    energy = e.mul_(x.nan_to_num_(neginf=0.0)).sum(-1) / total
    entropy = total.log() - energy / t
    return torch.stack((1 / total, entropy, variance, top.sum(-1) / total), dim=-1)
