"""Reads what a new plugin begins from: a ``config.json`` and the tensors that go with it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autodeco.errors import WeightsError
from autodeco.family import Architecture, ModelShape
from autodeco.files import read_json
from autodeco.scaffold.naming import template
from autodeco.scaffold.sizes import (
    LAYER_KEYS,
    SIZE_KEYS,
    UNUSED_KEYS,
    find_keys,
    layer_lists,
    layers_needed,
    small_config,
    small_shape,
)
from autodeco.weights import Dims

PLAIN = ("F64", "F32", "F16", "BF16")
#: Keys that change neither the weights nor what is computed from them.
_IDLE = re.compile(
    r"architectures|model_type|transformers_version|(torch_)?dtype|_name_or_path|auto_map|use_cache"
    r"|.*_token_id|initializer_range|.*_?(dropout|pdrop)(_prob)?|output_.*|return_dict.*"
    r"|pretraining_tp|.*aux_loss.*|router_jitter_noise|_attn_implementation|ep_size|seq_aux"
    r"|id2label|label2id|problem_type|chunk_size_feed_forward|is_encoder_decoder|tokenizer_class"
)


@dataclass(frozen=True)
class Source:
    """What a new plugin begins from.

    Attributes:
        where: The ``config.json``.
        config: Its content.
        full: The same with the defaults of transformers' class.
        keys: `ModelShape` field -> key.
        shape: The model's sizes.
        small: Those of a small model of the same structure.
        small_config: What else the small model's configuration has otherwise.
        tensors: Name -> shape, of the small model, as a checkpoint stores them.
        stored: Name -> format or dtype, of the tensors that the given checkpoint stores unlike the
            others.
        extra: Names that the given checkpoint has beside those of transformers' class.
        odd_logits: Why the logits are not hidden states times output layer; "": they are.
    """

    where: str
    config: Mapping[str, Any]
    full: Mapping[str, Any]
    keys: Mapping[str, str]
    shape: ModelShape
    small: ModelShape
    small_config: Mapping[str, Any]
    tensors: Mapping[str, Dims]
    stored: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    odd_logits: str = ""

    @property
    def name(self) -> str:
        """Returns the architecture's name."""
        return str(self.config["architectures"][0])

    @property
    def shared(self) -> dict[str, Any]:
        """Returns the keys that all sizes of the family may share."""
        lists = layer_lists(self.config)
        sizes = {key: self.config.get(key) for key in self.keys.values()}
        kept = {
            key: value
            for key, value in sorted(self.config.items())
            if key not in (*sizes, *lists, *UNUSED_KEYS)
            and not (value is None and key in SIZE_KEYS)
            and not _IDLE.fullmatch(key)
        }
        defaults = {
            key: self.full[key]
            for key, value in sizes.items()
            if value is None and self.full.get(key) is not None and self.full[key] is not False
        }
        return {**kept, **defaults}

    @property
    def own(self) -> dict[str, Any]:
        """Returns the keys that belong to this size: lists with an item for each layer."""
        return layer_lists(self.config)


def read_source(path: Path) -> Source:
    """Reads a ``config.json``, or a directory with one, and finds the tensors' names.

    Raises:
        WeightsError: It cannot be read, has sizes under unknown keys, or is of an architecture
            that transformers does not know.
    """
    where = path / "config.json" if path.is_dir() else path
    config = read_json(where)
    _check(config, where)
    full = _full_config(config, where)
    keys = find_keys(full, str(where))
    architecture = Architecture("", "", config=full, config_keys=keys)
    shape = architecture.shape_of(config, where=str(where))
    problems = []
    for own_head_dim in (True, False):
        layers = layers_needed(config)
        small = small_shape(shape, layers=layers, own_head_dim=own_head_dim)
        if keys["num_kv_heads"] == keys["num_heads"]:
            small = replace(small, num_kv_heads=small.num_heads)
        found = Source(
            str(where), config, full, keys, shape, small, small_config(config, layers), {}
        )
        try:
            tensors, odd = _small_model(found, own_head_dim=own_head_dim)
            return _with_checkpoint(replace(found, tensors=tensors, odd_logits=odd), path)
        except Exception as error:  # whatever a class of transformers raises
            problems.append(f"{type(error).__name__}: {error}")
    raise WeightsError(
        f"transformers' {found.name} makes no small model of this configuration: {problems[-1]}",
        where=str(where),
        fix="write the plugin by hand: docs/plugins.md begins with an example",
    )


