"""What runner, command and `FamilyContract` make of passes, failures and what is not run."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import mutants
import pytest
from click.testing import CliRunner

from autodeco.cli import cli
from autodeco.errors import PluginError, UsageError
from autodeco.family import FamilySpec
from autodeco.plugin import FamilyPlugin
from autodeco.testing import FamilyContract, context
from autodeco.testing.checks import CHECKS, Check, CheckFailed, NotRun, check_named
from autodeco.testing.context import Context
from autodeco.testing.contract import _test
from autodeco.testing.runner import FAILED, NOT_RUN, PASSED, exit_code, perform, run_checks


@pytest.fixture
def small(tmp_path: Path) -> Context:
    return Context(mutants.row_of(mutants.SMALL_QWEN3), tmp_path)


def without_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "installed", lambda *names: {})


def test_every_check_has_a_body_and_needs_only_what_comes_before() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for number, check in enumerate(CHECKS):
        module, _, function = check.body.partition(":")
        assert callable(getattr(import_module(f"autodeco.testing.{module}"), function))
        assert set(check.needs) <= set(names[:number])
        assert check.level and check.proves


def test_the_contract_has_a_test_a_check() -> None:
    tests = {name for name in vars(FamilyContract) if name.startswith("test_")}
    assert tests == {"test_" + check.name.replace("-", "_") for check in CHECKS}


def test_importing_the_kit_is_light() -> None:
    code = (
        "import sys, autodeco.testing, autodeco.testing.checks\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'pytest') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_an_unknown_check_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="no check 'logit'") as error:
        check_named("logit")
    assert "logits-hf" in str(error.value.fix)


class TestNotRun:
    @pytest.mark.parametrize("name", ["engine-names", "logits-megatron", "training", "ranks"])
    def test_without_megatron_a_check_is_not_run_and_says_how_to_get_it(
        self, name: str, small: Context, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without_megatron(monkeypatch)
        [outcome] = run_checks(small, [check_named(name)])
        assert (outcome.state, outcome.excused) == (NOT_RUN, False)
        assert outcome.fix == "pip install 'autodeco[megatron]'"
        assert exit_code([outcome]) == 7
        assert exit_code([outcome], allow_not_run=True) == 0

    def test_the_contract_fails_then_unless_it_is_allowed(
        self, small: Context, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        without_megatron(monkeypatch)

        class Strict(FamilyContract):
            plugin = "qwen3"

        class Lenient(Strict):
            allow_not_run = True

        test = _test(check_named("logits-megatron"))
        with pytest.raises(NotRun, match="megatron-core is not installed"):
            test(Strict(), small)
        with pytest.raises(pytest.skip.Exception, match="not installed"):
            test(Lenient(), small)

    def test_what_the_plugin_says_cannot_be_is_excused(self, tmp_path: Path) -> None:
        family = mutants.small(mutants.SMALL_QWEN3, "debug")
        family = mutants.with_architecture(family, no_megatron="it has another kind of attention")
        outcomes = run_checks(
            Context(mutants.row_of(family), tmp_path),
            [check_named(n) for n in ("engine-names", "logits-megatron", "training")],
        )
        assert [(o.state, o.excused) for o in outcomes[:2]] == [(NOT_RUN, True)] * 2
        assert "another kind of attention" in outcomes[0].found
        assert outcomes[2].state == PASSED and "(hf)" in outcomes[2].found
        assert exit_code(outcomes) == 0

    def test_what_needs_a_check_that_failed_is_not_run(self, tmp_path: Path) -> None:
        context = Context(mutants.row_of(mutants.DOWN_TRANSPOSED_SQUARE), tmp_path)
        first, second = run_checks(context, [check_named("map"), check_named("storage")])
        assert (first.state, second.state) == (FAILED, NOT_RUN)
        assert second.found == "it says nothing without map"
        assert exit_code([second]) == 7 and exit_code([first, second]) == 3


def test_a_failure_says_who_where_what_and_what_to_do(tmp_path: Path) -> None:
    context = Context(mutants.row_of(mutants.DOWN_TRANSPOSED_SQUARE), tmp_path)
    with pytest.raises(CheckFailed) as error:
        perform(check_named("map"), context)
    assert error.value.who == "plugin qwen3 (a-mutant 0)"
    assert error.value.where == "preset debug" and error.value.fix
    assert isinstance(error.value, PluginError)


def test_an_error_that_nobody_foresaw_is_a_failure_that_names_it(small: Context) -> None:
    check = Check("odd", "data", "nothing", "no_such_module:f")
    [outcome] = run_checks(small, [check])
    assert outcome.state == FAILED and outcome.found.startswith("ModuleNotFoundError")
    with pytest.raises(CheckFailed):
        run_checks(small, [check], debug=True)


class TestIndex:
    @staticmethod
    def names(family: FamilySpec, preset: str) -> list[str]:
        rules = family.weight_map.expand(family.preset(preset).shape)
        return list(dict.fromkeys(name for rule in rules for name in rule.sources))

    def outcome(self, place: Path, names: list[str], preset: str = "") -> Any:
        row = mutants.row_of(mutants.SMALL_QWEN3)
        context = Context(row, place, index={preset: names})
        return run_checks(context, [check_named("index")])[0]

    def test_the_preset_is_found_by_the_names(self, tmp_path: Path) -> None:
        names = self.names(mutants.SMALL_QWEN3, "0.6b")
        assert self.outcome(tmp_path, names).found == "0.6b: 310 names, 0 dropped"

    def test_a_name_too_many_is_named(self, tmp_path: Path) -> None:
        found = self.outcome(tmp_path, [*self.names(mutants.SMALL_QWEN3, "debug"), "x.scale"])
        assert found.state == FAILED and "'x.scale'" in found.found
        assert "preset debug" in found.where

    def test_parts_belong_to_their_tensor_and_a_part_alone_does_not(self) -> None:
        from autodeco.testing.maps import whole_names

        stored = ["a.weight", "a.weight_scale_inv", "b_blocks", "b_scales", "c_scales", "d_bias"]
        assert whole_names(stored, ()) == {"a.weight", "b", "c_scales", "d_bias"}


class TestPackage:
    @staticmethod
    def plugin(place: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> Context:
        package = place / "stranger"
        package.mkdir()
        (package / "__init__.py").write_text(f"{line}\n")
        monkeypatch.syspath_prepend(place)
        monkeypatch.setenv("PYTHONPATH", str(place))
        family = mutants.small(mutants.SMALL_QWEN3, "debug")
        family = mutants.dataclasses.replace(family, package="stranger")
        return Context(mutants.row_of(FamilyPlugin(family)), place)

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("import numpy", "importing the package imports numpy"),
            ("from autodeco import files", "autodeco.files is imported"),
            ("from autodeco.resolution import fits", "autodeco.resolution is imported"),
            ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
        ],
    )
    def test_an_import_beyond_the_contract(
        self, line: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        [outcome] = run_checks(self.plugin(tmp_path, monkeypatch, line), [check_named("imports")])
        assert outcome.state == FAILED and says in outcome.found

    @pytest.mark.parametrize(
        "line",
        [
            "from autodeco import hookimpl",
            "from autodeco.weights import copy",
            "def f():\n    from autodeco.heads.attach import new_heads",
        ],
    )
    def test_the_contract_and_what_an_override_imports(
        self, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        [outcome] = run_checks(self.plugin(tmp_path, monkeypatch, line), [check_named("imports")])
        assert outcome.state == PASSED, outcome.found

    def test_an_alias_of_another_plugin(self, tmp_path: Path) -> None:
        family = mutants.dataclasses.replace(mutants.SMALL_QWEN3, aliases=("Llama",))
        context = Context(mutants.row_of(family), tmp_path)
        [outcome] = run_checks(context, [check_named("metadata")])
        assert "'llama' is a name of plugin llama31" in outcome.found


class TestCommand:
    def test_json(self) -> None:
        result = CliRunner().invoke(
            cli, ["plugin", "check", "qwen3", "--only", "layouts", "--json"], catch_exceptions=False
        )
        assert result.exit_code == 0
        found = json.loads(result.stdout)
        assert found["ok"] and found["complete"]
        [check] = found["checks"]
        assert (check["check"], check["state"]) == ("layouts", "passed")

    def test_a_failure_is_exit_code_3(self, tmp_path: Path) -> None:
        index = tmp_path / "model.safetensors.index.json"
        names = {f"{number}.weight": "a.safetensors" for number in range(40)}
        index.write_text(json.dumps({"weight_map": names}))
        arguments = ["check", "qwen3", "--index", str(index), "--preset", "0.6b", "--only", "index"]
        result = CliRunner().invoke(cli, ["plugin", *arguments], catch_exceptions=False)
        assert result.exit_code == 3
        assert "failed" in result.output and "310 tensors are missing" in result.output

    def test_a_preset_without_an_index(self) -> None:
        with pytest.raises(UsageError, match="there is no --index"):
            CliRunner().invoke(
                cli, ["plugin", "check", "qwen3", "--preset", "0.6b"], catch_exceptions=False
            )
