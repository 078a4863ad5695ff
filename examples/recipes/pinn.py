"""A physics-informed network: a Helmholtz equation on a square, Adam first and then LBFGS without a line search.

python examples/recipes/pinn.py        # writes results/pinn.json in about a minute
"""

import math

import torch
from compare import compare, weighted
from torch import nn

from steer_optim import Steer, SteeredOptimizer, Sum

METHODS = {  # the rule for Adam, and the one for LBFGS
    "plain sum": (Sum(), Sum()),
    "`3 * boundary + residual`": (weighted("boundary"),) * 2,
    "`100 * boundary + residual`": (weighted("boundary", 100),) * 2,
    '`Steer("boundary")`': (Steer("boundary"),) * 2,
    '`Steer("boundary")`, then `Sum()` in LBFGS': (Steer("boundary"), Sum()),
}


def solution(x):
    return (math.pi * x[:, :1]).sin() * (2 * math.pi * x[:, 1:]).sin()


def losses(model, inside, edge):
    """The equation is `laplacian(u) + u = f`, with `u` given on the boundary."""
    x = inside.requires_grad_()
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    laplacian = sum(torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i : i + 1] for i in range(2))
    f = (1 - 5 * math.pi**2) * solution(x.detach())
    return {"boundary": (model(edge) - solution(edge)).square().mean(), "residual": (laplacian + u - f).square().mean()}


def points(n):
    """Random points inside the square, and on its edges."""
    edge = 2 * torch.rand(n, 2) - 1
    edge[range(n), torch.randint(2, (n,))] = torch.randint(2, (n,)).mul(2).sub(1).float()
    return 2 * torch.rand(n, 2) - 1, edge


def error(model, n=50):
    """The relative error on a grid, in percent."""
    side = torch.linspace(-1, 1, n)
    x = torch.cartesian_prod(side, side)
    with torch.no_grad():
        return 100 * ((model(x) - solution(x)).norm() / solution(x).norm()).item()


def train(rules, *, adam, lbfgs):
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = SteeredOptimizer(torch.optim.Adam(model.parameters(), lr=2e-3), rules[0])
    for _ in range(adam):
        optimizer.zero_grad()
        optimizer.backward_components(losses(model, *points(64)))
        optimizer.step()
    after_adam, fixed = error(model), points(256)
    optimizer = SteeredOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=lbfgs), rules[1])

    def closure():
        optimizer.zero_grad()
        parts = losses(model, *fixed)
        optimizer.backward_components(parts)
        return sum(parts.values())

    optimizer.step(closure)
    return {"error after Adam, %": after_adam, "error after LBFGS, %": error(model)}


if __name__ == "__main__":
    compare(__file__, train, METHODS, adam=800, lbfgs=150)
