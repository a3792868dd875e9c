"""Weight maps are total, refuse doubles, and pack and unpack bit by bit."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autodeco.convert.operations import pack, unpack
from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.source import open_source
from autodeco.engines.hf import HFEngine
from autodeco.errors import WeightsError
from autodeco.job import Job
from autodeco.safetensors_header import read_checkpoint, read_header
from autodeco.weights import Drop, WeightMap
from autodeco_plugin_qwen3.family import FAMILY

PRESETS = [preset.name for preset in FAMILY.presets]
TINY = ["debug", "debug-moe"]


def names(preset: str) -> list[str]:
    rules = FAMILY.weight_map.expand(FAMILY.preset(preset).shape)
    return [name for rule in rules for name in rule.sources]


@pytest.mark.parametrize("preset", TINY)
def test_names_and_shapes_are_those_of_transformers(preset: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = write_random_checkpoint(FAMILY, FAMILY.preset(preset), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    ours = load_file(path / "model.safetensors")
    assert saved.keys() == ours.keys()
    assert all(torch.equal(saved[name], ours[name]) for name in ours)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_expands_without_doubles(preset: str) -> None:
    shape = FAMILY.preset(preset).shape
    bound = FAMILY.weight_map.bind(shape, names(preset))
    assert len(set(bound.targets())) == len(bound.targets())
    assert sum(FAMILY.preset(preset).layout.stage_layers(shape.num_layers)) == shape.num_layers


@pytest.mark.parametrize("preset", TINY)
def test_pack_and_unpack_are_exact_inverses(preset: str, tmp_path: Path) -> None:
    path = write_random_checkpoint(FAMILY, FAMILY.preset(preset), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    shape = FAMILY.preset(preset).shape
    seen = set()
    for rule in FAMILY.weight_map.bind(shape, tensors).rules:
        sources = [tensors[name] for name in rule.sources]
        back = unpack(rule, shape, pack(rule, shape, sources))
        assert all(torch.equal(a, b) for a, b in zip(sources, back, strict=True))
        seen.update(rule.sources)
    assert seen == set(tensors)


def test_qkv_is_grouped_query_key_value() -> None:
    shape = dataclasses.replace(FAMILY.preset("debug").shape, num_heads=4, num_kv_heads=2)
    rule = next(r for r in FAMILY.weight_map.expand(shape) if r.rule.kind == "qkv")
    q, k, v = (
        torch.full(size, value)
        for size, value in zip((p.size for p in rule.parts), (1, 2, 3), strict=True)
    )
    heads = pack(rule, shape, [q, k, v]).reshape(-1, shape.head_dim, shape.hidden_size)[:, 0, 0]
    assert heads.tolist() == [1, 1, 2, 3, 1, 1, 2, 3]


def test_missing_tensor_is_named() -> None:
    shape = FAMILY.preset("debug").shape
    with pytest.raises(WeightsError, match=r"model\.norm\.weight"):
        FAMILY.weight_map.bind(shape, [n for n in names("debug") if n != "model.norm.weight"])


def test_unknown_tensor_is_named() -> None:
    with pytest.raises(WeightsError, match=r"neither mapped nor dropped.*visual"):
        FAMILY.weight_map.bind(FAMILY.preset("debug").shape, [*names("debug"), "visual.x"])


def test_drop_needs_a_whole_match_and_keeps_its_reason() -> None:
    weight_map = WeightMap(FAMILY.weight_map.rules, (Drop(r"visual\..*", "text only"),))
    shape = FAMILY.preset("debug").shape
    bound = weight_map.bind(shape, [*names("debug"), "visual.x"])
    assert bound.dropped == {"visual.x": "text only"}
    with pytest.raises(WeightsError):
        weight_map.bind(shape, [*names("debug"), "my.visual.x"])


def test_two_rules_for_one_target_are_refused() -> None:
    rules = FAMILY.weight_map.rules
    with pytest.raises(WeightsError, match="twice"):
        WeightMap((*rules, rules[2])).expand(FAMILY.preset("debug").shape)


def test_wrong_shape_is_refused() -> None:
    shape = FAMILY.preset("debug").shape
    rule = FAMILY.weight_map.expand(shape)[0]
    with pytest.raises(WeightsError, match="expected"):
        pack(rule, shape, [torch.zeros(2, 2)])


def write(path: Path, header: bytes, body: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)
    return path


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        (b"{not json", b"", "malformed"),
        (json.dumps({"a": entry(0, 8, [2])}).encode(), b"1234", "bytes"),
        (json.dumps({"a": entry(0, 8, [3])}).encode(), b"12345678", "disagree"),
        (json.dumps({"a": entry(0, 4, [1], "Q7")}).encode(), b"1234", "unknown dtype"),
        (json.dumps({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}).encode(), b"1234", "overlaps"),
        (json.dumps({"a": entry(-4, 0, [1])}).encode(), b"", "malformed"),
        (json.dumps({"a": 3}).encode(), b"", "malformed"),
        (b"[]", b"", "no object"),
    ],
)
def test_broken_headers_are_refused(
    tmp_path: Path, header: bytes, body: bytes, message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        read_header(write(tmp_path / "x.safetensors", header, body))


def test_truncated_and_absurd_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="cut short"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(WeightsError, match="no safetensors header"):
        read_header(path)
    path.write_bytes(b"123")
    with pytest.raises(WeightsError, match="no safetensors header"):
        read_header(path)


def test_index_problems_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, message in [
        ({"a": "two.safetensors"}, "missing"),
        ({"a": "../one.safetensors"}, "outside"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "which it is not"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(WeightsError, match=message):
            read_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(WeightsError, match="malformed"):
        read_checkpoint(tmp_path)
    index.unlink()
    with pytest.raises(WeightsError, match="neither"):
        read_checkpoint(tmp_path)


def stored_twice(directory: Path, change: float = 0.0) -> Path:
    """A tied checkpoint that holds its output layer as well, as Qwen3-0.6B on the hub does."""
    path = write_random_checkpoint(FAMILY, FAMILY.preset("debug"), directory)
    tensors = load_file(path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += change
    save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors", {"format": "pt"})
    return path


def test_a_tied_output_layer_that_is_stored_as_well_is_taken_for_what_it_is(tmp_path: Path) -> None:
    path = stored_twice(tmp_path / "model")
    weights = open_source(FAMILY, Job(model=path, preset="debug"))
    assert weights.weight_map.dropped == {
        "lm_head.weight": "stored twice: the same tensor as model.embed_tokens.weight"
    }
    assert "lm_head.weight" not in weights.weight_map.source_sizes()
    engine = HFEngine(path, torch.device("cpu"), torch.float32)
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(engine.output_weight().weight, embedding)


def test_a_tied_output_layer_that_differs_is_an_error(tmp_path: Path) -> None:
    path = stored_twice(tmp_path / "model", change=1.0)
    with pytest.raises(WeightsError, match="differs from it, but config"):
        open_source(FAMILY, Job(model=path, preset="debug"))


def test_an_untied_model_needs_its_output_layer() -> None:
    found = [n for n in names("8b") if n != "lm_head.weight"]
    with pytest.raises(WeightsError, match=r"lm_head\.weight"):
        FAMILY.weight_map.bind(FAMILY.preset("8b").shape, found)
