"""Capacity and language: students from far too small for the language of their task to ample, by method.

    python -m studies.vgs capacity

does the runs that are missing, in the order of :func:`places`, so that it can be stopped and gone on with at any time.
The page says beforehand which outcome would mean what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.common import table as as_table
from steer_optim.plots import COLOURS
from studies.vgs.grid import Place
from studies.vgs.intervals import Interval, cell, paired, points
from studies.vgs.table import Row

TASKS = ("shapes-topics", "shapes-topics-voices")  # both speak alike; each has a language of its own
WIDTHS = (16, 32, 64, 96)
MAIN = ("standard", "vgs", "reweighting", "vgs-frozen")
METHODS = (*MAIN, "tokens", "vgs,detach_prior=False", "reweighting-frozen")
SEEDS = (1, 2, 3, 4, 5)  # seed 0 was the pilot's
OUTCOMES = {"named": "things named right, %", "perception": "all seen, %", "answer": "right, %"}


def places(seeds: Sequence[int] = SEEDS) -> list[Place]:
    """All runs: first the main comparison at the extreme widths, then everything, each seed before the next."""
    first = [_place(TASKS[0], width, method, s) for s in seeds for width in (WIDTHS[0], WIDTHS[-1]) for method in MAIN]
    rest = [_place(t, width, m, s) for s in seeds for t in TASKS for width in WIDTHS for m in METHODS]
    return list(dict.fromkeys([*first, *rest]))


def _place(task: str, width: int, method: str, seed: int) -> Place:
    return Place(task, (("student_size", width),), method, seed)


def values(rows: Sequence[Row], task: str, width: int, method: str, column: str) -> dict[int, float]:
    """A number by seed."""
    key = (task, _place(task, width, method, 0).setting, method)
    mine = (row for row in rows if (row["task"], row["setting"], row["method"]) == key)
    return {int(row["seed"]): float(row[column]) for row in mine if row[column]}


def gain(rows: Sequence[Row], task: str, width: int, method: str, column: str) -> Interval | None:
    """Over standard distillation, paired by seed."""
    return paired(values(rows, task, width, method, column), values(rows, task, width, "standard", column))


def results(rows: Sequence[Row]) -> str:
    """A row for each task, width and method of which there are runs."""
    head = ["task", "width", "method", "seeds", *OUTCOMES.values(), "language left, nats, first → last"]
    head += ["dose at the start", "first-order gain, first step", "over training"]
    lines = []
    for task in TASKS:
        for width in WIDTHS:
            for method in METHODS:
                seeds = len(values(rows, task, width, method, "named"))
                if not seeds:
                    continue

                def shown(column: str, digits: int, key: tuple[str, int, str] = (task, width, method)) -> str:
                    found = values(rows, *key, column)
                    return cell(paired(found, dict.fromkeys(found, 0.0)), digits=digits)

                line = [f"`{task}`", str(width), f"`{method}`", str(seeds)]
                for column in OUTCOMES:
                    if method == "standard":
                        found = values(rows, task, width, method, column)
                        line.append(cell(paired(found, dict.fromkeys(found, 0.0)), scale=100))
                    else:
                        line.append(points(gain(rows, task, width, method, column)))
                line.append(f"{shown('lang first', 2)} → {shown('lang', 2)}")
                line += [f"{shown('dose first', 0)}°", shown("gain first", 3), shown("gain", 3)]
                lines.append(line)
    return as_table(head, lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Gain over standard distillation by width and method, with intervals where there are two seeds or more."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    drawing = Figure(figsize=(6.4 * len(tasks), 4.2), dpi=100, layout="constrained")
    for axes, task in zip(drawing.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for i, method in enumerate(METHODS[1:]):
            found = [(x, gain(rows, task, width, method, "named")) for x, width in enumerate(WIDTHS)]
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
        axes.set(title=task, xlabel="width of the student", ylabel="things named right, points to standard")
    handles = drawing.axes[0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    return drawing
