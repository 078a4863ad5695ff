"""``refresh_every``: the weights of an earlier step, one backward pass, and a geometry that says so."""

import copy
from collections.abc import Callable

import pytest
import torch
from properties import RULES
from steering import (
    EACH_RULE,
    STEER,
    NoHostRead,
    assert_close,
    clear,
    conflicting,
    dense_gradients,
    flat_grad,
    network,
    peak_bytes,
    steered,
)
from torch import Tensor, nn
from toys import assert_equal, components, make_model, steer_step, train, weights

from steer_optim import PCD, VGS, GradVac, PCGrad, Steer, SteeredOptimizer, Sum
from steer_optim.monitor import Monitor, scalars
from steer_optim.rules import Weighting
from steer_optim.steering import BOUND

WAYS = ["tensors", "callables", "mixed", "join"]


def backward(optimizer: SteeredOptimizer, losses: Callable[[], dict[str, Tensor]], way: str, **options) -> None:
    if way == "join":
        (2.0 * optimizer.join(losses(), **options)).backward()
    elif way == "tensors":
        optimizer.backward_components(losses(), **options)
    else:
        late = {name: lambda name=name: losses()[name] for name in losses()}
        if way == "mixed":
            late |= {name: loss for name, loss in losses().items() if name != "vis"}
        optimizer.backward_components(late, **options)


@EACH_RULE
@pytest.mark.parametrize("way", WAYS)
def test_steps_in_between_use_the_last_weights(rule, way):
    model = network()
    optimizer = steered(model.parameters(), rule, refresh_every=3)
    ages = []
    for step in range(7):
        batch = torch.randn(8, 4).double()
        losses = lambda batch=batch: conflicting(model(batch), rule)  # noqa: E731
        exact = step % 3 == 0
        clear(model.parameters())
        backward(optimizer, losses, way)
        geometry = optimizer.geometry
        ages.append(geometry.age)
        if exact:
            last = geometry
        values = losses()
        assert_close(geometry.losses, torch.stack([*values.values()]).detach())
        assert_equal(geometry.G, last.G)
        unbounded = (2.0 if way == "join" else 1.0) * (last.weights @ dense_gradients(values, model.parameters()))
        bound = min(1.0, float(BOUND * last.update_norm / unbounded.norm()))
        assert_close(geometry.weights, bound * last.weights)
        assert_close(flat_grad(model.parameters()), bound * unbounded)
        assert_close(geometry.update_norm, flat_grad(model.parameters()).norm())
        optimizer.step()
    assert ages == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("exact", [True, False])
def test_accumulation(way, exact):
    """Micro-batches are all of the kind of the first, and count as one step."""
    model, batch = network(), torch.randn(8, 4).double()
    optimizer = steered(model.parameters(), STEER, refresh_every=2)
    if not exact:
        optimizer.backward_components(conflicting(model(torch.randn(8, 4).double())))
    clear(model.parameters())
    for i, rows in enumerate(batch.split(2)):
        losses = lambda rows=rows: {n: loss / 4 for n, loss in conflicting(model(rows)).items()}  # noqa: E731
        backward(optimizer, losses, way, accumulate=i < 3)
        if i < 3:
            assert all(p.grad is None for p in model.parameters())
            with pytest.raises(RuntimeError, match="accumulated and never steered"):
                optimizer.step()
    assert optimizer.geometry.age == (0 if exact else 1)
    found, factor = flat_grad(model.parameters()), 2.0 if way == "join" else 1.0
    values = conflicting(model(batch))
    assert_close(found, factor * (optimizer.geometry.weights @ dense_gradients(values, model.parameters())))
    assert_close(optimizer.geometry.losses, torch.stack([*values.values()]).detach())


def test_what_was_accumulated_is_dropped_by_zero_grad():
    model, batch = network(), torch.randn(8, 4).double()
    optimizer = steered(model.parameters(), refresh_every=5)
    for _ in range(2):
        optimizer.backward_components(conflicting(model(batch)))
    once = flat_grad(model.parameters())
    optimizer.backward_components(conflicting(model(batch)), accumulate=True)
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.backward_components(conflicting(model(batch)))
    assert_close(flat_grad(model.parameters()), once)


