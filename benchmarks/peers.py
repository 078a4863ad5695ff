"""The same gradient surgery as others do it: TorchJD by each of its routes, and the widely used Pytorch-PCGrad.

Every function here returns one that takes losses and leaves the update in ``.grad``, which is empty when it is called.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Backward = Callable[[Sequence[Tensor]], None]


def torchjd_autojac(parameters: Sequence[Tensor], *, sequential: bool = False, optimised: bool = False) -> Backward:
    """Jacobians first, then their aggregation; by default all rows in one vectorised backward pass."""
    from torchjd import aggregation, autojac

    aggregator = aggregation.PCGrad()

    def backward(losses: Sequence[Tensor]) -> None:
        autojac.backward(losses, parallel_chunk_size=1 if sequential else None)
        autojac.jac_to_grad(parameters, aggregator, optimize_gramian_computation=optimised)

    return backward


def torchjd_autogram(model: nn.Module) -> Backward:
    """The Gramian alone from one vectorised pass, then a backward pass of the weighted losses.

    The engine hooks itself into every later forward pass of the model: give it a model of its own.
    """
    from torchjd import aggregation, autogram

    engine = autogram.Engine(model, batch_dim=None)  # the losses are means over the batch, which has no dimension left
    weighting = aggregation.PCGradWeighting()

    def backward(losses: Sequence[Tensor]) -> None:
        stacked = torch.stack(list(losses))
        stacked.backward(weighting(engine.compute_gramian(stacked)))

    return backward


def flattened_pcgrad(parameters: Sequence[Tensor], *, reduction: str = "mean") -> Backward:
    """PCGrad on vectors, as github.com/WeiChengTseng/Pytorch-PCGrad works, written anew from its description.

    One backward pass per loss; every gradient is copied and laid end to end, with a mask of the parameters that the
    loss reaches; each copy is projected off every original in random order, one host read each; the mean is taken where
    all losses reach and the sum elsewhere; the result is cut up and copied into ``.grad``.
    """

    def vectors(loss: Tensor) -> tuple[Tensor, Tensor]:
        for p in parameters:
            p.grad = None
        loss.backward(retain_graph=True)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        reached = [torch.zeros_like(p) if p.grad is None else torch.ones_like(p) for p in parameters]
        return torch.cat([g.flatten() for g in gradients]), torch.cat([r.flatten() for r in reached])

    def backward(losses: Sequence[Tensor]) -> None:
        originals, masks = (list(column) for column in zip(*map(vectors, losses), strict=True))
        everywhere = torch.stack(masks).prod(dim=0).bool()
        projected, orders = copy.deepcopy(originals), list(originals)
        for own in projected:
            random.shuffle(orders)
            for other in orders:
                product = torch.dot(own, other)
                if product < 0:
                    own -= product * other / other.norm() ** 2
        update = torch.zeros_like(originals[0])
        shared = torch.stack([g[everywhere] for g in projected])
        update[everywhere] = shared.mean(dim=0) if reduction == "mean" else shared.sum(dim=0)
        update[~everywhere] = torch.stack([g[~everywhere] for g in projected]).sum(dim=0)
        for p, piece in zip(parameters, update.split([p.numel() for p in parameters]), strict=True):
            p.grad = piece.view_as(p).clone()

    return backward
