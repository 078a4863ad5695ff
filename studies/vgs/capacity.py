"""Capacity and language: students from far too small for the language of their task to ample, by method.

    python -m studies.vgs capacity

does the runs that are missing, in the order of :func:`places`, so that it can be stopped and gone on with at any time.
The page says beforehand which outcome would mean what.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.common import table as as_table
from steer_optim.plots import COLOURS
from studies.vgs.figures import band
from studies.vgs.grid import Place
from studies.vgs.intervals import Interval, cell, interval, paired, points
from studies.vgs.table import Row

TASKS = ("shapes-topics", "shapes-topics-voices")  # both speak alike; each has a language of its own
WIDTHS = (16, 32, 64, 96)
MAIN = ("standard", "vgs", "reweighting", "vgs-frozen")
METHODS = (*MAIN, "tokens", "vgs,detach_prior=False", "reweighting-frozen")
ABLATIONS = ("vgs,floor=1e-3,lam=0", "vgs,lam=0", "vgs,lam=0.1", "vgs,lam=0.3,quantile=0")  # where it collapsed
SEEDS = (1, 2, 3, 4, 5)  # seed 0 was for trying the task out
MORE = (6, 7, 8, 9, 10)  # where five had an interval that ended within two points of zero
LITTLE = 1e-4
RATES = RATE, SLOW = 1e-3, 3e-4  # of learning: the task's own, and one at which less can go wrong
COMPARISONS = (*((method, "standard") for method in MAIN[1:]), ("vgs", "reweighting"))  # planned
BLURRED, SHARP = (
    30,
    200,
)  # steps of the student's eye: the task's own, and until the dose at the start is over 25 degrees
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
    eye_steps: int = BLURRED
    steps: int = 400

    def place(self, method: str, seed: int) -> Place:
        changes = (
            ("student_size", self.width),
            ("lr", self.rate),
            ("eye_steps", self.eye_steps),
            ("steps", self.steps),
        )
        return Place(self.task, changes, method, seed)

    def runs(self, rows: Sequence[Row], method: str) -> list[Row]:
        key = self.place(method, 0).key[:-1]
        return [row for row in rows if (row["task"], row["setting"], row["method"]) == key]

    def values(self, rows: Sequence[Row], method: str, column: str) -> dict[int, float]:
        """A number by seed."""
        return {int(row["seed"]): float(row[column]) for row in self.runs(rows, method) if row[column]}

    def gain(self, rows: Sequence[Row], method: str, column: str) -> Interval | None:
        """Over standard distillation, paired by seed."""
        return paired(*(self.values(rows, m, column) for m in (method, "standard")))

    def series(self, rows: Sequence[Row], method: str, column: str) -> dict[int, dict[int, float]]:
        """A number at the checkpoints, by seed and step."""
        return {
            int(row["seed"]): dict(
                zip(map(int, row["step at"].split()), map(float, row[f"{column} at"].split()), strict=True)
            )
            for row in self.runs(rows, method)
        }


SMALL, LARGE = (tuple(Condition(width=w, rate=rate) for rate in RATES) for w in (WIDTHS[0], WIDTHS[-1]))
SIGHTED = tuple(Condition(task, rate=SLOW, eye_steps=SHARP) for task in TASKS)
SHORT = tuple(Condition(task, WIDTHS[1], LITTLE, SHARP, steps=100) for task in TASKS)
PLANNED = (SMALL[0], LARGE[0], SMALL[1], LARGE[1], *SIGHTED, *SHORT)
CONDITIONS = [
    *(Condition(TASKS[0], width, rate) for rate in RATES for width in WIDTHS),
    *SIGHTED,
    *SHORT,
    *(Condition(TASKS[1], width, SLOW) for width in (WIDTHS[0], WIDTHS[-1])),
]


def places(seeds: Sequence[int] = SEEDS) -> list[Place]:
    """All runs: what the page's findings rest on first, then the rest."""
    wanted = [c.place(m, s) for pair in zip(SMALL, LARGE, strict=True) for s in seeds for c in pair for m in MAIN]
    wanted += [SMALL[1].place(m, s) for s in MORE for m in ("standard", "reweighting", "vgs-frozen")]
    wanted += [SMALL[1].place(m, s) for s in seeds for m in (*METHODS, *ABLATIONS)]
    wanted += [c.place(m, s) for s in seeds for c in SIGHTED for m in (*MAIN, "tokens")]
    wanted += [c.place(m, s) for s in MORE for c in SIGHTED for m in MAIN]
    wanted += [c.place(m, s) for s in seeds for c in SHORT for m in (*MAIN, "vgs,reduction=sequence")]
    wanted += [LARGE[1].place(m, s) for s in seeds for m in METHODS]
    wanted += [c.place(m, s) for c in reversed(CONDITIONS) for s in seeds for m in MAIN]
    return list(dict.fromkeys(wanted))


