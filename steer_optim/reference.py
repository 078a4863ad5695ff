"""A float64 reference of every rule, computed from the gradients themselves.

The gradients of ``k`` components are one float64 matrix ``J`` ``(k, n)``, a row per component. The function of a rule
returns the update ``(n,)`` that its paper defines. It is short, slow and obviously right: no Gramian, no weights, no
batches. Only tests use it, and hold the rules equal to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

import torch
from torch import Tensor


def flatten(sets: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Return one row ``(n,)``, float64, per gradient set.

    Args:
        sets: gradients of the same parameters, or None for zeros; a parameter that is None in every set is left out.

    Returns:
        ``J`` ``(k, n)``.

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
    """Return the inner products of the rows of ``J`` ``(k, n)``, ``(k, k)``.

    Example:
        >>> import torch
        >>> gramian(torch.tensor([[3.0, 4.0]]))
        tensor([[25.]])
    """
    return J @ J.T


def combine(J: Tensor, weights: Tensor) -> Tensor:
    """Return the rows of ``J`` ``(k, n)``, weighted by ``(k,)`` and summed, ``(n,)``.

    Example:
        >>> import torch
        >>> combine(torch.eye(2), torch.tensor([2.0, 3.0]))
        tensor([2., 3.])
    """
    return (weights[:, None] * J).sum(0)


def project(g: Tensor, onto: Tensor) -> Tensor:
    """Return ``g`` ``(n,)`` without its part along ``onto`` ``(n,)``; ``g`` itself if ``onto`` is zero.

    Example:
        >>> import torch
        >>> project(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0]))
        tensor([1., 0.])
    """
    if not onto.any():
        return g
    unit: Tensor = onto / onto.norm()
    return g - (g @ unit) * unit


def steered(J: Tensor, v: int, *, when: str = "conflict") -> Tensor:
    """Return ``J`` ``(k, n)`` with every row but ``v`` projected off row ``v``.

    Args:
        J: the gradients.
        v: the row that is kept.
        when: ``conflict``, ``always`` or ``never``.

    Example:
        >>> import torch
        >>> steered(torch.tensor([[1.0, -1.0], [0.0, 1.0]]), 1)
        tensor([[1., 0.],
                [0., 1.]])
    """
    rows = [
        project(g, J[v]) if i != v and (when == "always" or (when == "conflict" and g @ J[v] < 0)) else g
        for i, g in enumerate(J)
    ]
    return torch.stack(rows)


def rescale(update: Tensor, norm: Tensor) -> Tensor:
    """Return the update ``(n,)`` at the given norm; zero stays zero.

    Example:
        >>> import torch
        >>> rescale(torch.tensor([0.0, 4.0]), torch.tensor(2.0))
        tensor([0., 2.])
    """
    return update / update.norm() * norm if update.any() else update


def steer(J: Tensor, v: int, *, gain: float = 0.0, when: str = "conflict", preserve_norm: bool = True) -> Tensor:
    """Return the update of ``Steer``: PCGrad (arXiv 2001.06782) with a priority, plus ``gain`` times row ``v``.

    Args:
        J: the gradients ``(k, n)``.
        v: the row to steer towards.
        gain: as for :class:`steer_optim.Steer`.
        when: its ``project``.
        preserve_norm: as there.

    Example:
        >>> import torch
        >>> steer(torch.tensor([[1.0, -1.0], [0.0, 1.0]]), 1, preserve_norm=False)
        tensor([1., 1.])
    """
    update = steered(J, v, when=when).sum(0) + gain * J[v]
    return rescale(update, J.sum(0).norm()) if preserve_norm else update


def vgs(std: Tensor, vis: Tensor, lp: Tensor | None = None, *, gamma: float = 2.0) -> Tensor:
    """Return the update of Visual Gradient Steering (arXiv 2606.00564), Eqs. 13-15 and 17.

    Args:
        std: the standard gradient ``(n,)``.
        vis: that of the visual gain.
        lp: that of language preservation, times its weight.
        gamma: the strength of steering.

    Example:
        >>> import torch
        >>> vgs(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0]))
        tensor([1.8000, 2.4000])
    """
    direction = std + gamma * vis
    eta = std.norm() / direction.norm() if direction.any() else 1.0
    return eta * (direction if lp is None else direction + lp)


def pcgrad(J: Tensor, orders: Tensor) -> Tensor:
    """Return the update of PCGrad (arXiv 2001.06782), Algorithm 1.

    Args:
        J: the gradients ``(k, n)``.
        orders: ``(k, k)``, the order in which each component visits the others.

    Example:
        >>> import torch
        >>> pcgrad(torch.tensor([[1.0, -1.0], [0.0, 1.0]]), torch.tensor([[0, 1], [0, 1]]))
        tensor([1.5000, 0.5000])
    """
    update = torch.zeros_like(J[0])
    for i, g in enumerate(J):
        for j in orders[i].tolist():
            if j != i and g @ J[j] < 0:
                g = project(g, J[j])
        update += g
    return update


def gradvac(J: Tensor, orders: Tensor, targets: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Return the update of Gradient Vaccine (arXiv 2010.05874), Algorithm 1, and the next targets.

    Args:
        J: the gradients ``(k, n)``.
        orders: as for :func:`pcgrad`.
        targets: ``(k, k)``, the target cosines.
        beta: the rate of the targets' moving average.

    Example:
        >>> import torch
        >>> J, orders = torch.tensor([[1.0, -1.0], [0.0, 1.0]]), torch.tensor([[0, 1], [0, 1]])
        >>> gradvac(J, orders, torch.zeros(2, 2), beta=0.0)[0]
        tensor([1.5000, 0.5000])
    """
    update, targets = torch.zeros_like(J[0]), targets.clone()
    for i, g in enumerate(J):
        for j in orders[i].tolist():
            if j == i or not g.any() or not J[j].any():
                continue
            phi, target = (g @ J[j]) / (g.norm() * J[j].norm()), targets[i, j].clone()
            targets[i, j] = (1 - beta) * target + beta * phi
            if phi < target:
                # To have the cosine `target`, g needs cot(angle) times its part across J[j] along J[j].
                across = project(g, J[j])
                g = across + across.norm() * target / (1 - target**2).sqrt() * J[j] / J[j].norm()
        update += g
    return update, targets


