"""The evaluation stage: measure, write evaluation.json and report.html, draw the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from autodeco.decoding.evaluation import EvaluationResult, Problem, evaluate
from autodeco.decoding.problems import choose_format
from autodeco.decoding.progress import AnswersLine
from autodeco.decoding.report import write_report
from autodeco.decoding.results import evaluation_table
from autodeco.decoding.store import ANSWERS
from autodeco.files import atomic_write_json, read_object
from autodeco.heads.identity import CONFIG_FILE
from autodeco.heads.modules import DecodingHeads
from autodeco.heads.places import GENERATION_FILE
from autodeco.training.logging import METRICS, read_metrics


@dataclass(frozen=True)
class EvaluationOutcome:
    """What an evaluation left.

    Attributes:
        report: The HTML file.
        verdict: One paragraph.
        table: A renderable table.
        results: The result as JSON.
    """

    report: Path
    verdict: str
    table: Any
    results: dict[str, Any]


def evaluate_and_report(
    model: Any,
    heads: DecodingHeads | None,
    tokenizer: Any,
    problems: Sequence[Problem],
    directory: Path,
    *,
    base: Path,
    eos_ids: Sequence[int],
    job: dict[str, Any],
    console: Console,
    log_seconds: float = 10.0,
    **options: Any,
) -> EvaluationOutcome:
    """Evaluates and writes ``evaluation.json`` and ``report.html`` in `directory`.

    The answers are kept in ``answers.jsonl`` there as they come: killed, it goes on from them.

    Args:
        model: A transformers causal language model.
        heads: Its heads, or None.
        tokenizer: Its tokenizer.
        problems: To solve.
        directory: Where the files go; training metrics there enter the report.
        base: The base checkpoint, for the vendor's sampling defaults.
        eos_ids: Tokens that end an answer.
        job: Recorded in the report.
        console: Progress goes here.
        log_seconds: Without a terminal, one progress line every so many seconds.
        **options: See `autodeco.decoding.evaluation.evaluate`.
    """
    vendor = vendor_generation_config(base)
    form = choose_format(problems, tokenizer, options.pop("problem_format", "auto"))
    said = "as text that is already formatted" if form == "text" else "through the chat template"
    console.print(f"  {len(problems)} problems, asked {said}", highlight=False)
    with AnswersLine(console, log_seconds) as line:
        result: EvaluationResult = evaluate(
            model,
            heads,
            tokenizer,
            problems,
            generation_config=vendor,
            eos_ids=eos_ids,
            problem_format=form,
            progress=line.update,
            say=lambda text: console.print(f"  {text}", highlight=False),
            answers_file=directory / ANSWERS,
            **options,
        )
    plain = result.to_json()
    atomic_write_json(directory / "evaluation.json", plain)
    report = directory / "report.html"
    write_report(
        report,
        job=job,
        metrics=read_metrics(directory / METRICS),
        evaluation=result,
        tokenizer=tokenizer,
    )
    return EvaluationOutcome(report, " ".join(result.verdict), evaluation_table(result), plain)


def vendor_generation_config(directory: Path) -> dict[str, Any] | None:
    """The vendor's generation_config: merging keeps its sampling values in config.json.

    Args:
        directory: A base checkpoint, or a merged one of either layout.

    Returns:
        The values, None where the vendor gave no such file.
    """
    config = directory / CONFIG_FILE
    merged = read_object(config).get("autodeco") if config.exists() else None
    kept = merged.get("generation_config", {}) if isinstance(merged, dict) else {}
    if kept is None or (isinstance(kept, dict) and kept):
        return kept
    generation = directory / GENERATION_FILE
    return read_object(generation) if generation.exists() else None
