import dataclasses
import math

import pytest
import torch
from hidden_states import EXACT, MASK, NAMES, assert_same, dense, gradients, random_states, views_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steer_optim.vlm import DecomposedDistillation, Head, HiddenStates, adaptive_strength, visual_dependency
from steer_optim.vlm.distillation import DECOMPOSITIONS
from steer_optim.vlm.divergences import TERMS, Term, token_losses
from steer_optim.vlm.engine import weighted_sums

METHODS = [
    DecomposedDistillation("vgs", lam=0.5, chunk_size=3),
    DecomposedDistillation("vgs", lam=0.0, adaptive=True, chunk_size=2),
    DecomposedDistillation("vgs", lam=0.5, adaptive=True, detach_prior=False, temperature=2.0, chunk_size=4),
    DecomposedDistillation("standard", temperature=0.5, chunk_size=1),
    DecomposedDistillation("exact", floor=0.05, chunk_size=100),
    DecomposedDistillation("exact", adaptive=True, detach_prior=False, chunk_size=4),
    DecomposedDistillation("language", lam=0.3, quantile=0.5, chunk_size=4),
    DecomposedDistillation("language", lam=0.3, detach_prior=False, floor=0.1, chunk_size=4),
    *(DecomposedDistillation(name, prior="live", chunk_size=3) for name in DECOMPOSITIONS),
]
METHODS += [dataclasses.replace(method, reduction="sequence") for method in METHODS]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


@every_method
@pytest.mark.parametrize("kind", ["plain", "bias", "softcap", "lora", "everything"])
def test_every_method_and_head_is_the_eager_one(method, kind):
    states = random_states(3, 4, 9, kind=kind, padded=2)
    assert_same(method(views_of(states), MASK), method(views_of(dense(states)), MASK), states, **EXACT)


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_every_entry_is_the_eager_one(name):
    states, frozen = random_states(3, 4, 9, kind="everything", padded=2), random_states(3, 4, 9, seed=1)[1].detach()
    weighted = any(part.factor == "lam" for part in DECOMPOSITIONS[name].components.values())
    method = DecomposedDistillation(name, lam=0.5 if weighted else None, chunk_size=3)
    meant = method({**views_of(dense(states)), "prior": frozen.logits()}, MASK)
    assert_same(method({**views_of(states), "prior": frozen}, MASK), meant, states, **EXACT)
    method.rule().check(list(meant))


@settings(deadline=None)
@given(
    method=st.sampled_from(METHODS),
    mask=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5),
    chunk_size=st.integers(1, 16),
    V=st.integers(2, 8),
    padded=st.integers(0, 2),
    seed=st.integers(0, 10_000),
)
def test_any_mask_chunk_and_vocabulary(method, mask, chunk_size, V, padded, seed):
    mask_BT = torch.tensor(mask)
    states = random_states(*mask_BT.shape, V, seed=seed, padded=padded)
    method = dataclasses.replace(method, chunk_size=chunk_size)
    generator = torch.Generator().manual_seed(seed)
    gate_BT = torch.rand(mask_BT.shape, generator=generator) < 0.5
    strength_BT = torch.rand(mask_BT.shape, generator=generator) if method.adaptive else None
    given_too = {"count": 7.0, "gate_BT": gate_BT, "strength_BT": strength_BT}
    for options in ({}, given_too):
        found, meant = method(views_of(states), mask_BT, **options), method(views_of(dense(states)), mask_BT, **options)
        assert_same(found, meant, states, **EXACT)


@pytest.mark.parametrize("padded", [-2, 0, 2])
def test_a_teacher_that_is_logits(padded):
    states = random_states(3, 4, 9, padded=padded)
    logits = [x.logits() for x in states[2:]]
    for method in METHODS:
        assert_same(
            method(views_of([*states[:2], *logits]), MASK), method(views_of(dense(states)), MASK), states, **EXACT
        )


