"""The claims of the paper: each with its figure, ours task by task, and a verdict, which is a judgement on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

from benchmarks.common import table
from benchmarks.evidence.intervals import Interval
from benchmarks.evidence.results import Record, Setting, score

Cell = Callable[[Setting], str | None]


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
    def of(bin: int) -> Callable[[Record], float | None]:
        def value(record: Record) -> float | None:
            angles: dict[str, list[float]] = record["deciles"]["initial"]
            return angles.get(pair, angles.get(", ".join(reversed(pair.split(", "))), []))[bin]

        return value

    return lambda setting: " → ".join(_shown(setting.over_seeds(of(bin)), digits=0, unit="°") or "–" for bin in bins)


def _difference(method: str, reference: str, what: str = "answer") -> Cell:
    def cell(setting: Setting) -> str | None:
        if method not in setting.runs:
            return None
        found = setting.difference(method, score(what), to=reference)
        shown = _shown(found, scale=100, sign=True)
        return f"**{shown}**" if found and found.excludes_zero else shown

    return cell


def _each(*methods: str) -> Cell:
    def cell(setting: Setting) -> str | None:
        shown = [
            _shown(setting.interval(m, score("answer")), scale=100) if m in setting.runs else None for m in methods
        ]
        return ", ".join(value or "–" for value in shown) if sum(map(bool, shown)) > 1 else None

    return cell


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
    return " → ".join(_shown(part, digits=2) or "–" for part in parts)


def _unlearning(setting: Setting) -> str | None:
    """``lang`` on the most visual third at the end of training over its value at the beginning."""

    def ratio(record: Record) -> float | None:
        values: list[float] = record["observed"]["lang tercile 2"]
        return values[-1] / values[0]

    strong = "vgs,floor=1e-3,lam=0.3,quantile=0"
    methods = [method for method in ("standard", "vgs,lam=0", "vgs", strong) if method in setting.runs]
    shown = (f"{method}: {_shown(setting.interval(method, ratio), digits=0)}" for method in methods)
    return "; ".join(shown) if methods else None


def _cost(setting: Setting) -> str | None:
    if not {"standard", "vgs"} <= setting.runs.keys():
        return None
    seconds = [
        list(setting.values(method, lambda record: record["seconds"]).values()) for method in ("vgs", "standard")
    ]
    return f"{min(seconds[0]) / min(seconds[1]):.2f}" if all(seconds) else None


def _shown(
    value: Interval | None, *, scale: float = 1.0, digits: int = 1, sign: bool = False, unit: str = ""
) -> str | None:
    return None if value is None else value.show(scale=scale, digits=digits, sign=sign) + unit


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
        "not reproduced: std is no bisector here, it points along vis where the image matters most",
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
        "reproduced while the student learns; η rises at the end of long runs, when std and vis are small and oppose "
        "each other",
        _eta,
    ),
    Claim(
        "VGS − standard, points (Table 1)",
        "+2.4",
        "not reproduced: no gain in any task, a loss where the teacher's language is the better one",
        _difference("vgs", "standard"),
    ),
    Claim(
        "adaptive VGS − standard (Table 5)",
        "+2.8",
        "not reproduced",
        _difference("vgs,adaptive=True", "standard"),
    ),
    Claim(
        "towards language − standard (Fig. 5)",
        "below 0",
        "not reproduced: it ties, and gains where the teacher's language is the better one",
        _difference("language", "standard"),
    ),
    Claim(
        "GRPO, + standard, + VGS (Table 2)",
        "44.8, 45.4, 47.2",
        "not reproduced: VGS adds nothing to GRPO that standard does not, and distillation alone beats all three",
        _each("grpo", "grpo+standard", "grpo+vgs"),
    ),
    Claim(
        "γ = 1, 2, 4 (Fig. 8)",
        "45.0, 46.0, 46.5",
        "not reproduced: no gain at any γ, and less stable at 4",
        _each("vgs,gamma=1", "vgs", "vgs,gamma=4"),
    ),
    Claim(
        "λ = 0, 0.01, 0.1 (Fig. 8)",
        "56.8, 58.2, 57.3",
        "not reproduced: no difference",
        _each("vgs,lam=0", "vgs", "vgs,lam=0.1"),
    ),
    Claim(
        "growth of lang on the most visual third (Fig. 4b)",
        "diverges only without lp",
        "reproduced in part: it grows under standard distillation as under VGS, and what stops it is a λ of 0.3 on all "
        "tokens, not of 0.01 on a third of them",
        _unlearning,
    ),
    Claim(
        "text-only questions, VGS − standard, points (Fig. 10)",
        "no difference",
        "reproduced where both models' language is right; a loss where only the teacher's is",
        _difference("vgs", "standard", "language"),
    ),
    Claim(
        "a step of VGS ÷ standard, with rollout (Fig. 9)",
        "1.375",
        "not here, where prompts are mostly text; reproduced where they are mostly image "
        "([1.36](performance.md#a-step-of-visual-gradient-steering))",
        _cost,
    ),
)
