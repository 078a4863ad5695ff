"""Every way to make a training step that is compared, by name: plain, bare passes, this library, its peers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.workloads import Workload
from steer_optim import PCGrad, Steer, SteeredOptimizer

PLAIN, BARE, STEER, STALE = "plain step", "k backward passes", "steer_optim Steer", "steer_optim Steer, stale step"
OWN_PCGRAD, BY_TENSOR = "steer_optim PCGrad", "steer_optim Steer, scope='tensor'"
TORCHJD = ("TorchJD PCGrad", "TorchJD PCGrad, sequential", "TorchJD PCGrad, sequential, Gramian optimised")
AUTOGRAM, FLATTENED = "TorchJD PCGrad, autogram", "Pytorch-PCGrad"
PEERS = (*TORCHJD, AUTOGRAM, FLATTENED)
EVERY = (PLAIN, BARE, STEER, STALE, OWN_PCGRAD, *PEERS)

Optimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Variant:
    """One way to make a training step, in its parts: the update in ``.grad``, then the step on it."""

    optimizer: torch.optim.Optimizer
    backward: Callable[[], object]

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()


def adamw(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6)


def make(
    workload: Workload, k: int, names: Sequence[str] = EVERY, *, disjoint: bool = False, optimizer: Optimizer = adamw
) -> dict[str, Variant]:
    """The variants that ``names`` asks for and that exist for ``k`` components, each with an optimizer of its own.

    With ``disjoint`` the components are graphs of their own: callables for this library, tensors for the others.
    Peers whose package is not there are left out.
    """
    made = {}
    for name in names:
        try:
            variant = _make(name, workload, k, disjoint, optimizer)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        if variant is not None:
            made[name] = variant
    return made


def _make(name: str, workload: Workload, k: int, disjoint: bool, optimizer: Optimizer) -> Variant | None:
    if name == AUTOGRAM:  # hooks itself into the model
        workload = replace(workload, model=copy.deepcopy(workload.model))
    parameters = workload.parameters
    inner = optimizer(parameters)

    def losses() -> list[Tensor]:
        return [loss() for loss in workload.disjoint(k)] if disjoint else workload.losses(k)

    if name == PLAIN:
        return Variant(inner, lambda: torch.stack(losses()).sum().backward())
    if name == BARE:
        return Variant(inner, lambda: _bare(losses()))
    if name in PEERS:
        if disjoint and name == AUTOGRAM:
            return None  # the engine takes one output of one graph
        backward = _peer(name, workload)
        return Variant(inner, lambda: backward(losses()))

    def components() -> Mapping[str, Tensor | Callable[[], Tensor]]:
        losses = workload.disjoint(k) if disjoint else workload.losses(k)
        return {f"loss{i}": loss for i, loss in enumerate(losses)}

    if name == STALE:
        steered = SteeredOptimizer(inner, Steer(toward="loss0"), refresh_every=10**9)
        # The first step is exact whatever follows it; every later one is stale.
        steered.backward_components(components())
        steered.step()
    else:
        rule = PCGrad() if name == OWN_PCGRAD else Steer(toward="loss0")
        steered = SteeredOptimizer(inner, rule, scope="tensor" if name == BY_TENSOR else "model")
    return Variant(steered, lambda: steered.backward_components(components()))


def _bare(losses: Sequence[Tensor]) -> None:
    for i, loss in enumerate(losses):
        loss.backward(retain_graph=i < len(losses) - 1)


def _peer(name: str, workload: Workload) -> peers.Backward:
    if name == AUTOGRAM:
        return peers.torchjd_autogram(workload.model)
    if name == FLATTENED:
        return peers.flattened_pcgrad(workload.parameters)
    route = TORCHJD.index(name)
    return peers.torchjd_autojac(workload.parameters, sequential=route > 0, optimised=route > 1)
