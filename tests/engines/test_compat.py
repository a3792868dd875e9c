"""Every cure is needed, works, and is left out where it has no business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has CUDA")

_BEGIN = """
import json, warnings
warnings.simplefilter("ignore")
import torch
from autodeco.engines.megatron.compat import CURES, apply_cures
needed = lambda: {cure.name: cure.needed() for cure in CURES}
"""
_CURED = """
before = needed()
apply_cures()
after = needed()
import sys
from pathlib import Path
from autodeco.convert.random_checkpoint import write_random_checkpoint
from autodeco.convert.source import open_source
from autodeco.engines.select import build_engine
from autodeco.job import Job
from autodeco_plugin_qwen3.family import FAMILY
model = write_random_checkpoint(FAMILY, FAMILY.preset("debug-moe"), Path(sys.argv[1]))
job = Job(preset="debug-moe", model=model, engine="megatron", device="cpu")
engine = build_engine(job, open_source(FAMILY, job), FAMILY)
print(json.dumps({"before": before, "after": after, "engine": engine.name}))
"""
_WITH_CUDA = """
before = needed()
torch.cuda.is_available = lambda: True
apply_cures()
print(json.dumps({"before": before, "after": needed()}))
"""


def python(code: str, *arguments: str) -> Any:
    """What a fresh process prints: a cure that was applied once is no longer needed."""
    command = [sys.executable, "-c", _BEGIN + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1])


def test_every_cure_is_needed_and_cures(tmp_path: Path) -> None:
    found = python(_CURED, str(tmp_path / "model"))
    unneeded = [name for name, needed in found["before"].items() if not needed]
    assert not unneeded, f"megatron-core no longer needs: {unneeded}; remove it from compat.py"
    assert not any(found["after"].values()), found["after"]
    assert found["engine"] == "megatron"


def test_bug_where_there_was_cuda_the_router_lacked_its_product() -> None:
    found = python(_WITH_CUDA)
    changed = [name for name, needed in found["before"].items() if needed != found["after"][name]]
    assert "the router's product is undefined without Transformer Engine" in changed
    assert "the current device is asked of CUDA" not in changed
