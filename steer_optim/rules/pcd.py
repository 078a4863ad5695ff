"""Priority-constrained descent: follow one component, turned only as far as the others need to improve too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer_optim.rules.base import Rule, State

_MAX_COMPONENTS = 6  # 32 choices of active constraints
# The error of inner products of float32 gradients, relative to the norms: two gradients whose squared sine is below it
# count as parallel, and an update whose squared norm cancels below it counts as zero.
_PRECISION = 1e-6


class PCD(Rule):
    r"""Take the direction nearest to the primary gradient along which every secondary component improves.

    Let :math:`\tilde g_i = g_i / \sqrt{v_i}`, where :math:`v_i` is the moving average of :math:`\|g_i\|^2` (its bias
    correction, a common factor, would cancel), and let component 1 be the primary.

    .. math::
        d = \arg\min_d \|d - \tilde g_1\|^2 \quad \text{subject to} \quad
        \langle \tilde g_j, d \rangle \ge \tau \|\tilde g_j\|^2 \text{ for all } j > 1, \qquad
        \text{update} = \frac{\|g_1\|}{\|d\|} \, d .

    For two components
    :math:`d = \tilde g_1 + \max(0, \tau - \langle \tilde g_2, \tilde g_1 \rangle / \|\tilde g_2\|^2) \, \tilde g_2`.
    For more, the KKT system is solved for every choice of active constraints; the solution that violates none is
    taken.

    The formula has two consequences. If a secondary almost opposes the primary, :math:`\tilde g_2 \approx -\tilde g_1`,
    it gives :math:`d \approx -\tau \tilde g_1`, and the update is :math:`-g_1` at full length: the primary gets worse
    in that step. A parameter that only a secondary reaches, such as an auxiliary head, gets a gradient of exactly zero
    while its constraint is inactive: give such heads their own optimizer.

    The update is zero if :math:`g_1` is, or if the constraints leave only :math:`d = 0` (:math:`\|d\|` below a
    thousandth of the summed norms of its terms). If no direction meets all constraints (two antiparallel secondaries),
    all are dropped and the update is :math:`g_1`.

    State: ``sq_norms`` ``(S, k)``, the averages :math:`v_i`, from 0. They are of the gradients as they come: when a
    gradient scaler changes its factor, the averages weigh the steps before by the old one.

    Args:
        primary: the component to follow.
        tau: the share of the progress along its own gradient that each other component is
            guaranteed, in [0, 1]; 0.02 in the paper.
        beta: decay of the moving averages, in [0, 1); 0.999 in the paper. 1 minus that of ``GradVac``.

    Raises:
        ValueError: ``tau`` or ``beta`` is out of range.

    Example:
        >>> import torch
        >>> from steer_optim.rules import PCD
        >>> G = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> weights, _ = PCD("vis", tau=0.75)(G, ["vis", "lang"])
        >>> weights  # (1, 3/4) of the normalised gradients, which is 5/4 long
        tensor([0.8000, 0.3000], dtype=torch.float64)

    References:
        Varam and AlHajri, *Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
        Multi-Objective Optimization*, TMLR 2026, arXiv 2606.29521; the enumeration is that of Appendix B.2.
    """

    def __init__(self, primary: str, *, tau: float = 0.02, beta: float = 0.999) -> None:
        if not 0 <= tau <= 1:
            raise ValueError(f"tau must be in [0, 1]; got {tau}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta must be in [0, 1); got {beta}")
        self.primary = primary
        self.tau = tau
        self.beta = beta

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError if the primary component is missing, or there are more than six components."""
        if self.primary not in names:
            raise ValueError(f"PCD needs its component {self.primary!r}; got {', '.join(map(repr, names))}")
        if len(names) > _MAX_COMPONENTS:
            raise ValueError(
                f"PCD takes at most {_MAX_COMPONENTS} components; got {len(names)}. For more, name the primary first "
                "and use Weighting(torchjd.aggregation.PCDWeighting(tau=..., beta=..., eps=0.0))"
            )

    def init(self, G: Tensor, names: Sequence[str]) -> State:
        """Return averages of 0."""
        return {"sq_norms": torch.zeros_like(G[:, 0])}

    def update(self, G: Tensor, names: Sequence[str], state: State) -> tuple[Tensor, State]:
        """Return the KKT multipliers as weights of the ``g_i``, and the updated averages of the squared norms."""
        v, g_sq = names.index(self.primary), G.diagonal(dim1=1, dim2=2)
        sq_norms = self.beta * state["sq_norms"] + (1 - self.beta) * g_sq
        s = torch.where(sq_norms > 0, sq_norms.rsqrt(), 0.0).roll(-v, 1)  # the primary comes first from here on
        G = G.roll((-v, -v), (1, 2)) * s[:, :, None] * s[:, None, :]
        w = torch.cat([torch.ones_like(s[:, :1]), _multipliers(G, self.tau)], 1)

        d_sq = torch.einsum("si,sij,sj->s", w, G, w)
        parts = (w * G.diagonal(dim1=1, dim2=2).sqrt()).sum(1)
        scale = torch.where(d_sq > _PRECISION * parts**2, g_sq[:, v] / d_sq, 0.0).sqrt()
        return (w * s * scale[:, None]).roll(v, 1), {"sq_norms": sq_norms}


def _multipliers(G: Tensor, tau: float) -> Tensor:
    """Return the multipliers ``(S, k - 1)`` of the constraints, the primary being first; 0 if infeasible."""
    norms = G.diagonal(dim1=1, dim2=2).sqrt()
    products = norms[:, :, None] * norms[:, None, :]
    eye = torch.eye(G.shape[-1] - 1, dtype=G.dtype, device=G.device)
    # Secondaries of unit length: their cosines, and how far the primary is from meeting each constraint.
    cosines = torch.where(products > 0, G / products, 0.0)[:, 1:, 1:]
    short = torch.where(norms[:, 1:] > 0, tau * norms[:, 1:] - G[:, 1:, 0] / norms[:, 1:], 0.0)

    p = len(eye)
    bits = torch.arange(p, device=G.device)
    sets = (torch.arange(2**p, device=G.device)[:, None] >> bits) & 1 > 0  # (M, p): the active constraints
    inside = sets[:, :, None] & sets[:, None, :]
    L, info = torch.linalg.cholesky_ex(torch.where(inside, cosines[:, None], eye))
    # A squared pivot is the squared sine between a gradient and those before it.
    independent = (info == 0) & (L.diagonal(dim1=2, dim2=3) ** 2 > _PRECISION).all(-1)
    mu = torch.cholesky_solve((short[:, None] * sets)[..., None], L)[..., 0]  # (S, M, p)

    slack = mu @ cosines - short[:, None]
    violation = -(mu.clamp(max=0) + slack.clamp(max=0)).sum(-1)
    violation = torch.where(independent, violation / (norms[:, :1] + mu.abs().sum(-1)), torch.inf)
    least, best = violation.min(1)
    mu = mu.gather(1, best[:, None, None].expand(-1, 1, p))[:, 0]
    met = (least <= _PRECISION**0.5)[:, None] & (norms[:, 1:] > 0)
    return torch.where(met, mu / norms[:, 1:], 0.0)
