"""The sampler: distributions, greedy, entropies, heads, and rows that do not see each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from autodeco.decoding import draw
from autodeco.decoding.draw import draw_tokens
from autodeco.decoding.policy import DecodingPolicy
from autodeco.decoding.sampler import Answer, sample_answers
from autodeco.errors import DataError, NumericsError, UsageError
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.heads.warp import warp

VOCABULARY = 53
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [20, 21, 22, 23, 24, 25, 26]]
GREEDY = DecodingPolicy("greedy", "greedy")
POLICIES = [
    DecodingPolicy("T=1", "static"),
    DecodingPolicy("T=.6 P=.8", "static", temperature=0.6, top_p=0.8),
    DecodingPolicy("k=5 min-p", "static", temperature=1.2, top_k=5, min_p=0.3),
    DecodingPolicy("heads", "heads"),
    DecodingPolicy("heads dial", "heads", temperature_scale=0.7, top_p_scale=0.8),
    GREEDY,
]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def heads() -> DecodingHeads:
    made = DecodingHeads(HeadsConfig(32), torch.Generator().manual_seed(1))
    with torch.no_grad():
        made.temp_head.mlp[2].bias.fill_(-0.2)  # type: ignore[union-attr]
        made.top_p_head.mlp[2].bias.fill_(1.0)  # type: ignore[union-attr]
    return made


def logits_of(model: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [n, d] and logits [n, V] of one sequence alone, without a cache."""
    with torch.no_grad():
        h = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        return h, model.lm_head(h)


def exact(
    policy: DecodingPolicy, heads: DecodingHeads, h: torch.Tensor, z: torch.Tensor
) -> tuple[torch.Tensor, float, float]:
    """Reference distribution [V] of one position, by other code, and the T and P in it."""
    t, p = policy.temperature, policy.top_p
    if policy.kind == "heads":
        predicted = heads.predict(h[None], z[None])
        t = float(predicted[0]) * policy.temperature_scale
        p = float(predicted[1]) * policy.top_p_scale
        return warp(z[None], torch.tensor([t]), torch.tensor([p]))[0].softmax(-1), t, p
    if policy.kind == "greedy":
        return torch.nn.functional.one_hot(z.argmax(), z.shape[-1]).float(), 1.0, 1.0
    steps: list[Any] = [TemperatureLogitsWarper(t)]
    steps += [TopKLogitsWarper(policy.top_k)] if policy.top_k else []
    steps += [TopPLogitsWarper(p)] if p < 1 else []
    steps += [MinPLogitsWarper(policy.min_p)] if policy.min_p else []
    scores = z[None].clone()
    for step in steps:
        scores = step(None, scores)
    return scores[0].softmax(-1), t, p


def entropy_of(p: torch.Tensor) -> float:
    p = p[p > 0].double()
    return float(-(p * p.log()).sum())


def sample(model: Any, heads: DecodingHeads | None, **changes: Any) -> list[Answer]:
    options: dict[str, Any] = {
        "prompts": PROMPTS,
        "policies": POLICIES,
        "samples": 2,
        "max_new_tokens": 12,
        "eos_ids": [],
        "seed": 3,
    }
    options.update(changes)
    return sample_answers(model, heads, **options)


def test_one_step_is_distributed_as_the_reference(model: Any, heads: DecodingHeads) -> None:
    count = 2500
    answers = sample(model, heads, prompts=PROMPTS[:2], samples=count, max_new_tokens=1)
    for number, policy in enumerate(POLICIES):
        for prompt in range(2):
            h, z = logits_of(model, PROMPTS[prompt])
            p, _, _ = exact(policy, heads, h[-1], z[-1])
            drawn = [a.ids[0] for a in answers if (a.prompt, a.policy) == (prompt, number)]
            seen = np.bincount(drawn, minlength=VOCABULARY)
            assert len(drawn) == count
            assert seen[(p == 0).numpy()].sum() == 0
            common = (p * count > 5).numpy()
            if common.sum() < 2:
                continue
            exactly = p.double().numpy()
            expected = np.append(exactly[common], exactly[~common].sum()) * count
            observed = np.append(seen[common], seen[~common].sum())
            keep = expected > 1
            expected = expected[keep] / expected[keep].sum() * observed[keep].sum()
            assert stats.chisquare(observed[keep], expected).pvalue > 1e-4, policy.name


