"""What every rule does alike, and where their random numbers come from."""

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
import torch
from properties import NAMES, RULES, names_for
from torch.utils._python_dispatch import TorchDispatchMode

from steer_optim import SteeredOptimizer, contrib, rules
from steer_optim.contrib import AGEM
from steer_optim.rules import PCD, VGS, GradVac, PCGrad, Rule, Steer, Sum, Weighting
from steer_optim.rules.orders import _mix, draw_orders

EVERY = [pytest.param(rule, id=name) for name, rule in RULES.items()]
ON_DEVICE = [pytest.param(rule, id=name) for name, rule in RULES.items() if not isinstance(rule, Weighting)]


def random_gramian(scopes: int, k: int, seed: int = 0) -> torch.Tensor:
    J = torch.randn(scopes, k, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return J @ J.mT


def run(rule: Rule, names: tuple[str, ...], steps: range, state=None):
    """The weights of several steps, and the state after the last."""
    weights = []
    for step in steps:
        w, state = rule(random_gramian(3, len(names), seed=step), names, state)
        weights.append(w)
    return torch.stack(weights), state


# Conformance


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("rule", EVERY)
def test_weights_and_state_have_their_shapes(rule, k):
    names = names_for(rule, k)
    weights, state = run(rule, names, range(2))
    assert weights.shape == (2, 3, len(names))
    assert weights.dtype == torch.float64
    assert weights.isfinite().all()
    initial = rule.init(random_gramian(3, len(names)), names)
    assert {key: (t.shape, t.dtype) for key, t in state.items()} == {
        key: (t.shape, t.dtype) for key, t in initial.items()
    }
    assert all(len(t) == 3 for t in state.values())


@pytest.mark.parametrize("rule", EVERY)
def test_update_is_pure(rule):
    names = names_for(rule, 3)
    G = random_gramian(2, len(names))
    _, state = rule(G, names)
    before = copy.deepcopy((G, state, {key: v for key, v in vars(rule).items() if key != "f"}))
    random_state = torch.get_rng_state()
    first, second = rule(G, names, state), rule(G, names, state)
    assert torch.equal(first[0], second[0])
    assert first[1].keys() == second[1].keys()
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])
    assert torch.equal(G, before[0])
    assert all(torch.equal(state[key], before[1][key]) for key in before[1])
    assert {key: v for key, v in vars(rule).items() if key != "f"} == before[2]
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("rule", EVERY)
def test_resuming_from_the_state_continues_bit_for_bit(rule):
    names = names_for(rule, 4)
    whole, _ = run(rule, names, range(6))
    first, state = run(rule, names, range(3))
    second, _ = run(copy.deepcopy(rule), names, range(3, 6), {key: t.clone() for key, t in state.items()})
    assert torch.equal(whole, torch.cat([first, second]))


@pytest.mark.parametrize("rule", EVERY)
def test_scopes_do_not_see_each_other(rule):
    names = names_for(rule, 4)
    G = random_gramian(3, len(names))
    other = random_gramian(3, len(names), seed=1)
    other[1] = G[1]
    weights, _ = rule(G, names)
    assert torch.equal(weights[1], rule(other, names)[0][1])
    assert torch.equal(weights[0], rule(G[0], names)[0])
    assert torch.equal(weights[:1], rule(G[:1], names)[0])


