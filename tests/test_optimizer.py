"""Items 3, 4, 5, 7 and 10 of the contract: the wrapper is an optimizer, and whatever is inside stays what it is."""

import inspect
import re

import pytest
import torch
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toys import assert_equal, bare_step, components, make_model, steer_step, sum_step, train, weights

from steer_optim import SteeredOptimizer
from steer_optim.rules import GradVac, PCGrad, Steer, Sum

TORCH = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls not in (Optimizer, LBFGS, SparseAdam)
}
INNERS = {
    **{name: (lambda params, cls=cls: cls(params, lr=0.05)) for name, cls in TORCH.items()},
    "foreach": lambda params: torch.optim.AdamW(params, lr=0.05, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.05, fused=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "maximize": lambda params: torch.optim.AdamW(params, lr=0.05, maximize=True),
}


def make(rule=None, inner=torch.optim.SGD, **options):
    model = make_model()
    return model, SteeredOptimizer(inner(model.parameters(), lr=0.05), rule or Steer("a"), **options)


# 1, 3: it is an optimizer, and its groups and state are those of the inner one


def test_it_is_an_optimizer():
    _, optimizer = make()
    assert isinstance(optimizer, Optimizer)


@pytest.mark.parametrize("attribute", ["param_groups", "state", "defaults"])
def test_groups_and_state_are_the_inner_ones(attribute):
    model, optimizer = make(inner=torch.optim.AdamW)
    assert getattr(optimizer, attribute) is getattr(optimizer.inner, attribute)
    train(steer_step, optimizer, model, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert getattr(optimizer, attribute) is getattr(optimizer.inner, attribute)
    replacement = type(getattr(optimizer, attribute))()
    setattr(optimizer, attribute, replacement)
    assert getattr(optimizer.inner, attribute) is replacement


@pytest.mark.parametrize("scope", ["model", "group", "tensor"])
def test_an_added_group_is_steered_in_the_next_step(scope):
    """In the middle of training, with a rule that has a row of memory for each scope."""
    model = make_model()
    first, second = model.parameters()
    optimizer = SteeredOptimizer(torch.optim.SGD([first], lr=0.05), GradVac(), scope=scope)
    train(steer_step, optimizer, model, range(2))
    second.grad = None
    optimizer.add_param_group({"params": [second], "lr": 0.01})
    assert optimizer.inner.param_groups[1]["params"][0] is second
    before = second.detach().clone()
    train(steer_step, optimizer, model, range(2, 3))
    assert not torch.equal(second, before)
    scopes = {"model": (), "group": ("group 0", "group 1"), "tensor": ("group 0 tensor 0", "group 1 tensor 0")}
    assert optimizer.geometry.scopes == scopes[scope]


def test_named_parameters_name_the_scopes():
    model = make_model()
    optimizer = SteeredOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.05), Sum(), scope="tensor")
    train(steer_step, optimizer, model, range(1))
    assert optimizer.geometry.scopes == ("0.weight", "2.weight")


def test_tensors_of_the_same_name_are_scopes_of_their_own():
    """As in the two networks of a GAN."""
    p, q = (torch.ones(1, requires_grad=True) for _ in range(2))
    inner = torch.optim.SGD([{"params": [("weight", p)]}, {"params": [("weight", q)]}], lr=0.1)
    optimizer = SteeredOptimizer(inner, Sum(), scope="tensor")
    geometry = optimizer.backward_components({"a": 2 * p + 3 * q, "b": p})
    assert geometry.G.tolist() == [[[4.0, 2.0], [2.0, 1.0]], [[9.0, 0.0], [0.0, 0.0]]]


def test_a_group_without_parameters_is_passed_over():
    p = torch.ones(1, requires_grad=True)
    inner = torch.optim.SGD([{"params": []}, {"params": [p]}], lr=0.1)
    geometry = SteeredOptimizer(inner, Sum(), scope="group").backward_components({"a": 2 * p})
    assert geometry.scopes == ("group 1",)


def test_keys_of_others_in_a_group_stay():
    model, optimizer = make()
    optimizer.param_groups[0]["layer"] = "all"
    train(steer_step, optimizer, model, range(1))
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["layer"] = "none"
    optimizer.load_state_dict(saved)
    assert optimizer.inner.param_groups[0]["layer"] == "all"


