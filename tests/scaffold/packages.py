"""Builds packages and installs them into directories of their own, as a user's pip does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: object, cwd: Path, code: int = 0, **environment: str) -> str:
    """Runs a command; returns its standard output.

    Raises:
        AssertionError: It ends with another exit code.
    """
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def install(source: Path, work: Path) -> Path:
    """Builds a package's wheel and installs it alone into a directory, which it returns."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out, target = work / "wheels", work / "installed"
    options = ("--wheel", "--no-isolation", "--outdir", out)
    run(sys.executable, "-m", "build", "-q", *options, source, cwd=work)
    (wheel,) = out.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index")
    run(*pip, "--target", target, wheel, cwd=work)
    return target
