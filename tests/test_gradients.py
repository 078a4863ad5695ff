"""Gradients of every dtype, layout and owner are combined or added to rightly: contract, items 14 and 21."""

from itertools import permutations

import numpy as np
import pytest
import torch
from steering import (
    EACH_RULE,
    STEER,
    assert_close,
    assert_steered,
    clear,
    conflicting,
    dense_gradients,
    expected_update,
    flat_grad,
    network,
    steered,
)
from torch import Tensor, nn
from torch.nn import functional as F

from steer_optim import VGS, Steer, Sum, Weighting, combining, measure

# 14. Kinds of parameters and gradients


@EACH_RULE
def test_tied_weights(rule):
    embedding, ids = nn.Embedding(7, 4, dtype=torch.float64), torch.tensor([1, 2, 2, 5])
    head = nn.Linear(4, 7, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    assert_steered(lambda: conflicting(head(embedding(ids).tanh()), rule), [embedding.weight], rule)


@EACH_RULE
def test_one_model_of_several_dtypes(rule):
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)
    parameters = [nn.Parameter(torch.randn(5, 3).to(dtype)) for dtype in dtypes]
    factors = torch.randn(3, 5, 3).double()

    def losses() -> dict[str, Tensor]:
        total = sum(p.abs().double() if p.is_complex() else p.double() for p in parameters)
        values = conflicting(total[None, 0], rule)
        return {name: v + (total * f).sum() for (name, v), f in zip(values.items(), factors, strict=False)}

    # Each gradient is rounded by its dtype as it is scaled and added: three times, by at most 2^-9 in bfloat16.
    assert_steered(losses, parameters, rule, tolerance=3 * 2**-9)
    assert [p.grad.dtype for p in parameters] == list(dtypes)
    clear(parameters[2:4])
    assert_steered(losses, [*parameters[:2], parameters[4]], rule, tolerance=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_not_rounded_to_half_precision(dtype):
    p, factors = nn.Parameter(torch.zeros(4096, dtype=dtype)), torch.randn(2, 4096).to(dtype).double()
    expected = expected_update(lambda: {"std": p.double() @ factors[0], "vis": p.double() @ factors[1]}, [p], VGS(1.3))
    steered([p], VGS(1.3)).backward_components({"std": p.double() @ factors[0], "vis": p.double() @ factors[1]})
    # The elements round by themselves and their errors cancel; that of a weight would be common to all.
    found = flat_grad([p])
    assert abs(found @ expected / expected.square().sum() - 1) < torch.finfo(dtype).eps / 32


@EACH_RULE
def test_channels_last(rule):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    images = torch.randn(2, 3, 6, 6).double()
    expected = expected_update(lambda: conflicting(model(images), rule), model.parameters(), rule)
    model = model.to(memory_format=torch.channels_last)
    assert_steered(lambda: conflicting(model(images), rule), model.parameters(), rule)
    assert_close(flat_grad(model.parameters()), expected)
    assert model[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


@EACH_RULE
def test_complex_parameters(rule):
    a, b = (nn.Parameter(torch.randn(4, 3, dtype=torch.complex128)) for _ in range(2))
    assert_steered(lambda: conflicting(torch.view_as_real((a * b.conj()).exp())[..., 0], rule), [a, b], rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_weight_that_single_precision_cannot_hold(dtype):
    x = nn.Parameter(torch.ones(2, dtype=dtype))
    losses = {"vis": 1e-25 * x.real.sum(), "lang": -1e16 * x.real[0]}
    steered([x], Steer("vis", preserve_norm=False)).backward_components(losses)
    torch.testing.assert_close(x.grad, torch.tensor([-5e15, 5e15], dtype=dtype))


def test_empty_parameters():
    full, empty, scalar = (nn.Parameter(torch.randn(shape).double()) for shape in [(4, 3), (0, 3), ()])
    assert_steered(lambda: conflicting(torch.cat([full * scalar, empty])), [full, empty, scalar])
    assert empty.grad.shape == (0, 3)


def embedded(kinds: list[str], rule=STEER):
    """One component per kind, all of one weight: `sparse`, `dense`, or `both` in one gradient."""
    weight = nn.Parameter(torch.randn(6, 3).double())
    rows = torch.tensor([[0, 4, 4], [1, 4, 1], [4, 4, 0]])  # with repetitions: uncoalesced

    def losses() -> dict[str, Tensor]:
        values = []
        for i, (kind, ids) in enumerate(zip(kinds, rows, strict=False)):
            sparse, dense = F.embedding(ids, weight, sparse=True), weight
            used = {"sparse": [sparse], "dense": [dense], "both": [sparse, dense]}[kind]
            values.append((-0.6) ** i * sum(t.square().sum() + t.sum() for t in used))
        return dict(zip(conflicting(torch.ones(1, 1), rule), values, strict=False))

    return weight, losses


@EACH_RULE
def test_sparse_gradients_stay_sparse(rule):
    weight, losses = embedded(["sparse"] * 3, rule)
    assert_steered(losses, [weight], rule)
    assert weight.grad.is_sparse


@pytest.mark.parametrize("kinds", sorted(set(permutations(["sparse", "dense", "both", "sparse", "dense"], 3))))
def test_a_weight_with_a_sparse_gradient_in_one_component_and_a_dense_one_in_another(kinds):
    weight, losses = embedded(list(kinds))
    assert_steered(losses, [weight])


@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("existing", ["sparse", "dense"])
def test_an_existing_gradient_is_added_to_whatever_its_layout(existing, kind):
    weight, losses = embedded([kind, kind])
    expected = expected_update(losses, [weight], STEER)
    weight.grad = torch.eye(6, 3).double()
    if existing == "sparse":
        weight.grad = weight.grad.to_sparse(1)
    steered([weight]).backward_components(losses())
    assert_close(flat_grad([weight]), expected + torch.eye(6, 3).flatten())


def test_an_existing_gradient_is_added_to_as_autograd_does():
    model, batch = network(), torch.randn(2, 4).double()
    expected = expected_update(lambda: conflicting(model(batch)), model.parameters(), STEER)
    model(batch).sum().backward()
    auxiliary = flat_grad(model.parameters())
    steered(model.parameters()).backward_components(conflicting(model(batch)))
    assert_close(flat_grad(model.parameters()), expected + auxiliary)


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_an_existing_gradient_keeps_its_memory(refresh_every):
    """As in loops with one buffer for all gradients."""
    model, batch = network(), torch.randn(2, 4).double()
    buffer = torch.zeros(sum(p.numel() for p in model.parameters())).double()
    views = buffer.split([p.numel() for p in model.parameters()])
    for p, view in zip(model.parameters(), views, strict=True):
        p.grad = view.view_as(p)
    optimizer = steered(model.parameters(), refresh_every=refresh_every)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        expected = optimizer.backward_components(conflicting(model(batch))).weights @ dense_gradients(
            conflicting(model(batch)), model.parameters()
        )
        assert_close(buffer, expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.ones(()).expand(3), torch.ones(3)),
        (torch.ones(3), torch.full((3,), -1j).conj().imag),
        (torch.ones(6)[::2], torch.ones(3)),
        ((buffer := torch.ones(6))[::2], buffer[2:5]),
    ],
    ids=["expanded", "negated", "strided", "overlapping"],
)
def test_an_existing_gradient_that_cannot_keep_its_memory_is_replaced(first, second):
    x, y = (nn.Parameter(torch.ones(3, dtype=g.dtype)) for g in (first, second))
    x.grad, y.grad = first, second
    steered([x, y], Sum()).backward_components({"a": 2 * x.sum(), "b": 3 * y.sum()})
    assert x.grad.tolist() == [3.0] * 3
    assert y.grad.tolist() == [4.0] * 3


def test_an_existing_gradient_is_unchanged_if_writing_fails(monkeypatch):
    model, batch = network(), torch.randn(2, 4).double()
    for p in [*model.parameters()][:-1]:
        p.grad = torch.ones_like(p)
    before = [p.grad for p in model.parameters()]
    monkeypatch.setattr("steer_optim.combining.put_back", interrupted_once(combining.put_back))
    with pytest.raises(KeyboardInterrupt):
        steered(model.parameters()).backward_components(conflicting(model(batch)))
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    assert all((g == 1).all() for g in before[:-1])


def interrupted_once(call):
    calls = iter([KeyboardInterrupt])

    def replacement(gradients):
        for error in calls:
            raise error
        call(gradients)

    return replacement


# 21. Memory that autograd shares between gradients


def shared_by_views(a: Tensor, b: Tensor) -> Tensor:
    return a.view(2, 2) + b.view(2, 2)


def shared_by_addition(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def shared_in_part(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a[:2], b[2:]]) + torch.cat([b, a])[2:6] + torch.cat([a, b])[:4]


def shared_with_the_whole(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, torch.ones(4, 1).double()]) + torch.cat([b, b])


