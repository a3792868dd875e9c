"""Which base model heads belong to: what they remember of it, and whether a base is that one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autodeco.errors import WeightsError
from autodeco.files import read_json

CONFIG_FILE = "config.json"
AUTODECO_MODEL_TYPE = "autodeco"
SHAPE_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "vocab_size",
)
# From what says most to what says least; the digest covers them all.
_COMPARED = ("hidden_size", "base_model_type", "vocab_size", "base_config_sha256")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a Hugging Face config (``text_config`` where it is nested)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and "hidden_size" not in config else config


def base_identity(base: Path) -> dict[str, Any]:
    """What heads remember of the checkpoint that they were trained on.

    Returns:
        `base_model_name_or_path`, `base_model_type`, `hidden_size`, `vocab_size` (None where
        config.json has none) and `base_config_sha256` (of the fields that give the backbone's
        shape; dtype and quantization do not count).

    Raises:
        WeightsError: config.json is missing, malformed, or has no hidden_size.
    """
    config = read_json(base / CONFIG_FILE)
    inner = text_config(config) if isinstance(config, Mapping) else {}
    if not isinstance(inner.get("hidden_size"), int):
        raise WeightsError(
            "config.json has no hidden_size",
            where=str(base / CONFIG_FILE),
            fix="give the directory of a Hugging Face language model",
        )
    shape = {name: inner[name] for name in SHAPE_FIELDS if inner.get(name) is not None}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()
    return {
        "base_model_name_or_path": config.get("_name_or_path") or base.resolve().name,
        "base_model_type": config.get("model_type"),
        "hidden_size": inner["hidden_size"],
        "vocab_size": inner.get("vocab_size"),
        "base_config_sha256": digest,
    }


def check_fit(base: Path, heads: Path, metadata: Mapping[str, Any]) -> None:
    """Refuses heads that were made for another model than `base`.

    Args:
        base: The base checkpoint.
        heads: Where the heads are.
        metadata: What they remember; what is None or absent is not compared.

    Raises:
        WeightsError: They do not belong together; the message has the first difference.
    """
    identity = base_identity(base)
    pairs = [(key, metadata.get(key), identity[key]) for key in _COMPARED]
    config = read_json(base / CONFIG_FILE)
    pairs += _published_shape(heads, text_config(config))
    for key, theirs, ours in pairs:
        if theirs is not None and theirs != ours:
            raise WeightsError(
                f"these heads were made for another model: {key} is {theirs!r} there, "
                f"{ours!r} in the base",
                where=f"{heads} and {base}",
                fix=f"merge them with {metadata.get('base_model_name_or_path') or 'their base'}",
            )


def _published_shape(heads: Path, base: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The sizes in the config of published heads: a copy of their base's, without a digest.

    It has defaults of transformers where the base's own file may have nothing: only what both have
    is compared.
    """
    file = heads / CONFIG_FILE
    config = read_json(file) if file.is_file() else None
    if not isinstance(config, Mapping) or config.get("model_type") != AUTODECO_MODEL_TYPE:
        return []
    names = [name for name in SHAPE_FIELDS if name != "model_type" and base.get(name) is not None]
    return [(name, text_config(config).get(name), base[name]) for name in names]
