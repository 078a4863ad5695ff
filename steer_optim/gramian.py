"""Inner products of gradient sets, and what they say about the components: norms, angles, conflicts.

A gradient set is a list of tensors, one per parameter and None where a component does not reach it. The k sets of
a step have the Gramian ``G[i, j] = <g_i, g_j>``, which is all that any rule needs to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from steer_optim.capture import Gradients, Losses, check_losses, evaluate, is_dtensor, refuse_unreached, take

# A float32 dot product over 2**16 elements is good to 1e-6, or 4e-6 where they have the few bits of bfloat16; over 1e8
# a CPU loses 0.7 %. Partial sums are added up in float64. On an accelerator the reduction is a tree, and the chunk only
# bounds the upcast copy.
_CHUNK_CPU, _CHUNK_ACCELERATOR = 2**16, 2**24
# Below this size the call costs more than the arithmetic: small tensors are laid end to end first.
_SMALL = 2**12


Row = list[Tensor | None]  # one parameter's gradient in each of the k sets


@dataclass(frozen=True)
class Geometry:
    """How the component gradients of one step lie to each other, and the weights that a rule gave them.

    Everything stays on the device; reading a number from it (``float``, ``.item()``, ``print``) is what
    synchronises. With a scope other than the whole model every tensor has a leading dimension of ``S`` scopes.

    Attributes:
        names: the ``k`` components.
        G: Gramian ``(k, k)`` or ``(S, k, k)``, float64: the inner products of the gradients. NaN where one was not
            taken, as with a preservation component of ``VGS`` in one process; what depends on it is NaN, too.
        weights: ``(k,)`` or ``(S, k)``, float64; the update is ``sum_i weights[i] * g_i``.
        losses: ``(k,)``, float64, the values of the components, summed over micro-batches; None where
            they are not known.
        scopes: the names of the ``S`` scopes; empty for the whole model.
        age: how many steps ago ``G`` was taken. More than 0 where ``refresh_every`` let a step use the weights of an
            earlier one: ``G`` and ``weights`` are then those of that step, and ``losses`` are this step's.

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

    @property
    def norms(self) -> Tensor:
        """``(..., k)``: the Euclidean norm of each component's gradient."""
        return self.G.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    @property
    def cosines(self) -> Tensor:
        """``(..., k, k)``: cosines between the gradients, in [-1, 1]; 0 where a gradient is zero, NaN if not finite."""
        products = self.norms.unsqueeze(-1) * self.norms.unsqueeze(-2)
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
        """``(...)``: the norm of the plain sum ``sum_i g_i``, what an unsteered step would have."""
        return self.G.sum(dim=(-2, -1)).clamp(min=0).sqrt()

    @property
    def update_norm(self) -> Tensor:
        """``(...)``: the norm of the steered update ``sum_i weights[i] * g_i``."""
        w = self.weights
        return torch.einsum("...i,...ij,...j->...", w, self.G, w).clamp(min=0).sqrt()

    def norm(self, name: str) -> Tensor:
        """``(...)``: the norm of the gradient of component ``name``."""
        return self.norms[..., self.index(name)]

    def weight(self, name: str) -> Tensor:
        """``(...)``: the weight of component ``name`` in the update."""
        return self.weights[..., self.index(name)]

    def cosine(self, first: str, second: str) -> Tensor:
        """``(...)``: the cosine between the gradients of two components."""
        return self.cosines[..., self.index(first), self.index(second)]

    def angle(self, first: str, second: str) -> Tensor:
        """``(...)``: the angle between the gradients of two components, in degrees."""
        return self.angles[..., self.index(first), self.index(second)]

    def index(self, name: str) -> int:
        """The row of component ``name`` in ``G``.

        Raises:
            KeyError: there is no such component.
        """
        if name not in self.names:
            raise KeyError(f"no component {name!r}; this step has {', '.join(map(repr, self.names))}")
        return self.names.index(name)


def gramian(sets: Sequence[Gradients], parameters: Sequence[Tensor]) -> Tensor:
    """``G[i, j] = <g_i, g_j>`` over the given parameters, without waiting for the device.

    Complex gradients count as pairs of real numbers; sparse ones are not densified. Half precision is multiplied and
    summed in float32, float64 in float64.

    Args:
        sets: the ``k`` gradient sets. A parameter absent from one of them counts as zero there.
        parameters: those of one scope; may lie on several devices.

    Returns:
        ``(k, k)``, float64 (float32 where the device has none), on the device of the first parameter.

    Raises:
        TypeError: a gradient has a layout other than strided or sparse COO.
    """
    products = Products(len(sets))
    for row in _pieces([s.get(p) for s in sets] for p in parameters):
        products.add(row)
    return products.total(parameters[0].device)


class Products:
    """Inner products of ``k`` gradient sets, added up piece by piece."""

    def __init__(self, k: int) -> None:
        self._partial: dict[tuple[int, int], list[Tensor]] = {(i, j): [] for i in range(k) for j in range(i, k)}

    def add_gradients(self, row: Row) -> None:
        """One parameter's gradient in each of the sets."""
        # A short cut for small tensors, where the calls cost more than the arithmetic.
        if all(g is None or (g.numel() < _SMALL and g.layout is torch.strided and not g.is_complex()) for g in row):
            dtype = next(torch.promote_types(g.dtype, torch.float32) for g in row if g is not None)
            self.add([None if g is None else g.reshape(-1).to(dtype) for g in row])
        else:
            for piece in _pieces([row]):
                self.add(piece)

    def add(self, row: Row) -> None:
        """A row of :func:`_pieces`."""
        dot = _sparse_dot if _has_sparse(row) else torch.dot
        for (i, j), products in self._partial.items():
            a, b = row[i], row[j]
            if a is not None and b is not None:
                products.append(dot(a, b))

    def total(self, device: torch.device) -> Tensor:
        """``(k, k)``, float64 (float32 where the device has none)."""
        zero = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        G = {pair: _total(products, zero) for pair, products in self._partial.items()}
        k = 1 + max(i for i, _ in G)
        return torch.stack([G[min(i, j), max(i, j)] for i in range(k) for j in range(k)]).view(k, k)


