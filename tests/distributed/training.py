"""The small model that is trained here by one process and by several, and what is compared afterwards."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steer_optim import Steer, SteeredOptimizer
from steer_optim.rules import Rule

ROWS = 12  # of the whole batch: as many for each of 2, 3 or 4 replicas, and for each micro-batch of theirs


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(100 + step)
    return torch.randn(ROWS, 4).to(dtype)


def share(x: Tensor, parts: int | None = None, index: int | None = None) -> Tensor:
    """The rows of one replica, or of one micro-batch."""
    return x.chunk(parts or dist.get_world_size())[dist.get_rank() if index is None else index]


def components(output: Tensor) -> dict[str, Tensor]:
    """Means over rows, of which the first two conflict."""
    std = output.square().mean(0).sum()
    return {"std": std, "vis": -0.5 * std + output[:, 0].mean(), "lp": 0.1 * output.exp().mean()}


def steered(model: nn.Module, rule: Rule | None = None, lr: float = 0.05, **options) -> SteeredOptimizer:
    """With an inner optimizer that makes much of small differences."""
    inner = torch.optim.AdamW(model.parameters(), lr=lr)
    return SteeredOptimizer(inner, rule or Steer(toward="vis", gain=0.5), **options)


def train(
    model: nn.Module,
    optimizer: SteeredOptimizer,
    rows: Callable[[Tensor], Tensor] = share,
    steps: Iterable[int] = range(4),
) -> None:
    for step in steps:
        optimizer.zero_grad()
        optimizer.backward_components(components(model(rows(batch(step)))))
        optimizer.step()


def train_alone(rule: Rule | None = None, steps: Iterable[int] = range(4), **options) -> nn.Sequential:
    """What comes out of one process with the whole batch."""
    model = make_model()
    train(model, steered(model, rule, data_parallel=False, **options), rows=lambda x: x, steps=steps)
    return model


def whole(tensors: Iterable[Tensor]) -> Tensor:
    """Some tensors end to end, float64, gathered where they are sharded."""
    return torch.cat([getattr(t, "full_tensor", lambda t=t: t)().detach().double().flatten() for t in tensors])


def assert_trained_alike(model: nn.Module, alone: nn.Module, tolerance: float = 1e-13) -> None:
    """The same parameters as in one process, and the same bits in every process.

    Means over replicas are summed in another order: a few roundings of float64 (1e-16), which Adam makes more of where
    a gradient is small.
    """
    found, expected = whole(model.parameters()), whole(alone.parameters())
    assert_same_bits(found)
    assert_close(found, expected, tolerance)


def assert_same_bits(found: Tensor) -> None:
    everywhere = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, found)
    assert all(torch.equal(other, found) for other in everywhere), everywhere


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-13) -> None:
    """Equal up to an error relative to the norm."""
    error = float((found - expected).norm() / expected.norm())
    assert error <= tolerance, f"relative error {error:.1e}"


OPTIONS = {
    "default": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "static views": {"static_graph": True, "gradient_as_bucket_view": True},
    "many buckets": {"bucket_cap_mb": 1e-4},
}


def replicated(option: str = "default") -> DistributedDataParallel:
    return DistributedDataParallel(make_model(), **OPTIONS[option])
