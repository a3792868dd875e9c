"""Under which keys megatron-core stores a model: asked of its own classes, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from autodeco.convert.stored import Piece
from autodeco.engines.megatron.model import build_stage
from autodeco.engines.megatron.settings import transformer_config
from autodeco.errors import WeightsError
from autodeco.family import Architecture
from autodeco.hookspecs import ImportedWeights
from autodeco.layout import ParallelLayout

PREFIX = "module."  # as NeMo and Megatron-LM have it
_LOCAL_MOE_NORM = ".mlp.linear_fc1.layer_norm_weight"
_TE_MOE_NORM = ".pre_mlp_layernorm.weight"
_EMBEDDING = PREFIX + "embedding.word_embeddings.weight"
_OUTPUT = PREFIX + "output_layer.weight"
_SINKS = ".core_attention.softmax_offset"
_NORM = "layernorm.weight"
# norms that the local spec stores by themselves -> the product that Transformer Engine has them in
_FUSED_BY_TE = {
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1",
    ".self_attention.q_layernorm.weight": ".self_attention.linear_q_up_proj",
    ".self_attention.kv_layernorm.weight": ".self_attention.linear_kv_up_proj",
}


def stored_layout(
    weights: ImportedWeights, architecture: Architecture, config: Mapping[str, Any]
) -> tuple[tuple[Piece, ...], tuple[str, ...]]:
    """Builds the whole model without memory and asks for its sharded state dict.

    megatron-core's process groups must exist, of sizes 1.

    Args:
        weights: The source checkpoint.
        architecture: One of its family's.
        config: Its ``config.json``.

    Returns:
        Every piece, in the order of the weight map, and the keys of the objects (empty ones, of
        modules that may have an extra state).

    Raises:
        WeightsError: Weight map and model do not agree.
    """
    shape = weights.shape
    layout, cpu = ParallelLayout(), torch.device("cpu")
    settings = transformer_config(shape, architecture, config, layout, torch.bfloat16, cpu)
    settings.use_cpu_initialization = True  # otherwise it names its device itself
    with torch.device("meta"):
        model = build_stage(settings, shape, architecture, first=True, last=True)
    found: dict[str, list[Piece]] = {}
    objects: list[str] = []
    for name, entry in model.sharded_state_dict(prefix=PREFIX).items():
        target = name.removeprefix(PREFIX)
        if isinstance(entry, ShardedObject):
            _refuse_content(entry)
            objects.append(entry.unique_key)
        elif not _is_copy(entry):
            found[target] = list(_pieces(target, entry))
    _check_targets(weights, found)
    pieces = [piece for rule in weights.weight_map.rules for piece in found[rule.target]]
    aliased = tuple(_with_aliases(pieces, shape.tied_embeddings))
    return aliased, tuple(dict.fromkeys((*objects, *_states_of_te(aliased))))


def _pieces(target: str, entry: Any) -> Iterator[Piece]:
    tensors = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
    row = 0
    for tensor in tensors:
        assert isinstance(tensor, ShardedTensor)
        shape = tuple(tensor.local_shape)
        offset = tuple(tensor.global_offset)
        yield Piece(target, row, shape, tensor.key, (), tuple(tensor.global_shape), offset)
        row += shape[0]


def _is_copy(entry: Any) -> bool:
    """Whether it is a second place of a tensor that is stored once (a tied output layer)."""
    return bool(entry.replica_id[0])


def _refuse_content(entry: Any) -> None:
    if entry.data is not None:
        raise WeightsError(
            f"the model has a state beside its weights: {entry.key!r}",
            where="megatron-core",
            fix="leave --import-format out: the engine loads the Hugging Face directory itself",
        )


def _check_targets(weights: ImportedWeights, found: Mapping[str, list[Piece]]) -> None:
    """Checks that the weight map fills what the model stores, no more and no less."""
    wanted = {rule.target: rule for rule in weights.weight_map.rules}
    odd = sorted(wanted.keys() ^ found.keys())
    if odd:
        known = "the weight map" if odd[0] in wanted else "megatron-core's model"
        raise WeightsError(
            f"only {known} has {odd[0]!r} ({len(odd)} such tensors)",
            where=str(weights.path),
            fix="the plugin's weight map or its `megatron` fields do not fit its architecture",
        )


def _with_aliases(pieces: list[Piece], tied: bool) -> Iterator[Piece]:
    """Adds the names of the Transformer Engine spec where the local spec has others.

    Before a layer of experts, the local spec stores the norm as if it were fused into a dense
    layer's product; Transformer Engine stores it under its own name. With latent attention it is
    the other way round before a dense layer, and Transformer Engine fuses the norms of queries and
    keys into the products behind them. A tied embedding has the output layer's name as well: NeMo
    makes some models with tied embeddings as ones that are not.
    """
    keys = {piece.key for piece in pieces}
    for piece in pieces:
        aliases: tuple[str, ...] = (_OUTPUT,) if tied and piece.key == _EMBEDDING else ()
        layer = piece.key.removesuffix(_LOCAL_MOE_NORM)
        if layer != piece.key and layer + ".mlp.linear_fc1.weight" not in keys:
            aliases = (layer + _TE_MOE_NORM,)
        for norm, product in _FUSED_BY_TE.items():
            layer = piece.key.removesuffix(norm)
            if layer != piece.key and layer + product + ".weight" in keys:
                aliases = (layer + product + ".layer_norm_weight",)
        yield Piece(**{**vars(piece), "aliases": aliases})


def _states_of_te(pieces: tuple[Piece, ...]) -> Iterator[str]:
    """Yields keys of the (empty) states that Transformer Engine's modules have and local ones not.

    Its norms have one, unless they are fused into a product, and so has attention with sinks; its
    products have those of the local spec.
    """
    for piece in pieces:
        for key in piece.aliases or (piece.key,):
            if not key.endswith((_NORM, _SINKS)):
                continue
            module = key.rpartition(".")[0]
            stacked = len(piece.global_shape) > len(piece.shape)
            layers, layer = (piece.global_shape[0], piece.offset[0]) if stacked else (1, 0)
            yield f"{module}._extra_state/shard_{layer}_{layers}"
