"""Hold gradient sets from the backward passes to the update: here, or 1/R of their mean on each of R replicas.

Under data parallelism the Gramian must be that of the *averaged* gradients: to steer on each replica and average the
updates gives another update. So a replica keeps one piece of the mean of every component (a reduce-scatter, which runs
during the next backward pass). The inner products of the pieces are all-reduced, every replica combines its pieces with
the same weights, and only the update is all-gathered. The traffic is ``(k + 1) / 2`` times that of one all-reduce,
instead of ``k`` times, and the replicas stay equal bit for bit. Sharded parameters (FSDP2, tensor parallel) are already
in pieces.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from steer_optim.capture import Gradients, is_dtensor, unreached_error

# Renamed in torch 2.13, where the old names warn; a torch built without distributed has neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

# Elements per message: a 128th of a set, so that packing copies little at once, within these bounds.
_MESSAGES, _SHORTEST, _LONGEST = 128, 2**15, 2**24

_COPYING = ("gloo",)  # backends whose reduce-scatter is an all-reduce of a copy

Row: TypeAlias = tuple[int, list["Tensor | None"]]
"""A scope, and the part held here of one parameter's gradient in each of the ``k`` sets."""

Groups: TypeAlias = "tuple[dist.ProcessGroup, ...]"
"""The process groups that hold the other shards of a parameter, one per mesh dimension that shards it."""


