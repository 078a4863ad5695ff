"""Steer towards one component: project conflicting components off it, and keep the norm of the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from steer_optim.rules.base import Rule, State


class Steer(Rule):
    r"""Project every other component off the one that matters most, and optionally amplify that one.

    Let :math:`v` be the component to steer towards.

    .. math::
        g_i' &= g_i - \frac{\min(0, \langle g_i, g_v \rangle)}{\|g_v\|^2} \, g_v \quad (i \ne v), \\
        u &= (1 + \mathrm{gain}) \, g_v + \sum_{i \ne v} g_i', \qquad
        \text{update} = \frac{\|\sum_i g_i\|}{\|u\|} \, u .

    So :math:`\langle u, g_v \rangle \ge \|g_v\|^2` (unless ``project="never"``): no other component slows ``v`` down.
    If nothing conflicts and ``gain`` is 0, the update is exactly the plain sum. This is PCGrad with a priority: it
    projects off :math:`g_v` only, so that no random order is needed.

    If :math:`g_v` is zero, nothing is projected and the update is the plain sum. If the components cancel
    (:math:`\sum_i g_i = 0`), a step that preserves the norm is zero too.

    Args:
        toward: the component to steer towards.
        gain: how many times :math:`g_v` is added on top, at least 0; the :math:`\gamma` of VGS.
        project: when the others are projected: if they conflict with :math:`g_v` (``"conflict"``); ``"always"``, so
            that they keep only their part orthogonal to :math:`g_v`; or ``"never"``.
        preserve_norm: rescale the update to the norm of the plain sum, so that steering changes only its
            direction and the learning rate keeps its meaning. Near the minimum of ``toward`` the plain sum stays long
            if the others still conflict, and steps overshoot: decay the learning rate, or pass False.

    Raises:
        ValueError: ``gain`` is negative or not finite, or ``project`` is not one of the three.

    Example:
        >>> import torch
        >>> from steer_optim.rules import Steer
        >>> G = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
        >>> weights, _ = Steer("vis", preserve_norm=False)(G, ["lang", "vis"])
        >>> weights
        tensor([1.0000, 1.5000], dtype=torch.float64)

    References:
        Yu et al., *Gradient Surgery for Multi-Task Learning*, arXiv 2001.06782, Algorithm 1 (the projection).
    """

    def __init__(
        self,
        toward: str,
        *,
        gain: float = 0.0,
        project: Literal["conflict", "always", "never"] = "conflict",
        preserve_norm: bool = True,
    ) -> None:
        if not 0 <= gain < float("inf"):
            raise ValueError(f"gain must be finite and at least 0; got {gain}. To steer away, name another component")
        if project not in ("conflict", "always", "never"):
            raise ValueError(f"project must be 'conflict', 'always' or 'never'; got {project!r}")
        self.toward = toward
        self.gain = gain
        self.project = project
        self.preserve_norm = preserve_norm

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError if the component to steer towards is missing."""
        if self.toward not in names:
            raise ValueError(f"Steer needs its component {self.toward!r}; got {', '.join(map(repr, names))}")

    def update(self, G: Tensor, names: Sequence[str], state: State) -> tuple[Tensor, State]:
        """Return 1 per component and ``1 + gain - slopes`` for ``toward``, rescaled to the norm; no state."""
        v = names.index(self.toward)
        weights = torch.ones_like(G[:, v])
        weights[:, v] += self.gain
        if self.project != "never":
            v_sq = G[:, v, v, None]
            slopes = torch.where(v_sq > 0, G[:, v] / v_sq, 0.0)  # <g_i, g_v> / |g_v|^2
            if self.project == "conflict":
                slopes = slopes.clamp(max=0)
            slopes[:, v] = 0
            weights[:, v] -= slopes.sum(1)
        if self.preserve_norm:
            # The same kernel for both norms: without conflict their ratio is exactly one.
            u_sq = _sq_norm(G, weights)
            ratio = _sq_norm(G, torch.ones_like(weights)) / u_sq
            weights = weights * torch.where(u_sq > 0, ratio, 1.0).sqrt()[:, None]
        return weights, {}


def _sq_norm(G: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("si,sij,sj->s", w, G, w).clamp(min=0)
