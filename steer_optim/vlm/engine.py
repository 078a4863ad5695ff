"""The losses from hidden states, a chunk of tokens at a time: no ``(N, V)`` tensor is ever held.

The forward pass of the losses also computes their gradients at hidden states and heads, chunk by chunk, weighted per
token. The backward pass of a component multiplies them by the incoming gradient.
:func:`~steer_optim.vlm.divergences.token_losses` is the oracle.

Dimensions: ``N`` rows, ``C`` rows of a chunk, ``c`` rows of a block, ``V`` vocabulary entries, ``k`` ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from steer_optim.vlm.divergences import (
    Term,
    View,
    check_inputs,
    check_temperature,
    common_vocabulary,
    log_target,
    refuse_non_finite,
    refuse_overflow,
    token_losses,
    value_and_gradients,
)
from steer_optim.vlm.heads import HiddenStates
from steer_optim.vlm.rows import Gradients, Place, Rows, chunks, default_size
from steer_optim.vlm.topk import TopLogProbs, collapse, empty_bins, expand, heaviest

_Terms = Mapping[str, Term]
# The loss and the view of each gradient.
_Pulls = Sequence[tuple[str, str]]
_Rows = Mapping[str, Tensor]
_Found = tuple[dict[str, Tensor], list[Tensor]]


def weighted_sums(
    views: Mapping[str, View],
    terms: _Terms,
    weights: _Rows,
    *,
    temperature: float = 1.0,
    floor: float | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the sums over rows of ``weight * loss``, each with its own backward pass, and the losses of the rows.

    ``views`` are ``(N, d)`` hidden states by name, both views of a model under one head. A view that no term trains may
    also be logits ``(N, V)`` or :class:`~steer_optim.vlm.topk.TopLogProbs`. If no view is hidden states, autograd
    differentiates the oracle. ``terms``, by the name of the loss, are all over the same ids; ``weights`` are ``(N,)``
    constants, and a loss without weights has no sum. The other arguments and the errors are those of ``token_losses``
    and ``DecomposedDistillation``; a trained view that is logits beside hidden states is a ValueError.
    """
    check_temperature(temperature)
    check_inputs(views, terms, temperature)
    V = common_vocabulary(views)
    views = {name: views[name] for term in terms.values() for name in term.views}
    logits: Any = {name: x[..., :V] if isinstance(x, Tensor) else x for name, x in views.items()}
    if not any(isinstance(x, HiddenStates) for x in views.values()):
        losses = token_losses(logits, terms=terms, temperature=temperature, floor=floor)
        sums = {loss: (w.detach().to(losses[loss].dtype) * losses[loss]).sum() for loss, w in weights.items()}
        return sums, {loss: losses[loss].detach() for loss in terms}
    pulls = [
        (loss, name)
        for loss, term in terms.items()
        for name in dict.fromkeys([term.left, *term.attached])
        if views[name].requires_grad
    ]
    for _, name in pulls:
        if isinstance(views[name], Tensor):
            raise ValueError(
                f"{name} is logits that require grad, beside views that are hidden states: pass HiddenStates from "
                "response_states for the student too"
            )
    dtype = reduce(torch.promote_types, (view.dtype for view in views.values()), torch.float32)
    casts: dict[Place, Tensor] = {}
    rows = {
        name: Rows(view, temperature, dtype, V, casts)
        for name, view in views.items()
        if not isinstance(view, TopLogProbs)
    }
    servers = {name: view for name, view in views.items() if isinstance(view, TopLogProbs)}
    bins_NK = {name: view.bins().to(dtype) for name, view in servers.items()}
    ids_Nk = {"ids": next(iter(servers.values())).ids_BTk} if servers else {}
    weights_N = {loss: w.detach().to(dtype) for loss, w in weights.items()}
    inputs = {loss: [x for of, view in pulls if of == loss for x in rows[view].inputs] for loss in weights_N}
    gradients = {loss: Gradients(reached, dtype) for loss, reached in inputs.items()}
    pulls = [(loss, view) for loss, view in pulls if gradients.get(loss)]
    first = next(iter(rows.values()))
    losses_N = {loss: torch.zeros(len(first), dtype=dtype, device=first.device) for loss in terms}
    size = chunk_size or default_size(len(rows), first.device)
    run = _compiled if compile else _by_blocks
    with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
        for part in chunks(first, size):
            logits_CV = {name: row.logits(part) for name, row in rows.items()}
            given = [{name: x[part] for name, x in y.items()} for y in (bins_NK, weights_N, ids_Nk)]
            values, found = run(size, terms, floor, pulls, logits_CV, *given)
            for loss, value_C in values.items():
                losses_N[loss][part] = value_C
            for (loss, name), gradient_CV in zip(pulls, found, strict=True):
                rows[name].pull(part, logits_CV[name], gradient_CV, gradients[loss])
        if not torch.stack([*losses_N.values()]).isfinite().all():
            refuse_non_finite([name for name in sorted(rows) if not rows[name].finite(size)])
            refuse_overflow(losses_N.values())
    sums = {loss: gradients[loss].attach((w * losses_N[loss]).sum()) for loss, w in weights_N.items()}
    return sums, losses_N


