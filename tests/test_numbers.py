"""What the numbers are good for: half precision, components that cancel, gradients beyond the squares of float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import RULES
from steering import assert_close, clear, flat_grad, steered
from torch import Tensor, nn

from steer_optim import VGS, Steer, SteeredOptimizer, Sum, Weighting

SIZES = [1000, 5000, 100_000]  # end to end with others, by itself, in several pieces


def linear(p: nn.Parameter, *gradients: Tensor) -> dict[str, Tensor]:
    """Components with the given gradients."""
    return {f"g{i}": (p.double() * g.double()).sum() for i, g in enumerate(gradients)}


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_combined_wide_and_rounded_once(n, ratio, dtype):
    """So that a component that is much smaller than the others loses no more than the update's last bit does."""
    p = nn.Parameter(torch.zeros(n, dtype=dtype))
    target = torch.randn(n).to(dtype)
    others = [(ratio * torch.randn(n)).to(dtype) for _ in range(2)]
    rule = Steer("g0", preserve_norm=False)
    geometry = steered([p], rule).backward_components(linear(p, target, *others))
    J = torch.stack([g.double() for g in (target, *others)])
    exact = geometry.weights @ J
    # One rounding to half of the last bit, of what float32 combined in five operations: 6e-8 of the parts in each.
    rounding = torch.finfo(dtype).eps / 2
    wide = 3e-7 * (geometry.weights.abs() @ J.abs())
    assert ((p.grad.double() - exact).abs() <= rounding * (exact.abs() + wide) + wide).all()
    # The bound of the docs: what is promised of the progress holds up to the rounding of the update.
    g = target.double()
    progress = p.grad.double() @ g / (g @ g)
    assert progress >= 1 - rounding * exact.norm() / g.norm() - 1e-6


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("left", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("rule", [Steer("g0"), Steer("g0", project="always"), Sum()], ids=repr)
def test_lengths_of_components_that_cancel(n, left, rule):
    """``b = -a`` and a little more, in float32."""
    p = nn.Parameter(torch.zeros(n))
    a = torch.randn(n)
    b = left * torch.randn(n) - a
    geometry = steered([p], rule).backward_components(linear(p, a, b))
    length = (a.double() + b.double()).norm()
    assert_close(geometry.sum_norm, length, 0.01)
    assert_close(geometry.update_norm, length, 0.01)
    assert_close(flat_grad([p]).norm(), length, 0.01)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("left", [1e-2, 1e-4])
def test_the_denominator_of_eta_may_cancel(n, left):
    p = nn.Parameter(torch.zeros(n))
    vis = torch.randn(n)
    std = left * torch.randn(n) - 2 * vis
    values = linear(p, std, vis)
    steered([p], VGS(2.0)).backward_components({"std": values["g0"], "vis": values["g1"]})
    assert_close(flat_grad([p]).norm(), std.double().norm(), 0.01)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("scale", [1e18, 1e25, 1e-18, 1e-25, 1e-36])
@pytest.mark.parametrize("rule", [RULES["Steer"], RULES["PCGrad"], RULES["VGS"]], ids=["Steer", "PCGrad", "VGS"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_gradients_whose_squares_float32_does_not_hold_are_steered(n, scale, rule, scope):
    """Where float32 holds the gradients themselves: a float16 loss scale of 2^16 is far from it."""
    updates = []
    for factor in (1.0, scale):
        p = nn.Parameter(torch.zeros(n))
        random = torch.Generator().manual_seed(0)
        a = torch.randn(n, generator=random)
        b = torch.randn(n, generator=random) - a
        values = linear(p, *(factor * g for g in (a, b)))
        optimizer = steered([p], rule, scope=scope)
        geometry = optimizer.backward_components({"std": values["g0"], "vis": values["g1"]})
        assert geometry.G.isfinite().all()
        updates.append((geometry.weights, flat_grad([p])))
    assert_close(updates[1][0], updates[0][0], 1e-4)  # the second is of products in float64
    # Elements far below 1e-38 have fewer bits.
    assert_close(updates[1][1] / scale, updates[0][1], 1e-4 if scale > 1e-30 else 1e-2)


@given(st.floats(0, 1), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**32 - 1))
def test_float32_is_good_to_a_thousandth_at_any_angle(cosine, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 5000, generator=random, dtype=torch.float64)
    across = b - (a @ b) / (a @ a) * a
    b = -(cosine * a / a.norm() + (1 - cosine**2) ** 0.5 * across / across.norm()) * a.norm()
    a, b = a.to(dtype), b.to(dtype)
    p = nn.Parameter(torch.zeros(5000, dtype=dtype))
    geometry = SteeredOptimizer(torch.optim.SGD([p]), Steer("g0")).backward_components(linear(p, a, b))
    exact = (a.double() + b.double()).norm()
    clear([p])
    # Down to a ten millionth of the parts, where the squares of float64 end.
    assert abs(geometry.sum_norm - exact) <= 1e-3 * exact + 1e-7 * a.norm()


@pytest.mark.parametrize("degrees", [175.0, 178.0])
def test_gradients_of_like_elements_are_added_to_a_thousandth(degrees):
    """The roundings of float32 sums go to one side."""
    n, half = 2**16, torch.tensor(degrees).deg2rad() / 2
    random = torch.Generator().manual_seed(0)
    along, across = 1 + 1e-3 * torch.randn(2, n, generator=random)
    across[::2] *= -1
    a, b = half.cos() * along + half.sin() * across, half.cos() * along - half.sin() * across
    p = nn.Parameter(torch.zeros(n))
    geometry = SteeredOptimizer(torch.optim.SGD([p]), Steer("g0")).backward_components(linear(p, a, b))
    exact = (a.double() + b.double()).norm()
    assert abs(geometry.sum_norm - exact) <= 1e-3 * exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_half_precision_is_combined_wide_and_rounded_once(dtype):
    weight, ids = nn.Parameter(torch.ones(4, 500, dtype=dtype)), torch.tensor([0, 2])
    rows = nn.functional.embedding(ids, weight, sparse=True)
    a, b = torch.randn(2, 2, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    losses = {"a": (rows.float() * a).sum(), "b": (rows.float() * b * 100).sum()}
    geometry = SteeredOptimizer(torch.optim.SGD([weight]), Weighting(lambda G: torch.tensor([1.1, 0.013])))
    weights = geometry.backward_components(losses, retain_graph=True).weights
    gradients = [
        torch.autograd.grad(loss, [weight], retain_graph=True)[0].to_dense().double() for loss in losses.values()
    ]
    exact = sum(w * g for w, g in zip(weights, gradients, strict=True))
    assert torch.equal(weight.grad.to_dense(), exact.float().to(dtype))


def test_losses_in_half_precision_are_added_up_wide():
    x = nn.Parameter(torch.ones(1))
    optimizer = steered([x], Sum())
    for i in range(512):
        geometry = optimizer.backward_components({"a": (1.36 * x).bfloat16().sum()}, accumulate=i < 511)
    assert geometry.losses.tolist() == [512 * 1.359375]


@pytest.mark.parametrize("n", [2, 70_000])
@pytest.mark.parametrize("rule", [Steer("g0"), RULES["PCGrad"], Steer("g0", preserve_norm=False)], ids=repr)
def test_weights_beyond_float32_of_gradients_that_all_but_vanish(n, rule):
    """As of a cross-entropy that is fitted: its gradient has a norm of 5e-42, and the weight is 2e39."""
    p = nn.Parameter(torch.zeros(n))
    target, other = torch.zeros(n), torch.zeros(n)
    target[:2] = torch.tensor([4e-42, -4e-42])
    other[:2] = torch.tensor([-0.02, 0.01])
    geometry = steered([p], rule).backward_components(linear(p, target, other))
    assert p.grad.isfinite().all()
    # The gradients themselves have one or two digits.
    assert_close(flat_grad([p]).norm(), geometry.update_norm, 0.05)
