"""Resolves a job: command line over file over preset over default, each value with its origin."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodeco.errors import UsageError
from autodeco.family import AUTO_PRESET
from autodeco.foreign import check_plain, each_once
from autodeco.job import AUTO, Job
from autodeco.job_values import coerce_values
from autodeco.registry import Registry, Resolution
from autodeco.run_directory import JOB_FILE, job_values

PUBLISHED_RECIPE: Mapping[str, Any] = {
    "objective": "megatron",
    "learning_rate": 5e-6,
    "min_learning_rate": 2e-8,
    "warmup_steps": 20,
    "constant_steps": 50,
    "clip": 1.0,
    "weight_decay": 0.0,
    "global_batch": 32,
    "max_length": 6144,
    "epochs": 1,
}


@dataclass(frozen=True)
class Resolved:
    """A job whose every value is known, and where each came from.

    Attributes:
        job: The job.
        provenance: Field -> origin.
        resolution: The plugin and preset.
    """

    job: Job
    provenance: Mapping[str, str]
    resolution: Resolution


def resolve(command_line: Mapping[str, Any], config: Path | None, registry: Registry) -> Resolved:
    """Resolves a job.

    Args:
        command_line: Values that the user gave; fields not given are absent.
        config: A YAML, TOML or JSON file of job fields, or a run's ``job.json``.
        registry: Where plugin and preset are found.

    Raises:
        UsageError: An unknown key (the nearest name is suggested) or a value that does not fit.
        PluginError: The plugin or the preset cannot be told.
    """
    from_line = coerce_values(command_line, where="command line")
    from_file = read_config(config) if config else {}
    from_run = _of_run({**from_file, **from_line}.get("resume", AUTO))
    given = {**from_run, **from_file, **from_line}
    found = registry.resolve(given.get("plugin"), given.get("model"), given.get("preset"))
    preset = coerce_values(found.preset.recipe, where=f"preset {found.preset.name}")
    recipe = dict(PUBLISHED_RECIPE) if given.get("recipe") == "published" else {}
    layers: list[tuple[str, Mapping[str, Any]]] = [
        (f"preset {found.preset.name}", preset),
        ("--recipe published", recipe),
        ("the run's job.json", from_run),
        (f"file {config}", from_file),
        ("command line", from_line),
    ]
    values: dict[str, Any] = {}
    provenance = {item.name: "default" for item in dataclasses.fields(Job)}
    for origin, layer in layers:
        values |= layer
        provenance |= dict.fromkeys(layer, origin)
    if from_run:  # a run lies where it lies
        values |= {name: from_run[name] for name in ("out", "name")}
    for name, value in (("plugin", found.family.id), ("preset", found.preset.name)):
        if given.get(name) is None:
            provenance[name] = found.reason
        values[name] = value
    if found.preset.name == AUTO_PRESET and values.get("layout") is None:
        provenance["layout"] = "--preset auto: chosen at the start, by the memory of the processes"
    return Resolved(Job(**values), provenance, found)


def _of_run(resume: str) -> dict[str, Any]:
    """The values of the run that ``--resume PATH`` continues, where it lies now."""
    path = Path(resume)
    if resume in (AUTO, "new") or not (path / JOB_FILE).exists():
        return {}
    values = read_config(path / JOB_FILE)
    values = {name: v for name, v in values.items() if name not in ("resume", "allow_change")}
    return {**values, "out": path.absolute().parents[1], "name": path.absolute().parent.name}


def _parse_yaml(text: str) -> Any:
    """Parses YAML; of two values of one name, and of what anchors can grow into, none is taken."""
    import yaml

    class Loader(yaml.SafeLoader):
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            each_once([(name, None) for name in names])
            if "<<" in names:  # merged again and again, a few lines fill the memory
                raise ValueError("<< is not read here: write the options out")

    return yaml.load(text, Loader)


def read_config(path: Path) -> dict[str, Any]:
    """Reads job values from a file.

    Raises:
        UsageError: The file cannot be read, or holds an unknown key or an unfit value.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            content = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            content = _parse_yaml(text) or {}
        elif path.suffix == ".json":
            content = json.loads(text, object_pairs_hook=each_once)
        else:
            raise UsageError(
                f"cannot tell the format of {path.suffix or 'a file without ending'}",
                where=str(path),
                fix="name it .yaml, .toml or .json",
            )
    except OSError as error:
        raise UsageError(
            f"cannot read the configuration: {error.strerror}",
            where=str(path),
            fix="check --config",
        ) from error
    except UsageError:
        raise
    except Exception as error:  # each parser has its own
        raise UsageError(
            f"malformed configuration: {error}", where=str(path), fix="correct the file"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(
            f"the configuration is a {type(content).__name__}, not a table of options",
            where=str(path),
            fix="write one `option: value` a line",
        )
    check_plain(content, str(path))
    return coerce_values(job_values(content), where=str(path))
