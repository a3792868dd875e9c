"""GPUs, torch's CUDA, disks, and what the output filesystem can do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodeco.copying import reflink
from autodeco.doctor.packages import folder, version
from autodeco.doctor.report import MISSING, OK, PROBLEM, Row
from autodeco.files import PARTIAL_SUFFIX, remove

_GIB = 2**30
_LEAST_OUT, _LEAST_TEMPORARY, _LEAST_SHARED = 2 * _GIB, _GIB // 2, _GIB // 2
_QUERY = "--query-gpu=name,memory.total,memory.free,driver_version"
_SECONDS = 90
# In a process of its own: a torch that cannot load its libraries must not end the doctor.
_ASK_TORCH = """
import json, torch
seen = torch.cuda.is_available()
print(json.dumps({
    "available": seen,
    "count": torch.cuda.device_count(),
    "nccl": ".".join(map(str, torch.cuda.nccl.version())) if seen else None,
}))
"""


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi: name, memory in MiB, and the driver's version."""

    name: str
    total: int
    free: int
    driver: str


def list_gpus() -> tuple[Gpu, ...] | None:
    """Asks nvidia-smi; None: there is none.

    Raises:
        RuntimeError: It is there and fails.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, _QUERY, "--format=csv,noheader,nounits"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_SECONDS, check=False, errors="replace"
    )
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip() or f"exit code {done.returncode}")
    found = []
    for line in filter(None, map(str.strip, done.stdout.splitlines())):
        name, total, free, driver = (part.strip() for part in line.rsplit(",", 3))
        found.append(Gpu(name, _number(total), _number(free), driver))
    return tuple(found)


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0  # some cards say [N/A]


def gpus() -> Iterator[Row]:
    """Yields a row for each GPU."""
    try:
        found = list_gpus()
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        cure = "load or reinstall the driver, until nvidia-smi answers"
        yield Row("GPU", f"nvidia-smi fails: {error}", PROBLEM, cure)  # login nodes are so
        return
    if not found:
        yield Row("GPU", "none that nvidia-smi knows", MISSING, "everything runs on the CPU")
        return
    for number, gpu in enumerate(found):
        memory = f"{gpu.total / 1024:.1f} GiB, {gpu.free / 1024:.1f} free"
        yield Row(f"GPU {number}", f"{gpu.name}, {memory}, driver {gpu.driver}")


def torch() -> Iterator[Row]:
    """Yields the rows of torch, of its CUDA, and of NCCL; it is imported only beside a GPU."""
    found = version("torch")
    if found is None:
        return  # a dependency: it has its row
    try:
        seen = list_gpus()
    except Exception:
        seen = None  # as the row of the GPUs says
    yield from torch_rows(found, cuda_of_build(), bool(seen))


def torch_rows(found: str, cuda: str | None, has_gpu: bool) -> Iterator[Row]:
    """Yields the rows of an installed torch.

    Args:
        found: Its version.
        cuda: The CUDA that it was built for.
        has_gpu: Whether the machine has a GPU.
    """
    said = f"{found}, built for " + (f"CUDA {cuda}" if cuda else "the CPU")
    if cuda is None:
        cure = "install a build of torch for CUDA in its place"
        yield Row("torch", said, PROBLEM if has_gpu else OK, cure, needed=True)
        yield Row("NCCL", "not in this build of torch; gloo is used", MISSING, cure)
        return
    yield Row("torch", said, needed=True)
    packed = version("nvidia-nccl-cu13", "nvidia-nccl-cu12")
    if not has_gpu:
        yield Row("NCCL", packed or "inside torch")
        return
    facts = ask_torch()
    if "error" in facts:
        cure = f"install torch again: {sys.executable} -c 'import torch' must work"
        yield Row("CUDA", facts["error"], PROBLEM, cure, needed=True)
    elif not facts["available"]:
        cure = f"update the driver to one for CUDA {cuda}, or install torch for an older CUDA"
        yield Row("CUDA", "torch cannot use the GPU", PROBLEM, cure, needed=True)
    else:
        yield Row("CUDA", f"{cuda}, torch sees {facts['count']} GPUs")
    yield Row("NCCL", str(facts.get("nccl") or packed or "inside torch"))


def cuda_of_build() -> str | None:
    """Returns the CUDA version that torch was built for, from its files."""
    place = folder("torch")
    if place is None or not (place / "version.py").exists():
        return None
    text = (place / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return match[1] if match else None


def ask_torch() -> dict[str, Any]:
    """Returns what torch says of CUDA, or its error."""
    command = [sys.executable, "-c", _ASK_TORCH]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_SECONDS, check=False, errors="replace"
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        return {"error": f"torch cannot be imported: {lines[-1]}"}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def nearest(path: Path) -> Path:
    """Returns the path, or the nearest of its parents that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def disk(out: Path) -> Iterator[Row]:
    """Yields the free space at the output and in the temporary directory."""
    places = (
        ("disk, --out", nearest(out), _LEAST_OUT, "free some, or choose another --out"),
        (
            "disk, temporary",
            Path(tempfile.gettempdir()),
            _LEAST_TEMPORARY,
            "free some, or set TMPDIR to another directory",
        ),
    )
    for name, place, least, cure in places:
        free = shutil.disk_usage(place).free
        state = OK if free >= least else PROBLEM
        yield Row(name, f"{free / _GIB:.1f} GiB free at {place}", state, cure, needed=True)


