"""The dense float64 oracle: every rule once more, on the gradients themselves.

A set of k component gradients is one matrix ``J`` ``(k, n)``, float64, a row per component, and every function
below returns the update ``(n,)`` that its paper defines. Short, slow and obviously right: no Gramian, no weights, no
batches. The rules are held equal to it by the tests; nothing else uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

import torch
from torch import Tensor


def flatten(sets: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """One row ``(n,)``, float64, per gradient set; None is zeros, and nothing where every set has None.

    Example:
        >>> import torch
        >>> flatten([[torch.ones(2), None], [None, torch.ones(1)]])
        tensor([[1., 1., 0.],
                [0., 0., 1.]], dtype=torch.float64)
    """
    columns = []
    for gradients in zip(*sets, strict=True):
        like = next((g for g in gradients if g is not None), None)
        if like is not None:
            column = [torch.zeros_like(like) if g is None else g for g in gradients]
            columns.append(torch.stack([g.detach().double().cpu().flatten() for g in column]))
    return torch.cat(columns, 1)


def gramian(J: Tensor) -> Tensor:
    """``(k, k)``: the inner products of the rows."""
    return J @ J.T


def combine(J: Tensor, weights: Tensor) -> Tensor:
    """``(n,)``: the rows, weighted and summed."""
    return (weights[:, None] * J).sum(0)


def project(g: Tensor, onto: Tensor) -> Tensor:
    """What is left of ``g`` without its part along ``onto``; ``g`` itself where ``onto`` is zero."""
    if not onto.any():
        return g
    unit: Tensor = onto / onto.norm()
    return g - (g @ unit) * unit


def steered(J: Tensor, v: int, *, when: str = "conflict") -> Tensor:
    """``(k, n)``: every row but ``v`` projected off row ``v``, ``when`` in conflict, always or never."""
    rows = [
        project(g, J[v]) if i != v and (when == "always" or (when == "conflict" and g @ J[v] < 0)) else g
        for i, g in enumerate(J)
    ]
    return torch.stack(rows)


def rescale(update: Tensor, norm: Tensor) -> Tensor:
    """The update at the given norm; zero stays zero."""
    return update / update.norm() * norm if update.any() else update


def steer(J: Tensor, v: int, *, gain: float = 0.0, when: str = "conflict", preserve_norm: bool = True) -> Tensor:
    """The priority form of PCGrad (arXiv 2001.06782), with ``gain`` times the gradient steered towards on top."""
    update = steered(J, v, when=when).sum(0) + gain * J[v]
    return rescale(update, J.sum(0).norm()) if preserve_norm else update


def vgs(std: Tensor, vis: Tensor, lp: Tensor | None = None, *, gamma: float = 2.0) -> Tensor:
    """Visual Gradient Steering (arXiv 2606.00564), Eqs. 13-15 and 17, of the gradients ``(n,)``."""
    direction = std + gamma * vis
    eta = std.norm() / direction.norm() if direction.any() else 1.0
    return eta * (direction if lp is None else direction + lp)


def pcgrad(J: Tensor, orders: Tensor) -> Tensor:
    """PCGrad (arXiv 2001.06782), Algorithm 1, with the visits ``orders`` ``(k, k)`` of each component."""
    update = torch.zeros_like(J[0])
    for i, g in enumerate(J):
        for j in orders[i].tolist():
            if j != i and g @ J[j] < 0:
                g = project(g, J[j])
        update += g
    return update


def gradvac(J: Tensor, orders: Tensor, targets: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Gradient Vaccine (arXiv 2010.05874), Algorithm 1: the update and the targets ``(k, k)`` of the next step."""
    update, targets = torch.zeros_like(J[0]), targets.clone()
    for i, g in enumerate(J):
        for j in orders[i].tolist():
            if j == i or not g.any() or not J[j].any():
                continue
            phi, target = (g @ J[j]) / (g.norm() * J[j].norm()), targets[i, j].clone()
            targets[i, j] = (1 - beta) * target + beta * phi
            if phi < target:
                # The vector of cosine `target`: a unit part across J[j], and cot(angle) of it along.
                across = project(g, J[j])
                g = across + across.norm() * target / (1 - target**2).sqrt() * J[j] / J[j].norm()
        update += g
    return update, targets


def agem(J: Tensor, m: int) -> Tensor:
    """A-GEM (arXiv 1812.00420), Eq. 11: the sum of all rows but ``m``, projected off row ``m`` in conflict."""
    g = J.sum(0) - J[m]
    return project(g, J[m]) if g @ J[m] < 0 else g


def pcd(J: Tensor, v: int, sq_norms: Tensor, *, tau: float) -> Tensor:
    """Priority-constrained descent (arXiv 2606.29521) of row ``v``, given the average squared norms ``(k,)``.

    The nearest feasible point lies on the flat of some set of constraints, so it is the nearest of those
    projections of the primary on such flats that are feasible.
    """
    unit = J / sq_norms.sqrt()[:, None]
    others = [i for i in range(len(J)) if i != v]
    candidates = []
    for active in chain.from_iterable(combinations(others, size) for size in range(len(J))):
        A = unit[list(active)]
        d = unit[v] + torch.linalg.pinv(A) @ (tau * A.square().sum(1) - A @ unit[v])
        feasible = all(unit[j] @ d >= tau * unit[j] @ unit[j] - 1e-9 * unit[j].norm() * d.norm() for j in others)
        if feasible:
            candidates.append(d)
    nearest = min(candidates, key=lambda d: float((d - unit[v]).norm()), default=unit[v])
    return rescale(nearest, J[v].norm())