def test_an_existing_gradient_is_added_to_and_an_unused_parameter_has_none():
    x, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = steered([x, unused], Sum(), refresh_every=2)
    for _ in range(2):
        optimizer.backward_components({"a": x.sum(), "b": x[0]})
    assert optimizer.geometry.age == 1
    assert x.grad.tolist() == [4, 2]
    assert unused.grad is None


def test_the_step_after_one_that_lacked_a_component_is_exact():
    x = nn.Parameter(torch.ones(2))
    optimizer = steered([x], Sum(), refresh_every=10)
    steps = ("ab", "ab", "ba", "a", "a", "ab")
    ages = [optimizer.backward_components({name: x.sum() for name in names}).age for names in steps]
    assert ages == [0, 1, 2, 3, 4, 5]
    optimizer = steered([x], Sum(), refresh_every=10)
    optimizer.backward_components({"a": x.sum(), "b": None})
    ages = [optimizer.backward_components({name: x.sum() for name in names}).age for names in steps]
    assert ages == [0, 1, 2, 3, 4, 5]


def test_how_often_may_be_changed_on_the_way():
    x = nn.Parameter(torch.ones(2))
    optimizer = steered([x], Sum(), refresh_every=10)
    ages = []
    for every in (10, 10, 10, 1, 1, 3, 3, 3, 3):
        optimizer.refresh_every = every
        ages.append(optimizer.backward_components({"a": x.sum()}).age)
    assert ages == [0, 1, 2, 0, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_the_step_after_an_overflow_is_exact(value):
    """The weights of an overflow are those of the plain sum, which nobody asked for."""
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = steered([x], Steer("vis", gain=1.0), refresh_every=10)
    first = optimizer.backward_components({"std": value * x.sum(), "vis": x[0]})
    assert first.weights.tolist() == [1, 1]
    second = optimizer.backward_components({"std": x.sum(), "vis": x[0]})
    assert second.age == 0
    assert second.weights.tolist() != [1, 1]
    assert optimizer.backward_components({"std": x.sum(), "vis": x[0]}).age == 1
    # An overflow of a later step is in .grad for a scaler to see, and the weights are as good as before.
    x.grad = None
    assert optimizer.backward_components({"std": value * x.sum(), "vis": x[0]}).age == 2
    assert not x.grad.isfinite().all()
    assert optimizer.backward_components({"std": x.sum(), "vis": x[0]}).age == 3


def test_a_component_that_reaches_nothing_is_noticed_when_all_do():
    x, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = steered([x], Sum(), refresh_every=3)
    optimizer.backward_components({"a": x.sum(), "b": x.sum()})
    x.grad = None
    with pytest.raises(ValueError, match=r"'a \+ b' is detached"):
        optimizer.backward_components({"a": other.sum(), "b": other.sum()})
    assert x.grad is None


@pytest.mark.parametrize("zero", ["std", "vis", "both"])
@pytest.mark.parametrize("rule", [VGS(2.0), Steer("vis")], ids=["VGS", "Steer"])
def test_the_step_after_one_without_gradient_is_exact(rule, zero):
    """As from an empty batch, whose losses are zeros."""
    x = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = steered([x], rule, refresh_every=10)
    on = {name: 0.0 if zero in (name, "both") else 1.0 for name in ("std", "vis")}
    ages = []
    for factor in (on, {"std": 1.0, "vis": 1.0}, {"std": 1.0, "vis": 1.0}, on):
        losses = {"std": factor["std"] * x.sum(), "vis": -factor["vis"] * x[0]}
        ages.append(optimizer.backward_components(losses).age)
    assert ages == [0, 0, 1, 2]


@pytest.mark.parametrize("rest", [0.0, 1e-8])
@pytest.mark.parametrize("rule", [Sum(), Steer("std"), PCGrad(), VGS(1.0)], ids=lambda rule: type(rule).__name__)
def test_the_step_after_one_whose_components_cancel_is_exact(rule, rest):
    """The update is zero or rounding noise, whatever the other batches are like."""
    x = nn.Parameter(torch.tensor([1.0, 2.0]).double())
    optimizer = steered([x], rule, refresh_every=4)
    ages, lengths = [], []
    for sign in (1, 1, 1, 1, -1, 1, 1):  # the second Gramian is that of components that cancel
        x.grad = None
        losses = {"std": x.sum(), "vis": sign * x.sum() + rest * x[0]}
        ages.append(optimizer.backward_components(losses).age)
        lengths.append(float(x.grad.norm()))
    assert ages == [0, 1, 2, 3, 0, 0, 1]
    assert min(lengths[5:]) > 1


def test_weights_that_a_rule_makes_small_are_used_again():
    x = nn.Parameter(torch.tensor([1.0, 2.0]).double())
    optimizer = steered([x], Weighting(lambda G: torch.full((2,), 1e-9)), refresh_every=3)
    ages = [optimizer.backward_components({"a": x.sum(), "b": x[0].square()}).age for _ in range(4)]
    assert ages == [0, 1, 2, 0]


@pytest.mark.parametrize("value", [0, -1, 2.0, "10", None, True])
def test_a_bad_number_of_steps_is_refused(value):
    with pytest.raises(ValueError, match=r"an int of at least 1; got"):
        steered(network().parameters(), refresh_every=value)
    optimizer = steered(network().parameters(), refresh_every=3)
    with pytest.raises(ValueError, match=r"an int of at least 1; got"):
        optimizer.refresh_every = value
    assert optimizer.refresh_every == 3


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_scopes_are_refused(scope):
    with pytest.raises(ValueError, match=f"refresh_every=2 needs scope='model'.*got scope='{scope}'"):
        steered(network().parameters(), scope=scope, refresh_every=2)
    optimizer = steered(network().parameters(), scope=scope, refresh_every=1)
    with pytest.raises(ValueError, match="needs scope='model'"):
        optimizer.refresh_every = 2


# What is remembered


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rule", [Steer("b"), GradVac(beta=0.5), PCGrad()], ids=["Steer", "GradVac", "PCGrad"])
def test_a_resumed_run_is_the_uninterrupted_one(rule, stop):
    def make() -> tuple[nn.Module, SteeredOptimizer]:
        model = make_model()
        return model, SteeredOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), rule, refresh_every=3)

    model, optimizer = make()
    expected = train(steer_step, optimizer, model, range(8))
    first, optimizer = make()
    train(steer_step, optimizer, first, range(stop))
    model, resumed = make()
    model.load_state_dict(first.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(train(steer_step, resumed, model, range(stop, 8)), expected)


@pytest.mark.parametrize("other", [Steer("a"), Steer("b", gain=1.0), Sum()], ids=repr)
def test_the_weights_of_another_rule_are_not_used_again(other):
    model = make_model()
    first = SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Steer("b"), refresh_every=9)
    first.backward_components(components(model, 0))
    second = SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), other, refresh_every=9)
    second.load_state_dict(first.state_dict())
    assert second.backward_components(components(model, 1)).age == 0
    first.rule = other
    assert first.backward_components(components(model, 1)).age == 0
    assert first.backward_components(components(model, 2)).age == 1


