"""The interface of every rule: a pure map from a Gramian to weights.

A rule reads the inner products of the component gradients, ``G[i, j] = <g_i, g_j>``, and returns one weight per
component; the update is ``sum_i w[i] * g_i``. It reads no parameters or gradients, so it costs almost nothing, is
tested without a model, and gives the same weights on every replica.

State is a flat dict of tensors, passed in and returned; the rule object holds none. Rules compute on the device of
``G`` and do not synchronize with it, except `Weighting`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TypeAlias, final

import torch
from torch import Tensor

State: TypeAlias = dict[str, Tensor]
"""The state of a rule between steps: tensors by name, each with the scopes as its leading dimension."""


def carry_over(state: State, fresh: State) -> State:
    """Return ``state``, with rows of ``fresh`` appended for new scopes.

    Raises:
        ValueError: ``state`` has more scopes than ``fresh``, or other keys.
    """
    if not state:
        return fresh
    if state.keys() != fresh.keys() or any(len(state[key]) > len(new) for key, new in fresh.items()):
        raise ValueError(
            "the rule's memory has more scopes than there are now: groups may be added but not removed. Create a new "
            "SteeredOptimizer around the inner optimizer"
        )
    return {key: torch.cat([state[key].to(new.device), new[len(state[key]) :]]) for key, new in fresh.items()}


class Rule(abc.ABC):
    """Map the Gramian of the components to their weights.

    A concrete rule overrides :meth:`update`; :meth:`init` if it has state; and :meth:`check` if it needs certain
    components. Steering calls ``rule(G, names, state)``: for a Gramian that is not finite this returns the plain sum
    and the old state, so that a gradient scaler sees the overflow and skips the step.

    State is a dict of tensors, ``(S, ...)`` each; :meth:`update` returns the keys and shapes that :meth:`init` made.

    Shapes: ``S`` scopes (1 for the whole model), ``k`` components. ``G`` is ``(S, k, k)``, float64,
    symmetric and positive semidefinite up to rounding; weights are ``(S, k)`` of the same dtype and device.

    Example:
        >>> import torch
        >>> from steer_optim.rules import Rule
        >>> class FirstNorm(Rule):  # scales every gradient to the norm of the first
        ...     def update(self, G, names, state):
        ...         sq_norms = G.diagonal(dim1=1, dim2=2)
        ...         return (sq_norms[:, :1] / sq_norms).sqrt(), state
        >>> FirstNorm()(torch.tensor([[4.0, 0.0], [0.0, 1.0]]).double(), ["main", "side"])[0]
        tensor([1., 2.], dtype=torch.float64)
    """

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError if this rule cannot weigh the components ``names``."""

    def init(self, G: Tensor, names: Sequence[str]) -> State:
        """Return the state before the first update, on the device of ``G``; empty for a rule without state.

        Called again while every Gramian so far was not finite.
        """
        return {}

    @abc.abstractmethod
    def update(self, G: Tensor, names: Sequence[str], state: State) -> tuple[Tensor, State]:
        """Return the weights ``(S, k)`` and the new state, for a finite Gramian ``(S, k, k)``.

        It must be pure: the same arguments give the same results, and ``state`` is not written to. Scaling ``G`` by
        one positive factor in every step must leave the weights unchanged.
        """

    @final
    def __call__(
        self, G: Tensor, names: Sequence[str], state: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """Return the weights and the new state, for any Gramian, finite or not.

        Args:
            G: ``(k, k)`` or ``(S, k, k)``, the inner products of the component gradients.
            names: the ``k`` components, in the order of the rows of ``G``.
            state: what the last call returned; None or empty before the first.

        Returns:
            The weights, ``(k,)`` or ``(S, k)`` to match ``G``, and the state for the next call.

        Raises:
            ValueError: the shape of ``G`` does not fit ``names``, or the rule cannot weigh these components.

        Example:
            >>> import torch
            >>> from steer_optim import Steer
            >>> G = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
            >>> weights, _ = Steer(toward="vis", preserve_norm=False)(G, ["lang", "vis"])
            >>> weights  # lang is projected off vis: g_lang + 0.5 g_vis, and g_vis itself
            tensor([1.0000, 1.5000], dtype=torch.float64)
        """
        k = len(names)
        if G.ndim not in (2, 3) or G.shape[-2:] != (k, k):
            raise ValueError(f"the Gramian of {k} components must be ({k}, {k}) or (S, {k}, {k}); got {tuple(G.shape)}")
        self.check(names)
        if G.ndim == 2:
            weights, new_state = self(G[None], names, state)
            return weights[0], new_state
        # One test for all scopes: a gradient scaler takes or skips the step for all parameters.
        finite = G.isfinite().all()
        safe_G = torch.where(finite, G, torch.eye(k, dtype=G.dtype, device=G.device))
        old = dict(state) if state else self.init(safe_G, names)
        weights, new = self.update(safe_G, names, old)
        if weights.shape != G.shape[:2]:
            raise ValueError(f"update must return weights {tuple(G.shape[:2])}, (S, k); got {tuple(weights.shape)}")
        if {key: (t.shape, t.dtype) for key, t in new.items()} != {key: (t.shape, t.dtype) for key, t in old.items()}:
            raise ValueError(
                f"update must return the state of init: {', '.join(old)}, each (S, ...) with unchanged shape and dtype"
            )
        weights = torch.where(finite, weights.detach().to(G), 1.0)
        return weights, {key: torch.where(finite, new[key].detach(), old[key]) for key in new}

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={_shown(value)}" for key, value in vars(self).items())
        return f"{type(self).__name__}({options})"


def _shown(value: object) -> str:
    """Return the repr of a hyperparameter, which replicas compare: the order of a set differs between processes."""
    return f"{{{', '.join(sorted(map(repr, value)))}}}" if isinstance(value, set | frozenset) else repr(value)
