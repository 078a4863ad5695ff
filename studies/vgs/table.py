"""The table of all runs, ``runs.csv``: a row for each run, its numbers to four digits, and intervals over its rows.

``curves.json.gz`` holds checkpoints of a few runs that a figure of the page shows; no other run keeps its own.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from studies.vgs.intervals import Interval, interval, paired
from studies.vgs.methods import BASES
from studies.vgs.records import rounded

RUNS = Path(__file__).parent / "runs.csv"
CURVES = Path(__file__).parent / "curves.json.gz"
PENDING = Path(__file__).parent / "pending.csv"  # of runs in the background, until they are merged
GAMMA = 2.0  # of the dose, whatever the method trains with

KEY = ("task", "setting", "method", "seed")
# Scores of the trained student, and of teacher and initial student, whose columns begin with theirs.
SCORES = ("answer", "perception", "named", "language", "text_loss")
PREPARED = ("teacher answer", "teacher text_loss", "initial answer", "initial perception", "initial text_loss")
PAIRS = ("lang, vis", "std, vis", "std, lang")
DECILES = tuple(f"{pair} {decile}" for pair in PAIRS for decile in (0, 9))
TRAINING = (
    "answer mean",
    "perception mean",
    "named mean",
    "eta",
    "eta first",
    "eta last",
    "std~vis",
    "dose first",
    "dose",
    "lang growth",
    "lang first",
    "lang",
    "gain first",
    "gain",
)
STALE = ("cosine", "cosine lowest", "length")
# Numbers at the checkpoints, separated by spaces.
SERIES = ("step", "perception", "named", "answer", "text_loss", "lang", "dose", "gain")
COLUMNS = (
    *KEY,
    *SCORES,
    *TRAINING,
    *STALE,
    *PREPARED,
    *DECILES,
    "diverged",
    "seconds",
    *(f"{name} at" for name in SERIES),
)
Row = dict[str, str]

# The runs whose curves the page draws.
SHOWN = ("standard", "standard,trains=eye", "vgs", "vgs,floor=1e-3,lam=0,prior=frozen")
SHOWCASES = (("shapes-miscounting-teacher", "default"), ("shapes-miscounting-student", "steps=1500"))


def row(record: dict[str, Any], setting: str) -> Row:
    """The row of a run from its record."""
    scores, steps, observed, examined = (record[part] for part in ("scores", "steps", "observed", "examined"))
    found: dict[str, Any] = {"task": record["task"], "setting": setting, "method": record["method"]}
    found |= {"seed": record["seed"], "diverged": record["diverged"], "seconds": record["total CPU seconds"]}
    found |= {name: scores["final"].get(name) for name in SCORES}
    for name in PREPARED:
        who, _, what = name.partition(" ")
        found[name] = scores[who].get(what)
    for name in ("answer", "perception", "named"):
        if name in examined:
            found[f"{name} mean"] = fmean(examined[name])
    if etas := steps.get("weight std"):
        quarter = max(1, len(etas) // 4)
        found |= {"eta": fmean(etas), "eta first": fmean(etas[:quarter]), "eta last": fmean(etas[-quarter:])}
    found["std~vis"] = fmean(observed["angle std~vis"])
    doses = [
        dose(std, vis, angle)
        for std, vis, angle in zip(observed["norm std"], observed["norm vis"], observed["angle std~vis"], strict=True)
    ]
    found |= {"dose first": doses[0], "dose": fmean(doses)}
    grown = observed["lang tercile 2"]
    if grown[0] > 0:
        found["lang growth"] = math.log(fmean(grown[-(len(grown) // 4) or -1 :]) / grown[0])
    if cosines := steps.get("cosine to exact"):
        found |= {"cosine": fmean(cosines), "cosine lowest": min(cosines)}
    if lengths := steps.get("length to exact"):
        found["length"] = fmean(lengths)
    angles = record["deciles"].get("initial")
    for pair in PAIRS if angles else ():
        of_pair = angles[pair] if pair in angles else angles[", ".join(reversed(pair.split(", ")))]
        found |= {f"{pair} {decile}": of_pair[decile] for decile in (0, 9)}
    if ahead := record.get("ahead"):
        language = [*ahead["lang"], *ahead["lang end"]]
        found |= {"lang first": language[0], "lang": language[-1]}
        found |= {"gain first": ahead["gain"][0], "gain": fmean(ahead["gain"])}
        every = len(doses) // len(ahead["gain"]) or 1
        series = {**examined, "lang": language, "gain": ahead["gain"], "dose": doses[::every]}
        for name in SERIES:
            found[f"{name} at"] = " ".join(f"{value:.3g}" for value in series[name][::2])
    return {name: _text(found.get(name)) for name in COLUMNS}


def dose(std: float, vis: float, angle: float) -> float:
    """The angle in degrees between ``g_std`` and ``g_std + 2 g_vis``: how far steering can turn an update."""
    along = std + GAMMA * vis * math.cos(math.radians(angle))
    across = GAMMA * vis * math.sin(math.radians(angle))
    return math.degrees(math.atan2(across, along))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read(file: Path = RUNS) -> list[Row]:
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def append(file: Path, new: Row) -> None:
    """Appends a row; the head of the table first, where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS, lineterminator="\n")
        if not opened.tell():
            writer.writeheader()
        writer.writerow(new)


