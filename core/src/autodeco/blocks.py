"""The weight map's rules of the usual blocks of a decoder, under their usual Hugging Face names.

A family whose tensors have other names gives them; one whose blocks are of another kind writes its
own rules with `autodeco.weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from autodeco.family import ModelShape
from autodeco.weights import Dims, Rule, copy, gate_up, qkv, tied

HF_LAYER = "model.layers.{layer}."
MEGATRON_LAYER = "decoder.layers.{layer}."
HF_ATTENTION = HF_LAYER + "self_attn."
MEGATRON_ATTENTION = MEGATRON_LAYER + "self_attention."
HF_MLP = HF_LAYER + "mlp."
MEGATRON_MLP = MEGATRON_LAYER + "mlp."
MEGATRON_EXPERT = MEGATRON_MLP + "experts.local_experts.{expert}."


def width(s: ModelShape) -> Dims:
    """The shape of a vector of the residual stream."""
    return (s.hidden_size,)


def dense_layers(s: ModelShape) -> range:
    """The layers without experts."""
    return range(s.sparse_layers.start)


def sparse_layers(s: ModelShape) -> range:
    """The layers with experts."""
    return s.sparse_layers


def renamed(rules: Iterable[Rule], names: Mapping[str, str]) -> tuple[Rule, ...]:
    """Rules whose source tensors are called otherwise.

    Args:
        rules: Of the functions below.
        names: A part of a name, such as ``self_attn.`` -> what stands in its place; in this order.
    """

    def other(name: str) -> str:
        for old, new in names.items():
            name = name.replace(old, new)
        return name

    return tuple(
        replace(rule, sources=tuple(map(other, rule.sources)), twins=tuple(map(other, rule.twins)))
        for rule in rules
    )


def _vocabulary(s: ModelShape) -> Dims:
    return (s.vocab_size, s.hidden_size)


def _tied(s: ModelShape) -> bool:
    return s.tied_embeddings


def _untied(s: ModelShape) -> bool:
    return not s.tied_embeddings


def embedding(
    name: str = "model.embed_tokens.weight", output: str = "lm_head.weight"
) -> tuple[Rule, ...]:
    """The embedding, which may be the output layer as well.

    Args:
        name: Its name.
        output: The output layer's; some checkpoints store it beside the embedding that it is.
    """
    names = (name, "embedding.word_embeddings.weight")
    return (
        copy(*names, _vocabulary, parallel_dim=0, when=_untied),
        tied(*names, ("output_layer.weight",), _vocabulary, when=_tied, twins=(output,)),
    )


def output_layer(
    norm: str = "model.norm.weight", output: str = "lm_head.weight"
) -> tuple[Rule, ...]:
    """The last norm, and the output layer where it is not the embedding."""
    return (
        copy(norm, "decoder.final_layernorm.weight", width),
        copy(output, "output_layer.weight", _vocabulary, parallel_dim=0, when=_untied),
    )


def layer_norms(
    attention: str = "input_layernorm", mlp: str = "post_attention_layernorm"
) -> tuple[Rule, ...]:
    """The norms before a layer's attention and before its feed-forward block."""
    return (
        copy(f"{HF_LAYER}{attention}.weight", MEGATRON_LAYER + "input_layernorm.weight", width),
        copy(f"{HF_LAYER}{mlp}.weight", MEGATRON_LAYER + "pre_mlp_layernorm.weight", width),
    )


def norms_behind(
    attention: str = "post_attention_layernorm", mlp: str = "post_feedforward_layernorm"
) -> tuple[Rule, ...]:
    """The norms behind a layer's attention and its feed-forward block."""
    return (
        copy(f"{HF_LAYER}{attention}.weight", MEGATRON_LAYER + "self_attn_bda.norm.weight", width),
        copy(f"{HF_LAYER}{mlp}.weight", MEGATRON_LAYER + "mlp_bda.norm.weight", width),
    )


def grouped_attention(
    *,
    bias: bool = False,
    output_bias: bool = False,
    norms: str = "none",
    fused: str | None = None,
    output: str = "o_proj",
) -> tuple[Rule, ...]:
    """Attention with grouped queries.

    Args:
        bias: Queries, keys and values have biases.
        output_bias: The output projection has one.
        norms: Of queries and keys: "none", "head" or "all_heads", as `Architecture.qk_norm`.
        fused: The name of the one projection that has queries, keys and values, in this order.
        output: The name of the output projection.
    """
    hf, mc = HF_ATTENTION, MEGATRON_ATTENTION
    names = [fused] if fused else ["q_proj", "k_proj", "v_proj"]
    kinds = ("weight", "bias") if bias else ("weight",)
    rules = [
        qkv(*(f"{hf}{n}.{k}" for n in names), f"{mc}linear_qkv.{k}", bias=k == "bias")
        for k in kinds
    ]
    for name, heads in (("q", "num_heads"), ("k", "num_kv_heads")):
        rule = f"{hf}{name}_norm.weight", f"{mc}{name}_layernorm.weight"
        if norms == "head":
            rules.append(copy(*rule, lambda s: (s.head_dim,)))
        elif norms == "all_heads":
            size = _heads(heads)
            rules.append(copy(*rule, size, parallel_dim=0))
    rules.append(
        copy(
            f"{hf}{output}.weight",
            f"{mc}linear_proj.weight",
            lambda s: (s.hidden_size, s.num_heads * s.head_dim),
            parallel_dim=1,
        )
    )
    if output_bias:
        rules.append(copy(f"{hf}{output}.bias", f"{mc}linear_proj.bias", width))
    return tuple(rules)


