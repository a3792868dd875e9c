"""Targets in a checkpoint of NeMo or megatron-core, found by their keys; no model is built."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_dist_made import write

from autodeco.convert.backbones import KeyedBackbone
from autodeco.convert.export_plan import plan_export
from autodeco.convert.stored import Piece
from autodeco.errors import WeightsError
from autodeco.family import ModelShape
from autodeco.weights import BoundWeightMap, WeightMap, copy, tied

SHAPE = ModelShape(
    num_layers=3, hidden_size=4, num_heads=1, num_kv_heads=1, head_dim=4, ffn_size=8,
    vocab_size=10, tied_embeddings=True,
)  # fmt: skip
MAP = WeightMap(
    (
        tied(
            "embed.weight",
            "embedding.word_embeddings.weight",
            ("output_layer.weight",),
            lambda s: (s.vocab_size, s.hidden_size),
        ),
        copy("layers.{layer}.w", "decoder.layers.{layer}.w", lambda s: (s.hidden_size, 2)),
    )
)
EMBEDDING, OUTPUT = "module.embedding.word_embeddings.weight", "module.output_layer.weight"
DRAWN = torch.Generator().manual_seed(5)
WORDS = torch.randn(10, 4, generator=DRAWN).bfloat16()
LAYERS = torch.randn(3, 4, 2, generator=DRAWN).bfloat16()
STACKED = {EMBEDDING: WORDS, "module.decoder.layers.w": LAYERS}
APART = {EMBEDDING: WORDS, **{f"module.decoder.layers.{n}.w": LAYERS[n] for n in range(3)}}


def bound() -> BoundWeightMap:
    return BoundWeightMap(SHAPE, MAP.expand(SHAPE))


def pieces(stacked: bool = True) -> list[Piece]:
    """What `stored_layout` gives for a model whose layers are alike, or not."""
    target = "embedding.word_embeddings.weight"
    found = [Piece(target, 0, (10, 4), EMBEDDING, (OUTPUT,), (10, 4), (0, 0))]
    for n in range(3):
        target, key = f"decoder.layers.{n}.w", f"module.decoder.layers.{n}.w"
        if stacked:
            key = "module.decoder.layers.w"
            found.append(Piece(target, 0, (4, 2), key, (), (3, 4, 2), (n, 0, 0)))
        else:
            found.append(Piece(target, 0, (4, 2), key, (), (4, 2), (0, 0)))
    return found


def opened(place: Path, tensors: dict[str, torch.Tensor], stacked: bool = True) -> KeyedBackbone:
    write(place, tensors)
    return KeyedBackbone(place, bound(), pieces(stacked))


def assert_read(backbone: KeyedBackbone) -> None:
    with backbone:
        assert torch.equal(backbone.read("embedding.word_embeddings.weight"), WORDS)
        for n in range(3):
            assert torch.equal(backbone.read(f"decoder.layers.{n}.w"), LAYERS[n])
            assert backbone.dtype(f"decoder.layers.{n}.w") is torch.bfloat16


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("stored", [STACKED, APART], ids=["stacked", "apart"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_layers_may_be_stacked_or_apart_and_wrapped_or_not(
    tmp_path: Path, asked: bool, stored: dict[str, torch.Tensor], prefix: str
) -> None:
    named = {prefix + key.removeprefix("module."): tensor for key, tensor in stored.items()}
    assert_read(opened(tmp_path, named, asked))


def test_a_padded_vocabulary_is_cut(tmp_path: Path) -> None:
    padding = torch.full((6, 4), 9.0).bfloat16()
    assert_read(opened(tmp_path, {**STACKED, EMBEDDING: torch.cat([WORDS, padding])}))


def test_nothing_else_may_be_larger(tmp_path: Path) -> None:
    wider = torch.zeros(4, 4, 2).bfloat16()
    with pytest.raises(WeightsError, match="has the shape"):
        opened(tmp_path, {**STACKED, "module.decoder.layers.w": wider})
    with pytest.raises(WeightsError, match="has the shape"):
        opened(tmp_path / "less", {**STACKED, EMBEDDING: WORDS[:9]})


def test_a_tied_output_layer_that_is_stored_too_must_be_equal(tmp_path: Path) -> None:
    assert_read(opened(tmp_path / "same", {**STACKED, OUTPUT: WORDS.clone()}))
    other = WORDS.clone()
    other[9, 3] += 1
    for name, tensor in (("value", other), ("dtype", WORDS.float())):
        with opened(tmp_path / name, {**STACKED, OUTPUT: tensor}) as backbone:
            with pytest.raises(WeightsError, match="differs from it") as error:
                backbone.read("embedding.word_embeddings.weight")
            assert "tie_word_embeddings" in str(error.value.fix)


@pytest.mark.parametrize(
    "key",
    [
        "module.adapter.temp_head.mlp.0.weight",
        "optimizer.state.exp_avg.module.decoder.layers.w",
        "chained_0.optimizer.state.fp32_param.module.x",
        "module.decoder.layers.w._extra_state",
        "rng_state/shard_0",
    ],
)
def test_what_a_training_keeps_beside_the_model_is_no_part_of_it(tmp_path: Path, key: str) -> None:
    backbone = opened(tmp_path, {**STACKED, key: torch.ones(2)})
    assert backbone.left_out == {}
    assert_read(backbone)


def test_other_tensors_are_listed_or_refused(tmp_path: Path) -> None:
    backbone = opened(tmp_path / "extra", {**STACKED, "module.mtp.layers.0.w": torch.ones(2)})
    assert "multi-token" in backbone.left_out["module.mtp.layers.0.w"]
    plan = plan_export(bound(), backbone.dtype, dropped=backbone.left_out)
    assert set(plan.dropped) == {"module.mtp.layers.0.w"}
    with pytest.raises(WeightsError, match=r"first is 'module\.decoder\.layers\.v'"):
        opened(tmp_path / "unknown", {**STACKED, "module.decoder.layers.v": torch.ones(2)})


def test_the_digest_changes_with_the_files(tmp_path: Path) -> None:
    backbone = opened(tmp_path, STACKED)
    before = backbone.digest()
    assert backbone.digest() == before
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes() + b"x")
    assert backbone.digest() != before


@pytest.mark.parametrize("limit", [1, 60, 10**9])
def test_files_keep_together_what_is_made_of_the_same_targets(tmp_path: Path, limit: int) -> None:
    def dtype(target: str) -> Any:
        return torch.bfloat16

    plan = plan_export(bound(), dtype, limit=limit)
    sizes = {1: [80, 16, 16, 16], 60: [80, 48], 10**9: [128]}[limit]
    assert [sum(g.size for g in shard.groups) for shard in plan.shards] == sizes
    names = [shard.file for shard in plan.shards]
    count = len(sizes)
    expected = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert names == (expected if count > 1 else ["model.safetensors"])
    assert plan.index["metadata"]["total_size"] == 128
    assert plan.count == 4


def test_parts_of_one_tensor_must_have_one_dtype() -> None:
    shape = dataclasses.replace(SHAPE, num_experts=2)
    experts = WeightMap((copy("e", "b.{expert}", lambda s: (4, 2), stacked=True),))
    mixed = BoundWeightMap(shape, experts.expand(shape))
    kinds = {"b.0": torch.bfloat16, "b.1": torch.float32}
    with pytest.raises(WeightsError, match="stored as bfloat16, float32") as error:
        plan_export(mixed, kinds.__getitem__)
    assert error.value.where == "e"
