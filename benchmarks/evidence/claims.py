"""The claims of the paper, each with its figure and ours, task by task; the verdicts are for the page to give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from benchmarks.common import table
from benchmarks.evidence.intervals import Interval
from benchmarks.evidence.results import Record, Setting, score

Cell = Callable[[Setting], str | None]


def claims(settings: Sequence[Setting]) -> str:
    """A row for every claim, a column for every task in its own settings."""
    own = [setting for setting in settings if setting.name == "default"]
    rows = [[claim, paper, *(cell(setting) or "–" for setting in own)] for claim, paper, cell in CLAIMS]
    return table(["claim", "paper", *(f"`{setting.task}`" for setting in own)], rows)


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
        return ", ".join(value or "–" for value in shown) if any(shown) else None

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

    methods = [method for method in ("vgs,lam=0", "vgs", "standard") if method in setting.runs]
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


CLAIMS: tuple[tuple[str, str, Cell], ...] = (
    ("∠(lang, vis), least → most visual decile (Fig. 3a)", "60° → 92°", _angle("lang, vis", 0, 9)),
    ("∠(std, vis), least → most visual decile (Fig. 3b)", "– → 42°", _angle("std, vis", 0, 9)),
    ("∠(std, lang), least → most visual decile (Fig. 3c)", "50°", _angle("std, lang", 0, 9)),
    ("η of VGS, first → last quarter of training (Fig. 7)", "0.36 to 0.41, stable", _eta),
    ("VGS − standard, points (Table 1)", "+2.4", _difference("vgs", "standard")),
    ("adaptive VGS − standard (Table 5)", "+2.8", _difference("vgs,adaptive=True", "standard")),
    ("towards language − standard (Fig. 5)", "below 0", _difference("language", "standard")),
    ("GRPO, + standard, + VGS (Table 2)", "44.8, 45.4, 47.2", _each("grpo", "grpo+standard", "grpo+vgs")),
    ("γ = 1, 2, 3, 4 (Fig. 8)", "45.0, 46.0, 46.5, 46.5", _each("vgs,gamma=1", "vgs", "vgs,gamma=3", "vgs,gamma=4")),
    ("λ = 0, 0.01, 0.1 (Fig. 8)", "56.8, 58.2, 57.3", _each("vgs,lam=0", "vgs", "vgs,lam=0.1")),
    ("growth of lang on the most visual third (Fig. 4b)", "diverges only without lp", _unlearning),
    (
        "text-only questions, VGS − standard, points (Fig. 10)",
        "no difference",
        _difference("vgs", "standard", "language"),
    ),
    ("a step of VGS ÷ standard, with rollout (Fig. 9)", "1.375", _cost),
)
