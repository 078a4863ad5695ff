"""The models that are trained in the benchmarks, and the components of their losses.

They stand for what decides the cost of handling gradients: many tensors of middling size, few huge ones, many small
ones beside a frozen model; few rows for each parameter; and tensors so tiny that nothing but their number counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Transformer(nn.Module):
    """Many tensors of middling size: by default 8 layers, 6.6 M parameters in 99 tensors."""

    def __init__(self, width: int = 256, depth: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, width)
        layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 512)

    def forward(self, batch: int) -> Tensor:
        tokens = torch.arange(64 * batch, device=self.head.weight.device).remainder(512).view(batch, 64)
        return self.head(self.layers(self.embedding(tokens)))


class MLP(nn.Module):
    """Few huge tensors: of 3 layers 12.6 M parameters in 6 tensors, of 4 layers 16.8 M in 8, at the usual width."""

    def __init__(self, width: int = 2048, depth: int = 3) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())))

    def forward(self, batch: int) -> Tensor:
        device = self.layers[0].weight.device
        return self.layers(torch.linspace(-1, 1, self.width * batch, device=device).view(batch, self.width))


class Adapted(nn.Linear):
    """A frozen layer with a trainable one of low rank beside it."""

    def __init__(self, width: int, rank: int = 8) -> None:
        super().__init__(width, width)
        self.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.randn(width, rank) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Adapters(nn.Module):
    """Many tiny tensors: 400 of LoRA's size, 0.8 M parameters, on a frozen residual network of 200 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapted(256) for _ in range(200))

    def forward(self, batch: int) -> Tensor:
        x = torch.linspace(-1, 1, 256 * batch, device=self.layers[0].weight.device).view(batch, 256)
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / 10
        return x


class Tiny(nn.Module):
    """Nothing but tiny tensors: 20,000 of 16 elements."""

    def __init__(self, number: int = 20_000) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.randn(16) for _ in range(number))

    def forward(self, batch: int) -> Tensor:
        return torch.stack(list(self.tensors)).tanh()


@dataclass(frozen=True)
class Workload:
    """A model and the size of its batch."""

    model: nn.Module
    batch: int

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def gradient_bytes(self) -> int:
        """The size of one gradient set."""
        return sum(p.nbytes for p in self.parameters)

    def losses(self, k: int) -> list[Tensor]:
        """``k`` components of one graph: each asks something else of another part of the output."""
        return [(part - i).square().mean() for i, part in enumerate(self.model(self.batch).chunk(k, dim=-1))]

    def disjoint(self, k: int) -> list[Callable[[], Tensor]]:
        """``k`` components of graphs that have only the parameters in common."""
        return [lambda i=i: (self.model(self.batch) - i).square().mean() for i in range(k)]


MAKE: dict[str, Callable[[], Workload]] = {
    "transformer": lambda: Workload(Transformer(), 8),
    "mlp": lambda: Workload(MLP(), 512),
    "adapters": lambda: Workload(Adapters(), 256),
    "few rows": lambda: Workload(MLP(depth=4), 192),
    "tiny tensors": lambda: Workload(Tiny(), 1),
}
# Of 200 M parameters each, and the adapters: smaller ones measure how fast a GPU is given work.
LARGE: dict[str, Callable[[], Workload]] = {
    "large transformer": lambda: Workload(Transformer(1024, 16), 64),
    "large mlp": lambda: Workload(MLP(8192), 2048),
    "adapters": MAKE["adapters"],
}


def make(name: str, device: str = "cpu") -> Workload:
    torch.manual_seed(0)
    with torch.device(device):
        return (MAKE | LARGE)[name]()
