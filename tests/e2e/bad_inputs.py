"""A small world of good inputs, and the ways to spoil one of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

Arguments = list[Any]


@dataclass
class World:
    """The inputs of one run, made for one test; a case spoils one of them.

    Attributes:
        root: Everything lies below it.
        pristine: A finished run (model, heads, merged); shared, read only.
        modules: Where fake distributions are installed; on sys.path.
    """

    root: Path
    pristine: Path
    modules: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model = Path(shutil.copytree(self.pristine / "model", self.root / "model"))
        self.data, self.problems = self.root / "train.jsonl", self.root / "problems.jsonl"
        lines = (self.pristine / "data" / "train.jsonl").read_text().splitlines(keepends=True)
        self.data.write_text("".join(lines[:8]))
        self.problems.write_text('{"problem": "1 + 1 =", "gt": "2"}\n')
        self.out = self.root / "out"
        self.modules = self.root / "modules"
        self.modules.mkdir()

    def run(self, *more: Any, plugin: str | None = "qwen3") -> Arguments:
        """The arguments of a run that would do, but for what was spoiled."""
        given: Arguments = ["run", "--model", self.model, "--data", self.data, "--out", self.out]
        given += ["--held-out", "0.3", "--max-steps", "1", "--problems", self.problems]
        return [*given, *(("--plugin", plugin) if plugin else ()), *more]

    def digests(self) -> dict[str, str]:
        """What every input file holds, and which there are."""
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.root.rglob("*")
            if path.is_file()
            and not path.is_relative_to(self.out)
            and "__pycache__" not in str(path)
        }

    # --- spoilers

    def install(self, dist: str, entry: str, source: str | None, package: str = "") -> str:
        """Installs a fake distribution with one entry point; returns the entry's name."""
        module = package or "fake_" + dist.replace("-", "_")
        info = self.modules / f"{dist.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[autodeco.plugins]\n{entry} = {module}:plugin\n")
        if source is not None:
            (self.modules / f"{module}.py").write_text(source)
            sys.modules.pop(module, None)
        return entry

    def config(self, **changes: Any) -> None:
        """Changes config.json; None removes a key."""
        path = self.model / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    def tensors(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Changes the weights."""
        path = self.model / "model.safetensors"
        values = load_file(path)
        change(values)
        save_file(values, path, metadata={"format": "pt"})

    def header(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Changes the header of the weights, the data staying as it is."""
        path = self.model / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    def bytes(self, name: str, change: Callable[[bytes], bytes]) -> None:
        """Changes a file of the model."""
        path = self.model / name
        path.write_bytes(change(path.read_bytes()))

    def shards(self, change: Callable[[dict[str, str]], Any] | None = None) -> list[Path]:
        """Splits the weights over two shards with an index, which is then changed."""
        single = self.model / "model.safetensors"
        tensors = load_file(single)
        single.unlink()
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        weight_map = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
        for shard in names:
            part = {n: t for n, t in tensors.items() if weight_map[n] == shard}
            save_file(part, self.model / shard, metadata={"format": "pt"})
        if change is not None:
            change(weight_map)
        index = {"metadata": {}, "weight_map": weight_map}
        (self.model / "model.safetensors.index.json").write_text(json.dumps(index))
        return [self.model / name for name in names]

    def weights_only_as(self, name: str, content: bytes) -> None:
        """Leaves weights in a format that is not read."""
        (self.model / "model.safetensors").unlink()
        (self.model / name).write_bytes(content)

    def lines(self, *records: Any) -> None:
        """Adds lines to the data: text as it is, other values as JSON."""
        with self.data.open("a") as stream:
            for record in records:
                stream.write(record if isinstance(record, str) else json.dumps(record))
                stream.write("\n")


@dataclass(frozen=True)
class Case:
    """One kind of bad input.

    Attributes:
        name: Of the test.
        code: The exit code that docs/cli.md promises.
        prepare: Spoils an input; returns the arguments.
        said: Each stands in the message; ``{model}`` and the like are filled in.
        begins: Whether it is found only once a run directory is there.
    """

    name: str
    code: int
    prepare: Callable[[World], Arguments]
    said: tuple[str, ...]
    begins: bool = False


def spoiled(spoil: Callable[[World], Any], *more: Any, plugin: str | None = "qwen3") -> Any:
    """A case's `prepare`: spoil an input, then run."""

    def prepare(world: World) -> Arguments:
        spoil(world)
        return world.run(*more, plugin=plugin)

    return prepare
