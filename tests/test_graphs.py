"""How the graphs of the components are walked, kept and freed: contract, items 17, 18, 20 and 22, and the budgets."""

import weakref
from collections.abc import Callable

import pytest
import torch
from properties import RULES
from steering import (
    EACH_RULE,
    STEER,
    NoHostRead,
    assert_close,
    assert_steered,
    clear,
    conflicting,
    expected_update,
    flat_grad,
    network,
    peak_bytes,
    steered,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steer_optim import SteeredOptimizer, Sum, measure


def one_by_one(losses: Callable[[], dict[str, Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """The components as callables, each with a forward pass of its own."""
    return {name: lambda name=name: losses()[name] for name in losses()}


# 17. Gradient checkpointing


@EACH_RULE
@pytest.mark.parametrize("way", ["backward_components", "join"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_bit(rule, use_reentrant, way):
    model = nn.Sequential(network(), nn.Dropout(0.5), nn.Linear(3, 3).double())
    batch = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)  # reentrant checkpoints need it to

    def update(forward: Callable[[Tensor], Tensor]) -> Tensor:
        clear(model.parameters())
        torch.manual_seed(0)
        losses = conflicting(forward(batch), rule)
        if way == "join":
            steered(model.parameters(), rule).join(losses).backward()
        else:
            steered(model.parameters(), rule).backward_components(losses)
        return flat_grad(model.parameters())

    found, expected = update(lambda x: checkpoint(model, x, use_reentrant=use_reentrant)), update(model)
    assert torch.equal(found, expected)


def test_checkpointing_from_inputs_that_do_not_require_grad():
    model, batch = network(), torch.randn(8, 4).double()
    expected = expected_update(lambda: conflicting(model(batch)), model.parameters(), STEER)
    steered(model.parameters()).backward_components(conflicting(checkpoint(model, batch, use_reentrant=False)))
    assert_close(flat_grad(model.parameters()), expected)


def test_a_reentrant_checkpoint_that_loses_the_gradients_is_refused():
    model = network()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        output = checkpoint(model, torch.randn(8, 4).double(), use_reentrant=True)
    with pytest.raises(ValueError, match="'std' is detached"):
        steered(model.parameters()).backward_components(conflicting(output))


# 18. Compiled models: with eager kernels, since what a second backward pass may do is settled before code generation


def test_a_compiled_model_is_steered():
    model, batch = network(), torch.randn(8, 4).double()
    expected = expected_update(lambda: conflicting(model(batch)), model.parameters(), STEER)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        clear(model.parameters())
        steered(model.parameters()).backward_components(conflicting(compiled(batch)))
        assert_close(flat_grad(model.parameters()), expected)


def test_a_compiled_graph_that_gave_its_buffers_away_is_refused_with_a_remedy_that_works():
    model, batch = network(), torch.randn(8, 4).double()
    expected = expected_update(lambda: conflicting(model(batch)), model.parameters(), STEER)
    torch.compiler.reset()  # what an equal model has compiled would be used again
    compiled = torch.compile(model, backend="aot_eager")
    compiled(batch).sum().backward()  # compiles a backward pass that can run once per graph
    before = [p.grad for p in model.parameters()]
    optimizer = steered(model.parameters())
    with pytest.raises(RuntimeError, match="donated_buffer = False before the first backward"):
        optimizer.backward_components(conflicting(compiled(batch)))
    with pytest.raises(RuntimeError, match="donated_buffer = False before the first backward"):
        measure(conflicting(compiled(batch)), model.parameters())
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), before, strict=True))

    clear(model.parameters())
    optimizer.backward_components(one_by_one(lambda: conflicting(compiled(batch))))
    assert_close(flat_grad(model.parameters()), expected)

    torch.compiler.reset()
    clear(model.parameters())
    with torch._functorch.config.patch(donated_buffer=False):
        compiled(batch).sum().backward()
        clear(model.parameters())
        optimizer.backward_components(conflicting(compiled(batch)))
    assert_close(flat_grad(model.parameters()), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at an input's
def test_a_compiled_loss_is_steered():
    model, batch = network(), torch.randn(8, 4).double()
    torch.compiler.reset()
    losses = torch.compile(conflicting, backend="aot_eager")
    assert_steered(lambda: losses(model(batch)), model.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # imported by dynamo
def test_a_compiled_step_is_that_of_the_inner_optimizer():
    trained = []
    for wrap in (lambda inner: inner, lambda inner: SteeredOptimizer(inner, STEER)):
        torch.manual_seed(0)
        torch.compiler.reset()
        model = network()
        optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=0.1))
        step = torch.compile(optimizer.step, backend="eager")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4).double()).square().mean().backward()
            step()
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*trained)