def _check(config: Any, where: Path) -> None:
    wrong = None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        wrong = "it names no model_type"
    elif not isinstance(config.get("architectures"), list) or not config["architectures"]:
        wrong = "it names no architecture"
    elif any(isinstance(config.get(key), dict) for key in ("text_config", "llm_config")):
        wrong = "it nests a language model's configuration in another one"
    elif key := next((k for k in LAYER_KEYS if _is_absurd(config.get(k))), None):
        wrong = f"{key} is {config[key]!r}"
    if wrong:
        raise WeightsError(
            f"no plugin can be begun from this configuration: {wrong}",
            where=str(where),
            fix="give the config.json of a causal language model, as it came with the checkpoint",
        )


def _is_absurd(layers: Any) -> bool:
    """Whether no model has as many layers: transformers makes lists of them."""
    return isinstance(layers, int | float) and not layers <= 10_000


def _full_config(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    if config["model_type"] not in CONFIG_MAPPING:
        raise WeightsError(
            f"transformers does not know the model type {config['model_type']!r}",
            where=str(where),
            fix="install a newer transformers, or write the plugin by hand (docs/plugins.md)",
        )
    try:
        full: dict[str, Any] = _config_class(config)(**_plain(config)).to_dict()
    except Exception as error:  # each class checks its own values, in its own way
        raise WeightsError(
            f"transformers cannot make a {config['model_type']} configuration of it: {error}",
            where=str(where),
            fix="give the config.json as it came with the checkpoint",
        ) from error
    return {**full, **config}


def _config_class(config: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("architectures", "model_type", "quantization_config", "auto_map")
    return {key: value for key, value in config.items() if key not in left_out}


def _small_model(source: Source, *, own_head_dim: bool) -> tuple[dict[str, Dims], str]:
    """Makes the small model; returns its tensors as a checkpoint stores them.

    Raises:
        ValueError: Its heads make up the width of the residual stream, and were meant not to.
    """
    import torch
    import transformers
    from transformers.utils import logging

    from autodeco.safetensors_header import read_checkpoint

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    architecture = Architecture(source.name, "", config=source.shared, config_keys=source.keys)
    values = architecture.config_json(source.small, source.small_config)
    values |= {key: None for key in source.config if key.endswith("_token_id")}
    config = _config_class(source.config)(**_plain(values))
    kind = getattr(transformers, source.name, None)
    if kind is None:
        raise ValueError(f"transformers has no class {source.name}")
    torch.manual_seed(0)
    with torch.no_grad():
        model = kind(config).eval()
        odd = _odd_logits(model)
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tensors = {n: tuple(i.shape) for n, i in read_checkpoint(Path(directory)).items()}
    small = source.small
    if own_head_dim and not small.is_latent:
        widths = {size for shape in tensors.values() for size in shape}
        heads, groups = (n * small.head_dim for n in (small.num_heads, small.num_kv_heads))
        if not widths & {heads, heads + 2 * groups}:
            raise ValueError("its heads make up the width of the residual stream")
    return tensors, odd


def _odd_logits(model: Any) -> str:
    """Why its logits are not its last hidden states times its output layer."""
    import torch

    ids = torch.arange(8)[None]
    logits = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    output = model.get_output_embeddings()
    plain = (hidden @ output.weight.T).float()
    difference = float((logits - plain).abs().max())
    if difference <= 1e-5 * float(logits.abs().max().clamp_min(1.0)):
        return ""
    if getattr(output, "bias", None) is not None:
        return "the output layer has a bias"
    return "they are scaled, capped or shifted behind the output layer"


def _with_checkpoint(source: Source, path: Path) -> Source:
    """Adds what the directory's own tensors tell: storage formats, tensors beside the model's."""
    if not path.is_dir() or not any(path.glob("*.safetensors*")):
        return source
    names, dtypes = _names_of(path)
    known = {template(name) for name in source.tensors}
    plain = [kind for kind in dtypes.values() if kind in PLAIN]
    usual = max(sorted(set(plain)), key=plain.count, default="")
    behind = re.compile(rf"(\D*)\.{source.shape.num_layers}\..*")
    odd = {
        template(name): kind
        for name, kind in dtypes.items()
        if not behind.fullmatch(name) and kind != usual and kind not in ("BF16", "F16", "F64")
    }
    # a layer behind the last one predicts further tokens: one pattern has all of it
    extra = {
        found[1] + ".{layer}.*" if (found := behind.fullmatch(name)) else template(name)
        for name in names
    }
    return replace(source, stored=odd, extra=tuple(sorted(extra - known)))


def _names_of(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names in a checkpoint, and the format or dtype of each where its headers are there."""
    from autodeco.convert.shards import stored_tensors
    from autodeco.safetensors_header import INDEX, read_checkpoint, read_index

    index = path / INDEX
    if index.is_file():
        shards = read_index(path)["weight_map"]
        if not all((path / file).is_file() for file in shards.values()):
            return sorted(shards), {}
    stored = stored_tensors(read_checkpoint(path))
    kinds = {n: t.format.name if t.format else t.dtype for n, t in stored.items()}
    return list(stored), kinds
