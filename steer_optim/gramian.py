"""Inner products of gradient sets, and what they say about the components: norms, angles, conflicts.

The k sets of a step have the Gramian ``G[i, j] = <g_i, g_j>``, which is all that a rule reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steer_optim.capture import Losses, capture_isolated, check_losses, evaluate, is_dtensor, unreached_error, unshared
from steer_optim.holding import GradientSets, LocalSets
from steer_optim.products import inner_products, zeros

# If the determinant of the cosines is below _VOLUME, norms of sums may cancel to the error of float32 products; a
# squared norm below _TINY may have underflowed.
_VOLUME, _TINY = 1e-2, 1e-25


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Geometry:
    """Describe the component gradients of one step: their Gramian, and the weights that a rule gave them.

    Everything stays on the device; only reading a number (``float``, ``.item()``, ``print``) synchronizes. If the scope
    is ``group`` or ``tensor``, ``G``, ``weights`` and the properties have a leading dimension of ``S`` scopes;
    :meth:`norm`, :meth:`cosine` and :meth:`angle` are always over all parameters.

    Attributes:
        names: the ``k`` components.
        G: Gramian ``(k, k)`` or ``(S, k, k)``, float64: the inner products of the gradients.
        weights: ``(k,)`` or ``(S, k)``, float64; the update is ``sum_i weights[i] * g_i``.
        losses: ``(k,)``, float64, the values of the components, summed over micro-batches; NaN for one that was
            absent. None if they are not known.
        scopes: the names of the ``S`` scopes; empty for the whole model.
        age: how many steps ago ``G`` was taken; more than 0 if ``refresh_every`` let the step reuse weights. ``G`` and
            ``weights`` are then of the earlier step (smaller weights if the update was too long), ``losses`` and
            ``update_norm`` of this one.

    Example:
        >>> import torch
        >>> from steer_optim import Geometry
        >>> G = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        >>> geometry = Geometry(("lang", "vis"), G, weights=torch.ones(2, dtype=torch.float64))
        >>> round(float(geometry.angle("lang", "vis")), 6)
        120.0
        >>> geometry.conflicts.tolist()
        [[False, True], [True, False]]
    """

    names: tuple[str, ...]
    G: Tensor
    weights: Tensor
    losses: Tensor | None = None
    scopes: tuple[str, ...] = ()
    age: int = 0
    _update_norm: Tensor | None = field(default=None, repr=False)  # if G is of an earlier step

    @property
    def norms(self) -> Tensor:
        """``(..., k)``: the Euclidean norm of each component's gradient."""
        return self.G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """``(..., k, k)``: cosines between the gradients, in [-1, 1]; 0 where a gradient is zero, NaN if not finite."""
        norms = self.norms
        products = norms.unsqueeze(-1) * norms.unsqueeze(-2)
        return torch.where(products == 0, 0.0, self.G / products).clamp(-1, 1)

    @property
    def angles(self) -> Tensor:
        """``(..., k, k)``: angles between the gradients, in degrees; 90 where a gradient is zero."""
        return self.cosines.arccos().rad2deg()

    @property
    def conflicts(self) -> Tensor:
        """``(..., k, k)``, bool: which pairs of gradients have a negative inner product."""
        return self.G < 0

    @property
    def sum_norm(self) -> Tensor:
        """``(...)``: the norm of the plain sum ``sum_i g_i``, that of an unsteered step."""
        return self.G.sum(dim=(-2, -1)).clamp(min=0).sqrt()

    @property
    def update_norm(self) -> Tensor:
        """``(...)``: the norm of the steered update ``sum_i weights[i] * g_i``."""
        if self._update_norm is not None:
            return self._update_norm
        w = self.weights
        return torch.einsum("...i,...ij,...j->...", w, self.G, w).clamp(min=0).sqrt()

    @property
    def overall(self) -> Geometry:
        """The geometry over all parameters.

        Its weights are means over the scopes that have gradients: do not use its ``update_norm``.
        """
        if not self.scopes:
            return self
        reached = (self.norms != 0).any(-1, keepdim=True)  # a frozen parameter is a scope, too
        reached = reached | ~reached.any()
        weights = (self.weights * reached).sum(0) / reached.sum(0)
        # The scopes are disjoint, so inner products over all parameters are sums over scopes.
        return replace(self, G=self.G.sum(0), weights=weights, scopes=())

    def norm(self, name: str) -> Tensor:
        """Return a scalar: the gradient norm of component ``name``, over all parameters."""
        return self.overall.norms[..., self.index(name)]

    def weight(self, name: str) -> Tensor:
        """Return the weight of component ``name`` in the update, ``(...)``."""
        return self.weights[..., self.index(name)]

    def cosine(self, first: str, second: str) -> Tensor:
        """Return a scalar: the cosine between two components' gradients, over all parameters."""
        return self.overall.cosines[..., self.index(first), self.index(second)]

    def angle(self, first: str, second: str) -> Tensor:
        """Return a scalar: the angle between two components' gradients over all parameters, in degrees."""
        return self.overall.angles[..., self.index(first), self.index(second)]

    def index(self, name: str) -> int:
        """Return the row of component ``name`` in ``G``.

        Raises:
            KeyError: there is no such component.
        """
        if name not in self.names:
            raise KeyError(f"no component {name!r}; this step has {', '.join(map(repr, self.names))}")
        return self.names.index(name)