# 4, 10: with nothing captured, and with one component of weight one, every inner optimizer steps as it does alone


@pytest.mark.parametrize("take_step", [bare_step, sum_step])
@pytest.mark.parametrize("name", INNERS)
def test_it_steps_bit_for_bit_as_the_inner_optimizer(name, take_step):
    model = make_model()
    expected = train(bare_step, INNERS[name](model.parameters()), model, range(4))
    model = make_model()
    optimizer = SteeredOptimizer(INNERS[name](model.parameters()), Sum())
    assert_equal(train(take_step, optimizer, model, range(4)), expected)


@pytest.mark.parametrize("rule", [Sum(), PCGrad()], ids=repr)
def test_sparse_gradients_reach_sparse_adam(rule):
    """Two components of opposite weight on the same rows, and one on others: sparse in, sparse out."""
    table = torch.nn.Embedding(6, 3, sparse=True)
    reference = torch.nn.Embedding.from_pretrained(table.weight.detach().clone(), freeze=False)
    optimizer = SteeredOptimizer(SparseAdam(table.parameters(), lr=0.1), rule)
    dense = SteeredOptimizer(torch.optim.SGD(reference.parameters(), lr=0.1), rule)
    for module, wrapped in ((table, optimizer), (reference, dense)):
        out = module(torch.tensor([0, 2, 2]))
        wrapped.backward_components({"a": out.sum(), "b": -0.5 * out[:2].sum() + module(torch.tensor([4])).sum()})
    assert table.weight.grad.is_sparse
    assert_equal(table.weight.grad.to_dense(), reference.weight.grad)
    before = table.weight.detach().clone()
    optimizer.step()
    assert table.weight.ne(before).any(1).tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_forwards_and_drops_what_is_pending(set_to_none):
    model, optimizer = make()
    train(steer_step, optimizer, model, range(1))
    optimizer.backward_components(components(model, 0), accumulate=True)
    optimizer.zero_grad(set_to_none=set_to_none)
    gradients = [p.grad for p in model.parameters()]
    assert all(g is None for g in gradients) if set_to_none else all(g.eq(0).all() for g in gradients)
    found = optimizer.backward_components(components(model, 1))
    model, optimizer = make()
    train(steer_step, optimizer, model, range(1))
    optimizer.zero_grad()
    assert_equal(found.G, optimizer.backward_components(components(model, 1)).G)


def test_step_refuses_what_is_pending_until_it_is_dropped():
    model, optimizer = make()
    optimizer.backward_components(components(model, 0), accumulate=True)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"components \['a', 'b', 'c'\] were accumulated and never steered"):
        optimizer.step()
    assert_equal(weights(model), before)
    optimizer.zero_grad()
    optimizer.step()


# 5: closures


@pytest.mark.parametrize("name", ["SGD", "AdamW", "fused"])
def test_step_returns_the_loss_of_the_closure(name):
    model = make_model()
    optimizer = SteeredOptimizer(INNERS[name](model.parameters()), Steer("a"))
    before = weights(model)

    def closure():
        optimizer.zero_grad()
        losses = components(model, 0)
        optimizer.backward_components(losses)
        return sum(losses.values()).detach()

    with torch.no_grad():
        expected = sum(components(model, 0).values())
    assert torch.equal(optimizer.step(closure), expected)
    assert not torch.equal(weights(model)[0], before[0])
    assert optimizer.step() is None


def test_lbfgs_with_a_closure_that_steers():
    results = []
    for steered in (False, True):
        model = make_model()
        inner = LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")
        optimizer = SteeredOptimizer(inner, Sum()) if steered else inner

        def closure(model=model, optimizer=optimizer, steered=steered):
            optimizer.zero_grad()
            loss = sum(components(model, 0).values())
            if steered:
                optimizer.backward_components({"sum": loss})
            else:
                loss.backward()
            return loss.detach()

        losses = [float(optimizer.step(closure)) for _ in range(3)]
        results.append((losses, weights(model)))
    assert results[0][0] == results[1][0]
    assert losses[-1] < losses[0]
    assert_equal(results[0][1], results[1][1])


