"""Do the demo's heads stand above the whole static curve? Train, sample, judge, draw.

    python benchmarks/demo_curve.py --out benchmarks/results/demo_curve

Trains heads with ``--objective nll`` on the built-in model, three seeds, by the same stages as
``autodeco run``. Samples answers to held-out problems under every static setting of the grid and
under the heads over their dial, all with the same prompts and seeds. The static curve is the upper
hull of the grid, chosen on one half of the problems while the other half judges, both ways round
(``autodeco.decoding.statistics``):

  (a) accuracy of the heads minus the curve's at the heads' entropy,
  (b) entropy of the heads minus the curve's at the heads' accuracy,

with paired bootstrap 95 % intervals. The three settings of the dial that are judged were fixed
before the run (``JUDGED``); all others are reported too. Entropy is that of the truncated
distribution really sampled from, summed over an answer's tokens. Writes ``result.json`` and
``curve.svg``; exit status 1 where an interval of a judged setting does not lie above 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodeco import stories
from autodeco.convert.source import built_in_checkpoint
from autodeco.decoding.comparison import compare_with_curve
from autodeco.decoding.plot import COLOURS, Series, svg
from autodeco.decoding.policy import DecodingPolicy
from autodeco.decoding.sampler import Answer, sample_answers
from autodeco.decoding.statistics import Array, upper_hull
from autodeco.files import atomic_write_json, atomic_write_text
from autodeco.heads.files import load_heads
from autodeco.heads.modules import DecodingHeads
from autodeco.registry import Registry
from autodeco.training.checkpoint import find_checkpoint
from autodeco.training.tokenization import eos_token_ids

TEMPERATURES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
TOP_PS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
MIN_PS = (0.01, 0.03, 0.1, 0.3)
TEMPERATURE_DIAL = (1.15, 0.85, 0.7, 0.5)
TOP_P_DIAL = (0.98, 0.95, 0.9, 0.8, 0.7)
#: (temperature_scale, top_p_scale) of the settings that decide.
JUDGED = ((1.0, 1.0), (0.85, 1.0), (1.0, 0.95))


def static_grid() -> list[DecodingPolicy]:
    """Greedy, and every T with every top-p, with every min-p, and alone."""
    grid = [DecodingPolicy("greedy", "greedy")]
    for t in TEMPERATURES:
        grid.append(DecodingPolicy(f"T={t:g}", "static", temperature=t))
        for p in TOP_PS:
            grid.append(DecodingPolicy(f"T={t:g} P={p:g}", "static", temperature=t, top_p=p))
        for m in MIN_PS:
            grid.append(DecodingPolicy(f"T={t:g} min-p={m:g}", "static", temperature=t, min_p=m))
    return grid


def dial() -> list[DecodingPolicy]:
    """The heads as they are, and over each of the two multipliers."""
    scales = [(1.0, 1.0), *((t, 1.0) for t in TEMPERATURE_DIAL), *((1.0, p) for p in TOP_P_DIAL)]
    return [
        DecodingPolicy(_dial_name(t, p), "heads", temperature_scale=t, top_p_scale=p)
        for t, p in scales
    ]


def _dial_name(temperature_scale: float, top_p_scale: float) -> str:
    if top_p_scale != 1:
        return f"heads, P x {top_p_scale:g}"
    return f"heads, T x {temperature_scale:g}" if temperature_scale != 1 else "heads"


@dataclass(frozen=True)
class Scores:
    """What a policy did on every problem.

    Attributes:
        entropy: float64 [problems], nats an answer, mean over the answers to a problem.
        accuracy: float64 [problems].
        temperature, top_p: means over the tokens, for policies of the heads.
    """

    entropy: Array
    accuracy: Array
    temperature: float | None = None
    top_p: float | None = None

    @property
    def point(self) -> tuple[float, float]:
        """Mean entropy, mean accuracy."""
        return float(self.entropy.mean()), float(self.accuracy.mean())


class Sampler:
    """Answers to the evaluation problems under any policy, with one seed."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        self.options = options
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.model: Any = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
            .eval()
            .to(options.device)
        )
        self.rows = list(stories.problems(options.problem_seed, count=options.problems))
        self.prompts = [self.tokenizer(row["problem"])["input_ids"] for row in self.rows]
        self.eos = eos_token_ids(model, self.tokenizer)

    def scores(
        self, policies: Sequence[DecodingPolicy], heads: DecodingHeads | None, what: str
    ) -> list[Scores]:
        """Sample, check the answers, and sum the entropies."""
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(what)
            answers = sample_answers(
                self.model,
                heads,
                self.prompts,
                policies,
                samples=self.options.samples,
                max_new_tokens=110,
                eos_ids=self.eos,
                seed=self.options.sampling_seed,
                rows_at_once=self.options.rows,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        parts: list[list[Answer]] = [[] for _ in policies]
        for answer in answers:
            parts[answer.policy].append(answer)
        return [self._collect(part) for part in parts]

    def _collect(self, answers: Sequence[Answer]) -> Scores:
        shape = len(self.rows), self.options.samples
        entropy, accuracy = np.zeros(shape), np.zeros(shape)
        for answer in answers:
            at = answer.prompt, answer.sample
            text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
            entropy[at] = answer.entropy
            accuracy[at] = stories.check_answer(text, self.rows[answer.prompt]["gt"])
        means = [
            float(np.concatenate(found).mean())
            if (found := [v for v in values if v is not None])
            else None
            for values in ([a.temperature for a in answers], [a.top_p for a in answers])
        ]
        return Scores(entropy.mean(1), accuracy.mean(1), *means)


def train_heads(seed: int, options: argparse.Namespace) -> Path:
    """The best checkpoint of one training seed, made by the command line as a user would."""
    command = [sys.executable, "-m", "autodeco", "train", "--plugin", options.plugin]
    command += ["--preset", "demo", "--objective", "nll", "--seed", str(seed)]
    command += ["--device", options.device, "--out", str(options.out / "runs")]
    command += ["--name", f"seed-{seed}", "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return find_checkpoint(Path(json.loads(done.stdout)["run"]) / "checkpoints", "best")


@dataclass(frozen=True)
class Curve:
    """The static settings and what they did."""

    policies: tuple[DecodingPolicy, ...]
    scores: tuple[Scores, ...]

    def hull(self) -> list[int]:
        """The settings on the upper hull over all problems (for the table and the drawing)."""
        points = np.array([one.point for one in self.scores])
        return upper_hull(points[:, 0], points[:, 1])

    def judged(self, scores: Scores) -> dict[str, Any]:
        """One setting against the curve: both differences, with intervals."""
        comparison = compare_with_curve(
            np.stack([one.accuracy for one in self.scores]),
            np.stack([one.entropy for one in self.scores]),
            scores.accuracy,
            scores.entropy,
            seed=0,
        )
        entropy, accuracy = scores.point
        return {"entropy": entropy, "accuracy": accuracy, "gain": comparison.to_json()}


def mean_shift(scores: Scores) -> DecodingPolicy:
    """The constant setting at the mean of the heads' own predictions."""
    assert scores.temperature is not None and scores.top_p is not None
    return DecodingPolicy(
        "mean shift", "static", temperature=scores.temperature, top_p=scores.top_p
    )


def judge_seed(seed: int, curve: Curve, sampler: Sampler, heads_path: Path) -> dict[str, Any]:
    """All settings of the dial for one training seed, and the mean shift beside them."""
    heads = load_heads(heads_path).heads.to(sampler.options.device)
    policies = dial()
    scores = sampler.scores(policies, heads, f"heads, training seed {seed}")
    shift = mean_shift(scores[0])
    [shift_scores] = sampler.scores([shift], None, "mean shift")
    rows = [
        {
            "name": policy.name,
            "temperature_scale": policy.temperature_scale,
            "top_p_scale": policy.top_p_scale,
            "decides": (policy.temperature_scale, policy.top_p_scale) in JUDGED,
            **curve.judged(one),
        }
        for policy, one in zip(policies, scores, strict=True)
    ]
    return {
        "seed": seed,
        "heads": str(heads_path),
        "mean_shift": {
            "temperature": shift.temperature,
            "top_p": shift.top_p,
            **curve.judged(shift_scores),
        },
        "dial": rows,
    }


def draw(curve: Curve, seeds: Sequence[dict[str, Any]]) -> str:
    """The SVG: every static setting, the curve, each seed's dial, the mean shifts."""
    named = list(zip(curve.policies, curve.scores, strict=True))
    dots = [(*one.point, f"{p.name}: {one.point[1]:.3f}, {one.point[0]:.1f}") for p, one in named]
    line = [dots[i] for i in curve.hull()]
    series = [
        Series("static settings", dots, "#999999", marker="ring"),
        Series("static curve (upper hull)", line, "#4a4a4a", line=True),
    ]
    for colour, result in zip(itertools.cycle(COLOURS), seeds):
        label = f"heads, seed {result['seed']}"
        for dashed, key, name in (
            (False, "temperature_scale", f"{label}: T dial"),
            (True, "top_p_scale", f"{label}: P dial"),
        ):
            other = "top_p_scale" if key == "temperature_scale" else "temperature_scale"
            points = sorted(
                (row["entropy"], row["accuracy"], row["name"])
                for row in result["dial"]
                if row[other] == 1
            )
            series.append(Series(name, points, colour, line=True, dashed=dashed))
        shift = result["mean_shift"]
        spot = [(shift["entropy"], shift["accuracy"], f"mean shift, seed {result['seed']}")]
        series.append(Series(f"mean shift, seed {result['seed']}", spot, colour, marker="cross"))
    floor = 0.9 * min(row["accuracy"] for r in seeds for row in r["dial"])
    return svg(
        series,
        "Accuracy against entropy: the demo task",
        "entropy of the distribution drawn from, nats an answer",
        "accuracy",
        floor=floor,
    )


def tables(console: Console, curve: Curve, seeds: Sequence[dict[str, Any]]) -> None:
    """Print the curve and, for each seed, every setting of the dial against it."""
    static = Table(
        title=f"static curve, upper hull of {len(curve.policies)} settings", title_justify="left"
    )
    for name in ("setting", "entropy", "accuracy"):
        static.add_column(name, justify="left" if name == "setting" else "right")
    for i in curve.hull():
        entropy, accuracy = curve.scores[i].point
        static.add_row(curve.policies[i].name, f"{entropy:.1f}", f"{accuracy:.3f}")
    console.print(static)
    for result in seeds:
        table = Table(title=f"heads, training seed {result['seed']}", title_justify="left")
        for name in ("setting", "entropy", "accuracy", "(a) accuracy gain", "(b) entropy gain"):
            table.add_column(name, justify="left" if name == "setting" else "right")
        shift = result["mean_shift"]
        shift_name = f"mean shift (T={shift['temperature']:.3f} P={shift['top_p']:.3f})"
        for row in [*result["dial"], {"name": shift_name, **shift}]:
            table.add_row(*_cells(row))
        console.print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["name"] + (" *" if row.get("decides") else "")]
    cells += [f"{row['entropy']:.1f}", f"{row['accuracy']:.3f}"]
    for kind, form in (("accuracy", "+.3f"), ("entropy", "+.1f")):
        gain = row["gain"][kind]
        cell = f"{gain['value']:{form}} [{gain['low']:{form}}, {gain['high']:{form}}]"
        cells.append(cell if gain["within"] else f"{cell}, beyond the curve's range")
    return cells


def failures(seeds: Sequence[dict[str, Any]]) -> list[str]:
    """The judged settings that do not stand above the curve, in words."""
    return [
        f"seed {result['seed']}, {row['name']}: {kind} from {row['gain'][kind]['low']:+.3f}"
        for result in seeds
        for row in result["dial"]
        if row["decides"]
        for kind in ("accuracy", "entropy")
        if row["gain"][kind]["low"] <= 0
    ]


def demo_checkpoint(plugin: str) -> Path:
    """The checkpoint that the plugin ships."""
    resolution = Registry().resolve(plugin, None, "demo")
    return built_in_checkpoint(resolution.family, resolution.preset, Path())


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/demo_curve"))
    parser.add_argument("--plugin", default="qwen3")
    parser.add_argument("--model", type=Path, help="default: the plugin's demo checkpoint")
    parser.add_argument("--heads", type=Path, nargs="*", help="trained heads, instead of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the training")
    parser.add_argument("--problems", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=1, help="answers a problem and setting")
    parser.add_argument("--problem-seed", type=int, default=0)
    parser.add_argument("--sampling-seed", type=int, default=1234)
    parser.add_argument("--rows", type=int, default=1024, help="answers sampled at once")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> int:
    """Run the experiment; 0 if every judged setting stands above the curve."""
    options = parse()
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    heads = options.heads or [train_heads(seed, options) for seed in options.seeds]
    sampler = Sampler(options.model or demo_checkpoint(options.plugin), options)
    grid = static_grid()
    curve = Curve(tuple(grid), tuple(sampler.scores(grid, None, "static settings")))
    numbers = options.seeds if not options.heads else range(len(heads))
    seeds = [
        judge_seed(seed, curve, sampler, path) for seed, path in zip(numbers, heads, strict=True)
    ]
    failed = failures(seeds)
    by_name = {p.name: one.point for p, one in zip(curve.policies, curve.scores, strict=True)}
    options.out.mkdir(parents=True, exist_ok=True)
    atomic_write_json(
        options.out / "result.json",
        {
            "problems": options.problems,
            "samples": options.samples,
            "static_settings": len(grid),
            "failure_rate_at_T_1": 1 - by_name["T=1"][1],
            "static": {name: list(point) for name, point in by_name.items()},
            "hull": [curve.policies[i].name for i in curve.hull()],
            "seeds": seeds,
            "failed": failed,
            "seconds": round(time.monotonic() - began, 1),
        },
    )
    atomic_write_text(options.out / "curve.svg", draw(curve, seeds))
    console = Console(width=120)
    tables(console, curve, seeds)
    console.print(f"sampling at T=1 fails {1 - by_name['T=1'][1]:.1%} of the time")
    console.print(
        "* judged. "
        + (
            "NOT above the curve: " + "; ".join(failed)
            if failed
            else "Every judged setting of every seed stands above the static curve."
        )
    )
    console.print(
        f"wrote {options.out}/result.json and curve.svg, {time.monotonic() - began:.0f} s",
        highlight=False,
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
