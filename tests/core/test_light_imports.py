"""The light floors import no torch, core names no family, and imports point down."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "core" / "src" / "autodeco"


@pytest.mark.parametrize(
    "module",
    [
        "autodeco",
        "autodeco.cli",
        "autodeco.registry",
        "autodeco.pipeline",
        "autodeco.settings",
        "autodeco.scaffold.writing",
        "autodeco_plugin_qwen3",
    ],
)
def test_light_module_loads_no_heavy_package(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'megatron') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_core_names_no_family() -> None:
    names = re.compile(r"qwen|gpt.?oss|deepseek|llama|mixtral|olmo", re.IGNORECASE)
    found = [
        f"{path.relative_to(CORE)}:{number}: {line.strip()}"
        for path in CORE.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if names.search(line)
    ]
    assert found == []


def test_no_python_file_is_over_400_lines() -> None:
    root = CORE.parents[2]
    folders = [root / name for name in ("core", "plugins", "tests", "tools", "benchmarks")]
    long = {
        str(path.relative_to(root)): count
        for folder in folders
        for path in folder.rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert long == {}
