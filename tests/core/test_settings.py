"""Where each value of a job comes from, and what a configuration file may hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from autodeco.cli import main
from autodeco.errors import UsageError
from autodeco.job import Job
from autodeco.job_values import coerce_values
from autodeco.registry import Registry
from autodeco.run_directory import RunDirectory, record_job
from autodeco.settings import PUBLISHED_RECIPE, Resolved, read_config, resolve

FIELDS = {item.name: item for item in dataclasses.fields(Job)}


def resolved(config: Path | None = None, **command_line: Any) -> Resolved:
    return resolve({"plugin": "qwen3", "preset": "debug", **command_line}, config, Registry())


def write_config(path: Path, values: dict[str, Any]) -> Path:
    if path.suffix == ".toml":
        tables = {name: value for name, value in values.items() if isinstance(value, dict)}
        lines = [f"{n} = {json.dumps(v)}" for n, v in values.items() if n not in tables]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in table.items())]
        path.write_text("\n".join(lines))
    else:
        path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    return path


def another_value(item: dataclasses.Field[Any]) -> Any:
    """A value that is legal for the field and not its default."""
    hint = get_type_hints(Job)[item.name]
    kinds = {hint, *get_args(hint)}
    if item.metadata["choices"]:
        return next(c for c in item.metadata["choices"] if c != item.default)
    if Path in kinds:
        return Path("some/where")
    if bool in kinds:
        return not item.default
    if float in kinds:
        return 0.375
    if int in kinds:
        return 7
    return {"thinking": False} if item.default is dataclasses.MISSING else "text"


EVERYTHING = {name: another_value(item) for name, item in FIELDS.items()}
EVERYTHING |= {"checkpoint": "7", "allow_change": "seed,eos-loss"}  # text, but not any text
EVERYTHING |= {"time_limit": "3h50m", "dist_timeout": 5.5}


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


@pytest.mark.parametrize("ending", [".yaml", ".yml", ".toml", ".json"])
def test_command_line_beats_file_beats_preset_beats_default(tmp_path: Path, ending: str) -> None:
    config = write_config(tmp_path / f"job{ending}", {"seed": 5, "max_steps": 9, "keep": 4})
    found = resolved(config, seed=6)
    expected = {
        "seed": (6, "command line"),
        "max_steps": (9, f"file {config}"),  # the preset has 4
        "keep": (4, f"file {config}"),
        "global_batch": (8, "preset debug"),  # the default is 32
        "warmup_steps": (20, "default"),
    }
    assert {
        name: (getattr(found.job, name), found.provenance[name]) for name in expected
    } == expected
    assert set(found.provenance) == set(FIELDS)


def test_published_recipe_stands_between_preset_and_file(tmp_path: Path) -> None:
    config = write_config(tmp_path / "job.yaml", {"epochs": 3, "recipe": "published"})
    found = resolved(config, clip=2.0)
    given = {"epochs": 3, "clip": 2.0}
    for name, value in PUBLISHED_RECIPE.items():
        assert getattr(found.job, name) == given.get(name, value), name
        if name not in given:
            assert found.provenance[name] == "--recipe published"
    assert found.provenance["epochs"] == f"file {config}"
    # what the published recipe leaves open stays as the preset has it
    assert (found.job.max_steps, found.provenance["max_steps"]) == (4, "preset debug")
    undone = resolved(config, recipe="default")
    assert undone.job.objective == "nll" and undone.provenance["recipe"] == "command line"


def test_published_recipe_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--plugin", "qwen3", "--recipe", "published", "--dry-run", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert {name: shown["job"][name] for name in PUBLISHED_RECIPE} == dict(PUBLISHED_RECIPE)


def test_origin_of_a_plugin_and_preset_that_were_not_given(tmp_path: Path) -> None:
    found = resolve({"plugin": "qwen-3"}, None, Registry())
    assert (found.job.plugin, found.job.preset) == ("qwen3", "demo")
    assert found.provenance["plugin"] == "command line"
    assert found.provenance["preset"] == "the family's default preset"
    # a null in the file gives nothing, so the file is not where the value came from
    config = write_config(tmp_path / "job.json", {"plugin": "qwen3", "preset": None})
    found = resolve({}, config, Registry())
    assert found.provenance["preset"] == "the family's default preset"


@pytest.mark.parametrize("ending", [".yaml", ".toml", ".json"])
def test_every_field_survives_a_file(tmp_path: Path, ending: str) -> None:
    assert read_config(write_config(tmp_path / f"job{ending}", plain(EVERYTHING))) == EVERYTHING


def test_every_field_survives_job_json(tmp_path: Path) -> None:
    # resume and allow_change are about one call, not about the run; paths hold from anywhere
    job = Job(**EVERYTHING)
    record_job(RunDirectory(tmp_path, False), job, "digest", {"data": "digest"})
    absolute = {n: v.absolute() if isinstance(v, Path) else v for n, v in EVERYTHING.items()}
    expected = {**absolute, "resume": "auto", "allow_change": ""}
    assert read_config(tmp_path / "job.json") == expected
    record_job(RunDirectory(tmp_path, False), Job(), "digest", {})
    assert Job(**read_config(tmp_path / "job.json")) == Job(out=Path("runs").absolute())


def test_every_field_survives_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    values = {**EVERYTHING, "plugin": "qwen3", "preset": "debug", "model": None}
    arguments: list[str] = []
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1))
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            arguments += [option, text]
    main(["run", *arguments, "--dry-run", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["job"] == plain(values)
    origins = {name for name, origin in shown["provenance"].items() if origin == "command line"}
    assert origins == set(FIELDS) - {"model"}


@pytest.mark.parametrize(
    "name", [n for n, item in FIELDS.items() if isinstance(item.default, bool)]
)
def test_bug_a_flag_that_a_file_sets_could_not_be_unset(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    option = name.replace("_", "-")
    for in_file, flag in ((True, f"--no-{option}"), (False, f"--{option}")):
        config = write_config(tmp_path / "job.yaml", {name: in_file, "plugin": "qwen3"})
        main(["run", "--config", str(config), flag, "--dry-run", "--json"])
        shown = json.loads(capsys.readouterr().out)
        assert shown["job"][name] is not in_file
        assert shown["provenance"][name] == "command line"


def test_dashes_and_underscores_are_the_same_but_not_twice(tmp_path: Path) -> None:
    config = write_config(tmp_path / "job.yaml", {"max-steps": 3})
    assert resolved(config).job.max_steps == 3
    config = write_config(tmp_path / "job.yaml", {"max-steps": 3, "max_steps": 4})
    with pytest.raises(UsageError, match="max_steps is given twice"):
        resolved(config)


@pytest.mark.parametrize("ending", [".yaml", ".toml", ".json"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lerning_rate": 1e-3}, "unknown option 'lerning_rate'.*did you mean 'learning_rate'"),
        ({"zzzzzz": 1}, "unknown option 'zzzzzz'.*autodeco run --help"),
        ({"seed": "five"}, "seed: 'five' is a str.*type int"),
        ({"seed": 1.5}, "seed: 1.5 is a float.*type int"),
        ({"seed": True}, "seed: True is a bool"),
        ({"copy": 1}, "copy: 1 is a int"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is a str.*type float"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: .* is a list"),
        ({"model": 3}, "model: 3 is a int"),
        ({"objective": "nlll"}, "objective: 'nlll' is not one of.*did you mean 'nll'"),
        ({"heads": "left"}, "heads: 'left' is not one of both, temperature, top-p"),
        ({"global_batch": 0}, "global_batch: 0 is out of range.*at least 1"),
        ({"held_out": 1.0}, "held_out: 1.0 is out of range.*above 0 and below 1"),
        ({"drop": 1.5}, "drop: 1.5 is out of range.*at least 0 and at most 1"),
    ],
)
def test_errors_name_the_file_the_key_and_the_cure(
    tmp_path: Path, ending: str, values: dict[str, Any], message: str
) -> None:
    config = write_config(tmp_path / f"job{ending}", values)
    with pytest.raises(UsageError, match=f"(?s){message}") as caught:
        resolved(config)
    assert caught.value.where == str(config) and caught.value.fix


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: str) -> None:
    config = tmp_path / "job.toml"
    config.write_text(f"clip = {value}")
    with pytest.raises(UsageError, match=r"clip: .* is out of range"):
        resolved(config)


@pytest.mark.parametrize(
    "name", [n for n, item in FIELDS.items() if get_type_hints(Job)[n] in (int, float)]
)
def test_every_number_has_a_range(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: -1 is out of range|{name}: -1.0 is out"):
        resolved(**{name: -1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("job.yaml", "seed: [1", "malformed configuration"),
        ("job.toml", "seed = ", "malformed configuration"),
        ("job.json", '{"seed": 1', "malformed configuration"),
        ("job.yaml", "- seed", "is a list, not a table"),
        ("job.yaml", "1: 2", "unknown option 1"),
        ("job.ini", "seed = 1", "cannot tell the format of .ini"),
        ("job", "seed = 1", "a file without ending"),
    ],
)
def test_files_that_hold_no_options(tmp_path: Path, name: str, content: str, message: str) -> None:
    config = tmp_path / name
    config.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        resolved(config)
    assert caught.value.where == str(config) and caught.value.fix


def test_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file") as caught:
        resolved(tmp_path / "job.yaml")
    assert caught.value.where == str(tmp_path / "job.yaml")


def test_empty_config_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("# nothing yet\n")
    assert resolved(tmp_path / "job.yaml").job == resolved().job


def test_dry_run_prints_every_value_with_its_origin_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    config = write_config(tmp_path / "job.yaml", {"max_steps": 9})
    command = ["run", "--plugin", "qwen3", "--config", "job.yaml", "--seed", "6", "--dry-run"]
    main(command)
    rows = {
        cells[1]: cells[2:4]
        for line in capsys.readouterr().out.splitlines()
        if len(cells := [cell.strip() for cell in line.split("│")]) > 3
    }
    assert set(rows) == set(FIELDS)
    assert rows["seed"] == ["6", "command line"]
    assert rows["max_steps"] == ["9", "file job.yaml"]
    assert rows["global_batch"] == ["64", "preset demo"]
    assert rows["preset"] == ["demo", "the family's default preset"]
    assert rows["keep"] == ["2", "default"]
    assert list(tmp_path.iterdir()) == [config]


def test_bug_brackets_in_a_value_were_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--plugin", "qwen3", "--name", "a[b]c[red]", "--dry-run"])
    assert "a[b]c[red]" in capsys.readouterr().out


def test_bug_chat_template_kwargs_were_taken_for_text(capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            *("run", "--plugin", "qwen3", "--dry-run", "--json"),
            *("--chat-template-kwargs", '{"enable_thinking": false}'),
        ]
    )
    shown = json.loads(capsys.readouterr().out)
    assert shown["job"]["chat_template_kwargs"] == {"enable_thinking": False}
    for value, message in (("{", "is no JSON"), ("[1]", "is no JSON object")):
        with pytest.raises(SystemExit) as stopped:
            main(["run", "--plugin", "qwen3", "--chat-template-kwargs", value])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_bug_yaml_reads_a_short_exponent_as_text(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("learning_rate: 1e-4\nclip: '0.5'\n")
    assert read_config(tmp_path / "job.yaml") == {"learning_rate": 1e-4, "clip": 0.5}
    with pytest.raises(UsageError, match="learning_rate"):
        coerce_values({"learning_rate": "fast"}, where="here")
