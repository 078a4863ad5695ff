"""One gradient set instead of k, where what multiplies a component is known before its gradient is taken.

With the weights of an earlier step, one backward pass through what the components share is enough. With ratios of the
weights that do not depend on the Gramian, each component is multiplied by its own and accumulated onto the others, and
their common factor comes last: hooks see every gradient beside what has been accumulated, and take the inner products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from steer_optim.capture import (
    Gradients,
    Losses,
    backpropagate,
    capture,
    check_parameters,
    combine,
    evaluate,
    refuse_unreached,
    root_gradient,
)
from steer_optim.gramian import Products
from steer_optim.rules.base import Rule


def capture_weighted(
    losses: Losses,
    weights: Mapping[str, Tensor],
    parameters: Sequence[Tensor],
    total: Gradients,
    *,
    scale: Tensor | None,
    retain_graph: bool,
    isolate: bool,
) -> dict[str, Tensor]:
    """Backpropagates the weighted sum of the components into one gradient set, without waiting for the device.

    Tensors share one backward pass, callables have one each.

    Args:
        losses: the components.
        weights: a scalar for each of them; not read by the host.
        parameters: as of :func:`~steer_optim.capture.capture`, as is what is not named here.
        total: the gradient set, added to in place.
        scale: likewise.
        retain_graph: likewise.
        isolate: likewise.

    Returns:
        The detached value of each component.

    Raises:
        As :func:`~steer_optim.capture.capture`.
    """
    check_parameters(parameters)
    values: dict[str, Tensor] = {}

    def add(names: Sequence[str], terms: Sequence[Tensor], keep: bool) -> None:
        roots = [
            root_gradient(loss, weights[name] if scale is None else weights[name] * scale.to(weights[name]))
            for name, loss in zip(names, terms, strict=True)
        ]
        backpropagate(terms, roots, parameters, total, retain_graph=keep, isolate=isolate)
        values.update((name, loss.detach()) for name, loss in zip(names, terms, strict=True))

    tensors = {name: loss for name, loss in losses.items() if isinstance(loss, Tensor)}
    if tensors:
        add(list(tensors), list(tensors.values()), retain_graph)
    callables = {name: loss for name, loss in losses.items() if name not in tensors}
    for name, loss, keep in evaluate(callables, retain_graph=retain_graph):
        add([name], [loss], keep)
        del loss  # and its graph, before the next one is built
    if not total and not isolate:
        raise refuse_unreached(" + ".join(losses))
    return values


def capture_ratios(
    losses: Losses,
    ratios: Mapping[str, float],
    scopes: Sequence[Sequence[Tensor]],
    sets: dict[str, Gradients],
    *,
    scale: Tensor | None,
    retain_graph: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Accumulates ``sum_i ratios[i] * g_i`` in one gradient set, and takes the Gramian of the first two on the way.

    Args:
        losses: the components.
        ratios: of the components, in the order in which they are backpropagated; the first is 1.
        scopes: the parameters of each scope, whole tensors of this process.
        sets: empty; gets the one set under the name of the first component.
        scale: as of :func:`~steer_optim.capture.capture`.
        retain_graph: likewise.

    Returns:
        The detached value of each component; and the Gramian ``(S, k, k)`` in the order of ``ratios``, NaN but for
        its diagonal and the first two. Instead of the Gramian None, with a set for each component in ``sets``, where
        autograd does not give a gradient in one piece: a module that is checkpointed reentrantly and used twice.

    Raises:
        As :func:`~steer_optim.capture.capture`.
        RuntimeError: the gradient of another component comes in pieces, and that of the first did not.
    """
    parameters = [p for scope in scopes for p in scope if p.requires_grad]
    check_parameters(parameters)
    values: dict[str, Tensor] = {}
    passes: list[_Pass] = []
    first, second, *_ = ratios
    total = sets[first] = {}
    for name, loss, keep in evaluate({name: losses[name] for name in ratios}, retain_graph=retain_graph):
        # A ratio would be rounded in the half precision of a loss: the gradients are multiplied by it instead.
        exact = torch.finfo(loss.dtype).bits >= 32
        this = _Pass(scopes, 1.0 if exact else ratios[name], columns=0 if name == first else 2 if name == second else 1)
        root = loss.new_full(loss.shape, ratios[name] if exact else 1.0)
        if scale is not None:
            root *= scale.to(root)
        with this.watching():
            backpropagate([loss], [root], parameters, total, retain_graph=keep, isolate=False)
        values[name] = loss.detach()
        del loss  # and its graph, before the next one is built
        if not this.reached:
            raise refuse_unreached(name)
        if this.in_pieces and name == first:
            rest = {other: losses[other] for other in ratios if other != first}
            values |= capture(rest, parameters, sets, scale=scale, retain_graph=retain_graph)
            return values, None
        if this.in_pieces:
            raise RuntimeError(_PIECES.format(name=name, first=first))
        if name == second:
            this.add_unreached(total)
        passes.append(this)
    return values, _gramian([this.products for this in passes[1:]], [*ratios.values()], parameters[0].device)


