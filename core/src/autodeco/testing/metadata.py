"""Checks of a plugin's package and data: no model is built."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata, resources, util
from pathlib import Path

from autodeco.errors import AutodecoError
from autodeco.family import API, OLDEST_API, ModelPreset
from autodeco.job import Job
from autodeco.job_values import coerce_values
from autodeco.registry import GROUP, Registry
from autodeco.testing.checks import CheckFailed
from autodeco.testing.context import Context

HEAVY = ("torch", "transformers", "numpy", "megatron")
CONTRACT = (
    "autodeco",  # hookimpl
    *(f"autodeco.{name}" for name in ("blocks", "errors", "family", "hookspecs", "layout")),
    *(f"autodeco.{name}" for name in ("plugin", "recipes", "storage", "testing", "weights")),
)


def entry_point(context: Context) -> str:
    """Entry point, id, api, and names that are nobody else's."""
    row = Registry().get(context.family.id)
    family = context.family
    [entry] = metadata.entry_points(group=GROUP, name=family.id)
    package = entry.value.partition(":")[0].split(".")[0]
    if package != family.package.split(".")[0]:
        raise CheckFailed(
            f"FamilySpec.package is {family.package!r}, and the entry point is in {package!r}",
            where=entry.value,
            fix=f"set package={package!r}: built-in files are looked for there",
        )
    if not OLDEST_API <= family.api <= API:
        raise CheckFailed(
            f"written for api {family.api}; this autodeco speaks api {API}",
            where="FamilySpec.api",
            fix="name the api that it was written for, or install a fitting autodeco",
        )
    for other in Registry().rows():
        taken = {other.id, *(other.plugin.family.aliases if other.plugin else ())}
        same = {a.lower() for a in family.aliases} & {name.lower() for name in taken}
        if other.id != family.id and same:
            raise CheckFailed(
                f"the alias {min(same)!r} is a name of {other.who}",
                where="FamilySpec.aliases",
                fix="remove it, or choose another",
            )
    twice = [name for name, count in Counter(family.aliases).items() if count > 1]
    if twice or family.id in family.aliases:
        raise CheckFailed(
            f"the alias {(twice or [family.id])[0]!r} is there twice",
            where="FamilySpec.aliases",
            fix="remove one",
        )
    return f"{row.who}, api {family.api}, {len(family.aliases)} aliases"


def imports(context: Context) -> str:
    """What the package imports, read from its source and seen in a process of its own."""
    package = context.family.package
    code = (
        f"import json, sys, {package}\n"
        "from autodeco.registry import Registry\n"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise CheckFailed(
            f"the package cannot be imported: {done.stderr.strip().splitlines()[-1]}",
            where=package,
            fix=f"python -c 'import {package}' shows the traceback",
        )
    heavy = json.loads(done.stdout.splitlines()[-1])
    if heavy:
        raise CheckFailed(
            f"importing the package imports {', '.join(heavy)}",
            where=package,
            fix="import them inside the functions that need them",
        )
    files = sorted(_folder(package).rglob("*.py"))
    for file in files:
        for line, name in _imported(ast.parse(file.read_text(encoding="utf-8"))):
            if name.split(".")[0] == "autodeco" and name not in CONTRACT:
                raise CheckFailed(
                    f"{name} is imported, which is no part of the contract",
                    where=f"{file}:{line}",
                    fix="a family is data: use " + ", ".join(CONTRACT[1:]) + "; an override of a "
                    "hook imports inside its function",
                )
    return f"{len(files)} files import the contract alone; {', '.join(HEAVY)} stay out"


def _folder(package: str) -> Path:
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CheckFailed(
            f"there is no package {package!r}",
            where="FamilySpec.package",
            fix="name the package that holds the plugin's files",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields what a module imports when it is imported: line and module."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                of_autodeco = node.module == "autodeco" and _is_module(inner)
                yield node.lineno, inner if of_autodeco else node.module
        waiting += ast.iter_child_nodes(node)


def _is_module(name: str) -> bool:
    return util.find_spec(name) is not None


def presets(context: Context) -> str:
    """Each preset against its architecture, its recipe and its files."""
    family = context.family
    if not family.presets:
        raise CheckFailed("the family has no preset", where="FamilySpec.presets", fix="add one")
    names = [preset.name for preset in family.presets]
    ids = [i.lower() for preset in family.presets for i in preset.model_ids]
    for what, found in (("preset", names), ("model id", ids)):
        twice = [name for name, count in Counter(found).items() if count > 1]
        if twice:
            raise CheckFailed(
                f"the {what} {twice[0]!r} is there twice",
                where="FamilySpec.presets",
                fix="remove one of the two",
            )
    for preset in family.presets:
        try:
            _preset(context, preset)
        except AutodecoError as error:
            error.where = f"preset {preset.name}" + (f", {error.where}" if error.where else "")
            raise
    if not context.random_presets:
        raise CheckFailed(
            "no preset has random weights, so nothing can be computed",
            where="FamilySpec.presets",
            fix="add a small one with random=True",
        )
    return f"{len(names)} presets, {len(context.random_presets)} of them random; {len(ids)} ids"


def _preset(context: Context, preset: ModelPreset) -> None:
    architecture = context.architecture(preset)
    config = architecture.config_json(preset.shape, preset.config)
    found = architecture.shape_of(config, where="config.json")
    if found != preset.shape:
        fields = dataclasses.asdict(preset.shape)
        wrong = [name for name, value in fields.items() if getattr(found, name) != value]
        raise CheckFailed(
            f"config.json of this preset gives another {wrong[0]}: {getattr(found, wrong[0])}, "
            f"not {fields[wrong[0]]}",
            fix="name the key of config.json in Architecture.config_keys, and leave it out of "
            "`config`",
        )
    impossible = preset.shape.impossible()
    if impossible:
        raise CheckFailed(f"impossible sizes: {impossible}", fix="correct the preset's shape")
    Job(**coerce_values(dict(preset.recipe), where="recipe"))
    for kind in ("checkpoint", "tokenizer"):
        name = getattr(preset, kind)
        if name and not (resources.files(context.family.package) / name).is_dir():
            raise CheckFailed(
                f"the package has no folder {name!r}, which is the preset's {kind}",
                where=context.family.package,
                fix="add it to the package, or leave it out of the preset",
            )


def layouts(context: Context) -> str:
    """The arithmetic of each preset's layout."""
    for preset in context.family.presets:
        layout = preset.layout
        try:
            layout.data_ranks(preset.shape, layout.gpus)
        except AutodecoError as error:
            raise CheckFailed(
                error.what,
                where=f"preset {preset.name}, {error.where}",
                fix="change the preset's layout, or its gpus",
            ) from error
    spread = [str(p.layout) for p in context.family.presets if p.layout.is_parallel]
    return f"{len(context.family.presets)} layouts, {len(spread)} of them spread the model"
