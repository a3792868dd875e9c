"""One pipeline stage of the backbone: megatron-core's GPTModel without its product with V rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from autodeco.engines.megatron.attention import SdpaCoreAttention
from autodeco.engines.megatron.experts import GroupedExperts
from autodeco.family import Architecture, ModelShape
from autodeco.layout import ParallelLayout


def stack_experts(model: Any) -> None:
    """Lays the experts' loaded weights out for grouped products, where torch has them."""
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.stack()


class GatedMLP(MLP):  # type: ignore[misc]  # megatron-core is untyped
    """megatron-core's MLP, whose gate is applied in place: no gradient will ask for what was there.

    It takes a third of the memory beyond the weights; what is not plain SwiGLU without a bias goes
    megatron-core's way.
    """

    def forward(self, hidden: Tensor, per_token_scale: Any = None, **given: Any) -> Any:
        """Returns [s, b, d] of hidden states [s, b, d], and the bias that was not added."""
        config = self.config
        plain = (
            config.gated_linear_unit
            and config.activation_func is torch.nn.functional.silu
            and config.activation_func_clamp_value is None
            and not config.glu_linear_offset
            and not config.add_bias_linear
            and per_token_scale is None
        )
        if not plain:
            return super().forward(hidden, per_token_scale, **given)
        gate, up = self.linear_fc1(hidden)[0].chunk(2, dim=-1)
        return self.linear_fc2(torch.nn.functional.silu(gate, inplace=True).mul_(up))


class KeepHidden(nn.Module):
    """Stands in for the output layer: the objective makes logits where and when it needs them.

    Args:
        weight: [V_local, d].
        tied: megatron-core's checkpoints store it once, as the embedding.
    """

    def __init__(self, weight: nn.Parameter, tied: bool) -> None:
        super().__init__()
        self.weight = weight
        self._tied = tied

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Returns the hidden states as they are."""
        return hidden, None

    def sharded_state_dict(self, prefix: str = "", *_: Any, **__: Any) -> dict[str, Any]:
        """Says where megatron-core's checkpoints have the weight."""
        replica = (int(self._tied), 0, parallel_state.get_data_parallel_rank(True))
        name = prefix + "weight"
        key = name.replace("output_layer", "embedding.word_embeddings") if self._tied else name
        entry = make_tp_sharded_tensor_for_checkpoint(
            self.weight, key, replica_id=replica, allow_shape_mismatch=True
        )
        return {name: entry}


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
    """
    values: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn_size or shape.expert_ffn_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
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
        "pipeline_model_parallel_size": layout.pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
    }
    if layout.pipeline > 1:
        values["num_layers_in_first_pipeline_stage"] = layout.first_stage_layers
        values["num_layers_in_last_pipeline_stage"] = layout.last_stage_layers
    if shape.num_experts:
        values |= {
            "num_moe_experts": shape.num_experts,
            "moe_router_topk": shape.experts_per_token,
            "moe_ffn_hidden_size": shape.expert_ffn_size,
            "moe_router_pre_softmax": False,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": False,
            "moe_token_dispatcher_type": "alltoall" if device.type == "cuda" else "allgather",
        }
    return TransformerConfig(**{**values, **architecture.megatron})


def build_stage(config: Any, shape: ModelShape, *, first: bool, last: bool) -> Any:
    """Builds one stage on the current device, its parameters unset.

    Args:
        config: Of `transformer_config`.
        shape: The model's sizes.
        first: The stage holds the embedding.
        last: The stage holds the final norm and the output layer.
    """
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer in spec.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
        if shape.num_experts:
            layer.submodules.mlp.submodules.experts.module = GroupedExperts
    model = GPTModel(
        config,
        spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=1,  # of learned positions, which there are none of
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=False,  # each stage loads its own copy
        position_embedding_type="none",  # the core attention rotates
    )
    for module in model.modules():
        if type(module) is MLP:  # a layer knows MLP by its name, and what to give it
            module.__class__ = GatedMLP
    if last:
        tied = first and shape.tied_embeddings
        weight = model.embedding.word_embeddings.weight if tied else model.output_layer.weight
        model.output_layer = KeepHidden(weight, shape.tied_embeddings)
    return model.eval().requires_grad_(False)
