"""Computes with a new plugin's small model, in a process of its own."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path

CHECKS = ("presets", "map", "round-trip", "logits-hf", "logits-megatron")


def try_plugin(source: Path, package: str) -> dict[str, str]:
    """Runs those of the kit's checks that compute.

    Args:
        source: The folder that the package lies in.
        package: Its name.

    Returns:
        Check -> what was found, beginning with "pass", "fail" or "not run".
    """
    from autodeco.errors import AutodecoError
    from autodeco.registry import PluginRow
    from autodeco.testing.checks import NotRun, check_named
    from autodeco.testing.context import Context

    sys.path.insert(0, str(source))
    plugin = importlib.import_module(package).plugin
    row = PluginRow(plugin.family.id, package, "new", plugin, None)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as work:
        context = Context(row, Path(work))
        for name in CHECKS:
            try:
                found[name] = "pass: " + check_named(name).run(context)
            except NotRun as error:
                found[name] = f"not run: {error.what}"
            except AutodecoError as error:
                found[name] = f"fail: {error.what}"
            except Exception as error:  # a stranger's architecture may break anything
                found[name] = f"fail: {type(error).__name__}: {error}"
            if found[name].startswith("fail"):
                break
    return found


if __name__ == "__main__":
    told = try_plugin(Path(sys.argv[1]), sys.argv[2])
    print(json.dumps(told))
