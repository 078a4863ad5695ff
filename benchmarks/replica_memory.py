"""What exact steering holds on each of several data-parallel replicas, by allocator events: one set and k/R of one.

    python -m benchmarks.replica_memory

A model of 16 layers is trained by R processes (gloo) on the CPU. The peak of a plain backward pass, which holds one set
of gradients, is subtracted from that of a steered one. The least of some steps counts: a profile misses what a thread
of gloo frees.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import common
from steer_optim import Steering, Sum

REPLICAS, COMPONENTS = (2, 4), (2, 3)


def measure(k: int, *, repeats: int = 3) -> dict[str, Any]:
    """In one of the processes: sets of gradients over a plain backward pass, and what the budget allows."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(16)))
    rows = torch.randn(2, 512)
    steering = Steering(model.parameters(), Sum(), data_parallel=True)

    def losses() -> dict[str, torch.Tensor]:
        out = model(rows)
        return {str(i): out[:, i].sum() for i in range(k)}

    def peak(work: Any) -> int:
        steering.zero_grad()
        return common.peak_bytes(work)

    steering.backward_components(losses())  # the first step compares the replicas
    plain = peak(lambda: sum(losses().values()).backward())
    steered = min(peak(lambda: steering.backward_components(losses())) for _ in range(repeats))
    one_set = sum(p.nbytes for p in model.parameters())
    return {
        "replicas": dist.get_world_size(),
        "components": k,
        "sets over plain": (steered - plain) / one_set,
        "k/R": k / dist.get_world_size(),
    }


def work() -> list[dict[str, Any]]:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [measure(k) for k in COMPONENTS])
    # Of the replica that held the most.
    return [max(rows, key=lambda row: row["sets over plain"]) for rows in zip(*everywhere, strict=True)]


def markdown(result: dict[str, Any]) -> str:
    rows = [
        [str(row["replicas"]), str(row["components"]), f"{row['sets over plain']:+.2f}", f"{row['k/R']:+.2f}"]
        for row in result["rows"]
    ]
    return common.table(["replicas R", "components k", "sets of gradients over a plain step's peak", "k/R"], rows)


def main() -> None:
    options = common.parser(__doc__).parse_args()
    result = {"rows": [row for replicas in REPLICAS for row in common.in_group(replicas, work)]}
    common.write("replica_memory", result, options.results, partial=options.partial)
    print(markdown(result))


if __name__ == "__main__":
    main()
