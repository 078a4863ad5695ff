"""What the decomposed losses cost from hidden states, a chunk at a time, beside the eager form that holds all logits.

    python -m benchmarks.losses_cost                               # all sizes
    python -m benchmarks.losses_cost --tokens 256 --heads trained  # some of them

A pass is what a step of Visual Gradient Steering does with its losses: from the hidden states of the four views to
``std``, ``vis`` and ``lp``, and one backward pass of each, to the student's hidden states and, if it is trained, to
its head. Time and the peak over the inputs are those of processes of their own, which take turns. Linux only.

Dimensions: ``N`` tokens, ``V`` vocabulary entries, ``d`` hidden size.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from steer_optim.vlm import DecomposedDistillation, Head, HiddenStates

WIDTH = 256
VOCABULARIES, TOKENS, HEADS, WAYS = (
    (32_000, 151_936),
    (256, 512, 1024, 2048),
    ("trained", "frozen"),
    ("eager", "chunked"),
)
# The eager form holds some 25 (N, V) tensors in float32.
EAGER_BYTES_PER_ENTRY = 25 * 4


def make_pass(N: int, V: int, head: str, way: str) -> Callable[[], object]:
    """One forward pass of the losses and a backward pass of every component."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    method, mask_BT = DecomposedDistillation("vgs", lam=0.01), torch.ones(1, N, dtype=torch.bool)
    teacher_head = Head(normal(V, WIDTH) / WIDTH**0.5)
    student_head = Head((teacher_head.weight_Vd + 0.02 * normal(V, WIDTH)).requires_grad_(head == "trained"))
    seen_Nd, blind_Nd = normal(1, N, WIDTH), normal(1, N, WIDTH)
    text_Nd = seen_Nd + 0.5 * blind_Nd
    states = {}
    for name, x in (("student", seen_Nd), ("student_text", text_Nd)):
        states[name] = HiddenStates((x + 0.1 * normal(1, N, WIDTH)).requires_grad_(), student_head)
    states |= {"teacher": HiddenStates(seen_Nd, teacher_head), "teacher_text": HiddenStates(text_Nd, teacher_head)}

    def run() -> None:
        views = states if way == "chunked" else {name: view.logits() for name, view in states.items()}
        components = list(method(views, mask_BT).values())
        del views  # only what the graph needs is kept
        for i, component in enumerate(components):
            component.backward(retain_graph=i < len(components) - 1)

    return run


def measure_here(N: int, V: int, head: str, way: str) -> dict[str, float]:
    """Seconds and peak bytes over the inputs, in this process."""
    make_pass(8, 100, head, way)()  # imports and first allocations
    run, seconds = make_pass(N, V, head, way), []

    def timed() -> None:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)

    return {"peak": common.peak_over_resident(timed), "seconds": seconds[0]}


def measure(N: int, V: int, head: str, *, repeats: int, eager_gib: float) -> dict[str, Any]:
    """The peak of either way, and the median of its times."""
    ways = [way for way in WAYS if way != "eager" or eager_gib * 2**30 > N * V * EAGER_BYTES_PER_ENTRY]

    def child(way: str, **options: bool) -> Any:
        return common.in_child("benchmarks.losses_cost", "--one", str(N), str(V), head, way, **options)

    peaks = {way: child(way, exact_peak=True)["peak"] for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            seconds[way].append(child(way)["seconds"])
    row: dict[str, Any] = {"tokens": N, "vocabulary": V, "head": head}
    row |= {way: {"peak": peaks[way], "seconds": statistics.median(seconds[way])} for way in ways}
    if "eager" in ways:
        row["peak ratio"] = peaks["chunked"] / peaks["eager"]
        row["time ratio"] = common.ratio(seconds["chunked"], seconds["eager"])
    return row


def markdown(result: dict[str, Any]) -> str:
    """A row per size."""
    head = ["V", "N", "head", "eager, MiB", "chunked, MiB", "peak, eager ÷ chunked", "time, chunked ÷ eager"]
    rows = []
    for row in result["rows"]:
        eager = row.get("eager")
        rows.append(
            [
                f"{row['vocabulary']:,}",
                str(row["tokens"]),
                row["head"],
                f"{eager['peak'] / common.MIB:,.0f}" if eager else "not run",
                f"{row['chunked']['peak'] / common.MIB:,.0f}",
                f"{1 / row['peak ratio']:.1f}" if eager else "–",
                f"{row['time ratio']:.2f}" if eager else "–",
            ]
        )
    return common.table(head, rows)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--vocabularies", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--repeats", type=int, default=2, help="processes per size and way")
    parser.add_argument("--eager-gib", type=float, default=16, help="memory up to which the eager form is run")
    parser.add_argument("--one", nargs=4, metavar=("N", "V", "HEAD", "WAY"), help="measure in this process")
    options = parser.parse_args()
    common.use_one_core()
    if options.one:
        N, V, head, way = options.one
        print(json.dumps(measure_here(int(N), int(V), head, way)))
        return
    rows = []
    for V in options.vocabularies:
        for N in options.tokens:
            for head in options.heads:
                rows.append(measure(N, V, head, repeats=options.repeats, eager_gib=options.eager_gib))
                print(rows[-1], flush=True)
    result = {"width": WIDTH, "repeats": options.repeats, "rows": rows}
    common.write("losses_cost", result, options.results, partial=options.partial)
    print(markdown(result))


if __name__ == "__main__":
    main()
