"""The invariants of the rules, for any number of components at any scale and angle."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from properties import (
    NAMES,
    RESIDUAL,
    ROUNDING,
    RULES,
    assert_finite,
    assert_idempotent,
    assert_no_conflict,
    assert_norm_preserved,
    assert_orthogonal,
    assert_permutation_equivariant,
    assert_plain_sum,
    assert_rotation_invariant,
    assert_same_update,
    assert_scale_equivariant,
    combine,
    condition,
    gradients,
    gramian,
    names_for,
    parts,
)

from steer_optim import reference
from steer_optim.contrib import AGEM
from steer_optim.rules import PCD, VGS, GradVac, PCGrad, Steer, Weighting
from steer_optim.rules.orders import draw_orders

EVERY = [pytest.param(rule, id=name) for name, rule in RULES.items()]
SMOOTH = [pytest.param(rule, id=name) for name, rule in RULES.items() if not isinstance(rule, Weighting)]
NORMED = [RULES[name] for name in ("Steer", "Steer, gain", "Steer, always", "Steer, never")]
DTYPES = st.sampled_from(list(RESIDUAL))
WHEN = st.sampled_from(["conflict", "always", "never"])
GAINS = st.sampled_from([0.0, 0.5, 2.0])
GAMMAS = st.sampled_from([0.0, 0.3, 2.0, 4.0])
BY_RULE = settings(max_examples=settings().max_examples // 3)  # there are twelve rules in each of these tests


def weigh(rule, J, names, state=None):
    return rule(gramian(J), names, state)[0]


def names_of(J):
    return NAMES[: len(J)] if len(J) > 1 else ("vis",)


def scales(dtype):
    """How far gradients of a dtype may be scaled without leaving it."""
    return {"bits": 3, "spread": 3} if dtype == torch.float16 else {}


# Every rule


@pytest.mark.parametrize("rule", EVERY)
@BY_RULE
@given(data=st.data())
def test_weights_and_update_are_finite(rule, data):
    dtype = data.draw(DTYPES)
    k = len(names_for(rule, data.draw(st.integers(1, 6))))
    J, names, state = None, names_for(rule, k), None
    for _ in range(2):
        J = data.draw(gradients(k=k, dtype=dtype, **scales(dtype)))
        weights, state = rule(gramian(J), names, state)
        assert_finite(weights, *state.values(), combine(J.double(), weights))


@pytest.mark.parametrize("rule", EVERY)
@BY_RULE
@given(data=st.data())
def test_scaling_all_losses_changes_no_weight(rule, data):
    names = names_for(rule, data.draw(st.integers(1, 6)))
    Gs = [gramian(data.draw(gradients(k=len(names)))) for _ in range(2)]
    assert_scale_equivariant(rule, Gs, names, data.draw(st.integers(-40, 40)))


@pytest.mark.parametrize("rule", SMOOTH)
@BY_RULE
@given(data=st.data())
def test_rotating_the_parameters_rotates_the_update(rule, data):
    names = names_for(rule, data.draw(st.integers(1, 5)))
    J = data.draw(gradients(k=len(names), relations=("free", "parallel", "zero"), spread=8, min_n=8))
    n, random = J.shape[1], torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    rotation = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=random)).Q
    assert_rotation_invariant(rule, J, names, rotation)


@pytest.mark.parametrize("rule", SMOOTH)
@BY_RULE
@given(data=st.data())
def test_the_order_of_the_components_does_not_matter(rule, data):
    names = names_for(rule, data.draw(st.integers(1, 5)))
    J = data.draw(gradients(k=len(names), relations=("free", "parallel", "zero"), spread=8, min_n=8))
    assert_permutation_equivariant(rule, J, names, data.draw(st.permutations(range(len(names)))))


@pytest.mark.parametrize("name", ["Steer", "PCGrad"])
@given(J=gradients(relations=("free", "parallel", "zero")))
def test_without_conflict_the_rule_is_the_plain_sum(name, J):
    J = J.abs()  # no two rows of non-negative entries conflict
    assert_plain_sum(weigh(RULES[name], J, names_of(J)))


@pytest.mark.parametrize("rule", [RULES["Sum"], VGS(0.0)], ids=repr)
@given(data=st.data())
def test_rules_that_never_steer_are_the_plain_sum(rule, data):
    names = names_for(rule, data.draw(st.integers(1, 6)))
    weights = weigh(rule, data.draw(gradients(k=len(names))), names)
    expected = torch.ones_like(weights)
    if isinstance(rule, VGS):
        expected[1] = 0
    assert torch.equal(weights, expected)


# Steer


@given(J=gradients(), gain=GAINS, when=st.sampled_from(["conflict", "always"]))
def test_steered_updates_make_at_least_the_progress_of_the_component_alone(J, gain, when):
    names = names_of(J)
    g = J[names.index("vis")]
    weights = weigh(Steer("vis", gain=gain, project=when, preserve_norm=False), J, names)
    assert_no_conflict(combine(J, weights), g, parts(J, weights), at_least=(1 + gain) * g @ g)
    # Progress stays, at the norm of the plain sum, unless rounding drowns the component or the sum.
    size = J.norm(dim=1).sum()
    assume(g.norm() > 1e-3 * size)
    assume(J.sum(0).norm() > 1e-3 * size)
    assert combine(J, weigh(Steer("vis", gain=gain, project=when), J, names)) @ g > 0


@pytest.mark.parametrize("dtype", RESIDUAL, ids=str)
@pytest.mark.parametrize("when", ["conflict", "always"])
@BY_RULE
@given(data=st.data())
def test_projected_gradients_are_orthogonal_to_the_component(when, dtype, data):
    # The update holds both gradients, so that a much smaller one would drown in the rounding of the other.
    J = data.draw(gradients(k=2, dtype=dtype, **scales(dtype) | {"spread": 3}, min_n=2))
    G = gramian(J)
    assume(G[0, 0] > 0)
    assume(G[1, 1] > 0)
    if when == "conflict" and G[0, 1] > 0:
        J[0] = -J[0]
    weights = weigh(Steer("vis", project=when, preserve_norm=False), J, ("std", "vis"))
    # What the others contribute: the update without the gradient that is steered towards.
    projected = combine(J, weights - torch.tensor([0.0, 1.0]))
    assert_orthogonal(projected, J[1], J[0])


@pytest.mark.parametrize("rule", NORMED, ids=repr)
@BY_RULE
@given(data=st.data())
def test_the_norm_is_preserved(rule, data):
    J = data.draw(gradients(relations=("free", "near parallel", "near antiparallel", "parallel", "zero")))
    weights = weigh(rule, J, names_of(J))
    assume(condition(J, weights) < 1e10)
    assert_norm_preserved(combine(J, weights), J, weights)


@pytest.mark.parametrize("name", ["Steer", "Steer, always"])
@given(data=st.data())
def test_steering_the_steered_changes_nothing(name, data):
    J = data.draw(gradients(relations=("free", "near parallel", "parallel", "zero"), spread=8))
    names, when = names_of(J), RULES[name].project
    assert_idempotent(RULES[name], reference.steered(J, names.index("vis"), when=when), names, J)


# The same as the reference, rule by rule


@given(J=gradients(), gain=GAINS, when=WHEN, preserve_norm=st.booleans())
def test_steer_is_its_reference(J, gain, when, preserve_norm):
    names = names_of(J)
    weights = weigh(Steer("vis", gain=gain, project=when, preserve_norm=preserve_norm), J, names)
    cond = condition(J, weights) if preserve_norm else 1.0
    assume(cond < 1e8)
    expected = reference.steer(J, names.index("vis"), gain=gain, when=when, preserve_norm=preserve_norm)
    size = parts(J, weights) + J.norm(dim=1).sum()
    assert_same_update(combine(J, weights), expected, size, ROUNDING * cond)


@given(J=gradients())
def test_agem_is_its_reference(J):
    names = names_of(J)
    m = names.index("vis")
    weights = weigh(AGEM("vis"), J, names)
    update, size = combine(J, weights), parts(J, weights) + J.norm(dim=1).sum()
    assert_same_update(update, reference.agem(J, m), size, ROUNDING)
    assert_no_conflict(update, J[m], size)


@given(J=gradients(k=3, relations=("free", "near parallel", "parallel", "zero")), gamma=GAMMAS, with_lp=st.booleans())
def test_vgs_is_its_reference(J, gamma, with_lp):
    std, vis, lp = J
    J = J if with_lp else J[:2]
    weights = weigh(VGS(gamma), J, NAMES[: len(J)])
    cancelled = float(((std.norm() + gamma * vis.norm()) / (std + gamma * vis).norm()).nan_to_num(1.0))
    assume(cancelled < 1e4)
    expected = reference.vgs(std, vis, lp if with_lp else None, gamma=gamma)
    assert_same_update(combine(J, weights), expected, parts(J, weights), ROUNDING * cancelled**2)


@given(J=gradients(k=2, spread=10), gamma=GAMMAS)
def test_vgs_is_steer_on_the_exact_split(J, gamma):
    split = torch.stack([J[0] - J[1], J[1]])
    vgs = weigh(VGS(gamma), J, ("std", "vis"))
    steered = weigh(Steer("vis", gain=gamma, project="never"), split, ("lang", "vis"))
    cond = condition(split, steered)
    assume(cond < 1e8)
    assert_same_update(combine(split, steered), combine(J, vgs), parts(split, steered) + parts(J, vgs), ROUNDING * cond)


@given(J=gradients(), draw=st.integers(0, 10**6))
def test_pcgrad_is_its_reference(J, draw):
    names, rule = names_of(J), PCGrad(seed=1)
    draws = torch.tensor([draw])
    weights = weigh(rule, J, names, {"draws": draws})
    expected = reference.pcgrad(J, draw_orders(draws, names, seed=1)[0])
    # A running gradient never grows, but its coefficients add up over the visits.
    assert_same_update(combine(J, weights), expected, J.norm(dim=1).sum(), 10 * ROUNDING)


@given(data=st.data(), beta=st.sampled_from([0.0, 0.01, 0.5]))
def test_gradvac_is_its_reference(data, beta):
    k = data.draw(st.integers(1, 5))
    names, rule, state = NAMES[:k], GradVac(beta=beta, seed=2), None
    targets = torch.zeros(k, k, dtype=torch.float64)
    for step in range(3):
        J = data.draw(gradients(k=k, relations=("free", "zero"), spread=20, min_n=8))
        weights, state = rule(gramian(J)[None], names, state)
        orders = draw_orders(torch.tensor([step]), names, seed=2)[0]
        expected, targets = reference.gradvac(J, orders, targets, beta=beta)
        # Eight coordinates or more keep the sines of random gradients, which the rounding is divided by, above 1e-3.
        assert_same_update(combine(J, weights[0]), expected, J.norm(dim=1).sum(), 1e4 * ROUNDING)
        torch.testing.assert_close(state["cosine"][0], targets, rtol=0, atol=1e4 * ROUNDING)


@given(J=gradients(), draw=st.integers(0, 10**6))
def test_gradvac_with_targets_of_zero_is_pcgrad(J, draw):
    names, draws = names_of(J), torch.tensor([draw])
    state = {"draws": draws, "cosine": torch.zeros(1, len(J), len(J), dtype=torch.float64)}
    weights = weigh(GradVac(beta=0.0, seed=7), J, names, state)
    pcgrad = weigh(PCGrad(seed=7), J, names, {"draws": draws})
    # Through a norm of the running gradient, whose rounding is that of a square root of one.
    assert_same_update(combine(J, weights), combine(J, pcgrad), J.norm(dim=1).sum(), ROUNDING**0.5)


@given(data=st.data(), tau=st.sampled_from([0.1, 0.3, 1.0]), k=st.integers(1, 5))
def test_pcd_is_its_reference(data, tau, k):
    names, state, averages = names_of(range(k)), None, torch.zeros(k, dtype=torch.float64)
    rule, v = PCD("vis", tau=tau, beta=0.9), 0 if k == 1 else 1
    for step in range(1, 4):
        # Norms that stay near their averages keep opposites from cancelling to the thousandth that counts as zero.
        J = data.draw(gradients(k=k, relations=("free", "parallel", "antiparallel"), bits=0, spread=1, min_n=10))
        weights, state = rule(gramian(J)[None], names, state)
        averages = 0.9 * averages + 0.1 * J.square().sum(1)
        expected = reference.pcd(J, v, averages / (1 - 0.9**step), tau=tau)
        # Ten coordinates or more keep random secondaries apart: squared sines above 1e-3 or none at all.
        assert_same_update(combine(J, weights[0]), expected, parts(J, weights[0]), 1e4 * ROUNDING)


@given(J=gradients(k=2), tau=st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_pcd_of_two_components_has_a_closed_form(J, tau):
    first, second = J.norm(dim=1)
    assume(first > 0)
    assume(second > 0)
    one, two = J[0] / first, J[1] / second
    d = one + max(0.0, tau - float(one @ two)) * two
    assume(d.norm() > 0.01)
    weights = weigh(PCD("std", tau=tau), J, ("std", "vis"))
    assert_same_update(combine(J, weights), d / d.norm() * first, parts(J, weights), 1e4 * ROUNDING)


@given(J=gradients(relations=("free", "near parallel", "parallel", "zero")), tau=st.sampled_from([0.02, 0.5, 1.0]))
def test_pcd_keeps_its_promise_to_every_component(J, tau):
    names = names_of(J)
    weights = weigh(PCD("vis", tau=tau), J, names)
    v, norms, update = names.index("vis"), J.norm(dim=1), combine(J, weights)
    assume(weights.count_nonzero() > 1)  # else the constraints ask for nothing, or for what cannot be
    # In the first step all normalised gradients have length one, and so tau is the progress that each is owed, up to
    # the thousandth of the parts within which nearly dependent gradients are told apart.
    unit = weights[v] * norms[v]
    for i, norm in enumerate(norms):
        if norm > 0 and i != v:
            assert update / unit @ J[i] / norm >= tau - 1e-3 * parts(J, weights) / unit
