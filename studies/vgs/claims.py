"""The claims of the paper: each with its figure, and ours task by task. What they mean is said on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.common import table
from studies.vgs.intervals import cell, points
from studies.vgs.table import Setting

Cell = Callable[[Setting], str | None]  # None where a setting has nothing to say


class Claim(NamedTuple):
    """A claim, the paper's figure, and how ours is read off a setting."""

    what: str
    paper: str
    ours: Cell


def claims(settings: Sequence[Setting]) -> str:
    """A row for every claim, a column for every task in its own settings."""
    own = [setting for setting in settings if setting.name == "default"]
    rows = [[c.what, c.paper, *(c.ours(setting) or "–" for setting in own)] for c in CLAIMS]
    return table(["claim", "paper", *(f"`{setting.task}`" for setting in own)], rows)


def _angle(pair: str) -> Cell:
    return lambda setting: " → ".join(cell(setting.over_seeds(f"{pair} {i}"), digits=0) + "°" for i in (0, 9))


def _difference(method: str, column: str = "answer") -> Cell:
    return lambda setting: points(setting.difference(method, column))


def _each(*methods: str) -> Cell:
    """On the seeds that all of them have."""

    def shown(setting: Setting) -> str | None:
        if not setting.runs.keys() >= set(methods):
            return None
        seeds = setting.common(methods)
        return ", ".join(cell(setting.interval(m, "answer", seeds=seeds), scale=100) for m in methods)

    return shown


def _eta(setting: Setting) -> str | None:
    """Its mean over the first and the last quarter of training."""
    if "vgs" not in setting.runs:
        return None
    return " → ".join(cell(setting.interval("vgs", f"eta {when}"), digits=2) for when in ("first", "last"))


def _unlearning(setting: Setting) -> str | None:
    """The geometric mean over seeds, and the ends of its interval."""
    shown = []
    for method in ("standard", "vgs,lam=0", "vgs", "vgs,floor=1e-3,lam=0.3,quantile=0"):
        if found := setting.interval(method, "lang growth"):
            low, mean, high = (math.exp(found.mean + side * found.half) for side in (-1, 0, 1))
            shown.append(f"`{method}` × {mean:.2g} ({low:.2g} to {high:.2g})")
    return "; ".join(shown) or None


_EQ_22 = ("grpo+standard,weight=2.8", "grpo+vgs,decomposition=vgs-unscaled")
CLAIMS = (
    Claim("∠(lang, vis), least → most visual decile (Fig. 3a)", "60° → 92°", _angle("lang, vis")),
    Claim("∠(std, vis), least → most visual decile (Fig. 3b)", "– → 42°", _angle("std, vis")),
    Claim("∠(std, lang), least → most visual decile (Fig. 3c)", "50°", _angle("std, lang")),
    Claim(
        "dose at the start, ∠(std, std + 2 vis)",
        "26° to 30°",
        lambda setting: cell(setting.interval("standard", "dose first"), digits=0) + "°",
    ),
    Claim("η of VGS, first → last quarter of training (Fig. 7)", "0.36 to 0.41, stable", _eta),
    Claim("VGS − standard, points (Table 1)", "+2.4", _difference("vgs")),
    Claim("the same, mean over responses as printed", "", _difference("vgs,reduction=sequence")),
    Claim("three times the weight on visual tokens − standard", "", _difference("reweighting")),
    Claim("adaptive VGS − standard (Table 5)", "+2.8", _difference("vgs,adaptive=True")),
    Claim("towards language − standard (Fig. 5)", "below 0", _difference("language")),
    Claim(
        "GRPO; + standard; + standard × 2.8; + VGS as in Eq. 22, without η; + VGS with η; standard alone (Table 2)",
        "44.8; 45.4; –; 47.2; –; –",
        _each("grpo", "grpo+standard", *_EQ_22, "grpo+vgs", "standard"),
    ),
    Claim("γ = 1, 2, 4 (Fig. 8)", "45.0, 46.0, 46.5", _each("vgs,gamma=1", "vgs", "vgs,gamma=4")),
    Claim("λ = 0, 0.01, 0.1 (Fig. 8)", "56.8, 58.2, 57.3", _each("vgs,lam=0", "vgs", "vgs,lam=0.1")),
    Claim("growth of lang on the most visual third (Fig. 4b)", "diverges only without lp", _unlearning),
    Claim("text-only questions, VGS − standard, points (Fig. 10)", "no difference", _difference("vgs", "language")),
)
