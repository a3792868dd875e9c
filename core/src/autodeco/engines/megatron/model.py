"""One pipeline stage of the backbone: megatron-core's GPTModel without its product with V rows."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from autodeco.engines.megatron.attention import SdpaCoreAttention
from autodeco.engines.megatron.experts import GroupedExperts
from autodeco.engines.megatron.norms import AllHeadsNorm, NormedResidual
from autodeco.engines.megatron.rotary import MicrobatchRotary
from autodeco.family import Architecture, ModelShape


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


def build_stage(
    config: Any, shape: ModelShape, architecture: Architecture, *, first: bool, last: bool
) -> Any:
    """Builds one stage on the current device, its parameters unset.

    Args:
        config: Of `transformer_config`.
        shape: The model's sizes.
        architecture: Says where the norms stand.
        first: The stage holds the embedding.
        last: The stage holds the final norm and the output layer.
    """
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization
    )
    # of layers that are alike the spec may have one object several times
    for layer in {id(layer): layer for layer in spec.layer_specs}.values():
        _adapt(layer.submodules, config, shape, architecture)
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
        elif isinstance(module, MLASelfAttention):
            module.rotary_pos_emb = MicrobatchRotary()
    if last:
        tied = first and shape.tied_embeddings
        weight = model.embedding.word_embeddings.weight if tied else model.output_layer.weight
        model.output_layer = KeepHidden(weight, shape.tied_embeddings)
    return model.eval().requires_grad_(False)


def _adapt(layer: Any, config: Any, shape: ModelShape, architecture: Architecture) -> None:
    """Puts our modules into the spec of a layer."""
    attention = layer.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if architecture.qk_norm == "all_heads":
        width = shape.head_dim
        attention.q_layernorm = ModuleSpec(AllHeadsNorm, {"width": shape.num_heads * width})
        attention.k_layernorm = ModuleSpec(AllHeadsNorm, {"width": shape.num_kv_heads * width})
    if architecture.norms == "behind":
        norm = layer.input_layernorm
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
        layer.self_attn_bda = layer.mlp_bda = ModuleSpec(
            NormedResidual, {"config": config, "norm": norm}
        )
    experts = getattr(layer.mlp.submodules, "experts", None)
    if experts is not None:
        experts.module = GroupedExperts