class _Pass:
    """What hooks see of the gradients of one component, each before it is accumulated.

    Args:
        scopes: the parameters of each scope.
        ratio: what every gradient is still to be multiplied by.
        columns: how many gradients inner products are taken of: none, this one, or what is accumulated and this one.
    """

    def __init__(self, scopes: Sequence[Sequence[Tensor]], ratio: float, *, columns: int) -> None:
        self.products = [Products(columns) for _ in scopes]
        self._ratio, self._columns = ratio, columns
        self._parameters = [(p, own) for scope, own in zip(scopes, self.products, strict=True) for p in scope]
        self._times = [0] * len(self._parameters)

    def see(self, i: int, gradient: Tensor) -> Tensor:
        self._times[i] += 1
        if self._ratio != 1:
            gradient = gradient * self._ratio
        if self._columns:
            p, products = self._parameters[i]
            products.add_gradients([p.grad, gradient] if self._columns == 2 else [gradient])
        return gradient

    def add_unreached(self, total: Gradients) -> None:
        """The inner products of what was accumulated where this component reaches nothing."""
        for (p, products), times in zip(self._parameters, self._times, strict=True):
            if p in total and not times:
                products.add_gradients([total[p], None])

    @property
    def reached(self) -> bool:
        return any(self._times)

    @property
    def in_pieces(self) -> bool:
        return max(self._times) > 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        members = enumerate(self._parameters)
        handles = [p.register_hook(partial(self.see, i)) for i, (p, _) in members if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _gramian(grams: Sequence[Sequence[Products]], ratios: Sequence[float], device: torch.device) -> Tensor:
    """``(S, k, k)`` of the components, from inner products of their gradients times their ratios."""
    pair, *others = [torch.stack([scope.total(device) for scope in products]) for products in grams]
    k = len(ratios)
    G = pair.new_full((len(pair), k, k), torch.nan)
    G[:, :2, :2] = pair
    G[:, :2, 1] /= ratios[1]
    G[:, 1, :2] /= ratios[1]
    for i, square in enumerate(others, start=2):
        G[:, i, i] = square[:, 0, 0] / ratios[i] ** 2
    return G


def rescale(
    total: Gradients,
    rule: Rule,
    ratios: Mapping[str, float],
    G: Tensor,
    scopes: Sequence[Sequence[Tensor]],
    names: Sequence[str],
) -> tuple[Tensor, Tensor]:
    """Multiplies the set of :func:`capture_ratios`, in place, by the factor that the rule finds.

    Args:
        total: the set.
        rule: whose ratios they are; has no state.
        ratios: as there.
        G: ``(S, k, k)``, in the order of ``ratios``.
        scopes: as there.
        names: the ``k`` components in the order of the results.

    Returns:
        ``G`` and weights ``(S, k)``.
    """
    order = list(ratios)
    factor = rule(G[:, :2, :2], order[:2])[0][:, 0]
    for scope, parameters in enumerate(scopes):
        total.update(combine([total], parameters, factor[scope, None]))
    rows = [order.index(name) for name in names]
    # Not by a list of indices, which would have to be copied to the device.
    G = torch.stack([torch.stack([G[:, i, j] for j in rows], dim=1) for i in rows], dim=1)
    return G, torch.stack([factor * ratios[name] for name in names], dim=1)


_PIECES = (
    "the gradient of component {name!r} came in pieces and that of {first!r} did not: a module is checkpointed "
    "reentrantly and used twice by the one. Checkpoint it with use_reentrant=False"
)
