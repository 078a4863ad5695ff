import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_optim.vlm import adaptive_strength, sampled_log_probs, top_share, visual_tokens

# Few distinct values, so that ties, zeros and scores that rounding made negative are the rule.
SCORES = st.sampled_from([-1e-7, 0.0, 0.25, 0.5, 0.75, 1.0])
TOKENS = st.lists(st.tuples(SCORES, st.booleans()), max_size=40)


def tensors(tokens):
    vds = torch.tensor([score if kept else math.nan for score, kept in tokens])
    mask = torch.tensor([kept for _, kept in tokens], dtype=torch.bool)
    return vds, mask


def highest(tokens, share):
    """Indices of the ceil(share * n) highest kept scores, earlier first among equals, positive only."""
    kept = [(-score, index) for index, (score, keep) in enumerate(tokens) if keep]
    budget = math.ceil(share * len(kept))
    return {index for score, index in sorted(kept)[:budget] if -score > 0}


def selected(gate):
    return set(gate.nonzero().flatten().tolist())


@given(TOKENS, st.integers(0, 99))
def test_the_gate_is_a_stable_sort_cut_at_the_budget(tokens, percent):
    vds, mask = tensors(tokens)
    gate = visual_tokens(vds, mask, quantile=percent / 100)
    assert selected(gate) == highest(tokens, 1 - Fraction(percent, 100))


@pytest.mark.parametrize(
    ("n", "quantile", "meant"),
    # In binary 1 - 0.7 > 0.3, and (1 - 0.9) * 10 < 1 but (1 - 0.9) * 30 < 3: a float ceiling is right by luck only.
    [(10, 0.7, 3), (100, 0.7, 30), (11, 0.7, 4), (1, 0.7, 1), (1, 0.99, 1), (30, 0.9, 3), (100_003, 0.7, 30_001)],
)
def test_ties_do_not_change_the_number_of_tokens(n, quantile, meant):
    everything = torch.ones(n, dtype=torch.bool)
    gate = visual_tokens(torch.ones(n), everything, quantile=quantile)
    assert selected(gate) == set(range(meant))
    assert int(visual_tokens(torch.rand(n) + 0.1, everything, quantile=quantile).sum()) == meant


def test_tokens_that_the_image_does_not_change_are_never_visual():
    vds = torch.tensor([0.0, -1e-8, 0.0, 1e-30, 0.0])
    assert selected(visual_tokens(vds, torch.ones(5, dtype=torch.bool), quantile=0.1)) == {3}


def test_without_a_token_nothing_is_selected():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert not visual_tokens(torch.full((2, 3), math.nan), mask).any()
    assert visual_tokens(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)


@given(TOKENS)
def test_adaptive_strength_has_its_two_thresholds(tokens):
    vds, mask = tensors(tokens)
    strength = adaptive_strength(vds, mask)
    half_or_more, full = highest(tokens, Fraction(6, 10)), highest(tokens, Fraction(3, 10))
    for index, value in enumerate(strength.tolist()):
        assert value == (1.0 if index in full else 0.5 if index in half_or_more else 0.0)


def test_shapes_and_types():
    vds_BT, mask_BT = torch.rand(2, 5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    gate_BT = visual_tokens(vds_BT, mask_BT)
    assert gate_BT.dtype == torch.bool
    assert torch.equal(gate_BT.flatten(), visual_tokens(vds_BT.flatten(), mask_BT.flatten()))
    assert adaptive_strength(vds_BT, mask_BT).dtype == torch.float64


@pytest.mark.parametrize("gate", [visual_tokens, adaptive_strength, top_share])
def test_what_does_not_fit_is_refused(gate):
    vds, mask = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"mask_BT must be bool.*int64.*mask\.bool\(\)"):
        gate(vds, mask.long())
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(2, 3\)"):
        gate(vds.T, mask)
    with pytest.raises(ValueError, match="found NaN"):
        gate(vds.index_fill(0, torch.tensor(1), math.nan), mask)


@pytest.mark.parametrize("quantile", [1.0, -0.1, 70, math.nan])
def test_a_quantile_out_of_range_is_refused(quantile):
    with pytest.raises(ValueError, match="quantile must be inside"):
        visual_tokens(torch.rand(3), torch.ones(3, dtype=torch.bool), quantile=quantile)


@pytest.mark.parametrize("response", [torch.zeros(2, 4).long(), torch.zeros(2).long()])
def test_responses_that_do_not_fit_the_mask_are_refused(response):
    with pytest.raises(ValueError, match="response_BT and mask_BT must have one shape on one device"):
        sampled_log_probs(torch.zeros(2, 3, 5), response, torch.ones(2, 3, dtype=torch.bool))
