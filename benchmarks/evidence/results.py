"""The finished runs, as the report reads them: by task and setting, method, and seed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.evidence.intervals import Interval, interval, paired
from benchmarks.evidence.methods import BASES

Record = dict[str, Any]


class Setting:
    """The runs of one task in one setting.

    Attributes:
        task: its name.
        name: ``default``, or the settings that are not the task's own.
        runs: by method and seed; methods in the order of their bases.
    """

    def __init__(self, task: str, name: str, runs: dict[str, dict[int, Record]]) -> None:
        self.task, self.name = task, name
        self.runs = {method: runs[method] for method in sorted(runs, key=_rank)}

    @property
    def any_run(self) -> Record:
        return next(iter(next(iter(self.runs.values())).values()))

    def values(self, method: str, of: Callable[[Record], float | None]) -> dict[int, float]:
        """A number of every run of a method by seed, where the run has it; of none where the method was not run."""
        found = {seed: of(record) for seed, record in self.runs.get(method, {}).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def interval(
        self, method: str, of: Callable[[Record], float | None], *, seeds: Collection[int] | None = None
    ) -> Interval | None:
        values = [value for seed, value in self.values(method, of).items() if seeds is None or seed in seeds]
        return interval(values) if values else None

    def common(self, methods: Sequence[str]) -> list[int]:
        """The seeds that all of these methods were run with."""
        return sorted(set.intersection(*(set(self.runs[method]) for method in methods)))

    def difference(self, method: str, of: Callable[[Record], float | None], *, to: str = "standard") -> Interval | None:
        """To another method, paired by seed; None where one of them was not run."""
        return paired(self.values(method, of), self.values(to, of))

    def over_seeds(self, of: Callable[[Record], float | None]) -> Interval | None:
        """What does not depend on the method: one value for each seed."""
        values = {seed: of(record) for runs in self.runs.values() for seed, record in runs.items()}
        present = [value for value in values.values() if value is not None]
        return interval(present) if present else None

    def curve(self, method: str, part: str, column: str) -> tuple[list[float], list[Interval]]:
        """The steps and the values over seeds, as far as all runs of a method have come."""
        parts = [r[part] for r in self.runs[method].values() if column in r[part]]
        length = min((len(p[column]) for p in parts), default=0)
        return (parts[0]["step"][:length] if parts else []), [
            interval([p[column][i] for p in parts]) for i in range(length)
        ]


def _rank(method: str) -> tuple[int, list[tuple[str, float]]]:
    """The place of its base, then its changes, those of one field by value and not by digits."""
    base, *changes = method.split(",")
    keys_values = [change.partition("=")[::2] for change in changes]
    number = re.compile(r"[\d.]+(e-?\d+)?")
    return list(BASES).index(base), [(key, float(v) if number.fullmatch(v) else 0.0) for key, v in keys_values]


def score(name: str, *, when: str = "final") -> Callable[[Record], float | None]:
    return lambda record: record["scores"][when][name]


def mean_of(part: str, column: str) -> Callable[[Record], float | None]:
    """The mean over training of a column; None where a run has none."""
    return lambda record: fmean(record[part][column]) if record[part].get(column) else None


def of_pair(angles: dict[str, list[float]], pair: str) -> list[float]:
    """The angles of two components by decile, in whichever order they were written down."""
    return angles[pair] if pair in angles else angles[", ".join(reversed(pair.split(", ")))]


def load(folder: Path) -> list[Setting]:
    """All settings that have runs: the task's own first."""
    runs: dict[tuple[str, str], dict[str, dict[int, Record]]] = {}
    for file in sorted(folder.glob("*/*/*.json")):
        record = json.loads(file.read_text())
        key = (record["task"], file.parent.name)
        runs.setdefault(key, {}).setdefault(record["method"], {})[record["seed"]] = record
    keys = sorted(runs, key=lambda key: (key[0], key[1] != "default", key[1]))
    return [Setting(*key, runs[key]) for key in keys]
