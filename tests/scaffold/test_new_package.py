"""What ``autodeco plugin new`` writes can be built, installed and checked as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from packages import install, run
from test_scaffold import CONFIG


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_new_package_is_built_installed_and_checked(tmp_path: Path) -> None:
    model = tmp_path / "Stranger-7B"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    autodeco = (sys.executable, "-m", "autodeco")
    written = tmp_path / "package"
    options = ("stranger", "--from", model, "--out", written, "--json")
    told = json.loads(run(*autodeco, "plugin", "new", *options, cwd=tmp_path))
    assert told["trial"]["logits-hf"].startswith("pass"), told["trial"]
    assert told["trial"]["logits-megatron"].startswith("pass"), told["trial"]
    assert told["preset"] == "7b" and not told["left"]

    place = {"PYTHONPATH": str(install(written, tmp_path))}
    rows = json.loads(run(*autodeco, "plugin", "list", "--json", cwd=tmp_path, **place))
    (row,) = (row for row in rows if row["id"] == "stranger")
    assert (row["dist"], row["error"]) == ("autodeco-plugin-stranger", None)
    shown = json.loads(
        run(*autodeco, "plugin", "show", "stranger", "--json", cwd=tmp_path, **place)
    )
    assert shown["presets"][1]["shape"]["hidden_size"] == CONFIG["hidden_size"]
    checked = run(*autodeco, "plugin", "check", "stranger", "--json", cwd=tmp_path, **place)
    assert json.loads(checked)["ok"]
