"""docs/plugins.md names every field, hook and function that an author meets."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from autodeco import blocks, hookspecs, weights
from autodeco.family import (
    Architecture,
    FamilySpec,
    FromConfig,
    ModelPreset,
    ModelShape,
    ParallelLayout,
)
from autodeco.storage import Axis, Part, StorageFormat
from autodeco.testing import FamilyContract
from autodeco.weights import Drop, Rule, WeightMap

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
TYPES = (
    *(FamilySpec, Architecture, ModelPreset, ModelShape, FromConfig, ParallelLayout),
    *(Rule, Drop, WeightMap, StorageFormat, Part, Axis),
)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    found = re.search(rf"(?ms)^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE)
    assert found, f"docs/plugins.md has no section {title!r}"
    return found[1]


def named(text: str) -> set[str]:
    """The words that stand in backticks, those of a call included."""
    quoted = re.findall(r"`([^`]+)`", text)
    return {word for item in quoted for word in re.findall(r"\w+", item)}


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_field_is_documented(kind: type) -> None:
    first_cells = "\n".join(
        line.split("|")[1] for line in section(kind.__name__).splitlines() if line.startswith("|")
    )
    fields = {item.name for item in dataclasses.fields(kind)}
    assert named(first_cells) == fields


@pytest.mark.parametrize("hook", hookspecs.HOOKS)
def test_every_hook_is_documented_with_its_arguments(hook: str) -> None:
    text = section(hook)
    function = getattr(hookspecs, hook)
    parameters = ", ".join(inspect.signature(function).parameters)
    assert f"`{hook}({parameters})`" in text
    returned = str(inspect.signature(function).return_annotation).split(" ")[0]
    assert returned in named(text)


@pytest.mark.parametrize("module", [weights, blocks], ids=lambda module: module.__name__)
def test_every_function_is_documented(module: ModuleType) -> None:
    words = named(section(f"{'Rules' if module is weights else 'Blocks'}: {module.__name__}"))
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }
    constants = {n for n, value in vars(module).items() if n.isupper() and isinstance(value, str)}
    assert (public | constants) - {kind.__name__ for kind in TYPES} <= words


def test_arguments_of_functions_are_documented() -> None:
    for module, title in ((weights, "Rules"), (blocks, "Blocks")):
        words = named(section(f"{title}: {module.__name__}"))
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                if name.startswith("_") or name in ("width", "dense_layers", "sparse_layers"):
                    continue
                missing = set(inspect.signature(value).parameters) - words
                assert not missing - {"names"}, (name, missing)


def test_attributes_of_the_contract_are_documented() -> None:
    words = named(section("The conformance kit"))
    public = {n for n in vars(FamilyContract)["__annotations__"] if not n.startswith("_")}
    assert public and public <= words


def test_the_plugin_on_the_page_is_one() -> None:
    (whole, *_) = PYTHON.findall(section("Without the command"))
    names: dict[str, object] = {}
    exec(compile(whole, "docs/plugins.md", "exec"), names)
    family = names["FAMILY"]
    assert isinstance(family, FamilySpec)
    for preset in family.presets:
        config = family.architecture(preset.architecture).config_json(preset.shape, preset.config)
        shape = family.architecture(preset.architecture).shape_of(config, where="here")
        assert shape == preset.shape
        assert family.weight_map.expand(shape)


def test_files_that_the_page_names_are_there() -> None:
    root = Path(__file__).parents[2]
    for name in set(re.findall(r"`((?:examples|plugins)/\w+)`", PAGE)):
        assert (root / name).is_dir(), name


def test_every_target_that_a_shipped_map_fills_is_in_the_table() -> None:
    from autodeco.registry import Registry

    table = section("Targets")
    for row in Registry().rows():
        assert row.plugin is not None, row.error
        for rule in row.plugin.family.weight_map.rules:
            last = ".".join(rule.target.split(".")[-2:])
            parts = last.removesuffix(".weight").removesuffix(".bias").split(".")
            assert parts[-1] in named(table), rule.target
