"""generate() with heads: what is sampled, when the heads choose, and what leaves no trace."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import HIDDEN, VOCABULARY, save_tiny, save_tiny_heads, tiny_heads, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, TextIteratorStreamer

import autodeco.decoding
from autodeco.decoding.policy import SAMPLING_PARAMETERS
from autodeco.errors import UsageError, WeightsError
from autodeco.heads.files import load_heads
from autodeco.heads.merge import merge
from autodeco.heads.modules import DecodingHeads, HeadsConfig

Model = autodeco.decoding.AutoDecoModelForCausalLM
IDS = torch.arange(5, 25).view(2, 10)
NON_NEUTRAL = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small matrices gain nothing from a second thread, and wait for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decoding")
    base = save_tiny(
        tiny_model(), root / "base", "20KB", {"do_sample": True, "temperature": 0.6, "top_k": 20}
    )
    heads = save_tiny_heads(root / "heads", base)
    merged = {n: merge(base, heads, root / n, layout=n).path for n in ("native", "autodeco")}
    return {"base": base, "heads": heads, **merged}


@pytest.fixture(scope="module")
def base(places: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(places["base"])


@pytest.fixture(scope="module")
def model(places: dict[str, Path]) -> Any:
    return Model.from_pretrained(places["native"])


def reference(model: Any, base: Any, ids: torch.Tensor) -> tuple[np.ndarray, ...]:
    """T, P and the sampling distribution of each position, by other means, in float64."""
    with torch.no_grad():
        out = base(ids, output_hidden_states=True)
    h, z = out.hidden_states[-1].double().numpy(), out.logits.double().numpy()
    state = {n: t.double().numpy() for n, t in model.autodeco_heads.state_dict().items()}

    def head(name: str, x: np.ndarray) -> np.ndarray:
        hidden = x @ state[f"{name}.mlp.0.weight"].T + state[f"{name}.mlp.0.bias"]
        y = np.maximum(hidden, 0) @ state[f"{name}.mlp.2.weight"].T + state[f"{name}.mlp.2.bias"]
        return 1 / (1 + np.exp(-y))

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    t = 2 * head("temp_head", h)
    p = softmax(z / t)
    down = -np.sort(-p, axis=-1)
    features = np.stack(
        [
            down[..., 0],
            -(p * np.log(p + 1e-300)).sum(-1),
            p.var(-1, ddof=1),
            down[..., :5].sum(-1),
        ],
        -1,
    )
    top_p = head("top_p_head", np.concatenate([h, t, features], -1))
    order = np.argsort(-z, axis=-1, kind="stable")
    ranked = np.take_along_axis(p, order, -1)
    inside = ranked.cumsum(-1) - ranked < top_p
    inside[..., 0] = True
    allowed = np.zeros_like(inside)
    np.put_along_axis(allowed, order, inside, -1)
    kept = np.where(allowed, p, 0)
    return t[..., 0], top_p[..., 0], kept / kept.sum(-1, keepdims=True)


def test_ten_thousand_tokens_stay_in_the_nucleus(model: Any, base: Any) -> None:
    torch.manual_seed(0)
    prompts = torch.randint(4, VOCABULARY, (100, 5))
    out = model.generate(prompts, max_new_tokens=100, return_autodeco=True)
    assert out.sequences.shape == (100, 105)
    t, p, q = reference(model, base, out.sequences)
    new = out.sequences[:, 5:].numpy()
    chosen = np.take_along_axis(q[:, 4:-1], new[..., None], -1)[..., 0]
    assert chosen.size == 10_000
    # A token exactly at the edge may differ between float32 and float64: none did.
    assert (chosen > 0).all()
    np.testing.assert_allclose(out.temperature.numpy(), t[:, 4:-1], atol=1e-4)
    np.testing.assert_allclose(out.top_p.numpy(), p[:, 4:-1], atol=1e-4)
    assert out.temperature.std() > 0.05 and out.top_p.std() > 0.05  # the test means something
    assert ((q > 0).sum(-1) > 1).mean() > 0.3


def test_one_step_has_the_predicted_distribution(model: Any, base: Any) -> None:
    torch.manual_seed(1)
    prompt = IDS[:1]
    _, _, q = reference(model, base, prompt)
    expected = q[0, -1]
    assert (expected > 0).sum() >= 4
    out = model.generate(prompt.expand(20_000, -1), max_new_tokens=1)
    seen = np.bincount(out[:, -1].numpy(), minlength=VOCABULARY)
    assert seen[expected == 0].sum() == 0
    live = expected * 20_000 >= 5
    pooled_seen = np.append(seen[live], seen[~live].sum())
    pooled = np.append(expected[live], expected[~live].sum()) * 20_000
    keep = pooled > 0
    assert stats.chisquare(pooled_seen[keep], pooled[keep]).pvalue > 1e-3


def test_auto_class_knows_the_autodeco_layout(places: dict[str, Path]) -> None:
    assert isinstance(AutoModelForCausalLM.from_pretrained(places["autodeco"]), Model)
    assert not isinstance(AutoModelForCausalLM.from_pretrained(places["native"]), Model)


def test_left_padding_changes_nothing(model: Any) -> None:
    short, long = IDS[:1, :6], IDS[1:, :]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    # A nucleus of one token makes sampling deterministic, whatever the random state.
    settings: dict[str, Any] = {"max_new_tokens": 12, "return_autodeco": True, "top_p_scale": 1e-6}
    both = model.generate(torch.cat([padded, long]), attention_mask=mask, **settings)
    for row, alone in enumerate((short, long)):
        one = model.generate(alone, **settings)
        assert torch.equal(both.sequences[row, 10:], one.sequences[0, alone.shape[1] :])
        torch.testing.assert_close(both.temperature[row], one.temperature[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"cache_implementation": "static"}, {"use_cache": False}, {"prefill_chunk_size": 4}],
)
def test_caches_agree(model: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(2)
    a = model.generate(IDS, max_new_tokens=10, return_autodeco=True)
    torch.manual_seed(2)
    b = model.generate(IDS, max_new_tokens=10, return_autodeco=True, **settings)
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(a.top_p, b.top_p, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["prompt lookup", "assistant", "assistant with heads"])
def test_assisted_decoding(model: Any, base: Any, how: str) -> None:
    torch.manual_seed(3)
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    extra: dict[str, Any] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": base},
        "assistant with heads": {"assistant_model": model},
    }[how]
    for _ in range(5):
        out = model.generate(prompt, max_new_tokens=30, return_autodeco=True, **extra)
        t, _, q = reference(model, base, out.sequences)
        new = out.sequences[:, 10:].numpy()
        assert (np.take_along_axis(q[:, 9:-1], new[..., None], -1) > 0).all()
        np.testing.assert_allclose(out.temperature.numpy(), t[:, 9:-1], atol=1e-4)


@pytest.mark.parametrize("where", ["call", "generation_config"])
@pytest.mark.parametrize("name", SAMPLING_PARAMETERS)
def test_the_one_rule(model: Any, base: Any, name: str, where: str) -> None:
    def run(target: Any, values: dict[str, Any], **extra: Any) -> torch.Tensor:
        torch.manual_seed(4)
        common = {"max_new_tokens": 12, "do_sample": True}
        if where == "call":
            return target.generate(IDS, **common, **values, **extra)
        return target.generate(IDS, GenerationConfig(**common, **values), **extra)

    value = {name: NON_NEUTRAL[name]}
    stock = copy.deepcopy(base)
    stock.generation_config = copy.deepcopy(model.generation_config)
    assert torch.equal(run(model, value), run(stock, value))
    with pytest.raises(UsageError, match=f"{name}={NON_NEUTRAL[name]}"):
        run(model, value, return_autodeco=True)
    assert torch.equal(run(model, {name: NEUTRAL[name]}), run(model, {}))
    assert not torch.equal(run(model, {}), run(stock, {}))


def test_autodeco_false_is_the_stock_model(model: Any, base: Any) -> None:
    stock = copy.deepcopy(base)
    stock.generation_config = copy.deepcopy(model.generation_config)
    torch.manual_seed(5)
    a = model.generate(IDS, max_new_tokens=12, autodeco=False)
    torch.manual_seed(5)
    assert torch.equal(a, stock.generate(IDS, max_new_tokens=12))


def test_vendor_defaults_do_not_cut(places: dict[str, Path]) -> None:
    """The vendor's temperature and top_k = 20, and transformers' own top_k = 50, stay out."""
    model = Model.from_pretrained(places["base"], heads=places["heads"])
    with torch.no_grad():
        for head in (model.autodeco_heads.temp_head, model.autodeco_heads.top_p_head):
            head.mlp[2].weight.zero_()
            head.mlp[2].bias.fill_(40.0)  # T = 2, P = 1
    out = model.generate(IDS[:1].expand(4000, -1), max_new_tokens=1, temperature_scale=50.0)
    assert len(set(out[:, -1].tolist())) > 90


def test_dial(model: Any) -> None:
    plain = model(IDS, return_autodeco=True)
    turned = model(IDS, return_autodeco=True, temperature_scale=0.5, top_p_scale=3.0)
    assert torch.equal(plain.logits, turned.logits)
    torch.testing.assert_close(turned.temperature, plain.temperature * 0.5)
    torch.testing.assert_close(turned.top_p, (plain.top_p * 3.0).clamp_max(1.0))
    assert (turned.top_p == 1).any()
    for bad in (0, -1, float("nan"), float("inf"), "2"):
        with pytest.raises(UsageError, match="temperature_scale"):
            model.generate(IDS, max_new_tokens=1, temperature_scale=bad)


def test_dial_stored_with_the_heads_is_the_default(places: dict[str, Path]) -> None:
    model = Model.from_pretrained(places["native"])
    model.autodeco_metadata = {**model.autodeco_metadata, "temperature_scale": 0.5}
    a = model(IDS, return_autodeco=True).temperature
    b = model(IDS, return_autodeco=True, temperature_scale=1.0).temperature
    torch.testing.assert_close(a, b * 0.5)


def test_warp_in_forward(model: Any, base: Any) -> None:
    out = model(IDS, autodeco_warp=True)
    _, _, q = reference(model, base, IDS)
    np.testing.assert_allclose(out.logits.detach().softmax(-1).numpy(), q, atol=1e-5)
    assert out.logits.dtype == torch.float32
    assert isinstance(model(IDS, autodeco_warp=True, return_dict=False), tuple)
    loss = model(IDS, labels=IDS, autodeco_warp=True).loss
    assert torch.equal(loss, base(IDS, labels=IDS).loss)


def test_heads_run_only_when_asked(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.from_pretrained(places["native"])

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the heads ran")

    monkeypatch.setattr(DecodingHeads, "predict", never)
    model(IDS)
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    model.generate(IDS, max_new_tokens=3, temperature=0.5)
    with pytest.raises(AssertionError, match="the heads ran"):
        model.generate(IDS, max_new_tokens=3)


def test_heads_stay_float32_in_a_bfloat16_model(places: dict[str, Path]) -> None:
    model = Model.from_pretrained(places["native"], dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.autodeco_heads.parameters()} == {torch.float32}
    out = model(IDS, autodeco_warp=True)
    assert out.temperature.dtype == out.logits.dtype == torch.float32


def test_threads_do_not_meet(model: Any) -> None:
    def call(scale: float | None) -> Any:
        if scale is None:
            return model.generate(IDS, max_new_tokens=20, do_sample=False), None
        settings = {"temperature_scale": scale, "top_p_scale": 1e-6}
        out = model.generate(IDS, max_new_tokens=20, return_autodeco=True, **settings)
        return out.sequences, out.temperature

    dials = (0.25, 1.0, 3.0, None)
    serial = {scale: call(scale) for scale in dials}
    results: dict[Any, list[Any]] = {scale: [] for scale in dials}
    start = threading.Barrier(len(dials))

    def work(scale: float | None) -> None:
        start.wait()
        for _ in range(4):
            results[scale].append(call(scale))

    threads = [threading.Thread(target=work, args=(scale,)) for scale in dials]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scale in dials:
        assert len(results[scale]) == 4
        for sequences, temperature in results[scale]:
            assert torch.equal(sequences, serial[scale][0])
            assert temperature is None or torch.equal(temperature, serial[scale][1])


class _Words:
    """As much of a tokenizer as a streamer needs."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"{int(i)} " for i in ids)


