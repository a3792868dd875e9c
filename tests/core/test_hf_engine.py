"""The hf engine: transformers' own hidden states, frozen, and no sample sees another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import HIDDEN, VOCABULARY, save_tiny, tiny_model
from training_tools import tiny_job

from autodeco.engines.base import HiddenBatch, TokenBatch
from autodeco.engines.hf import HFEngine
from autodeco.errors import NumericsError, WeightsError
from autodeco.heads.modules import DecodingHeads, HeadsConfig
from autodeco.heads.objective import OBJECTIVES, objective_sums
from autodeco.training.batching import microbatches, pack
from autodeco.training.data import Sample, SampleSet
from autodeco.training.loop import train

CPU = torch.device("cpu")
LENGTHS = (3, 17, 9, 2, 30, 9)


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_model(family), tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def engine(path: Path) -> HFEngine:
    return HFEngine(path, CPU, torch.float32)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return save_tiny(tiny_model(), tmp_path / "dense")


def samples_of(*lengths: int, seed: int = 0) -> list[Sample]:
    draws = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        predict = np.zeros(length, dtype=np.bool_)
        predict[length // 3 : -1] = True
        ids = draws.integers(0, VOCABULARY, length).astype(np.int32)
        made.append(Sample(7 * number, ids, predict, number + 1))
    return made


def states(engine: HFEngine, *batches: TokenBatch) -> HiddenBatch:
    """The hidden states of all batches, joined."""
    found = list(engine.hidden_states(batches))
    assert len(found) == len(batches) and None not in found
    names = ("h", "label", "sample_id", "token_index")
    return HiddenBatch(*(torch.cat([getattr(part, name) for part in found]) for name in names))


def by_key(hidden: HiddenBatch) -> dict[tuple[int, int], torch.Tensor]:
    keys = zip(hidden.sample_id.tolist(), hidden.token_index.tolist(), strict=True)
    return dict(zip(keys, hidden.h, strict=True))


def close(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> float:
    assert one.keys() == other.keys() and one
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def test_states_times_output_weight_are_the_logits_of_transformers(
    engine: HFEngine, path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    samples = samples_of(*LENGTHS)
    found = by_key(states(engine, *microbatches(samples, 40)))
    weight, compared = engine.output_weight().weight, 0
    for sample in samples:
        with torch.no_grad():
            logits = reference(torch.from_numpy(sample.ids.astype(np.int64))[None]).logits[0]
        for position in sample.predict.nonzero()[0].tolist():
            made = weight @ found[sample.id, position]
            assert float((made - logits[position]).abs().max()) < 1e-5
            compared += 1
    assert compared == len(found) and float(logits.std()) > 0.3  # the logits are no constant


def test_labels_keys_and_order_are_those_of_the_batch(engine: HFEngine) -> None:
    samples = samples_of(*LENGTHS)
    batches = [pack(samples[4:]), pack(samples[:1]), pack(samples[1:4])]
    hidden = states(engine, *batches)
    expected = [
        (sample.id, position, int(sample.ids[position + 1]))
        for sample in [*samples[4:], *samples[:1], *samples[1:4]]
        for position in sample.predict.nonzero()[0].tolist()
    ]
    columns = (hidden.sample_id, hidden.token_index, hidden.label)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == expected
    assert hidden.h.shape == (len(expected), HIDDEN) and hidden.h.dtype == torch.float32
    assert all(column.dtype == torch.int64 for column in columns)


def test_no_sample_sees_another(engine: HFEngine) -> None:
    samples = samples_of(12, 7, 19, 12)
    before = by_key(states(engine, pack(samples)))
    for changed in range(4):
        other = samples_of(12, 7, 19, 12, seed=9)[changed]
        mixed = [other if i == changed else sample for i, sample in enumerate(samples)]
        after = by_key(states(engine, pack(mixed)))
        rest = {key for key in before if key[0] != samples[changed].id}
        assert close({k: before[k] for k in rest}, {k: after[k] for k in rest}) <= 1e-6
        own = before.keys() - rest
        assert min(float((before[k] - after[k]).abs().max()) for k in own) > 1e-2


def test_no_token_sees_a_later_one(engine: HFEngine) -> None:
    (sample,) = samples_of(20)
    changed = sample.ids.copy()
    changed[12:] = (changed[12:] + 1) % VOCABULARY
    before = by_key(states(engine, pack([sample])))
    after = by_key(states(engine, pack([Sample(0, changed, sample.predict, 1)])))
    early = {key for key in before if key[1] < 12}
    assert close({k: before[k] for k in early}, {k: after[k] for k in early}) <= 1e-6
    assert float((before[0, 12] - after[0, 12]).abs().max()) > 1e-2


def test_states_do_not_depend_on_how_samples_are_batched(engine: HFEngine) -> None:
    samples = samples_of(*LENGTHS)
    alone = by_key(states(engine, *(pack([sample]) for sample in samples)))
    for limit in (1, 30, 60, 1000):
        assert close(alone, by_key(states(engine, *microbatches(samples, limit)))) < 2e-5
    assert close(alone, by_key(states(engine, pack(samples[::-1])))) < 2e-5


def test_positions_count_from_the_begin_of_each_sample(engine: HFEngine) -> None:
    """The same text twice in a batch has the same states, wherever it lies."""
    first, middle = samples_of(11, 25)
    twin = Sample(99, first.ids, first.predict, 9)
    found = by_key(states(engine, pack([first, middle, twin])))
    own = {key[1]: h for key, h in found.items() if key[0] == first.id}
    other = {key[1]: h for key, h in found.items() if key[0] == 99}
    assert close(own, other) < 1e-6
    assert float((own[5] - own[6]).abs().max()) > 1e-2


@pytest.mark.parametrize("limit", [64, 512])
def test_little_is_padded(engine: HFEngine, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(1).integers(4, 60, 100).tolist()
    samples = samples_of(*lengths)
    ran: list[torch.Size] = []
    decoder = engine.model.get_decoder()
    forward = decoder.forward
    monkeypatch.setattr(
        decoder,
        "forward",
        lambda input_ids, **k: ran.append(input_ids.shape) or forward(input_ids, **k),
    )
    states(engine, *microbatches(samples, limit))
    slots = sum(shape.numel() for shape in ran)
    assert sum(lengths) <= slots < 1.15 * sum(lengths)
    assert all(shape.numel() <= limit for shape in ran)


def test_only_the_decoder_runs(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits: neither the output layer nor a cache is touched."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the output layer ran")

    monkeypatch.setattr(engine.model.get_output_embeddings(), "forward", refuse)
    assert len(states(engine, pack(samples_of(8))).h)


def test_a_batch_without_a_predicting_token_gives_no_states(engine: HFEngine) -> None:
    sample = Sample(1, np.array([1, 2, 3], dtype=np.int32), np.zeros(3, dtype=np.bool_), 1)
    (hidden,) = engine.hidden_states([pack([sample])])
    assert hidden is not None and hidden.h.shape == (0, HIDDEN) and hidden.label.shape == (0,)


def test_batches_are_taken_one_at_a_time(engine: HFEngine) -> None:
    taken: list[int] = []

    def batches() -> Any:
        for number in range(3):
            taken.append(number)
            yield pack(samples_of(4))

    found = engine.hidden_states(batches())
    next(found)
    assert taken == [0]


def test_sizes_and_output_weight(engine: HFEngine) -> None:
    output = engine.output_weight()
    assert (engine.name, engine.hidden_size, engine.vocab_size) == ("hf", HIDDEN, VOCABULARY)
    assert output.weight.shape == (VOCABULARY, HIDDEN) and not output.weight.requires_grad
    assert (output.first_token, output.vocab_size) == (0, VOCABULARY)


def test_no_gradient_enters_the_backbone(engine: HFEngine) -> None:
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())
    assert not any(module.training for module in engine.model.modules())
    hidden = states(engine, *microbatches(samples_of(*LENGTHS), 64))
    assert not hidden.h.requires_grad
    heads = DecodingHeads(HeadsConfig(HIDDEN), torch.Generator().manual_seed(0))
    objective = OBJECTIVES["nll"]
    output = engine.output_weight()
    objective_sums(heads, hidden, output, objective, seed=0, epoch=0, backward=True, drop=0.0)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    moved = [p for p in heads.parameters() if p.grad is not None and bool(p.grad.any())]
    assert moved


def test_training_leaves_the_fingerprint_as_it_was(dense: Path, tmp_path: Path) -> None:
    engine = HFEngine(dense, CPU, torch.float32)
    before = engine.fingerprint()
    heads = DecodingHeads(HeadsConfig(HIDDEN), torch.Generator().manual_seed(0))
    start = {name: value.clone() for name, value in heads.state_dict().items()}
    samples = SampleSet(tuple(samples_of(*LENGTHS)), {}, Path("x.jsonl"))
    train(tiny_job(), engine, heads, samples, samples, tmp_path / "run", "tiny", digest="0")
    assert any(not torch.equal(start[k], v) for k, v in heads.state_dict().items())
    assert engine.fingerprint() == before


def test_the_fingerprint_is_of_names_dtypes_and_bytes(dense: Path, tmp_path: Path) -> None:
    engine = HFEngine(dense, CPU, torch.float32)
    whole = engine.fingerprint()
    assert HFEngine(dense, CPU, torch.float32).fingerprint() == whole and len(whole) == 64
    found = {whole, HFEngine(dense, CPU, torch.bfloat16).fingerprint()}
    for name, parameter in engine.model.named_parameters():
        flat = parameter.data.view(-1).view(torch.int32)
        flat[-1] ^= 1  # the smallest change that there is
        found.add(engine.fingerprint())
        flat[-1] ^= 1
        assert engine.fingerprint() == whole, name
    assert len(found) == 2 + len(dict(engine.model.named_parameters()))


def test_bfloat16(path: Path, engine: HFEngine) -> None:
    half = HFEngine(path, CPU, torch.bfloat16)
    assert half.dtype == half.output_weight().weight.dtype == torch.bfloat16
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    samples = samples_of(*LENGTHS)
    rough, exact = (states(e, *microbatches(samples, 64)) for e in (half, engine))
    assert rough.h.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(rough.h.float(), exact.h, dim=-1)
    assert float(cosine.median()) > 0.99 and not torch.equal(rough.h.float(), exact.h)


def test_tied_embeddings_are_the_output_weight(tmp_path: Path) -> None:
    path = save_tiny(tiny_model(tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    engine = HFEngine(path, CPU, torch.float32)
    stored = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(engine.output_weight().weight, stored)


def changed(path: Path, change: Any) -> Path:
    """Changes the tensors of a checkpoint."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_named(dense: Path, name: str, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, 5] = value

    with pytest.raises(NumericsError) as caught:
        HFEngine(changed(dense, spoil), CPU, torch.float32)
    assert repr(name) in caught.value.what and caught.value.where == str(dense) and caught.value.fix


