"""The command line: help, JSON, exit codes, tracebacks, and every command on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from autodeco import __version__, errors, pipeline
from autodeco.cli import cli, main
from autodeco.errors import EXIT_CODES, AutodecoError
from autodeco.stories import write_records

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
STAGES = ("import", "train", "export", "merge", "evaluate")
TINY = ("--plugin", "qwen3", "--preset", "debug", "--task-samples", "16", "--max-steps", "2")
SHORT = ("--evaluate-problems", "2", "--max-new-tokens", "4")


def commands(group: click.Group = cli, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


COMMANDS = dict(commands())


def run_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    """Runs a command with --json; the whole of its standard output must be one document."""
    capsys.readouterr()
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def failing(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    shown = capsys.readouterr()
    return stopped.value.code, shown.out, shown.err


def tensors(file: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {name: value.numpy().tobytes() for name, value in load_file(file).items()}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one tiny model."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The options of a tiny job, with few held-out samples."""
    held_out = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    write_records(held_out, 1, "heldout", 8)
    return (*TINY, "--eval-data", str(held_out))


@pytest.fixture(scope="module")
def tiny(out: Path, job: tuple[str, ...]) -> Path:
    """One whole run but for its evaluation."""
    for stage in ("train", "export", "merge"):
        main([stage, *job, "--out", str(out)])
    (found,) = (out / "qwen3-debug").iterdir()
    return found


# --- what is promised of every command


def test_all_commands_are_there() -> None:
    alone = ["run", "split", "generate", "launch", "doctor", "plan", "cast", "verify", "fetch"]
    grouped = {"data show", "plugin list", "plugin show", "plugin check", "plugin new"}
    assert set(COMMANDS) == {*STAGES, *alone, *grouped}


@pytest.mark.parametrize("name", ["", "data", "plugin", *COMMANDS])
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert f"Example: autodeco {name}".rstrip() in " ".join(shown.split())


@pytest.mark.parametrize("name", list(COMMANDS))
def test_an_example_names_only_options_that_exist(name: str) -> None:
    command = COMMANDS[name]
    text = " ".join((command.help or "").split())
    for example in re.findall(rf"Example: autodeco {name}( .*?)(?= On paths|$)", text):
        known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"--[a-z-]+", example)) <= known, example


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_but_the_plain_ones_has_a_help(name: str) -> None:
    plain = {"--max-new-tokens", "--seed", "--max-length", "--eos-loss"}
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option) and not plain.intersection(parameter.opts):
            assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_takes_json(name: str) -> None:
    assert any("--json" in p.opts for p in COMMANDS[name].params)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_alone_takes_the_options_of_run(stage: str) -> None:
    def options(name: str) -> dict[str, Any]:
        return {p.opts[0]: (p.type.name, p.is_flag, p.default) for p in COMMANDS[name].params}  # type: ignore[attr-defined]

    whole, alone = options("run"), options(stage)
    assert {name: alone.get(name) for name in whole} == whole
    on_paths = (
        {"--output", "--input", "--target", "--heads-dir", "--format", "--nemo-python"}
        if stage != "train"
        else set()
    )
    assert set(alone) - set(whole) <= on_paths


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.strip() == f"autodeco, version {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "--version",
        "plugin list",
        "plugin show qwen3",
        "run --help",
        "run --plugin qwen3 --dry-run",
    ],
)
def test_looking_around_loads_no_heavy_package(arguments: str) -> None:
    heavy = "('torch', 'transformers', 'megatron', 'safetensors', 'numpy')"
    code = f"""
import sys
from autodeco.cli import main
main({arguments.split()!r})
print("loaded", [name for name in {heavy} if name in sys.modules])
"""
    assert python(code).splitlines()[-1] == "loaded []"


# --- exit codes


