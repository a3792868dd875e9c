"""Reading what is stored in parts: blocks of it, from threads, and everything that is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from format_tools import family_of, random_fp8, random_mxfp4, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from autodeco.convert.formats import decode_fp8_blocks, decode_mxfp4
from autodeco.convert.operations import Region
from autodeco.convert.random_checkpoint import stored, write_random_checkpoint
from autodeco.convert.shards import ShardReader
from autodeco.convert.source import open_source
from autodeco.engines.hf import HFEngine
from autodeco.errors import NumericsError, PluginError, WeightsError
from autodeco.job import Job
from autodeco.storage import FP8_BLOCKS, MXFP4

SIZES = {"fp8": (300, 270), "mxfp4": (3, 96, 7)}
SUFFIXES = {
    "fp8": {"weight": "", "scale": "_scale_inv"},
    "mxfp4": {"blocks": "_blocks", "scales": "_scales"},
}


def parts_of(kind: str) -> dict[str, torch.Tensor]:
    if kind == "fp8":
        return random_fp8(*SIZES["fp8"], torch.float32)
    return random_mxfp4(SIZES["mxfp4"])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tensor of each format and a plain one."""
    tensors = {"plain": torch.arange(60.0).view(5, 12)}
    for kind, suffixes in SUFFIXES.items():
        tensors |= {kind + suffixes[part]: value for part, value in parts_of(kind).items()}
    path = tmp_path_factory.mktemp("shard")
    save_file(tensors, path / "model.safetensors")
    return path


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["fp8", "mxfp4"]), data=st.data())
def test_a_region_is_that_of_the_whole(shard: Path, kind: str, data: st.DataObject) -> None:
    region: Region = ()
    for size in SIZES[kind]:
        start = data.draw(st.integers(0, size - 1))
        region += ((start, data.draw(st.integers(start + 1, size))),)
    whole = {"fp8": decode_fp8_blocks, "mxfp4": decode_mxfp4}[kind](parts_of(kind))
    with ShardReader(shard) as reader:
        assert reader.tensors[kind].shape == SIZES[kind]
        expected = whole[tuple(slice(*bounds) for bounds in region)].contiguous()
        assert same_bits(reader.read(kind, region), expected)


def test_a_region_reads_its_own_blocks_alone(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Region]] = []
    plain = ShardReader._read
    monkeypatch.setattr(
        ShardReader, "_read", lambda s, n, i, r: (asked.append((n, r)), plain(s, n, i, r))[1]
    )
    with ShardReader(shard) as reader:
        reader.read("fp8", ((130, 140), (128, 129)))
        reader.read("mxfp4", ((1, 2), (33, 34), (2, 5)))
    assert asked == [
        ("fp8", ((128, 256), (128, 256))),
        ("fp8_scale_inv", ((1, 2), (1, 2))),
        ("mxfp4_blocks", ((1, 2), (2, 5), (1, 2), (0, 16))),
        ("mxfp4_scales", ((1, 2), (2, 5), (1, 2))),
    ]


def test_threads_share_a_reader(shard: Path) -> None:
    wholes = {"fp8": decode_fp8_blocks(parts_of("fp8")), "mxfp4": decode_mxfp4(parts_of("mxfp4"))}

    def read(number: int) -> bool:
        kind = ("fp8", "mxfp4")[number % 2]
        start = number % (SIZES[kind][0] - 1)
        region = ((start, SIZES[kind][0]), *((0, size) for size in SIZES[kind][1:]))
        return torch.equal(reader.read(kind, region), wholes[kind][start:])

    with ShardReader(shard) as reader, ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(200)))


Change = dict[str, torch.Tensor | None]
FP8_NAME = "model.layers.0.self_attn.o_proj.weight"
MXFP4_NAME = "model.layers.1.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the random checkpoint of a family, once."""
    place = tmp_path_factory.mktemp("whole")

    @lru_cache
    def write(name: str) -> Path:
        family = family_of(name)
        return write_random_checkpoint(family, family.preset("debug"), place / name)

    return write


