"""What megatron-core needs CUDA or Transformer Engine for, and the cures where they are missing.

Each cure is as small as it can be, and a test fails when a version of megatron-core no longer needs
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cure:
    """One obstacle on a machine without CUDA or without Transformer Engine.

    Attributes:
        name: What it is.
        needed: Whether the obstacle is there.
        apply: Takes it away.
        with_cuda: It stands in the way where there is CUDA, too.
    """

    name: str
    needed: Callable[[], bool]
    apply: Callable[[], None]
    with_cuda: bool = False


def _asks_cuda_for_the_device() -> bool:
    try:
        torch.cuda.current_device()
    except (RuntimeError, AssertionError):
        return True
    return False


def _answer_with_the_cpu() -> None:
    # Rotary embeddings, routers and parallel linear layers allocate on `current_device()`.
    torch.cuda.current_device = _cpu  # type: ignore[assignment]


def _cpu() -> Any:
    return torch.device("cpu")


def _router_misses_its_product() -> bool:
    from megatron.core.transformer.moe import moe_utils

    return not hasattr(moe_utils, "te_general_gemm")


def _no_product_of_transformer_engine() -> None:
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None


CURES = (
    Cure("the current device is asked of CUDA", _asks_cuda_for_the_device, _answer_with_the_cpu),
    Cure(
        "the router's product is undefined without Transformer Engine",
        _router_misses_its_product,
        _no_product_of_transformer_engine,
        with_cuda=True,
    ),
)


def apply_cures() -> None:
    """Applies the cures that are needed here."""
    for cure in CURES:
        if (cure.with_cuda or not torch.cuda.is_available()) and cure.needed():
            cure.apply()
