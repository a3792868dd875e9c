"""Eight-bit rows: a weight is a whole number from -127 to 127 times the scale of its row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_LARGEST = 127


def decode(parts: Mapping[str, Tensor]) -> Tensor:
    """Multiplies each row by its scale.

    Args:
        parts: ``weight`` int8 [n, k] and ``scale`` float32 [n], of any rows and columns.

    Returns:
        float32 [n, k].
    """
    return parts["weight"].float() * parts["scale"][:, None]


def encode(tensor: Tensor) -> dict[str, Tensor]:
    """Rounds a float32 tensor [n, k]; for random checkpoints."""
    largest = tensor.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    scale = largest / _LARGEST
    return {"weight": (tensor / scale[:, None]).round().to(torch.int8), "scale": scale}
