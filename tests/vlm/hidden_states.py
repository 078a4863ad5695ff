"""Random hidden states of a student and a teacher, and what losses of them and of their logits must agree in."""

import torch
from torch.testing import assert_close

from steer_optim.vlm import Head, HiddenStates

NAMES = ("student", "student_text", "teacher", "teacher_text")
# Sums of at most a few hundred float64 terms of size up to 30, in another order: some 1000 units of 2e-16.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [False, False, False, False]])


def random_head(V, d, generator, kind="plain", dtype=torch.float64):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    extras = {
        "plain": {},
        "bias": {"bias_V": draw(V)},
        "softcap": {"softcap": 3.0, "scale": 0.7},
        "lora": {"lora_A_rd": draw(2, d), "lora_B_Vr": draw(V, 2), "lora_scaling": 0.5},
    }
    every = {**extras["bias"], **extras["softcap"], **extras["lora"]}
    return Head(draw(V, d), **(every if kind == "everything" else extras[kind]))


def random_states(B, T, V, *, seed=0, d=4, padded=0, kind="plain", dtype=torch.float64):
    """The four views as hidden states: the student's and its head with gradients, the teacher's without."""
    generator = torch.Generator().manual_seed(seed)
    heads = random_head(V, d, generator, kind, dtype), random_head(V + padded, d, generator, kind, dtype)
    hidden = [torch.randn(B, T, d, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    states = [HiddenStates(x.requires_grad_(i < 2), heads[i // 2]) for i, x in enumerate(hidden)]
    return [*states[:2], *(x.detach() for x in states[2:])]


def views_of(four):
    """Views by name, those that are not None."""
    return {name: view for name, view in zip(NAMES, four, strict=True) if view is not None}


def inputs(states):
    head = states[0].head
    tensors = (head.weight_Vd, head.bias_V, head.lora_A_rd, head.lora_B_Vr)
    return [*(x.hidden_BTd for x in states[:2]), *(x for x in tensors if x is not None)]


def dense(states):
    return [x.logits() for x in states]


def gradients(loss, states):
    return torch.autograd.grad(loss, inputs(states), retain_graph=True, allow_unused=True)


def assert_same(found, meant, states, **tolerance):
    """The same components, and the same gradients of each at hidden states and head."""
    assert list(found) == list(meant)
    for name in meant:
        assert_close(found[name], meant[name], **tolerance)
        for x, y in zip(gradients(found[name], states), gradients(meant[name], states), strict=True):
            assert (x is None) == (y is None), name
            if y is not None:
                assert_close(x, y, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
