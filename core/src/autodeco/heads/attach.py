"""Makes the heads that a job asks for, new or from a warm start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autodeco.errors import WeightsError
from autodeco.heads.files import load_heads
from autodeco.heads.identity import base_identity
from autodeco.heads.modules import DecodingHeads, HeadsConfig

if TYPE_CHECKING:
    from autodeco.job import Job

ASKED = "evaluate"  # in a heads directory's config.json: options that its model is asked with
ASKED_OPTIONS = ("problem_format", "max_new_tokens", "chat_template_kwargs")


def new_heads(job: Job, hidden_size: int, device: torch.device) -> DecodingHeads:
    """Returns trainable heads, drawn from the job's seed or read from ``--init-heads``.

    Raises:
        WeightsError: The heads of ``--init-heads`` are of another kind or size.
    """
    wanted = HeadsConfig(hidden_size, heads=job.heads, enhanced_features=job.enhanced_features)
    generator = torch.Generator().manual_seed(job.seed)
    heads = DecodingHeads(wanted, generator)
    if job.init_heads is not None:
        start = load_heads(job.init_heads, hidden_size=hidden_size).heads
        names = {name: tensor.shape for name, tensor in start.state_dict().items()}
        for name, tensor in heads.state_dict().items():
            if names.get(name) != tensor.shape:
                raise WeightsError(
                    f"the heads to start from have {names.get(name) or 'no'} {name}, "
                    f"this job needs {tuple(tensor.shape)}",
                    where=str(job.init_heads),
                    fix="choose --heads and --enhanced-features as those heads have them, or "
                    "heads of this base model",
                )
        kept = {name: start.state_dict()[name] for name in heads.state_dict()}
        heads.load_state_dict(kept)
    return heads.to(device).requires_grad_(True)


def heads_metadata(job: Job, family: str, base: Path) -> dict[str, Any]:
    """Returns what a heads directory records of its training, and how the job asks problems."""
    return {
        **base_identity(base),
        "family": family,
        "preset": job.preset,
        "objective": job.objective,
        "seed": job.seed,
        ASKED: {name: getattr(job, name) for name in ASKED_OPTIONS},
    }
