"""Writes a stored model back as a Hugging Face checkpoint, in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from autodeco.convert.backbones import Backbone
from autodeco.convert.cast_plan import CONFIG, QUANTIZATION, unquantised
from autodeco.convert.export_plan import ExportGroup, ExportPlan, ExportShard
from autodeco.convert.operations import sources_from_targets
from autodeco.convert.shard_writer import ShardWriter
from autodeco.convert.small_files import copy_files, small_files
from autodeco.convert.workers import BytesProgress, MemoryGate, Task, default_workers, run_tasks
from autodeco.disk_space import require_space
from autodeco.files import (
    atomic_write_json,
    make_directory,
    publish,
    read_json,
    remove,
    remove_partial,
)
from autodeco.heads.places import check_places
from autodeco.lock import file_lock
from autodeco.resolution import read_config
from autodeco.safetensors_header import INDEX, SINGLE

#: What marks a directory as an export, and says of what and without what.
MANIFEST = "export.json"
_PLAN = "plan.json"
# a group is held three times at most: as targets, as their parts, as the tensors of the result
_MEMORY, _COPIES = 2 << 30, 3


def export_checkpoint(
    backbone: Backbone,
    plan: ExportPlan,
    model: Path,
    output: Path,
    *,
    workers: int | None = None,
    console: Console | None = None,
) -> bool:
    """Writes a checkpoint for any tool, or finds that it is there.

    A killed export goes on where it stopped: it works in a hidden directory beside `output`, which
    appears when it is complete. The tensors have the bytes that are stored.

    Args:
        backbone: The stored model, open.
        plan: What goes into which file.
        model: Where config.json, tokenizer and the like are.
        output: The directory to appear.
        workers: Threads; by default as many as keep processors and disk busy.
        console: Where progress goes.

    Returns:
        Whether it has written it now.

    Raises:
        WeightsError: A tensor cannot be read.
        UsageError: `output` is something else.
        RunError: Another process is exporting to `output`.
        EnvironmentProblem: It cannot be written, or does not fit on the disk.
    """
    config = _exported_config(model)
    parts = (backbone.digest(), json.dumps(config, sort_keys=True), json.dumps(plan.index()))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    if _there(output, digest):
        return False
    check_places(model, output)
    make_directory(output.parent)
    lock = file_lock(
        output.with_name(f".{output.name}.lock"),
        "the export",
        output,
        "wait for it, or choose another directory",
    )
    try:
        if _there(output, digest):  # another process made it while this one came for the lock
            return False
        export = _Export(backbone, plan, output, digest, console or Console(stderr=True))
        export.run(workers or default_workers())
        export.finish(model, config)
        return True
    finally:
        lock.remove()


def _exported_config(model: Path) -> dict[str, Any]:
    """The config of the result: what was stored in parts is stored as bfloat16 now."""
    config = read_config(model)
    inner = config.get("text_config")
    parts = (config, inner if isinstance(inner, dict) else {})
    return unquantised(config, top=True) if any(QUANTIZATION in p for p in parts) else config


def _there(output: Path, digest: str) -> bool:
    manifest = output / MANIFEST
    return manifest.is_file() and read_json(manifest).get("source") == digest


class _Export:
    """One call of `export_checkpoint`."""

    def __init__(
        self, backbone: Backbone, plan: ExportPlan, output: Path, digest: str, console: Console
    ) -> None:
        self.backbone, self.plan, self.output = backbone, plan, output
        self.digest, self.console = digest, console
        self.building = output.with_name(f".{output.name}.exporting")
        self.gate = MemoryGate(_MEMORY)

    def run(self, workers: int) -> None:
        """Writes the files that are not there yet."""
        self._begin()
        left = [shard for shard in self.plan.shards if not self._is_whole(shard)]
        size = sum(shard.plan.size for shard in left)
        require_space(self.building, size, "the exported checkpoint")
        done = self.plan.size - size
        with BytesProgress(self.console, "export", self.plan.size, done) as progress:
            for shard in left:
                with ShardWriter(self.building / shard.file, shard.plan) as writer:
                    run_tasks(self._tasks(shard, writer), workers, progress)

    def _begin(self) -> None:
        """Makes the working directory, or takes over one of the same source and plan."""
        plan = {
            "source": self.digest,
            "shards": {shard.file: shard.plan.size for shard in self.plan.shards},
        }
        path = self.building / _PLAN
        if self.building.exists() and not (path.exists() and read_json(path) == plan):
            remove(self.building)
        make_directory(self.building)
        remove_partial(self.building)
        atomic_write_json(path, plan)

    def _is_whole(self, shard: ExportShard) -> bool:
        """A file under its own name was whole when it was given the name."""
        path = self.building / shard.file
        if not path.is_file() or path.stat().st_size != shard.plan.size:
            return False
        with path.open("rb") as stream:
            return stream.read(len(shard.plan.header)) == shard.plan.header

    def _tasks(self, shard: ExportShard, writer: ShardWriter) -> Iterator[Task]:
        for group in shard.groups:
            yield partial(self._write, group, writer)

    def _write(self, group: ExportGroup, writer: ShardWriter) -> int:
        self.gate.acquire(group.size * _COPIES)
        try:
            for name, tensor in sources_from_targets(group.bound, self.backbone.read):
                data = tensor.contiguous().reshape(-1).view(torch.uint8)
                writer.write(name, 0, data.numpy().data)
        finally:
            self.gate.release(group.size * _COPIES)
        return group.size

    def finish(self, model: Path, config: Mapping[str, Any]) -> None:
        """Writes the small files and gives the directory its name."""
        files = (file for file in small_files(model) if str(file) not in (CONFIG, MANIFEST))
        copy_files(files, model, self.building)
        if [shard.file for shard in self.plan.shards] != [SINGLE]:
            atomic_write_json(self.building / INDEX, self.plan.index())
        atomic_write_json(self.building / CONFIG, config)
        manifest = {
            "made_by": "autodeco export",
            "version": 1,
            "source": self.digest,
            "dropped": dict(self.plan.dropped),
        }
        atomic_write_json(self.building / MANIFEST, manifest)
        remove(self.building / _PLAN)
        publish(self.building, self.output)


__all__ = ["MANIFEST", "export_checkpoint"]
