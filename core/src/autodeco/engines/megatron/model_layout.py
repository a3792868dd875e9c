"""The layout of a whole model, for a process that wants nothing else of megatron-core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from autodeco.convert.stored import Piece
from autodeco.engines.megatron.compat import apply_cures
from autodeco.engines.megatron.engine import form_groups
from autodeco.engines.megatron.stored_layout import stored_layout
from autodeco.family import Architecture
from autodeco.hookspecs import ImportedWeights
from autodeco.layout import ParallelLayout


def model_layout(
    weights: ImportedWeights, architecture: Architecture, config: Mapping[str, Any]
) -> tuple[Piece, ...]:
    """Returns every piece of a model; see `stored_layout`. Leaves no process groups behind.

    Args:
        weights: The weight map and the shape.
        architecture: One of its family's.
        config: Its ``config.json``.

    Raises:
        WeightsError: Weight map and model do not agree.
    """
    apply_cures()
    alone = not dist.is_initialized()
    form_groups(ParallelLayout(), torch.device("cpu"))
    try:
        return stored_layout(weights, architecture, config)[0]
    finally:
        parallel_state.destroy_model_parallel()
        if alone:
            dist.destroy_process_group()
