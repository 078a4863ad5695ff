"""Visual Gradient Steering: add the gradient of the visual gain to the standard one, at the same step length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from steer_optim.rules.base import Rule, State

_PRESERVATION = {"vis": "lp", "lang": "vp"}


class VGS(Rule):
    r"""Apply Visual Gradient Steering to the components ``std`` and ``vis``.

    .. math::
        \text{update} = \eta \, (g_{std} + \gamma \, g_{vis} + g_{lp}), \qquad
        \eta = \frac{\|g_{std}\|}{\|g_{std} + \gamma \, g_{vis}\|}
             = \frac{1}{\sqrt{1 + \gamma^2 r^2 + 2 \gamma r \cos\varphi}}

    with :math:`r = \|g_{vis}\| / \|g_{std}\|` and :math:`\varphi` the angle between the two. The preservation component
    ``lp`` is optional; it must already be multiplied by its :math:`\lambda`, and has the common factor :math:`\eta`,
    but does not enter its definition. ``toward="lang"`` is the inverse experiment: components ``std``, ``lang`` and
    optionally ``vp``.

    If :math:`g_{std} + \gamma g_{vis}` is zero, :math:`\eta` is 1.

    Args:
        gamma: the strength :math:`\gamma` of the steering, 0 or more; 2.0 in the paper.
        toward: ``"vis"``, the paper's method, or ``"lang"``, its inverse.

    Raises:
        ValueError: ``gamma`` is negative or not finite, or ``toward`` is neither of the two.

    Example:
        >>> import torch
        >>> from steer_optim.rules import VGS
        >>> G = torch.tensor([[9.0, 0.0], [0.0, 4.0]], dtype=torch.float64)  # orthogonal, |std| = 3, |vis| = 2
        >>> weights, _ = VGS(gamma=2.0)(G, ["std", "vis"])
        >>> weights  # |std + 2 vis| = 5, so eta = 3/5
        tensor([0.6000, 1.2000], dtype=torch.float64)

    References:
        *Decomposed On-Policy Distillation for Vision-Language Reasoning*, arXiv 2606.00564, Eqs. 13-15, 17, 23;
        19-21 for ``toward="lang"``.
    """

    def __init__(self, gamma: float = 2.0, *, toward: Literal["vis", "lang"] = "vis") -> None:
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"gamma must be finite and at least 0; got {gamma}")
        if toward not in _PRESERVATION:
            raise ValueError(f"toward must be 'vis' or 'lang'; got {toward!r}. For other components use Steer")
        self.gamma = gamma
        self.toward = toward

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError unless the components are ``std``, the steered one and at most its preservation."""
        required, optional = {"std", self.toward}, _PRESERVATION[self.toward]
        if not required <= set(names) <= required | {optional}:
            raise ValueError(
                f"VGS(toward={self.toward!r}) needs the components 'std' and {self.toward!r}, and may have "
                f"{optional!r}; got {', '.join(map(repr, names))}. For other components use Steer"
            )

    def update(self, G: Tensor, names: Sequence[str], state: State) -> tuple[Tensor, State]:
        """Return ``eta`` for every component, times ``gamma`` for the steered one; no state."""
        s, v = names.index("std"), names.index(self.toward)
        std_sq = G[:, s, s]
        u_sq = std_sq + self.gamma * (2 * G[:, s, v] + self.gamma * G[:, v, v])
        eta = torch.where(u_sq > 0, std_sq / u_sq, 1.0).sqrt()
        weights = eta[:, None].repeat(1, len(names))
        weights[:, v] *= self.gamma
        return weights, {}
