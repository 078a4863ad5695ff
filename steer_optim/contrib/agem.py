"""A-GEM: a memory that the update must not forget, and that is not trained itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer_optim.rules.base import Rule, State


class AGEM(Rule):
    r"""Project the other components off the memory's gradient where they conflict, and leave the memory's own out.

    Let :math:`m` be the gradient of the memory, and :math:`g` the sum of the others.

    .. math::
        \text{update} = g - \frac{\min(0, \langle g, m \rangle)}{\|m\|^2} \, m .

    To first order the update does not increase the loss on the memory.
    :class:`~steer_optim.rules.Steer` adds :math:`m` as well. If :math:`m` is zero, the update is :math:`g`.

    Args:
        memory: the component that is the loss on the memory.

    Example:
        >>> import torch
        >>> from steer_optim.contrib import AGEM
        >>> weights, _ = AGEM("memory")(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]).double(), ["current", "memory"])
        >>> weights
        tensor([1.0000, 0.5000], dtype=torch.float64)

    References:
        Chaudhry et al., *Efficient Lifelong Learning with A-GEM*, arXiv 1812.00420, Eq. 11.
    """

    def __init__(self, memory: str) -> None:
        self.memory = memory

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError if the memory is missing."""
        if self.memory not in names:
            raise ValueError(f"AGEM needs its component {self.memory!r}; got {', '.join(map(repr, names))}")

    def update(self, G: Tensor, names: Sequence[str], state: State) -> tuple[Tensor, State]:
        """Return 1 per component, and for the memory the multiple that removes the conflict; no state."""
        m = names.index(self.memory)
        weights = torch.ones_like(G[:, m])
        others = G[:, m, :m].sum(1) + G[:, m, m + 1 :].sum(1)
        slope = others / G[:, m, m]  # <g, m> / |m|^2, not a number if m is zero
        weights[:, m] = torch.where(slope < 0, -slope, 0.0)
        return weights, {}
