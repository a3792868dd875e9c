"""Tensor names of published checkpoints, written out from their naming, and from no weight map.

Of real index files, a copy of Llama-3.1-8B's and one of a Qwen2.5-14B's were checked by hand with
``autodeco plugin check --index``.
"""

from __future__ import annotations

from collections.abc import Iterator

_FP8 = ("", "_scale_inv")


def _layer(number: int, *names: str) -> Iterator[str]:
    yield from (f"model.layers.{number}.{name}" for name in names)


def _ends(*, head: bool = True) -> tuple[str, ...]:
    names = ("model.embed_tokens.weight", "model.norm.weight")
    return (*names, "lm_head.weight") if head else names


def _norms() -> tuple[str, ...]:
    return "input_layernorm.weight", "post_attention_layernorm.weight"


def _mlp(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}_proj.weight" for name in ("gate", "up", "down"))


def _attention(*kinds: str) -> tuple[str, ...]:
    return tuple(f"self_attn.{name}_proj.{kind}" for name in "qkvo" for kind in kinds)


def llama(layers: int) -> list[str]:
    """291 names of Llama-3.1-8B and of Nemotron-Nano-8B."""
    inner = (*_norms(), *_attention("weight"), *_mlp("mlp"))
    return [*_ends(), *(n for i in range(layers) for n in _layer(i, *inner))]


def qwen25(layers: int, *, tied: bool) -> list[str]:
    """339 names of Qwen2.5-7B and of its distillation; 290 of Qwen2.5-0.5B."""
    biases = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
    inner = (*_norms(), *_attention("weight"), *biases, *_mlp("mlp"))
    return [*_ends(head=not tied), *(n for i in range(layers) for n in _layer(i, *inner))]


def qwen3_moe(layers: int, experts: int) -> list[str]:
    """18,867 names of Qwen3-30B-A3B; 36,945 of Qwen3-235B-A22B."""
    inner = [*_norms(), *_attention("weight"), "self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    inner += ["mlp.gate.weight", *(n for e in range(experts) for n in _mlp(f"mlp.experts.{e}"))]
    return [*_ends(), *(n for i in range(layers) for n in _layer(i, *inner))]


def gpt_oss(layers: int) -> list[str]:
    """459 names of gpt-oss-20b; 687 of gpt-oss-120b: experts in MXFP4."""
    inner = [*_norms(), *_attention("weight", "bias"), "self_attn.sinks"]
    inner += ["mlp.router.weight", "mlp.router.bias"]
    for name in ("gate_up_proj", "down_proj"):
        inner += [f"mlp.experts.{name}_{part}" for part in ("blocks", "scales", "bias")]
    return [*_ends(), *(n for i in range(layers) for n in _layer(i, *inner))]


def deepseek_v3(layers: int, dense: int, experts: int) -> list[str]:
    """91,991 names of DeepSeek-V3.1-Terminus: FP8 in blocks, a 62nd layer that predicts further."""
    projections = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    attention = [f"self_attn.{name}.weight{end}" for name in projections for end in _FP8]
    attention += ["self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight"]
    blocks = [f"mlp.experts.{e}" for e in range(experts)] + ["mlp.shared_experts"]
    sparse = ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"]
    sparse += [name + end for block in blocks for name in _mlp(block) for end in _FP8]
    plain = [name + end for name in _mlp("mlp") for end in _FP8]
    further = ["embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight"]
    further += ["shared_head.norm.weight", "shared_head.head.weight"]
    names = [*_ends()]
    for number in range(layers + 1):
        names += _layer(number, *_norms(), *attention, *(plain if number < dense else sparse))
    return [*names, *_layer(layers, *further)]