def test_the_weights_of_another_function_of_the_same_rule_are_not_used_again():
    model, rule = make_model(), Weighting(lambda G: torch.ones_like(G[0]))
    optimizer = steered(model.parameters(), rule, refresh_every=9)
    optimizer.backward_components(components(model, 0))
    rule.f = lambda G: 2 * torch.ones_like(G[0])
    assert optimizer.backward_components(components(model, 1)).weights.tolist() == [2, 2, 2]
    assert copy.copy(optimizer).backward_components(components(model, 2)).age == 1


def test_a_function_of_the_gramian_is_known_again_in_another_process():
    model = make_model()
    rules = [Weighting(lambda G: torch.ones(len(G), dtype=G.dtype)) for _ in range(2)]  # at two addresses
    first, second = (SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), r, refresh_every=9) for r in rules)
    first.backward_components(components(model, 0))
    second.load_state_dict(first.state_dict())
    assert second.backward_components(components(model, 1)).age == 1


@pytest.mark.parametrize("what", ["frozen", "thawed", "added"])
def test_the_weights_of_other_parameters_are_not_used_again(what):
    x, y = (nn.Parameter(torch.tensor(values)) for values in ([1.0, 2.0], [100.0, 4.0]))
    y.requires_grad_(what != "thawed")
    optimizer = steered([x] if what == "added" else [x, y], Steer("a"), refresh_every=5)

    def losses() -> dict[str, Tensor]:
        return {"a": x.square().sum() + y.square().sum(), "b": -x[0] - 0.9 * y.square().sum()}

    ages = [optimizer.backward_components(losses()).age for _ in range(2)]
    if what == "added":
        optimizer.add_param_group({"params": [y]})
    y.requires_grad_(what != "frozen")
    ages += [optimizer.backward_components(losses()).age for _ in range(2)]
    assert ages == [0, 1, 0, 1]