def test_streaming(model: Any) -> None:
    torch.manual_seed(6)
    plain = model.generate(IDS[:1], max_new_tokens=15)[0, 10:]
    torch.manual_seed(6)
    streamer = TextIteratorStreamer(_Words(), skip_prompt=True)  # type: ignore[arg-type]
    settings = {"max_new_tokens": 15, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(IDS[:1],), kwargs=settings)
    thread.start()
    words = "".join(streamer).split()
    thread.join()
    assert [int(w) for w in words] == plain.tolist()


def test_end_of_sequence_and_several_sequences(places: dict[str, Path]) -> None:
    model = Model.from_pretrained(places["native"])
    model.generation_config.eos_token_id = list(range(4, 40))
    torch.manual_seed(8)
    out = model.generate(IDS, max_new_tokens=30, num_return_sequences=3, return_autodeco=True)
    assert out.sequences.shape[0] == out.temperature.shape[0] == 6
    assert out.temperature.shape[1] == out.sequences.shape[1] - 10 < 30


def test_bug_a_minimum_length_ruled_out_the_whole_nucleus(places: dict[str, Path]) -> None:
    model = Model.from_pretrained(places["native"])
    first = int(model.generate(IDS[:1], max_new_tokens=1, top_p_scale=1e-6)[0, -1])
    model.generation_config.eos_token_id = first  # the one token of the first nucleus
    settings: dict[str, Any] = {"max_new_tokens": 6, "top_p_scale": 1e-6}
    assert model.generate(IDS[:1], **settings).shape[1] == 11
    out = model.generate(IDS[:1], min_new_tokens=6, **settings)
    assert out.shape[1] == 16 and first not in out[0, 10:].tolist()


