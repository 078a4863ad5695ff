"""What inner optimizers have beyond torch's own interface: modes, layouts of their own, line searches; and memory that
does not fit is refused when it is loaded."""

import copy
import io
import json
import time
import warnings

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from toys import assert_equal, components, make_model, memory, steer_step, train

from steer_optim import PCD, GradVac, PCGrad, Steer, SteeredOptimizer, Sum
from steer_optim.memory import KEY


class ScheduleFree(SGD):
    """As schedulefree's optimizers: it evaluates at other weights than it trains at."""

    mode = "train"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


class Lookahead(Optimizer):
    """As pytorch_optimizer's: a wrapper with a state dict of a layout of its own."""

    def __init__(self, optimizer):
        self.optimizer, self.steps = optimizer, 0
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        self.steps += 1
        return self.optimizer.step(closure)

    def state_dict(self):
        return {"steps": self.steps, "base_optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        self.optimizer.load_state_dict(state["base_optimizer"])


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_modes_reach_an_inner_optimizer_that_has_them():
    p = nn.Parameter(torch.ones(1))
    optimizer = SteeredOptimizer(ScheduleFree([p], lr=0.1), Sum())
    optimizer.eval()
    assert optimizer.inner.mode == "eval"
    optimizer.train()
    assert optimizer.inner.mode == "train"
    plain = SteeredOptimizer(SGD([p], lr=0.1), Sum())
    assert not hasattr(plain, "train")
    assert not hasattr(plain, "eval")


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_a_state_dict_of_another_layout_is_saved_and_resumed(refresh_every):
    def make():
        model = make_model()
        inner = Lookahead(AdamW(model.parameters(), lr=0.05))
        return model, SteeredOptimizer(inner, GradVac(beta=0.5), refresh_every=refresh_every)

    model, optimizer = make()
    expected = train(steer_step, optimizer, model, range(6))
    model, optimizer = make()
    train(steer_step, optimizer, model, range(4))
    saved = through_file(optimizer.state_dict())
    assert saved.keys() == {"steps", "base_optimizer", KEY}
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    assert resumed.inner.steps == 4
    assert_equal(train(steer_step, resumed, other, range(4, 6)), expected)
    plain = make()[1]
    plain.load_state_dict(Lookahead(AdamW(make_model().parameters())).state_dict())  # without a memory
    assert plain.inner.steps == 0


def test_hooks_fire_around_a_step_that_torch_does_not_wrap():
    model = make_model()
    optimizer = SteeredOptimizer(Lookahead(SGD(model.parameters(), lr=0.1)), Sum())
    calls = []
    optimizer.register_step_pre_hook(lambda owner, args, kwargs: calls.append(("pre", owner)))
    optimizer.register_step_post_hook(lambda owner, args, kwargs: calls.append(("post", owner)))
    train(steer_step, optimizer, model, range(1))
    assert calls == [("pre", optimizer), ("post", optimizer)]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_hook_that_is_interrupted_leaves_none_behind(wrapped):
    model = make_model()
    inner = SGD(model.parameters(), lr=0.1)
    optimizer = SteeredOptimizer(inner if wrapped else Lookahead(inner), Sum())

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    optimizer.step()
    assert not inner._optimizer_step_pre_hooks


def closure_of(optimizer, model):
    def closure():
        optimizer.zero_grad()
        losses = components(model, 0)
        optimizer.backward_components(losses)
        return sum(losses.values()).detach()

    return closure


def test_a_line_search_on_a_steered_gradient_is_warned_of():
    model = make_model()
    inner = LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    optimizer = SteeredOptimizer(inner, Steer("a"))
    with pytest.warns(UserWarning, match=r"a line search .* may stall. Use LBFGS\(line_search_fn=None\), or Sum\(\)"):
        optimizer.step(closure_of(optimizer, model))
    for rule, search in ((Sum(), "strong_wolfe"), (Steer("a"), None)):
        inner = LBFGS(model.parameters(), lr=0.1, line_search_fn=search)
        optimizer = SteeredOptimizer(inner, rule)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(closure_of(optimizer, model))


# Saved tensors that can be unpacked once


def test_activations_that_come_back_once_are_explained():
    class Once:
        def __init__(self, tensor):
            self.tensor = tensor

        def unpack(self):
            if self.tensor is None:
                raise RuntimeError("Untracked tensor with id 0")
            tensor, self.tensor = self.tensor, None
            return tensor

    model = make_model()
    optimizer = SteeredOptimizer(SGD(model.parameters(), lr=0.1), Steer("a"))
    with torch.autograd.graph.saved_tensors_hooks(Once, Once.unpack):
        losses = components(model, 0)
    with pytest.raises(RuntimeError, match=r"offloaded.*Pass the components as callables"):
        optimizer.backward_components(losses)
    assert all(p.grad is None for p in model.parameters())
    expected = optimizer.backward_components(components(model, 0)).G
    with torch.autograd.graph.saved_tensors_hooks(Once, Once.unpack):
        late = {name: lambda name=name: components(model, 0)[name] for name in "abc"}
        assert_equal(optimizer.backward_components(late).G, expected)


def test_selective_checkpoints_are_explained():
    linear = nn.Linear(3, 3)
    optimizer = SteeredOptimizer(SGD(linear.parameters(), lr=0.1), Steer("a"))

    def losses():
        out = checkpoint(
            lambda x: linear(x).sin(),
            torch.ones(2, 3),
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts([torch.ops.aten.addmm.default]),
        )
        return {"a": out.sum(), "b": out.square().sum()}

    with pytest.raises(RuntimeError, match=r"selective activation checkpointing .*Pass the components as callables"):
        optimizer.backward_components(losses())
    optimizer.backward_components({name: lambda name=name: losses()[name] for name in "ab"})


# Memory that was tampered with


def tampered(state_dict, change):
    state_dict = copy.deepcopy(state_dict)
    group = state_dict["param_groups"][0]
    record = json.loads(group[KEY])
    group[KEY] = change(record) or json.dumps(record)
    return state_dict


CHANGES = {
    "no JSON": lambda r: "{",
    "a number": lambda r: "7",
    "nested": lambda r: "[" * 10**5 + "]" * 10**5,
    "no names": lambda r: r.pop("names") and None,
    "names that are none": lambda r: r.update(names=[1, 2, 3]),
    "names twice": lambda r: r.update(names=["a", "a", "b"]),
    "too few names": lambda r: r.update(names=["a", "b"]),
    "another key": lambda r: r["state"].update(more=["torch.float64", [1.0]]),
    "a key less": lambda r: r["state"].popitem() and None,
    "another shape": lambda r: r["state"].update(cosine=["torch.float64", [[1.0]]]),
    "too many rows": lambda r: r["state"].update(draws=["torch.int64", [0, 0]]),
    "ten million numbers": lambda r: r["state"].update(draws=["torch.int64", [0] * 10**7]),
    "a ragged one": lambda r: r["state"].update(cosine=["torch.float64", [[[0.0] * 3, [0.0], [0.0] * 3]]]),
    "another dtype": lambda r: r["state"].update(draws=["torch.tensor", [0]]),
    "not a number": lambda r: r["state"].update(cosine=["torch.float64", [[[float("nan")] * 3] * 3]]),
    "weights that are not finite": lambda r: r["last"].update(weights=["torch.float64", [float("nan"), 1.0, 1.0]]),
    "weights of another shape": lambda r: r["last"].update(weights=["torch.float64", [1.0]]),
    "a Gramian of another shape": lambda r: r["last"].update(G=["torch.float64", [1.0]]),
    "no weights": lambda r: r["last"].pop("weights") and None,
    "no age": lambda r: r["last"].update(age="old"),
    "an age to come": lambda r: r["last"].update(age=-(10**6)),
    "a negative scale": lambda r: r["last"].update(scale=["torch.float64", -1.0]),
    "huge weights": lambda r: r["last"].update(weights=["torch.float64", [1e301, 1.0, 1.0]]),
    "weights that are integers": lambda r: r["last"].update(weights=["torch.int64", [1, 1, 1]]),
    "draws that are floats": lambda r: r["state"].update(draws=["torch.float64", [1.0]]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_memory_that_was_tampered_with_is_refused_before_anything_changes(change):
    model = make_model()
    options = {"rule": GradVac(beta=0.5), "refresh_every": 3}
    optimizer = SteeredOptimizer(AdamW(model.parameters(), lr=0.05), **options)
    train(steer_step, optimizer, model, range(2))
    bad = tampered(optimizer.state_dict(), change)
    other = SteeredOptimizer(AdamW(model.parameters(), lr=0.1), **options)
    before = memory(other), copy.deepcopy(other.inner.state_dict())
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['steer_optim'\], is damaged .*: take an older"):
        other.load_state_dict(bad)
    assert time.perf_counter() - start < 5  # seconds; a list of ten million numbers took 15
    assert (memory(other), other.inner.state_dict()) == before


@pytest.mark.parametrize("rule", [PCGrad(), PCD("a"), GradVac()], ids=repr)
def test_memory_of_fewer_scopes_may_be_loaded(rule):
    """Whose groups were added later."""
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    first, second = (SteeredOptimizer(SGD([{"params": [a]}], lr=0.1), rule, scope="group") for _ in range(2))
    losses = {"a": a.sum() + b.sum(), "b": -a[0]}
    first.backward_components(losses, retain_graph=True)
    second.load_state_dict(first.state_dict())
    for optimizer in (first, second):
        optimizer.add_param_group({"params": [b]})
        optimizer.backward_components(losses, retain_graph=True)
    assert memory(first) == memory(second)
    assert memory(first)