def test_loading_forgets_the_weights_of_before():
    model = make_model()
    optimizer = SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Sum(), refresh_every=3)
    fresh = optimizer.state_dict()
    optimizer.backward_components(components(model, 0))
    optimizer.load_state_dict(fresh)
    assert optimizer.backward_components(components(model, 1)).age == 0


# A gradient scaler, the monitor, the budgets


def test_scaling_by_a_power_of_two_changes_no_bit():
    results = []
    for enabled in (False, True):
        model = make_model()
        optimizer = SteeredOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05), Steer("a"), refresh_every=3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(optimizer.join(components(model, step))).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
    assert_equal(results[1], results[0])


def test_a_record_has_norms_and_angles_of_exact_steps_only():
    model, monitor = make_model(), Monitor()
    optimizer = SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Steer("a"), refresh_every=2)
    for step in range(4):
        monitor.record(optimizer.backward_components(components(model, step)))
    history = monitor.history()
    for key in ("steer/norm/a", "steer/angle/a~b", "steer/conflict/a~b", "steer/update_norm"):
        assert history[key].isnan().tolist() == [False, True, False, True]
    for key in ("steer/loss/a", "steer/weight/a"):
        assert history[key].isfinite().all()
    assert set(scalars(optimizer.geometry)) == {f"steer/{kind}/{name}" for kind in ("loss", "weight") for name in "abc"}


@pytest.mark.parametrize("way", ["tensors", "join"])
def test_a_step_in_between_has_the_memory_of_a_plain_one_and_reads_nothing(way):
    model, batch = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))), torch.randn(2, 256)
    optimizer = steered(model.parameters(), RULES["PCGrad"], refresh_every=4)
    for _ in range(2):
        optimizer.backward_components(conflicting(model(batch)))
    clear(model.parameters())
    plain = peak_bytes(lambda: sum(conflicting(model(batch)).values()).backward())
    clear(model.parameters())
    with NoHostRead():
        backward(optimizer, lambda: conflicting(model(batch)), way)
    assert optimizer.geometry.age == 2
    clear(model.parameters())
    extra = peak_bytes(lambda: backward(optimizer, lambda: conflicting(model(batch)), way)) - plain
    assert optimizer.geometry.age == 3
    assert extra <= 2**14  # the weights, and what a join keeps


# Weights that are old are no danger


