"""The plain sum of the components, as without steering: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer_optim.rules.base import Rule, State


class Sum(Rule):
    """Give every component weight 1: the update is ``sum_i g_i``, as without steering.

    Example:
        >>> import torch
        >>> from steer_optim.rules import Sum
        >>> weights, _ = Sum()(torch.eye(2, dtype=torch.float64), ["lang", "vis"])
        >>> weights
        tensor([1., 1.], dtype=torch.float64)
    """

    def update(self, G: Tensor, names: Sequence[str], state: State) -> tuple[Tensor, State]:
        """Return ones ``(S, k)``, and no state."""
        return torch.ones_like(G[:, 0]), {}
