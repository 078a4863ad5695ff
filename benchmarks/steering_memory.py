"""What steering takes in memory: the peak of every variant in a process of its own, in sets of gradients.

    python -m benchmarks.steering_memory

The mark is how far the resident memory rises from the forward pass up to, and without, ``optimizer.step()``: the
temporaries of an optimizer can be larger than the gradients and are no cost of steering. Before that, one whole step
with SGD warms up. The model itself and the libraries are resident before and do not count. Linux only.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks import common, variants, workloads
from benchmarks.variants import BARE, FLATTENED, OWN_PCGRAD, PEERS, PLAIN, STALE, STEER, TORCHJD

ONE = (PLAIN, BARE, STEER, OWN_PCGRAD, STALE, *PEERS)
DISJOINT = (PLAIN, STEER, *TORCHJD, FLATTENED)
COMPONENTS = (2, 3)


def peak(model: str, k: int, variant: str, *, disjoint: bool) -> dict[str, int]:
    """Bytes, in this process: the peak over what is resident before, and one set of gradients."""
    workload = workloads.make(model)
    made = variants.make(
        workload, k, [variant], disjoint=disjoint, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-6)
    )[variant]
    made.step()
    made.optimizer.zero_grad()
    return {
        "peak": common.peak_over_resident(made.backward),
        "set": workload.gradient_bytes,
    }


def measure(model: str, k: int, *, disjoint: bool, repeats: int) -> list[dict[str, Any]]:
    """A row per variant: the median of some processes, and how far they are apart."""
    rows = []
    for name in DISJOINT if disjoint else ONE:
        arguments = ("--one", model, str(k), name, "disjoint" if disjoint else "one")
        found = [common.in_child("benchmarks.steering_memory", *arguments, exact_peak=True) for _ in range(repeats)]
        peaks = sorted(f["peak"] for f in found)
        rows.append({"model": model, "graphs": arguments[-1], "components": k, "variant": name})
        rows[-1] |= {**found[0], "peak": peaks[len(peaks) // 2], "spread": peaks[-1] - peaks[0]}
    reference = {row["variant"]: row["peak"] for row in rows}
    for row in rows:
        row["sets over plain"] = (row["peak"] - reference[PLAIN]) / row["set"]
        row["ratio to plain"] = row["peak"] / reference[PLAIN]
        if BARE in reference:
            row["sets over bare"] = (row["peak"] - reference[BARE]) / row["set"]
    return rows


def markdown(result: dict[str, Any], graphs: str) -> str:
    """Sets of gradients over the peak of a plain step; for disjoint graphs the ratio of the peaks."""
    rows = [row for row in result["rows"] if row["graphs"] == graphs]
    columns = list(dict.fromkeys((row["model"], row["components"]) for row in rows))
    cells = {(row["variant"], row["model"], row["components"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        found = [cells.get((name, *column)) for column in columns]
        texts = ("–" if row is None else _cell(row, disjoint=graphs == "disjoint") for row in found)
        lines.append([name, *texts])
    unit = "peak ÷ plain step's" if graphs == "disjoint" else "sets of gradients over a plain step's peak"
    return common.table([unit, *(f"{model}, k = {k}" for model, k in columns)], lines)


def _cell(row: dict[str, Any], *, disjoint: bool) -> str:
    return f"{row['ratio to plain']:.2f}" if disjoint else f"{row['sets over plain']:+.2f}"


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["transformer", "mlp"], choices=list(workloads.MAKE))
    parser.add_argument("--repeats", type=int, default=2, help="processes per variant")
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "K", "VARIANT", "GRAPHS"), help="measure in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        model, k, variant, graphs = options.one
        print(json.dumps(peak(model, int(k), variant, disjoint=graphs == "disjoint")))
        return

    rows = []
    for model in options.models:
        for k, disjoint in [*((k, False) for k in COMPONENTS), (2, True)]:
            for row in measure(model, k, disjoint=disjoint, repeats=options.repeats):
                rows.append(row)
                print(
                    f"{model:12} {row['graphs']:8} k={k}  {row['variant']:46} {row['peak'] / common.MIB:8.1f} MiB"
                    f" (± {row['spread'] / 2 / common.MIB:.1f})  {row['ratio to plain']:5.2f} x plain"
                    f"  {row['sets over plain']:+.2f} sets",
                    flush=True,
                )
    common.write(
        "steering_memory", {"repeats": options.repeats, "rows": rows}, options.results, partial=options.partial
    )


if __name__ == "__main__":
    main()