def gramian(held: GradientSets) -> Tensor:
    """Return ``G[i, j] = <g_i, g_j>`` over all processes. Under DDP this synchronizes with the device once.

    Complex gradients count as pairs of real numbers; sparse ones are not densified. Products are in float64. A CPU
    first tries float32, which takes half the time, and repeats in float64 if float32 is not accurate enough: if
    gradients nearly cancel, or squared norms overflow or underflow.

    Returns:
        ``(S, k, k)``, float64 (float32 where the device has none), for ``S`` scopes.
    """
    on_cpu = held.device.type == "cpu"
    G = _all_reduced(held, wide=not on_cpu)
    return _all_reduced(held, wide=True) if on_cpu and _needs_float64(G) else G


def _all_reduced(held: GradientSets, *, wide: bool) -> Tensor:
    total = zeros(held.device, held.scopes, held.k, held.k)
    for groups, rows in held.rows().items():
        G = inner_products(rows, held.scopes, held.k, held.device, wide=wide)
        # Over the dimensions that shard; those that replicate would count everything twice.
        for group in groups:
            dist.all_reduce(G, group=group)
        total += G
    return total


def _needs_float64(G: Tensor) -> bool:
    """Return whether one of the Gramians ``(S, k, k)``, from float32 products on the CPU, may be inaccurate."""
    squares = G.diagonal(dim1=-2, dim2=-1)
    cosines = Geometry((), G, squares).cosines
    cosines.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    accurate = (squares > _TINY) & squares.isfinite() & (torch.linalg.det(cosines) > _VOLUME).unsqueeze(-1)
    return not accurate.all().tolist()  # not bool(), which counts as a host read on a CPU, too


def measure(losses: Losses, parameters: Iterable[Tensor], *, retain_graph: bool = True) -> Geometry:
    """Measure the geometry of some losses, for analysis; no ``.grad`` is touched.

    Each of several processes measures its own losses.

    Args:
        losses: scalar losses by name, or callables that return one.
        parameters: whose gradients are compared; those that do not require grad are skipped.
        retain_graph: whether the graph of the losses is kept for a later backward pass.

    Returns:
        Their geometry over all the parameters, with the weights of the plain sum.

    Raises:
        TypeError, ValueError: there are no losses or no trainable parameters, or a loss is not a scalar or is
            detached from all of the parameters; or parameters are sharded.
        RuntimeError: a part of the model is checkpointed reentrantly, or compiled for one backward pass.

    Example:
        >>> import torch
        >>> from steer_optim import measure
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> geometry = measure({"first": x[0], "both": x.sum()}, [x])
        >>> round(float(geometry.angle("first", "both")), 4), x.grad
        (45.0, None)
    """
    check_losses(losses)
    trainable = [p for p in list_parameters(parameters) if p.requires_grad]
    if not trainable:
        raise ValueError("there is no parameter to measure on: none was given, or none requires grad")
    if any(is_dtensor(p) for p in trainable):
        raise TypeError(
            "sharded parameters (DTensors) are measured in training only: read optimizer.geometry, with the rule Sum() "
            "to steer nothing"
        )
    held = LocalSets(tuple(losses), [trainable])
    values: list[Tensor | None] = []
    for name, loss, keep in evaluate(losses, retain_graph=retain_graph):
        values.append(None if loss is None else loss.detach())
        if loss is not None:
            held.take(name, unshared(capture_isolated([loss], None, trainable, {}, retain_graph=keep)))
            if not held.sets[name]:
                raise unreached_error(name)
        del loss  # frees its graph before the next one is built
    (G,) = gramian(held)
    return Geometry(tuple(losses), G, G.new_ones(len(losses)), stack_losses(values, G))


def list_parameters(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return parameters as a list, tied ones once; raise TypeError if they are something else."""
    several = isinstance(parameters, Iterable) and not isinstance(parameters, Tensor)
    found: list[Any] = [*parameters] if several else [parameters]
    wrong = [type(p).__name__ for p in found if not (several and isinstance(p, Tensor))]
    if wrong:
        raise TypeError(f"parameters must be a list of tensors, as [x] or model.parameters(); got {wrong[0]}")
    return [*dict.fromkeys(found)]


def stack_losses(values: Iterable[Tensor | None], like: Tensor) -> Tensor:
    """Stack the component values into ``(k,)``, on the device and in the dtype of ``like``; NaN if absent."""
    return torch.stack([like.new_full((), torch.nan) if v is None else v.reshape(()).to(like) for v in values])
