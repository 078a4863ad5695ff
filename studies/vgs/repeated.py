"""The main job again, over the seeds that were planned after its first three had suggested something.

    python examples/distill_digits.py --rule standard vgs reweighting --seed 3    # to 9

Its ``results.json`` is kept as ``examples/results/digits-seed3.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.common import table as as_table
from studies.vgs.intervals import cell, interval, paired, points

RESULTS = Path(__file__).parents[2] / "examples" / "results"
SEEDS = range(3, 10)
COMPARISONS = (("vgs", "standard"), ("reweighting", "standard"), ("vgs", "reweighting"))
COLUMNS = {"answer": "right", "perception": "all seen"}


def results(folder: Path = RESULTS) -> str:
    """A row for each comparison, and what standard distillation has; nothing before the runs are there."""
    files = {seed: folder / f"digits-seed{seed}.json" for seed in SEEDS}
    runs = {seed: json.loads(file.read_text())["rows"] for seed, file in files.items() if file.exists()}
    if not runs:
        return "No run yet."

    def of(method: str, column: str) -> dict[int, float]:
        return {seed: rows[method][column] for seed, rows in runs.items()}

    lines = [
        [f"`{method}`", str(len(runs)), *(cell(interval([*of(method, c).values()]), scale=100) + " %" for c in COLUMNS)]
        for method in ("standard", "vgs", "reweighting")
    ]
    for method, other in COMPARISONS:
        differences = (points(paired(of(method, c), of(other, c))) for c in COLUMNS)
        lines.append([f"`{method}` to `{other}`", str(len(runs)), *differences])
    return as_table(["", "seeds", *COLUMNS.values()], lines)
