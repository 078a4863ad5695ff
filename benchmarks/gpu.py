"""What needs a GPU, in one run of less than eight minutes on one of 80 GB: the program of ``make gpu``.

    python -m benchmarks.gpu           # the parts below, one after another
    python -m benchmarks.gpu --tiny    # a rehearsal on any machine

Each part is a process of its own with a limit of time, and writes its dated result whenever it has more of it: one that
fails, or is ended, costs no other its result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, steering_cost
from benchmarks.variants import AUTOGRAM

TOTAL = 450  # seconds; the limits below sum up to less
COST = (*steering_cost.README, AUTOGRAM)


@dataclass(frozen=True)
class Part:
    """A command for this Python, its limit in seconds, and what makes it tiny."""

    command: tuple[str, ...]
    limit: float
    tiny: tuple[str, ...] = ()


TESTS = ("tests/test_accelerator.py", "tests/distributed/test_nccl.py")
TESTS += ("tests/test_benchmarks.py::test_a_step_at_its_real_size_runs_tiny",)
REAL_SIZE = ("-m", "benchmarks.real_size")
PARTS = {
    "tests": Part(("-m", "pytest", "-q", "--continue-on-collection-errors", *TESTS), 90),
    "real size": Part(REAL_SIZE, 140, ("--tiny", "--repeats", "1")),
    "real size, LoRA": Part((*REAL_SIZE, "--student", "lora"), 100, ("--tiny", "--repeats", "1")),
    "cost of steering": Part(
        ("-m", "benchmarks.steering_cost", "--device", "cuda"),
        90,
        ("--device", "cpu", "--models", "mlp", "--components", "2", "--repeats", "2"),
    ),
}


def run(command: list[str], limit: float) -> dict[str, Any]:
    """Run a command until it ends or the limit is reached: how it ended, after how long, and its last lines."""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=common.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that its own processes end with it
    )
    try:
        output, _ = process.communicate(timeout=limit)
        outcome = "done" if process.returncode == 0 else f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        outcome = f"ended after {limit:.0f} s"
    return {"outcome": outcome, "seconds": time.monotonic() - start, "output": output.splitlines()[-200:]}


def run_all(parts: dict[str, Part], folder: Path, *, tiny: bool = False, total: float = TOTAL) -> dict[str, Any]:
    """Run the parts, and write how they ended after each of them."""
    start, found = time.monotonic(), {}
    path = folder / f"gpu-{'partial-' * tiny}{date.today().isoformat()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        command = [sys.executable, *part.command, *(part.tiny if tiny else ())]
        if "pytest" not in part.command:
            command += ["--results", str(folder.resolve())]
        found[name] = run(command, max(1.0, min(part.limit, start + total - time.monotonic())))
        path.write_text(json.dumps({"parts": found}, indent=1) + "\n")
        print(*found[name]["output"], f"--- {name}: {_outcome(found[name])}", sep="\n", flush=True)
    return found


def _outcome(part: dict[str, Any]) -> str:
    return f"{part['outcome']}, {part['seconds']:.0f} s"


def markdown() -> str:
    """How the last run ended, and the tables of its results."""
    outcomes = common.newest("gpu")
    if outcomes is None:
        return "Not run yet: `make gpu`."
    rows = [[name, _outcome(part)] for name, part in outcomes["parts"].items()]
    tests = outcomes["parts"].get("tests", {"output": []})["output"][-1:]
    blocks = [common.table(["part", "ended"], rows), *(f"Tests: {line.strip('= ')}." for line in tests)]
    for student in ("full", "lora"):
        if result := common.newest(f"real_size_{student}"):
            from benchmarks import real_size  # which needs transformers

            blocks.append(real_size.markdown(result))
    if cost := common.newest("steering_cost_cuda"):
        columns = steering_cost.settings(cost, "one")
        blocks.append(steering_cost.table(cost, COST, columns, key="ratio to plain"))
    return "\n\n".join(blocks)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on any machine")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):  # asks the driver and takes no memory of the GPU
        raise SystemExit("there is no GPU here: --tiny is a rehearsal on a CPU")
    found = run_all(PARTS, options.results, tiny=options.tiny)
    raise SystemExit(any(part["outcome"] != "done" for part in found.values()))


if __name__ == "__main__":
    main()
