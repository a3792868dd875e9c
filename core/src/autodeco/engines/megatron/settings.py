"""megatron-core's TransformerConfig of a checkpoint: from its shape, its config and the family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
)
from torch import Tensor
from torch.nn import functional

from autodeco.engines.megatron.rotary import rope_values
from autodeco.errors import PluginError, UsageError
from autodeco.family import Architecture, FromConfig, ModelShape
from autodeco.layout import ParallelLayout


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": functional.relu,
    "quick_gelu": quick_gelu,
}


def transformer_config(
    shape: ModelShape,
    architecture: Architecture,
    config: Mapping[str, Any],
    layout: ParallelLayout,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Returns megatron-core's TransformerConfig of a checkpoint.

    Args:
        shape: The model's sizes.
        architecture: Adds its own fields.
        config: The checkpoint's ``config.json``.
        layout: How the model is spread.
        dtype: Of the weights and of what stages send each other.
        device: Where the stage lives.

    Raises:
        WeightsError: ``config.json`` lacks a value that the architecture takes from it.
        PluginError: The architecture names a field or a function that there is not.
        UsageError: The layout splits the sequence, and the attention is of a kind that is not.
    """
    values: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn_size or shape.expert_ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-5),
        "qk_layernorm": architecture.qk_norm != "none",
        "gated_linear_unit": True,
        "activation_func": "silu",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "tensor_model_parallel_size": layout.tensor,
        "expert_tensor_parallel_size": 1,
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
    }
    if layout.pipeline > 1:
        values["num_layers_in_first_pipeline_stage"] = layout.first_stage_layers
        values["num_layers_in_last_pipeline_stage"] = layout.last_stage_layers
    values |= _of_experts(shape, device) | _of_latent_attention(shape, config)
    own = {name: _resolved(value, config) for name, value in architecture.megatron.items()}
    values |= own
    values["activation_func"] = _activation(values["activation_func"], architecture)
    kind = MLATransformerConfig if shape.is_latent else TransformerConfig
    try:
        made = kind(**values)
    except (TypeError, ValueError, AssertionError) as error:
        raise PluginError(
            f"megatron-core refuses the fields of {architecture.name}: {error}",
            where=", ".join(f"{name}={value!r}" for name, value in own.items()),
            fix="correct `megatron` of the architecture",
        ) from error
    # Not among the values: megatron-core refuses biases of experts that are split, since each rank
    # adds them. `loading` gives each rank its share of them.
    made.expert_tensor_parallel_size = layout.expert_tensor
    _refuse_split_sequences(made, layout)
    return made


def _of_experts(shape: ModelShape, device: torch.device) -> dict[str, Any]:
    if not shape.num_experts:
        return {}
    values = {
        "num_moe_experts": shape.num_experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.expert_ffn_size,
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "alltoall" if device.type == "cuda" else "allgather",
    }
    if shape.dense_layers:  # else layers are alike, and checkpoints stack them
        values["moe_layer_freq"] = [int(n in shape.sparse_layers) for n in range(shape.num_layers)]
    if shape.shared_experts:
        shared = shape.shared_experts * shape.expert_ffn_size
        values["moe_shared_expert_intermediate_size"] = shared
    return values


def _of_latent_attention(shape: ModelShape, config: Mapping[str, Any]) -> dict[str, Any]:
    if not shape.is_latent:
        return {}
    rope = rope_values(config)
    return {
        "multi_latent_attention": True,
        "q_lora_rank": shape.query_rank or None,
        "kv_lora_rank": shape.key_value_rank,
        "qk_head_dim": shape.nope_head_dim,
        "qk_pos_emb_head_dim": shape.rope_head_dim,
        "v_head_dim": shape.head_dim,
        "qk_layernorm": True,
        # of these, megatron-core makes the scale of the scores; the angles are ours
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope.get("factor", 1.0)),
        "mscale": float(rope.get("mscale") or 0.0),
        "mscale_all_dim": float(rope.get("mscale_all_dim") or 0.0),
    }


def _resolved(value: Any, config: Mapping[str, Any]) -> Any:
    if isinstance(value, FromConfig):
        return value.read(config, where="config.json")
    if isinstance(value, tuple):
        return tuple(_resolved(item, config) for item in value)
    return value


def _activation(name: Any, architecture: Architecture) -> Callable[[Tensor], Tensor]:
    if name not in _ACTIVATIONS:
        raise PluginError(
            f"{architecture.name} has the activation function {name!r}, which is not known",
            fix="use one of " + ", ".join(_ACTIVATIONS) + ", or no_megatron with the reason",
        )
    return _ACTIVATIONS[name]


def _refuse_split_sequences(config: Any, layout: ParallelLayout) -> None:
    """Context parallelism is proved for plain grouped-query attention alone."""
    odd = {
        "latent attention": config.multi_latent_attention,
        "sliding windows": config.window_size is not None,
        "learned sinks": config.softmax_type != "vanilla",
    }
    found = [name for name, has in odd.items() if has]
    if layout.context > 1 and found:
        raise UsageError(
            f"cp={layout.context} is not done with {' and '.join(found)}",
            where=f"--layout {layout}",
            fix="use cp=1, and tp or pp where memory is short",
        )
