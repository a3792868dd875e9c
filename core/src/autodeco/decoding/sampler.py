"""Answers to many prompts under many policies, in one batch.

``generate()`` decodes a batch under one policy. An evaluation asks the same prompts under dozens:
here every row has its own, prompts are run once for all their rows, and rows that finished leave
the batch. Random numbers depend on (seed, prompt, sample, step) alone, so all policies see the same
ones, and differences between policies have less noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from autodeco.decoding.batch import Answer, Loop
from autodeco.decoding.cache import rows_that_fit
from autodeco.decoding.policy import DecodingPolicy
from autodeco.errors import DataError, EnvironmentProblem
from autodeco.heads.modules import DecodingHeads

__all__ = ["Answer", "Key", "Progress", "sample_answers"]

Progress = Callable[[int, int], None]
Key = tuple[int, int, int]  # prompt, policy, sample


@torch.inference_mode()
def sample_answers(
    model: Any,
    heads: DecodingHeads | None,
    prompts: Sequence[Sequence[int]],
    policies: Sequence[DecodingPolicy],
    *,
    samples: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    seed: int,
    rows_at_once: int | None = None,
    progress: Progress | None = None,
    known: Mapping[Key, Answer] | None = None,
    keep: Callable[[Answer], None] | None = None,
) -> list[Answer]:
    """Samples answers to every prompt under every policy.

    Args:
        model: a transformers causal language model, frozen.
        heads: needed by policies of kind "heads", on the model's device.
        prompts: token ids of each.
        policies: how to decode.
        samples: answers for each prompt and policy.
        max_new_tokens: longest answer, in tokens.
        eos_ids: tokens that end an answer.
        seed: of the random numbers.
        rows_at_once: answers in a batch; default: what the memory holds, at most 1024.
        progress: called with (answers done, answers in all) before the first token and after
            every token of a batch.
        known: answers of an earlier call that was cut short, with the same arguments; they are
            not sampled again.
        keep: called with each answer that was not known, as soon as it ends.

    Returns:
        The answers, ordered by prompt, policy, sample.

    Raises:
        UsageError: a policy needs heads and there are none, or the model transforms its logits.
        DataError: an empty prompt, or a token id that the model does not have.
        NumericsError: a logit is not finite.
        EnvironmentProblem: the device has no memory for so many rows.
    """
    loop = Loop(model, heads, policies, max_new_tokens, eos_ids, seed)
    _check_prompts(prompts, loop.vocabulary)
    rows = [
        (prompt, policy, sample)
        for prompt in sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for policy in range(len(policies))
        for sample in range(samples)
    ]
    at_once = rows_at_once or rows_that_fit(model, prompts, max_new_tokens)
    found = {row: known[row] for row in rows if row in known} if known else {}

    def told() -> None:
        if progress is not None:
            progress(len(found), len(rows))

    told()
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), at_once):
            for answer in _missing(loop, prompts, rows[start : start + at_once], found, told):
                if keep is not None:
                    keep(answer)
    except torch.OutOfMemoryError as error:
        raise EnvironmentProblem(
            f"out of memory with {at_once} answers at once",
            where=str(loop.device),
            fix=f"add --evaluate-rows {max(1, at_once // 2)}; the answers so far are kept",
        ) from error
    finally:
        model.train(was_training)
    return [found[row] for row in sorted(rows)]


def _missing(
    loop: Loop,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Key],
    found: dict[Key, Answer],
    told: Callable[[], None],
) -> Iterator[Answer]:
    """Decodes a batch; adds the answers that are not in `found` to it and yields them.

    A batch that was cut short before runs again as a whole, in which its other answers come out
    as they would have: who is in a batch decides on the last bits of all its numbers.
    """
    missing = set(rows).difference(found)
    for ended in loop.run(prompts, rows) if missing else ():
        for answer in ended:
            key = (answer.prompt, answer.policy, answer.sample)
            if key in missing:
                missing.remove(key)
                found[key] = answer
                yield answer
        told()
        if not missing:
            return


def _check_prompts(prompts: Sequence[Sequence[int]], vocabulary: int) -> None:
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(
                "a prompt has no tokens",
                where=f"prompt {number}",
                fix="give each prompt at least one token",
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise DataError(
                f"a prompt has a token id outside the model's vocabulary of {vocabulary}",
                where=f"prompt {number}",
                fix="use the tokenizer that belongs to the model",
            )
