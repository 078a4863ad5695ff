"""The claims of the paper: each with its figure, ours task by task, and a verdict, which is a judgement on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from benchmarks.common import table
from benchmarks.evidence.intervals import cell, points
from benchmarks.evidence.results import Record, Setting, of_pair, score

Cell = Callable[[Setting], str | None]  # None where a setting has nothing to say


class Claim(NamedTuple):
    """A claim, the paper's figure, what our figures say of it, and how they are read off a setting."""

    what: str
    paper: str
    verdict: str
    ours: Cell


def claims(settings: Sequence[Setting]) -> str:
    """A row for every claim, a column for every task in its own settings."""
    own = [setting for setting in settings if setting.name == "default"]
    rows = [[c.what, c.paper, c.verdict, *(c.ours(setting) or "–" for setting in own)] for c in CLAIMS]
    return table(["claim", "paper", "verdict", *(f"`{setting.task}`" for setting in own)], rows)


def _angle(pair: str, *bins: int) -> Cell:
    def of(bin: int) -> Callable[[Record], float]:
        return lambda record: of_pair(record["deciles"]["initial"], pair)[bin]

    return lambda setting: " → ".join(cell(setting.over_seeds(of(bin)), digits=0) + "°" for bin in bins)


def _difference(method: str, what: str = "answer") -> Cell:
    return lambda setting: points(setting.difference(method, score(what)))


def _each(*methods: str) -> Cell:
    """On the seeds that all of them have."""

    def shown(setting: Setting) -> str | None:
        if not setting.runs.keys() >= set(methods):
            return None
        seeds = setting.common(methods)
        return ", ".join(cell(setting.interval(m, score("answer"), seeds=seeds), scale=100) for m in methods)

    return shown


def _eta(setting: Setting) -> str | None:
    """Its mean over the first and the last quarter of training."""
    if "vgs" not in setting.runs:
        return None

    def quarter(*, last: bool) -> Callable[[Record], float | None]:
        def value(record: Record) -> float | None:
            etas = record["steps"]["weight std"]
            n = max(1, len(etas) // 4)
            return fmean(etas[-n:] if last else etas[:n])

        return value

    parts = (setting.interval("vgs", quarter(last=last)) for last in (False, True))
    return " → ".join(cell(part, digits=2) for part in parts)


def _unlearning(setting: Setting) -> str | None:
    """``lang`` on the most visual third, its mean over the last quarter of training over that at the beginning.

    The geometric mean over seeds, and the ends of its interval.
    """

    def growth(record: Record) -> float:
        values: list[float] = record["observed"]["lang tercile 2"]
        return math.log(fmean(values[-(len(values) // 4) or -1 :]) / values[0])

    strong = "vgs,floor=1e-3,lam=0.3,quantile=0"
    shown = []
    for method in ("standard", "vgs,lam=0", "vgs", strong):
        if found := setting.interval(method, growth):
            low, mean, high = (math.exp(found.mean + side * found.half) for side in (-1, 0, 1))
            shown.append(f"`{method}` × {mean:.2g} ({low:.2g} to {high:.2g})")
    return "; ".join(shown) or None


CLAIMS = (
    Claim(
        "∠(lang, vis), least → most visual decile (Fig. 3a)",
        "60° → 92°",
        "reproduced in part: a right angle or more where the image matters most, but 80° and not 60° where least",
        _angle("lang, vis", 0, 9),
    ),
    Claim(
        "∠(std, vis), least → most visual decile (Fig. 3b)",
        "– → 42°",
        "not reproduced: std points along vis where the image matters most, for there the two models' language "
        "differs little",
        _angle("std, vis", 0, 9),
    ),
    Claim(
        "∠(std, lang), least → most visual decile (Fig. 3c)",
        "50°",
        "not reproduced, for the same reason",
        _angle("std, lang", 0, 9),
    ),
    Claim(
        "η of VGS, first → last quarter of training (Fig. 7)",
        "0.36 to 0.41, stable",
        "reproduced while the student learns; η rises near the end, where std and vis are small and oppose each other",
        _eta,
    ),
    Claim(
        "VGS − standard, points (Table 1)",
        "+2.4",
        "not reproduced: no gain in any task. Where the two models' language agrees, the two methods nearly coincide",
        _difference("vgs"),
    ),
    Claim(
        "adaptive VGS − standard (Table 5)",
        "+2.8",
        "not reproduced in the two tasks where it was run",
        _difference("vgs,adaptive=True"),
    ),
    Claim(
        "towards language − standard (Fig. 5)",
        "below 0",
        "not reproduced: it ties, and is ahead where the teacher's language is the better one",
        _difference("language"),
    ),
    Claim(
        "GRPO, + standard, + VGS (Table 2)",
        "44.8, 45.4, 47.2",
        "not reproduced: beside GRPO, too, VGS and standard tie. (Distillation alone beats all three; its student sees "
        "too little to be rewarded often)",
        _each("grpo", "grpo+standard", "grpo+vgs", "standard"),
    ),
    Claim(
        "γ = 1, 2, 4 (Fig. 8)",
        "45.0, 46.0, 46.5",
        "not reproduced in the one task where it was run: no gain at any γ, and collapses at 4",
        _each("vgs,gamma=1", "vgs", "vgs,gamma=4"),
    ),
    Claim(
        "λ = 0, 0.01, 0.1 (Fig. 8)",
        "56.8, 58.2, 57.3",
        "not reproduced in the one task where it was run: no difference",
        _each("vgs,lam=0", "vgs", "vgs,lam=0.1"),
    ),
    Claim(
        "growth of lang on the most visual third (Fig. 4b)",
        "diverges only without lp",
        "reproduced in part: it grows in three tasks, under standard distillation as under VGS; λ = 0.3 on all tokens "
        "slows it, 0.01 on a third of them does not",
        _unlearning,
    ),
    Claim(
        "text-only questions, VGS − standard, points (Fig. 10)",
        "no difference",
        "none found where both models' language is right, if with wide intervals; a loss where only the teacher's is",
        _difference("vgs", "language"),
    ),
    Claim(
        "a step of VGS ÷ standard, with rollout (Fig. 9)",
        "1.375",
        "reproduced: [1.36](performance.md#a-step-of-visual-gradient-steering) for a student of 22 M parameters",
        lambda _: None,
    ),
    Claim(
        "8B → 2B and 4B on seven benchmarks (Table 1)",
        "43.7 → 46.1, 56.6 → 58.1",
        "cannot be tested here",
        lambda _: None,
    ),
)