def shared_by_expansion(a: Tensor, b: Tensor) -> Tensor:
    return a.sum() + b.sum() + (a + b).mean().expand(3, 1)


def shared_sparse_values(a: Tensor, b: Tensor) -> Tensor:
    ids = torch.tensor([0, 2, 2])
    return F.embedding(ids, a, sparse=True) + F.embedding(ids, b, sparse=True)


@pytest.mark.parametrize(
    "shared",
    [
        shared_by_views,
        shared_by_addition,
        shared_in_part,
        shared_with_the_whole,
        shared_by_expansion,
        shared_sparse_values,
    ],
)
@pytest.mark.parametrize("rule", [Steer("vis"), VGS()], ids=repr)
def test_gradients_that_share_memory_are_told_apart(shared, rule):
    a, b = parameters = [nn.Parameter(torch.randn(4, 1).double()) for _ in range(2)]

    def losses() -> dict[str, Tensor]:
        std = shared(a, b).sin().sum()
        return {"std": std, "vis": -0.5 * std + shared(a, b).square().sum()}

    expected = expected_update(losses, parameters, rule)
    assert_steered(losses, parameters, rule)
    optimizer = steered(parameters, rule)
    clear(parameters)
    shared(a, b).cos().sum().backward()  # these gradients share memory too
    auxiliary = flat_grad(parameters)
    optimizer.backward_components({k: v / 2 for k, v in losses().items()}, accumulate=True)
    optimizer.backward_components({k: v / 2 for k, v in losses().items()})
    assert_close(flat_grad(parameters), auxiliary + expected)
    storages = {(g._values() if g.is_sparse else g).untyped_storage().data_ptr() for g in (a.grad, b.grad)}
    assert len(storages) == 2


