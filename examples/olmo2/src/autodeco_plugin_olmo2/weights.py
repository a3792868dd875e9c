"""OLMo 2's weight map: Hugging Face names to megatron-core names."""

from autodeco.blocks import embedding, gated_mlp, grouped_attention, norms_behind, output_layer
from autodeco.weights import WeightMap

WEIGHT_MAP = WeightMap(
    rules=(
        *embedding(),
        *norms_behind(),
        *grouped_attention(norms="all_heads"),
        *gated_mlp(),
        *output_layer(),
    ),
)
