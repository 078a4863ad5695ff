"""What all benchmarks share: timing in turns, the peak memory of a process of its own, and results in dated files.

Times are wall-clock seconds of one thread. The variants take turns in a shuffled order, so that a noisy machine
disturbs all alike; a ratio is taken within each round, and its median over the rounds is what is reported.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: int = 1,
    synchronise: Callable[[], object] = bool,
) -> dict[str, list[float]]:
    """Seconds of every step in each of ``repeats`` rounds, after ``warm_up`` rounds that are not counted."""
    order, names = random.Random(0), list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    frozen = gc.get_freeze_count()
    gc.freeze()  # what is there already need not be looked through every time
    for repeat in range(warm_up + repeats):
        for name in order.sample(names, len(names)):
            gc.collect()  # or the cycles of one variant are collected on another's time
            synchronise()
            start = time.perf_counter()
            steps[name]()
            synchronise()
            if repeat >= warm_up:
                times[name].append(time.perf_counter() - start)
    if not frozen:  # by the caller, as tests are
        gc.unfreeze()
    return times


def quartiles(times: list[float], reference: list[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile of the ratios of two variants, round by round."""
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3


def ratio(times: list[float], reference: list[float]) -> float:
    return quartiles(times, reference)[1]


@contextmanager
def forward_passes(done: Callable[[str], None], models: Mapping[str, torch.nn.Module]) -> Iterator[None]:
    """Calls ``done`` with each name after a forward pass of its model; those of one model in the order of names."""
    passes: dict[torch.nn.Module, list[str]] = {}
    for name, model in models.items():
        passes.setdefault(model, []).append(name)
    handles = [model.register_forward_hook(lambda it, *_: done(passes[it].pop(0))) for model in passes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def peak_over_resident(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises at most while ``run`` runs; Linux only.

    VmHWM, and not ``ru_maxrss``, which a process takes over from the one that started it.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what glibc holds of freed memory would be resident before, and used again
    Path("/proc/self/clear_refs").write_text("5")  # sets the mark back to what is resident now
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM") - before
    del kept
    return peak


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory of the CPU that was in use at a time beyond what was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(value)


def in_child(module: str, *arguments: str, exact_peak: bool = False) -> Any:
    """What ``python -m module *arguments`` prints as JSON in its last line, in a process with memory of its own.

    With ``exact_peak`` glibc gives freed memory back at once, so that a peak does not depend on what ran before it;
    that costs time.
    """
    environment = dict(os.environ)
    if exact_peak:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def in_group(size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work(*arguments)`` returns in the first of ``size`` processes of one group (gloo)."""
    answers = torch.multiprocessing.get_context("forkserver").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        given = (size, f"file://{folder}/store", answers, work, arguments)
        torch.multiprocessing.start_processes(_member, given, nprocs=size, start_method="forkserver")
        return answers.get()


def _member(rank: int, size: int, store: str, answers: Any, work: Callable[..., Any], arguments: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, world_size=size, rank=rank)
    found = work(*arguments)
    if rank == 0:
        answers.put(found)
    dist.barrier()
    dist.destroy_process_group()


def machine() -> dict[str, Any]:
    """The hardware and the versions that a result depends on."""
    facts = {
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


class _Parser(argparse.ArgumentParser):
    def parse_args(self, *arguments: Any) -> argparse.Namespace:  # type: ignore[override]
        options = super().parse_args(*arguments)
        # A device does not make a run a part of another, but gives its result another name.
        options.partial = any(
            value != self.get_default(key) for key, value in vars(options).items() if key not in ("results", "device")
        )
        return options


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the one option of every benchmark: where its result goes.

    ``options.partial`` says whether any other option is not at its default, so that the run is not the whole.
    """
    parser = _Parser(description=(doc or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the dated result files")
    return parser


def use_one_core() -> None:
    """One thread, on one core for as long as the process lives: the last of those it may use, the least in demand."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def write(name: str, result: Mapping[str, Any], folder: Path, *, partial: bool = False) -> Path:
    """Writes ``<name>-<date>.json`` with the facts of the machine; a partial run under a name that no page reads."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{'partial-' * partial}{date.today().isoformat()}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    print(f"written to {path}")
    return path


def newest(name: str) -> Any:
    """The newest committed result of a benchmark; None where there is none."""
    path = max(RESULTS.glob(f"{name}-[0-9]*-*-*.json"), default=None)
    return None if path is None else json.loads(path.read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
