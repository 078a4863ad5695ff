"""What the first step tells of the end: gains over the dose and over the language left, all tasks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.common import table as as_table
from steer_optim.plots import COLOURS
from studies.vgs.intervals import Interval, cell, points
from studies.vgs.table import Setting

# The names of a method, one in every task.
METHODS = {
    "vgs": ("vgs",),
    "reweighting": ("reweighting",),
    "vgs-frozen": ("vgs-frozen", "vgs,floor=1e-3,lam=0,prior=frozen"),
}
AXES = {
    "dose first": "dose at the start, degrees",
    "lang first": "language left at the start, nats per word",
}


class Gains(NamedTuple):
    """One setting: where it starts, and what the methods gain there, in answers that name all that is seen."""

    setting: Setting
    start: dict[str, Interval]
    gains: dict[str, Interval]


def gains(settings: Sequence[Setting]) -> list[Gains]:
    """The settings of which both axes are known and standard distillation was run, by dose."""
    found = []
    for setting in settings:
        start = {column: mean for column in AXES if (mean := _start(setting, column)) is not None}
        of = {
            method: gain
            for method, names in METHODS.items()
            for name in names
            if (gain := setting.difference(name, "perception")) is not None and gain.n > 1
        }
        if of and len(start) == len(AXES):
            found.append(Gains(setting, start, of))
    return sorted(found, key=lambda one: one.start["dose first"].mean)


def _start(setting: Setting, column: str) -> Interval | None:
    """Of standard distillation, or, as older runs lack some columns, of any method but those that sample otherwise."""
    if (mean := setting.interval("standard", column)) is not None:
        return mean
    return setting.interval("reweighting", column)


def results(settings: Sequence[Setting]) -> str:
    """A row for each setting."""
    head = ["task", "setting", *AXES.values(), *(f"`{method}`, all seen, points" for method in METHODS)]
    lines = []
    for one in gains(settings):
        start = [cell(one.start["dose first"], digits=0), cell(one.start["lang first"], digits=2)]
        of = (points(one.gains.get(method)) for method in METHODS)
        lines.append([f"`{one.setting.task}`", one.setting.title, *start, *of])
    return as_table(head, lines)


def figure(settings: Sequence[Setting]) -> Figure:
    """Gains over both axes."""
    drawing, found = Figure(figsize=(11, 4.2), dpi=100, layout="constrained"), gains(settings)
    panels = drawing.subplots(1, 2, sharey=True)
    for axes, (column, label) in zip(panels, AXES.items(), strict=True):
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        for i, method in enumerate(METHODS, start=1):
            there = [(one.start[column].mean, gain) for one in found if (gain := one.gains.get(method)) is not None]
            axes.errorbar(
                [x for x, _ in there],
                [100 * gain.mean for _, gain in there],
                yerr=[100 * gain.half for _, gain in there],
                fmt="o",
                markersize=5,
                elinewidth=0.8,
                color=COLOURS[i],
                label=method,
            )
        axes.set(xlabel=label)
    panels[0].set_ylabel("all seen, points to standard")
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return drawing
