"""Capacity and language: students from far too small for the language of their task to ample, by method.

    python -m studies.vgs capacity

does the runs that are missing, in the order of :func:`places`, so that it can be stopped and gone on with at any time.
The page says beforehand which outcome would mean what.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.common import table as as_table
from steer_optim.plots import COLOURS
from studies.vgs.grid import Place
from studies.vgs.intervals import Interval, cell, interval, paired, points
from studies.vgs.table import Row

TASKS = ("shapes-topics", "shapes-topics-voices")  # both speak alike; each has a language of its own
WIDTHS = (16, 32, 64, 96)
MAIN = ("standard", "vgs", "reweighting", "vgs-frozen")
METHODS = (*MAIN, "tokens", "vgs,detach_prior=False", "reweighting-frozen")
SEEDS = (1, 2, 3, 4, 5)  # seed 0 was the pilot's
RATE, SLOW = 1e-3, 3e-4  # of learning: the task's own, and one at which less can go wrong
OUTCOMES = {"named": "things named right, %", "perception": "all seen, %", "answer": "right, %"}


def places(seeds: Sequence[int] = SEEDS) -> list[Place]:
    """All runs: first the main comparison at the extreme widths, then the same slower, then all, seed by seed."""
    ends = (WIDTHS[0], WIDTHS[-1])
    wanted = [_place(TASKS[0], w, m, s, r) for r in (RATE, SLOW) for s in seeds for w in ends for m in MAIN]
    wanted += [_place(task, w, m, s) for s in seeds for task in TASKS for w in WIDTHS for m in METHODS]
    return list(dict.fromkeys(wanted))


def _place(task: str, width: int, method: str, seed: int, rate: float = RATE) -> Place:
    return Place(task, (("student_size", width), ("lr", rate)), method, seed)


def values(
    rows: Sequence[Row], task: str, width: int, method: str, column: str, rate: float = RATE
) -> dict[int, float]:
    """A number by seed."""
    key = _place(task, width, method, 0, rate).key[:-1]
    mine = (row for row in rows if (row["task"], row["setting"], row["method"]) == key)
    return {int(row["seed"]): float(row[column]) for row in mine if row[column]}


def gain(rows: Sequence[Row], task: str, width: int, method: str, column: str, rate: float = RATE) -> Interval | None:
    """Over standard distillation, paired by seed."""
    own, standard = (values(rows, task, width, m, column, rate) for m in (method, "standard"))
    return paired(own, standard)


def trial(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of the seed with which the task was tried out, and those of the study."""
    return [row for row in rows if row["seed"] == "0"], [row for row in rows if row["seed"] != "0"]


def results(rows: Sequence[Row]) -> str:
    """A row for each task, rate, width and method of which there are runs."""
    head = ["task", "lr", "width", "method", "seeds", *OUTCOMES.values(), "language left, nats, first → last"]
    head += ["dose at the start", "first-order gain, first step", "over training"]
    lines = []
    for task, rate, width, method in itertools.product(TASKS, (RATE, SLOW), WIDTHS, METHODS):

        def mean(column: str, of: tuple[str, int, str, float] = (task, width, method, rate)) -> Interval:
            return interval([*values(rows, *of[:3], column, of[3]).values()])

        seeds = len(values(rows, task, width, method, "named", rate))
        if seeds:
            line = [f"`{task}`", f"{rate:g}", str(width), f"`{method}`", str(seeds)]
            for column in OUTCOMES:
                to_standard = points(gain(rows, task, width, method, column, rate))
                line.append(cell(mean(column), scale=100) if method == "standard" else to_standard)
            line.append(f"{cell(mean('lang first'), digits=2)} → {cell(mean('lang'), digits=2)}")
            line.append(f"{cell(mean('dose first'), digits=0)}°")
            lines.append([*line, *(cell(mean(column), digits=3) for column in ("gain first", "gain"))])
    return as_table(head, lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Gain over standard distillation by width and method, with intervals where there are two seeds or more."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    drawing = Figure(figsize=(6.4 * len(tasks), 4.2), dpi=100, layout="constrained")
    for axes, task in zip(drawing.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for i, method in enumerate(METHODS[1:]):
            found = [(x, gain(rows, task, width, method, "named")) for x, width in enumerate(WIDTHS)]
            if not any(d for _, d in found):
                continue
            there = [(x + 0.1 * (i - 2.5), d) for x, d in found if d is not None]
            axes.errorbar(
                [x for x, _ in there],
                [100 * d.mean for _, d in there],
                yerr=[0.0 if math.isnan(d.half) else 100 * d.half for _, d in there],
                fmt="o",
                markersize=5,
                color=COLOURS[i],
                label=method,
            )
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set_xticks(range(len(WIDTHS)), [str(width) for width in WIDTHS])
        axes.set(
            title=task,
            xlim=(-0.5, len(WIDTHS) - 0.5),
            xlabel="width of the student",
            ylabel="things named right, points to standard",
        )
    handles = drawing.axes[0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    return drawing
