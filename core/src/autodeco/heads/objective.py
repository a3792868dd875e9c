"""The training objective: four variants, chunked over tokens, closed form over the vocabulary.

``loss = L_T + L_P`` a token, with ``L_T = -w_T log p_y`` for the temperature and
``L_P = -w_P log(p_y m_y / Z)`` for the top-p (notation in :mod:`autodeco.heads.closed_form`).
Only T and P carry gradient, so a token keeps two losses and a few derivatives. Tokens go in groups
through the heads and, inside a group, in blocks through the vocabulary; the logits of a block are
gone before the next is made, so memory depends on neither the length nor its product with V.
A missing head's term is left out: with
P = 1 the mask is 1 and L_P would only repeat L_T, and with T = 1 L_T is a constant. (``paper``
has no L_T; its one term then trains whichever head is there.)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from autodeco.errors import NumericsError
from autodeco.heads import closed_form
from autodeco.heads.closed_form import Workspace
from autodeco.heads.losses import Seen, TokenTerms, join, see, token_terms
from autodeco.heads.modules import TOP_SUM, DecodingHeads
from autodeco.heads.random import keep_mask
from autodeco.heads.soft_mask import Look, first_width
from autodeco.heads.variants import OBJECTIVES, Objective
from autodeco.heads.vocabulary import Vocabulary

__all__ = ["OBJECTIVES", "Objective", "ObjectiveSums", "objective_sums"]

if TYPE_CHECKING:
    from autodeco.engines.base import HiddenBatch, OutputWeight

# A block of logits with its scratch, and what a group of tokens keeps while its heads are trained.
BLOCK_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
GROUP_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True)
class ObjectiveSums:
    """Sums over tokens; add them up over batches and ranks, then divide.

    Attributes:
        loss, temperature_loss, top_p_loss: sums over kept tokens (``per_sample`` objectives:
            sums over samples of the means); divide by ``normalizer``.
        normalizer: what the loss and the gradients are divided by once they are summed over the
            global batch: the number of kept tokens, or of samples for ``per_sample`` objectives.
        kept: tokens that the drop spared.
        tokens: predicted positions.
        measured: tokens that the sums below are over: all of them, but only the kept ones
            where the gradient was taken with a drop (a dropped token costs its arg-max only).
        nll: sum of -log softmax(z/T)_y, before the cut.
        outside_nucleus: labels outside the hard nucleus of (T, P).
        temperature_sum, temperature_square_sum, top_p_sum, top_p_square_sum: moments of T and P.
    """

    loss: float = 0.0
    temperature_loss: float = 0.0
    top_p_loss: float = 0.0
    normalizer: int = 0
    kept: int = 0
    tokens: int = 0
    measured: int = 0
    nll: float = 0.0
    outside_nucleus: int = 0
    temperature_sum: float = 0.0
    temperature_square_sum: float = 0.0
    top_p_sum: float = 0.0
    top_p_square_sum: float = 0.0

    def __add__(self, other: ObjectiveSums) -> ObjectiveSums:
        return ObjectiveSums(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    @classmethod
    def zero(cls) -> ObjectiveSums:
        """The sums over nothing."""
        return cls()


class _ByDerivatives(torch.autograd.Function):
    """A function of per-token scalars, given as its value and its derivatives."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *pairs: Tensor) -> Tensor:
        ctx.save_for_backward(*pairs[1::2])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None]
        for slope in ctx.saved_tensors:
            product = grads[0] * slope
            out += [product.sum(-1) if product.dim() > 1 else product, None]
        return tuple(out)