def test_greedy_is_the_greedy_of_generate(model: Any) -> None:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    config = GenerationConfig(do_sample=False, max_new_tokens=10, pad_token_id=0)
    reference = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:]
    answers = sample(model, None, policies=[GREEDY], samples=1, max_new_tokens=10)
    assert [a.ids.tolist() for a in answers] == reference.tolist()
    assert all(a.entropy == 0 and not a.finished for a in answers)


def test_greedy_takes_the_smallest_id_of_equals() -> None:
    z = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0]])
    for width in (5, 5000):
        rows = torch.nn.functional.pad(z, (0, width - 5), value=-1.0)
        one = torch.ones(1)
        token, entropy = draw_tokens(
            rows, one, one, torch.tensor([1]), torch.zeros(1), torch.tensor([0.999])
        )
        assert (token.item(), entropy.item()) == (1, 0.0)


def test_tokens_entropies_and_predictions_of_long_answers(model: Any, heads: DecodingHeads) -> None:
    for answer in sample(model, heads):
        policy = POLICIES[answer.policy]
        prompt = PROMPTS[answer.prompt]
        h, z = logits_of(model, prompt + answer.ids.tolist())
        total = 0.0
        for step, token in enumerate(answer.ids):
            at = len(prompt) - 1 + step
            p, t, top_p = exact(policy, heads, h[at], z[at])
            assert p[token] > 0, "a token outside the nucleus"
            total += entropy_of(p)
            if policy.kind == "heads":
                assert answer.temperature is not None and answer.top_p is not None
                assert answer.temperature[step] == pytest.approx(t, rel=1e-4)
                assert answer.top_p[step] == pytest.approx(top_p, rel=1e-4)
        assert answer.entropy == pytest.approx(total, rel=1e-4, abs=1e-4)
        assert (answer.temperature is None) == (policy.kind != "heads")


def test_rows_do_not_depend_on_their_batch(model: Any, heads: DecodingHeads) -> None:
    options: dict[str, Any] = {"eos_ids": [3, 17, 30, 41], "max_new_tokens": 8, "samples": 1}
    together = sample(model, heads, **options)
    for rows in (1, 5):
        assert_same(together, sample(model, heads, rows_at_once=rows, **options))
    alone = sample(model, heads, prompts=PROMPTS[:1], **options)
    assert_same([a for a in together if a.prompt == 0], alone)


