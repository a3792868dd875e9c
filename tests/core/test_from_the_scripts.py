"""docs/from-the-scripts.md: our side of it runs, top to bottom, on the demo models."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import click
import pytest
from hub_made import Hub

from autodeco import stories
from autodeco.cli import cli

PAGE = Path(__file__).parents[2] / "docs" / "from-the-scripts.md"
SMALL = {
    "run": "--max-steps 2 --global-batch 4 --warmup-steps 1 --constant-steps 0 --max-length 256 "
    "--held-out 0.2 --device cpu --merge none",
    "launch": "--layout tp=1",
    "evaluate": "--evaluate-problems 1 --max-new-tokens 4 --device cpu",
}


def commands() -> list[str]:
    """The lines of the page's blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def words(line: str, variables: dict[str, str]) -> list[str]:
    """The words of a line, as a shell would have them; every variable must be the page's."""
    names = re.findall(r"\$(\w+)", line)
    assert set(names) <= set(variables), line
    filled = re.sub(r"\$(\w+)", lambda match: variables[match[1]], line)
    return shlex.split(filled)


def test_the_page_has_every_name_of_the_published_readme() -> None:
    text = PAGE.read_text()
    names = """fp8_cast_bf16.py nemo_import_<model>.py end2end.sh end2end_120b.sh nemo_export.py
        end2end_235b_a22b.sh nemo_trainer.py merge_autodeco.py NEMO_MODEL_PATH HF_MODEL_PATH
        TRAIN_FP RUN_NAME SAVE_DIR MASTER_ADDR NODE_RANK hf-peft apex-25.09.zip Megatron-LM-main.zip
        NeMo-main.zip nemo_import_deepseek_v3.py nemo_import_gpt_oss_20b.py
        nemo_import_gpt_oss_120b.py nemo_import_llama31_nemotron_8b_v1.py nemo_import_qwen25_7b.py
        nemo_import_qwen3_235_a22b.py nemo_import_qwen3_30_a3b.py"""
    assert [name for name in names.split() if name not in text] == []


def test_every_command_and_option_of_the_page_is_there() -> None:
    """Also those in the tables, which nothing runs."""
    assert isinstance(cli, click.Group)
    variables = dict.fromkeys(re.findall(r"\$(\w+)", PAGE.read_text()), "x")
    for line in commands():
        program, name, *options = words(line, variables)
        known = {opt for param in cli.commands[name].params for opt in param.opts}
        assert program == "autodeco" and {o for o in options if o.startswith("--")} <= known, line
    every = {
        opt
        for command in cli.commands.values()
        for param in command.params
        for opt in param.opts + param.secondary_opts
    }
    ours = [row.split("|")[-2] for row in PAGE.read_text().splitlines() if row.startswith("| ")]
    given = {option for cell in ours for option in re.findall(r"--[a-z][a-z-]*", cell)}
    assert given and given <= every, given - every


@pytest.fixture
def hub(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hub]:
    demo = resources.files(f"autodeco_plugin_{request.param}") / "demo"
    shutil.copytree(str(demo), tmp_path / "published")
    made = Hub(tmp_path / "published", f"owner/{request.param}")
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "hub", ["qwen3", "gpt_oss", "deepseek_v3", "llama31", "qwen25"], indirect=True
)
def test_our_side_runs(hub: Hub, tmp_path: Path) -> None:
    stories.write_records(tmp_path / "train.jsonl", 5, "train", 24)
    stories.write_problems(tmp_path / "problems.jsonl", 5, count=1)
    plugin = hub.model.partition("/")[2]
    places = ("HF_MODEL_PATH", "BF16_MODEL_PATH", "NEMO_MODEL_PATH", "HEADS", "MERGED", "BASE")
    variables = {name: str(tmp_path / name.lower()) for name in (*places, "SAVE_DIR")}
    variables |= {"HF_MODEL_ID": hub.model, "PLUGIN": plugin, "RUN_NAME": "first"}
    variables |= {"TRAIN_FP": str(tmp_path / "train.jsonl")}
    variables |= {"PROBLEMS": str(tmp_path / "problems.jsonl")}
    plain = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    plain |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    plain["HF_HOME"] = str(tmp_path / "home")
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    stored_in_parts, ran = "quantization_config" in config, []
    for line in commands():
        if "$START_TIME" in line:
            (run,) = Path(variables["SAVE_DIR"]).glob("first/*/job.json")
            variables["START_TIME"] = run.parent.name
        program, name, *options = words(line, variables)
        assert program == "autodeco"
        if not stored_in_parts and name in ("cast", "verify") and "$BF16" in line:
            continue  # it is in bfloat16 already
        command = [sys.executable, "-m", "autodeco", name, *options]
        command += shlex.split(SMALL.get(name, ""))
        done = subprocess.run(command, capture_output=True, text=True, env=plain, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
        ran.append(name)
    assert len(ran) >= 8
    published, base = tmp_path / "published", Path(variables["BASE"])
    for file in published.glob("*.safetensors"):
        assert (base / file.name).read_bytes() == file.read_bytes()
    heads = Path(variables["HEADS"])
    again = Path(variables["HEADS"] + "-again")
    for file in ("config.json", "model.safetensors"):
        assert (heads / file).read_bytes() == (again / file).read_bytes()
    assert json.loads((Path(variables["MERGED"]) / "config.json").read_text())["model_type"] == (
        "autodeco"
    )
    assert (Path(variables["SAVE_DIR"]) / "train.sh").stat().st_mode & 0o100
