"""Which key of a ``config.json`` is which size, a small shape of the same structure, and what a
dimension of a tensor is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from autodeco.errors import WeightsError
from autodeco.family import ModelShape

_KEYS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads"),
    "head_dim": ("head_dim",),
    "ffn_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "tied_embeddings": ("tie_word_embeddings",),
}
_EXPERT_KEYS: dict[str, tuple[str, ...]] = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": (
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k"),
    ),
    "expert_ffn_size": ("moe_intermediate_size", "expert_intermediate_size"),
    "shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "dense_layers": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
}
_LATENT_KEYS: dict[str, tuple[str, ...]] = {
    "query_rank": ("q_lora_rank",),
    "key_value_rank": ("kv_lora_rank",),
    "head_dim": ("v_head_dim",),
    "nope_head_dim": ("qk_nope_head_dim",),
    "rope_head_dim": ("qk_rope_head_dim",),
}
LAYER_KEYS = _KEYS["num_layers"]
_OPTIONAL = ("num_kv_heads", "head_dim", "tied_embeddings", "shared_experts", "dense_layers")
#: Keys that a configuration may have though the model has no such size, or derives it.
UNUSED_KEYS = (*_KEYS["ffn_size"], "head_dim", "qk_head_dim")
#: Every known key of a size.
SIZE_KEYS = frozenset(
    key for table in (_KEYS, _EXPERT_KEYS, _LATENT_KEYS) for keys in table.values() for key in keys
)


def find_keys(config: Mapping[str, Any], where: str) -> dict[str, str]:
    """Returns `ModelShape` field -> key of ``config.json``; "": the model has none.

    Args:
        config: With the defaults of its class.
        where: For messages.

    Raises:
        WeightsError: A size stands under no known key.
    """
    tables = dict(_KEYS)
    if any(config.get(key) for key in _EXPERT_KEYS["num_experts"]):
        tables |= _EXPERT_KEYS
    if config.get("kv_lora_rank"):
        tables |= _LATENT_KEYS
    found: dict[str, str] = {}
    for name, keys in tables.items():
        present = [key for key in keys if config.get(key) is not None]
        if present:
            found[name] = present[0]
        elif name == "num_kv_heads":
            found[name] = found["num_heads"]
        elif name not in (*_OPTIONAL, "query_rank", "expert_ffn_size"):
            raise WeightsError(
                f"no key of the configuration is known to be the {name.replace('_', ' ')}",
                where=where,
                fix=f"a plugin needs one of {', '.join(keys)}; give the configuration of the "
                "language model alone",
            )
    if "num_experts" in found:
        if "expert_ffn_size" not in found:
            found["expert_ffn_size"] = found["ffn_size"]
            found["ffn_size"] = ""
        elif not config.get(found.get("dense_layers", "")):
            found.pop("dense_layers", None)
            found["ffn_size"] = ""
        if not config.get(found.get("shared_experts", "")):
            found.pop("shared_experts", None)
    return found


def small_shape(shape: ModelShape, *, layers: int, own_head_dim: bool) -> ModelShape:
    """Returns a small shape of the same structure, whose sizes and their products all differ.

    Expert widths are multiples of 32, which storage formats need.

    Args:
        shape: The model's.
        layers: How many.
        own_head_dim: The heads need not make up the width of the residual stream.
    """
    small = replace(shape, num_layers=layers, vocab_size=1024)
    if shape.is_latent:
        small = replace(
            small,
            hidden_size=160,
            num_heads=6,
            num_kv_heads=6,
            head_dim=24,
            key_value_rank=40,
            nope_head_dim=32,
            rope_head_dim=16,
            query_rank=72 if shape.query_rank else 0,
        )
    else:
        hidden = 96 if own_head_dim else 192
        small = replace(small, hidden_size=hidden, num_heads=6, num_kv_heads=2, head_dim=32)
    if shape.ffn_size:
        small = replace(small, ffn_size=352)
    if shape.num_experts:
        small = replace(
            small,
            num_experts=8,
            experts_per_token=min(2, shape.experts_per_token),
            expert_ffn_size=128,
            shared_experts=min(3, shape.shared_experts),
            dense_layers=min(1, shape.dense_layers),
        )
    return small


def small_config(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Returns the keys that a small model of the same structure has otherwise, sizes left out.

    Lists with an item a layer keep every kind of layer; windows are short and scaled rotary
    embeddings begin early, so that a test reaches them.

    Args:
        config: The ``config.json``.
        layers: Of the small model.
    """
    changes: dict[str, Any] = {}
    for key, items in layer_lists(config).items():
        kinds = list(dict.fromkeys(items))
        changes[key] = [kinds[n % len(kinds)] for n in range(layers)]
    for key in ("n_group", "topk_group"):
        if isinstance(config.get(key), int) and config[key] > 1:
            changes[key] = 4 if key == "n_group" else 2
    if isinstance(config.get("sliding_window"), int):
        changes["sliding_window"] = 8
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, Mapping) and "original_max_position_embeddings" in rope:
            changes[key] = {**rope, "original_max_position_embeddings": 64}
    return changes


def layer_lists(config: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns the keys whose value is a list with an item for each layer."""
    count = next((config[k] for k in _KEYS["num_layers"] if config.get(k)), 0)
    return {
        key: value
        for key, value in config.items()
        if isinstance(value, list) and len(value) == count and count > 0
    }


def layers_needed(config: Mapping[str, Any]) -> int:
    """Returns how many layers a small model needs to have every kind of layer."""
    kinds = [len(set(map(str, items))) for items in layer_lists(config).values()]
    return max(3, *(kind + 1 for kind in kinds)) if kinds else 3


def expressions(shape: ModelShape) -> dict[int, str]:
    """Returns what each number is made of in a shape of `small_shape`, as source on ``s``."""
    heads, groups = "s.num_heads", "s.num_kv_heads"
    texts = [
        *("s.hidden_size", "s.vocab_size", "s.ffn_size", "s.num_experts", "s.expert_ffn_size"),
        *("s.head_dim", f"{heads} * s.head_dim", f"{groups} * s.head_dim"),
        f"({heads} + 2 * {groups}) * s.head_dim",
        *("s.query_rank", "s.key_value_rank", "s.key_value_rank + s.rope_head_dim"),
        f"{heads} * (s.nope_head_dim + s.rope_head_dim)",
        f"{heads} * (s.nope_head_dim + s.head_dim)",
        *("s.shared_experts * s.expert_ffn_size", "2 * s.ffn_size", "2 * s.expert_ffn_size"),
        *("2 * s.shared_experts * s.expert_ffn_size", heads, groups, "1"),
    ]
    found: dict[int, str] = {}
    for text in texts:
        value = int(eval(text, {"s": shape}))  # of this list alone
        if value:
            found.setdefault(value, text)
    return found


def expert_ranks(shape: ModelShape) -> int:
    """Returns over how many GPUs of a machine of eight the experts can be spread."""
    return gcd(8, shape.num_experts) if shape.num_experts else 1
