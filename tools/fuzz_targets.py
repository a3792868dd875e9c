"""What ``fuzz.py`` reads spoiled files with: everything in autodeco that opens a user's file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from autodeco.errors import AutodecoError


class Disagreement(Exception):
    """A file that was accepted means something else to the safetensors library."""


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        name: As on the command line.
        files: What is spoiled, relative to the directory.
        make: Writes a good directory.
        read: Reads it, as autodeco does. An AutodecoError is a good answer to a spoiled file.
        slow: A read takes more than some hundredths of a second.
    """

    name: str
    files: tuple[str, ...]
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    slow: bool = False


INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_QWEN3 = "autodeco_plugin_qwen3"


def _family() -> Any:
    from importlib import import_module

    return import_module(f"{_QWEN3}.family").FAMILY


@cache
def _demo() -> Path:
    from importlib import resources

    return Path(str(resources.files(_QWEN3))) / "demo"


def _make_demo(directory: Path) -> None:
    shutil.copytree(_demo(), directory, dirs_exist_ok=True)


def _make_random(directory: Path) -> None:
    from autodeco.convert.random_checkpoint import write_random_checkpoint

    family = _family()
    write_random_checkpoint(family, family.preset("debug"), directory / "made", tokenizer=_demo())
    for path in (directory / "made").iterdir():
        path.rename(directory / path.name)
    (directory / "made").rmdir()


def _make_tensors(directory: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b.weight": torch.ones(4, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "é\n": torch.zeros(3, dtype=torch.uint8),
    }
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _make_sharded(directory: Path) -> None:
    table: dict[str, str] = {}
    for number, shard in enumerate(SHARDS):
        tensors = {f"layer.{number}.{name}": torch.ones(2, 2) for name in "ab"}
        save_file(tensors, directory / shard, {"format": "pt"})
        table |= dict.fromkeys(tensors, shard)
    content = {"metadata": {"total_size": 64}, "weight_map": table}
    (directory / INDEX).write_text(json.dumps(content))


def _compare(infos: dict[str, Any]) -> None:
    """What was accepted, the library reads alike: names, shapes, dtypes and bytes."""
    for file in {info.file for info in infos.values()}:
        try:
            with safe_open(file, framework="pt") as reader:
                names = set(reader.keys())
                shapes = {n: tuple(reader.get_slice(n).get_shape()) for n in names}
                dtypes = {n: reader.get_slice(n).get_dtype() for n in names}
                tensors = {n: reader.get_tensor(n) for n in names if len(shapes[n]) < 16}
        except Exception as error:
            raise Disagreement(f"accepted, and refused by safetensors: {error}") from error
        ours = {n: i for n, i in infos.items() if i.file == file}
        if {n: i.shape for n, i in ours.items()} != shapes or {
            n: i.dtype for n, i in ours.items()
        } != dtypes:
            raise Disagreement(f"{ours} is not {shapes}, {dtypes}")
        data = file.read_bytes()
        for name, tensor in tensors.items():
            stored = data[ours[name].start : ours[name].start + ours[name].size]
            if bytes(tensor.contiguous().flatten().view(torch.uint8).numpy()) != stored:
                raise Disagreement(f"{name!r} has other bytes")


def _read_header(directory: Path) -> None:
    from autodeco.safetensors_header import read_header

    _compare(read_header(directory / "model.safetensors"))


def _read_checkpoint(directory: Path) -> None:
    from autodeco.safetensors_header import read_checkpoint

    infos = read_checkpoint(directory)
    for info in infos.values():
        if info.file.parent != directory:
            raise Disagreement(f"{info.file} lies outside")
    _compare(infos)


def _read_formats(directory: Path) -> None:
    """Tensors in parts, as the published FP8 and MXFP4 checkpoints have them, decoded."""
    from autodeco.convert.shards import ShardReader

    with ShardReader(directory) as reader:
        for name in reader.tensors:
            reader.read(name)


def _make_formats(directory: Path) -> None:
    tensors = {
        "a": torch.ones(4),
        "w": torch.zeros(130, 200).to(torch.float8_e4m3fn),
        "w_scale_inv": torch.ones(2, 2),
        "m_blocks": torch.zeros(2, 3, 2, 16, dtype=torch.uint8),
        "m_scales": torch.full((2, 3, 2), 127, dtype=torch.uint8),
    }
    save_file(tensors, directory / "model.safetensors")


def _read_config(directory: Path) -> None:
    from autodeco.engines.select import choose_dtype
    from autodeco.heads.identity import base_identity
    from autodeco.registry import Registry

    for plugin, preset in ((None, None), ("qwen3", "auto"), ("qwen3", None)):
        try:
            Registry().resolve(plugin, directory, preset)
        except AutodecoError:
            continue
    base_identity(directory)
    choose_dtype("auto", directory, torch.device("cuda"))


def _read_generation(directory: Path) -> None:
    from autodeco.decoding.stage import vendor_generation_config
    from autodeco.training.tokenization import eos_token_ids

    eos_token_ids(directory, None)
    vendor_generation_config(directory)


def _read_source(directory: Path) -> None:
    """All that `import` checks of a checkpoint, for a preset and for its own sizes."""
    from autodeco.convert.source import checkpoint_digest, open_source
    from autodeco.job import Job

    for preset in ("debug", "auto"):
        open_source(_family(), Job(plugin="qwen3", model=directory, preset=preset))
    checkpoint_digest(directory)


def _read_plan(directory: Path) -> None:
    from autodeco.engines.megatron.requests import request_for
    from autodeco.registry import Registry

    found = Registry().resolve("qwen3", directory, "auto")
    request_for(
        found.family, found.preset, directory, None,
        gpus=1, gpu_memory=1 << 30, reserve=0, dtype=torch.bfloat16,
    )  # fmt: skip