class LocalSets:
    """Hold sets that need no averaging here: one process, sharded parameters, or DDP's reducer averages.

    Args:
        names: the ``k`` components.
        parameters: those of each scope.
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Sequence[Tensor]]) -> None:
        self.names, self.k, self.scopes = names, len(names), len(parameters)
        self.sets: dict[str, Gradients] = {name: {} for name in names}
        self._members = [(scope, p) for scope, own in enumerate(parameters) for p in dict.fromkeys(own)]
        self.device = self._members[0][1].device
        self._rows: dict[Groups, dict[Tensor, Row]] = {}

    def take(self, name: str, gradients: Gradients | None) -> None:
        """Keep the set of one component; None if it is absent."""
        self.sets[name] = gradients or {}

    def rows(self) -> dict[Groups, list[Row]]:
        """Return the rows of every parameter that a component reaches, by the groups that hold the rest."""
        if not self._rows:
            for scope, p in self._members:
                found = [self.sets[name].pop(p, None) for name in self.names]
                if any(g is not None for g in found):
                    row = [None if g is None else _local(p, g) for g in found]
                    self._rows.setdefault(_shard_groups(p), {})[p] = scope, row
        return {groups: [*own.values()] for groups, own in self._rows.items()}

    def gather(self, update: Sequence[Tensor]) -> Gradients:
        """Return the update by parameter, from the combined rows."""
        parameters = [p for own in self._rows.values() for p in own]
        return {p: _like(p, total) for p, total in zip(parameters, update, strict=True)}


class AveragedSets:
    """Hold this process's piece of the mean of each gradient set over data-parallel replicas.

    Collective: every replica must take every component in the same order, whatever its losses reach.

    Args:
        names: the ``k`` components.
        parameters: those of each scope.
        group: the replicas.
        unsteered: parameters that some component reached, and no steering has: refused on all replicas.
    """

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[Sequence[Tensor]],
        group: dist.ProcessGroup,
        unsteered: Sequence[Tensor],
    ) -> None:
        self.names, self.k, self.scopes = names, len(names), len(parameters)
        self._group, self._size, self._rank = group, dist.get_world_size(group), dist.get_rank(group)
        members = [(scope, p) for scope, own in enumerate(parameters) for p in dict.fromkeys(own)]
        self._parameters = [p for _, p in members]
        self.device = self._parameters[0].device
        kinds: dict[Any, list[tuple[int, Tensor]]] = {}
        for scope, p in members:
            kinds.setdefault((_dtype(p), p.device), []).append((scope, p))
        self._buffers = [_FlatBuffer(own, self._size) for own in kinds.values()]
        self._pieces: dict[str, list[Tensor]] = {name: [] for name in names}
        self._flags: dict[str, list[int]] = {}
        self._rows: list[Row] | None = None
        self._reached: set[Tensor] = set()
        self._set_bytes = sum(p.nbytes for p in self._parameters)  # bytes of one set
        self._largest = max(p.nbytes for p in self._parameters)
        self._unpacked = 0  # bytes of gradients that are not packed yet
        # Messages in flight: (message, work handle, this replica's piece of the mean, where it arrives).
        self._in_flight: deque[tuple[Tensor, Any, Tensor, Tensor]] = deque()
        # gloo's thread may hold a message longer. Kept here, it is freed by this thread, where memory profiles see it.
        self._recent: deque[Tensor] = deque(maxlen=3)
        self._in_place = dist.get_backend(group) in _COPYING
        self._unsteered = unsteered

    def on_gradient(self, gradient: Tensor | None) -> None:
        """Wait until the gradients held and the messages in flight fit into the memory of one set."""
        self._unpacked += 0 if gradient is None else _bytes(gradient)  # None from a node that joins several outputs
        self._make_room(self._largest)  # room for the next gradient, whose size is not known yet

    def _make_room(self, more: int) -> None:
        while (
            self._in_flight
            and self._unpacked + sum(flat.nbytes for flat, *_ in self._in_flight) + more > self._set_bytes
        ):
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        flat, work, piece, own = self._in_flight.popleft()
        work.wait()
        if own is not piece:
            piece.copy_(own)
        self._recent.append(flat)

    def take(self, name: str, gradients: Gradients | None) -> None:
        """Start averaging the set of one component, and empty it; None if it is absent here."""
        here = gradients or {}
        # 0: not reached, 1: dense, 2: sparse; and last, whether the component is present.
        flags = [0 if p not in here else 2 if here[p].is_sparse else 1 for p in self._parameters]
        self._flags[name] = [*flags, int(gradients is not None)]
        self._unpacked = sum(map(_bytes, here.values()))
        for buffer in self._buffers:
            lengths = iter(buffer.messages)
            room = next(lengths, 0)
            parts: list[Tensor] = []
            for p in buffer.parameters:
                gradient = here.pop(p, None)
                zeros = p.new_zeros((), dtype=buffer.dtype).expand(p.shape)
                dense = zeros if gradient is None or gradient.is_sparse else gradient
                rest = _in_memory_order(p, dense).to(buffer.dtype)
                while room and len(rest) >= room:
                    self._send(name, [*parts, rest[:room]])
                    parts, rest, room = [], rest[room:], next(lengths, 0)
                parts.append(rest)
                room -= len(rest)
                if dense is gradient:
                    self._unpacked -= dense.nbytes
            if room:
                self._send(name, [*parts, buffer.parameters[0].new_zeros(room, dtype=buffer.dtype)])
        self._unpacked = 0

    def _send(self, name: str, parts: Sequence[Tensor]) -> None:
        self._make_room(sum(part.nbytes for part in parts))
        flat = torch.cat(list(parts)).div_(self._size)  # before the sum, which could overflow in half precision
        size = len(flat) // self._size
        piece = flat.new_empty(size)
        self._pieces[name].append(piece)
        if self._in_place:
            work, own = dist.all_reduce(flat, group=self._group, async_op=True), flat.narrow(0, self._rank * size, size)
        else:
            work, own = _reduce_scatter(piece, flat, group=self._group, async_op=True), piece
        self._in_flight.append((flat, work, piece, own))

    def rows(self) -> dict[Groups, list[Row]]:
        """Return this replica's pieces, each of one scope; the other replicas hold the rest."""
        if self._rows is None:
            while self._in_flight:
                self._finish_oldest()
            self._reached = self._reached_anywhere()
            self._rows = []
            pieces = [iter(self._pieces[name]) for name in self.names]
            for buffer in self._buffers:
                for scope, start, stop in buffer.parts(self._rank, self._size):
                    if start == 0:
                        row = [next(own) for own in pieces]
                    self._rows.append((scope, [piece[start:stop] for piece in row]))
        return {(self._group,): self._rows}

    def _reached_anywhere(self) -> set[Tensor]:
        """Return the parameters that some component reaches on some replica; synchronizes."""
        table = [[*self._flags[name], len(self._unsteered)] for name in self.names]
        anywhere = torch.tensor(table, dtype=torch.int32, device=self.device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self._group)
        reached: set[Tensor] = set()
        table = anywhere.tolist()
        for name, (*flags, present, _) in zip(self.names, table, strict=True):
            if present and not any(flags):
                raise unreached_error(name)
            if 2 in flags:
                raise TypeError(
                    f"component {name!r} has a sparse gradient (parameter of shape "
                    f"{tuple(self._parameters[flags.index(2)].shape)}), but replicas average only dense ones. Build "
                    "the embedding with sparse=False"
                )
            reached.update(p for p, flag in zip(self._parameters, flags, strict=True) if flag)
        if table[0][-1]:
            shapes = [tuple(p.shape) for p in dict.fromkeys(self._unsteered)] or "on another rank"
            raise ValueError(_UNSTEERED.format(shapes=shapes))
        return reached

    def gather(self, update: Sequence[Tensor]) -> Gradients:
        """All-gather the update, which each replica combined in place of its pieces of the first component."""
        pieces = iter(self._pieces[self.names[0]])
        self._pieces, self._rows = {}, []
        flats = [own.parameters[0].new_empty(sum(own.messages), dtype=own.dtype) for own in self._buffers]
        messages = [
            m for flat, own in zip(flats, self._buffers, strict=True) if len(flat) for m in flat.split(own.messages)
        ]
        for work in [_all_gather(message, next(pieces), group=self._group, async_op=True) for message in messages]:
            work.wait()
        result = {}
        for flat, buffer in zip(flats, self._buffers, strict=True):
            sizes = [p.numel() for p in buffer.parameters]
            for p, segment in zip(buffer.parameters, flat[: sum(sizes)].split(sizes), strict=True):
                if p in self._reached:
                    # Fused kernels pair parameter and gradient in memory order.
                    result[p] = segment.as_strided(p.shape, _strides(p))
        return result


