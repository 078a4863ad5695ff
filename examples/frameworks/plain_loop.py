"""The training that the other files of this directory hand to a framework, written as a plain loop.

A regression with three losses that disagree, and what a real loop has: accumulation over two micro-batches, with one
left over at the end of an epoch, clipping, a scheduler, and a rule with a memory. In float64, where a difference
between two runs that exceeds rounding is a mistake.

    python examples/frameworks/plain_loop.py
"""

import torch
from torch import nn

from steer_optim import GradVac, SteeredOptimizer
from steer_optim.monitor import Monitor

EPOCHS, BATCH, ACCUMULATE, CLIP = 2, 4, 2, 0.5
SAMPLES = 5 * BATCH  # three steps an epoch, the last on a single micro-batch


def make_dataset():
    """`SAMPLES` pairs of inputs and targets, as the dicts that `transformers` expects."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return [{"x": inputs, "labels": targets} for inputs, targets in zip(x, y, strict=True)]


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x):
        return self.layers(x)


def components(outputs, labels):
    """Three scalars that want different things of the same outputs: means over the samples of a micro-batch."""
    return {
        "fit": (outputs - labels).square().mean(),
        "total": (outputs.sum(1) + 1).square().mean(),
        "shifted": (outputs - labels.roll(1, 1)).abs().mean(),
    }


def make_optimizer(model, **options):
    """The steered optimizer, and a scheduler of it."""
    optimizer = SteeredOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), GradVac(beta=0.2), **options)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def train(*, left_over="planned"):
    """The plain loop.

    Args:
        left_over: what the last micro-batch of an epoch is divided by: the number of micro-batches that were
            `planned` for a step (Accelerate, Lightning), or the `actual` number (`transformers.Trainer`).
    """
    model = Regression()
    optimizer, scheduler = make_optimizer(model)
    monitor = Monitor()
    for _ in range(EPOCHS):
        batches = torch.utils.data.DataLoader(make_dataset(), BATCH)
        for i, batch in enumerate(batches):
            actual = min(ACCUMULATE, len(batches) - (i - i % ACCUMULATE))
            divisor = ACCUMULATE if left_over == "planned" else actual
            last = (i + 1) % ACCUMULATE == 0 or i + 1 == len(batches)
            losses = components(model(batch["x"]), batch["labels"])
            optimizer.backward_components({name: loss / divisor for name, loss in losses.items()}, accumulate=not last)
            if last:
                monitor.record(optimizer.geometry)
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return model, optimizer, monitor


if __name__ == "__main__":
    print(train()[1].geometry)