def _read_engine(directory: Path) -> None:
    from autodeco.engines.hf import HFEngine

    HFEngine(directory, torch.device("cpu"), torch.float32)


def _read_tokenizer(directory: Path) -> None:
    from autodeco.training.tokenization import (
        check_tokenizer,
        eos_token_ids,
        load_tokenizer,
        tokenize_text,
    )

    tokenizer = load_tokenizer(directory)
    check_tokenizer(tokenizer, 10**9)
    tokenize_text(tokenizer, "Tom has 12.", " So 30.", eos_token_ids(directory, tokenizer))


def _make_heads(directory: Path) -> None:
    from autodeco.heads.files import save_heads
    from autodeco.heads.modules import DecodingHeads, HeadsConfig

    heads = DecodingHeads(HeadsConfig(8, intermediate_size=4))
    made = save_heads(
        directory / "made",
        heads,
        metadata={"base_model_type": "x", "hidden_size": 8, "objective": "nll"},
    )
    for path in made.iterdir():
        path.rename(directory / path.name)
    made.rmdir()


def _read_heads(directory: Path) -> None:
    from autodeco.decoding.policy import check_scale
    from autodeco.heads.files import load_heads, save_heads

    loaded = load_heads(directory)
    for name in ("temperature_scale", "top_p_scale"):
        check_scale(name, loaded.metadata.get(name, 1.0))
    save_heads(directory / "again", loaded.heads, metadata=loaded.metadata, replace=True)


def _make_merged(layout: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        from autodeco.heads.files import save_heads
        from autodeco.heads.merge import merge
        from autodeco.heads.modules import DecodingHeads, HeadsConfig

        root = directory.parent / "parts"
        shutil.rmtree(root, ignore_errors=True)
        _make_random_base(root / "base")
        size = json.loads((root / "base" / "config.json").read_text())["hidden_size"]
        save_heads(root / "heads", DecodingHeads(HeadsConfig(size)), metadata={})
        directory.rmdir()
        merge(root / "base", root / "heads", directory, layout=layout, copy=True)
        shutil.rmtree(root)

    return make


def _make_random_base(directory: Path) -> None:
    directory.mkdir(parents=True)
    _make_random(directory)


def _read_merged(directory: Path) -> None:
    """Loading and splitting: what it is, its heads, its base."""
    from autodeco.decoding.stage import vendor_generation_config
    from autodeco.heads.files import load_heads
    from autodeco.heads.places import is_merged
    from autodeco.heads.split import split

    is_merged(directory)
    vendor_generation_config(directory)
    load_heads(directory)
    root = directory.parent / "split"
    shutil.rmtree(root, ignore_errors=True)
    split(directory, root / "heads", base=root / "base")


def _read_base(directory: Path) -> None:
    """Merging: the base's files, and heads of its size."""
    from autodeco.heads.merge import merge

    root = directory.parent / "merged"
    shutil.rmtree(root, ignore_errors=True)
    for layout in ("native", "autodeco"):
        merge(directory, _heads_of_base(directory.parent), root / layout, layout=layout)


def _read_generated(directory: Path) -> None:
    """`autodeco generate` on a merged checkpoint, one token."""
    from autodeco.decoding.command import generate_text

    generate_text(
        model=directory, heads=None, prompt="Tom has", chat=False, max_new_tokens=1,
        temperature_scale=None, top_p_scale=None, seed=0, device="cpu",
    )  # fmt: skip


def _heads_of_base(root: Path) -> Path:
    from autodeco.heads.files import save_heads
    from autodeco.heads.modules import DecodingHeads, HeadsConfig

    path = root / "heads-of-base"
    if not path.exists():
        size = _family().preset("debug").shape.hidden_size
        save_heads(path, DecodingHeads(HeadsConfig(size)), metadata={})
    return path


def targets() -> Iterator[Target]:
    """Yields every target."""
    from fuzz_runs import run_targets  # type: ignore[import-not-found]

    config = ("config.json",)
    weights = ("model.safetensors",)
    merged = ("config.json", "generation_config.json")
    yield Target("header", weights, _make_tensors, _read_header)
    yield Target("index", (INDEX, INDEX, *SHARDS), _make_sharded, _read_checkpoint)
    yield Target("formats", weights, _make_formats, _read_formats)
    yield Target("config", config, _make_demo, _read_config)
    yield Target("generation", ("generation_config.json", *config), _make_demo, _read_generation)
    yield Target("source", (*config, *weights), _make_random, _read_source)
    yield Target("plan", config, _make_demo, _read_plan, slow=True)
    yield Target(
        "engine", (*config, "generation_config.json"), _make_random, _read_engine, slow=True
    )
    yield Target(
        "tokenizer",
        ("tokenizer_config.json", "tokenizer.json", "config.json", "chat_template.jinja"),
        _make_demo,
        _read_tokenizer,
        slow=True,
    )
    yield Target("heads", (*config, *weights), _make_heads, _read_heads)
    native = (*merged, "autodeco/config.json", "autodeco/model.safetensors", *weights)
    yield Target("merged-native", native, _make_merged("native"), _read_merged)
    renamed = (*merged, INDEX, "autodeco_heads.safetensors", SHARDS[0])
    yield Target("merged-autodeco", renamed, _make_merged("autodeco"), _read_merged)
    yield Target(
        "generate",
        ("config.json", "generation_config.json", *weights),
        _make_merged("native"),
        _read_generated,
        slow=True,
    )
    yield Target("base", (*merged, *weights), _make_random, _read_base)
    yield from run_targets()