def finetune(
    rule, names: tuple[str, str], *, every: int, lr: float = 0.1
) -> tuple[list[float], list[float], list[int]]:
    """A task and the KL to a frozen copy of the model, whose gradient is rounding noise at the start.

    Lengths of updates, losses of the task, ages.
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 5))
    frozen = copy.deepcopy(model)
    optimizer = SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule, refresh_every=every)
    lengths, losses, ages = [], [], []
    for step in range(40):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        logits = model(x)
        task = nn.functional.cross_entropy(logits, x[:, :5].argmax(1))
        kl = nn.functional.kl_div(
            logits.log_softmax(-1), frozen(x).detach().log_softmax(-1), reduction="batchmean", log_target=True
        )
        optimizer.zero_grad()
        geometry = optimizer.backward_components(dict(zip(names, (task, kl), strict=True)))
        lengths.append(float(flat_grad(model.parameters()).norm()))
        losses.append(task.item())
        ages.append(geometry.age)
        optimizer.step()
    return lengths, losses, ages


BLOWN_UP = {
    "Steer": (Steer("kl"), ("task", "kl")),
    "Steer, always": (Steer("kl", project="always"), ("task", "kl")),
    "Steer, free norm": (Steer("kl", preserve_norm=False), ("task", "kl")),
    "PCGrad": (PCGrad(), ("task", "kl")),
    "PCD": (PCD("task"), ("task", "kl")),
    "VGS": (VGS(), ("std", "vis")),
    "Weighting": (Weighting(lambda G: torch.where(G.diagonal() > 0, G.diagonal().rsqrt(), 0.0)), ("task", "kl")),
}


@pytest.mark.parametrize("every", [2, 10])
@pytest.mark.parametrize(("rule", "names"), BLOWN_UP.values(), ids=BLOWN_UP)
def test_a_gradient_of_nearly_nothing_does_not_destroy_the_run(rule, names, every):
    exact, expected, _ = finetune(rule, names, every=1)
    lengths, losses, ages = finetune(rule, names, every=every)
    last = None
    for length, age in zip(lengths, ages, strict=True):
        if age == 0:
            last = length
        assert length <= (1 + 1e-5) * BOUND * last
    assert losses[-1] < losses[0]
    # The run ends where the exact one does: of the way that the exact one went, no more than a fifth is missing.
    assert losses[-1] - expected[-1] <= 0.2 * (expected[0] - expected[-1])
    assert max(lengths) <= BOUND * max(exact)


def test_weights_that_make_much_of_little_are_used_again_once_that_is_usual():
    """Two steps in a row with the same small gradient, and the second one's weights may serve."""
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = steered([x], Steer("small"), refresh_every=10)
    losses = {"large": x[0] - x[1], "small": 1e-3 * x[1]}
    ages = [optimizer.backward_components(losses, retain_graph=True).age for _ in range(4)]
    assert ages == [0, 0, 1, 2]
    optimizer = steered([x], Steer("small"), refresh_every=10)
    ages = [
        optimizer.backward_components({"large": x[0] - x[1], "small": size * x[1]}).age
        for size in (1e-9, 1e-6, 1e-3, 1e-3, 1e-3)
    ]
    assert ages == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("way", ["tensors", "join"])
def test_an_update_in_between_is_bounded_whatever_scales_the_losses(way):
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = steered([x], Sum(), refresh_every=10)
    scale = {"tensors": 1.0, "join": 2.0}[way]
    first = optimizer.backward_components({"a": x[0], "b": x[1]})
    for size, factor in ((2.0, 1.0), (30.0, 0.1), (float("inf"), 1.0)):
        x.grad = None
        backward(optimizer, lambda size=size: {"a": size * x[0], "b": size * x[1]}, way)
        geometry = optimizer.geometry
        assert_close(geometry.weights, factor * first.weights)
        if size < float("inf"):
            assert_close(x.grad, torch.full_like(x, scale * min(size, 3.0)))
        else:
            assert not x.grad.isfinite().any()  # for a gradient scaler to see


def test_a_resumed_run_is_bounded_as_the_uninterrupted_one():
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    first, second = (steered([x], Sum(), refresh_every=10) for _ in range(2))
    (0.5 * first.join({"a": x[0]})).backward()
    second.load_state_dict(first.state_dict())
    for optimizer in (first, second):
        x.grad = None
        (0.5 * optimizer.join({"a": 8 * x[0]})).backward()
        assert x.grad.tolist() == [1.5, 0]


@pytest.mark.parametrize("counts", [(8, 8, 1), (1, 1, 8)])
@pytest.mark.parametrize("way", ["tensors", "join"])
def test_the_bound_does_not_depend_on_the_number_of_micro_batches(counts, way):
    """Losses, or the joined loss, are divided by it as usual."""
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = steered([x], Sum(), refresh_every=10)
    for n in counts:
        x.grad = None
        for i in range(n):
            losses = {"a": x.sum(), "b": 2 * x.sum()}
            if way == "join":
                (optimizer.join(losses, accumulate=i < n - 1) / n).backward()
            else:
                losses = {name: loss / n for name, loss in losses.items()}
                optimizer.backward_components(losses, accumulate=i < n - 1)
        assert_close(x.grad, torch.full_like(x, 3))


