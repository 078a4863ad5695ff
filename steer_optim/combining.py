"""The update ``sum_i w_i g_i``: combined in place on the gradient sets, and added to ``.grad``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from steer_optim.capture import Gradients, is_dtensor, put_back
from steer_optim.holding import Row

_LARGE = 1e30  # larger weights, of gradients that are nearly zero, may overflow float32
_SMALL, _CHUNK, _CHUNK_ACCELERATOR = 2**16, 2**15, 2**22  # chunks of a CPU stay in its cache


def combine(rows: Iterable[Row], weights: Tensor) -> list[Tensor]:
    """Return ``sum_i weights[scope, i] * g_i`` for every row, in place of its first gradient; empty the rows.

    Half precision is combined in float32 and rounded once. A component smaller than that rounding, 2^-9 of the update
    in bfloat16 and 2^-12 in float16, may be lost.

    Args:
        rows: the gradients in each of the ``k`` sets, and their scope.
        weights: ``(S, k)``. Read on the host if they are on the CPU, else used on their device.
    """
    on_cpu = weights.device.type == "cpu"
    # On other devices large weights are clamped, because the host does not read them.
    table: list[Any] = weights.tolist() if on_cpu else [w.unbind() for w in weights.clamp(-_LARGE, _LARGE).unbind()]
    totals: list[Tensor] = []
    together: dict[Any, list[list[tuple[Tensor, Any]]]] = {}
    for scope, row in rows:
        terms = [(g, w) for g, w in zip(row, table[scope], strict=True) if g is not None]
        row.clear()
        total = terms[0][0]
        large = on_cpu and any(abs(w) > _LARGE for _, w in terms)
        if large or any(g.is_sparse for g, _ in terms):
            wide = torch.promote_types(total.dtype, torch.float64 if large else torch.float32)
            summed = _sum([(g.to(wide), w) for g, w in terms]).to(total.dtype)
            total = summed if total.is_sparse else total.copy_(summed)
        elif total.dtype.itemsize == 2 or (on_cpu and total.device.type == "cpu" and total.numel() >= _SMALL):
            _combine_in_pieces(terms)
        else:
            together.setdefault((total.dtype, total.device, len(terms)), []).append(terms)
        totals.append(total)
    for members in together.values():
        _combine_together(members)
    return totals


def _sum(terms: Sequence[tuple[Tensor, Any]]) -> Tensor:
    """Return the weighted sum of gradients, sparse or dense."""
    return reduce(add, (g * w if isinstance(w, float) else g * w.to(g.device, g.dtype) for g, w in terms))


def add(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a + b``: torch adds a sparse tensor to a dense one, not the other way around."""
    return b + a if a.is_sparse else a + b


def _combine_in_pieces(terms: Sequence[tuple[Tensor, Any]]) -> None:
    """Combine one row in place, in pieces that stay in a CPU's cache; half precision in float32."""
    gradients, weights = zip(*terms, strict=True)
    pieces: Iterable[Sequence[Tensor]] = [gradients]
    if all(g.is_contiguous() for g in gradients) and (gradients[0].dtype.itemsize == 2 or weights[0] != 1):
        size = _CHUNK if gradients[0].device.type == "cpu" else _CHUNK_ACCELERATOR
        pieces = zip(*(g.view(-1).split(size) for g in gradients), strict=True)
    for piece, *others in pieces:
        total = piece.float() if piece.dtype.itemsize == 2 else piece
        _scale([total], [weights[0]])
        for g, w in zip(others, weights[1:], strict=True):
            if isinstance(w, float):
                total.add_(g, alpha=w)
            else:
                total.addcmul_(g.to(total.dtype), w.to(total.device, total.dtype))
        if total is not piece:
            piece.copy_(total)


def _combine_together(members: Sequence[Sequence[tuple[Tensor, Any]]]) -> None:
    """Combine many rows of one dtype, device and number of gradients in place, with foreach kernels."""
    totals: list[Tensor] = []
    for column in zip(*members, strict=True):
        gradients = [g for g, _ in column]
        _scale(gradients, [w for _, w in column])
        if totals:
            torch._foreach_add_(totals, gradients)
        else:
            totals = gradients


def _scale(gradients: list[Tensor], weights: list[Any]) -> None:
    if isinstance(weights[0], float):
        pairs = [(g, w) for g, w in zip(gradients, weights, strict=True) if w != 1]
        if pairs:
            torch._foreach_mul_([g for g, _ in pairs], [w for _, w in pairs])
    elif all(w is weights[0] for w in weights):
        torch._foreach_mul_(gradients, weights[0].to(gradients[0].device, gradients[0].dtype))
    else:
        torch._foreach_mul_(gradients, [w.to(gradients[0].device, gradients[0].dtype) for w in weights])


def write(update: Gradients, *, in_place: bool) -> None:
    """Add the update to ``.grad``, as autograd does; restore ``.grad`` if this raises.

    Args:
        update: by parameter.
        in_place: whether a dense ``.grad`` keeps its memory. Not if elements share it, as in autograd's own after
            ``a.view(2, 2) + b.view(2, 2)``, or in an expanded one.
    """
    existing = {p: p.grad for p in update if p.grad is not None}
    before = [(p, existing.get(p)) for p in update]
    kinds: dict[Any, list[Tensor]] = {}
    for p, gradient in existing.items():
        if update[p].is_sparse or gradient.is_sparse:
            update[p] = add(gradient, update[p])
        else:
            kinds.setdefault((gradient.dtype, gradient.device, is_dtensor(gradient)), []).append(p)
    for members in kinds.values():
        torch._foreach_add_([update[p] for p in members], [existing[p] for p in members])
    dense = [p for members in kinds.values() for p in members]
    in_place = in_place and _apart(existing[p] for p in dense)
    kept = [existing[p].detach() for p in dense if in_place]
    saved = [gradient.clone() for gradient in kept]
    try:
        if kept:
            torch._foreach_copy_(kept, [update[p] for p in dense])
            update |= {p: existing[p] for p in dense}
        put_back(update.items())
    except BaseException:
        if kept:
            torch._foreach_copy_(kept, saved)
        put_back(before)
        raise


def _apart(gradients: Iterable[Tensor]) -> bool:
    """Return whether each element of some dense gradients has memory of its own, which can be written to."""
    full = [g for g in gradients if g.numel()]
    spans = [g.element_size() * (1 + sum((n - 1) * s for n, s in zip(g.shape, g.stride(), strict=True))) for g in full]
    if any(g.nbytes > span or g.is_conj() or g.is_neg() for g, span in zip(full, spans, strict=True)):
        return False
    ranges = sorted((str(g.device), g.data_ptr(), g.data_ptr() + n) for g, n in zip(full, spans, strict=True))
    return all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(ranges))
