"""The run directory: where a run writes, what it has done, and which run is continued."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from autodeco.errors import EnvironmentProblem, RunError, UsageError
from autodeco.files import (
    PARTIAL_SUFFIX,
    atomic_write_json,
    make_directory,
    read_object,
    remove,
    remove_partial,
)
from autodeco.job import Job
from autodeco.lock import LOCK_FILE, run_lock

JOB_FILE = "job.json"
STAGES = ("import", "build", "attach", "train", "export", "merge", "evaluate")
# What a stage after the training depends on, beside the trained heads.
STAGE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "export": ("checkpoint", "save_dtype", "temperature_scale", "top_p_scale"),
    "merge": ("merge", "copy"),
    "evaluate": (
        "problems",
        "problem_format",
        "answer_check",
        "evaluate_problems",
        "evaluate_samples",
        "evaluate_seed",
        "max_new_tokens",
    ),
}
_STAMP = re.compile(r"\d{8}-\d{6}(-\d+)?")
_HASH = "job_hash"
_INPUTS = "inputs"
_ENVIRONMENT = "environment"
_BESIDE = (_HASH, _INPUTS, _ENVIRONMENT)  # in job.json, and no options


@dataclass(frozen=True)
class RunDirectory:
    """One run: ``<out>/<name>/<start time>/``.

    Attributes:
        path: The directory.
        resumed: Whether it was there before.
    """

    path: Path
    resumed: bool

    def manifest(self, stage: str) -> Path:
        """Returns the path of a stage's manifest; the stage is done when it exists."""
        return self.path / "stages" / f"{stage}.json"

    def done(self, stage: str) -> bool:
        """Returns whether the stage has been completed."""
        return self.manifest(stage).exists()

    def read_manifest(self, stage: str) -> dict[str, Any]:
        """Returns what a completed stage recorded."""
        return read_object(self.manifest(stage))

    def complete(self, stage: str, seconds: float, **outputs: Any) -> None:
        """Marks a stage as done: what it made, with which versions, and peak memory so far."""
        atomic_write_json(
            self.manifest(stage),
            {
                "stage": stage,
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(seconds, 3),
                "versions": versions(),
                **peak_memory(),
                **outputs,
            },
        )

    @property
    def finished(self) -> bool:
        """Returns whether every stage is done."""
        return all(self.done(stage) for stage in STAGES)


def peak_memory() -> dict[str, int]:
    """Returns the most bytes that this process has held so far, on the host and on its GPU."""
    # kilobytes, but bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")  # nothing is on a GPU before it is imported
    if torch is not None and torch.cuda.is_initialized():
        peak["peak_gpu_bytes"] = int(torch.cuda.max_memory_allocated())
    return peak


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that matter, without importing them."""
    found = {"python": platform.python_version()}
    for name in ("autodeco", "torch", "transformers", "safetensors", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def open_run(
    job: Job,
    digest: str,
    inputs: Mapping[str, str],
    allow: frozenset[str],
    *,
    trained: bool = False,
) -> tuple[RunDirectory, list[str]]:
    """Begins a run, or finds the one to continue.

    Args:
        job: The resolved job; ``name`` is set.
        digest: Its hash.
        inputs: Digests of what it reads.
        allow: Fields that may differ from the resumed run's.
        trained: Look for the newest run of this job whose training is done, finished or not, and
            begin none.

    Returns:
        The run directory, and remarks for the user.

    Raises:
        RunError: No run of this job is trained; ``--resume PATH`` names no run, or one of another
            job: the message has the difference.
        EnvironmentProblem: The directory cannot be written.
    """
    base = job.out / (job.name or "run")
    remarks: list[str] = []
    found: Path | None = None
    if job.resume in ("auto", "new") and allow:
        raise UsageError(
            "--allow-change says which run may change only together with --resume PATH",
            fix="add --resume with the path of the run directory, or leave it out",
        )
    if job.resume not in ("auto", "new"):
        found = Path(job.resume)
        _check_same(found, job, digest, inputs, allow)
    elif trained:
        found = _newest_trained(base, digest)
    elif job.resume == "auto":
        found, remarks = _newest_unfinished(base, digest)
    if found is None:
        remarks += _clear_never_begun(base)
    path = found or _new_directory(base)
    for folder in (path, path / "stages", path / "checkpoints"):
        make_directory(folder)
    return RunDirectory(path, found is not None), remarks


def record_job(
    directory: RunDirectory,
    job: Job,
    digest: str,
    inputs: Mapping[str, str],
    environment: Mapping[str, str | None] | None = None,
) -> list[str]:
    """Writes ``job.json`` and clears what a killed process left; call it under the run's lock.

    Args:
        directory: The run.
        job: Its job.
        digest: The job's hash.
        inputs: Digests of what it reads.
        environment: Forwarded variables, recorded beside the job.

    Returns:
        The names of what was cleared.
    """
    path = directory.path
    folders = (path, path / "stages", path / "checkpoints", path / "data")
    left = [partial.name for folder in folders for partial in remove_partial(folder)]
    plain = {
        item.name: str(value.absolute())
        for item in dataclasses.fields(job)
        if isinstance(value := getattr(job, item.name), Path)
    }
    content = {**job.to_json(), **plain, _HASH: digest, _INPUTS: dict(inputs)}
    content |= {"resume": "auto", "allow_change": "", _ENVIRONMENT: dict(environment or {})}
    atomic_write_json(path / JOB_FILE, content)
    return left


def job_values(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the job's fields of a ``job.json``: a run's own file is a valid ``--config``."""
    return {key: value for key, value in content.items() if key not in _BESIDE}


