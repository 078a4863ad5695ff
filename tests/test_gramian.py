"""Inner products against the dense float64 product: dtypes, strides, absences, lengths; and what `measure` leaves."""

import dataclasses
from threading import Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steering import assert_close, conflicting, flat_grad, network, steered
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steer_optim import Geometry, measure, reference
from steer_optim.gramian import gramian as gramian_of
from steer_optim.holding import LocalSets

# What a dot product over 2**16 elements may lose, relative to the product of the norms. In float32 that is 1e-6 for
# random elements, and ten times that where the roundings go to one side: elements repeat, or have few bits.
# In float64 the dense product, which is not cut up, loses more than that.
FLOAT32, FLOAT64 = 2e-5, 1e-12
ACCURACY = {
    torch.float64: FLOAT64,
    torch.complex128: FLOAT64,
    torch.float32: FLOAT32,
    torch.complex64: FLOAT32,
    torch.bfloat16: FLOAT32,
    torch.float16: FLOAT32,
}
# Short ones are laid end to end, from 2**12 they are not, and beyond 2**16 they are cut up.
SHAPES = [(), (0,), (1,), (3,), (2, 0, 3), (5, 7), (2, 3, 4, 5), (63, 65), (64, 64), (2, 3, 128, 128), (2**16 + 1,)]
DTYPES = list(ACCURACY)


def gramian(sets: list[dict[Tensor, Tensor]], parameters: list[Tensor]) -> Tensor:
    held = LocalSets([str(i) for i in range(len(sets))], [parameters])
    for i, gradients in enumerate(sets):
        held.take(str(i), dict(gradients))
    (G,) = gramian_of(held)
    return G


def contiguous(g: Tensor) -> Tensor:
    return g


def transposed(g: Tensor) -> Tensor:
    return g.mT.contiguous().mT if g.ndim > 1 else g


def channels_last(g: Tensor) -> Tensor:
    return g.contiguous(memory_format=torch.channels_last) if g.ndim == 4 else g


def strided(g: Tensor) -> Tensor:
    return torch.stack([g, -g], -1)[..., 0]


def expanded(g: Tensor) -> Tensor:
    return g[..., :1].expand(g.shape) if g.ndim > 1 else g


def conjugate(g: Tensor) -> Tensor:
    return g.conj()


STRIDES = [contiguous, transposed, channels_last, strided, expanded, conjugate]


