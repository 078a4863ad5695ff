"""The table and the figures, from what the runs have left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from steer_optim import plots
from steer_optim.monitor import from_log

COLUMNS = {
    "answer": "answer, %",
    "perception": "perception, %",
    "text_loss": "text-only loss",
    "angle": "angle(std, vis)",
    "eta": "eta",
    "seconds": "s/step",
}
NOTE = """
Accuracies are on {held_out} problems of held-out digits, greedy decoding; their standard error is {error:.1f} points at
most. The text-only loss is the cross-entropy of right answers without the image, in nats per token. Angle, eta and
seconds per step are means over training.
"""


def history(run: Path) -> dict[str, list[float]]:
    """The numbers of each line of a run's log, by name."""
    return from_log(json.loads((run / "trainer_state.json").read_text())["log_history"])


def row(scores: dict[str, float], run: dict[str, list[float]] | None = None) -> dict[str, float | None]:
    """The numbers of a model; ``None`` where it has none."""
    sources = {"angle": "steer/angle/std~vis", "eta": "steer/weight/std", "seconds": "step_time"}
    known = {name: [x for x in (run or {}).get(source, []) if not math.isnan(x)] for name, source in sources.items()}
    return {**scores, **{name: fmean(values) if values else None for name, values in known.items()}}


def write_table(out: Path, rows: dict[str, dict[str, float | None]], settings: dict[str, Any]) -> None:
    """Print the table, and write it to ``table.md`` and, unrounded and with the settings, to ``results.json``."""
    (out / "results.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    cells = [["", *COLUMNS.values()], *([name, *(_cell(c, row[c]) for c in COLUMNS)] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    note = NOTE.format(held_out=settings["held_out"], error=50 / math.sqrt(settings["held_out"]))
    text = "\n".join(lines) + "\n" + note
    (out / "table.md").write_text(text)
    print(f"\n{text}\nwritten to {out}")


def write_figures(out: Path, runs: dict[str, dict[str, list[float]]], deciles: dict[str, list[float]]) -> None:
    """The paper's kinds of figures: angles by decile (Fig. 3), losses, and norms and cosines over training (Fig. 7)."""
    plots.angles_by_decile(deciles).savefig(out / "angles_by_decile.png")
    figure = Figure(figsize=(8, 3.6), dpi=160, layout="constrained")
    for component, axes in zip(("std", "vis"), figure.subplots(1, 2), strict=True):
        those = {name: run for name, run in runs.items() if f"steer/loss/{component}" in run}
        plots.losses(those, component=component, axes=axes)
    figure.savefig(out / "losses.png")
    for name, run in runs.items():
        if any(key.startswith("steer/cos/") for key in run):
            plots.geometry(run).savefig(out / f"geometry-{name}.png")


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "–"
    if column in ("answer", "perception"):
        return f"{100 * value:.1f}"
    return f"{value:.0f}°" if column == "angle" else f"{value:.2f}"
