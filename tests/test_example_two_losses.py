import importlib.util
from pathlib import Path

import pytest
import torch

from steer_optim import Steer
from steer_optim.steering import BOUND

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "two_losses.py"
    spec = importlib.util.spec_from_file_location("two_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(example, tmp_path_factory):
    out = tmp_path_factory.mktemp("two_losses") / "trajectories.png"
    runs = example.main(out)
    assert out.read_bytes().startswith(b"\x89PNG")
    return runs


def main_loss(runs, name):
    return runs[name][1]["steer/loss/main"]


def test_the_plain_sum_reaches_the_valley_and_leaves_it(runs):
    loss = main_loss(runs, "plain sum")
    lowest = int(loss.argmin())
    assert loss[lowest] < 1e-3
    assert loss[lowest:].max() > 0.25
    assert loss[-1] > 0.19


def test_the_plain_sum_settles_on_a_compromise(example, runs):
    w = runs["plain sum"][0][-1].requires_grad_()
    sum(example.losses(w).values()).backward()
    assert w.grad.norm() < 0.01  # it was 2.4 on leaving the valley


def test_the_steered_run_stays_in_the_valley(runs):
    loss = main_loss(runs, "steered")
    arrived = int((loss < 0.01).nonzero()[0])
    assert arrived < 100
    assert (loss[: arrived + 1].diff() < 0).all()
    assert loss[arrived:].max() < 0.01  # the band of the picture
    assert loss[-1] < 1e-3


def test_the_steered_run_ends_where_the_side_loss_is_lowest_in_the_valley(example, runs):
    first = torch.linspace(0.3, 3, 10_001)
    valley = torch.stack([first, 1 / first], -1)
    best = valley[example.losses(valley)["side"].argmin()]
    # Exactly in the valley nothing conflicts, and one step of the side loss leads across: 0.004 * |gradient| = 0.0093.
    torch.testing.assert_close(runs["steered"][0][-1], best, rtol=0, atol=0.01)


def test_both_begin_as_one_and_the_side_loss_pays(runs):
    plain, steered = runs["plain sum"][0], runs["steered"][0]
    assert torch.equal(plain[:40], steered[:40])  # no conflict yet: steering changes nothing
    assert runs["steered"][1]["steer/loss/side"][-1] > runs["plain sum"][1]["steer/loss/side"][-1]


def test_weights_of_earlier_steps_do_not_lead_astray(example):
    """The default rule, whose target all but vanishes in the valley."""
    exact, _ = example.train(Steer("main"))
    path, _ = example.train(Steer("main"), refresh_every=10)
    lengths = path.diff(dim=0).norm(dim=1) / 0.004
    assert lengths.max() <= BOUND * (exact.diff(dim=0).norm(dim=1) / 0.004).max()
    assert example.losses(path[-1])["main"] < 0.01  # the band of the picture
    assert (path[-1] - exact[-1]).norm() < 0.05