def assert_same(one: list[Answer], other: list[Answer]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert (a.prompt, a.policy, a.sample) == (b.prompt, b.policy, b.sample)
        assert a.ids.tolist() == b.ids.tolist() and a.finished == b.finished
        assert a.entropy == pytest.approx(b.entropy, rel=1e-4, abs=1e-5)


def test_answers_end_with_their_first_end_token(model: Any, heads: DecodingHeads) -> None:
    eos = [3, 17, 30, 41]
    answers = sample(model, heads, eos_ids=eos, samples=8, max_new_tokens=30)
    assert {a.finished for a in answers} == {True, False}
    assert len({len(a.ids) for a in answers}) > 5
    for answer in answers:
        ended = np.isin(answer.ids, eos)
        assert not ended[:-1].any() and ended[-1] == answer.finished
        assert answer.finished or len(answer.ids) == 30
    whole = sample(model, heads, samples=8, max_new_tokens=30)
    for answer, longer in zip(answers, whole, strict=True):
        assert answer.ids.tolist() == longer.ids[: len(answer.ids)].tolist()


def test_the_same_random_numbers_serve_all_policies(model: Any) -> None:
    policies = [DecodingPolicy("a", "static"), DecodingPolicy("b", "static")]
    answers = sample(model, None, policies=policies, samples=4)
    a, b = ([x.ids.tolist() for x in answers if x.policy == n] for n in (0, 1))
    assert a == b
    assert len({tuple(ids) for ids in a}) > 8
    other = sample(model, None, policies=policies[:1], samples=4, seed=4)
    assert [x.ids.tolist() for x in other] != a


def test_progress_and_order(model: Any) -> None:
    calls: list[tuple[int, int]] = []
    answers = sample(
        model,
        None,
        policies=POLICIES[:2],
        rows_at_once=6,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert list(dict.fromkeys(calls)) == [(0, 16), (6, 16), (12, 16), (16, 16)]
    assert len(calls) == 1 + 3 * 13, "after every token, so that a slow batch is seen to live"
    keys = [(a.prompt, a.policy, a.sample) for a in answers]
    assert keys == [(p, q, s) for p in range(4) for q in range(2) for s in range(2)]


def test_sliding_window_attention_and_another_family() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(2)
    config = MistralConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
        initializer_range=0.5,
    )
    sliding = MistralForCausalLM(config).eval()
    for answer in sample(sliding, None, policies=[GREEDY, POLICIES[1]], max_new_tokens=9):
        prompt = PROMPTS[answer.prompt]
        _, z = logits_of(sliding, prompt + answer.ids.tolist())
        if answer.policy == 0:
            at = slice(len(prompt) - 1, -1)
            assert z[at].argmax(-1).tolist() == answer.ids.tolist()


def test_bad_input(model: Any) -> None:
    with pytest.raises(UsageError, match="needs heads"):
        sample(model, None)
    with pytest.raises(DataError, match="no tokens"):
        sample(model, None, policies=[GREEDY], prompts=[[]])
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        sample(model, None, policies=[GREEDY], prompts=[[VOCABULARY]])


def test_logits_that_are_not_finite_are_an_error(model: Any) -> None:
    weight = model.lm_head.weight
    kept = weight[4].clone()
    try:
        with torch.no_grad():
            weight[4] = math.nan
        with pytest.raises(NumericsError):
            sample(model, None, policies=[GREEDY])
    finally:
        with torch.no_grad():
            weight[4] = kept


@pytest.mark.parametrize("rounded", [False, True])
def test_large_vocabularies_are_exact(monkeypatch: pytest.MonkeyPatch, rounded: bool) -> None:
    """The head of the order gives what sorting everything gives, with many ties too."""
    generator = torch.Generator().manual_seed(0)
    m = 200
    z = torch.randn(m, 6000, generator=generator) * torch.linspace(0.1, 5, m)[:, None]
    if rounded:
        z = (z * 4).round() / 4
    options = (
        torch.linspace(0.2, 1.5, m),
        torch.linspace(0.05, 1.0, m).roll(17),
        torch.tensor([0, 0, 3, 2000]).repeat(m // 4),
        torch.tensor([0.0, 0.05, 0.0, 0.0, 0.0]).repeat(m // 5),
        torch.rand(m, generator=generator, dtype=torch.float64),
    )
    token, entropy = draw_tokens(z, *options)
    monkeypatch.setattr(draw, "_SORT_ALL", 10_000)
    all_token, all_entropy = draw_tokens(z, *options)
    assert token.tolist() == all_token.tolist()
    assert torch.allclose(entropy, all_entropy, atol=1e-5)


def test_the_order_is_by_logit_then_smaller_id() -> None:
    z = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)).mul(2).round()
    z[:, 7] = -math.inf
    z[0] = torch.linspace(-1, 1, 300)
    z[1, ::2] = -0.0
    values, ids = draw._descending(z)
    expected = torch.sort(z, dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected.values)
    zero = z == 0  # torch takes -0.0 and 0.0 for equal, and so does the sort
    assert zero.any()
    assert torch.equal(ids, expected.indices)
