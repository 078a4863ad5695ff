"""The table and the figures of a run, from what its phases noted down."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from digits_run import write_json
from matplotlib.figure import Figure

from steer_optim import plots

COLUMNS = {
    "answer": "answer, %",
    "perception": "perception, %",
    "text_loss": "text-only loss",
    "angle": "angle(std, vis)",
    "eta": "eta",
    "seconds": "s/step",
}


def write_table(path: Path, records: dict[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    """Prints the table, and writes it to ``table.md`` and, unrounded and with the settings, to ``results.json``."""
    rows = {name: _row(record) for name, record in records.items()}
    write_json(path / "results.json", {"settings": settings, "rows": rows})
    cells = [["", *COLUMNS.values()], *([name, *map(_cell, row, row.values())] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    count = settings["held_out"]
    note = (
        f"Accuracies are on {count} problems of held-out digits, greedy decoding; their standard error is "
        f"{100 * math.sqrt(0.25 / count):.1f} points at most.\n"
        "The text-only loss is the cross-entropy of right answers without the image, in nats per token.\n"
        "Angle, eta and seconds per step are means over training; the angle is that of the paper's components, with\n"
        "the student's own prior, under every method."
    )
    text = "\n".join(lines) + "\n\n" + note + "\n"
    (path / "table.md").write_text(text)
    print(f"\n{text}\nwritten to {path}")


def write_figures(path: Path, records: dict[str, dict[str, Any]], deciles: dict[str, list[float]]) -> None:
    """The paper's kinds of figures: angles by decile (Fig. 3), losses, and norms and cosines over training (Fig. 7)."""
    plots.angles_by_decile(deciles).savefig(path / "angles_by_decile.png")
    components = {name: record["components"] for name, record in records.items()}
    figure = Figure(figsize=(12, 3.6), dpi=160, layout="constrained")
    for component, axes in zip(("std", "vis", "lang"), figure.subplots(1, 3), strict=True):
        plots.losses(components, component=component, axes=axes)
        if component != "std":
            axes.get_legend().remove()  # the first panel's says it for all
    figure.savefig(path / "losses.png")
    for name, history in components.items():
        plots.geometry(history).savefig(path / f"geometry-{name}.png")


def _row(record: dict[str, Any]) -> dict[str, float | None]:
    angles = record.get("components", {}).get("steer/angle/std~vis")
    etas = record.get("steering", {}).get("steer/weight/std")  # not a weight of the exact split: no eta there
    return {
        **record["scores"],
        "angle": fmean(angles) if angles else None,
        "eta": fmean(etas) if etas else None,
        "seconds": record.get("seconds"),
    }


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "–"
    if column in ("answer", "perception"):
        return f"{100 * value:.1f}"
    return f"{value:.0f}°" if column == "angle" else f"{value:.2f}"
