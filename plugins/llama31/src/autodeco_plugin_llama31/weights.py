"""Llama 3.1's weight map: Hugging Face names to megatron-core names."""

from autodeco.blocks import embedding, gated_mlp, grouped_attention, layer_norms, output_layer
from autodeco.weights import WeightMap

WEIGHT_MAP = WeightMap(
    rules=(*embedding(), *layer_norms(), *grouped_attention(), *gated_mlp(), *output_layer())
)
