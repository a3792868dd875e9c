"""What megatron-core needs CUDA or Transformer Engine for or does unlike transformers; the cures.

Each cure is as small as it can be, and a test fails when a version of megatron-core no longer needs
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


def _latent_attention_misjudges() -> bool:
    from megatron.core.transformer import multi_latent_attention as latent

    return bool(latent.HAVE_TE) and not isinstance(latent.TELinear, type)


def _no_transformer_engine_in_latent_attention() -> None:
    from megatron.core.transformer import multi_latent_attention as latent

    latent.HAVE_TE = False


def _groups_are_ranked_otherwise() -> bool:
    from megatron.core.transformer.moe import moe_utils

    # the best expert is in the first group, the best two are in the second
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.7]], device="cpu")
    _, chosen = moe_utils.group_limited_topk(scores, 1, 1, 4, 2, 1)
    return bool(chosen.tolist() != [[2]])


def _rank_groups_by_their_best_two() -> None:
    # megatron-core takes topk // group_topk scores, which need not be two; transformers always
    # takes two, as arXiv 2412.19437 does.
    from megatron.core.transformer.moe import moe_utils

    moe_utils.group_limited_topk = _group_limited_topk


def _group_limited_topk(
    scores: Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    grouped = scores.view(num_tokens, num_groups, -1)
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1)[0].sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool)
    kept.scatter_(1, best.topk(group_topk, dim=-1, sorted=False)[1], True)
    masked = grouped.masked_fill(~kept[..., None], -torch.inf)
    values, indices = masked.flatten(1).topk(topk, dim=-1)
    return values, indices


CURES = (
    Cure("the current device is asked of CUDA", _asks_cuda_for_the_device, _answer_with_the_cpu),
    Cure(
        "the router's product is undefined without Transformer Engine",
        _router_misses_its_product,
        _no_product_of_transformer_engine,
        with_cuda=True,
    ),
    Cure(
        "latent attention believes that Transformer Engine is there",
        _latent_attention_misjudges,
        _no_transformer_engine_in_latent_attention,
        with_cuda=True,
    ),
    Cure(
        "groups of experts are not ranked by their two best scores",
        _groups_are_ranked_otherwise,
        _rank_groups_by_their_best_two,
        with_cuda=True,
    ),
)


def apply_cures() -> None:
    """Applies the cures that are needed here."""
    for cure in CURES:
        if (cure.with_cuda or not torch.cuda.is_available()) and cure.needed():
            cure.apply()
