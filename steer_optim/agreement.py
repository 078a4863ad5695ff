"""Check that data-parallel replicas agree: all of them raise an error that names the difference.

Replicas that are not synchronized drift apart without an error. So every step begins with one all-reduce of a fixed
size, over checksums of all that must be equal. The host reads the result in steps that take a Gramian, and then also
reports a difference of the steps before. The first step, and one after a change, compare the parameters too.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_ODD = 0x9E3779B97F4A7C15 - 2**64
_SAMPLED = 8  # tensors of an update
_PIECE = 2**20  # elements that are hashed at once


class Agreement:
    """Check that the replicas agree, and remember the outcome.

    Attributes:
        averages: whether a reducer, that of ``DistributedDataParallel``, averages the gradients of a plain backward
            pass. None while that is unknown.
    """

    def __init__(self) -> None:
        self.averages: bool | None = None
        self._seen: tuple[int, ...] = ()
        self._compared = False  # whether the values of the parameters in _seen were compared
        self._trouble: Tensor | int = 0
        self._update: Tensor | int = 0
        self._weights: Tensor | int = 0

    def check(
        self,
        group: dist.ProcessGroup,
        facts: Mapping[str, str],
        memory: Iterable[Tensor],
        parameters: Sequence[Tensor],
        *,
        read: bool,
        all_read: bool,
        values: bool,
    ) -> None:
        """Compare this replica with the others; collective.

        Args:
            group: the replicas.
            facts: what must be equal, and its value here.
            memory: tensors that must be equal.
            parameters: of this replica.
            read: whether the host waits for the result. Otherwise the next call that reads reports it.
            all_read: whether the hosts of all replicas do.
            values: whether the values of the parameters must be equal, checked at first and after a change of them.

        Raises:
            ValueError: on every replica, if they differ.
        """
        if self._seen != (seen := tuple(map(id, parameters))):
            self._seen, self._compared, self.averages = seen, False, None
        device = parameters[0].device
        none = torch.zeros((), dtype=torch.int64, device=device)
        sums = [int(not self._compared), *(zlib.crc32(fact.encode()) for fact in facts.values())]
        digest = _bits(torch.stack([none, *(_bits(t.to(device)) for t in memory)]))
        # Filled one by one: torch.tensor(list, device=...) copies from the host, which synchronizes.
        numbers = [none.new_full((), number) for number in sums]
        weights = self._weights if read else 0
        noted = [x.to(device) if isinstance(x, Tensor) else x for x in (weights, self._update, self._trouble)]
        mine = torch.stack([*numbers, digest, *(none + x for x in noted)])
        extremes = _extremes(mine, group)
        trouble = (extremes[0, 1:] != extremes[1, 1:]).any() | mine[-1]
        if not read:
            self._trouble = trouble
            return
        self._trouble = self._update = 0
        highest, lowest = extremes.tolist()
        for (what, fact), high, low in zip(facts.items(), highest[1:], lowest[1:], strict=False):
            if high != low:
                raise ValueError(
                    f"the replicas differ in {what}; this one has {fact}. Make them equal on all; pass None for a "
                    "component that a replica lacks"
                )
        if not all_read and not lowest[0]:  # only some read, after a load: the next Gramian compares, on all
            self._trouble, self._update = trouble, mine[-2]
            return
        if highest[-4] != lowest[-4]:
            raise ValueError(
                "the replicas differ in the memory of the rule, perhaps because only some loaded a checkpoint: load "
                "the optimizer's state on all"
            )
        if highest[-3] != lowest[-3] and lowest[-3]:  # 0 where a checkpoint was loaded since
            raise ValueError(
                "the replicas differ in the weights that the rule gave to the same Gramian in the last step: a "
                "weighting must be one function on all, with random numbers of torch's CPU generator only"
            )
        if highest[-2] != lowest[-2] or highest[-1]:
            raise ValueError(
                "the replicas differ in the update of a step between two refreshes: something that averaged the "
                "gradients of a plain backward pass no longer does, or only some loaded a checkpoint. Let "
                "DistributedDataParallel synchronize in the last backward pass of every step, or set refresh_every=1; "
                "load the optimizer's state on all"
            )
        if highest[0]:  # on any of them
            differing = _differing([_bits(p) for p in parameters], group) if values else []
            if differing:
                shape = tuple(parameters[differing[0]].shape)
                raise ValueError(
                    f"the replicas differ in the order or the values of {len(differing)} parameters, first in number "
                    f"{differing[0]} (here of shape {shape}): list them in one order on all (not as a set), and "
                    "start from the same values"
                )
            self._compared = True

    def forget(self) -> None:
        """Compare the parameters again, after a load; forget the weights of before."""
        self._compared, self._weights, self._trouble = False, 0, 0

    def knows(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether these parameters were compared."""
        return self._compared and self._seen == tuple(map(id, parameters))

    def try_averages(
        self, group: dist.ProcessGroup, gradients: Mapping[Tensor, Tensor], parameters: Sequence[Tensor]
    ) -> None:
        """Find out whether a plain backward pass gave all replicas the same gradients; synchronizes.

        Gradients that are zero everywhere do not tell: then :attr:`averages` stays None.
        """
        none = torch.zeros((), dtype=torch.int64, device=parameters[0].device)
        sums = [_bits(gradients[p]) if p in gradients else none for p in parameters]
        equal = not _differing(sums, group)
        self.averages = None if equal and not any(g.any() for g in gradients.values()) else equal

    def note_weights(self, weights: Tensor) -> None:
        """Remember the weights of a Gramian for the next check."""
        self._weights = _bits(weights) + 1

    def note(self, update: Sequence[Tensor]) -> None:
        """Remember a sample of an update for the next check."""
        sample = update[:: max(1, len(update) // _SAMPLED)]
        sums = [_bits(g.flatten()[:1024]).to(update[0].device) for g in sample]
        self._update = torch.stack(sums).sum() if sums else 0


def _extremes(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the largest and the smallest of every number over the replicas, ``(2, n)``."""
    both = torch.stack([mine, -mine])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    return torch.stack([both[0], -both[1]])


def _differing(sums: Sequence[Tensor], group: dist.ProcessGroup) -> list[int]:
    highest, lowest = _extremes(torch.stack([x.to(sums[0].device) for x in sums]), group).tolist()
    return [i for i, (high, low) in enumerate(zip(highest, lowest, strict=True)) if high != low]


def _bits(t: Tensor) -> Tensor:
    """Return a 31-bit hash of a tensor's bit patterns and their order: exact, so the same on every device."""
    t = t.detach()
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    if t.dtype is not torch.bool:
        t = t.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for piece in t.reshape(-1).split(_PIECE):
        mixed = piece.long() * _ODD
        mixed ^= mixed >> 32  # the lower bits of a round float are zero
        total = total * _ODD + (mixed * torch.arange(1, len(piece) + 1, device=t.device)).sum()
    # Upper bits of a product that wraps: multiplicative hashing. 31 of them, so that sums of hashes do not overflow.
    return (total * _ODD >> 32) & (2**31 - 1)