@pytest.mark.parametrize("counts", [(8, 1, 8), (1, 8, 1)])
def test_a_step_of_fewer_micro_batches_is_not_shortened(counts):
    """Trainers divide the losses, not the joined loss, by the number of tokens: all steps are as long."""
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = steered([x], Sum(), refresh_every=10)
    for n in counts:
        x.grad = None
        for i in range(n):
            optimizer.join({"a": x.sum() / n, "b": 2 * x.sum() / n}, accumulate=i < n - 1).backward()
        assert_close(x.grad, torch.full_like(x, 3))


def test_a_run_is_resumed_after_an_overflow():
    x = nn.Parameter(torch.ones(3))

    def make() -> SteeredOptimizer:
        return SteeredOptimizer(torch.optim.SGD([x], lr=0.1), Steer("a"), refresh_every=10)

    optimizer = make()
    ages = []
    for step in range(5):
        factor = float("inf") if step == 0 else 1.0
        other = make()
        other.load_state_dict(optimizer.state_dict())
        found = [
            o.backward_components({"a": factor * x.sum(), "b": -x.prod() / 2}, retain_graph=True)
            for o in (optimizer, other)
        ]
        assert_equal(found[0].weights, found[1].weights)
        ages.append([geometry.age for geometry in found])
    assert ages == [[0, 0], [0, 0], [1, 1], [2, 2], [3, 3]]


def test_weights_that_are_not_finite_are_not_used_again():
    x, calls = nn.Parameter(torch.ones(2)), []

    class Broken(Sum):
        def update(self, G, names, state):
            calls.append(G)
            return torch.full_like(G[:, 0], float("nan") if len(calls) == 1 else 1.0), {}

    optimizer = steered([x], Broken(), refresh_every=5)
    for step in range(3):
        x.grad = None
        geometry = optimizer.backward_components({"a": x.sum(), "b": x[0]})
        assert x.grad.isfinite().all() == (step > 0)
    assert geometry.age == 1


def test_a_rule_that_is_swapped_during_accumulation_serves_that_step_only():
    x = nn.Parameter(torch.ones(3))
    first, second = (Weighting(lambda G, w=w: torch.tensor(w)) for w in ([1.0, 0.0], [0.0, 1.0]))
    optimizer = steered([x], first, refresh_every=100)
    losses = {"a": x.sum(), "b": 2 * x.sum()}
    optimizer.backward_components(losses, retain_graph=True)
    optimizer.backward_components(losses, accumulate=True, retain_graph=True)
    optimizer.rule = second
    found = [optimizer.backward_components(losses, retain_graph=True) for _ in range(3)]
    assert [geometry.weights.tolist() for geometry in found] == [[1, 0], [0, 1], [0, 1]]
    assert [geometry.age for geometry in found] == [1, 0, 1]


def test_what_is_written_to_a_geometry_changes_no_later_step():
    x = nn.Parameter(torch.ones(3))
    optimizer = steered([x], Sum(), refresh_every=5)
    for _ in range(3):
        x.grad = None
        geometry = optimizer.backward_components({"a": x.sum(), "b": 2 * x.sum()})
        assert x.grad.tolist() == [3, 3, 3]
        geometry.weights.fill_(7)
        geometry.G.fill_(7)


@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_a_joined_loss_may_be_multiplied_by_zero_or_a_negative_number(factor):
    x = nn.Parameter(torch.ones(2))
    optimizer = steered([x], Sum(), refresh_every=3)
    (factor * optimizer.join({"a": x.sum(), "b": x[0]})).backward()
    optimizer.load_state_dict(optimizer.state_dict())
    for sign in (1.0, -1.0):
        x.grad = None
        (sign * optimizer.join({"a": x.sum(), "b": x[0]})).backward()
        assert x.grad.tolist() == [2 * sign, sign]
