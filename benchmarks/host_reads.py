"""Where a steered step makes the host read from a tensor, which is where it would wait for an accelerator.

    python -m benchmarks.host_reads

Counted on any device: every operation of a step that hands a number to Python. An accelerator may be waited for in
other places too, which ``benchmarks.real_size`` counts on one. The step after a refresh, which reads once, is not among
them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import parser, table, write
from benchmarks.variants import STALE, STEER, make
from benchmarks.workloads import make as make_workload

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")


@cache
def is_read(function: Any) -> bool:
    return any(name in str(function) for name in READS)


class HostReads(TorchDispatchMode):
    """Counts the operations whose result Python sees."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += is_read(function)
        return function(*args, **(kwargs or {}))


@contextmanager
def syncs(device: torch.device) -> Iterator[Callable[[], int]]:
    """Count how often the host waits for the GPU; on a CPU, how often Python reads from a tensor."""
    if device.type != "cuda":
        with HostReads() as mode:
            yield lambda: mode.count
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("called a synchronizing" in str(warning.message) for warning in caught)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def reads(model: str, name: str) -> int:
    """The reads in the gradients of one step, after two that warm up."""
    variant = make(make_workload(model), 2, (name,))[name]
    for _ in range(2):
        variant.step()
    variant.optimizer.zero_grad()
    with HostReads() as mode:
        variant.backward()
    return mode.count


def markdown(result: dict[str, Any]) -> str:
    return table(["step", "host reads"], [[row["variant"], str(row["reads"])] for row in result["rows"]])


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    rows = [{"variant": name, "reads": reads("adapters", name)} for name in (STEER, STALE)]
    result = {"rows": rows}
    write("host_reads", result, options.results, partial=options.partial)
    print(markdown(result))


if __name__ == "__main__":
    main()
