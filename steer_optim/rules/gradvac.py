"""Gradient Vaccine: pull every pair of components towards its usual cosine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer_optim.rules.base import Rule, State
from steer_optim.rules.orders import check_seed, draw_orders


class GradVac(Rule):
    r"""Pull every pair of gradients towards a target cosine, a moving average of the cosines seen in training.

    For every component ``i``, loop over the others ``j`` in random order. Let :math:`\varphi` be the cosine between the
    current :math:`g_i'` and the *original* :math:`g_j`, and :math:`\hat\varphi` the target of the pair:

    .. math::
        g_i' &\leftarrow g_i' + \frac{\|g_i'\| \bigl(\hat\varphi \sqrt{1 - \varphi^2}
            - \varphi \sqrt{1 - \hat\varphi^2}\bigr)}{\|g_j\| \sqrt{1 - \hat\varphi^2}} \, g_j
            \quad \text{if } \varphi < \hat\varphi, \\
        \hat\varphi &\leftarrow (1 - \beta) \, \hat\varphi + \beta \, \varphi .

    The first line makes the cosine equal to the target. The update is :math:`\sum_i g_i'`. Targets start at 0, which is
    PCGrad; with ``beta=0`` they stay 0.

    A pair with a zero gradient has no cosine: neither the gradient nor the target changes. If the target is 1,
    :math:`g_i'` does not change: no finite multiple of :math:`g_j` reaches that cosine.

    State: ``draws`` ``(S,)`` int64, the number of orders drawn so far; ``cosine`` ``(S, k, k)``, the targets.

    Args:
        beta: how fast the targets follow, in [0, 1]; 0.01 in the paper. 1 minus that of ``PCD``.
        seed: of the orders, any integer; the global random state is neither read nor written.

    Raises:
        ValueError: ``beta`` is not in [0, 1].
        TypeError: ``seed`` is not an int.

    Example:
        >>> import torch
        >>> from steer_optim.rules import GradVac
        >>> G = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
        >>> weights, state = GradVac(beta=0.5)(G, ["lang", "vis"])
        >>> weights  # the first targets are 0: as PCGrad
        tensor([1.5000, 1.5000], dtype=torch.float64)
        >>> state["cosine"][0, 0, 1]
        tensor(-0.2500, dtype=torch.float64)

    References:
        Wang et al., *Gradient Vaccine*, ICLR 2021, arXiv 2010.05874, Eqs. 4-5 and Algorithm 1.
    """

    def __init__(self, *, beta: float = 0.01, seed: int = 0) -> None:
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be in [0, 1]; got {beta}")
        self.beta = beta
        self.seed = check_seed(seed)

    def init(self, G: Tensor, names: Sequence[str]) -> State:
        """Return the first state: no orders drawn, all targets 0."""
        return {"draws": torch.zeros(len(G), dtype=torch.int64, device=G.device), "cosine": torch.zeros_like(G)}

    def update(self, G: Tensor, names: Sequence[str], state: State) -> tuple[Tensor, State]:
        """Return the summed coefficients of the corrected gradients, and the targets moved by ``beta``."""
        own = torch.arange(len(names), device=G.device)
        norms = G.diagonal(dim1=1, dim2=2).sqrt()
        cosine = state["cosine"]
        C = torch.eye(len(names), dtype=G.dtype, device=G.device).expand_as(G)  # g_i' = sum_l C[i, l] g_l
        for j in draw_orders(state["draws"], names, seed=self.seed).unbind(-1):  # (S, k): the j for each i
            at_j = j[..., None] == own
            dot = (C * G.gather(1, j[..., None].expand_as(G))).sum(-1)  # <g_i', g_j>
            norm_i = (C @ G * C).sum(-1).clamp(min=0).sqrt()
            norm_j = norms.gather(1, j)
            defined = (norm_i * norm_j > 0) & (j != own)
            phi = torch.where(defined, dot / (norm_i * norm_j), 0.0).clamp(-1, 1)
            target = cosine.gather(2, j[..., None])[..., 0]
            sin, target_sin = (1 - phi**2).sqrt(), (1 - target**2).sqrt()
            step = norm_i * (target * sin - phi * target_sin) / (norm_j * target_sin)
            step = torch.where(defined & (phi < target) & (target_sin > 0), step, 0.0)
            C = C + step[..., None] * at_j
            cosine = torch.where(at_j & defined[..., None], cosine + self.beta * (phi[..., None] - cosine), cosine)
        return C.sum(1), {"draws": state["draws"] + 1, "cosine": cosine}