def _by_derivatives(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """``value`` [n] or [n, k] whose gradient in each scalar x [n] is its given derivative."""
    flat = [t for x, slope in pairs for t in (x, slope.to(x.dtype))]
    return cast(Tensor, cast(Any, _ByDerivatives).apply(value.to(pairs[0][0].dtype), *flat))


def block_tokens(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens whose logits and scratch fit the byte budget of the device."""
    budget = BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"])
    return max(1, budget // (vocab * Workspace.bytes_per_logit(dtype, device)))


def group_tokens(vocab: int, hidden_size: int, device: torch.device) -> int:
    """Tokens whose head inputs and heads of the order fit the byte budget of the device."""
    budget = GROUP_BYTES.get(device.type, GROUP_BYTES["cuda"])
    return max(1, budget // (16 * hidden_size + 48 * first_width(vocab) + 4096))


def objective_sums(
    heads: DecodingHeads,
    hidden: HiddenBatch,
    output: OutputWeight,
    objective: Objective,
    *,
    seed: int,
    epoch: int,
    backward: bool,
    drop: float | None = None,
    chunk_tokens: int | None = None,
) -> ObjectiveSums:
    """Sums of the objective over a batch and, if asked, the gradient in the heads.

    Args:
        heads: the heads; ``.grad`` of their parameters is added to.
        hidden: h [m, d] with labels; whole samples, where the objective averages per sample.
        output: the output weight in the backbone's dtype, whole or this tensor rank's rows; the
            ranks of its group call together, with the same tokens, and get the same sums.
        objective: a member of :data:`OBJECTIVES`.
        seed, epoch: what the random drop depends on, beside sample and position.
        backward: accumulate d(sum of loss)/d(parameters); the caller divides by the global
            :attr:`ObjectiveSums.normalizer`.
        drop: share to drop instead of the objective's own.
        chunk_tokens: tokens a block of logits; default from a byte budget.

    Raises:
        NumericsError: logits or a loss that are not finite, with the sample and the token.
            Gradients of this call are then worthless.
    """
    vocabulary = Vocabulary.of(output)
    m = hidden.h.shape[0]
    if m == 0:
        return ObjectiveSums.zero()
    job = _Job(heads, hidden, output, vocabulary, objective, backward)
    job.prepare(seed, epoch, objective.drop if drop is None else drop, chunk_tokens)
    for start in range(0, m, job.group):
        job.step(start, min(m, start + job.group))
    return job.sums()


class _Job:
    """One call of :func:`objective_sums`: its buffers and running sums."""

    def __init__(
        self,
        heads: DecodingHeads,
        hidden: HiddenBatch,
        output: OutputWeight,
        vocabulary: Vocabulary,
        objective: Objective,
        backward: bool,
    ) -> None:
        self.vocabulary = vocabulary
        self.heads, self.hidden, self.weight = heads, hidden, output.weight
        self.objective, self.backward = objective, backward
        self.temperature_term = objective.temperature_term and heads.temp_head is not None
        self.top_p_term = heads.top_p_head is not None or not objective.temperature_term
        self.slopes = (
            backward
            and heads.needs_features
            and heads.temp_head is not None
            and not objective.detach_temperature
        )
        device = hidden.h.device
        self.totals = torch.zeros(9, dtype=torch.float64, device=device)
        self.measured = 0
        self.first_bad = torch.full((), hidden.h.shape[0], dtype=torch.int64, device=device)

    def prepare(self, seed: int, epoch: int, drop: float, chunk_tokens: int | None) -> None:
        """Choose block and group, draw the drop and, for means per sample, count kept tokens."""
        hidden, m = self.hidden, self.hidden.h.shape[0]
        vocab, dtype, device = self.weight.shape[0], hidden.h.dtype, hidden.h.device
        self.block = min(m, chunk_tokens or block_tokens(vocab, dtype, device))
        size = self.vocabulary.size
        self.group = max(self.block, group_tokens(size, hidden.h.shape[1], device))
        self.work = Workspace(self.block, vocab, dtype, device, self.slopes, self.vocabulary)
        self.spared = (
            keep_mask(seed, epoch, hidden.sample_id, hidden.token_index, drop) if drop > 0 else None
        )
        self.kept: Tensor | None = None
        self.token_weight: tuple[Tensor, Tensor] | None = None
        self.normalizer: int | None = None
        if self.objective.per_sample:
            self._weigh_samples()
        # Dropped tokens need no more than their arg-max, unless L_P or a measurement wants them.
        self.compact = (
            self.spared is not None
            and self.backward
            and (self.objective.drop_top_p or not self.top_p_term)
        )

    def _weigh_samples(self) -> None:
        m = self.hidden.h.shape[0]
        kept = torch.ones(m, dtype=torch.bool, device=self.hidden.h.device)
        if self.spared is not None:
            for start in range(0, m, self.block):
                index = slice(start, min(m, start + self.block))
                kept[index] = self._keep(self._logits(self.hidden.h[index]), index)
        samples, sample = torch.unique(self.hidden.sample_id, return_inverse=True)
        count = torch.zeros(len(samples), dtype=torch.float64, device=kept.device)
        all_of = count.index_add(0, sample, torch.ones_like(kept, dtype=torch.float64))
        kept_of = count.index_add(0, sample, kept.double()).clamp_min(1.0)
        self.kept = kept
        self.token_weight = (kept / kept_of[sample], 1.0 / all_of[sample])
        self.normalizer = len(samples)

    def _logits(self, h: Tensor) -> Tensor:
        """[n, V] of some hidden states, in the workspace: gone with the next call."""
        with torch.no_grad():
            return torch.mm(h, self.weight.t(), out=self.work.logits[: h.shape[0]])

    def _keep(self, logits: Tensor, index: slice) -> Tensor:
        """Tokens that the drop spares; arg-max takes the smaller id of a tie."""
        if self.spared is None:
            return torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
        return (self.vocabulary.arg_max(logits) != self.hidden.label[index]) | self.spared[index]

    def step(self, start: int, stop: int) -> None:
        """Add a group of tokens to the sums and to the gradient."""
        with torch.set_grad_enabled(self.backward):
            t = self.heads.temperature(self.hidden.h[start:stop])
            with torch.no_grad():
                seen, index, keep = self._see(start, stop, t.detach())
            if seen is None:
                return
            t = t if len(index) == stop - start else t[index - start]
            loss = self._loss(seen, index, keep, t)
            if self.backward and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]

    def _see(self, start: int, stop: int, t: Tensor) -> tuple[Seen | None, Tensor, Tensor]:
        """Sweep over the logits of a group; what was seen, of which tokens, and which are kept."""
        wide = torch.promote_types(self.hidden.h.dtype, torch.float32)
        parts, indices, keeps = [], [], []
        for first in range(start, stop, self.block):
            s = slice(first, min(stop, first + self.block))
            logits = self._logits(self.hidden.h[s])
            index = torch.arange(s.start, s.stop, device=logits.device)
            keep = self._keep(logits, s) if self.kept is None else self.kept[s]
            if self.compact:
                rows = keep.nonzero()[:, 0]
                logits, index, keep = logits[rows], index[rows], keep[rows]
            indices.append(index)
            keeps.append(keep)
            if len(index):
                part = see(
                    logits,
                    self.hidden.label[index],
                    t[index - start].to(wide),
                    self.work,
                    features=self.heads.needs_features,
                    slopes=self.slopes,
                    mass=self.top_p_term,
                    base="base" in (self.objective.temperature_weight, self.objective.top_p_weight),
                )
                parts.append(part)
        return join(parts) if parts else None, torch.cat(indices), torch.cat(keeps)

    def _loss(self, seen: Seen, index: Tensor, keep: Tensor, t: Tensor) -> Tensor:
        """The weighted loss of some tokens as a function of the heads; fills the totals."""
        heads, objective, h = self.heads, self.objective, self.hidden.h[index]
        t_read = t.detach() if objective.detach_temperature else t
        features = None
        if heads.needs_features:
            with torch.no_grad():
                values, slopes = closed_form.features(seen.order, seen.at, TOP_SUM)
            features = _by_derivatives(values, (t_read, slopes))
        p = heads.top_p(h, t_read, features)
        with torch.no_grad():
            terms = token_terms(
                seen,
                p.detach().to(seen.at.total.dtype),
                Look(lambda rows: self._logits(h[rows]), self.block, self.work),
                objective,
                with_temperature=self.temperature_term,
                with_top_p=self.top_p_term,
            )
        weights = (keep, keep if objective.drop_top_p else torch.ones_like(keep))
        if self.token_weight is not None:
            weights = (self.token_weight[0][index], self.token_weight[1][index])
        parts = [torch.zeros_like(t), torch.zeros_like(t)]
        if terms.temperature is not None:
            value, slope = terms.temperature
            parts[0] = _by_derivatives(value, (t, slope)) * weights[0].to(t.dtype)
        if terms.top_p is not None:
            value, t_slope, p_slope = terms.top_p
            term = _by_derivatives(value, (t, t_slope), (p, p_slope))
            parts[1] = term * weights[1].to(t.dtype)
        self._measure(index, keep, parts[0].detach(), parts[1].detach(), terms, t, p)
        return (parts[0] + parts[1]).sum()

    def _measure(
        self,
        index: Tensor,
        keep: Tensor,
        temperature_loss: Tensor,
        top_p_loss: Tensor,
        terms: TokenTerms,
        t: Tensor,
        p: Tensor,
    ) -> None:
        """Add a group's sums, on the device; no synchronization."""
        t, p = t.detach().double(), p.detach().double()
        finite = (terms.nll + temperature_loss + top_p_loss).isfinite()
        bad = torch.where(finite, self.hidden.h.shape[0], index).amin()
        self.first_bad = torch.minimum(self.first_bad, bad)
        columns = (temperature_loss, top_p_loss, keep, terms.nll, terms.outside, t, t * t, p, p * p)
        self.totals += torch.stack([c.double().sum() for c in columns])
        self.measured += len(index)

    def sums(self) -> ObjectiveSums:
        """The totals as numbers, once every group was added."""
        bad, m = int(self.first_bad), self.hidden.h.shape[0]
        if bad < m:
            raise NumericsError(
                "logits or loss that are not finite",
                who=f"objective {self.objective.name}",
                where=f"sample {int(self.hidden.sample_id[bad])}, "
                f"token {int(self.hidden.token_index[bad])}",
                fix="look for NaN or infinite weights in the checkpoint, or lower the learning"
                " rate if the heads diverged",
            )
        lt, lp, kept, nll, outside, t1, t2, p1, p2 = self.totals.tolist()
        return ObjectiveSums(
            loss=lt + lp,
            temperature_loss=lt,
            top_p_loss=lp,
            normalizer=int(kept) if self.normalizer is None else self.normalizer,
            kept=int(kept),
            tokens=m,
            measured=self.measured,
            nll=nll,
            outside_nucleus=int(outside),
            temperature_sum=t1,
            temperature_square_sum=t2,
            top_p_sum=p1,
            top_p_square_sum=p2,
        )
