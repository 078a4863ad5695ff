"""One Gramian and one set of weights per model, group or tensor, over parameters that may come, freeze and thaw."""

import pytest
import torch
from properties import RULES
from steering import EACH_RULE, STEER, assert_close, clear, conflicting, dense_gradients, flat_grad, network
from torch import nn

from steer_optim import PCD, GradVac, Steer, SteeredOptimizer, measure, reference
from steer_optim.rules import Rule


def groups_of(model: nn.Sequential) -> list[dict[str, list[nn.Parameter]]]:
    """One group per layer."""
    return [{"params": list(layer.parameters())} for layer in model if list(layer.parameters())]


def slices(groups: list[dict[str, list[nn.Parameter]]], scope: str) -> list[list[nn.Parameter]]:
    """The parameters of each scope."""
    if scope == "model":
        return [[p for group in groups for p in group["params"]]]
    if scope == "group":
        return [group["params"] for group in groups]
    return [[p] for group in groups for p in group["params"]]


def optimizer_of(groups, rule: Rule, scope: str) -> SteeredOptimizer:
    return SteeredOptimizer(torch.optim.SGD(groups, lr=0.1), rule, scope=scope)


@EACH_RULE
@pytest.mark.parametrize("scope", ["model", "group", "tensor"])
def test_a_scope_is_steered_as_if_it_were_alone(rule, scope):
    model, batch = network(), torch.randn(8, 4).double()
    groups = groups_of(model)
    optimizer = optimizer_of(groups, rule, scope)
    state = None
    for _ in range(3):  # with the memory of the steps before
        losses = conflicting(model(batch), rule)
        Js = [dense_gradients(losses, parameters) for parameters in slices(groups, scope)]
        G = torch.stack([reference.gramian(J) for J in Js])
        weights, state = rule(G, list(losses), state)
        optimizer.zero_grad()
        geometry = optimizer.backward_components(losses)
        for parameters, J, w in zip(slices(groups, scope), Js, weights, strict=True):
            assert_close(flat_grad(parameters), reference.combine(J, w), 1e-12)
        G = G[0] if scope == "model" else G
        assert_close(geometry.G, G)
        assert_close(geometry.weights, weights[0] if scope == "model" else weights, 1e-12)
        optimizer.step()
    assert geometry.update_norm.shape == geometry.weights.shape[:-1]
    assert geometry.norm("std").shape == ()


def test_scopes_without_memory_equal_optimizers_of_their_own():
    model, batch = network(), torch.randn(8, 4).double()
    optimizer_of(groups_of(model), STEER, "group").backward_components(conflicting(model(batch)))
    together = flat_grad(model.parameters())
    clear(model.parameters())
    for group in groups_of(model):
        for p in model.parameters():
            p.requires_grad_(any(p is q for q in group["params"]))
        optimizer_of([group], STEER, "model").backward_components(conflicting(model(batch)))
    assert_close(flat_grad(model.parameters()), together)


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("model", ()),
        ("group", ("group 0", "group 1")),
        ("tensor", ("group 0 tensor 0", "group 0 tensor 1", "group 1 tensor 0", "group 1 tensor 1")),
    ],
)
def test_scopes_are_named_by_their_place(scope, names):
    model = network()
    optimizer = optimizer_of(groups_of(model), STEER, scope)
    geometry = optimizer.backward_components(conflicting(model(torch.randn(8, 4).double())))
    assert geometry.scopes == names


def test_scopes_are_named_as_their_parameters_where_torch_knows_the_names():
    model = network()
    optimizer = optimizer_of(model.named_parameters(), STEER, "tensor")
    geometry = optimizer.backward_components(conflicting(model(torch.randn(8, 4).double())))
    assert geometry.scopes == ("0.weight", "0.bias", "2.weight", "2.bias")


