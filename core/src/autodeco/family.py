"""A family is data: its architectures, presets, layouts and recipes, all frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autodeco.errors import PluginError, WeightsError
from autodeco.layout import ParallelLayout
from autodeco.weights import WeightMap

__all__ = [
    "API",
    "Architecture",
    "FamilySpec",
    "ModelPreset",
    "ModelShape",
    "ParallelLayout",
]

API = 1

_DEFAULT_CONFIG_KEYS: dict[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "tied_embeddings": "tie_word_embeddings",
}


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model; they must agree with the checkpoint's ``config.json``.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: Width d of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of one head.
        ffn_size: Inner width of a dense feed-forward block (0: the model has none).
        vocab_size: Rows of the embedding, padding included.
        tied_embeddings: The output layer is the embedding.
        num_experts: Routed experts of a layer; 0 for a dense model.
        experts_per_token: Experts that a token goes to.
        expert_ffn_size: Inner width of one expert.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied_embeddings: bool = False
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0


@dataclass(frozen=True)
class Architecture:
    """One architecture of a family, as ``config.json`` names it.

    Attributes:
        name: The class in ``architectures``.
        model_type: ``model_type`` in ``config.json``.
        config: Further keys and values of ``config.json`` that all sizes share.
        config_keys: `ModelShape` field -> key, where it differs from the usual one ("": none).
        required: Keys whose values must be these if a checkpoint has them; the weight map and the
            engines rely on them.
        megatron: Fields of megatron-core's TransformerConfig beyond those that follow from the
            shape.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_keys: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    megatron: Mapping[str, Any] = field(default_factory=dict)

    def keys(self) -> dict[str, str]:
        """Returns `ModelShape` field -> key of ``config.json``."""
        keys = {**_DEFAULT_CONFIG_KEYS, **self.config_keys}
        return {name: key for name, key in keys.items() if key}

    def config_json(self, shape: ModelShape) -> dict[str, Any]:
        """Returns the ``config.json`` of a model of this shape."""
        sizes = {key: getattr(shape, name) for name, key in self.keys().items()}
        return {
            "architectures": [self.name],
            "model_type": self.model_type,
            **self.config,
            **sizes,
        }

    def shape_of(self, config: Mapping[str, Any], *, where: str) -> ModelShape:
        """Reads the shape from a ``config.json``.

        Raises:
            WeightsError: A size is missing from the file, or one of `required` differs.
        """
        for key, value in self.required.items():
            if key in config and config[key] != value:
                raise WeightsError(
                    f"{key} is {config[key]!r}; this plugin handles {value!r} only",
                    where=where,
                    fix="use a checkpoint without this feature, or write a plugin that handles it",
                )
        values: dict[str, Any] = {"ffn_size": 0}
        for name, key in self.keys().items():
            if config.get(key) is not None:
                values[name] = config[key]
                wanted = bool if name == "tied_embeddings" else int
                if type(config[key]) is not wanted:
                    raise WeightsError(
                        f"{key!r} is {config[key]!r}, which is no {wanted.__name__}",
                        where=where,
                        fix="use the config.json that came with the checkpoint",
                    )
            elif name == "head_dim":
                values[name] = config["hidden_size"] // config["num_attention_heads"]
            elif name == "tied_embeddings":
                values[name] = False
            else:
                raise WeightsError(
                    f"the configuration of {self.name} has no {key!r}",
                    where=where,
                    fix="use the config.json that came with the checkpoint",
                )
        return ModelShape(**values)


@dataclass(frozen=True)
class ModelPreset:
    """One size of a family.

    Attributes:
        name: As in ``--preset``.
        architecture: The name of one of the family's architectures.
        shape: Its sizes.
        model_ids: Hugging Face ids of this size.
        layout: How to spread it over GPUs.
        recipe: `Job` field -> value: length, batch, schedule of a training run.
        checkpoint: Folder of the plugin's package with a built-in, trained checkpoint.
        random: Weights are drawn at random when no checkpoint is given (for tests).
        tokenizer: Folder of the package with the tokenizer of a random checkpoint.
        task: The built-in task that its data comes from when no data is given.
    """

    name: str
    architecture: str
    shape: ModelShape
    model_ids: tuple[str, ...] = ()
    layout: ParallelLayout = ParallelLayout()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    random: bool = False
    tokenizer: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class FamilySpec:
    """Everything that core knows of a family.

    Attributes:
        id: The plugin's name in ``--plugin`` and of its entry point.
        title: For people.
        package: The Python package that holds the family's files.
        architectures: As ``config.json`` names them.
        presets: The sizes; the first one is the default when no model is given.
        weight_map: From Hugging Face names to Megatron names, both ways.
        aliases: Other names for ``--plugin``.
        api: The plugin contract that this was written for.
    """

    id: str
    title: str
    package: str
    architectures: tuple[Architecture, ...]
    presets: tuple[ModelPreset, ...]
    weight_map: WeightMap
    aliases: tuple[str, ...] = ()
    api: int = API

    def preset(self, name: str) -> ModelPreset:
        """Returns a preset by its name.

        Raises:
            PluginError: There is none; the message lists them.
        """
        for preset in self.presets:
            if preset.name == name:
                return preset
        raise PluginError(
            f"no preset {name!r}",
            who=self.id,
            fix="choose one of " + ", ".join(preset.name for preset in self.presets),
        )

    def architecture(self, name: str) -> Architecture:
        """Returns an architecture by the name that ``config.json`` has.

        Raises:
            PluginError: The family does not have it.
        """
        for architecture in self.architectures:
            if architecture.name == name:
                return architecture
        raise PluginError(
            f"the family has no architecture {name!r}",
            who=self.id,
            fix="the checkpoint belongs to another family: see autodeco plugin list",
        )
