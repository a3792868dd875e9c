"""The core attention against the formula, written plainly in float64."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from attention_tools import core_attention

from autodeco.engines.megatron import attention
from autodeco.engines.megatron.attention import Microbatch
from autodeco.engines.megatron.rotary import rotary_of, rotate
from autodeco.errors import WeightsError


def plain(q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
    """[s, heads, width] of one sequence, every score kept."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qhw,khw->hqk", q, k) / q.shape[-1] ** 0.5
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))
    hidden = (back < 0) | (back > (len(q) if window is None else window))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, sink), -1)
    share = scores.softmax(-1)[..., : len(q)]
    return torch.einsum("hqk,khw->qhw", share, v)


@pytest.mark.parametrize("block", [7, 256])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 0, 5, 100])
def test_packed_and_padded_attention_are_the_formula(
    monkeypatch: pytest.MonkeyPatch, window: int | None, sinks: bool, block: int
) -> None:
    monkeypatch.setattr(attention, "_BLOCK", block)
    torch.manual_seed(0)
    module = core_attention(window=window, sinks=sinks)
    lengths, longest = (23, 1, 40), 40
    bounds = (0, 23, 24, 64)
    q, k, v = (torch.randn(64, 1, heads, 64) for heads in (8, 2, 2))
    module.microbatch = Microbatch(bounds=bounds)
    packed = module(q, k, v).view(64, 8, 64)
    rows = [torch.zeros(longest, len(lengths), t.shape[2], 64) for t in (q, k, v)]
    for n, (a, b) in enumerate(pairwise(bounds)):
        for row, t in zip(rows, (q, k, v), strict=True):
            row[: b - a, n] = t[a:b, 0]
    module.microbatch = Microbatch()
    padded = module(*rows).view(longest, len(lengths), 8, 64)
    for n, (a, b) in enumerate(pairwise(bounds)):
        parts = (t[a:b, 0] for t in (q, k, v))
        expected = plain(*parts, window, module.softmax_offset)
        assert (packed[a:b] - expected).abs().max() < 1e-5
        assert (padded[: b - a, n] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("what", ["window", "sinks"])
def test_what_context_parallelism_is_not_proven_for_is_refused(what: str) -> None:
    module = core_attention(window=5 if what == "window" else None, sinks=what == "sinks")
    module.config.context_parallel_size = 2
    with pytest.raises(ValueError, match="context_parallel_size=2"):
        attention.SdpaCoreAttention(
            module.config, 1, pg_collection=type("Groups", (), {"cp": object()})
        )


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1.5e5,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("kind", sorted(ROPES))
def test_rotated_queries_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters=ROPES[kind],
    )
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    torch.manual_seed(0)
    x = torch.randn(500, 1, 4, 32)
    positions = torch.randperm(500)
    ours = rotate(x, *rotary_of(stored, "here").tables(positions, x.dtype, x.device))
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    theirs, _ = apply_rotary_pos_emb(x.permute(1, 2, 0, 3), x.permute(1, 2, 0, 3), cos, sin)
    assert (ours.permute(1, 2, 0, 3) - theirs).abs().max() < 1e-5


def test_a_scaled_embedding_in_the_older_form_of_a_config_is_the_same() -> None:
    config = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "head_dim": 32}
    config |= {"max_position_embeddings": 2048}
    now = {**config, "rope_parameters": ROPES["llama3"]}
    scaling = {k: v for k, v in ROPES["llama3"].items() if k != "rope_theta"}
    older = {**config, "rope_theta": 5e5, "rope_scaling": scaling}
    plain = {**config, "rope_theta": 5e5}
    new, old = rotary_of(now, "here"), rotary_of(older, "here")
    assert torch.equal(new.frequencies, old.frequencies) and new.scale == old.scale
    assert not torch.equal(new.frequencies, rotary_of(plain, "here").frequencies)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden_size": 8, "num_attention_heads": 2}, "no rope_theta"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            "llama3",
        ),
        ({"rope_parameters": {**ROPES["yarn"]}}, "model_type"),
    ],
)
def test_a_config_without_what_its_embedding_needs_is_refused(config: object, said: str) -> None:
    assert isinstance(config, dict)
    with pytest.raises(WeightsError, match=said):
        rotary_of(config, "here")


def test_an_unknown_rotary_embedding_is_refused_by_its_name() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(WeightsError, match="'dynamic' is not done by the megatron engine"):
        rotary_of({"rope_parameters": rope}, "here")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("sinks", [False, True])
def test_packed_flash_attention_is_the_plain_one(window: int | None, sinks: bool) -> None:
    torch.manual_seed(0)
    bounds = (0, 300, 301, 420)
    q, k, v = (torch.randn(420, 1, heads, 64, device="cuda") for heads in (8, 2, 2))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        module = core_attention(window=window, sinks=sinks, dtype=dtype).cuda()
        starts = torch.tensor(bounds, dtype=torch.int32, device="cuda")
        module.microbatch = Microbatch(None, None, bounds, starts)
        results.append(module(*(t.to(dtype) for t in (q, k, v))).float())
    assert (results[0] - results[1]).norm() / results[0].norm() < 2e-2
