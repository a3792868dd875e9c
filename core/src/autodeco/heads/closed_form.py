"""The objective's sums over the vocabulary, as closed forms in T and P.

Every function here takes a block of logits [n, V] and gives a few numbers a row together with
their derivatives in T and P, the only two scalars that carry gradient. Nothing of size V
outlives a call, and V values are sorted only for rows whose head of the distribution is too flat.
Notation: z logits, x = z - max z, p = softmax(z/T), E = sum p x, y the label.

Each quantity over the vocabulary is a maximum, a plain sum (total, energy, ...) or a merge of the
largest values, so with the vocabulary split over ranks (`Vocabulary`) each is one exchange of a few
numbers a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autodeco.heads.vocabulary import Vocabulary

_GROUP = 16


class Workspace:
    """Buffers for one block, allocated once and used for every block.

    Attributes:
        logits: [rows, V] in the logits' dtype.
        kernel: whether one kernel takes the sums; else plain torch does, with
        x, e, g: [rows, V] scratch in the dtype of the sums.
        vocabulary: which tokens the columns stand for.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        dtype: torch.dtype,
        device: torch.device,
        slopes: bool = True,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.vocabulary = vocabulary or Vocabulary(vocab)
        wide = torch.promote_types(dtype, torch.float32)
        self.logits = torch.empty(rows, vocab, dtype=dtype, device=device)
        self.kernel = has_kernel(device, dtype)
        if not self.kernel:
            scratch = torch.empty(3 if slopes else 2, rows, vocab, dtype=wide, device=device)
            self.x, self.e, self.g = scratch[0], scratch[1], scratch[-1]

    @staticmethod
    def bytes_per_logit(dtype: torch.dtype, device: torch.device) -> int:
        """What a logit costs in a workspace and in the passing copies of some rows beside it."""
        wide = torch.promote_types(dtype, torch.float32).itemsize
        return 2 * dtype.itemsize + wide * (1 if has_kernel(device, dtype) else 3)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the sums over the vocabulary run as one kernel."""
    if device.type != "cuda":
        return False
    from autodeco.heads import kernels

    return kernels.available(device, dtype)


@dataclass(frozen=True)
class Order:
    """What is kept of the logits of some tokens: the head of each row's order, and the label.

    Attributes:
        vocab: V.
        label: int64 [n].
        peak: [n, 1], the row maximum, float32 (float64 for float64 logits).
        head: [n, K], the K largest x in descending order.
        rank: int64 [n], the label's place in the order (logit, then smaller id first), or -1
            where the label is not above the K-th logit ("in the tail").
        label_x: [n], x of the label.
    """

    vocab: int
    label: Tensor
    peak: Tensor
    head: Tensor
    rank: Tensor
    label_x: Tensor

    @property
    def whole(self) -> bool:
        """Whether the head is the whole vocabulary."""
        return self.head.shape[-1] == self.vocab


def order_of(
    logits: Tensor, label: Tensor, width: int, vocabulary: Vocabulary | None = None
) -> Order:
    """Find the ``width`` largest of the logits [n, V] and the label [n] among them."""
    vocabulary = vocabulary or Vocabulary(logits.shape[-1])
    wide = torch.promote_types(logits.dtype, torch.float32)
    vocab = vocabulary.size
    values, ids = largest(logits, min(width, logits.shape[-1]))
    if vocabulary.group is not None:
        values, ids = _merged(values, ids, min(width, vocab), vocabulary)
    label_logit = vocabulary.label_logit(logits, label)
    before = (values > label_logit) | ((values == label_logit) & (ids < label.unsqueeze(-1)))
    rank = before.sum(-1)
    if values.shape[-1] < vocab:
        # Ties with the K-th logit may lie outside: such a label counts as one of the tail.
        rank = torch.where(label_logit[:, 0] > values[:, -1], rank, -1)
    peak = values[:, :1].to(wide)
    return Order(vocab, label, peak, values - peak, rank, (label_logit - peak)[:, 0])


def _merged(
    values: Tensor, ids: Tensor, width: int, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """The ``width`` largest of all ranks, from each rank's own."""
    everyone = vocabulary.gather(values).movedim(0, 1).flatten(1)
    names = vocabulary.gather(ids + vocabulary.first).movedim(0, 1).flatten(1)
    top = torch.topk(everyone, width, dim=-1)
    return top.values, names.gather(-1, top.indices)


def largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row in descending order, and their ids; ties in any order.

    All values above the k-th are among them. The k largest lie in the k groups of columns with
    the largest maxima, so the selection runs over V/16 maxima and then over 16 k candidates.
    """
    vocab = z.shape[-1]
    columns = vocab // _GROUP
    if k * 4 > columns:
        top = torch.topk(z, k, dim=-1)
        return top.values, top.indices
    grouped = z[:, : columns * _GROUP].reshape(-1, _GROUP, columns)
    chosen = torch.topk(grouped.amax(1), k, dim=-1, sorted=False).indices.unsqueeze(1)
    candidates = grouped.gather(2, chosen.expand(-1, _GROUP, -1)).flatten(1)
    offset = torch.arange(_GROUP, device=z.device).view(1, _GROUP, 1) * columns
    ids = (chosen + offset).flatten(1)
    if columns * _GROUP < vocab:
        rest = torch.arange(columns * _GROUP, vocab, device=z.device)
        candidates = torch.cat((candidates, z[:, columns * _GROUP :]), dim=-1)
        ids = torch.cat((ids, rest.expand(z.shape[0], -1)), dim=-1)
    top = torch.topk(candidates, k, dim=-1)
    return top.values, ids.gather(-1, top.indices)


@dataclass(frozen=True)
class Moments:
    """Sums over the vocabulary at one temperature a row, all [n].

    Attributes:
        temperature: T.
        total: sum of e = exp(x/T).
        energy: E = sum p x.
        variance: unbiased variance of p over V. None unless asked for, like all that follow.
        spread: Var_p(x), for dH/dT.
        variance_slope: derivative of the variance of p in T.
        base: sum of exp(x), the frozen model's own at T = 1.
    """

    temperature: Tensor
    total: Tensor
    energy: Tensor
    variance: Tensor | None = None
    spread: Tensor | None = None
    variance_slope: Tensor | None = None
    base: Tensor | None = None


def moments(
    logits: Tensor,
    peak: Tensor,
    temperature: Tensor,
    work: Workspace,
    *,
    features: bool = False,
    slopes: bool = False,
    base: bool = False,
) -> Moments:
    """A sweep over logits [n, V] at temperature T [n]; overwrites the workspace's scratch."""
    if work.kernel:
        from autodeco.heads import kernels

        sums = kernels.sums_over_vocabulary(logits, peak, temperature, slopes=slopes, base=base)
        total, energy, square, spread, cross, base_sum = sums.unbind(0)
    else:
        plain = _sums_over_vocabulary(logits, peak, temperature, work, features, slopes, base)
        total, energy, square, spread, cross, base_sum = plain
    v = work.vocabulary.size
    if work.vocabulary.group is not None:
        sums = work.vocabulary.gather(
            torch.stack((total, energy, square, spread, cross, base_sum))
        ).movedim(0, 1)
        total, energy, square, spread, cross, base_sum = _combined(sums)
    return Moments(
        temperature,
        total,
        energy,
        # sum (p - 1/V)^2 = sum p^2 - 1/V cancels only where p is flat and this feature, at most
        # 1/V^2, vanishes beside the entropy; where a token dominates every digit stays.
        (square / total**2 - 1.0 / v).clamp_min(0.0) / max(1, v - 1) if features else None,
        spread / total if slopes else None,
        -2.0 * cross / (total * temperature) ** 2 / max(1, v - 1) if slopes else None,
        base_sum if base else None,
    )


def _combined(parts: Tensor) -> tuple[Tensor, ...]:
    """Sums of several slices of the vocabulary, [6, slices, n], as those of the whole.

    Central moments move to the common mean by adding what the shift brings, so that, as within a
    slice, nothing is a difference of squares (Chan, Golub and LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances", 1979).
    """
    total, energy, square, spread, cross, base = parts
    whole = total.sum(0)
    mean = (total * energy).sum(0) / whole
    shift = energy - mean
    return (
        whole,
        mean,
        square.sum(0),
        (spread + total * shift * shift).sum(0),
        (cross + square * shift).sum(0),
        base.sum(0),
    )


def _sums_over_vocabulary(
    logits: Tensor,
    peak: Tensor,
    temperature: Tensor,
    work: Workspace,
    features: bool,
    slopes: bool,
    base: bool,
) -> tuple[Tensor, ...]:
    """The sums of :func:`autodeco.heads.kernels.sums_over_vocabulary` in plain torch."""
    n = logits.shape[0]
    x = torch.sub(logits, peak, out=work.x[:n])
    e = torch.div(x, temperature.unsqueeze(-1), out=work.e[:n]).exp_()
    total = e.sum(-1)
    energy = dot(e, x) / total
    none = torch.zeros_like(total)
    square = dot(e, e) if features else none
    # Without slopes g is e, which is not needed any more.
    base_sum = torch.exp(x, out=work.g[:n]).sum(-1) if base else none
    if not slopes:
        return total, energy, square, none, none, base_sum
    # Centred at E before squaring: a difference of squares would lose every digit for small T.
    x.sub_(energy.unsqueeze(-1))
    g = torch.mul(e, x, out=work.g[:n])
    return total, energy, square, dot(g, x), dot(g, e), base_sum


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise dot product of two [n, V], without a third."""
    if a.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        return (a * b).sum(-1)
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).view(-1)


def features(order: Order, m: Moments, top: int) -> tuple[Tensor, Tensor]:
    """The top-p head's four features and their derivatives in T, both [n, 4].

    The derivatives are zero where the moments were taken without slopes.
    """
    t = m.temperature
    head = order.head[:, :top]
    p = (head / t.unsqueeze(-1)).exp_() / m.total.unsqueeze(-1)
    entropy = m.total.log() - m.energy / t
    assert m.variance is not None
    values = torch.stack((p[:, 0], entropy, m.variance, p.sum(-1)), dim=-1)
    if m.spread is None or m.variance_slope is None:
        return values, torch.zeros_like(values)
    dp = p * (m.energy.unsqueeze(-1) - head) / (t * t).unsqueeze(-1)
    slopes = torch.stack((dp[:, 0], m.spread / t**3, m.variance_slope, dp.sum(-1)), dim=-1)
    return values, slopes


def label_log_p(order: Order, m: Moments) -> tuple[Tensor, Tensor]:
    """log p_y and its derivative in T, both [n]."""
    t = m.temperature
    return order.label_x / t - m.total.log(), (m.energy - order.label_x) / (t * t)