def merge(pending: Path = PENDING, runs: Path = RUNS) -> int:
    """Moves the rows of runs in the background to the table of all; returns how many are new there."""
    there = {tuple(row[name] for name in KEY) for row in read(runs)}
    new = [row for row in read(pending) if tuple(row[name] for name in KEY) not in there]
    for row in new:
        append(runs, row)
    return len(new)


def curves(file: Path = CURVES) -> dict[str, dict[str, list[float]]]:
    """Checkpoints by ``task/setting/method/seed``."""
    if not file.exists():
        return {}
    found: dict[str, dict[str, list[float]]] = json.loads(gzip.decompress(file.read_bytes()))
    return found


def keep_curve(file: Path, new: Row, examined: dict[str, list[float]]) -> None:
    """Keeps the checkpoints of a run that the page shows."""
    if (new["task"], new["setting"]) not in SHOWCASES or new["method"] not in SHOWN:
        return
    columns = {name: rounded(examined[name]) for name in ("step", "answer", "perception", "text_loss")}
    kept = {**curves(file), "/".join(new[name] for name in KEY): columns}
    text = json.dumps(dict(sorted(kept.items())), separators=(",", ":"))
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


class Setting:
    """The runs of one task in one setting.

    Attributes:
        task: its name.
        name: ``default``, or the settings that are not the task's own.
        runs: by method and seed; methods in the order of their bases.
    """

    def __init__(self, task: str, name: str, runs: dict[str, dict[int, Row]]) -> None:
        self.task, self.name = task, name
        self.runs = {method: runs[method] for method in sorted(runs, key=_rank)}

    @property
    def title(self) -> str:
        """Its name in words."""
        return "its own settings" if self.name == "default" else self.name.replace(",", ", ").replace("=", " = ")

    def values(self, method: str, column: str) -> dict[int, float]:
        """A number of every run of a method by seed, where the run has it; of none where the method was not run."""
        return {seed: float(row[column]) for seed, row in self.runs.get(method, {}).items() if row[column]}

    def interval(self, method: str, column: str, *, seeds: Collection[int] | None = None) -> Interval | None:
        values = [value for seed, value in self.values(method, column).items() if seeds is None or seed in seeds]
        return interval(values) if values else None

    def common(self, methods: Sequence[str]) -> list[int]:
        """The seeds that all of these methods were run with."""
        return sorted(set.intersection(*(set(self.runs[method]) for method in methods)))

    def difference(self, method: str, column: str, *, to: str = "standard") -> Interval | None:
        """To another method, paired by seed; None where one of them was not run."""
        return paired(self.values(method, column), self.values(to, column))

    def over_seeds(self, column: str) -> Interval | None:
        """What does not depend on the method: one value for each seed."""
        values = {seed: row[column] for runs in self.runs.values() for seed, row in runs.items() if row[column]}
        return interval([float(value) for value in values.values()]) if values else None


def changes(setting: Setting) -> dict[str, str]:
    """The settings that are not the task's own."""
    return {} if setting.name == "default" else dict(change.split("=", 1) for change in setting.name.split(","))


def settings(rows: Sequence[Row]) -> list[Setting]:
    """All settings that have runs: by task, its own settings first."""
    runs: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for one in rows:
        of_method = runs.setdefault((one["task"], one["setting"]), {}).setdefault(one["method"], {})
        of_method[int(one["seed"])] = one
    keys = sorted(runs, key=lambda key: (key[0], key[1] != "default", key[1]))
    return [Setting(*key, runs[key]) for key in keys]


def _rank(method: str) -> tuple[int, list[tuple[str, float]]]:
    """The place of its base, then its changes, those of one field by value and not by digits."""
    base, *changes = method.split(",")
    keys_values = [change.partition("=")[::2] for change in changes]
    number = re.compile(r"[\d.]+(e-?\d+)?")
    return list(BASES).index(base), [(key, float(v) if number.fullmatch(v) else 0.0) for key, v in keys_values]