def test_a_weight_that_overflows_in_float16_is_named(dense: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = 1e6

    changed(dense, enlarge)
    assert HFEngine(dense, CPU, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(NumericsError, match=name):
        HFEngine(dense, CPU, torch.float16)


def test_a_hidden_state_that_is_not_finite_names_sample_and_token(dense: Path) -> None:
    engine = HFEngine(dense, CPU, torch.float32)

    def overflow(_: Any, __: Any, output: Any) -> None:
        output.last_hidden_state[-1, 3, 0] = float("inf")

    first, second = samples_of(9, 6)
    assert len(list(engine.hidden_states([pack([first, second])]))) == 1
    engine.model.get_decoder().register_forward_hook(overflow)
    with pytest.raises(NumericsError) as caught:
        list(engine.hidden_states([pack([first, second])]))
    assert caught.value.where == "sample 7, token 3" and "--dtype" in str(caught.value.fix)


def test_a_missing_weight_is_not_made_up(dense: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(WeightsError, match="missing keys: " + name) as caught:
        HFEngine(changed(dense, lambda t: t.pop(name)), CPU, torch.float32)
    assert caught.value.where == str(dense) and caught.value.fix


def test_a_weight_too_many_or_of_another_shape_is_an_error(dense: Path) -> None:
    changed(dense, lambda t: t.update(extra=torch.zeros(2)))
    with pytest.raises(WeightsError, match="unexpected keys: extra"):
        HFEngine(dense, CPU, torch.float32)
    changed(dense, lambda t: t.pop("extra"))
    changed(dense, lambda t: t.update({"model.norm.weight": torch.ones(HIDDEN + 1)}))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight|mismatched"):
        HFEngine(dense, CPU, torch.float32)


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_a_truncated_checkpoint_is_an_error_with_its_path(dense: Path, keep: int) -> None:
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="header") as caught:
        HFEngine(dense, CPU, torch.float32)
    assert caught.value.where == str(file) and caught.value.fix


def test_what_is_no_checkpoint_is_an_error(tmp_path: Path, dense: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(WeightsError, match=r"model\.safetensors.* is there"):
            HFEngine(path, CPU, torch.float32)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    with pytest.raises(WeightsError, match="nonsense"):
        HFEngine(dense, CPU, torch.float32)


def test_an_output_layer_with_a_bias_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.PhiConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.PhiForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="one with a bias"):
        HFEngine(tmp_path, CPU, torch.float32)


def test_bug_scaled_logits_went_unseen(tmp_path: Path) -> None:
    """The objective would have trained heads for logits that the model does not give."""
    import transformers

    config = transformers.CohereConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logit_scale=0.0625,
    )
    transformers.CohereForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="scales or caps its logits"):
        HFEngine(tmp_path, CPU, torch.float32)
