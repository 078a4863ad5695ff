"""How far training in several processes is from training in one, and what travels between them.

    python -m benchmarks.parity        # writes docs/parity.md; half a minute

Four processes on the CPU (gloo) train one model in every configuration. Each takes its share of the batch, and the
parameters are compared with those of one process that has the whole batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks import common
from steer_optim import GradVac, SteeredOptimizer, holding

RESULT = Path(__file__).parents[1] / "docs" / "parity.md"
PROCESSES, STEPS, ROWS = 4, 20, 48


class Model(nn.Sequential):
    def __init__(self, dtype: torch.dtype, checkpointed: bool = False) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        self.to(dtype)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False) if self.checkpointed else super().forward(x)


def ddp(dtype: torch.dtype, checkpointed: bool = False, **options) -> nn.Module:
    return DistributedDataParallel(Model(dtype, checkpointed), **options)


def fsdp(dtype: torch.dtype, checkpointed: bool = False, replicas: int = 1, **options) -> nn.Module:
    shape, names = (replicas, PROCESSES // replicas), ("replicate", "shard")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return fully_shard(Model(dtype, checkpointed), mesh=mesh if replicas > 1 else mesh["shard"], **options)


def tensor_parallel(dtype: torch.dtype) -> nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(Model(dtype), init_device_mesh("cpu", (PROCESSES,)), plan)


def both(dtype: torch.dtype) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
    model = parallelize_module(Model(dtype), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["shard"])


# name: how the model is made, what the optimizer is told, over how many shares the batch is split, micro-batches
CONFIGURATIONS: dict[str, tuple[Callable[[torch.dtype], nn.Module], bool | None, int, int]] = {
    "DDP": (ddp, True, 4, 1),
    "DDP, `find_unused_parameters`": (lambda d: ddp(d, find_unused_parameters=True), True, 4, 1),
    "DDP, `static_graph`": (lambda d: ddp(d, static_graph=True), True, 4, 1),
    "DDP, `gradient_as_bucket_view`": (lambda d: ddp(d, gradient_as_bucket_view=True), True, 4, 1),
    "DDP, activation checkpointing": (lambda d: ddp(d, checkpointed=True), True, 4, 1),
    "DDP, 3 micro-batches": (ddp, True, 4, 3),
    "DDP, `refresh_every=3`": (ddp, True, 4, 1),
    "FSDP2": (fsdp, None, 4, 1),
    "FSDP2, `reshard_after_forward=False`": (lambda d: fsdp(d, reshard_after_forward=False), None, 4, 1),
    "FSDP2, activation checkpointing": (lambda d: fsdp(d, checkpointed=True), None, 4, 1),
    "FSDP2, 3 micro-batches": (fsdp, None, 4, 3),
    "HSDP, 2 × 2": (lambda d: fsdp(d, replicas=2), None, 4, 1),
    "tensor parallel": (tensor_parallel, False, 1, 1),
    "FSDP2 × tensor parallel, 2 × 2": (both, None, 2, 1),
    "for contrast: DDP with `data_parallel=False`": (ddp, False, 4, 1),
}


def train(
    model: nn.Module, dtype: torch.dtype, rows: Callable[[Tensor], Tensor], micro_batches: int, **options
) -> Tensor:
    """The parameters after some steps, end to end."""
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = SteeredOptimizer(inner, GradVac(beta=0.1), **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        batch = torch.randn(ROWS, 32, dtype=torch.float64, generator=generator).to(dtype)
        for i, x in enumerate(rows(batch).chunk(micro_batches)):
            output = model(x)
            a = output.square().mean(0).sum() / micro_batches
            losses = {"a": a, "b": output[:, 0].mean() / micro_batches - 0.5 * a}
            optimizer.backward_components(losses, accumulate=i < micro_batches - 1)
        optimizer.step()
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in model.parameters()])


def refresh_every(name: str) -> int:
    return 3 if "refresh_every" in name else 1


def compare(name: str, dtype: torch.dtype, alone: Tensor) -> tuple[float, bool]:
    """The largest difference to one process in any, and whether all hold the same bits."""
    make, data_parallel, shares, micro_batches = CONFIGURATIONS[name]
    share = dist.get_rank() * shares // PROCESSES
    model = make(dtype)
    options = {"data_parallel": data_parallel, "refresh_every": refresh_every(name)}
    found = train(model, dtype, lambda x: x.chunk(shares)[share], micro_batches, **options)
    everywhere = [torch.empty_like(found) for _ in range(PROCESSES)]
    dist.all_gather(everywhere, found)
    return max(float((f - alone).abs().max()) for f in everywhere), all(torch.equal(f, found) for f in everywhere)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that collectives are given, an all-reduce as what it is: a reduce-scatter and an all-gather."""
    sent: list[int] = []

    def count(collective: Callable, times: int) -> Callable:
        def run(*arguments, **options):
            sent.append(times * max(t.nbytes for t in arguments if isinstance(t, Tensor)))
            return collective(*arguments, **options)

        return run

    with (
        mock.patch.object(holding, "_COPYING", ()),
        mock.patch.object(holding, "_reduce_scatter", count(holding._reduce_scatter, 1)),
        mock.patch.object(holding, "_all_gather", count(holding._all_gather, 1)),
        mock.patch.object(dist, "all_reduce", count(dist.all_reduce, 2)),
    ):
        yield sent


