"""What only a CUDA device can show; skipped by name elsewhere."""

import copy
import dataclasses

import pytest
import torch
from hidden_states import MASK, NAMES, random_states
from properties import RULES
from steering import STEER, assert_close, assert_steered, conflicting, flat_grad, network, steered
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.host_reads import syncs
from steer_optim import SteeredOptimizer, Weighting
from steer_optim.vlm import DecomposedDistillation, Head, HiddenStates, Prompts, score, text_only

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


def test_parameters_on_two_devices():
    parameters = [nn.Parameter(torch.randn(3, device=device).double()) for device in ("cuda", "cpu", "cuda")]
    assert_steered(lambda: conflicting(sum(p.cpu() for p in parameters)[None]), parameters)
    assert [p.grad.device for p in parameters] == [p.device for p in parameters]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("rule", ON_DEVICE.values(), ids=ON_DEVICE)
def test_the_host_never_waits(rule, scope, dtype):
    model, batch = network(dtype).cuda(), torch.randn(8, 4, dtype=dtype, device="cuda")
    optimizer = steered(model.parameters(), rule, scope=scope)
    optimizer.backward_components(conflicting(model(batch), rule))  # the first call may set libraries up
    losses = conflicting(model(batch), rule)
    with syncs(torch.device("cuda")) as waits:
        optimizer.backward_components(losses)
        optimizer.step()
    assert waits() == 0


def test_a_wait_is_noticed():
    with syncs(torch.device("cuda")) as waits:
        float(torch.ones(1, device="cuda").sum())
    assert waits() == 1


def test_the_host_waits_once_after_a_refresh():
    model, batch = network().cuda(), torch.randn(8, 4, dtype=torch.float64, device="cuda")
    optimizer, found = steered(model.parameters(), STEER, refresh_every=3), []
    for _ in range(6):
        losses = conflicting(model(batch))
        with syncs(torch.device("cuda")) as waits:
            optimizer.backward_components(losses)
        found.append((optimizer.geometry.age, waits()))
    assert found[3:] == [(0, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_and_clipping(fused):
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model, batch = network(torch.float32).to(device), torch.randn(8, 4).to(device)
        optimizer = SteeredOptimizer(torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused), STEER)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        for factor in (1.0, float("inf"), 1.0):  # the second step is skipped
            optimizer.zero_grad()
            scaler.scale(factor * optimizer.join(conflicting(model(batch)))).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        found.append(torch.cat([p.detach().cpu().flatten() for p in model.parameters()]))
    assert_close(found[1], found[0], 1e-5)  # sums of float32 in another order, which AdamW enlarges


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_of_distillation_is_that_of_the_cpu(lora):
    """In float32, so that only the order of sums differs: two images, both views, hidden states, the update."""
    real_size, step_memory = (pytest.importorskip(f"benchmarks.{name}") for name in ("real_size", "step_memory"))
    size, cpu = real_size.tiny(), torch.device("cpu")
    student, teacher, prior = (real_size.build(size.student, cpu, torch.float32) for _ in range(3))
    student = step_memory.adapted(student) if lora else student
    batch, response = real_size.draw(size, 2, cpu)
    method, found = DecomposedDistillation("vgs-frozen"), []
    for device in ("cpu", "cuda"):
        models = [copy.deepcopy(model).to(device) for model in (student, teacher, prior)]
        on = {key: x.to(device) for key, x in batch.items()}
        sampled = dataclasses.replace(
            response, **{key: x.to(device) for key, x in vars(response).items() if isinstance(x, torch.Tensor)}
        )
        views = score(*models[:2], Prompts(on, text_only(on, size.student)), sampled, method=method, prior=models[2])
        trained = [p for p in models[0].parameters() if p.requires_grad]
        optimizer = SteeredOptimizer(torch.optim.AdamW(trained), method.rule())
        geometry = optimizer.backward_components(method(views, sampled.scored_BT))
        found.append((geometry.losses.cpu(), geometry.G.cpu(), flat_grad(trained).cpu()))
    for device, host in zip(found[1], found[0], strict=True):
        assert_close(device, host, 1e-3)  # float32 through a dozen layers, and differences of like probabilities


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
