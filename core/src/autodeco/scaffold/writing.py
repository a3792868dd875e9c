"""Writes a new plugin's package: reads, proposes, tries, and gives it its name in one step."""

from __future__ import annotations

import json
import keyword
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from autodeco.errors import UsageError
from autodeco.files import atomic_directory
from autodeco.registry import Registry
from autodeco.scaffold.matching import propose
from autodeco.scaffold.reading import read_source
from autodeco.scaffold.rendering import TODO, Plugin, files_of

_SECONDS = 600


@dataclass(frozen=True)
class Written:
    """What was written, and what is known of it.

    Attributes:
        path: The package's directory.
        plugin: What its files were made of.
        trial: Check -> what was found.
        todo: ``file:line`` -> the line, of all that its author must fill in.
    """

    path: Path
    plugin: Plugin
    trial: Mapping[str, str]
    todo: Mapping[str, str]


def new_plugin(name: str, begin: Path, out: Path | None = None) -> Written:
    """Writes a package for a family, begun from a configuration.

    Args:
        name: The family's id.
        begin: A Hugging Face directory, or a ``config.json``.
        out: The package's directory; by default one named after its distribution.

    Raises:
        UsageError: The name cannot be one, or is taken; or the directory exists.
        WeightsError: No plugin can be begun from the configuration.
        EnvironmentProblem: The directory cannot be written.
    """
    rows = Registry().rows()
    _check_name(name, [row.id for row in rows])
    out = out or Path("autodeco-plugin-" + name.replace("_", "-"))
    if out.exists():
        raise UsageError(
            "there is something of this name", where=str(out), fix="choose another --out"
        )
    given = read_source(begin)
    families = [row.plugin.family for row in rows if row.plugin]
    plugin = Plugin(name, _origin(begin), given, propose(given, families))
    plugin, trial = _tried(plugin)
    files = files_of(plugin)
    with atomic_directory(out) as temporary:
        _write(temporary, files)
    return Written(out, plugin, trial, _todo(files))


def _origin(begin: Path) -> str:
    """What the model is called: the directory's name, or the file's."""
    place = begin.resolve()
    if not place.is_dir() and place.name != "config.json":
        return place.stem
    return place.name if place.is_dir() else place.parent.name


def _check_name(name: str, taken: list[str]) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UsageError(
            f"{name!r} cannot be a plugin's name",
            fix="use lower-case letters, digits and underscores, beginning with a letter",
        )
    if name in taken:
        raise UsageError(
            f"a plugin {name!r} is installed already",
            fix="choose another name: two distributions with one id do not work",
        )


def _tried(plugin: Plugin) -> tuple[Plugin, dict[str, str]]:
    """Runs the trial, and keeps away from the megatron engine what it does not do."""
    reason = _known_reason(plugin)
    trial = _trial(replace(plugin, no_megatron=reason))
    if reason:
        return replace(plugin, no_megatron=reason), trial
    failed = trial.get("logits-megatron", "")
    if failed.startswith("fail"):
        reason = f"{TODO}: {_steady(failed.removeprefix('fail: '))}"
    elif "megatron-core" in failed:
        reason = f"{TODO}: never tried, for megatron-core was not installed"
    return replace(plugin, no_megatron=reason), trial


def _known_reason(plugin: Plugin) -> str:
    left = plugin.proposal.left
    if plugin.source.odd_logits:
        return (
            f"{TODO}: no engine can run it, for its logits are not hidden states times output "
            f"layer: {plugin.source.odd_logits}"
        )
    if left:
        return f"{TODO}: weights.py has no megatron-core name for {left[0].name}" + (
            f" and {len(left) - 1} more" if len(left) > 1 else ""
        )
    names = {block.name for block in plugin.proposal.blocks}
    if {"layer_norms", "norms_behind"} <= names:
        return f"{TODO}: layers with norms before and behind each block are not done"
    return ""


def _steady(text: str) -> str:
    """A message without the digits of figures that differ from machine to machine."""
    return re.sub(r"(\d\.\d)\d+(e[-+]?\d+)?", r"\1\2", " ".join(text.split()))


def _trial(plugin: Plugin) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as work:
        _write(Path(work), files_of(plugin))
        command = [sys.executable, "-m", "autodeco.scaffold.trial", "src", plugin.package]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command,
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
            found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, json.JSONDecodeError) as error:
            last = (done.stderr.strip().splitlines() or [""])[-1] if "done" in locals() else ""
            return {"logits-hf": f"fail: the trial ended: {last or type(error).__name__}"}
    return found


def _write(directory: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _todo(files: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{name}:{number}": line.strip()
        for name, text in files.items()
        for number, line in enumerate(text.splitlines(), 1)
        if TODO in line
    }
