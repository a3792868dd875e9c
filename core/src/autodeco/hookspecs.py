"""The four hooks of a plugin, and the handles that go between them.

A hook is called on the chosen plugin alone. Casting, training, merging and evaluation are stages of
core between the hooks, not hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pluggy

if TYPE_CHECKING:
    from autodeco.family import ModelShape
    from autodeco.job import Job
    from autodeco.storage import StorageFormat
    from autodeco.weights import BoundWeightMap

hookspec = pluggy.HookspecMarker("autodeco")


@dataclass(frozen=True)
class ImportedWeights:
    """A handle on weights; nothing is loaded.

    Attributes:
        path: The checkpoint directory, in Hugging Face format: config.json and tokenizer are here.
        format: ``hf`` (safetensors, as on the hub) or ``torch_dist`` (megatron-core).
        weight_map: The family's map, bound to this checkpoint and proved total.
        shape: The model's shape, as in its ``config.json``.
        distributed: The imported checkpoint, where the format is ``torch_dist``.
        formats: The plugin's own storage formats, for whoever reads the path.
    """

    path: Path
    format: Literal["hf", "torch_dist"]
    weight_map: BoundWeightMap
    shape: ModelShape
    distributed: Path | None = None
    formats: tuple[StorageFormat, ...] = ()


@dataclass(frozen=True)
class BuiltModel:
    """A frozen backbone on an engine.

    Attributes:
        engine: See `autodeco.engines.base.Engine`; None where heads are exported, which needs none.
        weights: What it was built from.
    """

    engine: Any
    weights: ImportedWeights

    @property
    def hidden_size(self) -> int:
        """Returns d, the width of the hidden states that the heads read."""
        return self.weights.shape.hidden_size

    @property
    def device(self) -> Any:
        """Returns where the heads go: the engine's device; without an engine, the CPU."""
        return "cpu" if self.engine is None else self.engine.device


@dataclass(frozen=True)
class HeadedModel:
    """A backbone with heads; only the heads train.

    Attributes:
        model: The backbone.
        heads: An `autodeco.heads.modules.DecodingHeads`, or a plugin's subclass of it; see
            `attach_heads`.
        checkpoint: Name of the training checkpoint that they are from; None while they train.
    """

    model: BuiltModel
    heads: Any
    checkpoint: str | None = None


@dataclass(frozen=True)
class HeadsArtifact:
    """A heads directory that was written.

    Attributes:
        path: The directory.
    """

    path: Path


@hookspec(firstresult=True)
def import_weights(job: Job) -> ImportedWeights | None:
    """Makes the checkpoint ready for the engine, or returns the source as it is."""


@hookspec(firstresult=True)
def build_model(job: Job, weights: ImportedWeights) -> BuiltModel | None:
    """Builds the frozen backbone on the job's engine."""


@hookspec(firstresult=True)
def attach_heads(job: Job, model: BuiltModel) -> HeadedModel | None:
    """Adds the heads that will be trained.

    A plugin's own heads are a subclass of `DecodingHeads` whose parameters are float32 and on
    `model.device`. Training calls its `temperature` and `top_p`, asks `needs_features`, takes
    `temp_head` or `top_p_head` that is None for a head that is not there, and keeps its state dict
    in checkpoints; their names and shapes are the plugin's. Only the width of the hidden layer,
    ``HeadsConfig(intermediate_size=...)``, needs no subclass.
    The hook is called again, without an engine and without ``init_heads``, for an export; the heads
    then get the tensors of a checkpoint. So they must follow from the job and the model's sizes.
    """


@hookspec(firstresult=True)
def export_heads(job: Job, model: HeadedModel, path: Path) -> HeadsArtifact | None:
    """Writes the heads directory at `path`.

    Merging, evaluation and every decoder read it by `autodeco.heads.files.load_heads`, which knows
    ``Linear, ReLU, Linear, Sigmoid`` of any width. A plugin's own heads are written as that: it
    overrides this hook, turns `model.heads` into plain `DecodingHeads` that give the same T and P,
    and hands them to the default body.
    """


HOOKS = ("import_weights", "build_model", "attach_heads", "export_heads")
