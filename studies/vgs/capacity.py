"""Capacity and language: students from far too small for the language of their task to ample, by method.

    python -m studies.vgs capacity

does the runs that are missing, in the order of :func:`places`, so that it can be stopped and gone on with at any time.
The page says beforehand which outcome would mean what.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.common import table as as_table
from steer_optim.plots import COLOURS
from studies.vgs.figures import band
from studies.vgs.grid import Place
from studies.vgs.intervals import cell, interval, paired, points
from studies.vgs.table import Row, Setting, settings

TASKS = ("shapes-topics", "shapes-topics-voices")  # both speak alike; each has a language of its own
WIDTHS = (16, 32, 64, 96)
MAIN = ("standard", "vgs", "reweighting", "vgs-frozen")
METHODS = (*MAIN, "tokens", "vgs,detach_prior=False", "reweighting-frozen")
ABLATIONS = ("vgs,floor=1e-3,lam=0", "vgs,lam=0", "vgs,lam=0.1", "vgs,lam=0.3,quantile=0")  # where it collapsed
SEEDS = (1, 2, 3, 4, 5)  # seed 0 was for trying the task out
MORE = (6, 7, 8, 9, 10)  # where five had an interval that ended within two points of zero
RATES = RATE, SLOW = 1e-3, 3e-4  # of learning: the task's own, and one at which less can go wrong
COMPARISONS = (*((method, "standard") for method in MAIN[1:]), ("vgs", "reweighting"))  # planned
EARLY = (1, 2)  # fifths of the steps
OUTCOMES = {"named": "things named right, %", "perception": "all seen, %", "answer": "right, %"}


class Condition(NamedTuple):
    """What the experiment varies beside method and seed.

    Attributes:
        task: its name.
        width: of the student.
        rate: of learning.
        eye_steps: supervised steps of the student's fresh tower: what it sees at the start.
        steps: of distillation.
    """

    task: str = TASKS[0]
    width: int = WIDTHS[0]
    rate: float = RATE
    eye_steps: int = 30
    steps: int = 400

    def place(self, method: str, seed: int) -> Place:
        names = ("student_size", "lr", "eye_steps", "steps")
        return Place(self.task, tuple(zip(names, self[1:], strict=True)), method, seed)

    def among(self, rows: Sequence[Row]) -> Setting:
        """Its runs."""
        task, name = self.place("standard", 0).key[:2]
        found = settings([row for row in rows if (row["task"], row["setting"]) == (task, name)])
        return found[0] if found else Setting(task, name, {})


SMALL, LARGE = (tuple(Condition(width=w, rate=rate) for rate in RATES) for w in (WIDTHS[0], WIDTHS[-1]))
SIGHTED = tuple(Condition(task, rate=SLOW, eye_steps=200) for task in TASKS)
SHORT = tuple(Condition(task, WIDTHS[1], 1e-4, eye_steps=200, steps=100) for task in TASKS)
FASTER = tuple(condition._replace(rate=SLOW) for condition in SHORT)  # afterwards: nobody had learnt much
PLANNED = (SMALL[0], LARGE[0], SMALL[1], LARGE[1], *SIGHTED, *SHORT)
PLANNED_PAIRS = [*itertools.product(PLANNED, COMPARISONS)]
ANSWERS = [(SMALL[1], (f"{m},off_policy=True", "standard,off_policy=True")) for m in MAIN[1:]]  # afterwards: why
CONDITIONS = [
    SMALL[0],
    LARGE[0],
    *(Condition(width=width, rate=SLOW) for width in WIDTHS),
    *SIGHTED,
    *SHORT,
    *FASTER,
]
SHOWN = {
    "16": SMALL[1],
    "32": Condition(width=32, rate=SLOW),
    "64": Condition(width=64, rate=SLOW),
    "96": LARGE[1],
    "16,\nsees": SIGHTED[0],
    "16, sees,\nown words": SIGHTED[1],
    "32, sees,\nbriefly": SHORT[0],
}


def places(seeds: Sequence[int] = SEEDS) -> list[Place]:
    """All runs: what the page's findings rest on first, then the rest."""
    wanted = [c.place(m, s) for pair in zip(SMALL, LARGE, strict=True) for s in seeds for c in pair for m in MAIN]
    wanted += [SMALL[1].place(m, s) for s in MORE for m in ("standard", "reweighting", "vgs-frozen")]
    wanted += [SMALL[1].place(m, s) for s in seeds for m in (*METHODS, *ABLATIONS)]
    wanted += [SMALL[1].place(f"{m},off_policy=True", s) for s in seeds for m in MAIN]
    wanted += [c.place(m, s) for s in seeds for c in SIGHTED for m in (*MAIN, "tokens")]
    wanted += [c.place(m, s) for s in MORE for c in SIGHTED for m in MAIN]
    wanted += [c.place(m, s) for s in seeds for c in SHORT for m in (*MAIN, "vgs,reduction=sequence")]
    wanted += [c.place(m, s) for s in MORE for c in SHORT for m in MAIN]
    wanted += [c.place(m, s) for s in (*seeds, *MORE) for c in FASTER for m in MAIN]
    wanted += [c.place(m, s) for c in CONDITIONS for s in seeds for m in MAIN]
    return list(dict.fromkeys(wanted))


