"""What only a CUDA device can show; skipped by name elsewhere."""

import dataclasses

import pytest
import torch
from hidden_states import MASK, NAMES, random_states
from properties import RULES
from steering import assert_close, conflicting, flat_grad, network, steered
from torch.utils._python_dispatch import TorchDispatchMode

from steer_optim import Weighting
from steer_optim.vlm import DecomposedDistillation, Head, HiddenStates

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ON_DEVICE = {name: rule for name, rule in RULES.items() if not isinstance(rule, Weighting)}


def update(rule, device, scope="model"):
    torch.manual_seed(0)
    model, batch = network(), torch.randn(8, 4, dtype=torch.float64)
    model, batch = model.to(device), batch.to(device)
    optimizer = steered(model.parameters(), rule, scope=scope)
    optimizer.backward_components(conflicting(model(batch), rule))
    return flat_grad(model.parameters()).cpu()


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_device_gives_the_update_of_the_cpu(rule, scope):
    # Sums in another order: some roundings of float64, enlarged where gradients nearly cancel.
    assert_close(update(rule, "cuda", scope), update(rule, "cpu", scope), 1e-10)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("rule", ON_DEVICE.values(), ids=ON_DEVICE)
def test_the_host_never_waits(rule, scope):
    model, batch = network().cuda(), torch.randn(8, 4, dtype=torch.float64, device="cuda")
    optimizer = steered(model.parameters(), rule, scope=scope)
    optimizer.backward_components(conflicting(model(batch), rule))  # the first call may set libraries up
    losses = conflicting(model(batch), rule)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.backward_components(losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Products(TorchDispatchMode):
    """The dtypes of the factors of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def test_under_autocast_a_float32_head_multiplies_in_half_precision_and_adds_in_float32():
    states = [x[MASK].detach() for x in random_states(3, 4, 64, d=32, dtype=torch.float32)]
    found = {}
    for autocast in (None, torch.bfloat16):
        views = {}
        for name, x in zip(NAMES, states, strict=True):
            head = Head(x.head.weight_Vd.cuda().requires_grad_())
            views[name] = HiddenStates(x.hidden_BTd.cuda().requires_grad_(), head, autocast)
        views["student_text"] = dataclasses.replace(views["student_text"], head=views["student"].head)
        views["teacher_text"] = dataclasses.replace(views["teacher_text"], head=views["teacher"].head)
        mask_BT = torch.ones(1, 6, dtype=torch.bool, device="cuda")
        with Products() as products:
            losses = DecomposedDistillation("exact")({name: x[None] for name, x in views.items()}, mask_BT)
        assert products.dtypes == {autocast or torch.float32}
        losses["vis"].backward()
        assert losses["vis"].dtype == torch.float32
        found[autocast] = losses["vis"].detach(), views["student"].head.weight_Vd.grad
    # Factors of bfloat16 have 8 bits.
    for half, single in zip(found[torch.bfloat16], found[None], strict=True):
        assert float((half - single).norm() / single.norm()) < 0.05
