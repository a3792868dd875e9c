"""One batch of answers, each row under a policy of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeco.decoding.cache import growing_cache
from autodeco.decoding.draw import draw_tokens
from autodeco.decoding.policy import DecodingPolicy
from autodeco.errors import NumericsError, UsageError
from autodeco.heads.modules import DecodingHeads
from autodeco.heads.random import counter_uniform
from autodeco.heads.warp import TEMPERATURE_FLOOR

_COMPACT = 0.75  # rows leave the batch when fewer than this share of it are still open


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


class Loop:
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
        self.heads_choose = [policy.kind == "heads" for policy in policies]
        self.is_heads = torch.tensor(self.heads_choose, device=self.device)
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

    def run(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, int, int]]
    ) -> Iterator[list[Answer]]:
        """Decodes one batch; yields, token by token, the answers that ended."""
        batch = Batch(self, prompts, rows)
        for step in range(self.max_new_tokens):
            yield batch.step(step)
            if not batch.left:
                return
        yield batch.cut()

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


class Batch:
    """Rows on their way. Open rows are a subset of all rows: ``self.row`` holds their numbers.

    Args:
        loop: what stays the same from batch to batch.
        prompts: token ids of each prompt.
        rows: (prompt, policy, sample) of each answer.
    """

    def __init__(
        self, loop: Loop, prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, int, int]]
    ) -> None:
        device = loop.device
        self.loop, self.rows, self.left = loop, rows, len(rows)
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
        self.cache = growing_cache(loop.config, width + loop.max_new_tokens)
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

    def step(self, step: int) -> list[Answer]:
        """One token for every open row; returns the answers that end with it."""
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
        before, self.left = self.left, int(self.open.sum())
        answers = self._answers(self.row[ended]) if self.left < before else []
        if 0 < self.left < _COMPACT * self.row.numel():
            self._compact()
        return answers

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

    def cut(self) -> list[Answer]:
        """The answers that are still open, as they are."""
        return self._answers(self.row[self.open]) if self.left else []

    def _answers(self, numbers: Tensor) -> list[Answer]:
        """What was decoded in rows of these numbers."""
        ids, length = self.ids[numbers].cpu().numpy(), self.length[numbers].tolist()
        entropy, finished = self.entropy[numbers].tolist(), self.finished[numbers].tolist()
        t, p = (x[numbers].cpu().numpy() if self.with_heads else ids for x in (self.t, self.p))
        found = []
        for n, row in enumerate(numbers.tolist()):
            prompt, policy, sample = self.rows[row]
            end, given = length[n], self.loop.heads_choose[policy]
            found.append(
                Answer(
                    prompt,
                    policy,
                    sample,
                    ids[n, :end].copy(),
                    t[n, :end].copy() if given else None,
                    p[n, :end].copy() if given else None,
                    entropy[n],
                    finished[n],
                )
            )
        return found


def _check_output(config: Any) -> None:
    """Refuses models whose logits are more than a product with the output embedding."""
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1.0)):
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise UsageError(
                f"the model transforms its logits ({name} = {value}); the sampler does not",
                fix="use generate() for this model",
            )
