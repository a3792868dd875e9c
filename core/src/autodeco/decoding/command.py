"""What ``autodeco generate`` and ``autodeco evaluate`` do with paths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group

from autodeco.decoding import AutoDecoModelForCausalLM
from autodeco.decoding.evaluation import Problem, load_problems, problem_prompts
from autodeco.decoding.stage import EvaluationOutcome, evaluate_and_report
from autodeco.decoding.terminal import coloured_tokens, legend
from autodeco.engines.select import choose_device, choose_dtype
from autodeco.errors import EnvironmentProblem
from autodeco.files import make_directory
from autodeco.heads.files import load_heads
from autodeco.heads.modules import DecodingHeads
from autodeco.training.tokenization import eos_token_ids, load_tokenizer


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


def _load(model: Path, heads: Path | None, device: str = "auto") -> tuple[Any, torch.device]:
    chosen = choose_device(device)
    dtype = choose_dtype("auto", model, chosen)
    loaded = AutoDecoModelForCausalLM.from_pretrained(model, heads=heads, dtype=dtype)
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
) -> GeneratedText:
    """Samples one answer with the heads.

    Raises:
        WeightsError, DataError: The checkpoint, its heads or its tokenizer cannot be used.
    """
    loaded, device = _load(model, heads)
    tokenizer = load_tokenizer(model)
    ids = problem_prompts([Problem(prompt, "-", None, 1)], tokenizer, chat=chat)[0]
    torch.manual_seed(seed)
    out = loaded.generate(
        torch.tensor([ids], device=device),
        do_sample=True,
        max_new_tokens=max_new_tokens,
        temperature_scale=temperature_scale,
        top_p_scale=top_p_scale,
        return_autodeco=True,
        pad_token_id=tokenizer.pad_token_id or 0,
        eos_token_id=list(eos_token_ids(model, tokenizer)) or None,
    )
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
    """Splits a decoded text into its tokens' parts; bytes of one letter stay together."""
    pieces: list[str] = []
    before = ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        if text.endswith("\ufffd") and count < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        before = text
    return pieces


def evaluate_checkpoint(
    *,
    model: Path,
    heads: Path | None,
    problems: Path,
    output: Path,
    limit: int,
    samples: int,
    max_new_tokens: int,
    seed: int,
    device: str,
    console: Console,
) -> EvaluationOutcome:
    """Evaluates a merged checkpoint, or a base checkpoint with or without heads.

    Raises:
        WeightsError, DataError: The checkpoint, its heads or the problems cannot be used.
    """
    from transformers import AutoModelForCausalLM

    chosen = choose_device(device)
    found = _heads_of(model, heads)
    dtype = choose_dtype("auto", model, chosen)
    try:
        base = AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"transformers cannot load the model: {error}", where=str(model), fix="check --model"
        ) from error
    tokenizer = load_tokenizer(model)
    return evaluate_and_report(
        base.eval().to(chosen),
        found.to(chosen) if found is not None else None,
        tokenizer,
        load_problems(problems, limit=limit),
        make_directory(output),
        base=model,
        eos_ids=eos_token_ids(model, tokenizer),
        job={"model": str(model), "heads": str(heads or model), "problems": str(problems)},
        console=console,
        samples=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )


def _heads_of(model: Path, heads: Path | None) -> DecodingHeads | None:
    if heads is not None:
        return load_heads(heads).heads
    return load_heads(model).heads if (model / "autodeco").is_dir() else None
