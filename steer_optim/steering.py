"""How one backward pass over the components is steered: the part of the optimizer that does it, behind its public face.

    losses -> capture -> (distributed mean) -> gramian -> rule -> combine -> .grad

Each arrow is a call in `_backward`; each step lives in a module of its own. Where weights, or their ratios, are known
before the gradients are, `single_set` takes the place of capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from steer_optim import distributed, memory, processes
from steer_optim.capture import Gradients, Losses, capture, check_losses, combine, is_dtensor, write
from steer_optim.facade import OptimizerFacade
from steer_optim.gramian import Geometry, gramian, stack_losses
from steer_optim.rules.base import Rule, State, carry_over
from steer_optim.single_set import capture_ratios, capture_weighted, rescale

Scope = Literal["model", "group", "tensor"]


class Steering(OptimizerFacade):
    """Steers by ``rule``, and remembers what that takes between backward passes; see ``SteeredOptimizer``."""

    def __init__(
        self, inner: Optimizer, rule: Rule, scope: Scope, data_parallel: processes.DataParallel, refresh_every: int
    ) -> None:
        super().__init__(inner)
        self.rule = rule
        self.scope = scope
        self.data_parallel = data_parallel
        self.refresh_every = refresh_every
        self.geometry: Geometry | None = None
        self._names: tuple[str, ...] = ()
        self._rule_state: State = {}
        # What micro-batches have accumulated: a set for each component, or one where the weights are known already.
        self._pending: dict[str, Gradients] = {}
        self._pending_update: Gradients = {}
        self._pending_losses: dict[str, Tensor] = {}

    def _backward(
        self, losses: Losses, *, scale: Tensor | None, accumulate: bool, retain_graph: bool
    ) -> Geometry | None:
        check_losses(losses)
        self._check_names(losses)
        groups = self._scopes()
        scopes = [group for _, group in groups]
        parameters = [p for group in scopes for p in group if p.requires_grad]
        if not parameters:
            raise ValueError("the optimizer has no parameter that requires grad")
        replicas = processes.replica_group(self.data_parallel, parameters)
        isolate = replicas is not None
        last = self._last_weights()
        alone = not (accumulate or self._pending_losses or isolate or any(is_dtensor(p) for p in parameters))
        ratios = self.rule.ratios(self._names) if alone else None
        options: dict[str, Any] = {"scale": scale, "retain_graph": retain_graph}
        G: Tensor | None = None
        try:
            if last is not None:
                known = dict(zip(self._names, last.weights, strict=True))
                values = capture_weighted(losses, known, parameters, self._pending_update, isolate=isolate, **options)
            elif ratios is not None:
                values, G = capture_ratios(losses, ratios, scopes, self._pending, **options)
            else:
                values = capture(losses, parameters, self._pending, isolate=isolate, **options)
            for name, value in values.items():
                before = self._pending_losses.get(name)
                self._pending_losses[name] = value if before is None else before + value
            if accumulate:
                return None
            if last is not None:
                view = distributed.share([" + ".join(self._names)], [self._pending_update], scopes, replicas)
                write(view.gather(view.sets[0]))
                self.geometry = replace(last, losses=self._stacked_losses(last.weights), age=last.age + 1)
            else:
                if ratios is not None and G is not None:
                    (total,) = self._pending.values()
                    G, weights = rescale(total, self.rule, ratios, G, scopes, self._names)
                    write(total)
                else:
                    G, weights = self._combine(scopes, replicas)
                one = self.scope == "model"
                self.geometry = Geometry(
                    self._names,
                    G[0] if one else G,
                    weights[0] if one else weights,
                    self._stacked_losses(weights),
                    () if one else tuple(name for name, _ in groups),
                )
        except BaseException:
            self._drop_pending()
            raise
        self._drop_pending()
        return self.geometry

    def _combine(self, scopes: Sequence[Sequence[Tensor]], replicas: Any) -> tuple[Tensor, Tensor]:
        """Writes the combination of a set for each component; returns ``G`` ``(S, k, k)`` and weights ``(S, k)``."""
        view = distributed.share(self._names, [self._pending[name] for name in self._names], scopes, replicas)
        G = view.total([gramian(view.sets, part.parameters) for part in view.parts])
        before = carry_over(self._rule_state, self.rule.init(G, self._names))
        weights, state = self.rule(G, self._names, before)
        update: Gradients = {}
        for part in view.parts:
            update |= combine(view.sets, part.parameters, weights[part.scope])
        write(view.gather(update))
        self._rule_state = state
        return G, weights

    def _stacked_losses(self, like: Tensor) -> Tensor:
        return stack_losses((self._pending_losses[name] for name in self._names), like)

    def _last_weights(self) -> Geometry | None:
        """The geometry whose weights this step uses again; None where it takes a Gramian of its own."""
        last = self.geometry
        if self._pending_losses:
            return None if self._pending else last  # as the first micro-batch of the step
        if last is None or last.names != self._names or last.age + 1 >= self.refresh_every:
            return None
        # One read in every so many steps: after an overflow the weights are those of the plain sum.
        return last if last.age or bool(last.G.diagonal().isfinite().all()) else None

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
        last = self.geometry if self.refresh_every > 1 else None
        state_dict = super()._export_state()
        return memory.put(state_dict, owner=self._rule_key(), names=self._names, state=self._rule_state, last=last)

    def _import_state(self, state_dict: dict[str, Any]) -> None:
        device = self.param_groups[0]["params"][0].device
        inner, names, state, last = memory.take(state_dict, owner=self._rule_key(), device=device)
        super()._import_state(inner)
        self._names, self._rule_state, self.geometry = names, state, last
        self._drop_pending()

    def _rule_key(self) -> str:
        """Whose memory it is: another rule, or the same one over other scopes, cannot read it."""
        return f"{type(self.rule).__name__}, scope={self.scope!r}"
