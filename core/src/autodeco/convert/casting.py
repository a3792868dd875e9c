"""Casts a checkpoint that is stored in FP8 or MXFP4 to bfloat16, in bounded memory.

Tensors are read, decoded and written in blocks of some megabytes, by threads; a file of the source
becomes a file of the result. What is stored as it is, is copied byte by byte.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from autodeco.convert.cast_plan import CHUNK_BYTES, CONFIG, CastPlan, CastShard, chunks, plan_cast
from autodeco.convert.direct_reader import DirectReader
from autodeco.convert.shard_writer import ShardWriter, index_of, is_whole
from autodeco.convert.shards import StoredTensor
from autodeco.convert.small_files import copy_files
from autodeco.convert.source import checkpoint_digest
from autodeco.convert.workers import BytesProgress, Task, default_workers, run_tasks
from autodeco.convert.working_directory import WorkingDirectory
from autodeco.disk_space import require_space
from autodeco.files import atomic_write_json
from autodeco.safetensors_header import INDEX, SINGLE
from autodeco.storage import StorageFormat

#: What marks a directory as a cast, and says of what.
MANIFEST = "cast.json"


def cast_checkpoint(
    source: Path,
    output: Path,
    *,
    formats: Sequence[StorageFormat] = (),
    who: str = "",
    device: str = "cpu",
    workers: int | None = None,
    console: Console | None = None,
) -> CastPlan:
    """Writes a checkpoint in bfloat16, complete, for any tool; or finds that it is there.

    A killed cast goes on where it stopped: it works in a hidden directory beside `output`, which
    appears when it is complete.

    Args:
        source: In Hugging Face format; some tensors in FP8 blocks, MXFP4, or a format of `formats`.
        output: The directory to appear.
        formats: A plugin's own storage formats.
        who: The plugin, for errors.
        device: Where tensors are decoded: "cpu", "cuda", "cuda:1".
        workers: Threads; by default as many as keep processors and disk busy.
        console: Where progress goes.

    Returns:
        What was done.

    Raises:
        WeightsError: See `plan_cast`.
        UsageError: There is nothing to cast, or `output` is something else.
        RunError: Another process is casting to `output`.
        EnvironmentProblem: It cannot be written, or does not fit on the disk.
    """
    plan = plan_cast(source, formats, who=who)
    digest = checkpoint_digest(source)
    place = WorkingDirectory(output, "cast")

    def work() -> None:
        cast = _Cast(plan, place, digest, console or Console(stderr=True))
        cast.run(DirectReader(source, formats, device=device), workers or default_workers())

    place.make_once(MANIFEST, digest, source, work)
    return plan


class _Cast:
    """One call of `cast_checkpoint`."""

    def __init__(
        self, plan: CastPlan, place: WorkingDirectory, digest: str, console: Console
    ) -> None:
        self.plan, self.place, self.digest, self.console = plan, place, digest, console

    def run(self, reader: DirectReader, workers: int) -> None:
        shards, result = self.plan.shards, self.place.result
        self.place.begin(
            {
                "source": checkpoint_digest(self.plan.source, times=True),
                "shards": {shard.file: shard.plan.size for shard in shards},
            }
        )
        left = [shard for shard in shards if not is_whole(result / shard.file, shard.plan)]
        size = sum(shard.plan.size for shard in left)
        require_space(result, size, "the cast checkpoint")
        done = self.plan.size - size
        open_files: list[_OpenShard] = []
        with reader, BytesProgress(self.console, "cast", self.plan.size, done) as progress:
            try:
                run_tasks(self._tasks(left, reader, open_files), workers, progress)
            except BaseException as error:
                for file in open_files:
                    file.discard(error)
                raise
        self._finish()

    def _tasks(
        self, shards: Sequence[CastShard], reader: DirectReader, open_files: list[_OpenShard]
    ) -> Iterator[Task]:
        for shard in shards:
            blocks = [(t, rows) for t in shard.tensors for rows in _blocks(t)]
            file = _OpenShard(self.place.result / shard.file, shard, len(blocks))
            open_files[:] = [*(f for f in open_files if f.left), file]
            for tensor, rows in blocks:
                yield partial(_cast_block, file, reader, tensor, rows)

    def _finish(self) -> None:
        """Writes the small files and gives the directory its name."""
        result = self.place.result
        copy_files(self.plan.files, self.plan.source, result)
        if [shard.file for shard in self.plan.shards] != [SINGLE]:
            atomic_write_json(result / INDEX, index_of({s.file: s.plan for s in self.plan.shards}))
        atomic_write_json(result / CONFIG, self.plan.config)
        manifest = {"made_by": "autodeco cast", "version": 1, "source": self.digest}
        atomic_write_json(result / MANIFEST, manifest)
        self.place.publish()


class _OpenShard:
    """A file that is being written, until its last block is there."""

    def __init__(self, path: Path, shard: CastShard, blocks: int) -> None:
        self.writer = ShardWriter(path, shard.plan)
        self.writer.__enter__()
        self.left = blocks
        self._lock = threading.Lock()
        if not blocks:
            self.writer.__exit__(None)

    def one_done(self) -> None:
        with self._lock:
            self.left -= 1
            last = self.left == 0
        if last:
            self.writer.__exit__(None)

    def discard(self, error: BaseException) -> None:
        if self.left:
            self.writer.__exit__(type(error))


def _blocks(tensor: StoredTensor) -> Iterator[tuple[int, int]]:
    """Blocks of rows of a tensor that is decoded, of bytes of one that is copied."""
    if tensor.format is not None:
        yield from chunks(tensor)
        return
    size = tensor.parts[""].size
    for start in range(0, size, CHUNK_BYTES):
        yield start, min(start + CHUNK_BYTES, size)


def _cast_block(
    file: _OpenShard, reader: DirectReader, tensor: StoredTensor, block: tuple[int, int]
) -> int:
    start, stop = block
    if tensor.format is None:
        data, at = reader.read_bytes(tensor.name, start, stop - start), start
    else:
        region = (block, *((0, size) for size in tensor.shape[1:]))
        rows = reader.read(tensor.name, region).contiguous()
        data = rows.view(-1).view(torch.uint8)
        at = file.writer.plan.tensors[tensor.name].size // tensor.shape[0] * start
    file.writer.write(tensor.name, at, data.numpy().data)
    file.one_done()
    return data.numel()


def describe(plan: CastPlan) -> str:
    """Returns a sentence: how many tensors are decoded and copied, and the bytes."""
    text = (
        f"{plan.decoded:,} tensors decoded to bfloat16, {plan.count - plan.decoded:,} copied; "
        f"{plan.read_size:,} bytes read, {plan.size:,} written in {len(plan.shards)} files"
    )
    if plan.left_out:
        text += f"; left out, no part of the checkpoint: {', '.join(map(str, plan.left_out))}"
    return text