def measure(losses: Losses, parameters: Iterable[Tensor], *, retain_graph: bool = True) -> Geometry:
    """The geometry of some losses, for analysis: nothing is written, no ``.grad`` is touched.

    It is that of this process alone, in several processes too.

    Args:
        losses: scalar losses by name, or callables that return one.
        parameters: whose gradients are compared; those that do not require grad are passed over.
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
    trainable = []
    for p in dict.fromkeys(parameters):  # tied ones count once
        if not isinstance(p, Tensor):
            raise TypeError(f"parameters are tensors, as of model.parameters(); got {type(p).__name__}")
        if p.requires_grad:
            trainable.append(p)
    if not trainable:
        raise ValueError("there is no parameter to measure on: none was given, or none requires grad")
    if any(is_dtensor(p) for p in trainable):
        raise TypeError(
            "sharded parameters (DTensors) are measured in training only: read optimizer.geometry, with the rule Sum() "
            "where nothing is to be steered"
        )
    sets: list[Gradients] = []
    values: list[Tensor] = []
    for name, loss, keep in evaluate(losses, retain_graph=retain_graph):
        sets.append(take([loss], trainable, retain_graph=keep))
        if not sets[-1]:
            raise refuse_unreached(name)
        values.append(loss.detach())
        del loss  # and its graph, before the next one is built
    G = gramian(sets, trainable)
    return Geometry(tuple(losses), G, G.new_ones(len(losses)), stack_losses(values, G))


def stack_losses(values: Iterable[Tensor], like: Tensor) -> Tensor:
    """``(k,)``: the values of the components, side by side, on the device and in the dtype of ``like``."""
    return torch.stack([value.reshape(()).to(like) for value in values])


def _pieces(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows, flat and real, in pieces of one length that are in the cache for all of their products.

    Small ones are laid end to end with others of their dtype and device. Rows with a sparse gradient stay whole.
    """
    small: dict[tuple[torch.dtype, torch.device], list[Row]] = {}
    for row in rows:
        first = next((g for g in row if g is not None), None)
        if first is None:
            continue
        row = _flat(row)
        if _has_sparse(row):
            yield row
        elif first.numel() >= _SMALL:
            yield from _cut(row)
        else:
            batch = small.setdefault((first.dtype, first.device), [])
            batch.append(row)
            if len(batch) == _CHUNK_CPU // _SMALL:
                yield from _cut(_end_to_end(batch))
                batch.clear()
    for batch in small.values():
        if batch:
            yield from _cut(_end_to_end(batch))


def _cut(row: Row) -> Iterator[Row]:
    """Chunks of a flat row, in float32 or wider."""
    first = next(g for g in row if g is not None)
    chunk = _CHUNK_CPU if first.device.type == "cpu" else _CHUNK_ACCELERATOR
    dtype = torch.promote_types(first.dtype, torch.float32)
    for piece in zip(*(repeat(None) if g is None else g.split(chunk) for g in row), strict=False):
        yield [None if g is None else g.to(dtype) for g in piece]


def _end_to_end(rows: Sequence[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]
    zeros = [torch.zeros_like(next(g for g in row if g is not None)) for row in rows]
    columns = zip(*rows, strict=True)
    return [torch.cat([zero if g is None else g for g, zero in zip(column, zeros, strict=True)]) for column in columns]


def _flat(row: Row) -> Row:
    """Views of one dimension, in the same order of elements for all sets; sparse gradients keep their shape."""
    for g in row:
        if g is not None and g.layout not in (torch.strided, torch.sparse_coo):
            raise TypeError(f"gradients are dense or sparse COO; got layout {g.layout} (shape {tuple(g.shape)})")
    row = [torch.view_as_real(g.resolve_conj()) if g is not None and g.is_complex() else g for g in row]
    if _has_sparse(row):
        return row
    strides = {g.stride() for g in row if g is not None}
    if len(strides) == 1:
        # autograd gives a gradient its parameter's strides: in the order of the strides, channels_last is flat too.
        (stride,) = strides
        order = sorted(range(len(stride)), key=lambda dim: -stride[dim])
        row = [None if g is None else g.permute(order) for g in row]
    return [None if g is None else g.reshape(-1).contiguous() for g in row]


def _has_sparse(row: Row) -> bool:
    return any(g is not None and g.is_sparse for g in row)


def _sparse_dot(a: Tensor, b: Tensor) -> Tensor:
    """``<a, b>`` of tensors of one shape, sparse or not."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    product = a * b if a.is_sparse else b * a  # torch multiplies a sparse tensor by a dense one
    values = product.coalesce().values() if product.is_sparse else product
    return values.sum(dtype=torch.promote_types(dtype, torch.float64))


def _total(partial: Sequence[Tensor], zero: Tensor) -> Tensor:
    """The sum of some scalars that may lie on several devices."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for value in partial:
        by_device.setdefault(value.device, []).append(value)
    sums = (torch.stack(values).to(zero.dtype).sum() for values in by_device.values())
    return sum((s.to(zero.device) for s in sums), start=zero)