def _new_directory(base: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = base / stamp
    number = 1
    while path.exists():
        path = base / f"{stamp}-{number}"
        number += 1
    return path


def _clear_never_begun(base: Path) -> list[str]:
    """Removes directories of runs that were killed before ``job.json``; returns remarks."""
    remarks = []
    for path in sorted(p.parent for p in base.glob(f"*/{LOCK_FILE}")):
        if (path / JOB_FILE).exists() or not _is_bare_run(path):
            continue
        # it is beginning just now, or another process has just cleared it
        with contextlib.suppress(RunError, EnvironmentProblem):
            lock = run_lock(path)
            remove(path)
            lock.release()
            remarks.append(f"removed {path}, of a run that was killed at its beginning")
    remove_partial(base)
    return remarks


def _is_bare_run(path: Path) -> bool:
    """Whether a directory is what we make of a run before its ``job.json``, and nothing else."""
    ours = {LOCK_FILE, "stages", "checkpoints", "logs"}
    entries = [p for p in path.iterdir() if not p.name.endswith(PARTIAL_SUFFIX)]
    return bool(_STAMP.fullmatch(path.name)) and all(
        p.name in ours and (p.name == LOCK_FILE or not any(p.iterdir())) for p in entries
    )


def _newest_trained(base: Path, digest: str) -> Path:
    for path in sorted((p for p in base.glob("*") if (p / JOB_FILE).exists()), reverse=True):
        same = read_object(path / JOB_FILE).get(_HASH) == digest
        if same and RunDirectory(path, True).done("train"):
            return path
    raise RunError(
        "no run of this job is trained",
        where=str(base),
        fix="train first with the same options, or name a run with --resume PATH",
    )


def _newest_unfinished(base: Path, digest: str) -> tuple[Path | None, list[str]]:
    remarks: list[str] = []
    runs = sorted((p for p in base.glob("*") if (p / JOB_FILE).exists()), reverse=True)
    for path in runs:
        if RunDirectory(path, True).finished:
            continue
        if read_object(path / JOB_FILE).get(_HASH) == digest:
            return path, [*remarks, f"continuing the unfinished run {path}"]
        remarks.append(f"the unfinished run {path} is of another job; it is left alone")
    return None, remarks[:1]


def _check_same(
    path: Path, job: Job, digest: str, inputs: Mapping[str, str], allow: frozenset[str]
) -> None:
    if not (path / JOB_FILE).exists():
        raise RunError("no run is there", where=str(path), fix="give the path of a run directory")
    old = read_object(path / JOB_FILE)
    if old.get(_HASH) == digest:
        return
    mine = {**job.result_values(), **{f"{k} (content)": v for k, v in inputs.items()}}
    read = old.get(_INPUTS)
    contents = read if isinstance(read, dict) else {}
    theirs = {**old, **{f"{k} (content)": v for k, v in contents.items()}}
    changed = [name for name, value in mine.items() if theirs.get(name) != value]
    trained = RunDirectory(path, True).done("train")
    if trained and changed:
        raise RunError(
            f"the training of this run is done; {', '.join(changed)} cannot change any more",
            where=str(path),
            fix="begin a new run (--resume new), from its heads with --init-heads if you like",
        )
    refused = [name for name in changed if name.removesuffix(" (content)") not in allow]
    if refused:
        lines = [f"{name}: {theirs.get(name)!r} there, {mine[name]!r} now" for name in refused]
        names = ",".join(dict.fromkeys(n.removesuffix(" (content)") for n in refused))
        raise RunError(
            "the run was begun with other options that change its result:\n    "
            + "\n    ".join(lines),
            where=str(path),
            fix=f"use the old values, begin a new run (--resume new), or --allow-change {names}",
        )