@pytest.mark.parametrize("rule", ON_DEVICE)
def test_a_batch_of_scopes_is_its_scopes_one_by_one(rule):
    # Each scope draws its own orders; of two components there is but one.
    names = names_for(rule, 2 if isinstance(rule, PCGrad | GradVac) else 4)
    G = random_gramian(3, len(names))
    torch.testing.assert_close(rule(G, names)[0], torch.stack([rule(g, names)[0] for g in G]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("rule", EVERY)
def test_a_gramian_that_is_not_finite_gives_the_plain_sum_and_keeps_the_state(rule, bad):
    names = names_for(rule, 3)
    _, state = rule(random_gramian(2, len(names)), names)
    G = random_gramian(2, len(names), seed=1)
    G[1, 0, 1] = G[1, 1, 0] = bad
    weights, new = rule(G, names, state)
    assert torch.equal(weights, torch.ones(2, len(names), dtype=torch.float64))
    assert new.keys() == state.keys()
    assert all(torch.equal(new[key], state[key]) for key in state)


class NoHost(TorchDispatchMode):
    """Refuses what would make an accelerator wait: reading a number, and tensors that come from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)}
        assert devices <= {"meta"}, f"{func} made a tensor on {devices}"
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return out


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("rule", ON_DEVICE)
def test_the_host_is_never_waited_for(rule, k):
    names = names_for(rule, k)
    G = torch.empty(2, len(names), len(names), dtype=torch.float64, device="meta")
    with NoHost():
        _, state = rule(G, names)
        rule(G, names, state)


def test_the_guard_against_the_host_can_fail():
    with NoHost(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        torch.empty(2, device="meta")[0].item()
    with NoHost(), pytest.raises(AssertionError, match="cpu"):
        torch.tensor([1.0])


@pytest.mark.parametrize(
    ("rule", "names", "message"),
    [
        (Steer("vis"), ("lang", "std"), "'vis'; got 'lang', 'std'"),
        (PCD("vis"), ("lang", "std"), "'vis'; got 'lang', 'std'"),
        (AGEM("vis"), ("lang", "std"), "'vis'; got 'lang', 'std'"),
        (PCD("vis"), ("vis", *"abcdef"), r"at most 6 components; got 7.*PCDWeighting"),
        (VGS(), ("std",), "'std' and 'vis', and may have 'lp'; got 'std'"),
        (VGS(), ("vis", "lp"), "got 'vis', 'lp'"),
        (VGS(), ("std", "vis", "vp"), "got 'std', 'vis', 'vp'.*Steer"),
        (VGS(toward="lang"), ("std", "lang", "lp"), "'std' and 'lang', and may have 'vp'"),
    ],
)
def test_components_that_a_rule_cannot_weigh_are_refused_by_name(rule, names, message):
    with pytest.raises(ValueError, match=message):
        rule(torch.eye(len(names), dtype=torch.float64), names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Steer("vis", gain=-0.1), "gain must be finite and at least 0; got -0.1"),
        (lambda: Steer("vis", gain=float("nan")), "got nan"),
        (lambda: Steer("vis", project="sometimes"), "'never'; got 'sometimes'"),
        (lambda: VGS(-1.0), "gamma must be finite and at least 0; got -1.0"),
        (lambda: VGS(float("inf")), "got inf"),
        (lambda: VGS(toward="std"), "'vis' or 'lang'; got 'std'"),
        (lambda: GradVac(beta=1.5), r"beta must be in \[0, 1\]; got 1.5"),
        (lambda: PCD("vis", tau=-0.1), r"tau must be in \[0, 1\]; got -0.1"),
        (lambda: PCD("vis", beta=1.0), r"beta must be in \[0, 1\); got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if not isinstance(rule, Weighting)], ids=repr)
def test_repr_rebuilds_the_rule(rule):
    rebuilt = eval(repr(rule), {**vars(rules), **vars(contrib)})
    assert type(rebuilt) is type(rule)
    assert vars(rebuilt) == vars(rule)


@pytest.mark.parametrize("rule", EVERY)
def test_rules_refuse_a_gramian_of_another_size(rule):
    names = names_for(rule, 3)
    with pytest.raises(ValueError, match=r"of 3 components|of 2 components"):
        rule(torch.eye(5, dtype=torch.float64), names)


# Random orders


def test_pcgrad_draws_anew_in_every_step_scope_and_seed():
    G = random_gramian(1, 5).expand(16, 5, 5)
    rule = PCGrad(seed=1)
    first, state = rule(G, NAMES[:5])
    second, state = rule(G, NAMES[:5], state)
    assert state["draws"].tolist() == [2] * 16
    assert len(first.unique(dim=0)) > 1
    assert not torch.equal(first, second)
    assert not torch.equal(first, PCGrad(seed=2)(G, NAMES[:5])[0])


def test_the_hash_is_splitmix64():
    # The first output of the published generator for the seed 0.
    assert _mix(torch.tensor(0)).item() % 2**64 == 0xE220A8397B1DCDAF


def test_orders_are_the_same_on_every_machine():
    orders = draw_orders(torch.tensor([0, 7]), ("a", "b", "c"), seed=-1)
    assert orders.tolist() == [
        [[1, 0, 2], [2, 0, 1], [1, 2, 0]],
        [[1, 0, 2], [0, 2, 1], [2, 1, 0]],
    ]


def test_orders_are_uniform():
    draws = torch.arange(12_000)
    orders = draw_orders(draws, ("a", "b", "c"), seed=0)
    for row in range(3):
        _, counts = orders[:, row].unique(dim=0, return_counts=True)
        assert len(counts) == 6
        assert (counts - 2000).abs().max() < 5 * (12_000 * 5 / 36) ** 0.5  # five standard deviations
    # Rows of one draw are independent: all 36 pairs of orders are seen, each 333 times.
    _, pairs = orders[:, :2].flatten(1).unique(dim=0, return_counts=True)
    assert len(pairs) == 36
    assert (pairs - 12_000 / 36).abs().max() < 5 * (12_000 / 36) ** 0.5


def test_orders_belong_to_the_names():
    draws, names, shuffled = torch.arange(50), ("a", "b", "c", "d"), ("c", "a", "d", "b")
    orders, moved = draw_orders(draws, names, seed=2), draw_orders(draws, shuffled, seed=2)
    for row, name in enumerate(names):
        visits = [[names[j] for j in order] for order in orders[:, row].tolist()]
        assert visits == [[shuffled[j] for j in order] for order in moved[:, shuffled.index(name)].tolist()]


# Weightings from elsewhere


def test_weighting_refuses_an_answer_of_another_shape():
    with pytest.raises(ValueError, match=r"of 2 components must return a tensor \(2,\); got \(2, 2\)"):
        Weighting(lambda G: G)(torch.eye(2, dtype=torch.float64), ("a", "b"))
    with pytest.raises(ValueError, match="got list"):
        Weighting(lambda G: [1.0, 1.0])(torch.eye(2, dtype=torch.float64), ("a", "b"))
    with pytest.raises(TypeError, match=r"callable.*got float"):
        Weighting(2.0)


def test_weighting_draws_from_its_own_generators():
    def draw(G):
        return torch.rand(len(G), dtype=torch.float64)

    G = random_gramian(2, 3)
    weights, state = Weighting(draw, seed=1)(G, NAMES[:3])
    assert state["draws"].tolist() == [1, 1]
    others = [Weighting(draw, seed=1)(G, NAMES[:3], state)[0], Weighting(draw, seed=-2)(G, NAMES[:3])[0]]
    assert len({tuple(row.tolist()) for each in (weights, *others) for row in each}) == 6
    torch.manual_seed(99)
    assert torch.equal(weights, Weighting(draw, seed=1)(G, NAMES[:3])[0])


def test_weightings_in_two_threads_draw_as_one_after_the_other():
    def draw(G):
        time.sleep(1e-3)
        return torch.rand(2, dtype=G.dtype)

    def run(seed: int) -> list[torch.Tensor]:
        rule, state, found = Weighting(draw, seed=seed), None, []
        for _ in range(10):
            weights, state = rule(torch.eye(2, dtype=torch.float64), ["a", "b"], state)
            found.append(weights)
        return found

    before, expected = torch.get_rng_state(), [run(0), run(1)]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(run, [0, 1]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_weighting_may_differentiate():
    def descend(G):
        w = torch.full((len(G),), 0.5, dtype=G.dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(w @ G @ w, [w])
        return w - 0.1 * gradient

    x = torch.nn.Parameter(torch.ones(2))
    optimizer = SteeredOptimizer(torch.optim.SGD([x]), Weighting(descend))
    optimizer.join({"a": x[0], "b": x.sum()}).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("scope", ["model", "group"])
def test_weighting_is_not_called_where_all_gradients_are_zero(scope):
    frozen, x = torch.nn.Parameter(torch.ones(2), requires_grad=False), torch.nn.Parameter(torch.ones(2))
    rule = Weighting(lambda G: torch.linalg.solve(G, torch.ones(len(G), dtype=G.dtype)))
    optimizer = SteeredOptimizer(torch.optim.SGD([{"params": [frozen]}, {"params": [x]}]), rule, scope=scope)
    optimizer.backward_components({"a": x[0] + 0 * x[1], "b": x[1]})
    assert x.grad.tolist() == [1, 1]
    assert optimizer.backward_components({"a": 0 * x[0], "b": 0 * x[1]}).weights.eq(1).all()


def test_the_state_begins_at_the_first_gramian_that_is_finite():
    """A gradient scaler begins with a factor that overflows."""

    class ToFirst(Rule):
        def init(self, G, names):
            return {"first": G.diagonal(dim1=1, dim2=2).sqrt()}

        def update(self, G, names, state):
            return state["first"] / G.diagonal(dim1=1, dim2=2).sqrt(), state

    x = torch.nn.Parameter(torch.ones(2))
    optimizer, other = (SteeredOptimizer(torch.optim.SGD([x]), ToFirst()) for _ in range(2))
    for factor in (float("inf"), float("inf"), 2.0, 4.0):
        optimizer.backward_components({"a": factor * x[0], "b": x[1]})
        other.load_state_dict(optimizer.state_dict())
        geometry = other.backward_components({"a": 8 * x[0], "b": x[1]})
        assert geometry.weights.tolist() == ([1.0, 1.0] if math.isinf(factor) else [0.25, 1.0])
    assert optimizer.geometry.weights.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    "rule", [PCGrad(), GradVac(), Weighting(lambda G: torch.rand(len(G)))], ids=lambda rule: type(rule).__name__
)
def test_an_overflow_after_resuming_leaves_the_state(rule):
    x = torch.nn.Parameter(torch.ones(2))
    optimizers = [SteeredOptimizer(torch.optim.SGD([x]), rule) for _ in range(3)]
    one, other, third = optimizers

    def step(optimizer, factor=1.0):
        return optimizer.backward_components({"a": factor * x[0], "b": x[1] - x[0]}).weights

    for _ in range(3):
        step(one)
    other.load_state_dict(one.state_dict())
    for optimizer in (one, other):
        step(optimizer, float("inf"))
    third.load_state_dict(other.state_dict())
    expected = step(one)
    assert torch.equal(step(other), expected)
    assert torch.equal(step(third), expected)


def test_a_set_of_hyperparameters_has_one_name_in_all_processes():
    class Named(Sum):
        def __init__(self, names):
            self.names = names

    found = {repr(Named({*order, *order})) for order in permutations(("main", "kl", "reg"))}
    assert found == {"Named(names={'kl', 'main', 'reg'})"}


def test_weighting_restores_the_global_generator_after_an_error():
    def fail(G):
        torch.rand(1)
        raise RuntimeError("no weights")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no weights"):
        Weighting(fail)(torch.eye(2, dtype=torch.float64), ("a", "b"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 3)])
def test_weights_of_another_shape_are_named(shape):
    class Wrong(Sum):
        def update(self, G, names, state):
            return torch.ones(shape), {}

    with pytest.raises(ValueError, match=r"update must return weights \(2, 2\), \(S, k\); got"):
        Wrong()(torch.eye(2).expand(2, 2, 2), ["a", "b"])


@pytest.mark.parametrize("own", [torch.ones(2), torch.ones(2, dtype=torch.int64), torch.nn.Parameter(torch.ones(2))])
def test_weights_of_another_dtype_or_with_a_graph_train_and_resume(own):
    class Constant(Sum):
        def update(self, G, names, state):
            return (own * 2).expand(len(G), 2), state

    x = torch.nn.Parameter(torch.ones(2))
    optimizer = SteeredOptimizer(torch.optim.SGD([x], lr=0.1), Constant(), refresh_every=2)
    for expected in ([4.0, 2.0], [8.0, 4.0]):
        geometry = optimizer.backward_components({"a": x.sum(), "b": x[0]})
        assert x.grad.tolist() == expected
        assert geometry.weights.dtype == torch.float64
        assert not geometry.weights.requires_grad
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("seed", [None, 1.5])
def test_a_seed_is_an_int(seed):
    for rule in (PCGrad, GradVac, lambda seed: Weighting(lambda G: G.diagonal(), seed=seed)):
        with pytest.raises(TypeError, match=f"seed must be an int; got {seed}"):
            rule(seed=seed)


def test_a_weighting_with_parameters_of_its_own_can_be_copied():
    module = torch.nn.Linear(4, 2).double()
    weights, state = Weighting(lambda G: module(G.flatten()).exp())(torch.eye(2, dtype=torch.float64), ["a", "b"])
    assert not weights.requires_grad
    copy.deepcopy(state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weighting_that_is_not_finite_is_named(value):
    with pytest.raises(ValueError, match=r"the weighting of a finite Gramian is not finite: \[.*\] of \[\[1.0"):
        Weighting(lambda G: torch.tensor([1.0, value]))(torch.eye(2, dtype=torch.float64), ["a", "b"])


@pytest.mark.parametrize(
    "state", [{}, {"other": torch.zeros(1)}, {"mean": torch.zeros(2)}, {"mean": torch.zeros(1).double()}]
)
def test_state_that_init_did_not_make_is_named(state):
    class Forgetful(Sum):
        def init(self, G, names):
            return {"mean": torch.zeros(len(G))}

        def update(self, G, names, _):
            return torch.ones_like(G[:, 0]), state

    with pytest.raises(ValueError, match="update must return the state of init: mean"):
        Forgetful()(torch.eye(2), ["a", "b"])
