"""What CI asks of the built wheels: what they need, and whether pip took them from where it should.

python .ci/wheels.py needs [extra ...]      core's dependencies, one a line
python .ci/wheels.py check REPORT DIR NAME  pip's report names these distributions, all from DIR
python .ci/wheels.py listed ID ...          `autodeco plugin list --json` (standard input) has
                                            exactly these plugins, none broken
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).parents[1]


def needs(*extras: str) -> list[str]:
    """Returns the requirements of core, and of some of its extras."""
    project = tomllib.loads((ROOT / "core" / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(need for extra in extras for need in optional[extra])]


def check(report: str, directory: str, *names: str) -> list[str]:
    """Returns what was installed, having checked that it is these and came from a directory."""
    found = {}
    for item in json.loads(Path(report).read_text())["install"]:
        url = urlparse(item["download_info"]["url"])
        file = Path(unquote(url.path))
        name = item["metadata"]["name"]
        found[name] = f"{name} {item['metadata']['version']} from {file.parent.name}/{file.name}"
        if url.scheme != "file" or file.parent.resolve() != Path(directory).resolve():
            raise SystemExit(f"{name} came from {url.geturl()}, not from {directory}")
    if set(found) != set(names):
        raise SystemExit(f"installed {sorted(found)}, expected {sorted(names)}")
    return list(found.values())


def listed(*ids: str) -> list[str]:
    """Returns the installed plugins, having checked that they are these and that all load."""
    rows = json.load(sys.stdin)
    broken = [f"{row['id']}: {row['error']}" for row in rows if row["error"]]
    if broken or sorted(row["id"] for row in rows) != sorted(ids):
        raise SystemExit(f"plugins {[row['id'] for row in rows]}, broken: {broken}")
    return [f"{row['id']}: {row['dist']} {row['version']}" for row in rows]


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    print("\n".join({"needs": needs, "check": check, "listed": listed}[command](*words)))
