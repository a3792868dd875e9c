"""Intervals of what was measured, and the curve that static settings make up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_Z95 = 1.959963984540054


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share (Wilson, "Probable inference", JASA 1927).

    Args:
        share: the observed share.
        count: how many independent draws it was observed in; may be an effective number.
    """
    if count <= 0:
        return 0.0, 1.0
    z2 = _Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * np.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def accuracy_interval(correct: Array) -> tuple[float, float]:
    """95 % Wilson interval of pass@1.

    Args:
        correct: [problems, samples], 0 or 1. Answers to one problem are not independent: with more
            than one sample the count is the effective one, from the spread between problems.
    """
    problems, samples = correct.shape
    share = float(correct.mean())
    if samples == 1 or problems < 2:
        return wilson_interval(share, problems)
    variance = float(correct.mean(1).var(ddof=1)) / problems
    if variance <= 0:
        return wilson_interval(share, problems)
    count = share * (1 - share) / variance
    return wilson_interval(share, min(max(count, 1.0), float(problems * samples)))


def paired_bootstrap(
    difference: Array, *, seed: int, resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean of a difference per problem, with its 95 % bootstrap interval (percentiles)."""
    weights = resampling(len(difference), seed, resamples)
    low, high = np.quantile(weights @ difference, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def resampling(count: int, seed: int, resamples: int) -> Array:
    """Weights [resamples, count] of bootstrap samples; each row sums to 1."""
    random = np.random.default_rng(seed)
    return random.multinomial(count, np.full(count, 1 / count), size=resamples) / count


def upper_hull(entropy: Array, accuracy: Array) -> list[int]:
    """Which points lie on the upper convex hull, from the lowest entropy to the highest.

    Of points at the same entropy only the most accurate can be on it (the first of equals).
    """
    order = sorted(range(len(entropy)), key=lambda i: (entropy[i], -accuracy[i], i))
    hull: list[int] = []
    for i in order:
        if hull and entropy[i] == entropy[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            left = (accuracy[b] - accuracy[a]) * (entropy[i] - entropy[a])
            right = (accuracy[i] - accuracy[a]) * (entropy[b] - entropy[a])
            if left > right:
                break
            hull.pop()
        hull.append(i)
    return hull


@dataclass(frozen=True)
class StaticCurve:
    """A line through (entropy, accuracy) points, sorted by entropy.

    Attributes:
        entropy: nats an answer, ascending.
        accuracy: of the same points.
    """

    entropy: Array
    accuracy: Array

    @classmethod
    def through(cls, entropy: Array, accuracy: Array) -> StaticCurve:
        """The line through all points given."""
        order = np.argsort(entropy, kind="stable")
        return cls(np.asarray(entropy)[order], np.asarray(accuracy)[order])

    @classmethod
    def hull(cls, entropy: Array, accuracy: Array) -> StaticCurve:
        """The upper hull of all points given."""
        chosen = upper_hull(entropy, accuracy)
        return cls.through(np.asarray(entropy)[chosen], np.asarray(accuracy)[chosen])

    def accuracy_at(self, entropy: float) -> tuple[float, bool]:
        """The accuracy at an entropy, and whether that lies within the curve's range.

        Beyond the range it is the accuracy at the nearest end.
        """
        within = bool(self.entropy[0] <= entropy <= self.entropy[-1])
        return float(np.interp(entropy, self.entropy, self.accuracy)), within

    def entropy_at(self, accuracy: float) -> tuple[float, bool]:
        """The highest entropy with that accuracy or more, and whether the curve crosses it there.

        A curve that never gets so accurate gives the entropy of its most accurate point (of equals
        the rightmost), one that is more accurate even at its right end gives that end; both are
        flagged False.
        """
        e, a = self.entropy, self.accuracy
        if a[-1] >= accuracy:
            return float(e[-1]), bool(a[-1] == accuracy)
        for i in range(len(a) - 2, -1, -1):
            if a[i] >= accuracy:
                share = (a[i] - accuracy) / (a[i] - a[i + 1])
                return float(e[i] + share * (e[i + 1] - e[i])), True
        return float(e[len(a) - 1 - int(np.argmax(a[::-1]))]), False