@pytest.mark.parametrize("options", [{}, {"floor": 0.1, "temperature": 0.5}])
@pytest.mark.parametrize("attached", [(), ("prior",)])
@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_every_term_of_the_table_and_more(kind, attached, options):
    states = random_states(3, 4, 9, kind=kind, padded=2)
    views = {name: x[MASK] for name, x in views_of(states).items()}
    views["prior"] = views["student_text"]
    terms = {
        "vp": dataclasses.replace(TERMS["vp"], attached=attached),
        "pushed": Term("student", {"teacher": 2.0, "teacher_text": -1.0}, divergence="forward"),
        "mixed": Term("student", {"prior": 0.3, "teacher": 0.7}, divergence="jsd", beta=0.2, attached=attached),
        "reverse": Term("student_text", {"prior": 0.5, "teacher": 0.5}, attached=attached),
        **{name: TERMS[name] for name in ("std", "lang", "forward", "jsd", "vds")},
        "vis": dataclasses.replace(TERMS["vis"], attached=attached),
    }
    weights = {name: torch.rand(6, dtype=torch.float64) for name in terms}
    oracle = token_losses({name: x.logits() for name, x in views.items()}, terms=terms, **options)
    meant = {name: (weights[name] * oracle[name]).sum() for name in terms}
    sums, losses = weighted_sums(views, terms, weights, chunk_size=4, **options)
    assert_close(losses, {name: oracle[name].detach() for name in terms}, **EXACT)
    assert not sums.pop("vds").requires_grad
    assert not meant.pop("vds").requires_grad
    assert_same(sums, meant, states, **EXACT)


def test_backward_passes_compose():
    states = random_states(3, 4, 9, kind="everything")
    method = DecomposedDistillation("vgs", lam=0.5, detach_prior=False, chunk_size=4)
    found, meant = (method(views_of(x), MASK) for x in (states, dense(states)))

    def weighed(components):
        return 3 * components["std"] - components["vis"] ** 2 + 0 * components["lp"]

    for _ in range(2):  # the second time over the same graph
        for x, y in zip(gradients(weighed(found), states), gradients(weighed(meant), states), strict=True):
            assert_close(x, y, **EXACT)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(0 * found["vis"], states))

    seen = []
    weight, hidden = states[0].head.weight_Vd, states[0].hidden_BTd
    found["vis"].register_hook(lambda g: seen.append(g) or 2 * g)
    meant = {name: gradients(loss, states)[2] for name, loss in meant.items()}
    doubled = torch.autograd.grad(found["vis"], [weight], retain_graph=True)[0]
    assert_close(doubled, 2 * meant["vis"], **EXACT)
    hidden.register_hook(lambda g: seen.append(g))
    (found["std"] + found["vis"]).backward()
    assert len(seen) == 3
    assert_close(weight.grad, meant["std"] + 2 * meant["vis"], **EXACT)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        found["vis"].backward()


