"""What an evaluation found: results of the settings, comparisons, verdict, table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from autodeco.decoding.comparison import CurveComparison, CurveJudge, halves
from autodeco.decoding.policy import DecodingPolicy
from autodeco.decoding.sampler import Answer
from autodeco.decoding.statistics import Array, accuracy_interval, paired_bootstrap

GREEDY, VENDOR, STATIC, MEAN_SHIFT, HEADS = "greedy", "vendor", "static", "mean shift", "heads"


@dataclass(frozen=True)
class SettingResult:
    """What one setting gave.

    Attributes:
        policy: the setting. role: greedy, vendor, static, mean shift or heads.
        accuracy, low, high: pass@1 and its 95 % interval (Wilson).
        entropy: mean nats an answer of the distribution drawn from.
        temperature, top_p: mean over tokens; None for greedy.
        length: mean tokens an answer. unfinished: share of answers cut at the longest length.
        correct, entropies: per problem, means over its samples.
        against_curve: the comparison with the static curve, for heads and mean shift.
    """

    policy: DecodingPolicy
    role: str
    accuracy: float
    low: float
    high: float
    entropy: float
    temperature: float | None
    top_p: float | None
    length: float
    unfinished: float
    correct: Array
    entropies: Array
    against_curve: CurveComparison | None = None

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.policy.name

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        plain = {k: v for k, v in vars(self).items() if k not in ("policy", "against_curve")}
        plain["policy"] = asdict(self.policy)
        plain["correct"] = [round(float(x), 6) for x in self.correct]
        plain["entropies"] = [round(float(x), 4) for x in self.entropies]
        compared = self.against_curve
        plain["against_curve"] = None if compared is None else compared.to_json()
        return plain


@dataclass(frozen=True)
class BestStatic:
    """The grid's most accurate setting on one half of the problems, judged on the other."""

    name: str
    chosen_accuracy: float
    accuracy: float
    low: float
    high: float
    entropy: float
    problems: int


@dataclass(frozen=True)
class Shown:
    """A sample answer for the report."""

    setting: str
    problem: str
    gt: str
    correct: bool
    answer: Answer