def broken(whole: Path, place: Path, name: str, change: Change) -> Job:
    """A checkpoint with some tensors replaced, or, for None, removed."""
    path = shutil.copytree(whole, place / name)
    tensors: dict[str, torch.Tensor | None] = {**load_file(path / "model.safetensors"), **change}
    left = {n: t for n, t in tensors.items() if t is not None}
    save_file(left, path / "model.safetensors", {"format": "pt"})
    return Job(plugin=name, preset="debug", model=path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "deepseek_v3",
            {FP8_NAME + "_scale_inv": None},
            f"its scale '{FP8_NAME}_scale_inv' is mis",
        ),
        ("gpt_oss", {MXFP4_NAME + "_scales": None}, MXFP4_NAME),
        ("gpt_oss", {MXFP4_NAME + "_blocks": None}, MXFP4_NAME),
        (
            "deepseek_v3",
            {"model.norm.weight_scale_inv": torch.ones(1, 1)},
            "neither mapped nor dropped, the first is 'model.norm.weight_scale_inv'",
        ),
        (
            "gpt_oss",
            {"lm_head.weight_scales": torch.ones(2, dtype=torch.uint8)},
            "neither mapped nor dropped, the first is 'lm_head.weight_scales'",
        ),
        (
            "deepseek_v3",
            {FP8_NAME + "_scale_inv": torch.ones(2, 2, dtype=torch.float16)},
            f"'{FP8_NAME}_scale_inv' is F16; fp8_blocks has F32 or BF16",
        ),
        (
            "gpt_oss",
            {MXFP4_NAME + "_scales": torch.ones(8, 64, 3, dtype=torch.int8)},
            f"'{MXFP4_NAME}_scales' is I8; mxfp4 has U8",
        ),
        (
            "deepseek_v3",
            {FP8_NAME + "_scale_inv": torch.ones(2, 1)[:, :, None]},
            f"'{FP8_NAME}': scale has 3 dimensions, expected 2",
        ),
        (
            "deepseek_v3",
            {FP8_NAME + "_scale_inv": torch.ones(1, 1)},
            rf"'{FP8_NAME}': scale has the shape \(1, 1\), expected \(2, 2\)",
        ),
        (
            "gpt_oss",
            {MXFP4_NAME + "_scales": torch.ones(8, 64, 2, dtype=torch.uint8)},
            rf"'{MXFP4_NAME}': scales has the shape \(8, 64, 2\), expected \(8, 64, 3\)",
        ),
        (
            "gpt_oss",
            {MXFP4_NAME: torch.ones(8, 96, 64)},
            f"tensor '{MXFP4_NAME}' is stored twice",
        ),
        (
            "gpt_oss",
            {
                MXFP4_NAME: torch.ones(96, 64).to(torch.float8_e4m3fn),
                MXFP4_NAME + "_scale_inv": torch.ones(1, 1),
            },
            f"tensor '{MXFP4_NAME}' is stored twice",
        ),
        (
            "deepseek_v3",
            {"model.norm.weight": torch.ones(160).to(torch.float8_e5m2)},
            "'model.norm.weight' is stored as F8_E5M2, which nothing decodes",
        ),
        (
            "deepseek_v3",
            {FP8_NAME: torch.ones(160, 144, dtype=torch.int8), FP8_NAME + "_scale_inv": None},
            f"'{FP8_NAME}' is stored as I8, which nothing decodes",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_tensor(
    wholes: Callable[[str], Path], tmp_path: Path, name: str, change: Change, message: str
) -> None:
    job = broken(wholes(name), tmp_path, name, change)
    with pytest.raises(WeightsError, match=message):
        open_source(family_of(name), job)


def test_a_nan_in_fp8_is_refused_by_the_engine(
    wholes: Callable[[str], Path], tmp_path: Path
) -> None:
    nan = torch.full((160, 144), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    job = broken(wholes("deepseek_v3"), tmp_path, "deepseek_v3", {FP8_NAME: nan})
    assert job.model is not None
    with pytest.raises(NumericsError, match=FP8_NAME):
        HFEngine(job.model, torch.device("cpu"), torch.float32)


def test_a_decoder_that_gives_another_shape_is_an_error(shard: Path) -> None:
    wrong = dataclasses.replace(FP8_BLOCKS, decode="test_formats_reading:flat")
    with ShardReader(shard, (wrong,)) as reader, pytest.raises(PluginError, match=r"'fp8', expec"):
        reader.read("fp8")
    for path in ("test_formats_reading:nothing", "no_such_module:x"):
        absent = dataclasses.replace(MXFP4, decode=path)
        with (
            ShardReader(shard, (absent,)) as reader,
            pytest.raises(PluginError, match="cannot be imported"),
        ):
            reader.read("mxfp4")


def flat(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A wrong decoder."""
    return parts["weight"].float().flatten()


def test_a_format_that_the_architecture_makes_up_is_an_error() -> None:
    architecture = dataclasses.replace(family_of("gpt_oss").architectures[0], stored={"a": "mxfp5"})
    with pytest.raises(PluginError, match="'mxfp5', which is no storage format"):
        stored(architecture, (), "a", torch.ones(32, 32), torch.float32)


def test_a_sharded_checkpoint_may_have_a_scale_in_another_file(tmp_path: Path, shard: Path) -> None:
    tensors = load_file(shard / "model.safetensors")
    split = {n: f"{'b' if n.endswith(('_inv', '_blocks')) else 'a'}.safetensors" for n in tensors}
    for file in set(split.values()):
        save_file({n: t for n, t in tensors.items() if split[n] == file}, tmp_path / file)
    index = {"weight_map": split}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with ShardReader(tmp_path) as parted, ShardReader(shard) as whole:
        for kind in SIZES:
            assert same_bits(parted.read(kind), whole.read(kind).contiguous())
