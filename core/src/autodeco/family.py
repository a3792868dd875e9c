"""A family is data: its architectures, presets, layouts and recipes, all frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from autodeco.errors import PluginError, WeightsError
from autodeco.layout import ParallelLayout
from autodeco.recipes import TRAINING
from autodeco.storage import StorageFormat
from autodeco.weights import WeightMap

__all__ = [
    "API",
    "AUTO_PRESET",
    "OLDEST_API",
    "Architecture",
    "FamilySpec",
    "FromConfig",
    "ModelPreset",
    "ModelShape",
    "ParallelLayout",
]

API = 1  # what changes it, and how long the one before works: docs/releasing.md
OLDEST_API = 1
AUTO_PRESET = "auto"
_MISSING = object()
# Far beyond any model: what a config.json asks for is built in memory before a byte is read.
_MOST = {"num_layers": 10_000, "num_experts": 20_000}
_MOST_EXPERTS = 250_000  # of all layers
_LARGEST = 2**31 - 1

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
        shared_experts: Experts of a layer that every token goes to.
        dense_layers: First layers that have a dense feed-forward block though others have experts.
        query_rank: Width that queries are compressed to; 0: they are not.
        key_value_rank: Width that keys and values are compressed to (multi-head latent attention);
            0: the attention is of another kind. With it, `head_dim` is the width of a value.
        nope_head_dim: Width of a query and a key without positions, with latent attention.
        rope_head_dim: Width of their part that rotates, with latent attention.
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
    shared_experts: int = 0
    dense_layers: int = 0
    query_rank: int = 0
    key_value_rank: int = 0
    nope_head_dim: int = 0
    rope_head_dim: int = 0

    @property
    def sparse_layers(self) -> range:
        """Returns the layers that have experts."""
        return range(self.dense_layers if self.num_experts else self.num_layers, self.num_layers)

    @property
    def is_latent(self) -> bool:
        """Whether attention is multi-head latent attention."""
        return self.key_value_rank > 0

    def impossible(self) -> str:
        """Returns what no model can have of these sizes, in words; "": nothing."""
        needed = [
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "vocab_size",
        ]
        needed += ["experts_per_token", "expert_ffn_size"] if self.num_experts else ["ffn_size"]
        wrong = [f"{name} {getattr(self, name)}" for name in needed if getattr(self, name) < 1]
        if not wrong and self.num_heads % self.num_kv_heads:
            wrong = [f"{self.num_heads} heads over {self.num_kv_heads} key and value heads"]
        if self.experts_per_token > self.num_experts:
            wrong.append(f"{self.experts_per_token} of {self.num_experts} experts for a token")
        return ", ".join(wrong)


@dataclass(frozen=True)
class FromConfig:
    """A value that a checkpoint's ``config.json`` gives.

    Attributes:
        key: Where it stands; dots go into objects, as in ``rope_parameters.factor``.
        default: Its value where the key is missing or null; by default that is an error.
        plus: Added to it.
        equals: The value is a list; take of each of its items whether it is this.
    """

    key: str
    default: Any = _MISSING
    plus: int = 0
    equals: Any = None

    def read(self, config: Mapping[str, Any], *, where: str) -> Any:
        """Returns the value.

        Raises:
            WeightsError: It is missing, and there is no default.
        """
        value: Any = config
        for name in self.key.split("."):
            value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING or value is None:
            value = self.default
        if value is _MISSING:
            raise WeightsError(
                f"the configuration has no {self.key!r}",
                where=where,
                fix="use the config.json that came with the checkpoint",
            )
        if self.equals is not None and isinstance(value, list):
            return [item == self.equals for item in value]
        return value + self.plus if self.plus else value


@dataclass(frozen=True)
class Architecture:
    """One architecture of a family, as ``config.json`` names it.

    Attributes:
        name: The class in ``architectures``.
        model_type: ``model_type`` in ``config.json``.
        config: Further keys and values of ``config.json`` that all sizes share; of a size, what it
            is where the file leaves it out.
        config_keys: `ModelShape` field -> key, where it differs from the usual one ("": none).
        required: Keys whose values must be these if a checkpoint has them; the weight map and the
            engines rely on them.
        megatron: Fields of megatron-core's TransformerConfig beyond those that follow from the
            shape; `FromConfig` stands for what the checkpoint says, and a function for its name
            (``activation_func``: "silu", "gelu", "gelu_tanh", "relu" or "quick_gelu").
        norms: Where a layer's norms stand: before attention and feed-forward block, or behind them.
        qk_norm: Norms of queries and keys: none, one of each head, or one of all heads together.
        stored: A regular expression that matches whole names of tensors -> the storage format that
            published checkpoints keep them in, or a dtype (F32) where it is not the model's.
        no_megatron: Why the megatron engine cannot run it; "": it can.
        nemo: NeMo 2's importer of it, ``module:Class``, which writes the context of a NeMo 2
            checkpoint; "": none is known.
    """

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_keys: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    megatron: Mapping[str, Any] = field(default_factory=dict)
    norms: Literal["before", "behind"] = "before"
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    stored: Mapping[str, str] = field(default_factory=dict)
    no_megatron: str = ""
    nemo: str = ""

    def keys(self) -> dict[str, str]:
        """Returns `ModelShape` field -> key of ``config.json``."""
        keys = {**_DEFAULT_CONFIG_KEYS, **self.config_keys}
        return {name: key for name, key in keys.items() if key}

    def config_json(
        self, shape: ModelShape, changes: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Returns the ``config.json`` of a model of this shape.

        Args:
            shape: The sizes.
            changes: Keys that are other than those that all sizes share; see `ModelPreset.config`.
        """
        sizes = {key: getattr(shape, name) for name, key in self.keys().items()}
        return {
            "architectures": [self.name],
            "model_type": self.model_type,
            **self.config,
            **(changes or {}),
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
            value = self.config.get(key) if config.get(key) is None else config[key]
            if value is not None:
                values[name] = value
                wanted = bool if name == "tied_embeddings" else int
                most = _MOST.get(name, _LARGEST)
                wrong = f"which is no {wanted.__name__}" if type(value) is not wanted else ""
                if not wrong and value > most:
                    wrong = f"which no model has (at most {most:,})"
                if wrong:
                    raise WeightsError(
                        f"{key!r} is {value!r}, {wrong}",
                        where=where,
                        fix="use the config.json that came with the checkpoint",
                    )
            elif name == "head_dim":
                values[name] = values["hidden_size"] // max(1, values["num_heads"])
            elif name == "tied_embeddings":
                values[name] = False
            else:
                raise WeightsError(
                    f"the configuration of {self.name} has no {key!r}",
                    where=where,
                    fix="use the config.json that came with the checkpoint",
                )
        shape = ModelShape(**values)
        if len(shape.sparse_layers) * shape.num_experts > _MOST_EXPERTS:
            raise WeightsError(
                f"{len(shape.sparse_layers):,} layers of {shape.num_experts:,} experts, which no "
                "model has",
                where=where,
                fix="use the config.json that came with the checkpoint",
            )
        return shape


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
        config: Keys of ``config.json`` in which this size differs from its architecture's `config`.
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
    config: Mapping[str, Any] = field(default_factory=dict)


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
        formats: Storage formats beyond the built-in ones of `autodeco.storage`.
        api: The plugin contract that this was written for; who says nothing was written for the
            first one.
    """

    id: str
    title: str
    package: str
    architectures: tuple[Architecture, ...]
    presets: tuple[ModelPreset, ...]
    weight_map: WeightMap
    aliases: tuple[str, ...] = ()
    formats: tuple[StorageFormat, ...] = ()
    api: int = 1

    def preset(self, name: str) -> ModelPreset:
        """Returns a preset by its name.

        Raises:
            PluginError: There is none; the message lists them.
        """
        for preset in self.presets:
            if preset.name == name:
                return preset
        names = ", ".join(preset.name for preset in self.presets)
        if name == AUTO_PRESET:
            raise PluginError(
                f"preset {AUTO_PRESET!r} takes its sizes from a checkpoint, and none is given",
                who=self.id,
                fix=f"add --model DIR, or choose one of {names}",
            )
        raise PluginError(f"no preset {name!r}", who=self.id, fix=f"choose one of {names}")

    def preset_for(self, name: str, config: Mapping[str, Any], *, where: str) -> ModelPreset:
        """Returns the preset that a job means, given its checkpoint.

        Args:
            name: As in ``--preset``; ``auto`` stands for a preset of the checkpoint's own sizes,
                with the recipe `TRAINING` and no layout: that is chosen where the job starts.
            config: The checkpoint's ``config.json``.
            where: Its path, for messages.

        Raises:
            PluginError: There is no such preset, or the checkpoint is of another family.
            WeightsError: A size is missing or impossible, or one of `Architecture.required`
                differs.
        """
        if name != AUTO_PRESET:
            return self.preset(name)
        named = config.get("architectures")
        architecture = self.architecture(
            str(named[0]) if isinstance(named, list) and named else "?"
        )
        shape = architecture.shape_of(config, where=where)
        wrong = shape.impossible()
        if wrong:
            raise WeightsError(
                f"the sizes of config.json are impossible: {wrong}",
                who=self.id,
                where=where,
                fix="use the config.json that came with the checkpoint",
            )
        return ModelPreset(AUTO_PRESET, architecture.name, shape, recipe=TRAINING)

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
