"""Named properties of updates, and Hypothesis strategies for the gradients that put them to the test.

A property of floating-point numbers needs a tolerance, and a tolerance its reason. Here it is always a rounding error
(a dtype's epsilon, times the number of operations) times a condition: how much larger the parts of an update are
than the update, since what cancels leaves its rounding errors behind.
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from steer_optim.contrib import AGEM
from steer_optim.rules import PCD, VGS, GradVac, PCGrad, Rule, Steer, Sum, Weighting

NAMES = ("std", "vis", "lp", "aux", "kl", "reg")

# A few dozen operations on at most 6 components and 16 coordinates, each off by 1.1e-16.
ROUNDING = 1e-14

# The residual of one projection of a gradient stored in each dtype: in the half precisions the arithmetic is that of
# float32 and the result is rounded once, by 2^-8 and 2^-11 of its size.
RESIDUAL = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}

RULES: dict[str, Rule] = {
    "Sum": Sum(),
    "Steer": Steer("vis"),
    "Steer, gain": Steer("vis", gain=1.5),
    "Steer, always": Steer("vis", project="always"),
    "Steer, never": Steer("vis", gain=2.0, project="never"),
    "Steer, free norm": Steer("vis", gain=0.5, preserve_norm=False),
    "VGS": VGS(2.0),
    "PCGrad": PCGrad(seed=3),
    "GradVac": GradVac(beta=0.3, seed=4),
    "PCD": PCD("vis", tau=0.1, beta=0.9),
    "AGEM": AGEM("vis"),
    "Weighting": Weighting(lambda G: torch.rand(len(G), dtype=torch.float64), seed=5),
}


def names_for(rule: Rule, k: int) -> tuple[str, ...]:
    """``k`` components that the rule can weigh, as near to ``k`` as it allows; a priority is never the first."""
    if isinstance(rule, VGS):
        k = min(max(k, 2), 3)
    return NAMES[:k] if k > 1 else ("vis",)


# Strategies

DEGENERATE = ("free", "near parallel", "near antiparallel", "parallel", "antiparallel", "zero")


@st.composite
def gradients(
    draw: st.DrawFn,
    *,
    k: int | None = None,
    dtype: torch.dtype = torch.float64,
    relations: tuple[str, ...] = DEGENERATE,
    bits: int = 40,
    spread: int = 40,
    min_n: int = 1,
) -> Tensor:
    """A matrix ``(k, n)`` of component gradients, each in some relation to an earlier one.

    All of it is scaled by a power of two up to ``2^±bits``, and each row by another up to ``2^±spread``: 1e±12
    unless told, and exactly, so that parallel rows stay so.
    """
    k = draw(st.integers(1, 6)) if k is None else k
    n = draw(st.integers(min_n, 16))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    J = torch.randn(k, n, generator=random, dtype=torch.float64)
    for i in range(k):
        relation = draw(st.sampled_from(relations))
        other = J[draw(st.integers(0, i - 1))] if i else J[0]
        nudge = draw(st.sampled_from([1e-3, 1e-6, 1e-9])) * J[i]
        if relation == "zero":
            J[i] = 0
        elif i and relation != "free":
            sign = -1 if "anti" in relation else 1
            J[i] = sign * other + (nudge if "near" in relation else 0)
    exponents = [draw(st.integers(-spread, spread)) for _ in range(k)]
    common = draw(st.integers(-bits, bits))
    return (J * torch.tensor([2.0 ** (e + common) for e in exponents], dtype=torch.float64)[:, None]).to(dtype)


def gramian(J: Tensor) -> Tensor:
    """The inner products of the gradients as they are stored, summed in float64."""
    return J.double() @ J.double().T


def combine(J: Tensor, weights: Tensor) -> Tensor:
    """The update in the dtype of the gradients, with the arithmetic of torch's kernels for it."""
    arithmetic = torch.promote_types(J.dtype, torch.float32)
    return (weights.to(arithmetic) @ J.to(arithmetic)).to(J.dtype)


def parts(J: Tensor, weights: Tensor) -> Tensor:
    """The summed norms of what an update is made of."""
    return (weights.abs() * J.double().norm(dim=1)).sum()


