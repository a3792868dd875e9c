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
from autodeco.convert.shard_writer import ShardWriter, is_whole
from autodeco.convert.small_files import copy_files, small_files
from autodeco.convert.workers import BytesProgress, MemoryGate, Task, default_workers, run_tasks
from autodeco.convert.working_directory import WorkingDirectory
from autodeco.disk_space import require_space
from autodeco.files import atomic_write_json
from autodeco.resolution import read_config
from autodeco.safetensors_header import INDEX, SINGLE

#: What marks a directory as an export, and says of what and without what.
MANIFEST = "export.json"
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
    parts = (backbone.digest(), json.dumps(config, sort_keys=True), json.dumps(plan.index))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    place = WorkingDirectory(output, "export")

    def work() -> None:
        export = _Export(backbone, plan, place, digest, console or Console(stderr=True))
        export.run(workers or default_workers())
        export.finish(model, config)

    return place.make_once(MANIFEST, digest, model, work)


def _exported_config(model: Path) -> dict[str, Any]:
    """The config of the result: what was stored in parts is stored as bfloat16 now."""
    config = read_config(model)
    inner = config.get("text_config")
    parts = (config, inner if isinstance(inner, dict) else {})
    return unquantised(config, top=True) if any(QUANTIZATION in p for p in parts) else config


class _Export:
    """One call of `export_checkpoint`."""

    def __init__(
        self,
        backbone: Backbone,
        plan: ExportPlan,
        place: WorkingDirectory,
        digest: str,
        console: Console,
    ) -> None:
        self.backbone, self.plan, self.place = backbone, plan, place
        self.digest, self.console = digest, console
        self.gate = MemoryGate(_MEMORY)

    def run(self, workers: int) -> None:
        """Writes the files that are not there yet."""
        shards, result = self.plan.shards, self.place.result
        sizes = {shard.file: shard.plan.size for shard in shards}
        self.place.begin({"source": self.digest, "shards": sizes})
        left = [shard for shard in shards if not is_whole(result / shard.file, shard.plan)]
        size = sum(shard.plan.size for shard in left)
        require_space(result, size, "the exported checkpoint")
        done = self.plan.size - size
        with BytesProgress(self.console, "export", self.plan.size, done) as progress:
            for shard in left:
                with ShardWriter(result / shard.file, shard.plan) as writer:
                    run_tasks(self._tasks(shard, writer), workers, progress)

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
        result = self.place.result
        files = (file for file in small_files(model) if str(file) not in (CONFIG, MANIFEST))
        copy_files(files, model, result)
        if [shard.file for shard in self.plan.shards] != [SINGLE]:
            atomic_write_json(result / INDEX, self.plan.index)
        atomic_write_json(result / CONFIG, config)
        manifest = {
            "made_by": "autodeco export",
            "version": 1,
            "source": self.digest,
            "dropped": dict(self.plan.dropped),
        }
        atomic_write_json(result / MANIFEST, manifest)
        self.place.publish()
