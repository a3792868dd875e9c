"""The kit finds each defect at its own check, and what comes before it passes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mutants
import pytest

from autodeco.convert import operations
from autodeco.convert.operations import unpack
from autodeco.family import FamilySpec
from autodeco.layout import ParallelLayout
from autodeco.plugin import FamilyPlugin
from autodeco.testing.checks import CHECKS, check_named
from autodeco.testing.context import Context
from autodeco.testing.ranks import Case, CheckFailed, launch
from autodeco.testing.runner import FAILED, PASSED, Outcome, run_checks

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

INNER = [check for check in CHECKS if check.name not in ("metadata", "imports", "index", "landing")]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    Context(mutants.row_of(mutants.SMALL_QWEN3), tmp_path).leave_groups()


def first_failure(
    plugin: FamilyPlugin | FamilySpec, place: Path, until: str, leaving: Sequence[str] = ()
) -> Outcome:
    """Makes the checks up to one, some left out; all before it must pass. Returns what it says."""
    names = [check.name for check in INNER if check.name not in leaving]
    checks = [check_named(name) for name in names[: names.index(until) + 1]]
    *before, last = run_checks(Context(mutants.row_of(plugin), place), checks)
    assert {o.check.name: o.found for o in before if o.state != PASSED} == {}
    assert last.state == FAILED
    assert last.fix
    return last


BROKEN: dict[str, tuple[FamilySpec, str, str]] = {
    "k and v swapped": (mutants.KV_SWAPPED, "logits-megatron", "logits differ by"),
    "a rule dropped": (mutants.RULE_DROPPED, "names", "'model.layers.0.mlp.down_proj.weight'"),
    "down_proj transposed": (mutants.DOWN_TRANSPOSED, "names", "(64, 96) there, (96, 64) in the"),
    "square down_proj transposed": (mutants.DOWN_TRANSPOSED_SQUARE, "map", "is square"),
    "norms swapped": (mutants.NORMS_SWAPPED, "logits-megatron", "logits differ by"),
    "q and k norms swapped": (mutants.QK_NORMS_SWAPPED, "logits-megatron", "logits differ by"),
    "interleaving forgotten": (mutants.NOT_INTERLEAVED, "logits-megatron", "logits differ by"),
    "a rule twice": (mutants.RULE_TWICE, "map", "source tensor is read twice"),
    "a window that is never left": (mutants.WIDE_WINDOW, "reach", "without window the logits"),
    "a clamp that nothing reaches": (mutants.HIGH_CLAMP, "reach", "without swiglu_limit"),
    "window too wide": (mutants.WINDOW_TOO_WIDE, "logits-megatron", "logits differ by"),
    "sinks left out": (mutants.NO_SINKS, "engine-names", "softmax_offset"),
    "scale skipped": (mutants.SCALE_SKIPPED, "storage", "comes back with an error"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_family_fails_at_its_level(name: str, place: Path) -> None:
    mutant, check, says = BROKEN[name]
    assert says in first_failure(mutant, place, check).found


def test_a_square_matrix_that_is_transposed_shows_in_the_logits(place: Path) -> None:
    found = first_failure(
        mutants.DOWN_TRANSPOSED_SQUARE, place, "logits-megatron", ("map", "names")
    )
    assert found.found.startswith("logits differ by")


def test_a_clamp_that_is_left_out_shows_in_large_activations_alone(place: Path) -> None:
    found = first_failure(mutants.NO_CLAMP, place, "logits-megatron", ("names", "engine-names"))
    assert "large activations" in str(found.where)


def test_a_scale_that_is_skipped_is_named_by_perturbation(place: Path) -> None:
    checks = [check_named("perturbation")]
    context = Context(mutants.row_of(mutants.SCALE_SKIPPED), place)
    [outcome] = run_checks(context, checks)
    assert outcome.state == FAILED
    assert "weight_scale_inv' hardly matters" in outcome.found


def test_an_operation_that_is_no_inverse(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(*given: Any) -> Any:
        return tuple(part.flip(0) for part in unpack(*given))

    monkeypatch.setattr(operations, "unpack", backwards)
    found = first_failure(mutants.SMALL_QWEN3, place, "round-trip", ("names", "engine-names"))
    assert "comes back as another tensor" in found.found


def test_a_wrong_parallel_dim_lands_on_no_rank(place: Path) -> None:
    large = dataclasses.replace(
        mutants.SMALL_QWEN3.preset("0.6b"), layout=ParallelLayout(tensor=2, gpus=2)
    )
    family = dataclasses.replace(mutants.SPLIT_OTHERWISE.family, presets=(large,))
    context = Context(mutants.row_of(family), place)
    engine, landing = run_checks(context, [check_named("engine-names"), check_named("landing")])
    assert (engine.state, landing.state) == (PASSED, FAILED)
    assert "linear_proj.weight' has the shape" in landing.found


MAPS = ("storage", "names", "engine-names", "round-trip", "reach")


@pytest.mark.parametrize(
    ("kind", "check", "says"),
    [
        (mutants.OtherModel, "logits-hf", "logits differ by"),
        (mutants.Unfrozen, "training", "'model.layers.1.self_attn.q_proj.weight' is not frozen"),
        (mutants.Drifting, "training", "its fingerprint changed"),
        (mutants.HeadsOfAnotherWidth, "training", "the heads cannot read the hidden states"),
        (mutants.FrozenHeads, "training", "'temp_head.mlp.0.weight'"),
        (mutants.NewHeadsExported, "export", "from that of the trained heads"),
    ],
)
def test_a_broken_override_of_a_hook_fails_at_its_level(
    kind: type[FamilyPlugin], check: str, says: str, place: Path
) -> None:
    found = first_failure(kind(mutants.SMALL_QWEN3), place, check, MAPS)
    assert says in found.found


class TestPresets:
    @staticmethod
    def failing(place: Path, check: str, **changes: object) -> Outcome:
        debug = dataclasses.replace(mutants.SMALL_QWEN3.preset("debug"), **changes)  # type: ignore[arg-type]
        presets = (debug, mutants.SMALL_QWEN3.preset("0.6b"))
        family = dataclasses.replace(mutants.SMALL_QWEN3, presets=presets)
        return first_failure(family, place, check)

    def test_a_recipe_that_no_job_knows(self, place: Path) -> None:
        found = self.failing(place, "presets", recipe={"batch": 3})
        assert "unknown option 'batch'" in found.found
        assert found.where == "preset debug, recipe"

    def test_a_folder_that_is_not_there(self, place: Path) -> None:
        assert "no folder 'demos'" in self.failing(place, "presets", tokenizer="demos").found

    def test_nothing_to_compute_with(self, place: Path) -> None:
        assert "no preset has random" in self.failing(place, "presets", random=False).found

    def test_a_model_id_of_two_presets(self, place: Path) -> None:
        ids = mutants.SMALL_QWEN3.preset("0.6b").model_ids
        assert "is there twice" in self.failing(place, "presets", model_ids=ids).found

    def test_a_layout_that_splits_nothing_evenly(self, place: Path) -> None:
        found = self.failing(place, "layouts", layout=ParallelLayout(tensor=4, gpus=4))
        assert "6 query heads over 4 ranks" in found.found

    def test_a_layout_for_fewer_gpus_than_it_has_ranks(self, place: Path) -> None:
        found = self.failing(place, "layouts", layout=ParallelLayout(tensor=2))
        assert "does not divide 1 processes" in found.found


@pytest.mark.slow
class TestRanks:
    @pytest.fixture(autouse=True)
    def _found_by_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", str(Path(mutants.__file__).parent))

    def test_a_wrong_parallel_dim(self, place: Path) -> None:
        row = mutants.row_of(mutants.SPLIT_OTHERWISE)
        context = Context(row, place, layouts=("tp=2",), locator="mutants:SPLIT_OTHERWISE")
        checks = [check_named(n) for n in ("logits-hf", "logits-megatron", "ranks")]
        *before, last = run_checks(context, checks)
        assert [outcome.state for outcome in before] == [PASSED, PASSED]
        assert last.state == FAILED
        # both fail alike, and either can be the first that the launcher sees
        assert "has the shape" in last.found and re.search("process [01] of 2 failed", last.found)

    def test_a_process_that_hangs_is_killed(self, place: Path) -> None:
        context = Context(mutants.row_of(mutants.HANGING), place, locator="mutants:HANGING")
        case = Case("debug", "tp=2", str(context.model(mutants.SMALL_QWEN3.preset("debug"))), "")
        with pytest.raises(CheckFailed, match="did not end in 20 s and was killed") as error:
            launch(context, [case], seconds=20)
        assert "rank is asleep" in error.value.what
