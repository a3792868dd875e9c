"""Answers to many prompts under many policies, in one batch.

``generate()`` decodes a batch under one policy. An evaluation asks the same prompts under dozens:
here every row has its own, prompts are run once for all their rows, and rows that finished leave
the batch. Random numbers depend on (seed, prompt, sample, step) alone, so all policies see the same
ones, and differences between policies have less noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeco.decoding.draw import draw_tokens
from autodeco.decoding.policy import DecodingPolicy
from autodeco.errors import DataError, NumericsError, UsageError
from autodeco.heads.modules import DecodingHeads
from autodeco.heads.random import counter_uniform
from autodeco.heads.warp import TEMPERATURE_FLOOR

_BATCH_BYTES = 2**30
_MOST_ROWS = 1024
_COMPACT = 0.75  # rows leave the batch when fewer than this share of it are still open

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    Attributes:
        prompt: index of the prompt.
        policy: index of the policy.
        sample: index of the sample.
        ids: int32 [n], the tokens without the prompt, the end-of-text token included.
        temperature: float32 [n], T that each token was drawn with; None if not from heads.
        top_p: float32 [n], likewise P.
        entropy: sum over the tokens of the entropy (nats) of the distribution drawn from.
        finished: an end-of-text token was drawn.
    """

    prompt: int
    policy: int
    sample: int
    ids: NDArray[np.int32]
    temperature: NDArray[np.float32] | None
    top_p: NDArray[np.float32] | None
    entropy: float
    finished: bool


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
        rows_at_once: answers in a batch; default: what about a GiB holds, at most 1024.
        progress: called with (answers done, answers in all) after each batch.

    Returns:
        The answers, ordered by prompt, policy, sample.

    Raises:
        UsageError: a policy needs heads and there are none, or the model transforms its logits.
        DataError: an empty prompt, or a token id that the model does not have.
        NumericsError: a logit is not finite.
    """
    loop = _Loop(model, heads, policies, max_new_tokens, eos_ids, seed)
    _check_prompts(prompts, loop.vocabulary)
    rows = [
        (prompt, policy, sample)
        for prompt in sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for policy in range(len(policies))
        for sample in range(samples)
    ]
    longest = max((len(prompt) for prompt in prompts), default=1)
    at_once = rows_at_once or loop.rows_for(longest + max_new_tokens)
    was_training = model.training
    model.eval()
    answers: list[Answer] = []
    try:
        for start in range(0, len(rows), at_once):
            answers += loop.run(prompts, rows[start : start + at_once])
            if progress is not None:
                progress(len(answers), len(rows))
    finally:
        model.train(was_training)
    return sorted(answers, key=lambda a: (a.prompt, a.policy, a.sample))


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


class _Loop:
    """What stays the same from batch to batch."""

    def __init__(
        self,
        model: Any,
        heads: DecodingHeads | None,
        policies: Sequence[DecodingPolicy],
        max_new_tokens: int,
        eos_ids: Sequence[int],
        seed: int,
    ) -> None:
        if heads is None and any(policy.kind == "heads" for policy in policies):
            raise UsageError("a policy of kind 'heads' needs heads", fix="give --heads DIR")
        self.config = model.config.get_text_config(decoder=True)
        _check_output(self.config)
        self.decoder, self.output = model.get_decoder(), model.get_output_embeddings()
        self.device, self.dtype = model.device, model.dtype
        self.vocabulary = int(self.output.weight.shape[0])
        self.heads, self.max_new_tokens, self.seed = heads, max_new_tokens, seed
        self.eos = torch.tensor(list(eos_ids), dtype=torch.int64, device=self.device)
        self.is_heads = torch.tensor([p.kind == "heads" for p in policies], device=self.device)
        self.table = self._table(policies)

    def _table(self, policies: Sequence[DecodingPolicy]) -> Tensor:
        """float64 [policies, 4]: T, P, k, min-p; for heads, the two multipliers first."""
        rows = []
        for p in policies:
            if p.kind == "greedy":
                rows.append((1.0, 1.0, 1.0, 0.0))
            elif p.kind == "heads":
                rows.append((p.temperature_scale, p.top_p_scale, 0.0, 0.0))
            else:
                rows.append((p.temperature, p.top_p, float(p.top_k), p.min_p))
        return torch.tensor(rows, dtype=torch.float64, device=self.device)

    def rows_for(self, length: int) -> int:
        """How many rows of ``length`` tokens a batch of about a GiB has."""
        c = self.config
        heads = getattr(c, "num_attention_heads", 1)
        size = getattr(c, "head_dim", None) or c.hidden_size // heads
        # Keys and values of all layers, and once more repeated for the query heads of one layer.
        kept = getattr(c, "num_key_value_heads", heads) * c.num_hidden_layers + heads
        cache = 2 * kept * size * length * self.dtype.itemsize
        return max(1, min(_MOST_ROWS, int(_BATCH_BYTES // (cache + 48 * self.vocabulary))))

    def run(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, int, int]]
    ) -> Iterator[Answer]:
        """Decodes one batch."""
        batch = _Batch(self, prompts, rows)
        for step in range(self.max_new_tokens):
            if not batch.step(step):
                break
        return batch.answers(rows)

    def choose(self, h: Tensor, policy: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Next tokens, entropies, T and P of rows with hidden states [m, d]."""
        logits = self.output(h)
        t, p, k, min_p = self.table[policy].unbind(-1)
        t, p = t.float(), p.float()
        rows = self.is_heads[policy].nonzero()[:, 0]
        if rows.numel() and self.heads is not None:
            everyone = rows.numel() == h.shape[0]
            predicted = self.heads.predict(*((h, logits) if everyone else (h[rows], logits[rows])))
            t[rows] = (predicted[0] * t[rows]).clamp_min(TEMPERATURE_FLOOR)
            p[rows] = (predicted[1] * p[rows]).clamp_max(1.0)
        token, entropy = draw_tokens(logits, t, p, k.long(), min_p.float(), u)
        if not bool(torch.isfinite(entropy).all()):
            raise NumericsError(
                "the model's logits are not finite",
                fix="check the checkpoint; try --dtype float32",
            )
        return token, entropy, t, p