def shared_memory(place: Path = Path("/dev/shm")) -> Iterator[Row]:
    """Yields the size of shared memory: NCCL and torch's workers speak through it."""
    if not place.is_dir():
        yield Row("shared memory", f"no {place}", MISSING, "this system has none; nothing to do")
        return
    usage = shutil.disk_usage(place)
    said = f"{usage.total / _GIB:.2f} GiB, {usage.free / _GIB:.2f} free at {place}"
    cure = "give it 8 GiB or more: --shm-size=8g for a container, or mount -o remount,size=8g"
    yield Row("shared memory", said, OK if usage.free >= _LEAST_SHARED else PROBLEM, cure)


def filesystem(out: Path) -> Iterator[Row]:
    """Tries locks, hard links and reflinks where the output will be; leaves nothing."""
    base = nearest(out)
    place = base / f".doctor.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}"
    try:
        place.mkdir()
        (place / "a").write_bytes(b"autodeco doctor" * 1024)
    except OSError as error:
        cure = "make the directory writable, or choose another with --out"
        yield Row("--out, writable", f"{base}: {error.strerror}", PROBLEM, cure, needed=True)
        return
    try:
        yield Row("--out, writable", str(base))
        yield _locks(place / "a")
        yield from _links(place)
    finally:
        remove(place)


def _locks(file: Path) -> Row:
    import fcntl

    name, cure = "--out, file locks", "choose a directory on a filesystem with locks, with --out"
    with file.open("r+b") as one, file.open("r+b") as two:
        try:
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Row(name, f"refused: {error.strerror}", PROBLEM, cure, needed=True)
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Row(name, "they keep others out")
    return Row(name, "a lock was given twice: it keeps nobody out", PROBLEM, cure, needed=True)


def _links(place: Path) -> Iterator[Row]:
    source, cure = place / "a", "nothing: merged checkpoints hold copies of the base there"
    try:
        (place / "hard").hardlink_to(source)
        linked = (place / "hard").samefile(source)
        yield Row("--out, hard links", "yes" if linked else "no", OK if linked else MISSING, cure)
    except OSError as error:
        yield Row("--out, hard links", f"no: {error.strerror}", MISSING, cure)
    shared = reflink(source, place / "shared")
    cure = "nothing: hard links are tried first, then copies"
    yield Row("--out, reflinks", "yes" if shared else "no", OK if shared else MISSING, cure)
