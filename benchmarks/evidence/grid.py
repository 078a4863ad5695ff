"""The grid: which runs are wanted, which are there already, and the processes that do the others.

A run is a file, ``<results>/<task>/<setting>/<method>-seed<seed>.json``, which appears when the run is finished. What
is found is not run again. Methods are paired by seed: they share teacher, initial student, prompts, and the seed of
every rollout.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.evidence.methods import parse
from benchmarks.evidence.prepare import CACHE
from benchmarks.evidence.tasks import TASKS

EVIDENCE = RESULTS / "evidence"


@dataclass(frozen=True)
class Place:
    """Where a run belongs.

    Attributes:
        task: its name.
        changes: the settings that are not the task's own.
        method: its name.
        seed: its seed.
    """

    task: str
    changes: tuple[tuple[str, Any], ...]
    method: str
    seed: int

    def file(self, results: Path) -> Path:
        _, setting = TASKS[self.task].settled(**dict(self.changes))
        return results / self.task / setting / f"{self.method}-seed{self.seed}.json"


def found(place: Place, results: Path) -> bool:
    """Whether a run is there.

    Raises:
        ValueError: it is, with other settings: those of the task have changed since.
    """
    file = place.file(results)
    if not file.exists():
        return False
    settings, _ = TASKS[place.task].settled(**dict(place.changes))
    there = json.loads(file.read_text())["settings"]
    if there != asdict(settings):
        differences = {
            key for key in there.keys() | asdict(settings).keys() if there.get(key) != asdict(settings).get(key)
        }
        raise ValueError(
            f"{file} is a run with other settings of the task ({', '.join(sorted(differences))}): delete it, or put "
            "the settings back"
        )
    return True


def prepare_one(place: Place, cache: Path) -> None:
    """Teacher and initial student of a run, where they are missing."""
    _one_thread()
    from benchmarks.evidence.prepare import prepare

    task = TASKS[place.task]
    prepare(task, task.settled(**dict(place.changes))[0], place.seed, cache=cache)


def run_one(place: Place, results: Path, cache: Path) -> dict[str, Any]:
    """Does a run, and writes its file all at once."""
    _one_thread()
    from benchmarks.evidence.train import Run

    task = TASKS[place.task]
    settings, _ = task.settled(**dict(place.changes))
    start, busy = time.perf_counter(), time.process_time()
    record = Run(task, settings, place.method, place.seed, cache=cache).work()
    record = {**asdict(place), "changes": dict(place.changes), "settings": asdict(settings), **record}
    # On a busy machine the second is what counts.
    record["total seconds"] = round(time.perf_counter() - start, 1)
    record["total CPU seconds"] = round(time.process_time() - busy, 1)
    file = place.file(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    os.replace(partial, file)
    return record


def work(places: list[Place], *, jobs: int, results: Path = EVIDENCE, cache: Path = CACHE) -> None:
    """Does the runs that are missing, ``jobs`` processes of one thread each, and says how it goes."""
    for place in places:
        parse(place.method)
    missing = [place for place in places if not found(place, results)]
    print(f"{len(places)} runs, {len(places) - len(missing)} of them found in {results}", flush=True)
    # Once for each seed, before its methods, which would all find nothing and make it.
    first = {(place.task, place.changes, place.seed): place for place in missing}
    # A new interpreter, not a fork: torch's threads do not survive one.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for prepared in as_completed([pool.submit(prepare_one, place, cache) for place in first.values()]):
            prepared.result()
        futures = {pool.submit(run_one, place, results, cache): place for place in missing}
        for i, done in enumerate(as_completed(futures), start=1):
            place, record = futures[done], done.result()
            answer = record["scores"]["final"]["answer"]
            print(
                f"{i}/{len(missing)} {place.task} {place.method} seed {place.seed}: answer {answer:.1%} in "
                f"{record['total seconds']:.0f} s ({record['total CPU seconds']:.0f} of the CPU)"
                + (", diverged" if record["diverged"] is not None else ""),
                flush=True,
            )


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
