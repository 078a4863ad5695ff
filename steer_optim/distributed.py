"""Gradient sets of a model that lives in several processes: means over replicas, inner products of shards.

The Gramian must be that of the *averaged* gradients: averaging what every replica steered by itself is another update.
So a replica keeps one piece of the mean of every component (a reduce-scatter); the inner products of the pieces are
summed over the replicas, all combine their pieces with the same weights, and the update alone is gathered. That is
``(k + 1) / 2`` times the traffic of one all-reduce, where the obvious way takes k of them, and it leaves the replicas
equal bit for bit. Sharded parameters (FSDP2, tensor parallel) are in pieces already.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from steer_optim.capture import Gradients, is_dtensor, refuse_unreached

# Renamed in torch 2.13, where the old names warn; a torch built without distributed has neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)

_CHUNK = 2**24  # elements of one component that travel at a time: 64 MiB of float32


def share(
    names: Sequence[str],
    sets: Sequence[Gradients],
    scopes: Sequence[Sequence[Tensor]],
    replicas: dist.ProcessGroup | None,
) -> Whole | Replicas:
    """What this process holds of the gradient sets, averaged over the replicas if there are any; empties ``sets``."""
    return Whole(sets, scopes) if replicas is None else Replicas(names, sets, scopes, replicas)


@dataclass(frozen=True)
class Part:
    """Some parameters of one scope, or pieces of them, and the groups of processes that hold the rest."""

    scope: int
    parameters: list[Tensor]
    groups: tuple[dist.ProcessGroup, ...] = ()


class Whole:
    """Gradient sets that this process can use as they are: one process, or sharded parameters.

    Args:
        sets: the gradient sets; emptied as they are taken over.
        scopes: the parameters of each scope.
    """

    def __init__(self, sets: Sequence[Gradients], scopes: Sequence[Sequence[Tensor]]) -> None:
        self.sets: list[Gradients] = [{} for _ in sets]
        self.parts: list[Part] = []
        for scope, parameters in enumerate(scopes):
            by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
            for p in parameters:
                by_groups.setdefault(_shard_groups(p), []).append(p)
                for own, whole in zip(self.sets, sets, strict=True):
                    if p in whole:
                        own[p] = _local(p, whole.pop(p))
            self.parts.extend(Part(scope, members, groups) for groups, members in by_groups.items())

    def total(self, grams: Sequence[Tensor]) -> Tensor:
        """``(S, k, k)``: the Gramian of every scope, from those ``(k, k)`` of the parts here and elsewhere."""
        by_groups: dict[tuple[dist.ProcessGroup, ...], Tensor] = {}
        scopes = 1 + max(part.scope for part in self.parts)
        for part, G in zip(self.parts, grams, strict=True):
            sums = by_groups.setdefault(part.groups, grams[0].new_zeros(scopes, *G.shape))
            sums[part.scope] += G.to(sums.device)
        for groups, partial in by_groups.items():
            # Over the dimensions that shard, not over those that replicate, which would count everything twice.
            for group in groups:
                dist.all_reduce(partial, group=group)
        return torch.stack(list(by_groups.values())).sum(0)

    def gather(self, update: Gradients) -> Gradients:
        """The update in the form of the parameters."""
        return {p: _like(p, gradient) for p, gradient in update.items()}


class Replicas:
    """The mean of gradient sets over data-parallel replicas, of which this process keeps one piece.

    Collective: every replica makes one in every step, whatever its own components reach. The host reads twice:
    whether the replicas are alike, and which parameters are reached anywhere.

    Args:
        names: the components.
        sets: the gradient sets of this replica; emptied.
        scopes: the parameters of each scope.
        group: the replicas.
    """

    def __init__(
        self,
        names: Sequence[str],
        sets: Sequence[Gradients],
        scopes: Sequence[Sequence[Tensor]],
        group: dist.ProcessGroup,
    ) -> None:
        self.sets: list[Gradients] = [{} for _ in sets]
        self.parts: list[Part] = []
        self._group = group
        self._scopes = len(scopes)
        self._chunks: list[tuple[list[Tensor], Tensor]] = []  # parameters, and this replica's piece of them
        members = [(scope, p) for scope, parameters in enumerate(scopes) for p in parameters]
        self._check_alike(names, members)
        reached = self._reached_anywhere(names, sets, [p for _, p in members])
        works = [
            work for chunk in _chunks([m for m in members if m[1] in reached]) for work in self._scatter(chunk, sets)
        ]
        for work in works:
            work.wait()

    def _check_alike(self, names: Sequence[str], members: Sequence[tuple[int, Tensor]]) -> None:
        """Refuses what would make the collectives below wait forever, or add up what does not belong together."""
        here = zlib.crc32(repr((names, len(members))).encode())
        extremes = torch.tensor([here, -here], device=members[0][1].device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._group)
        highest, minus_lowest = extremes.tolist()
        if highest != -minus_lowest:
            raise ValueError(
                "the replicas differ in their components, in the order of these, in the number of parameters or in "
                f"refresh_every; this one has {', '.join(map(repr, names))} and {len(members)} parameters. Pass the "
                "same on all: where a replica has no data for a component, a zero that depends on its parameters, "
                "such as 0 * output.sum()"
            )

    def _reached_anywhere(
        self, names: Sequence[str], sets: Sequence[Gradients], parameters: Sequence[Tensor]
    ) -> set[Tensor]:
        here = [[0 if p not in own else 2 if own[p].is_sparse else 1 for p in parameters] for own in sets]
        anywhere = torch.tensor(here, dtype=torch.uint8, device=parameters[0].device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self._group)
        rows = anywhere.tolist()
        for name, row in zip(names, rows, strict=True):
            if not any(row):
                raise refuse_unreached(name)
            if 2 in row:
                raise TypeError(
                    f"component {name!r} has a sparse gradient (parameter of shape "
                    f"{tuple(parameters[row.index(2)].shape)}), and replicas average dense ones. Build the embedding "
                    "with sparse=False"
                )
        return {p for p, column in zip(parameters, zip(*rows, strict=True), strict=True) if any(column)}

    def _scatter(self, chunk: Sequence[tuple[int, Tensor]], sets: Sequence[Gradients]) -> Iterator[dist.Work]:
        """Starts to average one chunk of every component, and takes this replica's piece of it over."""
        replicas, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        parameters = [p for _, p in chunk]
        length = -(-sum(p.numel() for p in parameters) // replicas)
        pieces = []
        for own in sets:
            flat = parameters[0].new_zeros(length * replicas)
            for p, segment in zip(parameters, _segments(flat, parameters), strict=True):
                if p in own:
                    segment.copy_(own.pop(p)).div_(replicas)  # before the sum, which half precision could overflow
            pieces.append(flat.new_empty(length))
            yield _reduce_scatter(pieces[-1], flat, group=self._group, async_op=True)
        self._chunks.append((parameters, pieces[0]))  # the update is combined in place on the first component
        for scope, start, stop in _ranges(chunk, rank * length, (rank + 1) * length):
            segments = [piece[start:stop] for piece in pieces]
            for own, segment in zip(self.sets, segments, strict=True):
                own[segments[0]] = segment
            self.parts.append(Part(scope, [segments[0]]))

    def total(self, grams: Sequence[Tensor]) -> Tensor:
        """``(S, k, k)``: the Gramian of every scope, from those ``(k, k)`` of the pieces here and elsewhere."""
        k = len(self.sets)
        device = self._chunks[0][1].device
        G = torch.zeros(self._scopes, k, k, dtype=torch.float64, device=device)
        for part, partial in zip(self.parts, grams, strict=True):
            G[part.scope] += partial.to(device)
        dist.all_reduce(G, group=self._group)
        return G

    def gather(self, update: Gradients) -> Gradients:
        """The update of the whole parameters, from the pieces of all replicas."""
        replicas = dist.get_world_size(self._group)
        flats = [piece.new_empty(len(piece) * replicas) for _, piece in self._chunks]
        works = [
            _all_gather(flat, piece, group=self._group, async_op=True)
            for flat, (_, piece) in zip(flats, self._chunks, strict=True)
        ]
        for work in works:
            work.wait()
        return {
            p: segment
            for flat, (parameters, _) in zip(flats, self._chunks, strict=True)
            for p, segment in zip(parameters, _segments(flat, parameters), strict=True)
        }


def _chunks(members: Sequence[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Parameters of one dtype and device, in order, up to a size worth a message of its own."""
    open_chunks: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
    sizes: Counter[tuple[torch.dtype, torch.device]] = Counter()
    for scope, p in members:
        kind = p.dtype, p.device
        chunk = open_chunks.setdefault(kind, [])
        if chunk and sizes[kind] + p.numel() > _CHUNK:
            yield chunk.copy()
            chunk.clear()
            sizes[kind] = 0
        chunk.append((scope, p))
        sizes[kind] += p.numel()
    yield from (chunk for chunk in open_chunks.values() if chunk)


def _segments(flat: Tensor, parameters: Sequence[Tensor]) -> Iterator[Tensor]:
    """The parts of ``flat`` that hold each parameter, in its shape and memory format."""
    start = 0
    for p in parameters:
        # In the strides that autograd gives a gradient: fused kernels pair parameter and gradient in memory order.
        strides = torch.empty_like(p, device="meta").stride()
        yield flat[start : start + p.numel()].as_strided(p.shape, strides)
        start += p.numel()


def _ranges(chunk: Sequence[tuple[int, Tensor]], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Where each scope lies within the piece from ``start`` to ``stop``, counted from ``start``."""
    position = 0
    for scope, members in itertools.groupby(chunk, key=lambda member: member[0]):
        end = position + sum(p.numel() for _, p in members)
        first, last = max(position, start), min(end, stop)
        if first < last:
            yield scope, first - start, last - start
        position = end


def _shard_groups(p: Any) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which a DTensor is sharded, one per dimension of its mesh; none for a plain tensor."""
    if not is_dtensor(p):
        return ()
    # Not is_shard(), which is false where FSDP2 shards what tensor parallelism has sharded along the same dimension.
    return tuple(p.device_mesh.get_group(i) for i, place in enumerate(p.placements) if not place.is_replicate())


def _local(p: Any, gradient: Any) -> Tensor:
    """What this process holds of a gradient, placed as its parameter is: partial sums are summed first."""
    local: Tensor = gradient.redistribute(p.device_mesh, p.placements).to_local() if is_dtensor(p) else gradient
    return local


def _like(p: Any, local: Tensor) -> Tensor:
    """The gradient of ``p`` of which this process holds ``local``."""
    if not is_dtensor(p):
        return local
    gradient: Tensor = type(p).from_local(local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
    return gradient