@dataclass(frozen=True)
class EvaluationResult:
    """All settings on the same problems and random numbers."""

    settings: tuple[SettingResult, ...]
    best_static: BestStatic | None
    problems: int
    samples: int
    seed: int
    max_new_tokens: int
    verdict: tuple[str, ...]
    shown: tuple[Shown, ...] = field(default=(), repr=False)

    def by_role(self, *roles: str) -> list[SettingResult]:
        """The settings with one of these roles, in order."""
        return [setting for setting in self.settings if setting.role in roles]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, the sample answers left out."""
        return {
            "problems": self.problems,
            "samples": self.samples,
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
            "verdict": list(self.verdict),
            "best_static": None if self.best_static is None else asdict(self.best_static),
            "settings": [setting.to_json() for setting in self.settings],
        }


def with_comparisons(
    results: Sequence[SettingResult], *, seed: int, resamples: int
) -> list[SettingResult]:
    """The same results; those of heads and mean shift compared with the static curve.

    The curve is made of the grid, the vendor's default and greedy.
    """
    static = [r for r in results if r.role in (GREEDY, VENDOR, STATIC)]
    correct = np.stack([r.correct for r in static])
    entropy = np.stack([r.entropies for r in static])
    judged = [r.role in (HEADS, MEAN_SHIFT) for r in results]
    if not any(judged):
        return list(results)
    judge = CurveJudge(correct, entropy, seed=seed, resamples=resamples)
    return [
        replace(r, against_curve=judge.compare(r.correct, r.entropies)) if wanted else r
        for r, wanted in zip(results, judged, strict=True)
    ]


def best_static(results: Sequence[SettingResult]) -> BestStatic | None:
    """Chooses the best of the grid (of equals the one with more entropy) and judges it."""
    grid = [r for r in results if r.role in (STATIC, VENDOR)]
    if not grid:
        return None
    choose, judge = halves(len(grid[0].correct))
    if not len(judge):
        judge = choose
    best = max(grid, key=lambda r: (r.correct[choose].mean(), r.entropies[choose].mean()))
    low, high = accuracy_interval(best.correct[judge][:, None])
    return BestStatic(
        name=best.name,
        chosen_accuracy=float(best.correct[choose].mean()),
        accuracy=float(best.correct[judge].mean()),
        low=low,
        high=high,
        entropy=float(best.entropies[judge].mean()),
        problems=len(judge),
    )


def verdict(results: Sequence[SettingResult], *, seed: int, resamples: int) -> list[str]:
    """What the numbers say of the heads, at equal entropy, in sentences."""
    heads = [r for r in results if r.role == HEADS]
    if not heads:
        return ["No heads were given: these are the static settings alone."]
    sentences = [_against_curve(result) for result in heads]
    reference = next((r for r in heads if _untouched(r.policy)), heads[0])
    sentences += [_against(reference, r, seed, resamples) for r in results if r.role == MEAN_SHIFT]
    better = [r for r in results if r.role not in (HEADS, MEAN_SHIFT) and _beats(r, reference)]
    if better:
        names = ", ".join(f"{r.name} ({r.accuracy:.3f} at {r.entropy:.1f})" for r in better)
        sentences.append(
            f"At no less entropy and no less accuracy than {reference.name} "
            f"({reference.accuracy:.3f} at {reference.entropy:.1f} nats): {names}."
        )
    return sentences


def _untouched(policy: DecodingPolicy) -> bool:
    return policy.temperature_scale == 1 and policy.top_p_scale == 1


def _beats(one: SettingResult, other: SettingResult) -> bool:
    return one.accuracy >= other.accuracy and one.entropy >= other.entropy


def _against_curve(result: SettingResult) -> str:
    assert result.against_curve is not None
    d = result.against_curve.accuracy
    if d.low > 0:
        said = "above the static curve"
    elif d.high < 0:
        said = "BELOW the static curve: a static baseline beats it at equal entropy"
    else:
        said = "not told apart from the static curve"
    text = (
        f"{result.name}: {said}, {100 * d.value:+.1f} points of accuracy at its entropy "
        f"[95 % {100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    )
    if not d.within:
        text += "; its entropy is beyond the curve's range, the nearest end was taken"
    return text + "."


def _against(heads: SettingResult, shift: SettingResult, seed: int, resamples: int) -> str:
    a, low, high = paired_bootstrap(heads.correct - shift.correct, seed=seed, resamples=resamples)
    e, e_low, e_high = paired_bootstrap(
        heads.entropies - shift.entropies, seed=seed, resamples=resamples
    )
    text = (
        f"{heads.name} minus {shift.name}: {100 * a:+.1f} points of accuracy "
        f"[{100 * low:+.1f}, {100 * high:+.1f}] and {e:+.2f} nats [{e_low:+.2f}, {e_high:+.2f}]"
    )
    if _beats(shift, heads):
        text += "; the mean shift is no worse in either: predicting token by token gained nothing"
    elif _beats(heads, shift):
        text += "; the heads are no worse in either"
    else:
        text += "; one has more accuracy, the other more entropy: read the curves"
    return text + "."


COLUMNS = (
    "setting",
    "pass@1",
    "95 %",
    "nats",
    "vs curve, points",
    "T",
    "P",
    "tokens",
    "cut",
)
_ON_SCREEN = 5  # of COLUMNS: what fits in 80 characters


def evaluation_table(result: EvaluationResult) -> Table:
    """All settings as a table for the screen, the verdict below it.

    A terminal of 80 characters shows the first columns; the report shows all of them.
    """
    answers = f"{result.problems} problems, {result.samples} sample(s) each, seed {result.seed}"
    table = Table(
        title=f"Evaluation: {answers}",
        caption="\n".join(result.verdict),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column(COLUMNS[0])  # the one that gives way where the terminal is narrow
    widest = {"95 %": "0.000-0.000", "vs curve, points": "+10.0 [+10.0, +10.0] *"}
    for name in COLUMNS[1:_ON_SCREEN]:
        width = len(widest.get(name, name))
        table.add_column(name, justify="right", no_wrap=True, min_width=width)
    for setting in result.settings:
        row = table_row(setting)[:_ON_SCREEN]
        table.add_row(*row, style="bold" if setting.role == HEADS else None)
    best = result.best_static
    if best is not None:
        table.add_section()
        table.add_row(*best_static_row(best)[:_ON_SCREEN], style="italic")
    return table


def table_row(setting: SettingResult) -> list[str]:
    """A setting's cells, under :data:`COLUMNS`."""
    compared = setting.against_curve
    difference = ""
    if compared is not None:
        d = compared.accuracy
        interval = f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
        difference = f"{100 * d.value:+.1f} {interval}{'' if d.within else ' *'}"
    return [
        setting.name,
        f"{setting.accuracy:.3f}",
        f"{setting.low:.3f}-{setting.high:.3f}",
        f"{setting.entropy:.1f}",
        difference,
        "" if setting.temperature is None else f"{setting.temperature:.3f}",
        "" if setting.top_p is None else f"{setting.top_p:.3f}",
        f"{setting.length:.1f}",
        f"{setting.unfinished:.1%}",
    ]


def best_static_row(best: BestStatic) -> list[str]:
    """The cells of the best static setting, judged on the half it was not chosen on."""
    return [
        f"best static ({best.name})",
        f"{best.accuracy:.3f}",
        f"{best.low:.3f}-{best.high:.3f}",
        f"{best.entropy:.1f}",
        *[""] * 5,
    ]