def _heads(field: str) -> Callable[[ModelShape], Dims]:
    return lambda s: (getattr(s, field) * s.head_dim,)


def gated_mlp(
    *,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
    fused: str | None = None,
) -> tuple[Rule, ...]:
    """A dense feed-forward block with a gate, in the layers without experts.

    Args:
        gate, up, down: Names of the projections.
        fused: The name of the one projection that has gate and up, in this order.
    """
    names = [fused] if fused else [gate, up]
    return (
        gate_up(
            *(f"{HF_MLP}{name}.weight" for name in names),
            MEGATRON_MLP + "linear_fc1.weight",
            size=lambda s: (s.ffn_size, s.hidden_size),
            layers=dense_layers,
        ),
        copy(
            f"{HF_MLP}{down}.weight",
            MEGATRON_MLP + "linear_fc2.weight",
            lambda s: (s.hidden_size, s.ffn_size),
            parallel_dim=1,
            layers=dense_layers,
        ),
    )


def experts(
    *,
    block: str = "mlp.",
    router: str = "gate",
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> tuple[Rule, ...]:
    """Routed experts with a gate, a tensor each, and their router.

    Args:
        block: What their names begin with, behind the layer's.
        router: Name of the router.
        gate, up, down: Names of an expert's projections.
    """
    expert = f"{HF_LAYER}{block}experts.{{expert}}."
    return (
        copy(
            f"{HF_LAYER}{block}{router}.weight",
            MEGATRON_MLP + "router.weight",
            lambda s: (s.num_experts, s.hidden_size),
            layers=sparse_layers,
        ),
        gate_up(
            f"{expert}{gate}.weight",
            f"{expert}{up}.weight",
            MEGATRON_EXPERT + "linear_fc1.weight",
            size=lambda s: (s.expert_ffn_size, s.hidden_size),
            layers=sparse_layers,
        ),
        copy(
            f"{expert}{down}.weight",
            MEGATRON_EXPERT + "linear_fc2.weight",
            lambda s: (s.hidden_size, s.expert_ffn_size),
            parallel_dim=1,
            layers=sparse_layers,
        ),
    )


def shared_experts(block: str = "mlp.shared_experts.") -> tuple[Rule, ...]:
    """The experts that every token goes to, stored as one block.

    Args:
        block: What their names begin with, behind the layer's.
    """
    hf, mc = HF_LAYER + block, MEGATRON_MLP + "shared_experts."

    def rows(s: ModelShape) -> int:
        return s.shared_experts * s.expert_ffn_size

    return (
        gate_up(
            hf + "gate_proj.weight",
            hf + "up_proj.weight",
            mc + "linear_fc1.weight",
            size=lambda s: (rows(s), s.hidden_size),
            layers=sparse_layers,
        ),
        copy(
            hf + "down_proj.weight",
            mc + "linear_fc2.weight",
            lambda s: (s.hidden_size, rows(s)),
            parallel_dim=1,
            layers=sparse_layers,
        ),
    )


def latent_attention() -> tuple[Rule, ...]:
    """Multi-head latent attention: queries, and keys with values, are compressed and expanded."""
    hf, mc = HF_ATTENTION, MEGATRON_ATTENTION

    def rotated(s: ModelShape) -> int:
        return s.nope_head_dim + s.rope_head_dim

    def both(s: ModelShape) -> int:
        return s.nope_head_dim + s.head_dim

    sizes: tuple[tuple[str, str, Callable[[ModelShape], Dims], int | None], ...] = (
        ("q_a_proj", "linear_q_down_proj", lambda s: (s.query_rank, s.hidden_size), 0),
        ("q_a_layernorm", "q_layernorm", lambda s: (s.query_rank,), None),
        ("q_b_proj", "linear_q_up_proj", lambda s: (s.num_heads * rotated(s), s.query_rank), 0),
        (
            *("kv_a_proj_with_mqa", "linear_kv_down_proj"),
            *(lambda s: (s.key_value_rank + s.rope_head_dim, s.hidden_size), 0),
        ),
        ("kv_a_layernorm", "kv_layernorm", lambda s: (s.key_value_rank,), None),
        ("kv_b_proj", "linear_kv_up_proj", lambda s: (s.num_heads * both(s), s.key_value_rank), 0),
        ("o_proj", "linear_proj", lambda s: (s.hidden_size, s.num_heads * s.head_dim), 1),
    )
    return tuple(
        copy(f"{hf}{source}.weight", f"{mc}{target}.weight", size, parallel_dim=dim)
        for source, target, size, dim in sizes
    )
