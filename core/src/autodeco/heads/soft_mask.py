"""The soft mask of the top-p term: the label's place in the order, and Z.

Notation: c = cumulative sum of p in the order (logit, then smaller id first), D = dc/dT,
m = exp(-alpha relu(c - P)), Z = sum p m; the rest as in :mod:`autodeco.heads.closed_form`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from autodeco.heads.closed_form import Moments, Order, Workspace, label_log_p, moments, order_of
from autodeco.heads.vocabulary import Vocabulary

ALPHA = 30.0
EPSILON = 1e-9
# How many of the largest logits a row looks at where the tail behind fewer would be too coarse;
# behind the last of these, the whole vocabulary.
WIDTHS = (256, 4096)
# Bound of the relative error of Z that the integral of the tail may have: p_K / Z < 1e-5.
TAIL_TOLERANCE = 2.5e-6


def first_width(vocab: int) -> int:
    """How many of the largest logits every row looks at: most rows of a real model need no more."""
    return min(vocab, WIDTHS[0], max(32, vocab // 8))


def in_parts(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Row numbers [r] in runs of at most ``size`` (at least one), none for no rows."""
    size = max(1, size)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@dataclass(frozen=True)
class Look:
    """A second look at logits that are gone.

    Attributes:
        logits: rows int64 [r] -> logits [r, V]; they last until the next call.
        rows: how many to ask for at once, at most.
        work: scratch of that many rows.
    """

    logits: Callable[[Tensor], Tensor]
    rows: int
    work: Workspace


@dataclass(frozen=True)
class LabelMass:
    """Where the label stands in the order, all [n].

    Attributes:
        before: mass of the tokens ahead of it.
        upto: c_y, that mass and p_y.
        slope: D_y, the derivative of c_y in T.
    """

    before: Tensor
    upto: Tensor
    slope: Tensor


@dataclass(frozen=True)
class Head:
    """The K largest probabilities of each row and their cumulative sums, all [n, K]."""

    p: Tensor
    slope: Tensor
    mass: Tensor
    mass_slope: Tensor


def head_of(order: Order, m: Moments) -> Head:
    """Probabilities of the head of each row at the temperature of ``m``."""
    t = m.temperature.unsqueeze(-1)
    p = (order.head / t).exp_().div_(m.total.unsqueeze(-1))
    slope = (m.energy.unsqueeze(-1) - order.head).mul_(p).div_(t * t)
    # Rounding must not carry c above 1: at P = 1 it would switch the mask on.
    return Head(p, slope, p.cumsum(-1).clamp_max_(1.0), slope.cumsum(-1))


def label_mass(order: Order, head: Head, tail: LabelMass | None) -> LabelMass:
    """Cumulative mass of each label, from the head or, for rank -1, from ``tail``."""
    rank = order.rank.clamp_min(0).unsqueeze(-1)
    upto = head.mass.gather(-1, rank)[:, 0]
    slope = head.mass_slope.gather(-1, rank)[:, 0]
    before = head.mass.gather(-1, (rank - 1).clamp_min(0))[:, 0].masked_fill(order.rank == 0, 0.0)
    if tail is None:
        return LabelMass(before, upto, slope)
    inside = order.rank >= 0
    return LabelMass(
        torch.where(inside, before, tail.before),
        torch.where(inside, upto, tail.upto),
        torch.where(inside, slope, tail.slope),
    )


