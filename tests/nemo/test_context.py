"""``context/`` of a NeMo 2 checkpoint: what goes to NeMo's Python, and what may come back."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import CASES

from autodeco.cli import main
from autodeco.convert import nemo_context, nemo_context_script
from autodeco.convert.nemo_context import CONTEXT, check_python, write_context
from autodeco.errors import EnvironmentProblem, WeightsError

NEMO = os.environ.get("AUTODECO_NEMO_PYTHON", "")
ENGINE = os.environ.get("AUTODECO_NEMO_TRANSFORMER_ENGINE", "")
CASE = CASES["qwen3-moe"]
ARCHITECTURE = CASE.family.architecture(CASE.preset.architecture)
SHAPE = CASE.preset.shape
_READ = """
import json, os, sys
from pathlib import Path
assert sys.argv[1].endswith("nemo_context_script.py")
request = json.loads(Path(sys.argv[2]).read_text())
output, answer = Path(request["output"]), Path(request["answer"])
"""
_WRITE = """
(output / "io.json").write_text("{}")
(output / "model.yaml").write_text("a: 1")
answer.write_text(json.dumps({"changed": {}, "versions": {"nemo_toolkit": "0"}}))
"""


def python_that(directory: Path, code: str) -> Path:
    """A program in the place of NeMo's Python."""
    body, path = directory / "body.py", directory / "python"
    body.write_text(_READ + code)
    # without "-W ignore"; what is left are the script and the request
    path.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" -c "$(cat {body})" "$@"\n')
    path.chmod(0o755)
    return path


def run(*command: str | Path) -> int:
    try:
        main([str(word) for word in command])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def asked(tmp_path: Path, code: str, **options: Any) -> dict[str, Any]:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    python = python_that(tmp_path, code)
    return write_context(python, tmp_path, ARCHITECTURE, SHAPE, checkpoint, **options)


def test_the_request_says_all_and_the_launcher_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    seen = tmp_path / "seen.json"
    names = "RANK", "SLURM_PROCID", "PYTHONPATH", "CUDA_VISIBLE_DEVICES"
    code = f"values = [os.environ.get(name) for name in {names!r}]\n"
    code += f"Path({str(seen)!r}).write_text(json.dumps([request, values]))"
    answer = asked(tmp_path, code + _WRITE)
    assert answer["versions"] == {"nemo_toolkit": "0"}
    request, environment = json.loads(seen.read_text())
    assert environment == [None, None, None, ""]
    assert request["importer"] == ARCHITECTURE.nemo
    assert request["model"] == str(tmp_path)
    assert request["sizes"] == {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 1024,
        "kv_channels": 24,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 48,
    }
    assert {p.name for p in (tmp_path / "checkpoint").iterdir()} == {CONTEXT}
    assert {p.name for p in (tmp_path / "checkpoint" / CONTEXT).iterdir()} == {
        "io.json",
        "model.yaml",
    }


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        ("sys.exit('it is broken')", EnvironmentProblem, "exit status 1: it is broken"),
        ("answer.write_text('{}')", EnvironmentProblem, "wrote no context/io.json"),
        (_WRITE + "(output / 'model.yaml').write_text('')", EnvironmentProblem, "model.yaml"),
        (_WRITE + "(output / 'io.json').write_text('no json')", WeightsError, "JSON"),
        (
            "answer.write_text(json.dumps({'error': 'No nemo', 'kind': 'environment'}))",
            EnvironmentProblem,
            "No nemo",
        ),
        (
            "answer.write_text(json.dumps({'error': 'ValueError: odd', 'kind': 'weights'}))",
            WeightsError,
            "ValueError: odd",
        ),
    ],
)
def test_a_failure_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, code: str, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said) as raised:
        asked(tmp_path, code)
    assert raised.value.fix  # type: ignore[attr-defined]
    assert not list((tmp_path / "checkpoint").iterdir())


def test_who_does_not_end_is_ended(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"did not end within 0\.2 s"):
        asked(tmp_path, "import time; time.sleep(60)", seconds=0.2)
    assert not list((tmp_path / "checkpoint").iterdir())


def test_the_python_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with pytest.raises(EnvironmentProblem, match="no program"):
        check_python(plain, ARCHITECTURE)
    with pytest.raises(EnvironmentProblem, match="no program"):
        check_python(tmp_path / "missing", ARCHITECTURE)
    with pytest.raises(WeightsError, match="no importer of NeMo"):
        check_python(Path(sys.executable), dataclasses.replace(ARCHITECTURE, nemo=""))


def test_without_nemo_the_script_says_so(tmp_path: Path) -> None:
    """The script itself, under a Python that has no NeMo."""
    model = tmp_path / "model"
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    with pytest.raises(EnvironmentProblem, match="No module named 'nemo'"):
        write_context(Path(sys.executable), model, ARCHITECTURE, SHAPE, checkpoint)


def test_the_script_needs_nothing_of_ours() -> None:
    text = Path(nemo_context_script.__file__).read_text()
    assert "autodeco" not in text and "pickle" not in text
    assert "pickle" not in Path(nemo_context.__file__).read_text().replace("unpickled", "")


def test_sizes_that_nemo_leaves_are_set_and_told() -> None:
    config = dataclasses.make_dataclass("Config", [("a", int), ("b", int)])(1, 2)
    assert nemo_context_script.fit(config, {"a": 1, "b": 3}) == {"b": 3}
    assert (config.a, config.b) == (1, 3)


def test_import_takes_the_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    model = CASES["qwen3"].write(tmp_path / "model")
    output, python = tmp_path / "out", python_that(tmp_path, _WRITE)
    command = ["import", "--plugin", "qwen3", "--preset", "debug", "--model", model]
    command += ["--format", "torch_dist", "--output", output, "--nemo-python"]
    assert run(*command, tmp_path / "missing") == 7
    assert not output.exists()
    assert run(*command, python) == 0
    assert "context/ written by nemo_toolkit 0" in capsys.readouterr().out
    assert (output / CONTEXT / "io.json").exists() and (output / "weights").is_dir()
    assert run(*command, python) == 0
    assert "context/ was there" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not NEMO, reason="AUTODECO_NEMO_PYTHON names no Python that has NeMo")
@pytest.mark.parametrize("name", sorted(CASES))
def test_nemo_reads_what_the_import_wrote(name: str, tmp_path: Path) -> None:
    """The real one: it writes the context, builds the model from it, and reads the weights."""
    case = CASES[name]
    model = case.write(tmp_path / "model")
    output, report = tmp_path / "out", tmp_path / "report.json"
    command = ["import", "--plugin", case.family.id, "--preset", case.preset_name]
    command += ["--model", model, "--format", "torch_dist", "--output", output]
    assert run(*command, "--nemo-python", NEMO) == 0
    spec = "te" if ENGINE else "local"
    if name == "deepseek_v3" and not ENGINE:
        return  # NeMo builds latent attention with Transformer Engine alone
    worker = Path(__file__).with_name("read_worker.py")
    options = [ENGINE] if ENGINE else []
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    subprocess.run([NEMO, worker, spec, output, report, *options], env=environment, check=True)
    found = json.loads(report.read_text())
    known = json.loads((Path(__file__).parent / "read.json").read_text())[name]
    assert len(found) > 10
    if ENGINE:
        assert found == known  # what NeMo read of its own importer's checkpoint
    else:
        # modules of the local spec have other names, and norms of their own
        assert set(found.values()) == set(known.values())
