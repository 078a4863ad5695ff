"""Collapsing from hidden states and in half precision; what the bins are is in test_topk.py."""

import math

import pytest
import torch
from torch.testing import assert_close

from steer_optim.vlm import Head, HiddenStates
from steer_optim.vlm.topk import collapse, top_ids, with_tail


def heads():
    def parameter(*shape):
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    return {
        "plain": Head(parameter(300, 4)),
        "bias, scale and cap": Head(parameter(300, 4), bias_V=parameter(300), softcap=3.0, scale=0.7),
        "adapter": Head(
            parameter(300, 4).detach(), lora_A_rd=parameter(2, 4), lora_B_Vr=parameter(300, 2), lora_scaling=0.5
        ),
    }


@pytest.mark.parametrize("kind", heads())
def test_hidden_states_are_collapsed_as_their_logits_are(kind):
    head = heads()[kind]
    hidden = torch.randn(2, 150, 4, dtype=torch.float64, requires_grad=True)  # more than one chunk
    states, mask = HiddenStates(hidden, head), torch.rand(2, 150) < 0.7
    ids = top_ids(states, None, mask, k=8)
    assert torch.equal(ids.sort().values, top_ids(states.logits(), None, mask, k=8).sort().values)
    ids[0, :50, :3] = -1
    leaves = [x for x in (hidden, *vars(head).values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    bins, expected = collapse(states, ids), collapse(states.logits(), ids)
    assert_close(bins, expected, rtol=1e-12, atol=1e-12)
    for weights in torch.randn(2, *bins.shape, dtype=torch.float64):  # separate backward passes of one graph
        found = torch.autograd.grad((bins * weights).sum(), leaves, retain_graph=True)
        meant = torch.autograd.grad((expected * weights).sum(), leaves, retain_graph=True)
        assert_close(found, meant, rtol=1e-10, atol=1e-10)


def test_no_tokens_give_zero_gradients_to_hidden_states_and_head():
    head = heads()["bias, scale and cap"]
    hidden = torch.full((2, 3, 4), math.nan, dtype=torch.float64, requires_grad=True)
    collapse(HiddenStates(hidden, head), torch.full((2, 3, 5), -1)).sum().backward()
    for leaf in (hidden, head.weight_Vd, head.bias_V):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_half_precision_is_computed_with_in_float32():
    ids = torch.tensor([[1, 4], [0, -1]])
    half = torch.randn(2, 9).bfloat16().requires_grad_()
    single = half.detach().float().requires_grad_()
    assert torch.equal(collapse(half, ids), collapse(single, ids))
    collapse(half, ids).square().sum().backward()
    collapse(single, ids).square().sum().backward()
    assert torch.equal(half.grad, single.grad.bfloat16())
    assert with_tail(torch.tensor([[-1.0, -2.0]]).bfloat16(), ids[:1]).dtype == torch.float32


def test_a_second_derivative_and_a_changed_head_are_refused():
    student = torch.randn(2, 5, requires_grad=True)
    bins = collapse(student, torch.tensor([[1], [2]]))
    (gradient,) = torch.autograd.grad(bins.square().sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    head = Head(torch.randn(5, 3).requires_grad_())
    bins = collapse(HiddenStates(torch.randn(2, 3), head), torch.tensor([[1], [2]]))
    with torch.no_grad():
        head.weight_Vd.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        bins.sum().backward()
