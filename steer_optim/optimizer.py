"""`SteeredOptimizer`: a real torch optimizer around another one, which steers the gradients that it steps on.

    losses -> capture -> gramian -> rule -> combine -> .grad -> inner.step()

This is its public face: `steering.py` has the flow up to ``.grad``, `facade.py` what makes it a twin of the inner one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from steer_optim import processes
from steer_optim.capture import Losses, check_losses, refuse_pending
from steer_optim.gramian import Geometry
from steer_optim.joined import join
from steer_optim.rules.base import Rule
from steer_optim.steering import Scope, Steering


class SteeredOptimizer(Steering):
    """Wraps a torch optimizer and steers its update by a rule over the gradients of named loss components.

    Call :meth:`backward_components` instead of ``loss.backward()``, or ``backward()`` on what :meth:`join` returns. The
    rest of the loop stays as it is.

    Args:
        optimizer: any ``torch.optim.Optimizer``. It keeps its state, groups and hooks.
        rule: how the components are weighed; ``Weighting(f)`` takes any function of the Gramian.
        scope: over which parameters one Gramian is taken and one set of weights is found: the whole model, each
            parameter group, or each tensor by itself.
        data_parallel: what the processes are to each other, which the optimizer cannot see. True under DDP: all are
            replicas of one model, and the gradients of its components (not their losses) are averaged before the
            Gramian is taken; a process group, if only its processes are (it cannot be pickled or deep-copied); False
            if each trains by itself. Sharded parameters (FSDP2, tensor parallel) say so themselves.
        refresh_every: take the Gramian in every so many steps only, a step being a call that does not accumulate. In
            between the last weights are used, for which one backward pass of the weighted sum is enough;
            ``geometry.age`` says how old they are. After a step in which a component had no gradient, or one that is
            not finite, the next is exact. For ``scope="model"``. May be changed at any time.

    Attributes:
        inner: the wrapped optimizer.
        rule: the rule.
        scope: the scope.
        refresh_every: as above.
        geometry: the :class:`Geometry` of the last steered backward pass; None before the first.

    Raises:
        TypeError: ``optimizer`` or ``rule`` is not one, or ``optimizer`` is steered already.
        ValueError: there is no such scope; or ``refresh_every`` is not a positive integer, or more than 1 with a scope
            other than the whole model, since one backward pass has one weight for each component.

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
            raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
        if isinstance(optimizer, SteeredOptimizer):
            raise TypeError("optimizer is steered already: wrap optimizer.inner, or give one rule that does both")
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a Rule; got {rule!r}. Wrap a function of the Gramian in Weighting(...)")
        if scope not in ("model", "group", "tensor"):
            raise ValueError(f"scope must be 'model', 'group' or 'tensor'; got {scope!r}")
        super().__init__(optimizer, rule=rule, scope=scope, data_parallel=data_parallel, refresh_every=refresh_every)

    @overload
    def backward_components(
        self, losses: Losses, *, accumulate: Literal[False] = False, retain_graph: bool = False
    ) -> Geometry: ...

    @overload
    def backward_components(
        self, losses: Losses, *, accumulate: bool, retain_graph: bool = False
    ) -> Geometry | None: ...

    def backward_components(
        self, losses: Losses, *, accumulate: bool = False, retain_graph: bool = False
    ) -> Geometry | None:
        """Backpropagates every component, and adds the steered combination of their gradients to ``.grad``.

        With gradients ``g_i`` of the components, ``G[i, j] = <g_i, g_j>`` and ``w = rule(G)``, every parameter gets
        ``p.grad += sum_i w[i] * g_i``. As with ``loss.backward()``, an existing ``.grad`` is added to, and a parameter
        that no component reaches keeps ``grad is None``.

        Args:
            losses: scalar losses by name, or callables that return one. Callables are evaluated one after another
                (``VGS``: ``std`` first), so that one graph is freed before the next is built; where they share a part
                of the graph, pass ``retain_graph=True``. The order of the first call is the order in ``Geometry`` from
                then on.
            accumulate: add this micro-batch to what is pending and write nothing. The next plain call steers the
                totals: N micro-batches equal one batch, which steering each by itself does not.
            retain_graph: keep the graph of the components, as ``Tensor.backward`` does.

        Returns:
            The geometry of the (accumulated) gradients and the weights used, also kept as ``optimizer.geometry``;
            None where ``accumulate`` is true.

        Raises:
            TypeError, ValueError: no components; one that is not a scalar, or that reaches no parameter; names that the
                rule cannot weigh, or that changed while something is pending or the rule remembers them.
            RuntimeError: there are several processes and it was not said what they are to each other, or gradients
                cannot be taken one component at a time.

        After an error ``.grad`` is as before; if a backward pass had begun, what was pending is dropped.

        Example:
            >>> import torch
            >>> from steer_optim import Sum, SteeredOptimizer
            >>> x = torch.ones(1, requires_grad=True)
            >>> optimizer = SteeredOptimizer(torch.optim.SGD([x], lr=0.1), Sum())
            >>> optimizer.backward_components({"a": 2 * x, "b": 3 * x}, accumulate=True)
            >>> x.grad is None
            True
            >>> geometry = optimizer.backward_components({"a": 2 * x, "b": 3 * x})
            >>> x.grad
            tensor([10.])
        """
        return self._backward(losses, scale=None, accumulate=accumulate, retain_graph=retain_graph)

    def join(self, losses: Losses, *, accumulate: bool = False) -> Tensor:
        """One scalar, equal to the sum of the components, whose backward pass steers.

        For loops that call ``loss.backward()`` themselves. What comes in on the way back, from a gradient scaler or a
        division by the number of micro-batches, multiplies every component alike, and with them the norms in
        :attr:`geometry`. Nothing else flows through the scalar: its backward pass is
        ``backward_components(losses, accumulate=accumulate)``, so that ``torch.autograd.grad`` and
        ``backward(inputs=...)`` find no parameter behind it.

        In one process another loss may be added and is not steered; in several, backpropagate it by itself before. As
        with any loss, a second backward pass needs ``retain_graph=True`` in the first, and adds to ``.grad`` again; so
        does an added loss that shares a part of the graph. Under ``torch.no_grad()`` this is only the plain sum.

        Args:
            losses: as for :meth:`backward_components`; callables are evaluated at once, since the sum is.
            accumulate: as for :meth:`backward_components`: true for every micro-batch but the last.

        Returns:
            A scalar, on the device and in the dtype of the first component.

        Raises:
            TypeError, ValueError: as :meth:`backward_components`; names and shapes are checked here.

        Example:
            >>> import torch
            >>> from steer_optim import Sum, SteeredOptimizer
            >>> x = torch.ones(1, requires_grad=True)
            >>> optimizer = SteeredOptimizer(torch.optim.SGD([x], lr=0.1), Sum())
            >>> loss = optimizer.join({"a": x.sum(), "b": 2 * x.sum()})
            >>> loss.item()
            3.0
            >>> (loss / 2).backward()
            >>> x.grad
            tensor([1.5000])
        """
        if torch.is_grad_enabled():
            check_losses(losses)
            self._check_names(losses)
        values = {name: loss() if callable(loss) else loss for name, loss in losses.items()}
        if torch.is_grad_enabled():
            check_losses(values)  # what the callables returned

        def backward(**options: Any) -> None:
            self._backward(values, accumulate=accumulate, **options)
            processes.guard(self.data_parallel, [p for group in self.param_groups for p in group["params"]])

        return join(list(values.values()), backward)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """A step of the inner optimizer on ``.grad``, as it is; nothing is steered here.

        Args:
            closure: evaluates the model again and returns the loss; it may call :meth:`backward_components`.

        Returns:
            What the inner optimizer returns: the loss of the closure, or None.

        Raises:
            RuntimeError: micro-batches are pending, so that ``.grad`` lacks them.
        """

        def evaluate() -> Any:
            loss = closure() if closure else None
            if self._pending_losses:
                raise refuse_pending(self._pending_losses)
            return loss

        return super().step(evaluate if closure else evaluate())

    step.__dict__["hooked"] = True  # torch must not wrap it in hooks of its own

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears ``.grad`` as the inner optimizer does, and drops what is pending."""
        self._drop_pending()
        super().zero_grad(set_to_none)

    def __repr__(self) -> str:
        return f"SteeredOptimizer({self.rule!r}, scope={self.scope!r}, inner={self.inner!r})"