def test_differentiating_twice_is_refused():
    states = random_states(3, 4, 9)
    std = DecomposedDistillation("standard")(views_of(states), MASK)["std"]
    (gradient,) = torch.autograd.grad(std, [states[0].hidden_BTd], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


def test_gradients_of_tied_weights_add_up():
    weight, ids_BT = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), torch.arange(12).reshape(3, 4) % 9
    teacher = random_states(3, 4, 9)[2].logits()
    states = HiddenStates(torch.nn.functional.embedding(ids_BT, weight), Head(weight))
    method = DecomposedDistillation("standard", chunk_size=4)
    losses = (method({"student": x, "teacher": teacher}, MASK)["std"] for x in (states, states.logits()))
    found, meant = (torch.autograd.grad(loss, [weight], retain_graph=True)[0] for loss in losses)
    assert_close(found, meant, **EXACT)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes, and of matrix products with a head."""

    def __init__(self):
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before, after = (
            {x.data_ptr(): x for x in tree_leaves(y) if isinstance(x, torch.Tensor)} for y in (args, result)
        )
        self.elements = max([self.elements, *(x.numel() for place, x in after.items() if place not in before)])
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return result


def measured(method, states, mask_BT, **options):
    with Largest() as largest:
        sum(method(views_of(states), mask_BT, **options).values()).backward()
    return largest


@pytest.mark.parametrize("detach_prior", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_no_tensor_grows_with_rows_times_vocabulary(frozen, detach_prior):
    method = DecomposedDistillation("vgs", lam=0.5, adaptive=True, detach_prior=detach_prior, chunk_size=8)
    V, d = 50, 16
    for N in (16, 64):
        states = random_states(N // 8, 8, V, d=d)
        if frozen:
            states[0].head.weight_Vd.requires_grad_(False)
        largest = measured(method, states, torch.ones(N // 8, 8, dtype=torch.bool))
        # A chunk of logits, the gradient of the head's weight, or all hidden states.
        assert largest.elements == max(8 * V, 0 if frozen else V * d, N * d)
        assert (states[0].head.weight_Vd.grad is None) == frozen


def test_the_head_meets_gated_rows_only_and_none_without_weight():
    mask_BT, gate_BT = torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    method = DecomposedDistillation("vgs", lam=0.5, chunk_size=4)

    def products(method, gated):
        gate_BT.view(-1)[:gated], gate_BT.view(-1)[gated:] = True, False
        return measured(method, random_states(3, 4, 9), mask_BT, gate_BT=gate_BT).products

    without = products(dataclasses.replace(method, lam=0.0), 12)
    # Two heads' logits, and a gradient at states and head, for each chunk of four gated rows.
    assert [products(method, gated) - without for gated in (0, 4, 5, 12)] == [0, 4, 8, 12]


def test_a_head_in_half_precision_is_cast_once_for_all_views_and_chunks():
    states = random_states(3, 4, 9, dtype=torch.bfloat16)
    states[1:] = [x.detach() for x in states[1:]]

    class Casts(TorchDispatchMode):
        heads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Casts.heads += func.overloadpacket is torch.ops.aten._to_copy and args[0].shape == (9, 4)
            return func(*args, **(kwargs or {}))

    with Casts():
        DecomposedDistillation("vgs", lam=0.0, chunk_size=4)(views_of(states), MASK)
    assert Casts.heads == 2  # the student's and the teacher's


def test_nothing_is_precomputed_without_gradients():
    states, method = random_states(3, 4, 9), DecomposedDistillation("vgs", lam=0.5, chunk_size=4)
    with torch.no_grad(), Largest() as without:
        components = method(views_of(states), MASK)
    assert not any(x.requires_grad for x in components.values())
    assert_close(components, {k: x.detach() for k, x in method(views_of(states), MASK).items()}, rtol=0, atol=0)
    assert without.products < measured(method, states, MASK).products


@every_method
@pytest.mark.parametrize("B", [0, 2])
def test_without_a_token_losses_and_gradients_are_zero(method, B):
    states, mask_BT = random_states(B, 4, 5, kind="everything"), torch.zeros(B, 4, dtype=torch.bool)
    full = random_states(1, 1, 5, kind="everything")
    meant = method(views_of(full), torch.ones(1, 1, dtype=torch.bool))
    for name, loss in method(views_of(states), mask_BT).items():
        assert loss.item() == 0
        found = gradients(loss, states)
        assert [g is None for g in found] == [g is None for g in gradients(meant[name], full)]
        assert all(not g.any() for g in found if g is not None)


@every_method
def test_rows_that_the_mask_drops_may_hold_anything(method):
    clean, poisoned = random_states(3, 4, 5), random_states(3, 4, 5)
    for x, filler in zip(poisoned, (math.nan, math.inf, -math.inf, math.nan), strict=True):
        x.hidden_BTd.data[~MASK] = filler
    meant, found = method(views_of(clean), MASK), method(views_of(poisoned), MASK)
    for name, loss in found.items():
        assert torch.equal(loss, meant[name])
        for x, y in zip(gradients(loss, poisoned), gradients(meant[name], clean), strict=True):
            assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrong", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_logits_that_are_not_finite_are_refused_by_name(wrong, value):
    states = random_states(3, 4, 5)
    for i in wrong:
        states[i].hidden_BTd.data[1, 1, 0] = value
    names = ", ".join(NAMES[i] for i in wrong)
    with pytest.raises(ValueError, match=rf"found NaN or infinity in {names}\."):
        DecomposedDistillation("language", lam=0.3, chunk_size=4)(views_of(states), MASK, gate_BT=MASK)


def test_visual_dependency_of_hidden_states():
    states = random_states(3, 4, 9)[2:]
    states[0].hidden_BTd[~MASK] = math.nan
    vds_BT = visual_dependency(*states, MASK, temperature=2.0)
    clean = [x.nan_to_num() for x in dense(states)]
    assert_close(vds_BT, visual_dependency(*clean, MASK, temperature=2.0), **EXACT)
    assert adaptive_strength(vds_BT, MASK).any()


def test_views_that_do_not_fit_are_refused_by_name():
    states, other = random_states(3, 4, 9), random_states(3, 4, 9)
    method, logits = DecomposedDistillation("vgs"), dense(states)

    def refuse(match, *views, mask_BT=MASK):
        with pytest.raises(ValueError, match=match):
            method(views_of(views), mask_BT)

    refuse("student is logits that require grad.*pass HiddenStates", *logits[:2], *states[2:])
    refuse("student and student_text are two views of one model", states[0], other[1], *states[2:])
    refuse("teacher and teacher_text are two views of one model", *states[:3], logits[3])
    refuse(r"mask_BT must be \(B, T\) and student .* got \(4, 3\) and \(3, 4, 9\)", *states, mask_BT=MASK.T)
    with pytest.raises(ValueError, match=r"chunk_size must be at least 1.*got 0"):
        DecomposedDistillation(chunk_size=0)


@pytest.mark.parametrize("kind", ["plain", "everything"])
@pytest.mark.parametrize("decomposition", ["vgs-frozen", "exact", "language"])
def test_the_prior_of_a_frozen_copy_is_a_view_of_its_own(decomposition, kind):
    options = {"floor": 0.05, "chunk_size": 4, "lam": 0.5 if decomposition == "language" else None}
    method = DecomposedDistillation(decomposition, prior="frozen", **options)
    states, other = random_states(3, 4, 9, kind=kind), random_states(3, 4, 9, seed=1, kind="plain")
    views = {**views_of(states), "prior": other[1].detach()}
    logits = {**views_of(dense(states)), "prior": other[1].logits().detach()}
    assert ("student_text" in method.views) == (decomposition == "language")
    assert_same(method(views, MASK), method(logits, MASK), states, **EXACT)
    assert_same(method({**views, "prior": logits["prior"]}, MASK), method(logits, MASK), states, **EXACT)
    with pytest.raises(ValueError, match=r"missing prior: pass a frozen copy as prior to score"):
        method(views_of(states), MASK)
    with pytest.raises(ValueError, match="teacher and teacher_text are two views of one model"):
        method({**views, "teacher_text": other[3]}, MASK)
    live = DecomposedDistillation(decomposition, prior="live", **options)
    assert_same(live(views, MASK), live(views_of(states), MASK), states, rtol=0, atol=0)  # which does not read it
    visual = "vp" if decomposition == "language" else "vis"
    assert not torch.equal(live(views, MASK)[visual], method(views, MASK)[visual])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_tempered_in_float32(dtype):
    states = random_states(3, 4, 9, dtype=torch.float32)
    logits = [x.logits().to(dtype) for x in states[2:]]
    method = DecomposedDistillation("exact", temperature=0.7)
    found = method(views_of([*states[:2], *logits]), MASK)
    meant = method(views_of([*dense(states[:2]), *logits]), MASK)
    for name in meant:
        assert_close(found[name], meant[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logits", [False, True])
def test_responses_and_teachers_of_inference_mode_are_constants(logits):
    """As a rollout is usually made."""
    states = random_states(3, 4, 9)
    meant = DecomposedDistillation("vgs", lam=0.5)(views_of(states), MASK)
    with torch.inference_mode():
        mask_BT, teacher = MASK.clone(), [x.logits() for x in states[2:]]
    student = [x.logits() if logits else x for x in states[:2]]
    found = DecomposedDistillation("vgs", lam=0.5)(views_of([*student, *teacher]), mask_BT)
    assert_same(found, meant, states, **EXACT)
