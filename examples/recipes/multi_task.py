"""Two tasks on a shared trunk: two overlaid digits, of which one head reads the left and one the right.

python examples/recipes/multi_task.py        # writes results/multi_task.json in about a minute
"""

import torch
from compare import compare, digits, weighted
from torch import nn
from torch.nn.functional import cross_entropy
from torchjd.aggregation import UPGradWeighting

from steer_optim import PCGrad, Steer, Steering, Sum, Weighting

METHODS = {  # the rule, what is steered, and whether the losses have log-variances
    "plain sum": (Sum(), "trunk", False),
    "`3 * left + right`": (weighted("left"), "trunk", False),
    '`Steer("left")`, trunk only': (Steer("left"), "trunk", False),
    '`Steer("left")`, trunk and heads': (Steer("left"), "all", False),
    "`PCGrad()`, trunk only": (PCGrad(), "trunk", False),
    "`Weighting(UPGradWeighting())`, trunk only": (Weighting(UPGradWeighting()), "trunk", False),
    "log-variances, plain sum": (Sum(), "trunk", True),
    '`Steer("left")`, log-variances outside': (Steer("left"), "trunk", True),
    '`Steer("left")`, log-variances inside': (Steer("left"), "all", True),
}


def pairs(n, *, held_out):
    """Images of 8 x 12 pixels on which two digits overlap by half, and the classes of both."""
    images, classes = digits(held_out=held_out)
    left, right = torch.randint(len(images), (2, n))
    canvas = torch.zeros(n, 8, 12)
    canvas[:, :, :8] = images[left].view(n, 8, 8)
    canvas[:, :, 4:] = torch.maximum(canvas[:, :, 4:], images[right].view(n, 8, 8))
    return canvas.flatten(1), {"left": classes[left], "right": classes[right]}


def train(method, *, steps):
    rule, steered, uncertain = method
    trunk = nn.Sequential(nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    heads = nn.ModuleDict({"left": nn.Linear(32, 10), "right": nn.Linear(32, 10)})
    log_variances = nn.ParameterDict({"left": torch.zeros(()), "right": torch.zeros(())})
    everything = [*trunk.parameters(), *heads.parameters(), *log_variances.parameters()]
    optimizer = torch.optim.Adam(everything, lr=2e-3)
    steering = Steering(trunk.parameters() if steered == "trunk" else everything, rule)
    angles = []
    for _ in range(steps):
        x, targets = pairs(128, held_out=False)
        features = trunk(x)
        losses = {name: cross_entropy(heads[name](features), targets[name]) for name in targets}
        if uncertain:
            losses = {name: loss * (-log_variances[name]).exp() + log_variances[name] for name, loss in losses.items()}
        optimizer.zero_grad()
        geometry = steering.backward_components(losses)
        angles.append(geometry.angle("left", "right"))
        optimizer.step()
    torch.manual_seed(0)
    x, targets = pairs(5000, held_out=True)
    with torch.no_grad():
        features = trunk(x)
    right = {name: (heads[name](features).argmax(1) == target).float() for name, target in targets.items()}
    scores = {f"{name}, %": 100 * hits.mean().item() for name, hits in right.items()}
    return {**scores, "mean angle, °": torch.stack(angles).mean().item()}


if __name__ == "__main__":
    compare(__file__, train, METHODS, steps=800)
