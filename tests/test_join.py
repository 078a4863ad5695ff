"""`optimizer.join`: one scalar whose backward pass steers, whatever the loop does with it; and errors on the way."""

import pytest
import torch
from toys import assert_equal, components, make_model, memory, steer_step, train

from steer_optim import SteeredOptimizer, Steering
from steer_optim.rules import PCD, GradVac, PCGrad, Steer, Sum

RULES = {"Sum": Sum, "Steer": lambda: Steer("a"), "PCGrad": PCGrad, "GradVac": GradVac, "PCD": lambda: PCD("a")}


def make(rule=None, *, scope="model"):
    model = make_model()
    return model, SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), rule or Steer("a"), scope=scope)


def gradients(model):
    return [p.grad for p in model.parameters()]


def steered(*, steps=(0,), factor=1.0, rule=None):
    """The gradients that backward_components gives for the sum of some micro-batches."""
    model, optimizer = make(rule)
    for step in steps:
        losses = {name: factor * loss for name, loss in components(model, step).items()}
        optimizer.backward_components(losses, accumulate=step != steps[-1])
    return gradients(model)


# What flows through it


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("rule_name", RULES)
def test_its_backward_pass_is_backward_components(rule_name, scope):
    results = []
    for joined in (False, True):
        model, optimizer = make(RULES[rule_name](), scope=scope)
        for step in range(3):
            optimizer.zero_grad()
            losses = components(model, step)
            if joined:
                loss = optimizer.join(losses)
                torch.testing.assert_close(loss, sum(losses.values()))
                loss.backward()
            else:
                optimizer.backward_components(losses)
            optimizer.step()
        results.append((gradients(model), memory(optimizer), optimizer.geometry.G))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert_equal(results[0][2], results[1][2])


def test_a_division_by_the_number_of_micro_batches_scales_the_result():
    """By a power of two, so that scaling commutes with rounding."""
    model, optimizer = make()
    for step in range(4):
        (optimizer.join(components(model, step), accumulate=step < 3) / 4).backward()
    assert_equal(gradients(model), steered(steps=range(4), factor=0.25))


@pytest.mark.parametrize("first", ["half", "full"])
def test_a_component_in_half_precision_rounds_no_factor_of_the_others(first):
    x, y = (torch.ones(1, requires_grad=True) for _ in range(2))
    losses = {"half": (1.36 * y).bfloat16().sum(), "full": (0.53125 * x).sum()}
    total = Steering([x, y], Sum()).join({first: losses.pop(first), **losses})
    assert total.dtype == torch.float32
    assert total.item() == 1.359375 + 0.53125
    (total / 3).backward()
    assert x.grad.item() == (torch.tensor(0.53125) * torch.tensor(1.0).div(3)).item()


def test_micro_batches_may_be_scaled_differently():
    model, optimizer = make(Sum())
    (0.25 * optimizer.join(components(model, 0), accumulate=True)).backward()
    (0.75 * optimizer.join(components(model, 1))).backward()
    reference = make_model()
    (0.25 * sum(components(reference, 0).values()) + 0.75 * sum(components(reference, 1).values())).backward()
    torch.testing.assert_close(gradients(model), gradients(reference))


def test_callables_are_evaluated_at_once_and_with_gradients():
    model, optimizer = make()
    losses = components(model, 0)
    optimizer.join({name: lambda loss=loss: loss for name, loss in losses.items()}).backward()
    assert_equal(gradients(model), steered())


def test_zero_grad_between_join_and_backward_is_harmless():
    model, optimizer = make()
    train(steer_step, optimizer, model, range(1))
    loss = optimizer.join(components(model, 1))
    optimizer.zero_grad()
    loss.backward()
    found = gradients(model)
    optimizer.zero_grad()
    optimizer.backward_components(components(model, 1))
    assert_equal(found, gradients(model))


@pytest.mark.parametrize("first", ["joined", "other"])
def test_a_loss_that_is_added_to_it_flows_too(first):
    model, optimizer = make()
    other = model(torch.ones(1, 3)).square().sum()  # a forward pass of its own
    joined = optimizer.join(components(model, 0))
    (joined + other if first == "joined" else other + joined).backward()
    found = gradients(model)

    reference, optimizer = make()
    optimizer.backward_components(components(reference, 0))
    reference(torch.ones(1, 3)).square().sum().backward()
    assert_equal(found, gradients(reference))
    # The other loss takes no part in the geometry.
    assert optimizer.geometry.names == ("a", "b", "c")


