"""report.html: one file that shows what a run trained and how it decodes; needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from autodeco.decoding.plot import COLOURS, Frame, Series, svg
from autodeco.decoding.results import (
    COLUMNS,
    GREEDY,
    HEADS,
    MEAN_SHIFT,
    STATIC,
    VENDOR,
    EvaluationResult,
    SettingResult,
    Shown,
    best_static_row,
    table_row,
)
from autodeco.decoding.statistics import upper_hull
from autodeco.decoding.terminal import token_rgb
from autodeco.files import atomic_write_text

_SMALL = Frame(width=560, height=260, right=150, bottom=52)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left }
tr.heads { font-weight: 600 } tr.best { font-style: italic }
.answer { white-space: pre-wrap; font-family: ui-monospace, monospace; background: #121212;
  color: #bebebe; padding: .8rem; border-radius: 6px; overflow-wrap: anywhere }
.problem { white-space: pre-wrap; overflow-wrap: anywhere }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
pre { font-size: 12px; overflow-x: auto } svg { max-width: 100%; height: auto }
"""


def write_report(
    path: Path,
    *,
    job: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    evaluation: EvaluationResult,
    tokenizer: Any,
) -> None:
    """Writes the report, beside its place first, then renamed.

    Args:
        path: Of the HTML file.
        job: Shown at the end.
        metrics: Rows of metrics.jsonl; without rows there are no training curves.
        evaluation: What was measured.
        tokenizer: Decodes the sample answers.

    Raises:
        EnvironmentProblem: It cannot be written.
    """
    name = escape(str(job.get("name") or job.get("model") or "AutoDeco"))
    sections = [
        f"<h1>{name}</h1>",
        *[f"<p>{escape(sentence)}</p>" for sentence in evaluation.verdict],
        "<h2>Accuracy against entropy</h2>",
        _explanation(evaluation),
        accuracy_entropy_plot(evaluation),
        _table(evaluation),
        *_training(metrics),
        *_answers(evaluation.shown, tokenizer),
        "<h2>Job</h2>",
        f"<pre>{escape(json.dumps(job, indent=1, default=str, ensure_ascii=False))}</pre>",
    ]
    atomic_write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n",
    )


def _explanation(result: EvaluationResult) -> str:
    return (
        f"<p>{result.problems} problems, {result.samples} answer(s) each, seed {result.seed}, at "
        f"most {result.max_new_tokens} tokens. Entropy is that of the distribution each token was "
        "really drawn from, after temperature and cut, summed over an answer (nats). A lower "
        "temperature buys accuracy with entropy for anybody, so settings are compared at equal "
        "entropy: &ldquo;vs curve&rdquo; is accuracy minus that of the best static settings "
        "at the same entropy, chosen on one half of the problems and judged on the other, both "
        "ways round, with a paired bootstrap 95 % interval (* beyond the curve's range). The best "
        "static setting is chosen on one half of the problems and judged on the other.</p>"
    )


def accuracy_entropy_plot(result: EvaluationResult) -> str:
    """Returns the plot of all settings as SVG: baselines, their upper hull, heads over the dial."""
    static = result.by_role(GREEDY, VENDOR, STATIC)
    hull = upper_hull(
        np.array([one.entropy for one in static]), np.array([one.accuracy for one in static])
    )
    series = [
        Series(
            "static upper hull",
            [_spot(static[n]) for n in hull],
            "#999999",
            line=True,
            marker="none",
        ),
        Series("static grid", [_spot(s) for s in result.by_role(STATIC)], "#777777", marker="ring"),
        Series("greedy", [_spot(s) for s in result.by_role(GREEDY)], COLOURS[2]),
        Series("vendor default", [_spot(s) for s in result.by_role(VENDOR)], COLOURS[3]),
    ]
    heads = result.by_role(HEADS)
    for colour, dashed, name, other in (
        (COLOURS[0], False, "heads, T dial", "top_p_scale"),
        (COLOURS[4], True, "heads, P dial", "temperature_scale"),
    ):
        turned = sorted(_spot(s) for s in heads if getattr(s.policy, other) == 1)
        series.append(Series(name, turned, colour, line=True, dashed=dashed))
    both = [_spot(s) for s in heads if s.policy.temperature_scale != 1 != s.policy.top_p_scale]
    series.append(Series("heads, both dials", both, COLOURS[5]))
    shift = [_spot(s) for s in result.by_role(MEAN_SHIFT)]
    series.append(Series("mean shift", shift, COLOURS[1], marker="cross"))
    return svg(
        [one for one in series if one.points],
        "Accuracy against entropy",
        "entropy of the distribution drawn from, nats an answer",
        "pass@1",
    )


