"""One step in progress: its pending micro-batches, and how a call captures its gradient sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steer_optim.agreement import Agreement
from steer_optim.capture import Gradients, capture, capture_isolated, evaluate, graph, is_reentrant, unreached_error
from steer_optim.holding import AveragedSets, GradientSets, LocalSets
from steer_optim.memory import Last


@dataclass
class Pending:
    """Accumulated micro-batches: a set per component, or one set of the weighted sum if weights are reused."""

    last: Last | None  # whose weights are reused; None if the step takes a Gramian
    names: tuple[str, ...] = ()  # the components known so far, in order
    sets: dict[str, Gradients] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    parameters: set[Tensor] = field(default_factory=set)  # required grad in some micro-batch
    scale: Tensor | None = None  # the factor on the losses: its sum over micro-batches, and the largest
    unsteered: list[Tensor] = field(default_factory=list)  # reached parameters of no steering, where this is refused


@dataclass
class Step:
    """One call of ``backward_components``, with the current parameters."""

    scopes: list[list[Tensor]]
    parameters: list[Tensor]
    others: list[Tensor]  # parameters of other steerings
    replicas: Any  # a process group, or None
    peers: list[Any]  # the groups of processes that train this model
    averaged: bool  # whether a reducer may average a plain backward pass over the replicas
    scale: Tensor | None
    retain_graph: bool
    pending: Pending

    @property
    def isolated(self) -> bool:
        """Whether the sets bypass DDP's reducer and are averaged here."""
        return self.replicas is not None and not (self.pending.last is not None and self.averaged)

    def hold(self) -> GradientSets:
        """Return the holder of this step's sets."""
        names = self.pending.names if self.pending.last is None else (" + ".join(self.pending.names),)
        parameters = [[p for p in own if p in self.pending.parameters] for own in self.scopes]
        if not self.isolated:
            return LocalSets(names, parameters)
        return AveragedSets(names, parameters, self.replicas, self.pending.unsteered)

    def capture(self, losses: Mapping[str, Any], held: GradientSets | None) -> Iterator[str]:
        """Add the gradients to the pending sets; yield each component when its set is complete, or it is absent.

        Between refreshes yield once: the name of the set of the weighted sum. ``held`` takes the sets; None if pending.
        """
        label = None if self.pending.last is None else " + ".join(self.pending.names)
        together = {name: loss for name, loss in losses.items() if label and isinstance(loss, Tensor)}
        if label and together:
            self._backpropagate(label, together, self.retain_graph, held)
        alone = {name: loss for name, loss in losses.items() if name not in together}
        for name, loss, keep in evaluate(alone, retain_graph=self.retain_graph):
            if loss is not None:
                self._backpropagate(label or name, {name: loss}, keep, held)
                del loss  # frees its graph before the next one is built
            if not label:
                yield name
        if label:
            yield label

    def _backpropagate(self, label: str, losses: Mapping[str, Tensor], keep: bool, held: GradientSets | None) -> None:
        """Backpropagate some losses in one pass, each times its weight if known, and add to the set ``label``."""
        last, terms, grad_tensors = self.pending.last, list(losses.values()), []
        sets, own, reducer = self.pending.sets, self.pending.sets.get(label, {}), self.replicas is not None
        for name, loss in losses.items():
            weight = None if last is None else last.geometry.weights[last.geometry.index(name)]
            grad_tensors.append(_grad_tensor(loss, (weight, self.scale)))
            before = self.pending.losses.get(name)
            value = loss.detach().to(torch.promote_types(loss.dtype, torch.float32))
            self.pending.losses[name] = value if before is None else before + value
        if self.isolated:
            beyond = self._beyond(terms)
            self.pending.unsteered.extend(p for p in beyond if isinstance(p, torch.nn.Parameter))
            sets[label] = capture_isolated(
                terms,
                grad_tensors,
                self.parameters,
                own,
                retain_graph=keep,
                leaves=[x for x in beyond if not isinstance(x, torch.nn.Parameter)],
                on_gradient=held.on_gradient if isinstance(held, AveragedSets) else None,
            )
            return
        others = self._others(terms)
        sets[label] = capture(
            terms, grad_tensors, self.parameters, own, retain_graph=keep, others=others, reducer=reducer
        )
        if not sets[label] and not reducer:
            raise unreached_error(" + ".join(losses))

    def _others(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Return the parameters of other steerings that the losses reach; another thread may be using the rest."""
        nodes = list(graph(losses)) if self.others else []
        if any(map(is_reentrant, nodes)):  # which hides the parameters it reaches
            return self.others
        leaves = {getattr(node, "variable", None) for node in nodes}
        return [p for p in self.others if p in leaves]

    def _beyond(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Return the leaves that the losses reach and no steering has."""
        known = {*self.others, *(p for own in self.scopes for p in own)}
        leaves = (getattr(node, "variable", None) for node in graph(losses))
        return [x for x in leaves if x is not None and x.requires_grad and x not in known]

    def average(self, held: GradientSets, agreement: Agreement) -> GradientSets:
        """Return the held sets averaged over the replicas; average here if no reducer has done so."""
        if self.replicas is None or not isinstance(held, LocalSets):
            return held
        ((label, own),) = held.sets.items()
        if agreement.averages is None:
            agreement.try_averages(self.replicas, own, self.parameters)
        if agreement.averages:
            agreement.note([*own.values()])
            return held
        self.averaged = False
        held = self.hold()
        held.take(label, own if self.pending.losses else None)
        return held


def _grad_tensor(loss: Tensor, factors: Iterable[Tensor | None]) -> Tensor | None:
    """Return the product of some factors as the ``grad_tensor`` of ``loss``; None without factors."""
    root = None
    for factor in factors:
        if factor is not None:
            # In its own memory: a view of it may become some parameter's gradient.
            root = torch.empty_like(loss).copy_(factor if root is None else root * factor.to(root))
    return root
