"""Continual learning: five tasks of two digits each, one after the other, with a memory of ten images per digit.

python examples/recipes/continual.py        # writes results/continual.json in about a minute
"""

import torch
from compare import compare, digits, weighted
from torch import nn
from torch.nn.functional import cross_entropy

from steer_optim import Steer, SteeredOptimizer, Sum, Weighting
from steer_optim.contrib import AGEM

METHODS = {
    "plain sum": Sum(),
    "`3 * memory + current`": weighted("memory"),
    "`5 * memory + current`": weighted("memory", 5),
    '`Steer("memory")`': Steer("memory"),
    '`Steer("memory", gain=2)`': Steer("memory", gain=2),
    '`AGEM("memory")`': AGEM("memory"),
    "current task alone": Weighting(lambda G: torch.tensor([1.0, 0.0])),
}


def train(rule, *, steps):
    images, classes = digits(held_out=False)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule)
    memory = torch.tensor([], dtype=torch.long)  # indices of the images that are kept
    for task in range(5):
        own = [(classes == digit).nonzero()[:, 0] for digit in (2 * task, 2 * task + 1)]
        mine = torch.cat(own)
        for _ in range(steps):

            def loss(kept):
                batch = kept[torch.randint(len(kept), (32,))]
                return cross_entropy(model(images[batch]), classes[batch])

            optimizer.zero_grad()
            optimizer.backward_components({"current": loss(mine), "memory": loss(memory) if len(memory) else None})
            optimizer.step()
        memory = torch.cat([memory, *(some[:10] for some in own)])
    images, classes = digits(held_out=True)
    with torch.no_grad():
        right = (model(images).argmax(1) == classes).float()
    groups = {"all": classes >= 0, "first four tasks": classes < 8, "last task": classes >= 8}
    return {f"{name}, %": 100 * right[group].mean().item() for name, group in groups.items()}


if __name__ == "__main__":
    compare(__file__, train, METHODS, steps=300)
