"""GPT-OSS's weight map: Hugging Face names to megatron-core names.

Experts lie in one tensor, inputs before outputs, the rows of gate and up in turn; everything has a
bias, and every head a sink.
"""

from autodeco.blocks import (
    HF_ATTENTION,
    HF_MLP,
    MEGATRON_ATTENTION,
    MEGATRON_EXPERT,
    MEGATRON_MLP,
    embedding,
    grouped_attention,
    layer_norms,
    output_layer,
    width,
)
from autodeco.weights import WeightMap, copy, gate_up

_HF_EXPERTS = HF_MLP + "experts."

WEIGHT_MAP = WeightMap(
    rules=(
        *embedding(),
        *layer_norms(),
        *grouped_attention(bias=True, output_bias=True),
        copy(
            HF_ATTENTION + "sinks",
            MEGATRON_ATTENTION + "core_attention.softmax_offset",
            lambda s: (s.num_heads,),
            parallel_dim=0,
        ),
        copy(
            HF_MLP + "router.weight",
            MEGATRON_MLP + "router.weight",
            lambda s: (s.num_experts, s.hidden_size),
        ),
        copy(
            HF_MLP + "router.bias",
            MEGATRON_MLP + "router.bias",
            lambda s: (s.num_experts,),
        ),
        gate_up(
            _HF_EXPERTS + "gate_up_proj",
            MEGATRON_EXPERT + "linear_fc1.weight",
            size=lambda s: (s.expert_ffn_size, s.hidden_size),
            stacked=True,
            transposed=True,
            interleaved=True,
        ),
        gate_up(
            _HF_EXPERTS + "gate_up_proj_bias",
            MEGATRON_EXPERT + "linear_fc1.bias",
            size=lambda s: (s.expert_ffn_size,),
            stacked=True,
            interleaved=True,
        ),
        copy(
            _HF_EXPERTS + "down_proj",
            MEGATRON_EXPERT + "linear_fc2.weight",
            lambda s: (s.hidden_size, s.expert_ffn_size),
            parallel_dim=1,
            stacked=True,
            transposed=True,
        ),
        copy(
            _HF_EXPERTS + "down_proj_bias",
            MEGATRON_EXPERT + "linear_fc2.bias",
            width,
            stacked=True,
        ),
        *output_layer(),
    )
)