def _spot(setting: SettingResult) -> tuple[float, float, str]:
    note = f"{setting.name}: {setting.accuracy:.3f} at {setting.entropy:.2f} nats"
    return setting.entropy, setting.accuracy, note


def _table(result: EvaluationResult) -> str:
    rows = [("heads" if s.role == HEADS else "", table_row(s)) for s in result.settings]
    if result.best_static is not None:
        rows.append(("best", best_static_row(result.best_static)))
    body = "\n".join(
        f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for kind, cells in rows
    )
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


_CURVES = (
    ("Loss", "a kept token", (("loss", "loss"),)),
    ("NLL before the cut", "nats a token", (("nll", "NLL"),)),
    ("Labels outside the nucleus", "share", (("outside_nucleus", "share"),)),
    ("Temperature and top-p", "mean", (("temperature_mean", "T"), ("top_p_mean", "P"))),
    ("... and their spread", "std", (("temperature_std", "T"), ("top_p_std", "P"))),
    ("Learning rate", "", (("learning_rate", "rate"),)),
)


def _training(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """The training curves: one plot a measure, training thin, held-out with dots."""
    plots = []
    for title, unit, measures in _CURVES:
        series = []
        for number, (key, label) in enumerate(measures):
            for kind, said in (("train", "training"), ("eval", "held out")):
                points = [
                    (float(row["step"]), float(row[key]), f"step {row['step']}: {row[key]:.4g}")
                    for row in metrics
                    if row["kind"] == kind and key in row
                ]
                if points:
                    colour = COLOURS[2 * number + (kind == "train")]
                    marker = "dot" if kind == "eval" else "none"
                    name = f"{label}, {said}"
                    series.append(Series(name, points, colour, line=True, marker=marker))
        if series:
            plots.append(svg(series, title, "step", unit, frame=_SMALL))
    return ["<h2>Training</h2>", '<div class="curves">', *plots, "</div>"] if plots else []


def _answers(shown: Sequence[Shown], tokenizer: Any) -> list[str]:
    if not shown:
        return []
    parts = ["<h2>Sample answers</h2>"]
    if any(one.answer.temperature is not None or one.answer.top_p is not None for one in shown):
        parts.append(
            "<p>Letters go from blue (T 0) over grey (1) to red (2), the ground from black (P 1, "
            "nothing cut) to grey (P 0, one token left). Hover for the numbers.</p>"
        )
    for one in shown:
        told = "correct" if one.correct else f"wrong, the answer is {one.gt}"
        parts.append(f"<h3>{escape(one.setting)}: {escape(told)}</h3>")
        parts.append(f'<p class="problem">{escape(one.problem)}</p>')
        parts.append(f'<div class="answer">{_tokens(one, tokenizer)}</div>')
    return parts


def _tokens(one: Shown, tokenizer: Any) -> str:
    answer = one.answer
    spans = []
    for n, token in enumerate(answer.ids.tolist()):
        text = escape(tokenizer.decode([token]))
        t = None if answer.temperature is None else float(answer.temperature[n])
        p = None if answer.top_p is None else float(answer.top_p[n])
        if t is None and p is None:
            spans.append(text)
            continue
        ink, ground = token_rgb(1.0 if t is None else t, 1.0 if p is None else p)
        said = ", ".join(
            f"{name} {value:.3f}" for name, value in (("T", t), ("P", p)) if value is not None
        )
        spans.append(
            f'<span title="{said}" style="color:rgb{ink};background:rgb{ground}">{text}</span>'
        )
    return "".join(spans)