def test_a_loss_that_shares_the_graph_needs_the_graph_retained():
    def losses(model):
        out = model(torch.ones(2, 3))
        return {"a": out[:, 0].square().sum(), "b": -out[:, 1].sum()}, out.square().mean()

    model, optimizer = make()
    parts, other = losses(model)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        (optimizer.join(parts) + other).backward()
    optimizer.zero_grad()
    parts, other = losses(model)
    (optimizer.join(parts) + other).backward(retain_graph=True)

    reference, optimizer = make()
    parts, other = losses(reference)
    optimizer.backward_components(parts, retain_graph=True)
    other.backward()
    assert_equal(gradients(model), gradients(reference))


def test_a_second_backward_pass_needs_the_graph_retained_and_adds():
    model, optimizer = make(Sum())
    loss = optimizer.join(components(model, 0))
    loss.backward(retain_graph=True)
    once = [g.clone() for g in gradients(model)]
    loss.backward()
    assert_equal(gradients(model), [2 * g for g in once])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert_equal(gradients(model), [2 * g for g in once])


def test_a_graph_of_the_steered_gradients_is_refused():
    model, optimizer = make()
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        optimizer.join(components(model, 0)).backward(create_graph=True)
    assert gradients(model) == [None, None]


def test_without_gradients_it_is_the_plain_sum():
    model, optimizer = make()
    with torch.no_grad():
        loss = optimizer.join(components(model, 0))
        expected = sum(components(model, 0).values())
        with pytest.raises(TypeError, match="must be a tensor or a callable; got float"):
            optimizer.join({"std": 0.0})
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


def test_autograd_grad_sees_no_parameter_through_it():
    model, optimizer = make()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(optimizer.join(components(model, 0)), list(model.parameters()))
    assert gradients(model) == [None, None]


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_trains_and_finds_the_component_that_breaks():
    model, optimizer = make()
    with torch.autograd.detect_anomaly():
        optimizer.join(components(model, 0)).backward()
        assert_equal(gradients(model), steered())
        losses = components(model, 0)
        losses["b"] = (0 * losses["b"]).sqrt() * 0
        with pytest.raises(RuntimeError, match="SqrtBackward0"), pytest.warns(UserWarning, match="Error detected"):
            optimizer.join(losses).backward()
    assert_equal(gradients(model), steered())


# What is refused, and what an error leaves behind


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda loss: {}, ValueError, "no components"),
        (lambda loss: {"a": loss, "b": 0.0}, TypeError, "'b' must be a tensor or a callable; got float"),
        (lambda loss: {"a": loss, "b": loss.detach()}, ValueError, "'b' is detached"),
        (lambda loss: {"a": loss, "b": loss.expand(2)}, ValueError, r"'b' must be a scalar; got shape \(2,\)"),
        (lambda loss: {"b": loss, "c": loss}, ValueError, "Steer needs its component 'a'"),
    ],
)
def test_join_refuses_by_name_when_it_is_called(losses, error, message):
    model, optimizer = make()
    with pytest.raises(error, match=message):
        optimizer.join(losses(model(torch.ones(1, 3)).sum()))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_callable_leaves_grad_and_memory_and_drops_what_is_pending(error):
    model, optimizer = make(PCGrad())
    train(steer_step, optimizer, model, range(2))
    before, kept, remembered = gradients(model), [g.clone() for g in gradients(model)], memory(optimizer)
    optimizer.backward_components(components(model, 2), accumulate=True)

    def fail():
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        optimizer.backward_components({**components(model, 3), "b": fail}, retain_graph=True)
    assert all(now is then for now, then in zip(gradients(model), before, strict=True))
    assert_equal(gradients(model), kept)
    assert memory(optimizer) == remembered
    optimizer.step()  # nothing is pending


def test_an_error_in_a_backward_pass_leaves_grad():
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("in the middle")

    model, optimizer = make()
    train(steer_step, optimizer, model, range(1))
    before = gradients(model)
    for attempt in (optimizer.backward_components, lambda losses: optimizer.join(losses).backward()):
        losses = components(model, 1)
        losses["b"] = Fail.apply(losses["b"])
        with pytest.raises(RuntimeError, match="in the middle"):
            attempt(losses)
        assert all(now is then for now, then in zip(gradients(model), before, strict=True))


def test_an_error_in_the_rule_leaves_grad_and_drops_what_is_pending():
    class Broken(Sum):
        def update(self, G, names, state):
            raise ArithmeticError("no solution")

    model, optimizer = make(Broken())
    with pytest.raises(ArithmeticError, match="no solution"):
        optimizer.backward_components(components(model, 0))
    assert gradients(model) == [None, None]
    optimizer.step()