class _Batch:
    """Rows on their way. Open rows are a subset of all rows: ``self.row`` holds their numbers."""

    def __init__(
        self, loop: _Loop, prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, int, int]]
    ) -> None:
        device = loop.device
        self.loop = loop
        keys = torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(rows), 3)
        self.prompt, self.policy, self.sample = keys.unbind(-1)
        self.row = torch.arange(len(rows), device=device)
        self.open = torch.ones(len(rows), dtype=torch.bool, device=device)
        shape = (len(rows), loop.max_new_tokens)
        self.ids = torch.zeros(shape, dtype=torch.int32, device=device)
        self.entropy = torch.zeros(len(rows), dtype=torch.float64, device=device)
        self.length = torch.zeros(len(rows), dtype=torch.int64, device=device)
        self.finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
        self.with_heads = bool(loop.is_heads[self.policy].any())
        self.t = torch.zeros(shape if self.with_heads else (0, 0), device=device)
        self.p = torch.zeros_like(self.t)
        self._read_prompts(prompts, rows)

    def _read_prompts(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, int, int]]
    ) -> None:
        """Runs each prompt once, padded on the left, and gives every row its copy of the cache."""
        loop, device = self.loop, self.loop.device
        used = list(dict.fromkeys(row[0] for row in rows))
        width = max(len(prompts[i]) for i in used)
        ids = torch.zeros((len(used), width), dtype=torch.int64)
        mask = torch.zeros((len(used), width), dtype=torch.int64)
        for n, i in enumerate(used):
            ids[n, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[n, width - len(prompts[i]) :] = 1
        place = {prompt: n for n, prompt in enumerate(used)}
        expand = torch.tensor([place[row[0]] for row in rows], device=device)
        self.padded = bool((mask == 0).any())
        mask = mask.to(device)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        self.cache = _cache(loop.config, width + loop.max_new_tokens)
        out = loop.decoder(
            input_ids=ids.to(device),
            attention_mask=mask if self.padded else None,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache.batch_select_indices(expand)
        self.hidden = out.last_hidden_state[:, -1][expand]
        self.position = positions[expand, -1]
        rest = torch.ones((len(rows), loop.max_new_tokens), dtype=torch.int64, device=device)
        self.mask = torch.cat([mask[expand], rest], dim=-1)
        self.width = width

    def step(self, step: int) -> bool:
        """One token for every open row; returns whether a row is still open."""
        loop = self.loop
        if step:
            self._advance(step)
        policy = self.policy[self.row]
        u = counter_uniform(loop.seed, self.prompt[self.row], self.sample[self.row], step)
        token, entropy, t, p = loop.choose(self.hidden, policy, u)
        self.token = token
        is_open = self.open
        self.ids[self.row, step] = torch.where(is_open, token, 0).to(torch.int32)
        self.entropy[self.row] += torch.where(is_open, entropy, 0.0).double()
        self.length[self.row] += is_open
        if self.with_heads:
            self.t[self.row, step], self.p[self.row, step] = t, p
        ended = is_open & torch.isin(token, loop.eos)
        self.finished[self.row] |= ended
        self.open = is_open & ~ended
        left = int(self.open.sum())
        if 0 < left < _COMPACT * self.row.numel():
            self._compact()
        return left > 0

    def _advance(self, step: int) -> None:
        """Feeds the last tokens."""
        self.position = self.position + 1
        out = self.loop.decoder(
            input_ids=self.token.unsqueeze(-1),
            attention_mask=self.mask[:, : self.width + step] if self.padded else None,
            position_ids=self.position.unsqueeze(-1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.hidden = out.last_hidden_state[:, -1]

    def _compact(self) -> None:
        """Takes the finished rows out of the batch."""
        stay = self.open.nonzero()[:, 0]
        self.cache.batch_select_indices(stay)
        self.row, self.open, self.token = self.row[stay], self.open[stay], self.token[stay]
        self.position, self.mask = self.position[stay], self.mask[stay]

    def answers(self, rows: Sequence[tuple[int, int, int]]) -> Iterator[Answer]:
        """What was decoded, row by row."""
        ids, length = self.ids.cpu().numpy(), self.length.tolist()
        entropy, finished = self.entropy.tolist(), self.finished.tolist()
        t, p = self.t.cpu().numpy(), self.p.cpu().numpy()
        heads = self.loop.is_heads.tolist()
        for n, (prompt, policy, sample) in enumerate(rows):
            end = length[n]
            given = heads[policy]
            yield Answer(
                prompt,
                policy,
                sample,
                ids[n, :end].copy(),
                t[n, :end].copy() if given else None,
                p[n, :end].copy() if given else None,
                entropy[n],
                finished[n],
            )


def _check_output(config: Any) -> None:
    """Refuses models whose logits are more than a product with the output embedding."""
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1.0)):
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise UsageError(
                f"the model transforms its logits ({name} = {value}); the sampler does not",
                fix="use generate() for this model",
            )


def _cache(config: Any, capacity: int) -> Any:
    """A cache whose full-attention layers are allocated once, for ``capacity`` tokens."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Preallocated(DynamicLayer):  # type: ignore[misc]  # transformers is untyped
        """Appends in place, where its parent copies all keys and values at every token."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.used, self.room = 0, (key_states[:, :, :0], value_states[:, :, :0])
            end = self.used + key_states.shape[-2]
            if self.used == 0:
                # A prompt is run once and its rows are made from it: room comes with the rows.
                self.keys, self.values = key_states, value_states
            else:
                if self.room[0].shape[-2] < end:
                    self.room = (self._grow(self.keys), self._grow(self.values))
                self.room[0][:, :, self.used : end] = key_states
                self.room[1][:, :, self.used : end] = value_states
                self.keys, self.values = (buffer[:, :, :end] for buffer in self.room)
            self.used = end
            return self.keys, self.values

        def _grow(self, filled: Tensor) -> Tensor:
            shape = (*filled.shape[:2], capacity, filled.shape[-1])
            buffer = filled.new_empty(shape)
            buffer[:, :, : filled.shape[-2]] = filled
            return buffer

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.room = (self.keys[:, :, :0], self.values[:, :, :0])

    cache = DynamicCache(config=config)
    cache.layers = [Preallocated() if type(x) is DynamicLayer else x for x in cache.layers]
    return cache
