"""Rules whose relative weights are fixed: the same update from one gradient set, and the memory of a plain step."""

from collections.abc import Callable

import pytest
import torch
from properties import RULES
from steering import (
    assert_close,
    clear,
    conflicting,
    dense_gradients,
    expected_update,
    flat_grad,
    network,
    peak_bytes,
    steered,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steer_optim import VGS, GradVac, Steer, Sum, reference
from steer_optim.rules import Rule

# What is known of each: the rule, and how many components there are.
FIXED = {
    "VGS": (VGS(2.0), 2),
    "VGS with lp": (VGS(2.0), 3),
    "VGS, gamma 1": (VGS(1.0), 2),
    "Steer, never": (Steer("vis", gain=1.5, project="never"), 2),
    "Steer, never, free norm": (Steer("vis", gain=1.5, project="never", preserve_norm=False), 2),
}
EACH_FIXED = pytest.mark.parametrize(("rule", "k"), FIXED.values(), ids=FIXED)


def some(output: Tensor, rule: Rule, k: int) -> dict[str, Tensor]:
    return dict([*conflicting(output, rule).items()][:k])


@EACH_FIXED
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("way", ["tensors", "callables", "join"])
def test_the_update_is_that_of_the_definition(rule, k, order, way):
    model, batch = network(), torch.randn(8, 4).double()
    losses = dict([*some(model(batch), rule, k).items()][::order])
    expected = expected_update(lambda: losses, model.parameters(), rule)
    before = torch.randn_like(expected)
    for p, gradient in zip(model.parameters(), before.split([p.numel() for p in model.parameters()]), strict=True):
        p.grad = gradient.view_as(p).clone()
    optimizer = steered(model.parameters(), rule)
    losses = dict([*some(model(batch), rule, k).items()][::order])
    if way == "join":
        (3 * optimizer.join(losses)).backward()
        expected = 3 * expected
    elif way == "callables":
        optimizer.backward_components(
            {name: lambda loss=loss: loss for name, loss in losses.items()}, retain_graph=True
        )
    else:
        optimizer.backward_components(losses)
    assert_close(flat_grad(model.parameters()) - before, expected)


@EACH_FIXED
def test_the_geometry_has_what_decides_the_weights_and_every_norm(rule, k):
    model, batch = network(), torch.randn(8, 4).double()
    losses = dict([*some(model(batch), rule, k).items()][::-1])
    G = reference.gramian(dense_gradients(losses, model.parameters()))
    geometry = steered(model.parameters(), rule).backward_components(losses)
    assert geometry.names == tuple(losses)
    taken = ~geometry.G.isnan()
    known = torch.tensor([[a == b or "lp" not in (a, b) for a in losses] for b in losses])
    assert torch.equal(taken, known)
    assert_close(geometry.G[taken], G[taken])
    assert_close(geometry.weights, rule(G, list(losses))[0])
    assert_close(geometry.losses, torch.stack([*losses.values()]).detach())


def test_rules_whose_ratios_depend_on_the_gradients_take_a_set_for_each_component():
    model, batch = network(), torch.randn(8, 4).double()
    for rule in (
        Sum(),
        VGS(0.0),
        Steer("vis"),
        Steer("vis", project="always"),
        GradVac(),
        RULES["PCD"],
        RULES["Weighting"],
    ):
        assert rule.ratios(("std", "vis")) is None
        geometry = steered(model.parameters(), rule).backward_components(some(model(batch), rule, 2))
        assert geometry.G.isfinite().all()
    assert RULES["Steer, never"].ratios(("std", "vis", "lp")) is None


@pytest.mark.parametrize("reached", ["first", "second", "both", "neither"])
def test_parameters_that_one_component_reaches(reached):
    first, second, both = (nn.Parameter(torch.randn(5000).double()) for _ in range(3))  # more than a small tensor
    uses = {"first": [first], "second": [second], "both": [first, second], "neither": []}[reached]

    def losses() -> dict[str, Tensor]:
        std = (both**2).sum() + sum((p**3).sum() for p in uses if p is first)
        return {"std": std, "vis": -0.5 * both.sum() + sum(p.exp().sum() for p in uses if p is second)}

    parameters = [first, second, both]
    expected = expected_update(losses, parameters, VGS(2.0))
    geometry = steered(parameters, VGS(2.0)).backward_components(losses())
    assert_close(flat_grad(parameters), expected)
    assert_close(geometry.update_norm, geometry.norm("std"))
    assert all((p.grad is None) == (p is not both and not any(p is u for u in uses)) for p in parameters)


@pytest.mark.parametrize("detached", ["std", "vis", "lp"])
def test_a_component_that_reaches_nothing_is_refused_and_changes_nothing(detached):
    x, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    x.grad = torch.tensor([7.0, 7.0])
    losses = {name: (other if name == detached else x).square().sum() for name in ("std", "vis", "lp")}
    with pytest.raises(ValueError, match=f"'{detached}' is detached from every parameter"):
        steered([x], VGS(2.0)).backward_components(losses)
    assert x.grad.tolist() == [7, 7]
    x.sum().backward()  # no hook is left behind
    assert x.grad.tolist() == [8, 8]


def test_users_hooks_come_first_and_see_the_gradient_of_one_component_times_its_ratio():
    x = nn.Parameter(torch.ones(2))
    seen = []
    x.register_hook(lambda gradient: seen.append(gradient.tolist()) or gradient * 2)
    geometry = steered([x], VGS(4.0)).backward_components({"std": x.sum(), "vis": -x[0]})
    assert seen == [[1, 1], [-4, 0]]
    assert geometry.G.tolist() == [[8, -4], [-4, 4]]


def twice(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(module, checkpoint(module, x, use_reentrant=True), use_reentrant=True)


def test_a_module_that_is_checkpointed_reentrantly_and_used_twice():
    """Its gradient comes in two pieces, of which no inner product can be taken."""
    torch.manual_seed(0)
    module, batch = nn.Linear(4, 4).double(), torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    plain = lambda: conflicting(module(module(batch)), VGS(2.0))  # noqa: E731
    expected = expected_update(plain, module.parameters(), VGS(2.0))
    geometry = steered(module.parameters(), VGS(2.0)).backward_components(conflicting(twice(module, batch), VGS(2.0)))
    assert_close(flat_grad(module.parameters()), expected)
    assert geometry.G.isfinite().all()  # every set was kept


@pytest.mark.parametrize("k", [2, 3])
def test_a_checkpointed_module_of_which_only_later_components_use_a_second_pass(k):
    """As where one component sees the image, and the next is a difference to the view without it."""
    module, batches = nn.Linear(4, 4).double(), torch.randn(2, 8, 4, dtype=torch.float64, requires_grad=True)

    def losses(forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        image, text = (forward(batch) for batch in batches)
        std = image.square().mean()
        values = {"std": std, "vis": std - text.square().mean(), "lp": (image * text).mean()}
        return dict([*values.items()][:k])

    expected = expected_update(lambda: losses(module), module.parameters(), VGS(2.0))
    reentrant = losses(lambda x: checkpoint(module, x, use_reentrant=True))
    assert steered(module.parameters(), VGS(2.0)).backward_components(reentrant).G.isfinite().all()
    assert_close(flat_grad(module.parameters()), expected)


def test_a_gradient_in_pieces_after_a_component_without_checkpoints():
    module, batch = nn.Linear(4, 4).double(), torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    plain = {"std": module(batch).square().mean(), "vis": module(batch).mean(), "lp": module(batch).exp().mean()}
    pieces = {name: twice(module, batch).square().mean() for name in plain}
    with pytest.raises(RuntimeError, match=r"'vis' came in pieces.*use_reentrant=False"):
        steered(module.parameters(), VGS(2.0)).backward_components({**plain, "vis": pieces["vis"]})
    assert all(p.grad is None for p in module.parameters())
    # Nothing depends on the inner products of lp.
    losses = lambda: {**plain, "vis": module(batch).mean(), "lp": module(module(batch)).square().mean()}  # noqa: E731
    plain["std"] = module(batch).square().mean()
    expected = expected_update(losses, module.parameters(), VGS(2.0))
    geometry = steered(module.parameters(), VGS(2.0)).backward_components({**losses(), "lp": pieces["lp"]})
    assert_close(flat_grad(module.parameters()), expected)
    assert geometry.norm("lp").isnan()
    assert geometry.norm("vis").isfinite()


class _NoGradient(torch.autograd.Function):
    """Twice its first argument; it has no gradient for the other."""

    @staticmethod
    def forward(ctx, x, w):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g, None


def test_a_function_without_a_gradient():
    x, w = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    steered([x, w], VGS(1.0)).backward_components({"std": x.sum(), "vis": _NoGradient.apply(x, w)[0]})
    assert w.grad is None
    assert_close(x.grad, torch.tensor([3.0, 1.0]) / 5**0.5, 1e-6)
    with pytest.raises(ValueError, match="'std' is detached from every parameter"):
        steered([w], VGS(1.0)).backward_components({"std": _NoGradient.apply(x, w).sum(), "vis": w.sum()})


def test_a_rule_with_an_update_of_its_own_does_not_inherit_the_ratios():
    class Half(VGS):
        def update(self, G, names, state):
            weights, state = super().update(G, names, state)
            return weights / 2, state

    class Renamed(VGS):
        """Changes nothing."""

    assert Half(2.0).ratios(("std", "vis")) is None
    assert Renamed(2.0).ratios(("std", "vis")) == {"std": 1.0, "vis": 2.0}
    model, batch = network(), torch.randn(8, 4).double()
    expected = expected_update(lambda: some(model(batch), Half(2.0), 2), model.parameters(), Half(2.0))
    steered(model.parameters(), Half(2.0)).backward_components(some(model(batch), Half(2.0), 2))
    assert_close(flat_grad(model.parameters()), expected)


@pytest.mark.parametrize(
    "ratios", [{"std": 1.0}, {"std": 1.0, "other": 2.0}, {"std": 2.0, "vis": 1.0}, {"std": 1.0, "vis": 0.0}]
)
def test_ratios_that_are_none_are_refused_before_anything_runs(ratios):
    class Wrong(VGS):
        def ratios(self, names):
            return ratios

    x = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="the ratios of a rule are"):
        steered([x], Wrong(2.0)).backward_components({"std": x.sum(), "vis": x[0]})
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, batch = network().to(dtype), torch.randn(8, 4).to(dtype)

    def losses() -> dict[str, Tensor]:
        out = model(batch).float()
        return {"std": out.square().mean(), "vis": out.exp().mean()}

    found = [steered(model.parameters(), rule).backward_components(losses()) for rule in (VGS(2.3), Steer("vis"))]
    assert_close(found[0].G, found[1].G, 0.02)
    clear(model.parameters())
    expected = expected_update(losses, model.parameters(), VGS(2.3))
    steered(model.parameters(), VGS(2.3)).backward_components(losses())
    # Every operation of both backward passes, the sum and the product with eta are rounded by half an epsilon.
    assert_close(flat_grad(model.parameters()), expected, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_in_half_precision_do_not_round_the_ratio(dtype):
    x = nn.Parameter(torch.tensor([1.0, 2.0, -1.0]))
    losses = {"std": x.sum().to(dtype), "vis": x[0].to(dtype)}
    geometry = steered([x], VGS(2.3)).backward_components(losses)
    assert_close(geometry.G, torch.tensor([[3.0, 1.0], [1.0, 1.0]]).double(), 1e-6)
    assert_close(x.grad, torch.tensor([3.3, 1, 1]) * 3**0.5 / (3.3**2 + 2) ** 0.5, 1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_the_memory_is_that_of_a_plain_step_and_the_largest_tensor(k):
    model, batch = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))), torch.randn(2, 256)
    one_set = sum(p.numel() * p.element_size() for p in model.parameters())
    plain = peak_bytes(lambda: sum(some(model(batch), VGS(2.0), k).values()).backward())
    clear(model.parameters())
    assert plain >= one_set
    losses = some(model(batch), VGS(2.0), k)
    extra = peak_bytes(lambda: steered(model.parameters(), VGS(2.0)).backward_components(losses)) - plain
    assert extra <= 1.05 * 4 * 256 * 256