def study(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of seed 0, with which the task was tried out."""
    return [row for row in rows if row["seed"] != "0"]


def results(rows: Sequence[Row]) -> str:
    """A row for each condition and method of which there are runs."""
    head = [*_WHERE, "method", "seeds", *OUTCOMES.values(), "language left, nats, first → last"]
    head += [
        "dose at the start",
        "named, %, at first → after 2/5 → at the end",
        "first-order gain, first step",
        "over training",
    ]
    lines = []
    for of in CONDITIONS:
        found = of.among(rows)
        for method, runs in found.runs.items():
            line = [*_where(of), f"`{method}`", str(len(runs))]
            for column in OUTCOMES:
                own, gain = found.interval(method, column), found.difference(method, column)
                line.append(cell(own, scale=100) if method == "standard" else points(gain))
            first, last = (cell(found.interval(method, column), digits=2) for column in ("lang first", "lang"))
            line += [f"{first} → {last}", f"{cell(found.interval(method, 'dose first'), digits=0)}°"]
            curves = series(found, method, "named").values()
            at = (0, of.steps * max(EARLY) // 5, of.steps)
            line.append(" → ".join(f"{100 * fmean(curve[step] for curve in curves):.1f}" for step in at))
            line += [cell(found.interval(method, column), digits=3) for column in ("gain first", "gain")]
            lines.append(line)
    return as_table(head, lines)


def compared(rows: Sequence[Row], wanted: Iterable[tuple[Condition, tuple[str, str]]]) -> str:
    """One method to another, on things named: early, half-way, and at the end."""
    head = [*_WHERE, "comparison", "seeds", *(f"after {fifths}/5 of the steps" for fifths in EARLY), "at the end"]
    lines = []
    for of, (method, other) in wanted:
        found = of.among(rows)
        if not (difference := found.difference(method, "named", to=other)):
            continue
        curves = [series(found, m, "named") for m in (method, other)]
        early = [
            paired(*({seed: run[step] for seed, run in curve.items()} for curve in curves))
            for step in (of.steps * fifths // 5 for fifths in EARLY)
        ]
        pair = [f"`{method}` to `{other}`", str(difference.n)]
        lines.append([*_where(of), *pair, *map(points, [*early, difference])])
    return as_table(head, lines)


_WHERE = ["task", "lr", "width", "steps of the eye", "steps"]


def _where(condition: Condition) -> list[str]:
    task, width, rate, *steps = condition
    return [f"`{task}`", f"{rate:g}", str(width), *map(str, steps)]


def series(found: Setting, method: str, column: str) -> dict[int, dict[int, float]]:
    """A number at the checkpoints, by seed and step."""
    return {
        seed: dict(zip(map(int, row["step at"].split()), map(float, row[f"{column} at"].split()), strict=True))
        for seed, row in found.runs.get(method, {}).items()
    }


def figure(rows: Sequence[Row]) -> Figure:
    """Things named over standard distillation, by student; language left over training."""
    drawing = Figure(figsize=(14, 4.2), dpi=100, layout="constrained")
    left, right = drawing.subfigures(1, 2, width_ratios=(1.2, 1))
    gains, lefts = left.subplots(), right.subplots(1, 2)
    gains.axhline(0, color=COLOURS[0], linewidth=1.4, label=METHODS[0])
    for i, method in enumerate(MAIN[1:], start=1):
        found = [(x, condition.among(rows).difference(method, "named")) for x, condition in enumerate(SHOWN.values())]
        there = [(x + 0.15 * (i - 2), 100 * d.mean, 100 * d.half) for x, d in found if d is not None and d.n > 1]
        if there:
            x, means, halves = zip(*there, strict=True)
            gains.errorbar(x, means, yerr=halves, fmt="o", markersize=5, color=COLOURS[i], label=method)
    gains.set_xticks(range(len(SHOWN)), [*SHOWN])
    gains.set(
        xlim=(-0.5, len(SHOWN) - 0.5),
        xlabel="width of the student",
        ylabel="points to standard distillation",
        title="Things named right",
    )
    for condition, axes in zip((SMALL[0], LARGE[0]), lefts, strict=True):
        for i, method in enumerate(MAIN):
            runs = [*series(condition.among(rows), method, "lang").values()]
            steps = [*runs[0]] if runs else []
            band(axes, steps, [interval([run[step] for run in runs]) for step in steps], i, method)
        title = f"Language left, width {condition.width}"
        axes.set(xlabel="step", ylabel="nats per word", ylim=(0, None), title=title)
    drawing.legend(*gains.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawing
