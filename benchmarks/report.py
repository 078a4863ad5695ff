"""Draws the figures of docs/performance.md and writes its tables and those of docs/scale.md, from the newest results.

    python -m benchmarks.report

What lies between ``<!-- generated: name -->`` and ``<!-- end -->`` is replaced; the rest of the page is prose.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from matplotlib.figure import Figure

from benchmarks import (
    budgets,
    common,
    gpu,
    losses_cost,
    memory_model,
    scale,
    steering_cost,
    steering_growth,
    steering_memory,
)
from benchmarks.variants import AUTOGRAM, BARE, EVERY, FLATTENED, STEER, TORCHJD
from steer_optim.plots import COLOURS
from studies.vgs import table as study
from studies.vgs.report import command, refreshed
from studies.vgs.tasks import TASKS

PAGE = common.ROOT / "docs" / "performance.md"
PAGES = (PAGE, common.ROOT / "docs" / "scale.md")
IMAGES = common.ROOT / "docs" / "images"
OURS = tuple(f"{STEER}, refresh_every={n}" for n in steering_cost.REFRESH)
ALT = {
    "figure of steering_cost": "Step times over that of a plain step for two components of one graph: the bare "
    "backward passes, this package, TorchJD's routes and Pytorch-PCGrad, on three models",
    "figure of steering_growth": "Step time over the number of components, and what steering adds to the backward "
    "passes over the number of parameters and the rows of a batch",
    "figure of losses_cost": "Peak memory of the losses over the number of tokens, eager and chunked",
}
OF_OTHERS = ("replica_memory", "step_memory", "host_reads", "vgs_step", "rollout_speed", "topk_bias")
ON_GPU = ("real_size_full", "real_size_lora", "steering_cost_cuda")


def fill(page: str) -> str:
    """The page with its tables as the newest results have them."""

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}\n{tables(match[2])}\n{match[3]}"

    return re.sub(r"(<!-- generated: ([\w ]+) -->)\n.*?(<!-- end -->)", section, page, flags=re.DOTALL)


def tables(name: str) -> str:
    """What the results say under one heading of the page."""
    if name == "budgets":
        return budgets.markdown()
    if name == "machine":
        return _machine()
    if name == "refresh":
        return _refresh()
    if name == "gpu":
        return gpu.markdown()
    if name in ALT:
        benchmark = name.removeprefix("figure of ")
        return f"![{ALT[name]}](images/{_image(benchmark)})" if common.newest(benchmark) else "No figure yet."
    benchmark, _, part = name.partition(" ")
    result = common.newest(benchmark)
    if result is None:
        return f"Not measured yet: `python -m benchmarks.{benchmark}`."
    if benchmark == "steering_cost":
        return _cost(result, part)
    if benchmark == "steering_growth":
        return steering_growth.markdown(result)
    if benchmark == "steering_memory":
        return steering_memory.markdown(result, part)
    if benchmark == "losses_cost":
        return losses_cost.markdown(result)
    if benchmark in ("step_memory", "scale"):
        return {"step_memory": memory_model, "scale": scale}[benchmark].markdown(result, part)
    # Imported only where there is a result: what trains models needs more than the others.
    return importlib.import_module(f"benchmarks.{benchmark}").markdown(result)


def _cost(result: dict[str, Any], part: str) -> str:
    graphs, key = ("one", "ratio to bare backward passes") if part == "bare" else (part, "ratio to plain")
    names = (*(name for name in EVERY if name not in (*TORCHJD, AUTOGRAM, FLATTENED)), *OURS, *TORCHJD, AUTOGRAM)
    columns = steering_cost.settings(result, graphs)
    return steering_cost.table(result, (*names, FLATTENED), columns, key=key, graphs=graphs) if columns else "–"


def _refresh() -> str:
    """How far known weights lead away from exact ones, from the runs of the study on VGS."""
    parts = [
        f"`{setting.task}`, {study.changes(setting).get('steps', TASKS[setting.task].settings.steps)} steps:\n\n"
        f"{cosines}\n\n```sh\n{command(setting)}\n```"
        for setting in study.settings(study.read())
        if any("refresh_every=" in method for method in setting.runs) and (cosines := refreshed(setting))
    ]
    return "\n\n".join(parts) or "Not measured yet: `python -m studies.vgs`."


def _machine() -> str:
    """What the results were measured on."""
    rows = []
    for name in ("steering_cost", "steering_growth", "steering_memory", "losses_cost", *OF_OTHERS, *ON_GPU):
        if result := common.newest(name):
            facts = result["machine"]
            hardware = facts.get("accelerator", facts["processor"])
            rows.append([f"`{name}`", hardware, str(facts["threads"]), facts["torch"], facts["python"]])
    return common.table(["benchmark", "hardware", "threads", "torch", "python"], rows)


def draw_time(result: dict[str, Any]) -> Figure:
    """Step times over a plain step's, of two components of one graph."""
    settings = steering_cost.settings(result, "one")
    columns = [(model, k) for model, k in settings if k == 2 and model in steering_cost.SWEPT]
    names = (BARE, STEER, *OURS, *TORCHJD, AUTOGRAM, FLATTENED)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, (model, k) in zip(axes, columns, strict=True):
        values = [steering_cost.value(result, model, k, name, "ratio to plain") for name in names]
        colours = [
            COLOURS[6] if name == BARE else COLOURS[0] if name.startswith("steer_optim") else COLOURS[1]
            for name in names
        ]
        bars = ax.barh(range(len(names)), [value or 0 for value in values], color=colours)
        ax.bar_label(bars, [f"{value:.2f}" if value else "–" for value in values], padding=2)
        ax.axvline(1, color="grey", linewidth=0.8)
        ax.set(title=model, xlim=(0, 1.2 * max(value or 0 for value in values)))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.supxlabel("step time ÷ plain step, two components of one graph")
    return figure