# Retained and freed graphs


@pytest.mark.parametrize("way", ["backward_components", "join"])
def test_the_graph_is_freed_unless_it_is_retained(way):
    model, batch = network(), torch.randn(8, 4).double()
    losses = conflicting(model(batch))
    optimizer = steered(model.parameters())

    def backward(retain_graph: bool) -> None:
        if way == "join":
            joined.backward(retain_graph=retain_graph)
        else:
            optimizer.backward_components(losses, retain_graph=retain_graph)

    joined = optimizer.join(losses)
    backward(retain_graph=True)
    once = flat_grad(model.parameters())
    backward(retain_graph=False)
    assert_close(flat_grad(model.parameters()), 2 * once, 0.0)
    with pytest.raises(RuntimeError, match="second time"):
        backward(retain_graph=False)
    assert_close(flat_grad(model.parameters()), 2 * once, 0.0)


class Saved:
    """Counts the tensors that graphs keep for their backward passes."""

    def __init__(self) -> None:
        self.alive = weakref.WeakSet()

    def __enter__(self) -> "Saved":
        class Box:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

        def pack(tensor: Tensor) -> Box:
            box = Box(tensor)
            self.alive.add(box)
            return box

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.hooks.__exit__(*exception)


@pytest.mark.parametrize(("first", "retain_graph"), [("callable", False), ("callable", True), ("tensor", False)])
@pytest.mark.parametrize("way", ["backward_components", "measure"])
def test_a_graph_is_freed_before_the_next_callable_builds_its_own(first, retain_graph, way):
    # No layer that saves its output: under saved-tensor hooks that is a cycle, which lives on by itself.
    model, batch = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), torch.randn(8, 4)
    saved_at_start = {}

    def component(name: str) -> Tensor:
        saved_at_start[name] = len(saved.alive)
        return model(batch).square().mean() if name == "std" else model(batch)[:, 0].mean()

    with Saved() as saved:
        losses = {name: lambda name=name: component(name) for name in ("std", "vis")}
        if first == "tensor":
            losses["std"] = losses["std"]()
            assert len(saved.alive) > 0
        if way == "measure":
            measure(losses, model.parameters(), retain_graph=retain_graph)
        else:
            steered(model.parameters()).backward_components(losses, retain_graph=retain_graph)
        assert saved_at_start == {"std": 0, "vis": 0}
        assert len(saved.alive) == 0


def test_callables_give_what_tensors_give():
    model, batch = network(), torch.randn(8, 4).double()
    expected = expected_update(lambda: conflicting(model(batch)), model.parameters(), STEER)
    losses = one_by_one(lambda: conflicting(model(batch)))
    steered(model.parameters()).backward_components(losses)
    assert_close(flat_grad(model.parameters()), expected)
    clear(model.parameters())
    steered(model.parameters()).join(losses).backward()
    assert_close(flat_grad(model.parameters()), expected)


