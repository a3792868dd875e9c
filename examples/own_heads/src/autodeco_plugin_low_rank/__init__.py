"""An example: Qwen3 with heads whose first layers are of low rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from autodeco.errors import UsageError
from autodeco.hookspecs import BuiltModel, HeadedModel, HeadsArtifact
from autodeco.job import Job
from autodeco.plugin import FamilyPlugin
from autodeco_plugin_low_rank.heads import LowRankHeads
from autodeco_plugin_qwen3.family import FAMILY


class LowRankPlugin(FamilyPlugin):
    """Qwen3 with other heads."""

    def attach_heads(self, job: Job, model: BuiltModel) -> HeadedModel:
        """Draws the heads from the job's seed.

        Raises:
            UsageError: The job names heads to start from.
        """
        if job.init_heads is not None:
            raise UsageError(
                "heads of low rank begin from a random draw",
                where=f"--init-heads {job.init_heads}",
                fix="leave --init-heads out",
            )
        heads = LowRankHeads(model.hidden_size, job.heads, job.enhanced_features, job.seed)
        return HeadedModel(model, heads.to(torch.device(model.device)))

    def export_heads(self, job: Job, model: HeadedModel, path: Path) -> HeadsArtifact:
        """Writes the plain heads that give the same T and P."""
        return super().export_heads(
            job, dataclasses.replace(model, heads=model.heads.plain()), path
        )


plugin = LowRankPlugin(dataclasses.replace(FAMILY, id="low_rank", aliases=()))
