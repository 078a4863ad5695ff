"""What steering costs: step time against a plain step, the bare backward passes, TorchJD and Pytorch-PCGrad.

    python -m benchmarks.steering_cost                             # all of it
    python -m benchmarks.steering_cost --models mlp --repeats 5    # some of it
    python -m benchmarks.steering_cost --device cuda               # larger models on a GPU; a minute

A step is the forward pass, the gradients and AdamW. Components of one graph share a forward pass; those of disjoint
graphs have one each. A step with ``refresh_every=N`` is exact once and stale ``N - 1`` times: the two are measured, and
weighed. On a GPU matrix products are in TF32.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks import common, variants, workloads
from benchmarks.variants import AUTOGRAM, BARE, BY_TENSOR, FLATTENED, OWN_PCGRAD, PEERS, PLAIN, STALE, STEER, TORCHJD

REFRESH = (10, 50)
DISJOINT = (PLAIN, STEER, *TORCHJD, FLATTENED)
TINY = (PLAIN, BARE, STEER, BY_TENSOR, STALE)  # the others take minutes for a step of 20,000 tensors
README = (PLAIN, BARE, STEER, OWN_PCGRAD, *(f"{STEER}, refresh_every={n}" for n in REFRESH), *TORCHJD, FLATTENED)


SWEPT = ("transformer", "mlp", "adapters")  # the others are measured for two components of one graph


def measure(model: str, k: int, *, disjoint: bool = False, repeats: int, device: str = "cpu") -> list[dict[str, Any]]:
    """A row per variant."""
    names = DISJOINT if disjoint else TINY if model == "tiny tensors" else variants.EVERY
    made = variants.make(workloads.make(model, device), k, names, disjoint=disjoint)
    if device != "cpu":
        made = {name: variant for name, variant in made.items() if name not in PEERS or _runs(name, variant)}
    times = common.take_turns(
        {name: variant.step for name, variant in made.items()},
        repeats=repeats,
        synchronise=torch.cuda.synchronize if device != "cpu" else bool,
    )
    for n in REFRESH if STALE in times else ():
        pairs = zip(times[STEER], times[STALE], strict=True)
        times[f"{STEER}, refresh_every={n}"] = [(exact + (n - 1) * stale) / n for exact, stale in pairs]
    times.pop(STALE, None)
    routes = [times[name] for name in (*TORCHJD, AUTOGRAM) if name in times]
    best = min(routes, key=statistics.median, default=None)
    return [
        {
            "model": model,
            "graphs": "disjoint" if disjoint else "one",
            "components": k,
            "variant": name,
            "seconds": statistics.median(seconds),
            "ratio to plain": common.ratio(seconds, times[PLAIN]),
            "quartiles to plain": common.quartiles(seconds, times[PLAIN])[::2],
            **(_to_bare(seconds, times[BARE]) if BARE in times else {}),
            **({"quartiles to TorchJD": common.quartiles(seconds, best)} if best and name == STEER else {}),
        }
        for name, seconds in times.items()
    ]


def _runs(name: str, variant: variants.Variant) -> bool:
    """Whether a peer can make a step on this device; one that cannot costs no other its result."""
    try:
        variant.step()
    except RuntimeError as error:
        print(f"{name} is left out: {error}", flush=True)
        return False
    return True


def _to_bare(seconds: list[float], bare: list[float]) -> dict[str, Any]:
    low, median, high = common.quartiles(seconds, bare)
    return {"ratio to bare backward passes": median, "quartiles to bare": [low, high]}


def settings(result: dict[str, Any], graphs: str) -> list[tuple[str, int]]:
    """The models and numbers of components that were measured on such graphs."""
    rows = (row for row in result["rows"] if row.get("graphs", "one") == graphs)
    return list(dict.fromkeys((row["model"], row["components"]) for row in rows))


def value(result: dict[str, Any], model: str, k: int, variant: str, key: str, graphs: str = "one") -> float | None:
    """One number of a result; None where it was not measured."""
    wanted = (model, k, variant, graphs)
    for row in result["rows"]:
        # The first results named the variant "2 backward passes".
        name = row["variant"].replace(f"{k} backward", "k backward")
        if (row["model"], row["components"], name, row.get("graphs", "one")) == wanted:
            return row.get(key)
    return None


def table(
    result: dict[str, Any], names: tuple[str, ...], columns: list[tuple[str, int]], *, key: str, **at: str
) -> str:
    """A Markdown table of one ratio, of the variants that were measured anywhere."""
    rows = []
    for name in names:
        values = [value(result, model, k, name, key, **at) for model, k in columns]
        if any(x is not None for x in values):
            rows.append([name, *("–" if x is None else f"{x:.2f}" for x in values)])
    reference = {"ratio to plain": "plain step", "ratio to bare backward passes": "its k backward passes"}[key]
    return common.table([f"step time ÷ {reference}", *(f"{model}, k = {k}" for model, k in columns)], rows)


def markdown(result: dict[str, Any]) -> str:
    """The table that the README quotes."""
    columns = [(model, k) for model, k in settings(result, "one") if k < 4 and model != "tiny tensors"]
    return table(result, README, columns, key="ratio to plain")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(workloads.MAKE | workloads.LARGE))
    parser.add_argument("--components", nargs="+", type=int, metavar="K")
    parser.add_argument("--repeats", type=int)
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    if on_cpu:
        common.use_one_core()
    else:
        torch.set_float32_matmul_precision("high")
    components = options.components or ([2, 3, 5] if on_cpu else [2, 3])
    repeats = options.repeats or (15 if on_cpu else 9)

    result: dict[str, Any] = {"repeats": repeats, "rows": []}
    for model in options.models or (workloads.MAKE if on_cpu else workloads.LARGE):
        settings = [(k, False) for k in components] if model in SWEPT or not on_cpu else [(2, False)]
        for k, disjoint in [*settings, (2, True)] if model in SWEPT and on_cpu else settings:
            for row in measure(model, k, disjoint=disjoint, repeats=repeats, device=options.device):
                result["rows"].append(row)
                print(
                    f"{model:17} {row['graphs']:8} k={k}  {row['variant']:46} {row['seconds'] * 1e3:8.1f} ms"
                    f"  {row['ratio to plain']:5.2f} x plain"
                    f"  {row.get('ratio to bare backward passes', float('nan')):5.2f} x bare",
                    flush=True,
                )
            if not on_cpu:
                common.write("steering_cost_cuda", result, options.results, partial=options.partial)
    if on_cpu:
        common.write("steering_cost", result, options.results, partial=options.partial)
    print(markdown(result))


if __name__ == "__main__":
    main()
