"""Discovery and resolution: every rule of the plugin contract, the traps of pluggy included."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodeco import hookimpl
from autodeco.errors import PluginError, WeightsError
from autodeco.family import FamilySpec
from autodeco.hookspecs import ImportedWeights
from autodeco.job import Job
from autodeco.plugin import FamilyPlugin
from autodeco.registry import Registry
from autodeco_plugin_qwen3.family import FAMILY


@dataclass
class Entry:
    """An entry point without an installed distribution."""

    name: str
    thing: Any
    dist_name: str = "dist-a"
    value: str = "module:plugin"

    @property
    def dist(self) -> Any:
        return SimpleNamespace(name=self.dist_name, version="1.2")

    def load(self) -> Any:
        if isinstance(self.thing, Exception):
            raise self.thing
        return self.thing


def family(**changes: Any) -> FamilySpec:
    return dataclasses.replace(FAMILY, **changes)


def plugin(**changes: Any) -> FamilyPlugin:
    return FamilyPlugin(family(**changes))


def write_config(directory: Path, **changes: Any) -> Path:
    preset = FAMILY.preset("8b")
    config = FAMILY.architecture(preset.architecture).config_json(preset.shape)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    return directory


def test_installed_plugin_is_found_by_id_and_alias() -> None:
    registry = Registry()
    assert registry.get("qwen3").plugin is registry.get("qwen-3").plugin


def test_unknown_plugin_says_what_to_install() -> None:
    with pytest.raises(PluginError, match="pip install autodeco-plugin-zebra-x"):
        Registry([]).get("zebra_x")


def test_misspelt_plugin_suggests_the_nearest() -> None:
    with pytest.raises(PluginError, match="did you mean 'qwen3'"):
        Registry().get("qwem3")


def test_broken_plugin_is_a_row_and_an_error_only_for_who_asks() -> None:
    entries = [Entry("bad", ImportError("no module named x")), Entry("qwen3", plugin())]
    registry = Registry(entries)
    assert registry.get("qwen3").error is None
    assert "no module named x" in str(registry.rows()[0].error)
    with pytest.raises(PluginError, match=r"plugin bad \(dist-a 1.2\).*no module named x"):
        registry.get("bad")


def test_two_distributions_with_one_id_are_both_named() -> None:
    entries = [Entry("qwen3", plugin(), "dist-a"), Entry("qwen3", plugin(), "dist-b")]
    with pytest.raises(PluginError, match="dist-a, dist-b"):
        Registry(entries).get("qwen3")


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (plugin(api=2), "api 2"),
        (plugin(id="other"), "other"),
        (FAMILY, "not a FamilyPlugin"),
        (FamilyPlugin, "is a class"),
    ],
)
def test_wrong_plugins_are_refused(thing: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        Registry([Entry("qwen3", thing)]).get("qwen3")


@pytest.mark.parametrize(("api", "taken"), [(1, False), (2, True), (3, True), (4, False)])
def test_the_api_before_works_on_for_a_while(
    monkeypatch: pytest.MonkeyPatch, api: int, taken: bool
) -> None:
    monkeypatch.setattr("autodeco.registry.API", 3)
    monkeypatch.setattr("autodeco.registry.OLDEST_API", 2)
    (row,) = Registry([Entry("qwen3", plugin(api=api))]).rows()
    assert (row.error is None) is taken
    assert taken or row.error == f"written for api {api}; this autodeco speaks apis 2 to 3"


def test_bug_a_plugin_that_names_no_api_claimed_the_newest() -> None:
    """Its author cannot have written it for a contract that came later."""
    (field,) = (item for item in dataclasses.fields(FamilySpec) if item.name == "api")
    assert field.default == 1


def test_ambiguous_alias_lists_the_ids() -> None:
    entries = [Entry(i, plugin(id=i, aliases=("same",))) for i in ("one", "two")]
    with pytest.raises(PluginError, match="one, two"):
        Registry(entries).get("same")


def test_model_is_resolved_by_architecture_and_shape(tmp_path: Path) -> None:
    found = Registry().resolve(None, write_config(tmp_path / "m"), None)
    assert (found.family.id, found.preset.name) == ("qwen3", "8b")


def test_model_is_resolved_by_its_exact_id(tmp_path: Path) -> None:
    found = Registry().resolve(None, write_config(tmp_path / "Qwen3-8B"), None)
    assert found.preset.name == "8b" and "model id" in found.reason


def test_unknown_architecture_says_which_plugin_to_install(tmp_path: Path) -> None:
    model = write_config(tmp_path / "m", architectures=["Gemma9ForCausalLM"], model_type="gemma9")
    with pytest.raises(PluginError, match="pip install autodeco-plugin-gemma9"):
        Registry().resolve(None, model, None)


def test_several_matching_plugins_are_listed(tmp_path: Path) -> None:
    entries = [Entry(i, plugin(id=i)) for i in ("one", "two")]
    with pytest.raises(PluginError, match="--plugin with one of: one, two"):
        Registry(entries).resolve(None, write_config(tmp_path / "m"), None)


def test_preset_that_disagrees_with_the_checkpoint_shows_the_difference(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="num_layers 28 expected, 36 found"):
        Registry().resolve("qwen3", write_config(tmp_path / "m"), "0.6b")


def test_shape_without_preset_names_the_nearest(tmp_path: Path) -> None:
    model = write_config(tmp_path / "m", num_hidden_layers=35)
    with pytest.raises(PluginError, match="nearest is '8b': num_layers 36 expected, 35 found"):
        Registry().resolve("qwen3", model, None)


def test_feature_that_the_plugin_does_not_handle_is_refused(tmp_path: Path) -> None:
    model = write_config(tmp_path / "m", attention_bias=True)
    with pytest.raises(PluginError, match="attention_bias is True"):
        Registry().resolve("qwen3", model, None)


def test_wrong_family_is_refused(tmp_path: Path) -> None:
    model = write_config(tmp_path / "m", architectures=["LlamaForCausalLM"])
    with pytest.raises(PluginError, match="LlamaForCausalLM"):
        Registry().resolve("qwen3", model, None)


def test_missing_config_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"config\.json"):
        Registry().resolve("qwen3", tmp_path, None)


def test_neither_plugin_nor_model() -> None:
    with pytest.raises(PluginError, match="--plugin"):
        Registry().resolve(None, None, None)


class Overriding(FamilyPlugin):
    """Overrides a hook without marking it again."""

    def import_weights(self, job: Job) -> ImportedWeights:
        raise PluginError("the override was called")


class Marked(FamilyPlugin):
    """Overrides a hook and marks it."""

    @hookimpl
    def import_weights(self, job: Job) -> ImportedWeights:
        raise PluginError("the override was called")


@pytest.mark.parametrize("kind", [Overriding, Marked])
def test_override_stays_a_hook(kind: type[FamilyPlugin]) -> None:
    hooks = Registry([Entry("qwen3", kind(FAMILY))]).resolve("qwen3", None, None).hooks()
    with pytest.raises(PluginError, match="the override was called"):
        hooks.import_weights(job=Job())


def test_override_with_a_foreign_parameter_is_refused() -> None:
    with pytest.raises(PluginError, match="takes device"):

        class Wrong(FamilyPlugin):
            def build_model(self, job: Job, device: str) -> None:  # type: ignore[override]
                return None


def test_hooks_are_called_on_the_chosen_plugin_alone() -> None:
    other = Overriding(family(id="other"))
    registry = Registry([Entry("qwen3", plugin()), Entry("other", other)])
    with pytest.raises(PluginError, match="no model or no preset"):
        registry.resolve("qwen3", None, None).hooks().import_weights(job=Job())


def test_bug_a_plugin_without_a_fitting_preset_hid_the_one_that_fits(tmp_path: Path) -> None:
    model = write_config(tmp_path / "model")
    other = dataclasses.replace(FAMILY, id="mine", presets=(FAMILY.preset("0.6b"),), aliases=())
    entries = [Entry("mine", FamilyPlugin(other)), Entry("qwen3", FamilyPlugin(FAMILY))]
    found = Registry(entries).resolve(None, model, None)
    assert (found.family.id, found.preset.name) == ("qwen3", "8b")
    with pytest.raises(PluginError, match="no preset has the checkpoint's shape"):
        Registry(entries[:1]).resolve(None, model, None)


class _Broken(FamilyPlugin):
    """An author's hooks that fail."""

    def attach_heads(self, job: Job, model: Any) -> Any:
        raise ValueError("mine broke")

    def export_heads(self, job: Job, model: Any, path: Path) -> Any:
        return None


def test_bug_faults_of_a_plugin_were_said_to_be_ours() -> None:
    entry = Entry("qwen3", _Broken(FAMILY), dist_name="their-dist")
    hooks = Registry([entry]).resolve("qwen3", None, None).hooks()
    with pytest.raises(PluginError) as error:
        hooks.attach_heads(job=Job(), model=None)
    assert (
        "plugin qwen3 (their-dist 1.2): its hook attach_heads failed: ValueError: mine broke"
        in (str(error.value))
    )
    with pytest.raises(PluginError, match="export_heads returned nothing"):
        hooks.export_heads(job=Job(), model=None, path=Path())
    with pytest.raises(PluginError, match="no model or no preset"):
        hooks.import_weights(job=Job())  # our own body: its error stays as it is
