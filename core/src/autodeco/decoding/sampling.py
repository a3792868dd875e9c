"""The sampling of an evaluation: setting after setting, counted, and kept in answers.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from autodeco.decoding.cache import rows_that_fit
from autodeco.decoding.policy import DecodingPolicy
from autodeco.decoding.sampler import Answer, Progress, sample_answers
from autodeco.decoding.store import ANSWERS, AnswerLog, answers_header
from autodeco.heads.modules import DecodingHeads


class Sampling:
    """Samples the answers of an evaluation, in as many calls as it has passes.

    Args:
        model: a transformers causal language model.
        heads: its heads, or None.
        prompts: token ids of each.
        plan: the policies of the first pass.
        total: answers of all passes.
        decode: gives an answer's text.
        file: where answers are kept, and found; None keeps none.
        rows_at_once: see ``sample_answers``.
        progress: called with (answers done, answers in all) after every token.
        say: called with one line that says how many answers there will be.
        **asked: seed, max_new_tokens and eos_ids.
    """

    def __init__(
        self,
        model: Any,
        heads: DecodingHeads | None,
        prompts: Sequence[Sequence[int]],
        plan: Sequence[DecodingPolicy],
        *,
        total: int,
        decode: Callable[[Answer], str],
        file: Path | None,
        rows_at_once: int | None,
        progress: Progress | None,
        say: Callable[[str], None] | None,
        **asked: Any,
    ) -> None:
        self._total, self._progress, self._done, self._decode = total, progress, 0, decode
        rows = rows_at_once or rows_that_fit(model, prompts, asked["max_new_tokens"])
        self._log: AnswerLog | None = None
        before = ""
        if file is not None:
            header = answers_header(model, heads, prompts, plan, **asked)
            self._log = AnswerLog(file, header, rows_at_once=rows_at_once, default_rows=rows)
            rows = self._log.rows_at_once
            before = f" ({len(self._log):,} are in {ANSWERS} already)" if len(self._log) else ""
        self._options: dict[str, Any] = {"model": model, "heads": heads, "prompts": prompts}
        self._options |= {"rows_at_once": rows, **asked}
        if say is not None:
            say(f"{total:,} answers{before}, at most {rows:,} at a time")

    def __enter__(self) -> Sampling:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()

    def __call__(self, policies: Sequence[DecodingPolicy], samples: int) -> list[list[Answer]]:
        """The answers of each policy."""
        log = self._log

        def keep(answer: Answer) -> None:
            if log is not None:
                log.add(policies[answer.policy].name, answer, self._decode(answer))

        found: list[list[Answer]] = [[] for _ in policies]
        for answer in sample_answers(
            policies=policies,
            samples=samples,
            progress=self._advance,
            known=None if log is None else log.known(policies),
            keep=keep,
            **self._options,
        ):
            found[answer.policy].append(answer)
        self._done += sum(len(answers) for answers in found)
        return found

    def _advance(self, done: int, _: int) -> None:
        if self._progress is not None:
            self._progress(self._done + done, self._total)
