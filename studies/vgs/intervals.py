"""Means over seeds and how far they can be trusted: 95 % t-intervals, paired by seed where methods are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean of ``n`` values, and half the width of its interval; NaN where one value says nothing about it."""

    mean: float
    half: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half  # False for NaN

    def show(self, *, scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
        """``mean ± half``, each multiplied by ``scale``; a lone mean where there is no interval."""
        mean = f"{self.mean * scale:{'+' if sign else ''}.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half * scale:.{digits}f}"


def interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """The mean of values that are independent and roughly normal, one for each seed."""
    n = len(values)
    if n < 2:
        return Interval(fmean(values), math.nan, n)
    quantile = float(stats.t.ppf((1 + level) / 2, n - 1))
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(n), n)


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """The mean difference by seed, over the seeds that both have; None where there is none."""
    common = sorted(values.keys() & reference.keys())
    return interval([values[seed] - reference[seed] for seed in common]) if common else None


def cell(value: Interval | None, *, scale: float = 1.0, digits: int = 1) -> str:
    """An interval as a table has it; a dash where there is none."""
    return "–" if value is None else value.show(scale=scale, digits=digits)


def points(difference: Interval | None) -> str:
    """A difference of shares in points, with its sign; bold where it excludes zero."""
    if difference is None:
        return "–"
    shown = difference.show(scale=100, sign=True)
    return f"**{shown}**" if difference.excludes_zero else shown
