"""Runs of the grid, and the report on them.

    python -m studies.vgs run --task digits --methods standard vgs --seeds 0 1 2 3 4 --jobs 2
    python -m studies.vgs run --task shapes --methods vgs,floor=1e-3 --lr 1e-3 --steps 2000
    python -m studies.vgs capacity --jobs 2     appends to studies/vgs/pending.csv
    python -m studies.vgs merge                 adds its rows to runs.csv
    python -m studies.vgs report

What is finished is found again: the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from studies.vgs import table
from studies.vgs.capacity import SEEDS, places
from studies.vgs.grid import Place, work
from studies.vgs.methods import BASES
from studies.vgs.prepare import CACHE
from studies.vgs.tasks import TASKS, Settings


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m studies.vgs", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do the runs that are missing")
    run.add_argument("--task", nargs="+", choices=list(TASKS), required=True)
    run.add_argument("--methods", nargs="+", default=["standard", "vgs"], help=f"bases: {', '.join(BASES)}")
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    run.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    run.add_argument("--cache", type=Path, default=CACHE, help="where teachers and initial students are kept")
    types = {"int": int, "float": float, "str": str}
    for field in fields(Settings):
        run.add_argument(f"--{field.name.replace('_', '-')}", type=types[str(field.type)], help="as of the task")
    report = commands.add_parser("report", help="write tables and figures from what has been run")
    report.add_argument("--docs", type=Path, default=Path("docs"))
    capacity = commands.add_parser("capacity", help="do the missing runs of the experiment on capacity and language")
    capacity.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    capacity.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    capacity.add_argument("--cache", type=Path, default=CACHE, help="where teachers and initial students are kept")
    commands.add_parser("merge", help="add the rows of studies/vgs/pending.csv to runs.csv")
    for command in (run, report, capacity):
        file = table.PENDING if command is capacity else table.RUNS
        command.add_argument("--runs", type=Path, default=file, help="the table")
        command.add_argument("--curves", type=Path, default=table.CURVES, help="checkpoints of the runs that are shown")
    options = parser.parse_args(arguments)

    if options.command == "report":
        from studies.vgs.report import write

        write(options.runs, options.curves, options.docs)
        return 0
    if options.command == "merge":
        print(f"{table.merge()} new rows in {table.RUNS}")
        return 0
    if options.command == "capacity":
        tables = {"runs": options.runs, "curves": options.curves, "cache": options.cache}
        work(places(options.seeds), jobs=options.jobs, **tables)
        return 0
    changes = tuple(
        (field.name, value) for field in fields(Settings) if (value := getattr(options, field.name)) is not None
    )
    wanted = [
        Place(task, changes, method, seed)
        for task in options.task
        for seed in options.seeds
        for method in options.methods
    ]
    try:
        work(wanted, jobs=options.jobs, runs=options.runs, curves=options.curves, cache=options.cache)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
