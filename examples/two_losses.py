"""Two regressions that share two weights and disagree: where training goes with and without steering.

The main loss is satisfied by any weights whose product is one, a curved valley; the side loss wants the weights
elsewhere. The plain sum reaches the valley, is pulled out of it again, and settles on a compromise. Steered towards the
main loss it stays in the valley and ends where the side loss is lowest there: that loss pays for it.

    python examples/two_losses.py        # writes docs/images/trajectories.png in a few seconds
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from steer_optim import Steer, SteeredOptimizer, Sum, plots
from steer_optim.monitor import Monitor

X = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])  # two examples of two features
SIDE_OPTIMUM = torch.tensor([2.4, 1.6])
START = [0.35, 0.6]


def losses(w):
    """Mean squared errors, `(...)`, at weights `(..., 2)`."""
    product = w.prod(-1, keepdim=True)  # a network of two linear layers with one weight each
    return {
        "main": (product * X[:, 0] - X[:, 0]).square().mean(-1),
        "side": (w @ X.T - SIDE_OPTIMUM @ X.T).square().mean(-1),
    }


def train(rule, *, steps=1200, refresh_every=1):
    w = torch.tensor(START, requires_grad=True)
    optimizer = SteeredOptimizer(torch.optim.SGD([w], lr=0.004), rule, refresh_every=refresh_every)
    monitor, path = Monitor(), [w.tolist()]
    for _ in range(steps):
        optimizer.zero_grad()
        geometry = optimizer.backward_components(losses(w))  # instead of sum(losses(w).values()).backward()
        optimizer.step()
        monitor.record(geometry)
        path.append(w.tolist())
    return torch.tensor(path), monitor.history()


def draw(runs):
    """Paths over the contours of both losses on the left, both losses over training on the right."""
    figure = Figure(figsize=(8, 3.9), dpi=200, layout="constrained")
    axes = figure.subplot_mosaic([["map", "main"], ["map", "side"]], width_ratios=(1.35, 1))

    colours = {"main": "0.55", "side": "#009E73"}
    a, b = torch.linspace(0.1, 2.8, 240), torch.linspace(0.1, 2.3, 200)
    values = losses(torch.stack(torch.meshgrid(a, b, indexing="xy"), -1))
    axes["map"].contourf(a, b, values["main"], levels=[0, 0.01], colors="0.85")
    for name, levels in {"main": (0.1, 0.4, 1, 2, 4, 8), "side": (0.02, 0.2, 0.6, 1.2, 2, 3, 4.2)}.items():
        axes["map"].contour(a, b, values[name], levels=levels, colors=colours[name], linewidths=0.7)
    axes["map"].plot(*START, "o", color="black", markersize=6, zorder=3)
    axes["map"].annotate("start", START, xytext=(7, -10), textcoords="offset points")
    for (path, _), colour, width in zip(runs.values(), plots.COLOURS, (4, 2), strict=False):
        axes["map"].plot(*path.T, color=colour, linewidth=width)  # they begin as one: the wider shows below
        axes["map"].plot(*path[-1], "s", color=colour, markersize=7)
    axes["map"].set(xlabel="first weight", ylabel="second weight", aspect="equal")

    for name in colours:
        plots.losses({run: history for run, (_, history) in runs.items()}, component=name, axes=axes[name])
        axes[name].set(ylabel=f"{name} loss")
        axes[name].get_legend().remove()
    axes["main"].set_xlabel("")
    handles = [Line2D([], [], color=colour, linewidth=2) for colour, _ in zip(plots.COLOURS, runs, strict=False)]
    handles += [Line2D([], [], color=colour, linewidth=0.9) for colour in colours.values()]
    labels = [*runs, "main loss (grey band: below 0.01)", "side loss"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(out):
    # Near the valley, steps as long as those of the plain sum (preserve_norm) would overshoot it at a constant rate.
    runs = {"plain sum": train(Sum()), "steered": train(Steer(toward="main", preserve_norm=False))}
    draw(runs).savefig(out)
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw two conflicting losses with and without steering.")
    default = Path(__file__).parents[1] / "docs" / "images" / "trajectories.png"
    parser.add_argument("--out", type=Path, default=default, help="the picture to write")
    main(parser.parse_args().out)
