"""Variables that `autodeco launch` forwards to a run, and what of them may be written down."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autodeco.errors import UsageError

FORWARDED = "AUTODECO_FORWARDED"
SECRET_MARK = ":secret"  # behind a name in FORWARDED
HIDDEN = "(secret: recorded by name only)"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_LOGIN_IN_ADDRESS = re.compile(r"://[^/@\s]+@")
_OURS = re.compile(r"MASTER_(ADDR|PORT)|NODE_RANK|NNODES|(LOCAL_)?(RANK|WORLD_SIZE)|AUTODECO_.*")


@dataclass(frozen=True)
class ForwardedVariable:
    """A line of an environment file.

    Attributes:
        name: Its name.
        value: Its value, None for a secret: that is never kept.
    """

    name: str
    value: str | None


def is_secret(name: str, value: str = "") -> bool:
    """Returns whether a variable may be written down by name only."""
    return bool(_SECRET.search(name) or _LOGIN_IN_ADDRESS.search(value))


def read_environment_file(path: Path) -> tuple[ForwardedVariable, ...]:
    """Reads lines NAME=VALUE; ``#`` begins a comment line, ``export`` and quotes are allowed.

    Errors name the line and never show what follows the equals sign.

    Raises:
        UsageError: The file cannot be read, a line is malformed, a name is given twice, or is one
            that the launcher sets itself.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UsageError(
            f"cannot read the environment file: {what}", where=str(path), fix="check --env-file"
        ) from error
    found: dict[str, ForwardedVariable] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("export ").strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.partition("=")
        _check_name(name, bool(equals), found, f"{path}:{number}")
        value = _unquoted(value)
        found[name] = ForwardedVariable(name, None if is_secret(name, value) else value)
    return tuple(found.values())


def _check_name(name: str, equals: bool, found: Mapping[str, object], where: str) -> None:
    if not equals or not _NAME.fullmatch(name):
        raise UsageError("the line is not NAME=VALUE", where=where, fix="write NAME=VALUE")
    if name in found:
        raise UsageError(f"{name} is given twice", where=where, fix="remove one of them")
    if _OURS.fullmatch(name):
        raise UsageError(
            f"{name} is set by the launcher itself",
            where=where,
            fix="remove the line; set it in the shell of each machine",
        )


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value


def forwarded_variables(environment: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Returns the forwarded variables of this process as ``job.json`` records them.

    The launch script names them in ``AUTODECO_FORWARDED``; a secret has no value here.
    """
    found = os.environ if environment is None else environment
    result: dict[str, str | None] = {}
    for entry in filter(None, found.get(FORWARDED, "").split(",")):
        name = entry.removesuffix(SECRET_MARK)
        value = found.get(name)
        secret = entry != name or (value is not None and is_secret(name, value))
        result[name] = HIDDEN if secret else value
    return result
