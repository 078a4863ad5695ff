"""How the cost of exact steering grows: over the number of components, of parameters, and of rows in a batch.

    python -m benchmarks.steering_growth

Everything is a ratio to the same k backward passes without steering. What steering adds is work per parameter, and what
it adds to is work per parameter and row: the fewer rows, the more it shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common, variants, workloads
from benchmarks.variants import BARE, PLAIN, STEER
from benchmarks.workloads import MLP, Workload

COMPONENTS = (1, 2, 3, 4, 5, 6, 7, 8)
WIDTHS = (408, 912, 2048, 4096)  # of three layers: 0.5 to 50 M parameters
ROWS = (16, 64, 256, 1024)
SWEEPS: dict[str, tuple[tuple[int, ...], Callable[[int], tuple[Workload, int]]]] = {
    "components": (COMPONENTS, lambda k: (workloads.make("transformer"), k)),
    "width": (WIDTHS, lambda width: (Workload(MLP(width), 256), 2)),
    "rows": (ROWS, lambda rows: (Workload(MLP(), rows), 2)),
}


def measure(sweep: str, x: int, *, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    workload, k = SWEEPS[sweep][1](x)
    made = variants.make(workload, k, (PLAIN, BARE, STEER))
    times = common.take_turns({name: variant.step for name, variant in made.items()}, repeats=repeats)
    low, median, high = common.quartiles(times[STEER], times[BARE])
    return {
        "sweep": sweep,
        "x": x,
        "components": k,
        "rows": workload.batch,
        "parameters": sum(p.numel() for p in workload.parameters),
        "seconds of a plain step": statistics.median(times[PLAIN]),
        "bare to plain": common.ratio(times[BARE], times[PLAIN]),
        "steer to plain": common.ratio(times[STEER], times[PLAIN]),
        "steer to bare": median,
        "quartiles to bare": [low, high],
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=list(SWEEPS))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    common.use_one_core()

    rows = []
    for sweep in options.sweeps:
        for x in SWEEPS[sweep][0]:
            rows.append(measure(sweep, x, repeats=options.repeats))
            print(*(f"{key} {value}" for key, value in rows[-1].items()), sep=", ", flush=True)
    common.write(
        "steering_growth", {"repeats": options.repeats, "rows": rows}, options.results, partial=options.partial
    )
    print(markdown({"rows": rows}))


def markdown(result: dict[str, Any]) -> str:
    """Every point of the three sweeps."""
    head = ["k", "parameters", "rows", "k backward passes ÷ plain step", "Steer ÷ plain step", "Steer ÷ passes"]
    lines = [
        [
            str(row["components"]),
            f"{row['parameters'] / 1e6:.1f} M",
            str(row["rows"]),
            *(f"{row[key]:.2f}" for key in ("bare to plain", "steer to plain", "steer to bare")),
        ]
        for row in result["rows"]
    ]
    return common.table(head, lines)


if __name__ == "__main__":
    main()