def test_callables_that_share_a_graph_need_it_retained():
    model, batch = network(), torch.randn(8, 4).double()
    expected = expected_update(lambda: conflicting(model(batch)), model.parameters(), STEER)
    hidden = model(batch)
    losses = one_by_one(lambda: conflicting(hidden))
    steered(model.parameters()).backward_components(losses, retain_graph=True)
    assert_close(flat_grad(model.parameters()), expected)
    clear(model.parameters())
    with pytest.raises(RuntimeError, match="second time"):
        steered(model.parameters()).backward_components(losses)


def test_two_optimizers_over_disjoint_parameters_of_one_graph():
    model, batch = network(), torch.randn(8, 4).double()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    losses = conflicting(model(batch))
    everywhere = torch.cat([expected_update(lambda: conflicting(model(batch)), p, STEER) for p in (first, second)])
    plain = expected_update(lambda: conflicting(model(batch)), model.parameters(), Sum())
    n = sum(p.numel() for p in first)

    steered(first).backward_components(losses, retain_graph=True)
    assert_close(flat_grad(model.parameters()), torch.cat([everywhere[:n], plain[n:]]))
    clear(model.parameters())
    steered(second).backward_components(losses)
    assert_close(flat_grad(model.parameters()), torch.cat([plain[:n], everywhere[n:]]))


def test_nothing_is_isolated_by_zero_grad():
    """Accelerate makes ``zero_grad`` do nothing while it accumulates."""
    model, batch = network(), torch.randn(8, 4).double()
    expected = expected_update(lambda: conflicting(model(batch)), model.parameters(), STEER)
    optimizer = steered(model.parameters())
    optimizer.zero_grad = optimizer.inner.zero_grad = lambda set_to_none=True: None
    optimizer.backward_components(conflicting(model(batch)), accumulate=True)
    optimizer.backward_components(conflicting(model(batch)))
    assert_close(flat_grad(model.parameters()), 2 * expected)


def test_tensor_hooks_see_each_component_on_its_way():
    x = nn.Parameter(torch.ones(2))
    seen = []
    x.register_hook(lambda gradient: seen.append(gradient.tolist()))
    steered([x]).backward_components({"std": x.sum(), "vis": -x[0]})
    assert seen == [[1, 1], [-1, 0]]


# Budgets


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_steering_k_components_holds_k_gradient_sets_and_no_more(count, scope):
    model, batch = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))), torch.randn(2, 256)
    one_set = sum(p.numel() * p.element_size() for p in model.parameters())
    losses = dict([*conflicting(model(batch)).items()][:count])
    optimizer = steered(model.parameters(), scope=scope)
    plain = peak_bytes(lambda: sum(conflicting(model(batch)).values()).backward())
    clear(model.parameters())
    assert plain >= one_set
    extra = peak_bytes(lambda: optimizer.backward_components(losses)) - plain
    assert extra <= 1.05 * (count - 1) * one_set


@pytest.mark.parametrize("name", sorted(set(RULES) - {"Weighting"}))  # a user's function is given its matrix on the CPU
@pytest.mark.parametrize("scope", ["model", "group", "tensor"])
@pytest.mark.parametrize("device", ["cpu", "meta"])  # which has no numbers, and takes the paths of an accelerator
def test_no_number_is_read_from_the_device(name, scope, device):
    model = nn.Sequential(network(torch.float32), nn.Linear(3, 3), nn.Linear(3, 3).bfloat16()).to(device)
    optimizer = steered(model.parameters(), RULES[name], scope=scope)
    for way in ("backward_components", "accumulate", "join"):
        losses = conflicting(model[1](model[0](torch.randn(8, 4, device=device))), RULES[name])
        with NoHostRead():
            if way == "join":
                (2 * optimizer.join(losses)).backward()
            else:
                optimizer.backward_components(losses, accumulate=way == "accumulate")


def test_reading_a_number_is_noticed():
    with NoHostRead(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        float(torch.ones(1))
    with NoHostRead(), pytest.raises(AssertionError, match="copy"):
        torch.ones(1).to("meta")
