"""Every file operation of a cast and of an import, interrupted: killed there, or a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("conversion_worker.py")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("what", ["cast", "import"])
def test_a_conversion_survives_a_fault_at_every_file_operation(what: str, tmp_path: Path) -> None:
    if what == "import":
        pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    package = Path(str(import_module("autodeco_plugin_gpt_oss").__file__)).parent
    done = subprocess.run(
        [sys.executable, WORKER, what, package / "demo", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["problems"], "\n".join(found["problems"])
    assert found["broken"] > 60 and found["points"] > 40