def _losses(terms: _Terms, floor: float | None, pulls: _Pulls, *rows: _Rows) -> _Found:
    """Return the losses of some rows, and the weighted gradients ``(c, V)`` at the logits of each pull."""
    logits_cV, bins_cK, weights_c, ids_ck = rows
    top = next(iter(terms.values())).top
    ids = ids_ck.get("ids") if top is None else heaviest(logits_cV[top[0]], top[1])
    full = {name: x.log_softmax(-1) for name, x in logits_cV.items()}
    log_probs = {**(full if ids is None else {name: collapse(x, ids) for name, x in full.items()}), **bins_cK}
    empty = None if ids is None else empty_bins(ids, next(iter(full.values())).shape[-1])
    values, found = {}, {}
    for loss, term in terms.items():
        log_p, log_q = log_probs[term.left], log_target(term, log_probs, floor, empty)
        values[loss], left, target = value_and_gradients(term, log_p, log_q, attached=bool(term.attached))
        for name in (view for of, view in pulls if of == loss):
            shares = [left] if name == term.left else []
            shares += [target * term.target[name]] if target is not None and name in term.attached else []
            gradient = reduce(torch.add, shares).mul(weights_c[loss][:, None])
            found[loss, name] = gradient if ids is None else expand(gradient, full[name], log_probs[name], ids)
    return values, [found[pull] for pull in pulls]


def _by_blocks(size: int, terms: _Terms, floor: float | None, pulls: _Pulls, *rows: _Rows) -> _Found:
    """Run :func:`_losses` on blocks of a few rows, so that its intermediates stay small and in cache."""
    logits_CV = rows[0]
    first = next(iter(logits_CV.values()))
    C, V = first.shape
    step = max(1, (2**18 if first.device.type == "cpu" else 2**25) // V)
    # Logits that are only read for a target are overwritten with a gradient.
    lefts = {logits_CV[name].data_ptr() for _, name in pulls}
    spare = {x.data_ptr(): x for x in logits_CV.values() if x.data_ptr() not in lefts}
    out = [*spare.values(), *(torch.empty_like(first) for _ in pulls[len(spare) :])][: len(pulls)]
    values = {loss: first.new_empty(C) for loss in terms}
    for start in range(0, C, step):
        block = slice(start, start + step)
        part = [{name: x[block] for name, x in y.items()} for y in rows]
        losses, gradients = _losses(terms, floor, pulls, *part)
        for loss, value in losses.items():
            values[loss][block] = value
        for gradient_CV, gradient in zip(out, gradients, strict=True):
            gradient_CV[block] = gradient
    return values, out


def _compiled(size: int, terms: _Terms, floor: float | None, pulls: _Pulls, *rows: _Rows) -> _Found:
    """Run :func:`_losses` compiled for chunks of one size; the last chunk is padded with rows of weight zero."""
    C = len(next(iter(rows[0].values())))
    padded = [{name: pad(x, (0, 0) * (x.ndim - 1) + (0, size - C)) for name, x in y.items()} for y in rows]
    values, found = _compile()(terms, floor, pulls, *padded)
    return {loss: value[:C] for loss, value in values.items()}, [gradient[:C] for gradient in found]


# Made when it is first needed, because the compiler takes long to import.
_compile = cache(partial(torch.compile, _losses, dynamic=False))
