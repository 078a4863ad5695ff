"""TorchJD's weightings, taken as they are through `Weighting`; and our rules beside its own of the same name."""

import pytest
import torch

from steer_optim import reference
from steer_optim.rules import PCD, GradVac, PCGrad, Sum, Weighting
from steer_optim.rules.orders import draw_words

aggregation = pytest.importorskip("torchjd.aggregation")

# The weightings of a Gramian that have an aggregator to be compared with, by their common name.
GRAMIAN = {
    "AlignedMTL": {},
    "CAGrad": {"c": 0.5},
    "Constant": {"weights": torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)},
    "DualProj": {},
    "FairGrad": {"alpha": 1.0},
    "GradVac": {},
    "IMTLG": {},
    "Krum": {"n_byzantine": 0},
    "Mean": {},
    "MGDA": {},
    "PCD": {},
    "PCGrad": {},
    "Random": {},
    "Sum": {},
    "UPGrad": {},
}
NAMES = ("vis", "std", "lang")
EPS = 1e-12  # both sum products of float64, in different orders


def jacobian(k=3, n=10, seed=0):
    return torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name):
    try:
        return getattr(aggregation, name)(**GRAMIAN[name.removesuffix("Weighting")])
    except ImportError as error:
        pytest.skip(f"{name} needs an optional package: {error}")


def test_every_gramian_weighting_of_torchjd_is_looked_at():
    weightings = {
        name.removesuffix("Weighting")
        for name in aggregation.__all__
        if name.endswith("Weighting") and name.removesuffix("Weighting") in aggregation.__all__
    }
    assert weightings - {"ExcessMTL"} == set(GRAMIAN)  # ExcessMTL weighs by the gradients themselves


@pytest.mark.parametrize("name", GRAMIAN)
def test_weighting_is_the_aggregator(name):
    aggregator, rule, state = make(name), Weighting(make(f"{name}Weighting"), seed=3), None
    for step in range(3):
        J = jacobian(seed=step)
        weights, state = rule(reference.gramian(J), NAMES, state)
        torch.manual_seed(draw_words(torch.tensor([step]), seed=3).item())
        expected = aggregator(J)
        torch.testing.assert_close(reference.combine(J, weights), expected, rtol=EPS, atol=EPS)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sum(k):
    J = jacobian(k)
    weights, _ = Sum()(reference.gramian(J), NAMES[:k])
    torch.testing.assert_close(reference.combine(J, weights), aggregation.Sum()(J), rtol=EPS, atol=EPS)


@pytest.mark.parametrize("seed", range(6))
def test_pcgrad_of_two(seed):
    J = jacobian(2, 3, seed)
    weights, _ = PCGrad()(reference.gramian(J), NAMES[:2])
    torch.testing.assert_close(reference.combine(J, weights), aggregation.PCGrad()(J), rtol=EPS, atol=EPS)


def test_gradvac_of_two_over_steps():
    rule, theirs, state = GradVac(beta=0.3), aggregation.GradVac(beta=0.3, eps=0.0), None
    for step in range(8):
        J = jacobian(2, 3, step)
        weights, state = rule(reference.gramian(J), NAMES[:2], state)
        torch.testing.assert_close(reference.combine(J, weights), theirs(J), rtol=EPS, atol=EPS)


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.4, 1.0])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_pcd_over_steps(k, tau):
    rule, theirs = PCD("vis", tau=tau, beta=0.9), aggregation.PCD(tau=tau, beta=0.9, eps=0.0)
    names, state = ("vis", "a", "b", "c", "d")[:k], None
    for step in range(6):
        J = jacobian(k, 6, step)
        weights, state = rule(reference.gramian(J), names, state)
        # Their constraints hold to 1e-9 of the largest gradient.
        torch.testing.assert_close(reference.combine(J, weights), theirs(J), rtol=1e-8, atol=1e-8)