def tail_mass(logits: Tensor, order: Order, m: Moments, vocabulary: Vocabulary) -> LabelMass | None:
    """Cumulative mass of the labels in the tail, by masked sums over V; zeros in other rows."""
    if order.whole:
        return None
    out = torch.zeros(3, *m.total.shape, dtype=m.total.dtype, device=m.total.device)
    rows = (order.rank < 0).nonzero()[:, 0]
    for part in in_parts(rows, logits.shape[0] // 4):
        out[:, part] = _tail_mass(logits, order, m, part, vocabulary)
    return LabelMass(*out)


def _tail_mass(
    logits: Tensor, order: Order, m: Moments, rows: Tensor, vocabulary: Vocabulary
) -> Tensor:
    """before, c_y and D_y of some rows, [3, r]."""
    x = logits[rows] - order.peak[rows]
    y, label_x = order.label[rows].unsqueeze(-1), order.label_x[rows].unsqueeze(-1)
    t, total, energy = (v[rows].unsqueeze(-1) for v in (m.temperature, m.total, m.energy))
    ids = torch.arange(vocabulary.first, vocabulary.first + x.shape[-1], device=x.device)
    ahead = (x > label_x) | ((x == label_x) & (ids < y))
    p = (x / t).exp_().div_(total).mul_(ahead)
    own = (label_x / t).exp() / total
    before, slope = vocabulary.sum(torch.stack((p.sum(-1), p.mul_(energy - x).sum(-1))))
    slope = (slope + (own * (energy - label_x))[:, 0]) / (t * t)[:, 0]
    return torch.stack((before, (before + own[:, 0]).clamp_max_(1.0), slope))


@dataclass(frozen=True)
class Normalizer:
    """Z = sum p m of the soft mask with its derivatives, all [n].

    Attributes:
        value: Z.
        top_p_slope: dZ/dP.
        temperature_slope: dZ/dT.
        error: bound of the relative error of Z; 0 where the head is the whole vocabulary.
    """

    value: Tensor
    top_p_slope: Tensor
    temperature_slope: Tensor
    error: Tensor

    def replace(self, rows: Tensor, by: Normalizer) -> Normalizer:
        """With some rows taken from ``by``."""
        names = [f.name for f in fields(self)]
        return Normalizer(*(getattr(self, n).index_copy(0, rows, getattr(by, n)) for n in names))


def normalizer_of(head: Head, top_p: Tensor, whole: bool) -> Normalizer:
    """Z over the head, and the tail behind it as an integral over c (OBJECTIVE, "So the ...").

    The sum over the tail, sum_i p_i f(c_i) with f = exp(-alpha relu(c - P)), is a right Riemann
    sum of a function that falls: by f's convexity it lies below the integral by at most
    p_{K+1} (f(c_K) - f(1)) / 2. Half of that is subtracted, so that the other half bounds the
    error on either side.
    """
    p_cut = top_p.unsqueeze(-1)
    over = head.mass > p_cut
    masked = (head.mass - p_cut).clamp_min_(0.0).mul_(-ALPHA).exp_()
    soft = masked * head.slope
    masked.mul_(head.p)
    value = masked.sum(-1)
    masked.mul_(over)
    top_p_slope = ALPHA * masked.sum(-1)
    temperature_slope = soft.sum(-1) - ALPHA * masked.mul_(head.mass_slope).sum(-1)
    if whole:
        return Normalizer(value, top_p_slope, temperature_slope, torch.zeros_like(value))
    last, last_slope = head.p[:, -1], head.slope[:, -1]
    mass, mass_slope = head.mass[:, -1], head.mass_slope[:, -1]
    inside = mass < top_p
    start = torch.where(inside, 1.0, (-ALPHA * (mass - top_p)).clamp_max(0.0).exp())
    fall = (start - (-ALPHA * (1.0 - top_p)).clamp_max(0.0).exp()).clamp_min(0.0)
    decay = fall / ALPHA - last * fall / 4
    value = value + (top_p - mass).clamp_min(0.0) + decay
    correction = torch.where(inside, 0.0, ALPHA * last * start * mass_slope) - last_slope * fall
    return Normalizer(
        value=value,
        top_p_slope=top_p_slope + ALPHA * decay,
        temperature_slope=temperature_slope - start * mass_slope + correction / 4,
        error=last * fall / (4 * value),
    )


@dataclass(frozen=True)
class SoftLogP:
    """log of the label's probability under the soft mask, and its derivatives, all [n]."""

    value: Tensor
    temperature_slope: Tensor
    top_p_slope: Tensor


def soft_masked_log_p(
    order: Order,
    m: Moments,
    tail: LabelMass | None,
    top_p: Tensor,
    look: Look,
    *,
    exact: bool,
) -> tuple[SoftLogP, LabelMass]:
    """log(p_y m_y / Z) and the label's mass.

    Rows whose tail cannot be integrated to ``TAIL_TOLERANCE`` are done again with a wider head,
    in the end with the whole vocabulary.

    Args:
        order: the tokens, with a head of any width.
        m: their moments at their T.
        tail: mass of the labels that are not in the head (:func:`tail_mass`).
        top_p: P [n].
        look: gives logits again, for the coarse rows.
        exact: log p_y + log m_y - log Z; else the published log(p_y m_y / (Z + 1e-9) + 1e-9).
    """
    head = head_of(order, m)
    mass = label_mass(order, head, tail)
    z = normalizer_of(head, top_p, order.whole)
    del head
    if not order.whole:
        for part, wider in _wider(order, m, top_p, z.error > TAIL_TOLERANCE, look):
            z = z.replace(part, wider)
    beyond = mass.upto > top_p
    log_p, t_slope = label_log_p(order, m)
    log_pm = log_p - ALPHA * (mass.upto - top_p).clamp_min(0.0)
    t_slope = t_slope - torch.where(beyond, ALPHA * mass.slope, 0.0)
    p_slope = ALPHA * beyond.to(t_slope.dtype)
    if exact:
        return SoftLogP(
            log_pm - z.value.log(),
            t_slope - z.temperature_slope / z.value,
            p_slope - z.top_p_slope / z.value,
        ), mass
    floored = z.value + EPSILON
    r = log_pm.exp() / floored
    k = r / (r + EPSILON)
    return SoftLogP(
        (r + EPSILON).log(),
        k * (t_slope - z.temperature_slope / floored),
        k * (p_slope - z.top_p_slope / floored),
    ), mass


def _wider(
    order: Order, m: Moments, top_p: Tensor, coarse: Tensor, look: Look
) -> Iterator[tuple[Tensor, Normalizer]]:
    """Z of the coarse rows with wider heads, at most V, in parts that fit the workspace."""
    rows, width, vocab = coarse.nonzero()[:, 0], order.head.shape[-1], order.vocab
    while rows.numel():
        width = next((w for w in WIDTHS if w > width and 4 * w < vocab), vocab)
        left = []
        # choosing `width` of the candidates (see `largest`) sorts them, with 16 words for each
        candidates = min(16 * width, vocab)
        for part in in_parts(rows, max(1, look.rows * vocab // (16 * candidates))):
            logits = look.logits(part)
            wide = order_of(logits, order.label[part], width, look.work.vocabulary)
            at = moments(logits, wide.peak, m.temperature[part], look.work)
            z = normalizer_of(head_of(wide, at), top_p[part], wide.whole)
            yield part, z
            left.append(part[z.error > TAIL_TOLERANCE])
        rows = torch.cat(left)
