"""Inner products of gradients, of any dtype, layout and size, at the cost of reading them once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from steer_optim.holding import Row

# A float32 dot product over 2**16 elements has an error of 1e-6 (4e-6 for bfloat16 values); over 1e8, on a CPU, 0.7 %.
# Partial sums are added in float64. Chunks converted to float64 must fit into the cache.
_CHUNK, _CHUNK_WIDE, _CHUNK_ACCELERATOR = 2**16, 2**15, 2**22
# Below this size the call costs more than the arithmetic, so small tensors are concatenated first.
_SMALL, _END_TO_END = 2**12, 2**16


def inner_products(rows: Sequence[Row], scopes: int, k: int, device: torch.device, *, wide: bool) -> Tensor:
    """Return the Gramian of every scope, ``(S, k, k)``, over some rows.

    Args:
        rows: for some parameters, or pieces of them, the gradient in each of the ``k`` sets; None counts as zero.
        scopes: ``S``.
        k: the number of sets.
        device: of the result; the gradients may lie on several.
        wide: whether to multiply in float64, whatever the dtype of the gradients.

    Raises:
        TypeError: a gradient has a layout other than strided or sparse COO.
    """
    large: list[Row] = []
    small: dict[tuple[int, Any], list[Row]] = {}
    for scope, row in rows:
        like = _first(row)
        if like.numel() >= _SMALL or any(g is not None and g.layout is not torch.strided for g in row):
            large.append((scope, row))
        elif like.numel():
            small.setdefault((scope, (like.dtype, like.device)), []).append((scope, row))
    alike: dict[Any, list[Row]] = {}  # small tensors of one size, each alone in its scope
    for (_, kind), members in small.items():
        if len(members) == 1:
            alike.setdefault((kind, _first(members[0][1]).numel()), []).extend(members)
    batches = (batch for members in small.values() if len(members) > 1 for batch in _batches(members))

    pairs = list(combinations_with_replacement(range(k), 2))
    parts: dict[tuple[int, torch.device], list[list[Tensor]]] = {}  # the parts of each pair's product
    for scope, row in chain(large, ((batch[0][0], list(_end_to_end(batch, k))) for batch in batches)):
        dot = _sparse_dot if any(g is not None and g.is_sparse for g in row) else torch.dot
        own = parts.setdefault((scope, _first(row).device), [[] for _ in pairs])
        for piece in _pieces(row, wide=wide):
            for (i, j), dots in zip(pairs, own, strict=True):
                a, b = piece[i], piece[j]
                if a is not None and b is not None:
                    dots.append(dot(a, b))
    total = zeros(device, scopes, k, k)  # only its upper triangle, at first
    for (scope, _), own in parts.items():
        for (i, j), dots in zip(pairs, own, strict=True):
            if dots:
                total[scope, i, j] += torch.stack(dots).to(total.dtype).sum().to(device)
    for members in alike.values():
        J = _end_to_end(members, k).view(k, len(members), -1).to(total.dtype)
        for run, block in _runs([scope for scope, _ in members], torch.einsum("isn,jsn->sij", J, J).to(device)):
            total[run] += block
    return total.triu() + total.triu(1).mT


def zeros(device: torch.device, *shape: int) -> Tensor:
    """Return zeros in float64, or in float32 where the device has no float64."""
    return torch.zeros(shape, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)


def _first(row: Sequence[Tensor | None]) -> Tensor:
    return next(g for g in row if g is not None)


def _pieces(row: Sequence[Tensor | None], *, wide: bool) -> Iterator[Sequence[Tensor | None]]:
    """Yield a row in flat real pieces that stay in the cache; in one piece if a gradient is sparse."""
    for g in row:
        if g is not None and g.layout not in (torch.strided, torch.sparse_coo):
            raise TypeError(f"gradients must be dense or sparse COO; got layout {g.layout} (shape {tuple(g.shape)})")
    like = _first(row)
    if any(g is not None and g.is_sparse for g in row):
        yield [None if g is None else _real(g) for g in row]
        return
    wide = wide and like.device.type != "mps"
    chunk = _CHUNK_ACCELERATOR if like.device.type != "cpu" else _CHUNK_WIDE if wide else _CHUNK
    columns = [None if g is None else g.split(chunk) for g in _flatten([None if g is None else _real(g) for g in row])]
    dtype = torch.promote_types(_real(like).dtype, torch.float64 if wide else torch.float32)
    for i in range(max(len(column) for column in columns if column is not None)):
        yield [None if column is None else column[i].to(dtype) for column in columns]


def _real(g: Tensor) -> Tensor:
    return torch.view_as_real(g.resolve_conj()) if g.is_complex() else g


def _flatten(row: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Flatten dense tensors of one shape, in the same order of elements for all; without a copy if possible."""
    strides = {g.stride() for g in row if g is not None}
    if len(strides) == 1:
        # autograd gives a gradient its parameter's strides: in the order of the strides, channels_last is flat too.
        (stride,) = strides
        order = sorted(range(len(stride)), key=lambda dim: -stride[dim])
        row = [None if g is None else g.permute(order) for g in row]
    return [None if g is None else g.reshape(-1) for g in row]


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    """Yield rows of one kind in batches: enough elements for one call, and not much memory."""
    start = size = 0
    for i, (_, row) in enumerate(rows):
        size += _first(row).numel()
        if size >= _END_TO_END:
            yield rows[start : i + 1]
            start, size = i + 1, 0
    if start < len(rows):
        yield rows[start:]


def _end_to_end(rows: Sequence[Row], k: int) -> Tensor:
    """Concatenate the gradients of several parameters of one kind to ``(k, n)``; zeros for None."""
    gradients = [torch.zeros_like(_first(row)) if (g := row[i]) is None else g for i in range(k) for _, row in rows]
    flat: Tensor = torch._utils._flatten_dense_tensors([_real(g) for g in gradients])
    return flat.view(k, -1)


def _runs(ids: Sequence[int], blocks: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of successive ids with their blocks: slices, so that no index goes to the device."""
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield slice(ids[start], ids[i - 1] + 1), blocks[start:i]
            start = i


def _sparse_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``<a, b>`` of tensors of one shape, sparse or dense."""
    dtype = torch.promote_types(a.dtype, torch.float64)
    a, b = a.to(dtype), b.to(dtype)
    product = a * b if a.is_sparse else b * a  # torch multiplies a sparse tensor by a dense one
    return (product.coalesce().values() if product.is_sparse else product).sum()