_UNSTEERED = (
    "the components reach parameters that the optimizer does not have (shapes {shapes}); under data_parallel these "
    "would get no gradient. Give Steering(...) all parameters and call each optimizer's step(), or freeze these"
)


def _bytes(gradient: Tensor) -> int:
    return 0 if gradient.is_sparse else gradient.nbytes


class _FlatBuffer:
    """Parameters whose gradients have one dtype and device, laid end to end and cut into messages."""

    def __init__(self, members: Sequence[tuple[int, Tensor]], replicas: int) -> None:
        self.parameters = [p for _, p in members]
        self.dtype = _dtype(self.parameters[0])
        total = sum(p.numel() for p in self.parameters)
        length = min(max(total // _MESSAGES, _SHORTEST), _LONGEST)
        length = -(-length // replicas) * replicas
        full, rest = divmod(total, length)
        self.messages = [length] * full + [-(-rest // replicas) * replicas] * (rest > 0)
        self._scopes: list[tuple[int, int]] = []  # each scope and where it ends
        position = 0
        for scope, own in itertools.groupby(members, key=lambda member: member[0]):
            position += sum(p.numel() for _, p in own)
            self._scopes.append((scope, position))
        self._scopes[-1] = (scope, sum(self.messages))  # the padding of the last message is zero

    def parts(self, rank: int, replicas: int) -> Iterator[tuple[int, int, int]]:
        """Yield the scopes in each piece of one replica, message by message, as ranges within the piece."""
        scopes, begin = iter(self._scopes), 0
        scope, end = next(scopes)
        for length in self.messages:
            size = length // replicas
            first = position = begin + rank * size
            while position < first + size:
                while end <= position:
                    scope, end = next(scopes)
                stop = min(end, first + size)
                yield scope, position - first, stop - first
                position = stop
            begin += length


def _dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of the gradients of ``p``; torch 2.10 lets it differ from that of ``p``."""
    return getattr(p, "grad_dtype", None) or p.dtype


def _strides(p: Tensor) -> tuple[int, ...]:
    """Return the strides that autograd gives a gradient of ``p``."""
    return p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()


def _in_memory_order(p: Tensor, gradient: Tensor) -> Tensor:
    """Return the elements of a gradient in the memory order of autograd's gradients of ``p``."""
    strides = _strides(p)
    return gradient.permute(sorted(range(p.ndim), key=lambda dim: -strides[dim])).reshape(-1)


def _shard_groups(p: Any) -> Groups:
    """Return the groups that shard a DTensor, one per mesh dimension that does; none for a plain tensor."""
    if not is_dtensor(p):
        return ()
    # Not is_shard(), which is false where FSDP2 shards what tensor parallelism has sharded along the same dimension.
    return tuple(p.device_mesh.get_group(i) for i, place in enumerate(p.placements) if not place.is_replicate())


def _local(p: Any, gradient: Any) -> Tensor:
    """Return this process's part of a gradient, placed like its parameter; partial sums are summed first."""
    local: Tensor = gradient.redistribute(p.device_mesh, p.placements).to_local() if is_dtensor(p) else gradient
    return local


def _like(p: Any, local: Tensor) -> Tensor:
    """Return ``local``, this process's part of a gradient of ``p``, as a DTensor if ``p`` is one."""
    if not is_dtensor(p):
        return local
    gradient: Tensor = type(p).from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
    return gradient


GradientSets: TypeAlias = "LocalSets | AveragedSets"
