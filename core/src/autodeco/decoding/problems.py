"""Problems to evaluate on: the file's rules, and the prompts made from it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from autodeco.errors import DataError, UsageError
from autodeco.foreign import each_once
from autodeco.training.data import numbered_lines
from autodeco.training.tokenization import tokenize_prompt

FORMATS = ("auto", "text", "chat")


@dataclass(frozen=True)
class Problem:
    """One line of a problems file: text or messages, and the ground truth."""

    problem: str
    gt: str
    messages: tuple[Mapping[str, Any], ...] | None
    line: int


def load_problems(path: Path, *, limit: int | None = None) -> list[Problem]:
    """Reads problems from JSON lines: ``problem`` (text) or ``messages``, and ``gt``.

    Args:
        path: the file; empty lines are passed over.
        limit: stop after this many.

    Raises:
        DataError: The file or a line of it cannot be used; the message has file and line.
    """
    problems: list[Problem] = []
    where = str(path)
    try:
        with path.open("rb") as stream:
            for number, raw in numbered_lines(stream, path):
                if limit is not None and len(problems) >= limit:
                    break
                where = f"{path}:{number}"
                line = raw.decode("utf-8-sig")
                if line.strip():
                    problems.append(_problem(line, where, number))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the problems: {error}",
            where=where,
            fix="check the path of --problems; the file is UTF-8 text",
        ) from error
    if not problems:
        raise DataError(
            "the file has no problems", where=str(path), fix="give lines of problem and gt"
        )
    return problems


def _problem(line: str, where: str, number: int) -> Problem:
    try:
        record = json.loads(line, object_pairs_hook=each_once)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "the text holds half a character (a \\ud800..\\udfff escape without its pair)",
            where=where,
            fix="write the whole character, or remove it",
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise DataError(
            f"malformed JSON: {getattr(error, 'msg', error)}",
            where=f"{where}:{getattr(error, 'colno', 1)}",
            fix="write one JSON object a line",
        ) from error
    if not isinstance(record, dict):
        raise DataError("not a JSON object", where=where, fix="write one JSON object a line")
    gt = record.get("gt")
    if isinstance(gt, float) and math.isfinite(gt):
        gt = f"{Decimal(str(gt)):f}"  # 0.00001, where str() says 1e-05
    if isinstance(gt, bool | float) or not isinstance(gt, str | int) or str(gt).strip() == "":
        raise DataError(
            "no ground truth", where=where, fix="give 'gt', the right answer, as text or number"
        )
    text, messages = record.get("problem"), record.get("messages")
    if messages is not None:
        good = isinstance(messages, list) and messages
        if not good or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise DataError(
                "'messages' is not a list of messages with a role",
                where=where,
                fix='write [{"role": "user", "content": ...}]',
            )
        return Problem(str(text or ""), str(gt), tuple(messages), number)
    if not isinstance(text, str) or not text:
        raise DataError("no problem text", where=where, fix="give 'problem' or 'messages'")
    return Problem(text, str(gt), None, number)


def choose_format(problems: Sequence[Problem], tokenizer: Any, wanted: str = "auto") -> str:
    """Tells how a problem's text becomes a prompt.

    Args:
        problems: what will be asked.
        tokenizer: the model's.
        wanted: one of :data:`FORMATS`. "auto" is "chat" where the tokenizer has a chat template,
            unless a problem spells out a special token, as text that was already formatted does.

    Returns:
        "text": taken as already formatted; "chat": a user's message for the chat template.

    Raises:
        UsageError: `wanted` is none of them.
    """
    if wanted not in FORMATS:
        raise UsageError(
            f"unknown problem format {wanted!r}", fix=f"use one of {', '.join(FORMATS)}"
        )
    if wanted != "auto":
        return wanted
    if not getattr(tokenizer, "chat_template", None):
        return "text"
    spelled = any(mark in problem.problem for problem in problems for mark in _marks(tokenizer))
    return "text" if spelled else "chat"


def _marks(tokenizer: Any) -> set[str]:
    """The special tokens, those that have no name in the tokenizer ("<|start|>") among them."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    found = {t.content for t in added.values() if t.special or re.fullmatch("<.+>", t.content)}
    return {token for token in found.union(getattr(tokenizer, "all_special_tokens", ())) if token}


def problem_prompts(
    problems: Sequence[Problem],
    tokenizer: Any,
    *,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Token ids of the prompts.

    ``messages`` go through the tokenizer's chat template. A problem's text is taken as already
    formatted (no second BOS), or with ``chat`` as a user's message.

    Raises:
        DataError: The tokenizer has no chat template and one is needed, or it refuses messages.
    """
    prompts: list[list[int]] = []
    for problem in problems:
        messages = list(problem.messages or ())
        if chat and not messages:
            messages = [{"role": "user", "content": problem.problem}]
        if messages:
            if not getattr(tokenizer, "chat_template", None):
                raise DataError(
                    "messages need a chat template, and the tokenizer has none",
                    where=f"problem of line {problem.line}",
                    fix="give the formatted text as 'problem'",
                )
            try:
                text = tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=True,
                    **dict(chat_template_kwargs or {}),
                )
            except Exception as error:  # a template may raise anything
                raise DataError(
                    f"the chat template refuses the messages: {error}",
                    where=f"problem of line {problem.line}",
                    fix="check roles, contents and --chat-template-kwargs",
                ) from error
            prompts.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
        else:
            eos = getattr(tokenizer, "eos_token_id", None)
            prompts.append(
                tokenize_prompt(tokenizer, problem.problem, () if eos is None else [eos])
            )
    return prompts
