"""How one backward pass over the components is steered: the part of the optimizer that does it, behind its public face.

    losses -> capture -> (distributed mean) -> gramian -> rule -> combine -> .grad

Each arrow is a call in `_in_sets` and `_combine`; each step lives in a module of its own. Where weights, or their
ratios, are known before the gradients are, `_again` and `_in_one_set` take a shorter way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from steer_optim import distributed, memory, processes
from steer_optim.capture import Gradients, Losses, capture, check_losses, combine, is_dtensor, write
from steer_optim.facade import OptimizerFacade
from steer_optim.gramian import Geometry, gramian, stack_losses
from steer_optim.rules.base import Rule, State, carry_over
from steer_optim.single_set import capture_ratios, capture_weighted, rescale

Scope = Literal["model", "group", "tensor"]


@dataclass(frozen=True)
class _Call:
    """What a backward pass is asked for, and the parameters as they are now."""

    losses: Losses
    scale: Tensor | None
    accumulate: bool
    retain_graph: bool
    groups: list[tuple[str, list[Tensor]]]
    parameters: list[Tensor]
    replicas: Any  # a process group, or None

    @property
    def scopes(self) -> list[list[Tensor]]:
        return [group for _, group in self.groups]

    @property
    def isolate(self) -> bool:
        return self.replicas is not None

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "retain_graph": self.retain_graph}


class Steering(OptimizerFacade):
    """Steers by ``rule``, and remembers what that takes between backward passes; see ``SteeredOptimizer``."""

    def __init__(
        self,
        inner: Optimizer,
        *,
        rule: Rule,
        scope: Scope,
        data_parallel: processes.DataParallel,
        refresh_every: int,
    ) -> None:
        super().__init__(inner)
        self.rule = rule
        self.scope = scope
        self.data_parallel = data_parallel
        self.refresh_every = refresh_every
        self.geometry: Geometry | None = None
        self._last_rule = ""  # whose weights the geometry has
        self._names: tuple[str, ...] = ()
        self._rule_state: State = {}
        # What micro-batches have accumulated: a set for each component, or one where the weights are known already.
        self._pending: dict[str, Gradients] = {}
        self._pending_update: Gradients = {}
        self._pending_losses: dict[str, Tensor] = {}

    @property
    def refresh_every(self) -> int:
        """In every how many steps a Gramian is taken."""
        return self._refresh_every

    @refresh_every.setter
    def refresh_every(self, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"refresh_every is a number of steps, an int of at least 1; got {steps!r}")
        if steps > 1 and self.scope != "model":
            raise ValueError(
                f"refresh_every={steps} needs scope='model': the steps in between are one backward pass, which has one "
                f"weight for each component; got scope={self.scope!r}"
            )
        self._refresh_every = steps

    def _backward(
        self, losses: Losses, *, scale: Tensor | None, accumulate: bool, retain_graph: bool
    ) -> Geometry | None:
        check_losses(losses)
        self._check_names(losses)
        groups = self._scopes()
        parameters = [p for _, group in groups for p in group if p.requires_grad]
        if not parameters:
            raise ValueError("the optimizer has no parameter that requires grad")
        replicas = processes.replica_group(self.data_parallel, parameters)
        call = _Call(losses, scale, accumulate, retain_graph, groups, parameters, replicas)
        last = self._last_weights()
        whole = not (accumulate or self._pending_losses or call.isolate or any(is_dtensor(p) for p in parameters))
        ratios = self.rule.ratios(self._names) if whole else None
        try:
            if last is not None:
                geometry = self._again(call, last)
            elif ratios is not None:
                geometry = self._in_one_set(call, ratios)
            else:
                geometry = self._in_sets(call)
        except BaseException:
            self._drop_pending()
            raise
        if geometry is not None:
            self._drop_pending()
            self.geometry = geometry
        return geometry

    def _in_sets(self, call: _Call) -> Geometry | None:
        """With a gradient set for each component."""
        self._add_losses(capture(call.losses, call.parameters, self._pending, isolate=call.isolate, **call.options))
        return None if call.accumulate else self._combine(call)

    def _combine(self, call: _Call) -> Geometry:
        """Writes the combination of the pending sets."""
        view = distributed.share(self._names, [self._pending[name] for name in self._names], call.scopes, call.replicas)
        G = view.total([gramian(view.sets, part.parameters) for part in view.parts])
        before = carry_over(self._rule_state, self.rule.init(G, self._names))
        weights, state = self.rule(G, self._names, before)
        update: Gradients = {}
        for part in view.parts:
            update |= combine(view.sets, part.parameters, weights[part.scope])
        write(view.gather(update))
        self._rule_state = state
        return self._geometry(call, G, weights)

    def _in_one_set(self, call: _Call, ratios: Mapping[str, float]) -> Geometry:
        """Of a rule whose weights have fixed ratios."""
        values, G = capture_ratios(call.losses, ratios, call.scopes, self._pending, **call.options)
        self._add_losses(values)
        if G is None:
            return self._combine(call)
        (total,) = self._pending.values()
        G, weights = rescale(total, self.rule, ratios, G, call.scopes, self._names)
        write(total)
        return self._geometry(call, G, weights)

    def _again(self, call: _Call, last: Geometry) -> Geometry | None:
        """With the weights of an earlier step."""
        known, total = dict(zip(self._names, last.weights, strict=True)), self._pending_update
        values = capture_weighted(call.losses, known, call.parameters, total, isolate=call.isolate, **call.options)
        self._add_losses(values)
        if call.accumulate:
            return None
        view = distributed.share([" + ".join(self._names)], [total], call.scopes, call.replicas)
        write(view.gather(view.sets[0]))
        return replace(last, losses=self._losses(last.weights), age=last.age + 1)

    def _geometry(self, call: _Call, G: Tensor, weights: Tensor) -> Geometry:
        """Of ``G`` ``(S, k, k)`` and weights ``(S, k)``, which may be used again."""
        self._last_rule = self._rule_key(exactly=True)
        if self.scope == "model":
            return Geometry(self._names, G[0], weights[0], self._losses(weights))
        return Geometry(self._names, G, weights, self._losses(weights), tuple(name for name, _ in call.groups))

    def _last_weights(self) -> Geometry | None:
        """The geometry whose weights this step uses again; None where it takes a Gramian of its own."""
        last = self.geometry
        if self._pending_losses:
            return None if self._pending else last  # as the first micro-batch of the step
        if last is None or last.names != self._names or last.age + 1 >= self.refresh_every:
            return None
        if self._last_rule != self._rule_key(exactly=True):
            return None
        if last.age:
            return last
        # One read in every so many steps: gradients that were zero or overflowed gave weights that nobody wants again.
        ratios = self.rule.ratios(self._names)
        decisive = self._names if ratios is None else [*ratios][:2]
        norms = torch.stack([last.norm(name) for name in decisive])
        return last if bool((norms.isfinite() & (norms > 0)).all()) else None

    def _add_losses(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            before = self._pending_losses.get(name)
            self._pending_losses[name] = value if before is None else before + value

    def _losses(self, like: Tensor) -> Tensor:
        return stack_losses((self._pending_losses[name] for name in self._names), like)

    def _check_names(self, losses: Losses) -> None:
        """Remembers the order of the components, and refuses a set of names that does not fit."""
        self._check_identity()
        names = tuple(losses)
        if set(names) == set(self._names):
            return
        if self._pending_losses:
            raise ValueError(
                f"components {sorted(self._pending_losses)} are pending and this call has {sorted(names)}: pass the "
                "same components in every micro-batch, or call zero_grad() to drop what is pending"
            )
        self.rule.check(names)
        if self._rule_state:
            raise ValueError(
                f"{type(self.rule).__name__} remembers components {sorted(self._names)} and this call has "
                f"{sorted(names)}: pass the same components in every step"
            )
        self._names = names

    def _scopes(self) -> list[tuple[str, list[Tensor]]]:
        """The parameters of each scope, read anew: groups may have been added since.

        Frozen ones are among them, so that a scope keeps its row in the rule's state when it thaws.
        """
        groups = [(i, group) for i, group in enumerate(self.param_groups) if group["params"]]
        if self.scope == "model":
            return [("model", [p for _, group in groups for p in group["params"]])]
        if self.scope == "group":
            return [(f"group {i}", group["params"]) for i, group in groups]
        return [
            (group["param_names"][j] if "param_names" in group else f"group {i} tensor {j}", [p])
            for i, group in groups
            for j, p in enumerate(group["params"])
        ]

    def _drop_pending(self) -> None:
        self._pending.clear()  # in place: Lightning calls zero_grad on an object that only refers to these
        self._pending_update.clear()
        self._pending_losses.clear()

    def _export_state(self) -> dict[str, Any]:
        state_dict = super()._export_state()
        last = (self._last_rule, self.geometry) if self.refresh_every > 1 and self.geometry is not None else None
        return memory.put(state_dict, owner=self._rule_key(), names=self._names, state=self._rule_state, last=last)

    def _import_state(self, state_dict: dict[str, Any]) -> None:
        device = self.param_groups[0]["params"][0].device
        inner, names, state, last = memory.take(state_dict, owner=self._rule_key(), device=device)
        super()._import_state(inner)
        self._names, self._rule_state = names, state
        self._last_rule, self.geometry = ("", None) if last is None else last
        self._drop_pending()

    def _rule_key(self, *, exactly: bool = False) -> str:
        """Whose memory it is: another rule, or the same one over other scopes, cannot read it.

        Weights are only used again by ``exactly`` the same rule, hyperparameters included.
        """
        rule = re.sub(" at 0x[0-9a-f]+", "", repr(self.rule)) if exactly else type(self.rule).__name__
        return f"{rule}, scope={self.scope!r}"