def traffic(k: int) -> float:
    """What one step with ``k`` components sends, in all-reduces of the gradients."""
    p = nn.Parameter(torch.ones(2**18))
    optimizer = SteeredOptimizer(torch.optim.SGD([p], lr=0.1), GradVac(), data_parallel=True)
    with counted() as sent:
        optimizer.backward_components({str(i): (p * i).sum() for i in range(1, k + 1)})
    return sum(sent) / (2 * p.nbytes)


def work() -> tuple[dict[str, list[tuple[float, bool]]], list[tuple[int, float]]]:
    parity: dict[str, list[tuple[float, bool]]] = {name: [] for name in CONFIGURATIONS}
    for dtype in (torch.float64, torch.float32):
        alone = {
            every: train(Model(dtype), dtype, lambda x: x, 1, data_parallel=False, refresh_every=every)
            for every in (1, 3)
        }
        for name, row in parity.items():
            row.append(compare(name, dtype, alone[refresh_every(name)]))
    return parity, [(k, traffic(k)) for k in (1, 2, 3, 4)]


def report(parity: dict[str, list[tuple[float, bool]]], sent: list[tuple[int, float]]) -> str:
    lines = [
        f"| {name} | {d64:.0e} | {d32:.0e} | {'yes' if same64 and same32 else '**no**'} |"
        for name, ((d64, same64), (d32, same32)) in parity.items()
    ]
    traffic_lines = [f"| {k} | {measured:.3f} | {k} |" for k, measured in sent]
    return TEMPLATE.format(
        torch=torch.__version__,
        processes=PROCESSES,
        steps=STEPS,
        parity="\n".join(lines),
        traffic="\n".join(traffic_lines),
    )


TEMPLATE = """# Several processes against one

Written by `python -m benchmarks.parity` with torch {torch}, in {processes} processes on a CPU (gloo). A small model
trains for {steps} steps of AdamW, steered by `GradVac`. This rule has state, so a difference in one step grows in the
next. Every configuration sees the same batches as a single process.

## The same training

The largest difference of any parameter in any process from the single process. Parameters are of the order of 0.1,
where one rounding is 1e-17 in float64 and 1e-8 in float32. Means over processes are summed in a different order, and
Adam enlarges the difference if a gradient is small.

| configuration | float64 | float32 | all processes hold the same bits |
| --- | --- | --- | --- |
{parity}

The last row shows why `SteeredOptimizer` raises if `data_parallel` is left out: DDP averages only the first of several
backward passes, and the replicas drift apart without an error.

## Traffic under DDP

The traffic of a process in a step, in all-reduces of the gradients; a plain step takes one. The gradients of every
component are reduce-scattered, and only the update is all-gathered: (k + 1) / 2. Gloo has no reduce-scatter of its own
and uses an all-reduce for each: k + 1/2.

| components k | measured | k all-reduces |
| --- | --- | --- |
{traffic}

Sharded parameters (FSDP2, tensor parallel) add only the Gramian to their own k backward passes.
"""


def main() -> None:
    RESULT.write_text(report(*common.in_group(PROCESSES, work)), encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
