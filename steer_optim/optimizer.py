"""`SteeredOptimizer`: a torch optimizer that wraps another one and steers its gradients.

    losses -> capture -> holding -> gramian -> rule -> combine -> .grad -> inner.step()

It behaves like the inner optimizer (`facade.py`); the `Steering` that it owns computes ``.grad``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor
from torch.optim import Optimizer

from steer_optim import processes
from steer_optim.capture import Losses
from steer_optim.facade import OptimizerFacade, forward
from steer_optim.gramian import Geometry
from steer_optim.memory import KEY
from steer_optim.rules.base import Rule
from steer_optim.rules.sum import Sum
from steer_optim.steering import Scope, Steering


class SteeredOptimizer(OptimizerFacade):
    """Wrap a torch optimizer, and steer its update by a rule over the gradients of named loss components.

    Call :meth:`backward_components` instead of ``loss.backward()``, or ``backward()`` on the result of :meth:`join`.
    The rest of the loop stays the same. For several optimizers over one loss use one :class:`Steering`.

    Args:
        optimizer: any ``torch.optim.Optimizer``. It keeps its state, groups and hooks.
        rule: see :class:`Steering`.
        scope: see :class:`Steering`.
        data_parallel: see :class:`Steering`; True under DDP.
        refresh_every: see :class:`Steering`.

    Attributes:
        inner: the wrapped optimizer.
        steering: the :class:`Steering` over the parameters of the inner optimizer.

    Raises:
        TypeError: ``optimizer`` is not a torch optimizer or already steered, or ``rule`` is not a rule.
        ValueError: as for :class:`Steering`.

    Example:
        >>> import torch
        >>> from steer_optim import Steer, SteeredOptimizer
        >>> x = torch.zeros(2, requires_grad=True)
        >>> optimizer = SteeredOptimizer(torch.optim.SGD([x], lr=1.0), Steer(toward="vis", preserve_norm=False))
        >>> geometry = optimizer.backward_components({"lang": x[0] - x[1], "vis": x[1]})
        >>> x.grad  # lang, projected off vis, plus vis
        tensor([1., 1.])
        >>> optimizer.step()

    References:
        Yu et al., *Gradient Surgery for Multi-Task Learning*, arXiv 2001.06782; *Decomposed On-Policy Distillation for
        Vision-Language Reasoning*, arXiv 2606.00564.
    """

    geometry: Geometry | None = forward("steering", "geometry")
    """The :class:`Geometry` of the last steered backward pass; None before the first."""

    rule: Rule = forward("steering", "rule")
    """The rule; a new one starts without memory."""

    refresh_every: int = forward("steering", "refresh_every")
    """The number of steps from one Gramian to the next."""

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        *,
        scope: Scope = "model",
        data_parallel: processes.DataParallel = None,
        refresh_every: int = 1,
    ) -> None:
        processes.refuse_deepspeed(optimizer)
        if not isinstance(optimizer, Optimizer):
            found = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
            raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {found}. Create one, such as SGD(params)")
        if not hasattr(optimizer, "param_groups"):
            raise TypeError(f"{type(optimizer).__name__} has no param_groups: steer the optimizer inside it")
        if isinstance(optimizer, SteeredOptimizer):
            raise TypeError("optimizer is steered already: wrap optimizer.inner, or combine the rules into one")
        super().__init__(optimizer)
        self.steering = Steering(optimizer, rule, scope=scope, data_parallel=data_parallel, refresh_every=refresh_every)

    @overload
    def backward_components(
        self, losses: Losses, *, accumulate: Literal[False] | None = None, retain_graph: bool = False
    ) -> Geometry: ...

    @overload
    def backward_components(
        self, losses: Losses, *, accumulate: bool, retain_graph: bool = False
    ) -> Geometry | None: ...

    def backward_components(
        self, losses: Losses, *, accumulate: bool | None = None, retain_graph: bool = False
    ) -> Geometry | None:
        """Backpropagate every component, and add the steered update to ``.grad``.

        See :meth:`Steering.backward_components`.
        """
        return self.steering.backward_components(losses, accumulate=accumulate, retain_graph=retain_graph)

    def join(self, losses: Losses, *, accumulate: bool | None = None) -> Tensor:
        """Return one scalar, the sum of the components, whose backward pass steers; see :meth:`Steering.join`."""
        return self.steering.join(losses, accumulate=accumulate)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the inner optimizer on the current ``.grad``; nothing is steered here.

        Args:
            closure: evaluates the model again and returns the loss; it may call :meth:`backward_components`.

        Returns:
            The result of the inner optimizer: the loss of the closure, or None.

        Raises:
            RuntimeError: micro-batches are pending, and ``.grad`` lacks them; or the closure steered and then
                cleared ``.grad``.
        """
        if closure is None:
            self.steering.refuse_pending()
            return self._step(None)
        if not isinstance(self.rule, Sum) and any(group.get("line_search_fn") for group in self.param_groups):
            warnings.warn(
                "a line search needs the gradient of the loss, not a steered one: the search may stall. Use "
                "LBFGS(line_search_fn=None), or Sum()",
                stacklevel=2,
            )

        before = self.geometry

        def evaluate() -> Any:
            loss = closure()
            self.steering.refuse_pending()
            now, cleared = self.geometry, all(p.grad is None for p in self.steering._parameters())
            if cleared and now is not None and now is not before and now.norms.any():
                raise RuntimeError(
                    "the closure steered, and cleared .grad afterwards, so that this step would change nothing: clear "
                    "it first. Lightning's training_step must return optimizer.join(...) instead of calling "
                    "backward_components"
                )
            return loss

        return self._step(evaluate)

    step.__dict__["hooked"] = True  # so that torch does not wrap it in its own hooks

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` as the inner optimizer does, and drop pending micro-batches."""
        self.steering.drop_pending()
        super().zero_grad(set_to_none)

    def __repr__(self) -> str:
        return f"SteeredOptimizer({self.rule!r}, scope={self.steering.scope!r}, inner={self.inner!r})"

    def _export_state(self) -> dict[str, Any]:
        state_dict, memory = super()._export_state(), self.steering.state_dict()
        if not state_dict.get("param_groups"):  # the layout of a wrapper around several optimizers
            return {**state_dict, **memory}
        first, *others = state_dict["param_groups"]
        return {**state_dict, "param_groups": [{**first, **memory}, *others]}

    def _import_state(self, state_dict: dict[str, Any]) -> None:
        """Load the inner state and the rule's memory, or neither; a plain inner state dict resets the rule."""
        place = state_dict["param_groups"][0] if state_dict.get("param_groups") else state_dict
        memory = self.steering._read({KEY: place[KEY]} if KEY in place else {})
        rest = {key: value for key, value in place.items() if key != KEY}
        if place is not state_dict:
            rest = {**state_dict, "param_groups": [rest, *state_dict["param_groups"][1:]]}
        super()._import_state(rest)
        self.steering._adopt(memory)
