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
        a part of the first is checkpointed reentrantly: its gradients may come in several pieces.

    Raises:
        As :func:`~steer_optim.capture.capture`.
        RuntimeError: the gradient of the second component comes in pieces, and the first is not checkpointed.
    """
    parameters = [p for scope in scopes for p in scope if p.requires_grad]
    check_parameters(parameters)
    values: dict[str, Tensor] = {}
    passes: list[_Pass] = []
    first, second, *_ = _checked(ratios, losses)
    total = sets[first] = {}
    for name, loss, keep in evaluate({name: losses[name] for name in ratios}, retain_graph=retain_graph):
        # A ratio would be rounded in the half precision of a loss: the gradients are multiplied by it instead.
        exact = torch.finfo(loss.dtype).bits >= 32
        this = _Pass(scopes, 1.0 if exact else ratios[name], columns=0 if name == first else 2 if name == second else 1)
        root = loss.new_full(loss.shape, ratios[name] if exact else 1.0)
        if scale is not None:
            root *= scale.to(root)
        with this.watching(loss):
            backpropagate([loss], [root], parameters, total, retain_graph=keep, isolate=False)
        values[name] = loss.detach()
        del loss  # and its graph, before the next one is built
        if not this.reached:
            raise refuse_unreached(name)
        if this.nested and name == first:
            rest = {other: losses[other] for other in ratios if other != first}
            values |= capture(rest, parameters, sets, scale=scale, retain_graph=retain_graph)
            return values, None
        if name == second:
            if this.in_pieces:
                raise RuntimeError(_PIECES.format(second=second, first=first))
            this.add_unreached(total)
        passes.append(this)
    return values, _gramian(passes[1:], [*ratios.values()], parameters[0].device)


def _checked(ratios: Mapping[str, float], losses: Losses) -> list[str]:
    names = [*ratios]
    if set(names) != set(losses) or len(names) < 2 or ratios[names[0]] != 1 or not all(ratios.values()):
        raise ValueError(
            f"the ratios of a rule are numbers other than 0 for each of two or more components, 1 for the first; got "
            f"{dict(ratios)} for the components {', '.join(map(repr, losses))}"
        )
    return names


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
        self._parameters = [
            (p, own) for scope, own in zip(scopes, self.products, strict=True) for p in dict.fromkeys(scope)
        ]
        self._times = [0] * len(self._parameters)
        self._task = -1  # autograd's name for the backward pass
        self.nested = False  # whether gradients came from a backward pass within it

    def see(self, i: int, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # from a function that has none to give
            return None
        self._times[i] += 1
        self.nested |= torch._C._current_graph_task_id() != self._task
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

    def begin(self, _: Tensor) -> None:
        self._task = torch._C._current_graph_task_id()

    @contextmanager
    def watching(self, loss: Tensor) -> Iterator[None]:
        members = enumerate(self._parameters)
        handles = [p.register_hook(partial(self.see, i)) for i, (p, _) in members if p.requires_grad]
        handles.append(loss.register_hook(self.begin))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _gramian(passes: Sequence[_Pass], ratios: Sequence[float], device: torch.device) -> Tensor:
    """``(S, k, k)`` of the components, from inner products of their gradients times their ratios."""
    pair, *others = [torch.stack([products.total(device) for products in this.products]) for this in passes]
    k = len(ratios)
    G = pair.new_full((len(pair), k, k), torch.nan)
    G[:, :2, :2] = pair
    G[:, :2, 1] /= ratios[1]
    G[:, 1, :2] /= ratios[1]
    for i, (square, this) in enumerate(zip(others, passes[1:], strict=True), start=2):
        if not this.in_pieces:
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
    "the gradient of component {second!r} came in pieces: a module that it uses twice is checkpointed reentrantly, and "
    "{first!r} is not. Checkpoint it with use_reentrant=False"
)
