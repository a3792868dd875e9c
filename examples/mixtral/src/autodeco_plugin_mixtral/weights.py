"""Mixtral's weight map: Hugging Face names to megatron-core names."""

from autodeco.blocks import embedding, experts, grouped_attention, layer_norms, output_layer
from autodeco.weights import WeightMap

WEIGHT_MAP = WeightMap(
    rules=(
        *embedding(),
        *layer_norms(),
        *grouped_attention(),
        *experts(block="block_sparse_moe.", gate="w1", up="w3", down="w2"),
        *output_layer(),
    ),
)