@st.composite
def gradient_sets(draw: st.DrawFn) -> tuple[list[Tensor], list[dict[Tensor, Tensor]]]:
    """Parameters and `k` gradient sets: any dtypes and shapes, in strides of their own, some of them absent."""
    k = draw(st.integers(1, 4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    parameters, sets = [], [{} for _ in range(k)]
    for _ in range(draw(st.integers(1, 6))):
        shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
        p = torch.empty(shape, dtype=dtype)
        parameters.append(p)
        for one_set in sets:
            if draw(st.booleans()) or draw(st.booleans()):
                g = torch.randn(shape, generator=random, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
                one_set[p] = draw(st.sampled_from(STRIDES))(g)
    return parameters, sets


def dense(parameters: list[Tensor], sets: list[dict[Tensor, Tensor]]) -> Tensor:
    """The gradient sets as one real matrix ``(k, n)``, float64."""
    rows = [[s.get(p, torch.zeros_like(p)).resolve_conj() for p in parameters] for s in sets]
    return reference.flatten([[torch.view_as_real(g) if g.is_complex() else g for g in row] for row in rows])


@given(gradient_sets())
def test_the_gramian_is_the_dense_product(drawn):
    parameters, sets = drawn
    G = gramian(sets, parameters)
    assert G.dtype == torch.float64
    assert torch.equal(G, G.mT)
    J = dense(parameters, sets)
    accuracy = max(ACCURACY[p.dtype] for p in parameters)
    assert ((G - J @ J.T).abs() <= accuracy * J.norm(dim=1)[:, None] * J.norm(dim=1)).all()


@given(gradient_sets(), st.randoms())
def test_the_gramian_does_not_depend_on_the_order_of_the_components(drawn, random):
    parameters, sets = drawn
    order = random.sample(range(len(sets)), len(sets))
    assert torch.equal(gramian([sets[i] for i in order], parameters), gramian(sets, parameters)[order][:, order])


def test_gradients_of_different_strides_give_the_same_bits_in_any_order():
    p = torch.empty(200, 300)
    sets = [{p: torch.randn(200, 300)}, {p: transposed(torch.randn(200, 300))}]
    assert torch.equal(gramian(sets, [p])[0, 1], gramian(sets[::-1], [p])[0, 1])
    assert_close(gramian(sets, [p]), gramian([{p: contiguous(g)} for s in sets for g in s.values()], [p]), 1e-6)


def test_many_small_tensors_of_several_dtypes():
    parameters = [torch.empty(i % 7, 3, dtype=DTYPES[i % 6]) for i in range(100)]
    sets = [{p: torch.randn(p.shape).to(p) for p in parameters[offset:]} for offset in (0, 20)]
    J = dense(parameters, sets)
    assert_close(gramian(sets, parameters), J @ J.T, 1e-6)


def test_no_gradient_at_all_is_a_zero_gramian():
    assert torch.equal(gramian([{}, {}], [torch.empty(3)]), torch.zeros(2, 2, dtype=torch.float64))


def test_ten_million_elements_are_summed_more_accurately_than_float32_can():
    p = torch.empty(10**7)
    # All products have one sign, so that a running sum outgrows its terms.
    a, b = torch.rand(10**7), torch.rand(10**7)
    exact = float(torch.dot(a.double(), b.double()))
    assert abs(float(gramian([{p: a}, {p: b}], [p])[0, 1]) - exact) <= 1e-6 * exact
    assert abs(float(torch.dot(a, b)) - exact) > 1e-6 * exact


def test_half_precision_does_not_overflow_in_the_products():
    p = torch.empty(2000, dtype=torch.float16)
    g = torch.full_like(p, 300)  # its square is beyond 65504
    assert gramian([{p: g}], [p]).item() == 2000 * 300.0**2


def test_an_infinite_gradient_shows():
    p = torch.empty(3)
    assert not gramian([{p: torch.tensor([1.0, torch.inf, 0.0])}], [p]).isfinite().any()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_gradients_of_another_layout_are_refused():
    p = torch.eye(3)
    with pytest.raises(TypeError, match=r"dense or sparse COO; got layout torch.sparse_csr \(shape \(3, 3\)\)"):
        gramian([{p: torch.eye(3).to_sparse_csr()}], [p])


# Geometry


def test_the_geometry_of_a_step_describes_it():
    model, batch = network(), torch.randn(8, 4).double()
    geometry = steered(model.parameters()).backward_components(conflicting(model(batch)))
    rows = [torch.autograd.grad(loss, model.parameters()) for loss in [conflicting(model(batch))["vis"]]]
    vis = reference.flatten(rows)[0]
    assert geometry.names == ("std", "vis", "lp")
    assert_close(geometry.norm("vis"), vis.norm())
    assert_close(geometry.update_norm, flat_grad(model.parameters()).norm())
    assert_close(geometry.sum_norm, geometry.update_norm)  # Steer preserves it
    assert geometry.conflicts[geometry.index("std"), geometry.index("vis")]
    assert geometry.cosine("vis", "std") == geometry.cosines[0, 1] < 0
    assert geometry.angle("std", "vis") > 90
    assert torch.equal(geometry.weights, torch.stack([geometry.weight(name) for name in geometry.names]))
    losses = conflicting(model(batch))
    assert torch.equal(geometry.losses, torch.stack(list(losses.values())))


def test_zero_gradients_have_no_direction():
    geometry = Geometry(("a", "b"), torch.diag(torch.tensor([4.0, 0.0]).double()), torch.ones(2).double())
    assert geometry.norms.tolist() == [2, 0]
    assert geometry.cosines.tolist() == [[1, 0], [0, 0]]
    assert geometry.angles.tolist() == [[0, 90], [90, 90]]
    assert not geometry.conflicts.any()


def test_an_unknown_component_is_named():
    geometry = Geometry(("a", "b"), torch.eye(2), torch.ones(2))
    with pytest.raises(KeyError, match="no component 'c'; this step has 'a', 'b'"):
        geometry.norm("c")


# measure


def test_measuring_touches_nothing_and_keeps_the_graph():
    model, batch = network(), torch.randn(8, 4).double()
    gradient = model[0].weight.grad = torch.ones_like(model[0].weight)
    losses = conflicting(model(batch))
    measured = measure(losses, model.parameters())
    assert model[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    stepped = steered(model.parameters()).backward_components(losses)  # the graph is still there
    assert_close(measured.G, stepped.G)
    assert measured.names == stepped.names
    assert torch.equal(measured.losses, stepped.losses)
    assert torch.equal(measured.weights, torch.ones(3).double())
    assert measured.scopes == ()


def test_measuring_without_retaining_frees_the_graph():
    model, batch = network(), torch.randn(8, 4).double()
    losses = conflicting(model(batch))
    measure(losses, model.parameters(), retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        measure(losses, model.parameters())


def test_measuring_takes_callables_frozen_parameters_and_inner_tensors():
    model, batch = network(), torch.randn(8, 4).double()
    model[0].requires_grad_(False)
    losses = {name: lambda name=name: conflicting(model(batch))[name] for name in ("std", "vis")}
    with torch.no_grad():
        measured = measure(losses, iter([*model.parameters()]))
    assert_close(measured.G, measure(losses, model[2].parameters()).G, 0.0)

    output = model(batch)
    inner = measure({"a": output.sum(), "b": -output[0].sum()}, [output])
    assert inner.G.tolist() == [[24, -3], [-3, 3]]


def test_measure_refuses_a_reentrant_checkpoint_and_names_the_remedy():
    model, batch = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
    loss = checkpoint(model, batch, use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        measure({"a": loss}, model.parameters())


def test_measuring_in_another_thread_during_a_step():
    model, batch = network(), torch.randn(8, 4).double()
    measured = []

    def late() -> Tensor:
        thread = Thread(target=lambda: measured.append(measure(conflicting(model(batch)), model.parameters())))
        thread.start()
        thread.join()
        return conflicting(model(batch))["vis"]

    stepped = steered(model.parameters()).backward_components({"std": conflicting(model(batch))["std"], "vis": late})
    assert_close(measured[0].G[:2, :2], stepped.G)


def test_measure_refuses_sharded_parameters():
    class DTensor(torch.Tensor):  # known by the name of its class
        pass

    p = torch.ones(2).as_subclass(DTensor).requires_grad_()
    with pytest.raises(TypeError, match="sharded parameters"):
        measure({"a": p.sum()}, [p])


def test_measure_counts_a_tied_parameter_once():
    p = torch.tensor([1.0, 2.0], requires_grad=True)
    losses = {"a": p.sum(), "b": p[0] - p[1]}
    assert torch.equal(measure(losses, [p, p]).G, measure(losses, [p]).G)


def test_measure_of_something_else_than_parameters_is_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"model\.parameters"):
        measure({"a": model(torch.ones(2)).sum()}, model.named_parameters())


def test_geometries_are_compared_by_identity():
    geometry = Geometry(("a",), torch.eye(1).double(), torch.ones(1).double())
    assert geometry in [geometry]
    assert geometry != dataclasses.replace(geometry)


def test_a_geometry_shows_its_public_fields_only():
    geometry = Geometry(("a",), torch.eye(1).double(), torch.ones(1).double())
    assert "=None, scopes=(), age=0)" in repr(geometry)
