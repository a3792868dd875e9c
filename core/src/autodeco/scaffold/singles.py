"""Tensors that some decoders have beside the usual blocks, and where megatron-core has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autodeco.blocks import MEGATRON_ATTENTION, MEGATRON_EXPERT, MEGATRON_LAYER, MEGATRON_MLP
from autodeco.family import FromConfig

_LAYER = r".*\{layer\}\."
_ALL_BIASES = {"add_bias_linear": True, "add_qkv_bias": True}
_LAYER_NORM = {"normalization": "LayerNorm"}
_PLAIN = {"gated_linear_unit": False}
_SIGMOID_ROUTER = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.0,
    "moe_router_num_groups": FromConfig("n_group"),
    "moe_router_group_topk": FromConfig("topk_group"),
    "moe_router_topk_scaling_factor": FromConfig("routed_scaling_factor"),
    "moe_router_pre_softmax": True,
    "moe_router_dtype": "fp32",
}
_UP = r"(up_proj|fc1|c_fc|fc_in|dense_h_to_4h)"
_DOWN = r"(down_proj|fc2|c_proj|fc_out|dense_4h_to_h)"
_FIRST = r"(input_layernorm|ln_1|attention_norm|self_attn_layer_norm)"
_SECOND = r"(post_attention_layernorm|ln_2|ffn_norm|final_layer_norm)"

#: A pattern of a name with counters, its target, the dimension that tensor ranks split, and fields
#: of TransformerConfig that go with it.
KNOWN: tuple[tuple[str, str, int | None, Mapping[str, Any]], ...] = (
    (_LAYER + _FIRST + r"\.bias", MEGATRON_LAYER + "input_layernorm.bias", None, _LAYER_NORM),
    (_LAYER + _SECOND + r"\.bias", MEGATRON_LAYER + "pre_mlp_layernorm.bias", None, _LAYER_NORM),
    (r"[^{]*norm[^{]*\.bias", "decoder.final_layernorm.bias", None, _LAYER_NORM),
    (
        *(_LAYER + r"self_attn\.q_proj\.weight", MEGATRON_ATTENTION + "linear_q_proj.weight"),
        *(0, {}),
    ),
    (
        *(_LAYER + r".*sinks", MEGATRON_ATTENTION + "core_attention.softmax_offset"),
        *(0, {"softmax_type": "learnable"}),
    ),
    (
        *(_LAYER + r".*e_score_correction_bias", MEGATRON_MLP + "router.expert_bias"),
        *(None, _SIGMOID_ROUTER),
    ),
    (_LAYER + r".*(router|gate)\.bias", MEGATRON_MLP + "router.bias", None, _ALL_BIASES),
    (_LAYER + r"mlp\." + _UP + r"\.weight", MEGATRON_MLP + "linear_fc1.weight", 0, _PLAIN),
    (_LAYER + r"mlp\." + _UP + r"\.bias", MEGATRON_MLP + "linear_fc1.bias", 0, _ALL_BIASES),
    (_LAYER + r"mlp\." + _DOWN + r"\.weight", MEGATRON_MLP + "linear_fc2.weight", 1, {}),
    (_LAYER + r"mlp\." + _DOWN + r"\.bias", MEGATRON_MLP + "linear_fc2.bias", None, _ALL_BIASES),
    (
        *(r".*\{expert\}\." + _DOWN + r"\.bias", MEGATRON_EXPERT + "linear_fc2.bias"),
        *(None, _ALL_BIASES),
    ),
)
