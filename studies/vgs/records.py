"""Numbers over training, kept small enough to be committed."""

from __future__ import annotations

from statistics import fmean
from typing import Any

DIGITS = 4


class Series:
    """Values by name over steps."""

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {}

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in {"step": step, **values}.items():
            self.columns.setdefault(name, []).append(value)

    def history(self, *, points: int | None = None) -> dict[str, list[float]]:
        """The columns; the means of ``points`` windows where there are more steps."""
        rows = len(self.columns.get("step", []))
        width = 1 if points is None else max(1, -(-rows // points))
        return {
            name: rounded([fmean(column[i : i + width]) for i in range(0, rows, width)])
            for name, column in self.columns.items()
        }


def rounded(value: Any) -> Any:
    """To four significant digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