def test_exit_codes_are_documented_as_they_are() -> None:
    table = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", DOCS.read_text(), re.MULTILINE))
    plain = {int(code): text.replace("`", "") for code, text in table.items()}
    assert plain == EXIT_CODES
    classes = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, AutodecoError) and kind is not AutodecoError
    ]
    codes = [kind.exit_code for kind in classes]
    assert sorted(codes) == list(range(2, 9)), "each class has a code of its own"


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (errors.UsageError("it is so", fix="do that"), 2, "do: do that"),
        (errors.PluginError("it is so", who="plugin x"), 3, "plugin x: it is so"),
        (errors.DataError("it is so", where="file:3"), 4, "where: file:3"),
        (errors.WeightsError("it is so"), 5, "it is so"),
        (errors.RunError("it is so"), 6, "it is so"),
        (errors.EnvironmentProblem("it is so"), 7, "it is so"),
        (errors.NumericsError("it is so"), 8, "it is so"),
        (OSError(28, "No space left on device", "some/file"), 7, "where: some/file"),
        (MemoryError(), 7, "--micro-batch-tokens"),
        (KeyboardInterrupt(), 130, "the same command continues"),
        (ZeroDivisionError("it is so"), 1, "a defect of autodeco: ZeroDivisionError: it is so"),
        (FileNotFoundError(2, "No such file", "x"), 1, "a defect of autodeco"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_is_raised_gives_its_exit_code(
    raised: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(pipeline, "run_job", fail)
    command = ("run", *TINY, "--out", tmp_path)
    found, shown, said = failing(capsys, *command)
    assert (found, shown) == (code, "") and message in said
    assert "Traceback" not in said
    if isinstance(raised, KeyboardInterrupt):
        return
    # with --debug the traceback comes too, and the exit code stays
    found, shown, said = failing(capsys, "--debug", *command)
    assert (found, shown) == (code, "") and message in said
    assert said.startswith("Traceback") and "in fail" in said
    if code == 1:
        assert "autodeco --debug" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--lerning-rate", "1"], "--learning-rate"),
        (["rum"], "No such command 'rum'"),
        (["run", "--heads", "left"], "'left' is not one of"),
        (["run", "--seed", "x"], "'x' is not a valid integer"),
        (["split", "--input", "a"], "Missing option '--output'"),
        (["generate", "--model", "a", "--prompt", "b", "--max-new-tokens", "0"], "x>=1"),
        (["data", "show", "--data", "a", "--model", "b", "--drop", "2"], "0<=x<=1"),
        (["merge", "--output", "x", "--model", "y"], "--heads-dir is missing"),
        (["export", "--output", "x", "--input", "y", "--seed", "3"], "--seed has no effect"),
        (["evaluate", "--output", "x", "--dry-run"], "--dry-run are for a job"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, said = failing(capsys, *arguments)
    assert (code, shown) == (2, "") and message in said


# --- the commands, on one tiny run


def test_run_prints_one_json_document(
    tmp_path: Path, job: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    # brackets that rich would take for markup
    told = run_json(capsys, "run", *job, *SHORT, "--out", tmp_path / "[red]", "--name", "a[b]")
    assert [row["stage"] for row in told["stages"]] == list(pipeline.STAGES)
    assert Path(told["run"]).parent == tmp_path / "[red]" / "a[b]"
    assert told["evaluation"]["settings"]


@pytest.mark.parametrize("stage", ["import", "train", "export", "merge", "evaluate"])
def test_stages_print_one_json_document(
    stage: str, out: Path, tiny: Path, job: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    told = run_json(capsys, stage, *job, *SHORT, "--out", out, "--resume", tiny)
    assert told["run"] == str(tiny)
    assert told["stages"][-1]["stage"] == stage


def test_people_see_stages_and_paths_on_the_screen(
    out: Path,
    tiny: Path,
    job: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    main(["merge", *job, "--out", str(out), "--merge", "native"])
    shown = capsys.readouterr().out
    assert f"run directory {tiny}" in shown and f"{tiny / 'merged'} (native layout" in shown


def test_plugin_commands(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = (row for row in run_json(capsys, "plugin", "list") if row["id"] == "qwen3")
    assert row["error"] is None and {"demo", "debug", "8b"} <= set(row["presets"])
    shown = run_json(capsys, "plugin", "show", "qwen-3")
    assert shown["id"] == "qwen3" and {p["name"] for p in shown["presets"]} == set(row["presets"])
    main(["plugin", "list"])
    assert "qwen3" in capsys.readouterr().out
    main(["plugin", "show", "qwen3"])
    assert "30b-a3b" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["native", "autodeco"])
def test_merge_then_split_gives_the_same_bytes(
    layout: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, heads = tmp_path / "merged", tmp_path / "heads"
    told = run_json(
        capsys,
        *("merge", "--model", tiny / "model", "--heads-dir", tiny / "heads"),
        *("--output", merged, "--merge", layout),
    )
    assert told["output"] == str(merged) and layout in told["made"]
    base = tmp_path / "base"
    told = run_json(capsys, "split", "--input", merged, "--output", heads, "--base", base)
    assert told == {"output": str(heads), "base": str(base)}
    assert tensors(base / "model.safetensors") == tensors(tiny / "model" / "model.safetensors")
    for file in (tiny / "heads").iterdir():
        assert (heads / file.name).read_bytes() == file.read_bytes(), file.name
    again = (heads / "model.safetensors").read_bytes()
    code, _, said = failing(capsys, "split", "--input", merged, "--output", heads)
    assert code == 2 and "exists already" in said
    assert (heads / "model.safetensors").read_bytes() == again


def test_export_on_paths(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = tmp_path / "heads"
    command = ("export", "--input", tiny, "--output", heads, "--checkpoint", "0")
    told = run_json(capsys, *command, "--save-dtype", "bfloat16")
    assert told["output"] == str(heads) and told["checkpoint"].endswith("-0-0")
    assert json.loads((heads / "config.json").read_text())["dtype"] == "bfloat16"


def test_evaluate_on_paths(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run_json(
        capsys,
        *("evaluate", "--model", tiny / "merged", "--output", tmp_path / "report", *SHORT),
        *("--problems", tiny / "data" / "problems.jsonl"),
    )
    assert told == json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert (tmp_path / "report" / "report.html").exists()


def test_data_show(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("data", "show", "--data", tiny / "data" / "train.jsonl", "--model", tiny / "model")
    shown = run_json(capsys, *command, "--limit", "2")
    assert [sample["line"] for sample in shown] == [1, 2]
    assert {"kept", "masked"} <= set(shown[0]["states"])
    main([*map(str, command), "--limit", "1"])
    assert "".join(shown[0]["tokens"]).strip()[:20] in capsys.readouterr().out


def test_generate_prints_the_text(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", "--model", tiny / "merged", "--prompt", "Ann has 3", "--seed", "4")
    told = run_json(capsys, *command, "--max-new-tokens", "6")
    count = len(told["tokens"])
    assert 1 <= count <= 6 and told["text"] == "".join(told["tokens"])
    assert len(told["temperature"]) == len(told["top_p"]) == count
    assert told == run_json(capsys, *command, "--max-new-tokens", "6"), "the seed decides"
    main([*map(str, command), "--max-new-tokens", "6"])
    assert "".join(told["text"].split()) in "".join(capsys.readouterr().out.split())
    # base and heads apart give the same
    apart = ("generate", "--model", tiny / "model", "--heads-dir", tiny / "heads", *command[3:])
    assert told == run_json(capsys, *apart, "--max-new-tokens", "6")


def test_bug_an_empty_prompt_and_a_missing_model_were_misnamed(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = failing(capsys, "generate", "--model", tiny / "merged", "--prompt", "")
    assert code == 4 and "the prompt has no token" in said
    code, _, said = failing(capsys, "generate", "--model", tiny / "nowhere", "--prompt", "x")
    assert code == 5 and "no such checkpoint" in said and str(tiny / "nowhere") in said


@pytest.mark.parametrize(
    ("heads", "fixed", "free"),
    [("temperature", "top_p", "temperature"), ("top-p", "temperature", "top_p")],
)
def test_one_head_alone_goes_the_whole_way(
    heads: str,
    fixed: str,
    free: str,
    tmp_path: Path,
    job: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = run_json(capsys, "run", *job, *SHORT, "--heads", heads, "--out", tmp_path)
    merged = Path(told["run"]) / "merged"
    text = run_json(capsys, "generate", "--model", merged, "--prompt", "A", "--max-new-tokens", "6")
    assert set(text[fixed]) == {1.0}, "the missing head means 1"
    assert all(0 < value < 2 and value != 1.0 for value in text[free])


def test_init_heads_starts_from_trained_heads(
    tiny: Path, tmp_path: Path, job: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    started = run_json(capsys, "train", *job, "--init-heads", tiny / "heads", "--out", tmp_path)
    (first,) = Path(started["run"]).glob("checkpoints/*-0-0")
    before, after = (
        tensors(tiny / "heads" / "model.safetensors"),
        tensors(first / "model.safetensors"),
    )
    assert before and before == after
