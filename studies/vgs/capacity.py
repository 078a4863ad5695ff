"""Capacity and language: students from far too small for the language of their task to ample, by method.

    python -m studies.vgs capacity

does the runs that are missing, in the order of :func:`places`, so that it can be stopped and gone on with at any time.
The page says beforehand which outcome would mean what.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

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
ABLATIONS = ("vgs,floor=1e-3,lam=0", "vgs,lam=0.3,quantile=0")  # afterwards, where it collapsed
SEEDS = (1, 2, 3, 4, 5)  # seed 0 was for trying the task out
MORE = (6, 7, 8, 9, 10)  # where five had an interval that ended within two points of zero
RATES = RATE, SLOW = 1e-3, 3e-4  # of learning: the task's own, and one at which less can go wrong
COMPARISONS = (*((method, "standard") for method in MAIN[1:]), ("vgs", "reweighting"))  # planned
STEPS = (80, 160)  # of 400: a short budget
OUTCOMES = {"named": "things named right, %", "perception": "all seen, %", "answer": "right, %"}


def places(seeds: Sequence[int] = SEEDS) -> list[Place]:
    """All runs: what the page's findings rest on first, then the rest."""
    task, small, *_, large = TASKS[0], *WIDTHS
    wanted = [_place(task, w, m, s, r) for r in RATES for s in seeds for w in (small, large) for m in MAIN]
    wanted += [_place(task, small, m, s, SLOW) for s in MORE for m in ("standard", "reweighting", "vgs-frozen")]
    wanted += [_place(task, small, m, s, SLOW) for s in seeds for m in (*ABLATIONS, "vgs,detach_prior=False")]
    wanted += [_place(task, WIDTHS[1], m, s, SLOW) for s in seeds for m in MAIN]
    wanted += [_place(task, w, m, s) for s in seeds for w in WIDTHS for m in MAIN]
    wanted += [_place(task, w, m, s) for s in seeds for task in TASKS for w in WIDTHS for m in METHODS]
    return list(dict.fromkeys(wanted))


def _place(task: str, width: int, method: str, seed: int, rate: float = RATE) -> Place:
    return Place(task, (("student_size", width), ("lr", rate)), method, seed)


def _runs(rows: Sequence[Row], task: str, width: int, method: str, rate: float) -> list[Row]:
    key = _place(task, width, method, 0, rate).key[:-1]
    return [row for row in rows if (row["task"], row["setting"], row["method"]) == key]


def values(
    rows: Sequence[Row], task: str, width: int, method: str, column: str, rate: float = RATE
) -> dict[int, float]:
    """A number by seed."""
    mine = _runs(rows, task, width, method, rate)
    return {int(row["seed"]): float(row[column]) for row in mine if row[column]}


def gain(rows: Sequence[Row], task: str, width: int, method: str, column: str, rate: float = RATE) -> Interval | None:
    """Over standard distillation, paired by seed."""
    own, standard = (values(rows, task, width, m, column, rate) for m in (method, "standard"))
    return paired(own, standard)


def study(rows: Sequence[Row]) -> list[Row]:
    """The rows without those of seed 0, with which the task was tried out."""
    return [row for row in rows if row["seed"] != "0"]


def results(rows: Sequence[Row]) -> str:
    """A row for each task, rate, width and method of which there are runs."""
    head = ["task", "lr", "width", "method", "seeds", *OUTCOMES.values(), "language left, nats, first → last"]
    head += ["dose at the start", "first-order gain, first step", "over training"]
    lines = []
    for task, rate, width, method in itertools.product(TASKS, RATES, WIDTHS, (*METHODS, *ABLATIONS)):

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


def planned(rows: Sequence[Row], rate: float = RATE) -> str:
    """The eight comparisons that were planned, on things named: early, half-way, and at the end."""
    head = ["width", "comparison", "seeds", *(f"after {step} steps" for step in STEPS), "at the end"]
    lines = []
    for width, (method, other) in itertools.product((WIDTHS[0], WIDTHS[-1]), COMPARISONS):
        ends = [values(rows, TASKS[0], width, m, "named", rate) for m in (method, other)]
        if not (difference := paired(*ends)):
            continue
        curves = [series(rows, TASKS[0], width, m, "named", rate) for m in (method, other)]
        early = [paired(*({seed: of[step] for seed, of in curve.items()} for curve in curves)) for step in STEPS]
        cells = map(points, [*early, difference])
        lines.append([str(width), f"`{method}` to `{other}`", str(difference.n), *cells])
    return as_table(head, lines)


def series(
    rows: Sequence[Row], task: str, width: int, method: str, column: str, rate: float = RATE
) -> dict[int, dict[int, float]]:
    """A number at the checkpoints, by seed and step."""
    mine = _runs(rows, task, width, method, rate)
    return {
        int(row["seed"]): dict(
            zip(map(int, row["step at"].split()), map(float, row[f"{column} at"].split()), strict=True)
        )
        for row in mine
    }


def figure(rows: Sequence[Row]) -> Figure:
    """Things named over standard distillation, by width and learning rate; language left over training."""
    drawing = Figure(figsize=(14, 4.2), dpi=100, layout="constrained")
    gains, lefts = (part.subplots(1, 2) for part in drawing.subfigures(1, 2, width_ratios=(1.1, 1)))
    for rate, axes in zip(RATES, gains, strict=True):
        axes.axhline(0, color=COLOURS[0], linewidth=1.4, label=METHODS[0])
        for i, method in enumerate(MAIN[1:], start=1):
            found = [(x, gain(rows, TASKS[0], width, method, "named", rate)) for x, width in enumerate(WIDTHS)]
            there = [(x + 0.15 * (i - 2), d) for x, d in found if d is not None and d.n > 1]
            x, means, halves = zip(*((x, 100 * d.mean, 100 * d.half) for x, d in there), strict=True)
            axes.errorbar(x, means, yerr=halves, fmt="o", markersize=5, color=COLOURS[i], label=method)
        axes.set_xticks(range(len(WIDTHS)), [str(width) for width in WIDTHS])
        axes.set(xlim=(-0.5, len(WIDTHS) - 0.5), xlabel="width of the student", title=f"Things named, lr {rate:g}")
    gains[0].set_ylabel("points to standard distillation")
    gains[1].sharey(gains[0])
    for width, axes in zip((WIDTHS[0], WIDTHS[-1]), lefts, strict=True):
        for i, method in enumerate(MAIN):
            runs = [*series(rows, TASKS[0], width, method, "lang").values()]
            steps = [*runs[0]] if runs else []
            band(axes, steps, [interval([run[step] for run in runs]) for step in steps], i, method)
        axes.set(
            xlabel="step", ylabel="nats per word", ylim=(0, None), title=f"Language left, width {width}, lr {RATE:g}"
        )
    drawing.legend(*gains[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return drawing
