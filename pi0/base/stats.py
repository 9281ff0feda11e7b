"""Intervals and tests for success counts: how certain is a success rate, or its change?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927), without continuity correction.

    Returns the lower and upper bound in [0, 1]; (0, 1) when there are no episodes. Raises `ValueError` unless
    0 <= successes <= n and 0 < confidence < 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes")
    if n == 0:
        return 0.0, 1.0
    z = _normal_quantile(confidence)
    center = successes + z * z / 2
    half_width = z * math.sqrt(successes * (n - successes) / n + z * z / 4)
    # The formula gives these bounds exactly; rounding errors would leave -1e-17.
    low = 0.0 if successes == 0 else (center - half_width) / (n + z * z)
    high = 1.0 if successes == n else (center + half_width) / (n + z * z)
    return low, high


def format_rate(successes: int, n: int) -> str:
    """A success count as text: "55/100 (55.0%, 95% interval 45.2 to 64.4)"."""
    if n == 0:
        return "0/0 (no episodes)"
    low, high = wilson_interval(successes, n)
    return f"{successes}/{n} ({100 * successes / n:.1f}%, 95% interval {100 * low:.1f} to {100 * high:.1f})"


@dataclass(frozen=True)
class PairedDifference:
    """The change of a success rate on the same episodes; rates and differences as fractions, not percent."""

    n: int
    before: int  # successes before
    after: int  # successes after
    gained: int  # failed before, succeeded after
    lost: int  # succeeded before, failed after
    difference: float  # success rate after minus before
    low: float
    high: float
    confidence: float
    p_value: float  # exact McNemar test of no change, two-sided

    def __str__(self) -> str:
        interval = f"{100 * self.confidence:g}% interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"
        counts = f"{self.gained} gained, {self.lost} lost of {self.n}"
        return f"{100 * self.difference:+.1f} points, {interval}, p = {self.p_value:.2g} ({counts})"


def paired_difference(
    before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95
) -> PairedDifference:
    """Success after minus before, where episode i of both has the same initial state and noise seed.

    The interval is Newcombe's (1998, Statistics in Medicine 17:2635, method 10): the Wilson intervals of both
    rates combined with their correlation. It needs no resampling and holds for small n and rates near 0 or 1.
    The p value is the exact McNemar test. Raises `ValueError` for lists that are empty or of unequal length.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{len(before)} episodes before and {len(after)} after are not paired")
    n = len(before)
    both = sum(bool(b and a) for b, a in zip(before, after, strict=True))
    gained = sum(bool(a and not b) for b, a in zip(before, after, strict=True))
    lost = sum(bool(b and not a) for b, a in zip(before, after, strict=True))
    neither = n - both - gained - lost

    rate_after, rate_before = (both + gained) / n, (both + lost) / n
    low_after, high_after = wilson_interval(both + gained, n, confidence)
    low_before, high_before = wilson_interval(both + lost, n, confidence)
    difference = (gained - lost) / n
    correlation = _phi(both, gained, lost, neither)
    down = _combine(rate_after - low_after, high_before - rate_before, correlation)
    up = _combine(high_after - rate_after, rate_before - low_before, correlation)
    return PairedDifference(
        n=n,
        before=both + lost,
        after=both + gained,
        gained=gained,
        lost=lost,
        difference=difference,
        low=difference - down,
        high=difference + up,
        confidence=confidence,
        p_value=mcnemar_exact(gained, lost),
    )


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test: were changes in either direction equally likely?

    Twice the smaller tail of Binomial(gained + lost, 1/2), at most 1; 1 when nothing changed.
    """
    changed = gained + lost
    # Integers, since the probabilities of thousands of episodes are too small for floats.
    ways, tail = 1, 0
    for k in range(min(gained, lost) + 1):
        tail += ways
        ways = ways * (changed - k) // (k + 1)
    return min(1.0, 2 * tail / 2**changed)


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence} is not between 0 and 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _phi(both: int, gained: int, lost: int, neither: int) -> float:
    """Newcombe's correlation: phi, corrected for continuity if positive; 0 if undefined."""
    margins = (both + gained) * (both + lost) * (neither + gained) * (neither + lost)
    if margins == 0:
        return 0.0
    covariance: float = both * neither - gained * lost
    if covariance > 0:
        covariance = max(covariance - (both + gained + lost + neither) / 2, 0)
    return covariance / math.sqrt(margins)


def _combine(first: float, second: float, correlation: float) -> float:
    return math.sqrt(max(first * first - 2 * correlation * first * second + second * second, 0.0))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of values and Student's t interval for it; a single value has no interval (nan).

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values, so no mean")
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.nan, math.nan
    from scipy.special import stdtrit  # takes a tenth of a second to load

    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    half_width = float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n)
    return mean, mean - half_width, mean + half_width


def format_mean(scores: Sequence[float]) -> str:
    """A mean as text: "212.0 (95% interval 180.3 to 243.7, 20 episodes)"."""
    if not scores:
        return "no episodes"
    if len(scores) == 1:
        return f"{scores[0]:.1f} (1 episode)"
    mean, low, high = mean_interval(scores)
    return f"{mean:.1f} (95% interval {low:.1f} to {high:.1f}, {len(scores)} episodes)"
