"""`FamilyPlugin`: the four hooks, done from a family's data."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodeco import hookimpl, hookspecs
from autodeco.errors import PluginError
from autodeco.family import FamilySpec
from autodeco.hookspecs import BuiltModel, HeadedModel, HeadsArtifact, ImportedWeights

if TYPE_CHECKING:
    from autodeco.job import Job


class FamilyPlugin:
    """A plugin made of a `FamilySpec` alone.

    To replace a hook, subclass and override it; the override stays a hook without being marked
    again. Its parameters must be among the hook's own, as pluggy demands.

    Args:
        family: The family's data.
    """

    def __init__(self, family: FamilySpec) -> None:
        self.family = family

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # pluggy silently ignores an override that lost its marker.
        super().__init_subclass__(**kwargs)
        for name in hookspecs.HOOKS:
            body = cls.__dict__.get(name)
            if body is None:
                continue
            allowed = set(inspect.signature(getattr(hookspecs, name)).parameters)
            extra = set(inspect.signature(body).parameters) - allowed - {"self"}
            if extra:
                raise PluginError(
                    f"{cls.__name__}.{name} takes {', '.join(sorted(extra))}, "
                    f"which the hook does not pass",
                    who=cls.__module__,
                    fix=f"use only {', '.join(sorted(allowed))}",
                )
            if not hasattr(body, "autodeco_impl"):
                setattr(cls, name, hookimpl(body))

    @hookimpl
    def import_weights(self, job: Job) -> ImportedWeights:
        """Binds the weight map to the checkpoint, and imports it if the job asks for that."""
        from autodeco.convert.importing import ready_weights

        return ready_weights(self.family, job)

    @hookimpl
    def build_model(self, job: Job, weights: ImportedWeights) -> BuiltModel:
        """Builds the backbone on the engine that the job names."""
        from autodeco.engines.select import build_engine

        return BuiltModel(build_engine(job, weights, self.family), weights)

    @hookimpl
    def attach_heads(self, job: Job, model: BuiltModel) -> HeadedModel:
        """Adds the temperature head and the top-p head."""
        from autodeco.heads.attach import new_heads

        return HeadedModel(model, new_heads(job, model.hidden_size, model.device))

    @hookimpl
    def export_heads(self, job: Job, model: HeadedModel, path: Path) -> HeadsArtifact:
        """Writes the heads directory.

        Raises:
            PluginError: The heads are not those that a heads directory holds.
        """
        from autodeco.heads.attach import heads_metadata
        from autodeco.heads.files import save_heads
        from autodeco.heads.modules import DecodingHeads

        if type(model.heads) is not DecodingHeads:
            raise PluginError(
                f"the heads are {type(model.heads).__name__}, and a heads directory holds "
                f"{DecodingHeads.__name__} alone",
                who=self.family.id,
                fix="override export_heads, and hand plain heads that give the same T and P to it",
            )
        metadata = heads_metadata(job, self.family.id, model.model.weights.path)
        metadata |= {"temperature_scale": job.temperature_scale, "top_p_scale": job.top_p_scale}
        if model.checkpoint is not None:
            metadata["checkpoint"] = model.checkpoint
        saved = save_heads(path, model.heads, metadata=metadata, dtype=job.save_dtype)
        return HeadsArtifact(saved)
