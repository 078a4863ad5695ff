"""PCGrad: project every component off those that it conflicts with, without a priority."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer_optim.rules.base import Rule, State
from steer_optim.rules.orders import check_seed, draw_orders


class PCGrad(Rule):
    r"""Project every gradient off those that it conflicts with, in random order.

    For every component ``i``, loop over the others ``j`` in random order:

    .. math::
        g_i' \leftarrow g_i' - \frac{\min(0, \langle g_i', g_j \rangle)}{\|g_j\|^2} \, g_j ,
        \qquad g_i' = g_i \text{ at first}.

    The update is :math:`\sum_i g_i'`. The projection is on the *original* :math:`g_j`. Without a conflict this is
    exactly the plain sum. A zero gradient conflicts with nothing.

    State: ``draws`` ``(S,)`` int64, the number of orders drawn so far. Every scope, step and component has its own
    order; the same seed gives the same orders on every device and replica.

    Args:
        seed: of the orders, any integer; the global random state is neither read nor written.

    Raises:
        TypeError: ``seed`` is not an int.

    Example:
        >>> import torch
        >>> from steer_optim.rules import PCGrad
        >>> G = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
        >>> weights, state = PCGrad()(G, ["lang", "vis"])
        >>> weights
        tensor([1.5000, 1.5000], dtype=torch.float64)
        >>> state
        {'draws': tensor([1])}

    References:
        Yu et al., *Gradient Surgery for Multi-Task Learning*, NeurIPS 2020, arXiv 2001.06782, Algorithm 1.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = check_seed(seed)

    def init(self, G: Tensor, names: Sequence[str]) -> State:
        """Return no orders drawn."""
        return {"draws": torch.zeros(len(G), dtype=torch.int64, device=G.device)}

    def update(self, G: Tensor, names: Sequence[str], state: State) -> tuple[Tensor, State]:
        """Return the summed coefficients of the projected gradients; count one more draw."""
        own = torch.arange(len(names), device=G.device)
        C = torch.eye(len(names), dtype=G.dtype, device=G.device).expand_as(G)  # g_i' = sum_l C[i, l] g_l
        for j in draw_orders(state["draws"], names, seed=self.seed).unbind(-1):  # (S, k): the j for each i
            dot = (C * G.gather(1, j[..., None].expand_as(G))).sum(-1)  # <g_i', g_j>
            j_sq = G.diagonal(dim1=1, dim2=2).gather(1, j)
            step = torch.where((dot < 0) & (j != own), -dot / j_sq, 0.0)
            C = C + step[..., None] * (j[..., None] == own)
        return C.sum(1), {"draws": state["draws"] + 1}