def study(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of seed 0, with which the task was tried out."""
    return [row for row in rows if row["seed"] != "0"]


def results(rows: Sequence[Row]) -> str:
    """A row for each task, rate, width and method of which there are runs."""
    head = [
        "task",
        "lr",
        "width",
        "steps of the eye",
        "steps",
        "method",
        "seeds",
        *OUTCOMES.values(),
        "language left, nats, first → last",
    ]
    head += ["dose at the start", "first-order gain, first step", "over training"]
    lines = []
    for condition, method in itertools.product(CONDITIONS, (*METHODS, *ABLATIONS, "vgs,reduction=sequence")):

        def mean(column: str, of: Condition = condition, method: str = method) -> Interval:
            return interval([*of.values(rows, method, column).values()])

        seeds = len(condition.values(rows, method, "named"))
        if seeds:
            task, width, rate, *steps = condition
            line = [f"`{task}`", f"{rate:g}", str(width), *map(str, steps), f"`{method}`", str(seeds)]
            for column in OUTCOMES:
                to_standard = points(condition.gain(rows, method, column))
                line.append(cell(mean(column), scale=100) if method == "standard" else to_standard)
            line.append(f"{cell(mean('lang first'), digits=2)} → {cell(mean('lang'), digits=2)}")
            line.append(f"{cell(mean('dose first'), digits=0)}°")
            lines.append([*line, *(cell(mean(column), digits=3) for column in ("gain first", "gain"))])
    return as_table(head, lines)


def planned(rows: Sequence[Row], conditions: Sequence[Condition]) -> str:
    """The comparisons that were planned, on things named: early, half-way, and at the end."""
    head = [
        "task",
        "lr",
        "width",
        "steps of the eye",
        "steps",
        "comparison",
        "seeds",
        *(f"after {fifths}/5 of the steps" for fifths in EARLY),
        "at the end",
    ]
    lines = []
    for of, (method, other) in itertools.product(conditions, COMPARISONS):
        ends = [of.values(rows, m, "named") for m in (method, other)]
        if not (difference := paired(*ends)):
            continue
        curves = [of.series(rows, m, "named") for m in (method, other)]
        early = [
            paired(*({seed: run[step] for seed, run in curve.items()} for curve in curves))
            for step in (of.steps * fifths // 5 for fifths in EARLY)
        ]
        cells = map(points, [*early, difference])
        where = [f"`{of.task}`", f"{of.rate:g}", str(of.width), str(of.eye_steps), str(of.steps)]
        lines.append([*where, f"`{method}` to `{other}`", str(difference.n), *cells])
    return as_table(head, lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Things named over standard distillation, by width and learning rate; language left over training."""
    drawing = Figure(figsize=(14, 4.2), dpi=100, layout="constrained")
    gains, lefts = (part.subplots(1, 2) for part in drawing.subfigures(1, 2, width_ratios=(1.1, 1)))
    for rate, axes in zip(RATES, gains, strict=True):
        axes.axhline(0, color=COLOURS[0], linewidth=1.4, label=METHODS[0])
        for i, method in enumerate(MAIN[1:], start=1):
            found = [(x, Condition(TASKS[0], w, rate).gain(rows, method, "named")) for x, w in enumerate(WIDTHS)]
            there = [(x + 0.15 * (i - 2), d) for x, d in found if d is not None and d.n > 1]
            x, means, halves = zip(*((x, 100 * d.mean, 100 * d.half) for x, d in there), strict=True)
            axes.errorbar(x, means, yerr=halves, fmt="o", markersize=5, color=COLOURS[i], label=method)
        axes.set_xticks(range(len(WIDTHS)), [str(width) for width in WIDTHS])
        axes.set(xlim=(-0.5, len(WIDTHS) - 0.5), xlabel="width of the student", title=f"Things named, lr {rate:g}")
    gains[0].set_ylabel("points to standard distillation")
    gains[1].sharey(gains[0])
    for width, axes in zip((WIDTHS[0], WIDTHS[-1]), lefts, strict=True):
        for i, method in enumerate(MAIN):
            runs = [*Condition(width=width).series(rows, method, "lang").values()]
            steps = [*runs[0]] if runs else []
            band(axes, steps, [interval([run[step] for run in runs]) for step in steps], i, method)
        axes.set(
            xlabel="step", ylabel="nats per word", ylim=(0, None), title=f"Language left, width {width}, lr {RATE:g}"
        )
    drawing.legend(*gains[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawing
