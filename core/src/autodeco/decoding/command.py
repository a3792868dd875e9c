"""What ``autodeco generate`` and ``autodeco evaluate`` do with paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group

from autodeco.decoding import AutoDecoModelForCausalLM
from autodeco.decoding.evaluation import Problem, load_problems, problem_prompts
from autodeco.decoding.model import load_decoded
from autodeco.decoding.stage import EvaluationOutcome, evaluate_and_report
from autodeco.decoding.terminal import coloured_tokens, legend
from autodeco.engines import hf
from autodeco.engines.hf import loading_by_transformers, loading_options, stores_parts
from autodeco.engines.select import choose_device, choose_dtype
from autodeco.errors import DataError, NumericsError, WeightsError
from autodeco.files import make_directory
from autodeco.heads.attach import ASKED, ASKED_OPTIONS
from autodeco.heads.identity import CONFIG_FILE
from autodeco.heads.modules import DecodingHeads
from autodeco.heads.places import is_merged
from autodeco.job import Job
from autodeco.job_values import coerce_values
from autodeco.training.tokenization import eos_token_ids, load_tokenizer

_WINDOW = 16  # tokens decoded together


@dataclass(frozen=True)
class GeneratedText:
    """One answer.

    Attributes:
        prompt: As given.
        tokens: The answer's tokens as text.
        temperature: T that each was sampled with.
        top_p: P that each was sampled with.
    """

    prompt: str
    tokens: tuple[str, ...]
    temperature: tuple[float, ...]
    top_p: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {**vars(self), "text": "".join(self.tokens)}

    def render(self) -> Group:
        """Returns the coloured text with its legend."""
        return Group(coloured_tokens(self.tokens, self.temperature, self.top_p), "", legend())


def _load(
    model: Path, heads: Path | None, device: str = "auto", dtype: str = "auto"
) -> tuple[Any, torch.device]:
    if not model.is_dir():
        raise WeightsError("no such checkpoint", where=str(model), fix="check --model")
    chosen = choose_device(device)
    kind = choose_dtype(dtype, model, chosen)
    safe = loading_options(model)
    if stores_parts(model):
        return load_decoded(model, heads or model, kind).to(chosen), chosen
    with loading_by_transformers(model):
        loaded = AutoDecoModelForCausalLM.from_pretrained(model, heads=heads, dtype=kind, **safe)
    return loaded.to(chosen), chosen


def generate_text(
    *,
    model: Path,
    heads: Path | None,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    temperature_scale: float | None,
    top_p_scale: float | None,
    seed: int,
    device: str = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> GeneratedText:
    """Samples one answer with the heads.

    Args:
        model: A merged checkpoint, or a base checkpoint.
        heads: Heads (directory or file), when the model is a base.
        prompt: Already formatted, or with `chat` a user's message.
        chat: Whether the prompt goes through the chat template.
        max_new_tokens: Longest answer.
        temperature_scale: The dial; None: as stored with the heads.
        top_p_scale: Likewise.
        seed: Of the sampling.
        device: auto, cpu, cuda or cuda:N.
        chat_template_kwargs: For the chat template.

    Raises:
        WeightsError, DataError: The checkpoint, its heads or its tokenizer cannot be used.
    """
    loaded, chosen = _load(model, heads, device)
    tokenizer = load_tokenizer(model)
    asked = [Problem(prompt, "-", None, 1)]
    ids = problem_prompts(asked, tokenizer, chat=chat, chat_template_kwargs=chat_template_kwargs)[0]
    if not ids:
        raise DataError(
            "the prompt has no token", where="--prompt", fix="give some text to go on from"
        )
    torch.manual_seed(seed)
    eos = list(eos_token_ids(model, tokenizer)) or None
    try:
        out = loaded.generate(
            torch.tensor([ids], device=chosen),
            do_sample=True,
            max_new_tokens=max_new_tokens,
            temperature_scale=temperature_scale,
            top_p_scale=top_p_scale,
            return_autodeco=True,
            pad_token_id=tokenizer.pad_token_id or 0,
            eos_token_id=eos,
        )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NumericsError(
            "the model's probabilities are not finite",
            where=str(model),
            fix="a weight is damaged, or too large for the dtype: fetch the checkpoint again",
        ) from error
    answer = out.sequences[0, len(ids) :].tolist()
    texts = _pieces(tokenizer, answer)
    count = len(answer)
    return GeneratedText(
        prompt,
        tuple(texts),
        tuple(out.temperature[0, :count].tolist()),
        tuple(out.top_p[0, :count].tolist()),
    )


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Splits a decoded text into its tokens' parts; bytes of one letter stay together.

    A tokenizer's decoding of a token depends on the few before it alone, so that a window that
    moves along says the same as the whole text.
    """
    pieces: list[str] = []
    start, seen = 0, 0  # of the window, and how many of its tokens have their part already
    before = ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:count])
        if text.endswith("\ufffd") and count < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        if count - start > _WINDOW:
            start = seen
            text = tokenizer.decode(ids[start:count])
        before, seen = text, count
    return pieces


def evaluate_checkpoint(
    *,
    model: Path,
    heads: Path | None,
    problems: Path,
    output: Path,
    console: Console,
    limit: int,
    asked: Mapping[str, Any],
    device: str = "auto",
    dtype: str = "auto",
    **options: Any,
) -> EvaluationOutcome:
    """Evaluates a merged checkpoint, or a base checkpoint with or without heads.

    Args:
        model: A merged checkpoint, or a base checkpoint.
        heads: Heads (directory or file), when the model is a base.
        problems: JSON lines of problem and gt.
        output: Directory of evaluation.json, report.html and answers.jsonl.
        console: Progress goes here.
        limit: At most this many problems.
        asked: Those of `ASKED_OPTIONS` that the user gave; for the others what the heads
            remember of their job holds, then the job's default.
        device: auto, cpu, cuda or cuda:N.
        dtype: Of the backbone, see `choose_dtype`.
        **options: See `evaluate_and_report`.

    Raises:
        WeightsError, DataError: The checkpoint, its heads or the problems cannot be used.
        UsageError: What the heads remember is no value of that option.
    """
    loaded, found = _load_for_evaluation(model, heads, device, dtype)
    tokenizer = load_tokenizer(model)
    remembered = getattr(loaded, "autodeco_metadata", {}).get(ASKED) or {}
    known = {name: remembered[name] for name in ASKED_OPTIONS if name in remembered}
    known = coerce_values(known, where=f"{ASKED} in {CONFIG_FILE} of {heads or model}")
    defaults = {name: getattr(Job(), name) for name in ASKED_OPTIONS}
    return evaluate_and_report(
        loaded,
        found,
        tokenizer,
        load_problems(problems, limit=limit),
        make_directory(output),
        base=model,
        eos_ids=eos_token_ids(model, tokenizer),
        job={"model": str(model), "heads": str(heads or model), "problems": str(problems)},
        console=console,
        **{**defaults, **known, **asked},
        **options,
    )


def _load_for_evaluation(
    model: Path, heads: Path | None, device: str, dtype: str
) -> tuple[Any, DecodingHeads | None]:
    if heads is not None or is_merged(model):
        loaded, _ = _load(model, heads, device, dtype)
        return loaded, loaded.autodeco_heads
    from transformers import AutoModelForCausalLM

    chosen = choose_device(device)
    kind = choose_dtype(dtype, model, chosen)
    safe = loading_options(model)
    if stores_parts(model):
        return hf.load_decoded(model, kind).to(chosen), None
    with loading_by_transformers(model):
        base = AutoModelForCausalLM.from_pretrained(str(model), dtype=kind, **safe)
    return base.eval().to(chosen), None
