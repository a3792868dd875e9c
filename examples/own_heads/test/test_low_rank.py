"""The plain heads give what the trained ones give."""

import pytest
import torch
from autodeco_plugin_low_rank.heads import LowRankHeads


@pytest.mark.parametrize("kind", ["both", "temperature", "top-p"])
def test_plain_heads_give_the_same(kind: str) -> None:
    heads = LowRankHeads(160, kind, True, seed=3)
    generator = torch.Generator().manual_seed(1)
    h, logits = torch.randn(9, 160, generator=generator), torch.randn(9, 30, generator=generator)
    ours, plain = heads.predict(h, logits), heads.plain().predict(h, logits)
    for a, b, made in zip(ours, plain, (heads.temp_head, heads.top_p_head), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
        assert (a.std() > 0) == (made is not None)
    count = sum(p.numel() for p in heads.parameters())
    assert count < sum(p.numel() for p in heads.plain().parameters()) / 2