def draw_growth(result: dict[str, Any]) -> Figure:
    """Steering over its bare backward passes; over components both over a plain step."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    points = {sweep: [row for row in result["rows"] if row["sweep"] == sweep] for sweep in steering_growth.SWEEPS}
    first, *rest = zip(axes, points.items(), strict=True)
    ax, (_, rows) = first
    ks = [row["components"] for row in rows]
    ax.plot(ks, [row["bare to plain"] for row in rows], "o-", color=COLOURS[6], label="k backward passes")
    ax.plot(ks, [row["steer to plain"] for row in rows], "s--", color=COLOURS[0], label="Steer")
    ax.set(xlabel="components", ylabel="step time ÷ plain step", ylim=0)
    ax.legend(frameon=False)
    for (ax, (_, rows)), (key, label) in zip(
        rest, (("parameters", "parameters"), ("rows", "rows of a batch")), strict=True
    ):
        xs, medians = [row[key] for row in rows], [row["steer to bare"] for row in rows]
        low, high = ([row["quartiles to bare"][side] for row in rows] for side in (0, 1))
        ax.plot(xs, medians, "s--", color=COLOURS[0])
        ax.fill_between(xs, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        ax.axhline(1, color="grey", linewidth=0.8)
        ax.set(xscale="log", xlabel=label, ylabel="Steer ÷ its 2 backward passes")
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def draw_losses(result: dict[str, Any]) -> Figure:
    """Peak memory of the losses over the number of tokens."""
    vocabularies = list(dict.fromkeys(row["vocabulary"] for row in result["rows"]))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(vocabularies), sharey=True, squeeze=False)[0]
    for ax, V in zip(axes, vocabularies, strict=True):
        for i, way in enumerate(losses_cost.WAYS):
            for head, style in (("trained", "o-"), ("frozen", "s--")):
                rows = [row for row in result["rows"] if row["vocabulary"] == V and row["head"] == head and way in row]
                xs, ys = [row["tokens"] for row in rows], [row[way]["peak"] / common.MIB for row in rows]
                ax.plot(xs, ys, style, color=COLOURS[1 - i], label=f"{way}, {head} head")
        ax.set(xscale="log", yscale="log", xlabel="tokens", title=f"V = {V:,}")
        ticks = list(dict.fromkeys(row["tokens"] for row in result["rows"]))
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="peak over the inputs, MiB")
    axes[0].legend(frameon=False, fontsize="small")
    return figure


def _image(benchmark: str) -> str:
    return f"performance-{benchmark.replace('_', '-')}.png"


FIGURES = {"steering_cost": draw_time, "steering_growth": draw_growth, "losses_cost": draw_losses}


def main() -> None:
    for name, draw in FIGURES.items():
        if result := common.newest(name):
            path = IMAGES / _image(name)
            draw(result).savefig(path, dpi=120)
            print(f"written to {path}")
    for page in PAGES:
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"written to {page}")


if __name__ == "__main__":
    main()