def test_what_is_refused(model: Any, tmp_path: Path) -> None:
    cases: list[tuple[str, Any]] = [
        ("beam", lambda: model.generate(IDS, num_beams=2)),
        ("guidance", lambda: model.generate(IDS, guidance_scale=2.0)),
        ("continuous", lambda: model.generate(IDS, cache_implementation="paged")),
        ("continuous", lambda: model.generate_batch([[1, 2]])),
        ("saved", lambda: model.save_pretrained(tmp_path)),
        ("heads are off", lambda: model.generate(IDS, autodeco=False, return_autodeco=True)),
    ]
    for message, call in cases:
        with pytest.raises(UsageError, match=message):
            call()
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(IDS, temperatur_scale=1.0)


def test_heads_that_do_not_fit(places: dict[str, Path], base: Any, tmp_path: Path) -> None:
    from autodeco.heads.files import save_heads

    wide = save_heads(tmp_path / "h", DecodingHeads(HeadsConfig(2 * HIDDEN)), metadata={})
    with pytest.raises(WeightsError, match="the heads read 64 numbers, the model gives 32"):
        Model.from_pretrained(places["base"], heads=wide)
    with pytest.raises(WeightsError, match="no heads"):
        Model.from_pretrained(places["base"])
    assert set(load_heads(places["native"]).heads.state_dict()) == set(tiny_heads().state_dict())
