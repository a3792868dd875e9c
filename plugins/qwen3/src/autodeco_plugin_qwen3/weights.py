"""Qwen3's weight map, dense and mixture of experts: Hugging Face names to megatron-core names."""

from autodeco.family import ModelShape
from autodeco.weights import WeightMap, copy, gate_up, qkv, tied

_HF = "model.layers.{layer}."
_MC = "decoder.layers.{layer}."
_HF_EXPERT = _HF + "mlp.experts.{expert}."
_MC_EXPERT = _MC + "mlp.experts.local_experts.{expert}."


def _dense(s: ModelShape) -> bool:
    return s.num_experts == 0


def _moe(s: ModelShape) -> bool:
    return s.num_experts > 0


def _tied(s: ModelShape) -> bool:
    return s.tied_embeddings


def _untied(s: ModelShape) -> bool:
    return not s.tied_embeddings


def _vocabulary(s: ModelShape) -> tuple[int, ...]:
    return (s.vocab_size, s.hidden_size)


def _width(s: ModelShape) -> tuple[int, ...]:
    return (s.hidden_size,)


def _head(s: ModelShape) -> tuple[int, ...]:
    return (s.head_dim,)


_EMBEDDING = ("model.embed_tokens.weight", "embedding.word_embeddings.weight")
_ATTENTION = (_HF + "self_attn.", _MC + "self_attention.")

WEIGHT_MAP = WeightMap(
    rules=(
        copy(*_EMBEDDING, _vocabulary, parallel_dim=0, when=_untied),
        tied(
            *_EMBEDDING,
            ("output_layer.weight",),
            _vocabulary,
            when=_tied,
            twins=("lm_head.weight",),  # as the 0.6B on the hub
        ),
        copy(_HF + "input_layernorm.weight", _MC + "input_layernorm.weight", _width),
        qkv(
            _ATTENTION[0] + "q_proj.weight",
            _ATTENTION[0] + "k_proj.weight",
            _ATTENTION[0] + "v_proj.weight",
            _ATTENTION[1] + "linear_qkv.weight",
        ),
        copy(_ATTENTION[0] + "q_norm.weight", _ATTENTION[1] + "q_layernorm.weight", _head),
        copy(_ATTENTION[0] + "k_norm.weight", _ATTENTION[1] + "k_layernorm.weight", _head),
        copy(
            _ATTENTION[0] + "o_proj.weight",
            _ATTENTION[1] + "linear_proj.weight",
            lambda s: (s.hidden_size, s.num_heads * s.head_dim),
            parallel_dim=1,
        ),
        copy(_HF + "post_attention_layernorm.weight", _MC + "pre_mlp_layernorm.weight", _width),
        gate_up(
            _HF + "mlp.gate_proj.weight",
            _HF + "mlp.up_proj.weight",
            _MC + "mlp.linear_fc1.weight",
            lambda s: (s.ffn_size, s.hidden_size),
            when=_dense,
        ),
        copy(
            _HF + "mlp.down_proj.weight",
            _MC + "mlp.linear_fc2.weight",
            lambda s: (s.hidden_size, s.ffn_size),
            parallel_dim=1,
            when=_dense,
        ),
        copy(
            _HF + "mlp.gate.weight",
            _MC + "mlp.router.weight",
            lambda s: (s.num_experts, s.hidden_size),
            when=_moe,
        ),
        gate_up(
            _HF_EXPERT + "gate_proj.weight",
            _HF_EXPERT + "up_proj.weight",
            _MC_EXPERT + "linear_fc1.weight",
            lambda s: (s.expert_ffn_size, s.hidden_size),
            when=_moe,
        ),
        copy(
            _HF_EXPERT + "down_proj.weight",
            _MC_EXPERT + "linear_fc2.weight",
            lambda s: (s.hidden_size, s.expert_ffn_size),
            parallel_dim=1,
            when=_moe,
        ),
        copy("model.norm.weight", "decoder.final_layernorm.weight", _width),
        copy("lm_head.weight", "output_layer.weight", _vocabulary, parallel_dim=0, when=_untied),
    ),
)
