"""The grid: which runs are wanted, which are in the table already, and the processes that do the others.

A run is a row of the table, which appears when the run is finished. What is found is not run again. Methods are paired
by seed: they share teacher, initial student, prompts, and the seed of every rollout.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.vgs import table
from studies.vgs.methods import parse
from studies.vgs.prepare import CACHE
from studies.vgs.tasks import TASKS


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

    @property
    def setting(self) -> str:
        return TASKS[self.task].settled(**dict(self.changes))[1]

    @property
    def key(self) -> tuple[str, ...]:
        return (self.task, self.setting, self.method, str(self.seed))


def run_one(place: Place, cache: Path = CACHE) -> dict[str, Any]:
    """Does a run, and returns its record."""
    import torch

    torch.set_num_threads(1)
    from studies.vgs.train import Run

    task = TASKS[place.task]
    start, busy = time.perf_counter(), time.process_time()
    record = Run(task, task.settled(**dict(place.changes))[0], place.method, place.seed, cache=cache).work()
    # On a busy machine the second is what counts.
    record |= {"task": place.task, "method": place.method, "seed": place.seed}
    record["total seconds"] = round(time.perf_counter() - start, 1)
    record["total CPU seconds"] = round(time.process_time() - busy, 1)
    return record


def work(
    places: list[Place],
    *,
    jobs: int,
    runs: Path = table.RUNS,
    curves: Path = table.CURVES,
    cache: Path = CACHE,
) -> None:
    """Does the runs that are missing here and in the table of all, in order, and says how it goes.

    Args:
        places: which runs.
        jobs: processes of one thread each.
        runs: the table that gets a row for each.
        curves: where checkpoints are kept of the runs that the page shows.
        cache: where teachers and initial students are kept.
    """
    for place in places:
        parse(place.method)
    there = {tuple(row[name] for name in table.KEY) for file in {runs, table.RUNS} for row in table.read(file)}
    missing = [place for place in places if place.key not in there]
    print(f"{len(places)} runs, {len(places) - len(missing)} of them found in {runs}", flush=True)
    # A new interpreter, not a fork: torch's threads do not survive one.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures: dict[Future[dict[str, Any]], Place] = {}
        for place in missing:
            futures[pool.submit(run_one, place, cache)] = place
        for i, done in enumerate(as_completed(futures), start=1):
            place, record = futures[done], done.result()
            row = table.row(record, place.setting)
            table.keep_curve(curves, row, record["examined"])
            table.append(runs, row)
            print(
                f"{i}/{len(missing)} {' '.join(place.key)}: answer {record['scores']['final']['answer']:.1%} in "
                f"{record['total seconds']:.0f} s ({record['total CPU seconds']:.0f} of the CPU)"
                + (", diverged" if record["diverged"] is not None else ""),
                flush=True,
            )
