"""The main job again, over the two samples of seeds that were planned after its first three had suggested something.

    python examples/distill_digits.py --rule standard vgs reweighting --seed 3    # to 19

Its ``results.json`` is kept as ``examples/results/digits-seed3.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import table as as_table
from studies.vgs.intervals import cell, interval, paired, points

RESULTS = Path(__file__).parents[2] / "examples" / "results"
SAMPLES = (range(3, 10), range(10, 20), range(3, 20))  # the third, both together, is exploratory
COMPARISONS = (("vgs", "standard"), ("reweighting", "standard"), ("vgs", "reweighting"))
COLUMNS = {"answer": "right", "perception": "all seen"}


def results(folder: Path = RESULTS) -> str:
    """For each sample what every method has, and the comparisons."""
    lines = []
    for seeds in SAMPLES:
        files = {seed: folder / f"digits-seed{seed}.json" for seed in seeds}
        runs = {seed: json.loads(file.read_text())["rows"] for seed, file in files.items() if file.exists()}
        if not runs:
            continue

        def of(method: str, column: str, runs: dict[int, Any] = runs) -> dict[int, float]:
            return {seed: rows[method][column] for seed, rows in runs.items()}

        sample = f"{min(runs)} to {max(runs)}"
        for method in ("standard", "vgs", "reweighting"):
            shares = (cell(interval([*of(method, column).values()]), scale=100) + " %" for column in COLUMNS)
            lines.append([sample, f"`{method}`", *shares])
        for method, other in COMPARISONS:
            differences = (points(paired(of(method, column), of(other, column))) for column in COLUMNS)
            lines.append([sample, f"`{method}` to `{other}`", *differences])
    return as_table(["seeds", "", *COLUMNS.values()], lines)
