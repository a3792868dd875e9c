"""Runs of a job in forked processes that are killed, or whose file operations fail, on demand.

Run as a program this file is a server: it imports torch, does one whole run to be warm, and then
forks one process for each request, so that a run costs a second. It works with one thread, because
a thread pool does not survive a fork.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

KILLED = 99  # exit code of a simulated kill
OPERATIONS = (
    *("replace", "rename", "link", "mkdir", "unlink", "rmdir", "fsync", "sendfile"),
    "pwrite",
)
CLOCKS = {"seconds", "tokens_per_second"}
_TARGET_SECOND = ("replace", "rename", "link", "copy_file_range")
_VARIABLE = re.compile(r"\d{8}-\d{6}(-\d+)?|(?<=\.)[0-9a-f]{8}(?=\.partial)|\d+")


def normal(path: str) -> str:
    """A path without what differs from run to run and from step to step."""
    return _VARIABLE.sub("#", path)


class Server:
    """The other end of this file run as a program."""

    def __init__(self, scratch: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._read() == {"ready": True}

    def run(self, options: Mapping[str, Any], **request: Any) -> dict[str, Any]:
        """Runs a job; see `_answer`."""
        assert self._process.stdin is not None
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
        self._process.stdin.write(json.dumps({"options": plain, **request}, default=str) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server ended"
        answer: dict[str, Any] = json.loads(line)
        return answer


class Faults:
    """Counts the file operations below a directory; one of them, by number, can be made to fail.

    Args:
        root: Operations elsewhere do not count.
        index: Which fails, None for none.
        mode: ``kill`` or ``full`` (ENOSPC; a file that it befell cannot be flushed any more).
        when: ``before`` the operation (of a write: when half of it is on the disk) or ``after``.
    """

    def __init__(self, root: Path, index: int | None, mode: str, when: str) -> None:
        self.root, self.index, self.mode, self.when = str(root.resolve()), index, mode, when
        self.points: list[list[str]] = []

    def install(self) -> None:
        import autodeco.convert.random_checkpoint as random_checkpoint

        names = "replace rename link mkdir unlink rmdir fsync sendfile copy_file_range pwrite"
        for name in names.split():
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        random_checkpoint.save_file = self._wrapped("save_file", random_checkpoint.save_file, 1)
        for module in (builtins, io):
            module.open = self._opened(module.open)  # type: ignore[attr-defined]

    def point(self, function: str, target: Any, act: Callable[[], Any], half: Any = None) -> Any:
        path = self._below(target)
        if path is None or (function == "mkdir" and Path(self.root, path).is_dir()):
            return act()  # making a directory that is there touches no disk
        number = len(self.points)
        self.points.append([function, *_call_site(), normal(path)])
        hit = number == self.index
        if hit and self.when == "before":
            if half is not None:
                half()
            self._fail(function)
        result = act()
        if hit and self.when == "after":
            self._fail(function)
        return result

    def _fail(self, function: str) -> None:
        if self.mode == "kill":
            os._exit(KILLED)
        if function == "save_file":  # so it reports errors of the system
            from safetensors import SafetensorError

            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _below(self, target: Any) -> str | None:
        if isinstance(target, int):
            target = Path(f"/proc/self/fd/{target}").readlink()
        path = Path(target)
        path = path.parent.resolve() / path.name  # a link itself is meant, not what it leads to
        root = Path(self.root)
        return str(path.relative_to(root)) if path.is_relative_to(root) else None

    def _wrapped(self, name: str, original: Any, argument: int | None = None) -> Any:
        at = argument if argument is not None else int(name in _TARGET_SECOND)

        def wrapped(*args: Any, **options: Any) -> Any:
            target = args[at] if isinstance(args[at], int) else os.fspath(args[at])
            if options.get("dir_fd") is not None:
                target = Path(f"/proc/self/fd/{options['dir_fd']}").readlink() / target
            half = None
            if name == "pwrite":

                def half() -> None:
                    original(args[0], args[1][: len(args[1]) // 2], args[2])

            if name == "save_file":  # torn: written by Rust, in one go

                def half() -> None:
                    original(*args, **options)
                    os.truncate(target, Path(target).stat().st_size // 2)

            elif name == "copy_file_range":

                def half() -> None:
                    original(*args[:2], args[2] // 2, *args[3:])

            return self.point(name, target, lambda: original(*args, **options), half)

        return wrapped

    def _opened(self, original: Any) -> Any:
        def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return original(file, mode, *args, **options)
            path = os.fspath(file)
            stream = self.point("open", path, lambda: original(file, mode, *args, **options))
            return stream if self._below(path) is None else _Stream(stream, path, self)

        return opened


class _Stream:
    """A file open for writing: its writes and flushes are points."""

    def __init__(self, stream: Any, path: str, faults: Faults) -> None:
        self._stream, self._path, self._faults = stream, path, faults
        self._broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _point(self, function: str, act: Callable[[], Any], half: Any = None) -> Any:
        try:
            return self._faults.point(function, self._path, act, half)
        except OSError:
            self._broken = True
            raise

    def write(self, data: Any) -> Any:
        def half() -> None:
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()

        return self._point("write", lambda: self._stream.write(data), half)

    def flush(self) -> None:
        self._point("flush", self._stream.flush)

    def close(self) -> None:
        self._stream.close()
        if self._broken:  # the system tries to write what is in the buffer once more
            self._broken = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _call_site() -> tuple[str]:
    """Where autodeco is, innermost: the last three of its functions."""
    frame, found = sys._getframe(2), []
    while frame is not None and len(found) < 3:
        code = frame.f_code
        if "/autodeco/" in code.co_filename:
            found.append(f"{Path(code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return (" < ".join(found),)


def outcome(out: Path) -> dict[str, Any]:
    """What must not depend on interruptions, of the one finished run below `out`."""
    runs = sorted(path.parent for path in out.glob("*/*/job.json"))
    assert len(runs) == 1, runs
    run = runs[0]
    others = [p for p in out.glob("*/*") if p != run and [q for q in p.rglob("*") if q.is_file()]]
    assert not others, f"left behind: {others}"
    assert not list(out.rglob("*.partial")), sorted(out.rglob("*.partial"))
    assert not list(out.rglob("*.torn"))
    files = {}
    for folder in ("model", "data", "heads", "merged", "checkpoints"):
        for path in sorted((run / folder).rglob("*")):
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                files[str(path.relative_to(run))] = digest
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    top = sorted(p.name for p in run.iterdir())
    stages = sorted(p.name for p in (run / "stages").iterdir())
    return {
        "files": files,
        "metrics": [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows],
        "top": top,
        "stages": stages,
    }


def finished(out: Path) -> bool:
    """Whether a run below `out` has done its last stage."""
    return bool(list(out.glob("*/*/stages/evaluate.json")))


def _run_job(options: Mapping[str, Any], stages: Sequence[str] | None) -> dict[str, Any]:
    from rich.console import Console

    from autodeco.pipeline import run_job
    from autodeco.registry import Registry
    from autodeco.settings import resolve

    registry, screen = Registry(), io.StringIO()
    job = resolve({"plugin": "qwen3", "preset": "debug", **options}, None, registry).job
    summary = run_job(
        job, registry=registry, stages=stages, console=Console(file=screen, width=300)
    )
    return {"seconds": {r[0]: r[2] for r in summary.rows}, "screen": screen.getvalue()}


def _child(request: Mapping[str, Any], report: Path) -> int:
    from autodeco.errors import AutodecoError

    fault = request.get("fault") or {"index": None, "mode": "kill", "when": "before"}
    faults = Faults(Path(request["options"]["out"]).parent, **fault)
    write = Path.write_text
    if "fault" in request:
        faults.install()
    try:
        answer, code = _run_job(request["options"], request.get("stages")), 0
    except AutodecoError as error:
        answer, code = {"error": str(error), "kind": type(error).__name__}, error.exit_code
    except BaseException as error:
        kind = type(error).__name__
        answer, code = {"error": traceback.format_exc(), "kind": kind, "raw": True}, 1
    answer["points"] = faults.points if request.get("trace") else len(faults.points)
    if fault["index"] is not None and fault["index"] < len(faults.points):
        answer["point"] = faults.points[fault["index"]]
    write(report, json.dumps(answer))
    return code


def _kill_when(pid: int, plan: Mapping[str, Any]) -> None:
    """Waits until a file of the pattern is there, then for `delay` seconds; then kills."""
    root, pattern, status = Path(plan["root"]), plan["pattern"], 0
    while not status and pattern and not any(root.glob(pattern)):
        time.sleep(0.001)
        status = _ended(pid)
    time.sleep(plan["delay"])
    os.kill(pid, signal.SIGKILL)  # a process not yet waited for can be killed without harm


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _answer(request: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """One request.

    Keys: options (of the job), stages, fault (index, mode, when; None: count only), trace (return
    the points), kill (root, pattern, delay). The answer has code, and of a run that was not killed
    what `_child` says.
    """
    report = scratch / f"report-{os.getpid()}.json"
    report.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sink = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(sink, number)
            code = _child(request, report)
        finally:
            os._exit(code)
    if request.get("kill"):
        _kill_when(pid, request["kill"])
    _, status = os.waitpid(pid, 0)
    answer = json.loads(report.read_text()) if report.exists() else {}
    return {**answer, "code": os.waitstatus_to_exitcode(status)}


def _serve(scratch: Path) -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(dir=scratch) as warm:
        options = {"out": Path(warm), "task_samples": 16, "max_steps": 1, "eval_every": 1000}
        _run_job({**options, "evaluate_problems": 1, "max_new_tokens": 1}, None)
    line = json.dumps({"ready": True})
    while line:
        answers.write(line + "\n")
        answers.flush()
        request = sys.stdin.readline()
        line = json.dumps(_answer(json.loads(request), scratch)) if request else ""


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
