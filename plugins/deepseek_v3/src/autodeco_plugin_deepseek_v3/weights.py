"""DeepSeek-V3's weight map: Hugging Face names to megatron-core names."""

from autodeco.blocks import (
    HF_MLP,
    MEGATRON_MLP,
    embedding,
    experts,
    gated_mlp,
    latent_attention,
    layer_norms,
    output_layer,
    shared_experts,
    sparse_layers,
)
from autodeco.weights import Drop, WeightMap, copy

WEIGHT_MAP = WeightMap(
    rules=(
        *embedding(),
        *layer_norms(),
        *latent_attention(),
        *gated_mlp(),
        *experts(),
        copy(
            HF_MLP + "gate.e_score_correction_bias",
            MEGATRON_MLP + "router.expert_bias",
            lambda s: (s.num_experts,),
            layers=sparse_layers,
        ),
        *shared_experts(),
        *output_layer(),
    ),
    drops=(
        Drop(
            r"model\.layers\.{layer}\..*",
            "the multi-token-prediction layer: the heads read the last layer of the model itself",
        ),
    ),
)
