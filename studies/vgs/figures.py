"""The figures of the page: means over seeds, with intervals of 95 % where there is more than one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steer_optim.plots import COLOURS
from studies.vgs.intervals import Interval, interval
from studies.vgs.methods import parse
from studies.vgs.table import SHOWN, Setting

STYLES = ("-", "--", ":")


def compared(settings: Sequence[Setting], *, least: int | None = None) -> list[str]:
    """The methods beside standard distillation that ``least`` of the settings have; by default all but one."""
    counts = Counter(method for setting in settings for method in setting.runs if method != "standard")
    wanted = max(2, len(settings) - 1) if least is None else least
    return [method for method in counts if counts[method] >= wanted]


def summary(settings: Sequence[Setting]) -> Figure:
    """Differences to standard distillation, at the end and over training, of the methods that most tasks have."""
    settings, methods = [setting for setting in settings if "standard" in setting.runs], compared(settings)
    figure, panels = _figure(len(settings), rows=-(-len(settings) // 3), height=1.1 + 0.3 * len(methods))
    for axes in panels[1:]:
        axes.sharex(panels[0])
    for axes, setting in zip(panels, settings, strict=False):
        for i, (column, label) in enumerate((("answer", "at the end"), ("answer mean", "over training"))):
            found = [setting.difference(method, column) for method in methods]
            rows = [(y - 0.12 + 0.24 * i, d) for y, d in enumerate(found) if d is not None]
            axes.errorbar(
                [100 * d.mean for _, d in rows],
                [y for y, _ in rows],
                xerr=[0.0 if math.isnan(d.half) else 100 * d.half for _, d in rows],
                fmt="o",
                markersize=4,
                color=COLOURS[i],
                label=label,
            )
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set(title=setting.task, xlabel="points to standard", ylim=(len(methods) - 0.5, -0.5))
        axes.set_yticks(range(len(methods)), methods if axes in panels[::3] else [])
    for axes in panels[len(settings) :]:
        axes.remove()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def learning(curves: Mapping[str, Mapping[str, Sequence[float]]], task: str, setting: str) -> Figure:
    """Accuracy, perception and the text-only cross-entropy at the checkpoints."""
    columns = {"answer": "right answers, %", "perception": "all operands seen, %", "text_loss": "text-only loss, nats"}
    figure, panels = _figure(3, height=4.6)
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        scale = 1.0 if column == "text_loss" else 100.0
        for i, method in enumerate(SHOWN):
            runs = [run for key, run in curves.items() if key.rpartition("/")[0] == f"{task}/{setting}/{method}"]
            if runs:
                values = [interval([run[column][j] for run in runs]) for j in range(len(runs[0]["step"]))]
                band(axes, runs[0]["step"], values, i, method, scale=scale)
        axes.set(xlabel="step", ylabel=label, ylim=(0, None if column == "text_loss" else 100))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


Lines = dict[str, list[str]]


def varied(setting: Setting) -> dict[str, Lines]:
    """The methods that differ in gamma alone, or in lambda, for every VGS of which three values or more were run."""
    lines: dict[str, Lines] = {"gamma": {}, "lam": {}}
    for method in setting.runs:
        base, *changes = method.split(",")
        if base != "vgs":
            continue
        for key in lines:
            rest = ",".join([base, *(c for c in changes if not c.startswith(f"{key}="))])
            lines[key].setdefault(rest, []).append(method)
    kept = {key: {rest: methods for rest, methods in of.items() if len(methods) > 2} for key, of in lines.items()}
    return {key: of for key, of in kept.items() if of}


def sensitivity(setting: Setting, kept: Mapping[str, Lines]) -> Figure:
    """Accuracy over what was varied (Fig. 8), on the seeds that all points have."""
    figure, panels = _figure(len(kept))
    everyone = [method for of in kept.values() for methods in of.values() for method in methods]
    seeds = setting.common([*everyone, *(["standard"] if "standard" in setting.runs else [])])

    def right(method: str) -> Interval:
        found = setting.interval(method, "answer", seeds=seeds)
        assert found is not None
        return found

    for axes, (key, of) in zip(panels, kept.items(), strict=True):
        for i, (rest, methods) in enumerate(of.items()):
            line = sorted((float(getattr(parse(method).losses, key)), method) for method in methods)
            band(axes, [x for x, _ in line], [right(m) for _, m in line], i, rest, scale=100.0, marker="o")
        axes.set(xlabel={"gamma": "γ", "lam": "λ"}[key], ylabel="right answers, %", ylim=(0, 100))
        if key == "lam":
            axes.set_xscale("symlog", linthresh=0.01)
        if "standard" in setting.runs:
            axes.axhline(100 * right("standard").mean, color="0.4", linestyle="--", linewidth=1, label="standard")
        axes.legend(frameon=False)
    return figure


def _figure(count: int, *, rows: int = 1, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    columns = -(-count // rows)
    figure = Figure(figsize=(4.2 * columns, height * rows), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.flat)


def band(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[Interval],
    i: int,
    label: str,
    *,
    scale: float = 1.0,
    marker: str | None = None,
) -> None:
    colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
    axes.plot(x, [scale * v.mean for v in values], style, color=colour, label=label, linewidth=1.4, marker=marker)
    if values and not any(math.isnan(v.half) for v in values):
        low, high = ([scale * (v.mean + sign * v.half) for v in values] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