def test_a_gradient_may_be_a_view_of_what_comes_in():
    a, b = parameters = [nn.Parameter(torch.randn(1).double()) for _ in range(2)]
    expected = expected_update(lambda: {"std": a.view(()), "vis": b.view(())}, parameters, VGS())
    (2 * steered(parameters, VGS()).join({"std": a.view(()), "vis": b.view(())})).backward()
    assert_close(flat_grad(parameters), 2 * expected)


def test_a_gradient_that_shares_memory_with_another_owners():
    """With a parameter outside, which accumulates in place in the next backward pass."""
    a, outside = (nn.Parameter(torch.randn(4, 1).double()) for _ in range(2))

    def losses() -> dict[str, Tensor]:
        return {"std": shared_by_views(a, outside).sin().sum(), "vis": shared_by_views(a, outside).exp().sum()}

    assert_steered(losses, [a])


def test_a_gradient_that_is_a_view_of_a_constant():
    p, constant = nn.Parameter(torch.ones(3)), torch.tensor([[1.0, 2.0, 3.0]])
    p.register_hook(lambda g: constant[0])
    optimizer = steered([p], Weighting(lambda G: torch.tensor([2.0, 3.0])))
    optimizer.backward_components({"a": p.sum(), "b": p.sum()})
    assert p.grad.tolist() == [5, 10, 15]
    assert constant.tolist() == [[1, 2, 3]]


class Add(torch.autograd.Function):
    """A sum whose two gradients are tensors over one buffer of numpy's, which the next backward pass writes again."""

    buffer = np.zeros(2)

    @staticmethod
    def forward(ctx, a, b):
        return a + b

    @staticmethod
    def backward(ctx, gradient):
        Add.buffer[:] = gradient.numpy()
        return torch.from_numpy(Add.buffer), torch.from_numpy(Add.buffer)


def test_gradients_in_a_buffer_of_numpy():
    a, b = (torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    total = Add.apply(a, b)
    losses = {"main": total.sum(), "vis": total.square().sum()}
    geometry = measure(losses, [a, b])
    torch.testing.assert_close(geometry.norms, torch.tensor([4.0, 160.0]).double().sqrt())
    steered([a, b], Steer("vis", preserve_norm=False)).backward_components(losses)
    for p in (a, b):  # 1 + 2 * total, and nothing conflicts
        torch.testing.assert_close(p.grad, torch.tensor([5.0, 9.0], dtype=torch.float64))