def test_an_inner_optimizer_whose_step_takes_no_closure():
    class Plain(Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                p -= p.grad

    p = torch.ones(1, requires_grad=True)
    optimizer = SteeredOptimizer(Plain([p]), Sum())
    optimizer.backward_components({"a": 2 * p})
    optimizer.step()
    assert p.item() == -1


# 7: hooks


def test_hooks_of_the_wrapper_the_inner_optimizer_and_all_fire_once_and_in_order():
    model, optimizer = make()
    calls = []

    def hook(name):
        return lambda owner, args, kwargs: calls.append((name, owner))

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
        optimizer.inner.register_step_pre_hook(hook("inner pre")),
        optimizer.inner.register_step_post_hook(hook("inner post")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
    ]
    try:
        train(steer_step, optimizer, model, range(1))
    finally:
        for handle in handles:
            handle.remove()
    inner = optimizer.inner
    assert calls == [
        ("global pre", inner),
        ("inner pre", inner),
        ("pre", optimizer),
        ("inner post", inner),
        ("post", optimizer),
        ("global post", inner),
    ]


def test_torch_does_not_wrap_its_step_in_hooks_again():
    model, optimizer = make()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    Optimizer.zero_grad(optimizer)  # the method of the base class is one of several that patch step
    train(steer_step, optimizer, model, range(1))
    assert calls == ["pre"]


def test_a_step_hook_may_replace_the_arguments():
    _, optimizer = make()
    optimizer.register_step_pre_hook(lambda owner, args, kwargs: ((owner, lambda: 7.0), kwargs))
    assert optimizer.step() == 7.0
    optimizer.register_step_pre_hook(lambda owner, args, kwargs: ((owner,), {"closure": lambda: 8.0}))
    assert optimizer.step() == 8.0


def test_state_dict_hooks_fire_once_and_may_replace_the_state():
    _, optimizer = make()
    calls = []
    optimizer.register_state_dict_pre_hook(lambda owner: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda owner, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda owner, state: calls.append(state.pop("extra")))
    optimizer.register_load_state_dict_post_hook(lambda owner: calls.append("loaded"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert calls == ["save", 1, "loaded"]
    assert saved["extra"] == 1  # a hook works on a copy


def test_an_average_of_the_weights_follows_through_a_step_hook():
    averages = []
    for take_step, wrap in ((bare_step, lambda inner: inner), (sum_step, lambda inner: SteeredOptimizer(inner, Sum()))):
        model = make_model()
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.05))
        optimizer.register_step_post_hook(lambda *_, ema=ema, model=model: ema.update_parameters(model))
        train(take_step, optimizer, model, range(3))
        assert ema.n_averaged == 3
        averages.append(weights(ema))
    assert_equal(averages[0], averages[1])


# What is refused


@pytest.mark.parametrize(
    ("optimizer", "rule", "options", "error", "message"),
    [
        (lambda p: [p], Sum(), {}, TypeError, "must be a torch.optim.Optimizer; got list"),
        (lambda p: SteeredOptimizer(torch.optim.SGD([p]), Sum()), Sum(), {}, TypeError, "steered already"),
        (lambda p: torch.optim.SGD([p]), Sum, {}, TypeError, "rule must be a Rule"),
        (lambda p: torch.optim.SGD([p]), Sum(), {"scope": "layer"}, ValueError, "'group' or 'tensor'; got 'layer'"),
    ],
)
def test_the_constructor_refuses_by_name(optimizer, rule, options, error, message):
    with pytest.raises(error, match=message):
        SteeredOptimizer(optimizer(torch.ones(1, requires_grad=True)), rule, **options)


def test_an_optimizer_with_everything_frozen_is_refused():
    p, q = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = SteeredOptimizer(torch.optim.SGD([p], lr=0.1), Sum())
    p.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        optimizer.backward_components({"a": 2 * q})


def test_its_repr_shows_the_rule_and_the_inner_optimizer():
    _, optimizer = make(PCGrad(seed=3))
    assert re.match(r"SteeredOptimizer\(PCGrad\(seed=3\), scope='model', inner=SGD \(", repr(optimizer))
