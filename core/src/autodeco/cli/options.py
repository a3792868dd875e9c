"""Makes click options from the fields of `Job`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click

from autodeco.job import Job

Command = Callable[..., Any]


class JsonObject(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A JSON object on the command line."""

    name = "json"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """Parses the text."""
        if isinstance(value, dict):
            return value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value[:200]!r} is no JSON: {error}", param, ctx)
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is no JSON object", param, ctx)
        return parsed


def _type(item: dataclasses.Field[Any], hint: Any) -> Any:
    if get_origin(hint) is dict:
        return JsonObject()
    kinds = [kind for kind in (hint, *get_args(hint)) if kind is not type(None)]
    if item.metadata["choices"]:
        return click.Choice(item.metadata["choices"])
    if Path in kinds:
        return click.Path(path_type=Path)
    return next(kind for kind in (bool, int, float, str) if kind in kinds)


def job_options(command: Command) -> Command:
    """Adds one option for every field of `Job`; fields that are not given stay absent."""
    hints = get_type_hints(Job)
    for item in reversed(dataclasses.fields(Job)):
        kind = _type(item, hints[item.name])
        name = "--" + item.name.replace("_", "-")
        flag = item.metadata["flag"] or (f"{name}/--no-{name[2:]}" if kind is bool else None)
        default = item.default if item.default is not dataclasses.MISSING else {}
        shown = f"  [{item.metadata['section']}; default: {_show(default)}]"
        command = click.option(
            flag or name,
            item.name,
            type=None if kind is bool else kind,
            is_flag=kind is bool,
            default=None,
            help=item.metadata["help"] + shown,
        )(command)
    return command


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Returns the words of a command line that gives these options: the inverse of the above."""
    words = []
    for item in dataclasses.fields(Job):
        if item.name not in options:
            continue
        value, name = options[item.name], "--" + item.name.replace("_", "-")
        if isinstance(value, bool):
            on, _, off = (item.metadata["flag"] or f"{name}/--no-{name[2:]}").partition("/")
            words.append(on if value else off)
        else:
            words += [name, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def _show(value: Any) -> str:
    return (
        {None: "none", True: "yes", False: "no"}.get(value, str(value))
        if not isinstance(value, dict)
        else "none"
    )


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that the user gave."""
    return {name: value for name, value in values.items() if value is not None}
