"""Fine-tuning with a KL to the model that it started from: a reader of upright digits learns to read rotated ones.

python examples/recipes/finetune_kl.py        # writes results/finetune_kl.json in about a minute
"""

import copy

import torch
from compare import compare, digits, weighted
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from steer_optim import Steer, SteeredOptimizer, Sum, Weighting

METHODS = {
    "plain sum": Sum(),
    "`3 * kl + task`": weighted("kl"),
    '`Steer("kl")`': Steer("kl"),
    "`3 * task + kl`": weighted("task"),
    '`Steer("task")`': Steer("task"),
    "task alone": Weighting(lambda G: torch.tensor([1.0, 0.0])),
}


def rotated(images):
    return images.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)


def pretrain(images, classes, steps):
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        cross_entropy(model(images[batch]), classes[batch]).backward()
        optimizer.step()
    return model


def train(rule, *, steps):
    images, classes = digits(held_out=False)
    model = pretrain(images, classes, steps)
    reference = copy.deepcopy(model).requires_grad_(False)
    anchors = images[torch.randperm(len(images))[:100]]  # upright images without labels
    optimizer = SteeredOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), rule)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        some = anchors[torch.randint(len(anchors), (64,))]
        kept, now = reference(some).log_softmax(1), model(some).log_softmax(1)
        optimizer.zero_grad()
        optimizer.backward_components(
            {
                "task": cross_entropy(model(rotated(images[batch])), classes[batch]),
                "kl": kl_div(now, kept, reduction="batchmean", log_target=True),
            }
        )
        optimizer.step()
    images, classes = digits(held_out=True)

    def accuracy(images):
        with torch.no_grad():
            return 100 * (model(images).argmax(1) == classes).float().mean().item()

    return {"rotated, %": accuracy(rotated(images)), "upright, %": accuracy(images)}


if __name__ == "__main__":
    compare(__file__, train, METHODS, steps=800)