@pytest.mark.parametrize("name", ["GradVac", "PCGrad", "PCD", "Weighting"])
@pytest.mark.parametrize("scope", ["model", "group", "tensor"])
def test_a_group_added_in_mid_training_is_steered_and_starts_without_memory(name, scope):
    rule, model, batch = RULES[name], network(), torch.randn(8, 4).double()
    groups = groups_of(model)
    optimizer = optimizer_of(groups[:1], rule, scope)
    state = None
    for step in range(4):
        if step == 2:
            optimizer.add_param_group(groups[1])
        present = groups[:1] if step < 2 else groups
        losses = conflicting(model(batch), rule)
        Js = [dense_gradients(losses, parameters) for parameters in slices(present, scope)]
        G = torch.stack([reference.gramian(J) for J in Js])
        if state is not None:
            fresh = rule.init(G, list(losses))
            state = {key: torch.cat([old, fresh[key][len(old) :]]) for key, old in state.items()}
        weights, state = rule(G, list(losses), state)
        optimizer.zero_grad()
        clear(model.parameters())
        optimizer.backward_components(losses)
        for parameters, J, w in zip(slices(present, scope), Js, weights, strict=True):
            assert_close(flat_grad(parameters), reference.combine(J, w), 1e-12)
        optimizer.step()


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_a_scope_keeps_its_memory_while_an_earlier_one_is_frozen(scope):
    model, batch = network(), torch.randn(8, 4).double()
    optimizer = optimizer_of(groups_of(model), GradVac(beta=0.3), scope)
    targets = []
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        optimizer.zero_grad()
        optimizer.backward_components(conflicting(model(batch)))
        targets.append(optimizer.steering._memory.state["cosine"])
    first, last = (slice(0, 1), slice(1, 2)) if scope == "group" else (slice(0, 2), slice(2, 4))
    assert torch.equal(targets[1][first], targets[0][first])  # nothing seen, nothing learnt
    assert not torch.equal(targets[2][first], targets[1][first])
    assert not torch.equal(targets[1][last], targets[0][last])


@pytest.mark.parametrize("scope", ["model", "group", "tensor"])
def test_named_numbers_are_of_the_whole_gradients_under_every_scope(scope):
    """So that the line that the README prints works under each."""
    model, batch = network(), torch.randn(8, 4).double()
    geometry = optimizer_of(groups_of(model), STEER, scope).backward_components(conflicting(model(batch)))
    whole = measure(conflicting(model(batch)), model.parameters())
    assert f"{geometry.angle('std', 'vis'):.3f}" == f"{whole.angle('std', 'vis'):.3f}"
    for name in geometry.names:
        assert_close(geometry.norm(name), whole.norm(name))
    assert_close(geometry.overall.sum_norm, whole.sum_norm)
    assert geometry.weight("vis").shape == geometry.weights.shape[:-1]


def test_tensors_that_steer_by_themselves_do_not_conflict_by_themselves():
    model, batch = network(), torch.randn(8, 4).double()
    optimizer = optimizer_of(groups_of(model), Steer("vis", preserve_norm=False), "tensor")
    losses = conflicting(model(batch))
    vis = [dense_gradients({"vis": losses["vis"]}, [p])[0] for p in model.parameters()]
    optimizer.backward_components(losses)
    for p, g in zip(model.parameters(), vis, strict=True):
        assert flat_grad([p]) @ g >= (1 - 1e-14) * g @ g


def test_a_group_that_is_gone_is_refused_and_another_rule_starts_afresh():
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    inner = torch.optim.SGD([{"params": [x]}, {"params": [y]}], lr=0.1)
    optimizer = SteeredOptimizer(inner, GradVac(), scope="group")
    losses = {"a": lambda: (x * y).sum(), "b": lambda: (x - y).sum()}
    optimizer.backward_components(losses)
    group = inner.param_groups.pop(0)
    with pytest.raises(ValueError, match="groups may be added but not removed"):
        optimizer.backward_components(losses)
    inner.param_groups.insert(0, group)
    optimizer.rule = PCD("a")  # starts without memory
    optimizer.backward_components(losses)
    assert optimizer.steering._memory.state.keys() == {"sq_norms"}
