"""Merge and split on paths, killed or with a full disk at each of their file operations."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crash_tools import KILLED, Faults

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
from tiny import save_tiny, save_tiny_heads, tiny_model

from autodeco.errors import AutodecoError
from autodeco.heads.merge import merge, split

CASES = ["native", "native copy", "autodeco", "split native", "split autodeco"]


def digests(directory: Path) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def untouched(directory: Path) -> dict[str, Any]:
    status = {p.name: p.stat() for p in directory.iterdir() if p.is_file()}
    times = {name: (s.st_ino, s.st_mtime_ns, s.st_blocks) for name, s in status.items()}
    return {"times": times, **digests(directory)}


def forked(act: Callable[[], object], root: Path, **fault: Any) -> tuple[int, int]:
    """Runs it in a fork with one fault; returns the exit code and the number of operations."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            faults = Faults(root, fault.get("index"), fault.get("mode", "kill"), fault["when"])
            faults.install()
            act()
            code = 0
        except AutodecoError as error:
            code = error.exit_code
        finally:
            os.write(writer, json.dumps(len(faults.points)).encode())
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as stream:
        text = stream.read()
    return os.waitstatus_to_exitcode(status), json.loads(text or "0")


def actions(case: str, place: Path) -> tuple[Path, Callable[[Path], object], list[str]]:
    """What must stay as it is, what is done in a directory, and what that makes there."""
    base = save_tiny(tiny_model(tie_word_embeddings=True), place / "base", "16KB")
    heads = save_tiny_heads(place / "heads", base)
    if not case.startswith("split"):
        layout, _, copy = case.partition(" ")
        return (
            base,
            lambda at: merge(base, heads, at / "m", layout=layout, copy=bool(copy)),
            ["m"],
        )
    merged = merge(base, heads, place / "merged", layout=case.split()[1]).path
    return merged, lambda at: split(merged, at / "h", base=at / "b"), ["h", "b"]


def check_every(case: str, tmp_path: Path, step: int) -> None:
    torch.set_num_threads(1)
    source, act, made = actions(case, tmp_path)
    whole = tmp_path / "whole"
    whole.mkdir()
    code, count = forked(lambda: act(whole), whole, when="before")
    assert code == 0 and count > 10
    expected, before = digests(whole), untouched(source)
    tried = 0
    for index in range(0, count, step):
        for mode, when in (("kill", "before"), ("kill", "after"), ("full", "before")):
            at = tmp_path / f"{mode}-{when}-{index}"
            at.mkdir()
            code, _ = forked(lambda at=at: act(at), at, index=index, mode=mode, when=when)
            assert code in ((KILLED,) if mode == "kill" else (0, 7)), (case, index, mode, code)
            assert untouched(source) == before
            for name in made:  # whole, or not there
                if (at / name).exists():
                    wanted = {k: v for k, v in expected.items() if k.startswith(name + "/")}
                    assert {f"{name}/{k}": v for k, v in digests(at / name).items()} == wanted
            if not all((at / name).exists() for name in made):
                assert forked(lambda at=at: act(at), at, when="before")[0] == 0
                assert digests(at) == expected, (case, index, mode, when)
            tried += 1
    print(f"{case}: {count} operations, {tried} faults")


@pytest.mark.parametrize("case", CASES)
def test_some_faults(tmp_path: Path, case: str) -> None:
    check_every(case, tmp_path, 17)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_fault(tmp_path: Path, case: str) -> None:
    check_every(case, tmp_path, 1)