def condition(J: Tensor, weights: Tensor) -> float:
    """How far the norms of an update and of the plain sum, both from the Gramian, have cancelled; squared."""
    ratios = [parts(J, w) / combine(J.double(), w).norm() for w in (weights, torch.ones_like(weights))]
    return float(sum(r.nan_to_num(1.0, posinf=torch.inf) ** 2 for r in ratios))  # zero from zeros did not cancel


# Properties


def assert_finite(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.isfinite().all(), tensor


def assert_same_update(update: Tensor, expected: Tensor, size: Tensor, rounding: float = ROUNDING) -> None:
    """Equal up to the rounding of parts of the given total ``size``."""
    error = (update - expected).norm()
    assert error <= rounding * size, f"differ by {error:.1e}, of {size:.1e}"


def assert_same_weighting(rule: Rule, J: Tensor, first: Tensor, second: Tensor) -> None:
    """One update, up to what the rounding of a Gramian does to the projections and, where there is one, the norm."""
    rescales = getattr(rule, "preserve_norm", isinstance(rule, VGS | PCD))
    rounding = ROUNDING * (condition(J, first) if rescales else 10)
    assert_same_update(combine(J, first), combine(J, second), parts(J, first) + parts(J, second), rounding)


def assert_no_conflict(update: Tensor, g: Tensor, size: Tensor, at_least: float | Tensor = 0.0) -> None:
    """``<update, g> >= at_least``, for an update whose parts have the total ``size``."""
    progress = update @ g
    assert progress >= at_least - ROUNDING * size * g.norm(), f"{progress:.3e} < {at_least:.3e}"


def assert_orthogonal(projected: Tensor, onto: Tensor, original: Tensor) -> None:
    """No more than the dtype's residual is left of ``original`` along ``onto``, on either side."""
    cosine = projected.double() @ onto.double() / (original.double().norm() * onto.double().norm())
    assert abs(cosine) <= RESIDUAL[projected.dtype], f"{cosine:.1e} of it is left"


def assert_norm_preserved(update: Tensor, J: Tensor, weights: Tensor) -> None:
    expected = J.sum(0).norm()
    assert abs(update.norm() - expected) <= ROUNDING * condition(J, weights) * expected


def assert_plain_sum(weights: Tensor) -> None:
    """The weights of the plain sum to the last bit."""
    assert torch.equal(weights, torch.ones_like(weights)), weights


def assert_scale_equivariant(rule: Rule, Gs: list[Tensor], names: tuple[str, ...], exponent: int) -> None:
    """Gradients ``2^exponent`` times as long get the same weights: the same bits, for scaling by it is exact."""
    state, scaled_state = None, None
    for G in Gs:
        weights, state = rule(G, names, state)
        scaled, scaled_state = rule(G * 4.0**exponent, names, scaled_state)
        assert torch.equal(weights, scaled), (weights, scaled)


def assert_rotation_invariant(rule: Rule, J: Tensor, names: tuple[str, ...], rotation: Tensor) -> None:
    """Rotating the parameter space rotates the update."""
    weights, _ = rule(gramian(J), names)
    rotated, _ = rule(gramian(J @ rotation), names)
    assert_same_weighting(rule, J, weights, rotated)


def assert_permutation_equivariant(rule: Rule, J: Tensor, names: tuple[str, ...], order: list[int]) -> None:
    """Listing the components in another order permutes their weights."""
    weights, _ = rule(gramian(J), names)
    permuted, _ = rule(gramian(J[order]), [names[i] for i in order])
    assert_same_weighting(rule, J, weights, permuted[torch.tensor(order).argsort()])


def assert_idempotent(rule: Rule, steered: Tensor, names: tuple[str, ...], original: Tensor) -> None:
    """The rule finds no more to do in steered gradients than the rounding of the ``original`` ones left in them."""
    weights, _ = rule(gramian(steered), names)
    rounding = ROUNDING * condition(steered, weights)
    assert_same_update(combine(steered, weights), steered.sum(0), original.norm(dim=1).sum(), rounding)
