"""The budgets of speed and memory: what was promised, and what the newest results say.

A row holds wherever it was measured: the worst model decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import common, steering_cost
from benchmarks.steering_cost import REFRESH
from benchmarks.variants import BY_TENSOR, FLATTENED, PLAIN, STEER

Row = tuple[str, str, str, bool | None]  # budget, measured, the benchmark that says so, whether it is met
NOT_MEASURED = "not measured yet"
PASSES = {2: 1.05, 3: 1.05}
AVERAGE = {10: 1.06, 50: 1.01}
APART = ("few rows", "tiny tensors")  # models with budgets of their own


def markdown() -> str:
    """A row per budget."""
    words = {True: "yes", False: "no", None: "–"}
    rows = [
        [budget, measured, f"`python -m benchmarks.{name}`", words[met]]
        for budget, measured, name, met in every_budget()
    ]
    return common.table(["budget", "measured", "command", "met"], rows)


def every_budget() -> Iterator[Row]:
    cost, memory = common.newest("steering_cost"), common.newest("steering_memory")
    yield from _exact(cost)
    yield from _disjoint(cost, memory)
    yield from _memory(memory)
    yield from _refresh(cost)
    yield _syncs(common.newest("real_size_full"), common.newest("host_reads"))
    yield from _losses(common.newest("losses_cost"))
    yield _vgs_step(common.newest("vgs_step"))


def _ratios(cost: Any, numerator: str, denominators: tuple[str, ...], k: int, graphs: str = "one") -> dict[str, float]:
    """By model: the time of one variant over that of the fastest of others."""

    def time(model: str, name: str) -> float | None:
        return steering_cost.value(cost, model, k, name, "ratio to plain", graphs)

    found = {}
    for model, components in steering_cost.settings(cost, graphs) if cost else ():
        top, below = time(model, numerator), [x for name in denominators if (x := time(model, name)) is not None]
        if components == k and top is not None and below and model not in APART:
            found[model] = top / min(below)
    return found


def _list(values: dict[str, float], form: str = ".2f", unit: str = "") -> str:
    return ", ".join(f"{name} {value:{form}}{unit}" for name, value in values.items()) or NOT_MEASURED


def _exact(cost: Any) -> Iterator[Row]:
    for k, limit in PASSES.items():
        rows = {
            model: steering_cost.value(cost, model, components, STEER, "ratio to bare backward passes")
            for model, components in (steering_cost.settings(cost, "one") if cost else ())
            if components == k and model not in APART
        }
        found = {model: value for model, value in rows.items() if value is not None}
        met = max(found.values()) <= limit if found else None
        yield f"exact steering ≤ {limit:.2f} × its {k} backward passes", _list(found), "steering_cost", met
    for budget, model, variant, limit in (
        ("17 M parameters and 192 rows: ≤ 1.08 × its 2 backward passes", "few rows", STEER, 1.08),
        ("20,000 tensors of 16 elements: ≤ 3 × the 2 backward passes", "tiny tensors", STEER, 3.0),
        ("the same with `scope='tensor'`: ≤ 8 ×", "tiny tensors", BY_TENSOR, 8.0),
    ):
        ratio = steering_cost.value(cost, model, 2, variant, "ratio to bare backward passes") if cost else None
        met = ratio <= limit if ratio is not None else None
        yield budget, NOT_MEASURED if ratio is None else f"{ratio:.2f}", "steering_cost", met
    for k in PASSES:
        pairs = {
            row["model"]: row["quartiles to TorchJD"]
            for row in (cost["rows"] if cost else [])
            if row["components"] == k and row["graphs"] == "one" and "quartiles to TorchJD" in row
        }
        shown = ", ".join(f"{m} {mid:.2f} × ({low:.2f} to {high:.2f})" for m, (low, mid, high) in pairs.items())
        met = max(low for low, _, _ in pairs.values()) <= 1 if pairs else None
        budget = f"not slower than TorchJD's best route, k = {k}: the lower quartile ≤ 1"
        yield budget, shown or NOT_MEASURED, "steering_cost", met
    for k in PASSES:
        found = {model: 1 / ratio for model, ratio in _ratios(cost, STEER, (FLATTENED,), k).items()}
        met = min(found.values()) >= 2 if found else None
        yield (
            f"2–8 × as fast as Pytorch-PCGrad, k = {k}",
            _list(found, ".1f", " ×"),
            "steering_cost",
            met,
        )


def _disjoint(cost: Any, memory: Any) -> Iterator[Row]:
    found = _ratios(cost, STEER, (PLAIN,), 2, "disjoint")
    met = max(found.values()) <= 1.05 if found else None
    yield "components of disjoint graphs, as callables: ≤ 1.05 × a plain step", _list(found), "steering_cost", met
    rows = _memory_rows(memory, STEER, graphs="disjoint")
    peaks = {row["model"]: row["ratio to plain"] for row in rows}
    met = max(peaks.values()) < 1 if peaks else None
    yield "their peak memory below a plain step's", _list(peaks, unit=" ×"), "steering_memory", met


def _memory_rows(memory: Any, variant: str, *, graphs: str = "one") -> list[dict[str, Any]]:
    rows = memory["rows"] if memory else []
    return [row for row in rows if row["variant"] == variant and row["graphs"] == graphs]


def _memory(memory: Any) -> Iterator[Row]:
    rows = _memory_rows(memory, STEER)
    sets = {f"{row['model']} (k = {row['components']})": row["sets over plain"] for row in rows}
    met = all(row["sets over plain"] <= 1.05 * (row["components"] - 1) for row in rows) if rows else None
    yield "memory of exact steering: (k − 1) sets of gradients + 5 %", _list(sets, "+.2f"), "steering_memory", met
    rows = (common.newest("replica_memory") or {"rows": []})["rows"]
    sets = {f"R = {row['replicas']}, k = {row['components']}": row["sets over plain"] for row in rows}
    met = all(row["sets over plain"] <= row["k/R"] + 0.05 for row in rows) if rows else None
    yield "under DDP with R replicas: one set + k/R + 5 %", _list(sets, "+.2f", " over one"), "replica_memory", met


def _refresh(cost: Any) -> Iterator[Row]:
    for n in REFRESH:
        found = {
            f"{model} (k = {k})": ratio
            for k in (2, 3)
            for model, ratio in _ratios(cost, f"{STEER}, refresh_every={n}", (PLAIN,), k).items()
        }
        met = max(found.values()) <= AVERAGE[n] if found else None
        yield f"`refresh_every={n}` ≤ {AVERAGE[n]:.2f} × a plain step, on average", _list(found), "steering_cost", met


def _syncs(real: Any, reads: Any) -> Row:
    budget = "no host syncs of a step on a GPU"
    if real is None and reads is not None:
        found = max(row["reads"] for row in reads["rows"])
        return budget, f"{found} host reads, counted on a CPU; not measured on a GPU", "host_reads", None
    rows = [row for row in real["rows"] if "own syncs" in row and row["variant"] != "standard"] if real else []
    found = {row["variant"]: row["own syncs"] for row in rows}
    met = max(found.values()) == 0 if found else None
    return budget, _list(found, "d"), "real_size", met


def _losses(losses: Any) -> Iterator[Row]:
    large = [row for row in losses["rows"] if row["vocabulary"] > 150_000] if losses else []
    both = [row for row in large if "peak ratio" in row]
    for head, limit in (("trained", 10), ("frozen", 30)):
        found = {f"N = {row['tokens']}": 1 / row["peak ratio"] for row in both if row["head"] == head}
        met = found["N = 1024"] >= limit if "N = 1024" in found else None
        yield (
            f"losses, V = 152k, N = 1024, {head} head: peak ≤ 1/{limit} of the eager version's",
            _list(found, ".1f", " × less"),
            "losses_cost",
            met,
        )
    grown = {}
    for head in ("trained", "frozen"):
        peaks = {row["tokens"]: row["chunked"]["peak"] for row in large if row["head"] == head}
        if len(peaks) > 1:
            grown[f"{head}, N = {min(peaks)} to {max(peaks)}"] = peaks[max(peaks)] / peaks[min(peaks)]
    met = max(grown.values()) <= 1.05 if grown else None
    yield "that peak does not grow with N", _list(grown, unit=" ×"), "losses_cost", met
    times = {f"{row['head']}, N = {row['tokens']}": row["time ratio"] for row in both}
    met = max(times.values()) <= 1.1 if times else None
    yield "their time ≤ 1.1 × the eager version's", _list(times), "losses_cost", met


def _vgs_step(result: Any) -> Row:
    rows = result["rows"] if result else []
    found = {f"{row['setting']}, {row['variant']}": row["ratio"][1] for row in rows if row["variant"] != "standard"}
    shown = {name: ratio for name, ratio in found.items() if "known" not in name and "=50" not in name}
    exact = [row["ratio"][1] for row in rows if row["variant"] == "VGS"]
    met = max(exact) <= 1.15 if exact else None
    return "a VGS training step ≤ 1.15 × a standard one, rollout included", _list(shown), "vgs_step", met
