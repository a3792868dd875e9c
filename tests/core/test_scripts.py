"""The scripts in benchmarks/ and tools/ start: nothing that they import has moved away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")])
SCRIPTS = [path for path in FILES if "__main__" in path.read_text()]  # others are imported by them


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) >= 4


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bug_a_benchmark_imported_a_name_that_had_moved(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, script, "--help"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
