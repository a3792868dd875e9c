"""Qwen3's weight map, dense and mixture of experts: Hugging Face names to megatron-core names."""

from autodeco.blocks import (
    embedding,
    experts,
    gated_mlp,
    grouped_attention,
    layer_norms,
    output_layer,
)
from autodeco.weights import WeightMap

WEIGHT_MAP = WeightMap(
    rules=(
        *embedding(),
        *layer_norms(),
        *grouped_attention(norms="head"),
        *gated_mlp(),
        *experts(),
        *output_layer(),
    ),
)