def agem(J: Tensor, m: int) -> Tensor:
    """A-GEM (arXiv 1812.00420), Eq. 11: the sum of all rows but ``m``, projected off row ``m`` in conflict."""
    g = J.sum(0) - J[m]
    return project(g, J[m]) if g @ J[m] < 0 else g


def pcd(J: Tensor, v: int, sq_norms: Tensor, *, tau: float) -> Tensor:
    """Return the update of priority-constrained descent (arXiv 2606.29521) with the primary row ``v``.

    Some constraints are active at the nearest feasible point. So project the primary for every choice of active
    constraints, and take the nearest feasible projection.

    Args:
        J: the gradients ``(k, n)``.
        v: the primary row.
        sq_norms: ``(k,)``, the average squared norms.
        tau: as for :class:`steer_optim.PCD`.

    Example:
        >>> import torch
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> pcd(J, 0, torch.tensor([1.0, 4.0]), tau=0.75)
        tensor([0.8000, 0.6000], dtype=torch.float64)
    """
    unit = J / sq_norms.sqrt()[:, None]
    others = [i for i in range(len(J)) if i != v]
    candidates = []
    for active in chain.from_iterable(combinations(others, size) for size in range(len(J))):
        A = unit[list(active)]
        d = unit[v] + torch.linalg.pinv(A) @ (tau * A.square().sum(1) - A @ unit[v])
        if all(unit[j] @ d >= tau * unit[j] @ unit[j] - 1e-9 * unit[j].norm() * d.norm() for j in others):
            candidates.append(d)
    nearest = min(candidates, key=lambda d: float((d - unit[v]).norm()), default=unit[v])
    return rescale(nearest, J[v].norm())
