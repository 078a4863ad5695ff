"""The losses from hidden states, a chunk of tokens at a time: no ``(N, V)`` tensor is ever held.

The forward pass also computes the gradients with respect to hidden states and heads, chunk by chunk, each token
weighted with what the caller's mean gives it, and the backward pass of a component multiplies them by the gradient that
comes in. :func:`~steer_optim.vlm.divergences.token_losses` is the oracle.

Dimensions: ``N`` rows, ``C`` rows of a chunk, ``c`` rows of a block, ``V`` vocabulary entries, ``k`` ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from steer_optim.vlm.divergences import (
    Term,
    View,
    check_floor,
    check_temperature,
    check_views,
    common_vocabulary,
    log_target,
    refuse_non_finite,
    refuse_overflow,
    token_losses,
    value_and_gradients,
)
from steer_optim.vlm.heads import HiddenStates
from steer_optim.vlm.rows import Gradients, Place, Rows, chunks, default_size
from steer_optim.vlm.topk import TopLogProbs, collapse, expand, heaviest

# The loss and the view of a gradient.
_Pull = tuple[str, str]


def weighted_sums(
    views: Mapping[str, View],
    terms: Mapping[str, Term],
    weights: Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    floor: float | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The sums over rows of ``weight * loss``, each with a backward pass of its own, and the losses of the rows.

    Args:
        views: by name, ``(N, d)`` hidden states, those of one model under one head; of what no term trains also logits
            ``(N, V)`` or :class:`~steer_optim.vlm.topk.TopLogProbs`. The vocabularies are cut to the common ids. Where
            none is hidden states, autograd differentiates the oracle.
        terms: by the name of the loss, all over the same ids.
        weights: ``(N,)`` by the name of the loss, constants; of a loss without any, only those of the rows are given.
        temperature: as of ``token_losses``, like the one that follows.
        floor: on the teacher's probabilities before its visual gain is taken.
        chunk_size: how many rows of each view meet a head at once. By default 384 in all views together on a CPU, 3072
            on an accelerator.
        compile: whether ``torch.compile`` fuses what happens to the logits of a chunk.

    Returns:
        Scalars, and ``(N,)`` constants, by the name of the loss; float32 or float64.

    Raises:
        TypeError, ValueError: as ``token_losses``; a view that is trained is no hidden states.

    Example:
        >>> import torch
        >>> from steer_optim.vlm.divergences import TERMS
        >>> from steer_optim.vlm.heads import Head, HiddenStates
        >>> head = Head(torch.randn(7, 4, requires_grad=True))
        >>> views = {"student": HiddenStates(torch.randn(5, 4), head), "teacher": torch.randn(5, 7)}
        >>> sums, losses = weighted_sums(views, {"std": TERMS["std"]}, {"std": torch.full((5,), 1 / 5)})
        >>> sums["std"].backward()
        >>> head.weight_Vd.grad.shape, losses["std"].shape
        (torch.Size([7, 4]), torch.Size([5]))
    """
    check_chunk_size(chunk_size)
    check_temperature(temperature)
    check_floor(floor)
    check_views(views, terms, temperature)
    V = common_vocabulary(views)
    views = {name: views[name] for term in terms.values() for name in term.views}
    logits = {
        name: x[..., :V] if isinstance(x, Tensor) else x for name, x in views.items() if not isinstance(x, HiddenStates)
    }
    if len(logits) == len(views):
        losses = token_losses(logits, terms=terms, temperature=temperature, floor=floor)
        sums = {loss: (w.to(losses[loss].dtype) * losses[loss]).sum() for loss, w in weights.items()}
        return sums, {loss: losses[loss].detach() for loss in terms}
    pulls = [(loss, view) for loss, term in terms.items() for view in dict.fromkeys([term.left, *term.attached])]
    for _, name in pulls:
        if isinstance(views[name], Tensor) and views[name].requires_grad:
            raise ValueError(
                f"{name} is logits, and the losses need what they were computed from: pass HiddenStates, as "
                "response_states gives them, for the student too"
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
    ids_Nk = dict(zip(("ids",), (view.ids_BTk for view in servers.values()), strict=False))
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


def check_chunk_size(chunk_size: int | None) -> None:
    """Raises ValueError where ``chunk_size`` is neither None nor at least 1."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for the default; got {chunk_size}")


def _losses(
    terms: Mapping[str, Term],
    floor: float | None,
    pulls: Sequence[_Pull],
    logits_cV: Mapping[str, Tensor],
    bins_cK: Mapping[str, Tensor],
    weights_c: Mapping[str, Tensor],
    ids_ck: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The losses of some rows, and the weighted gradients ``(c, V)`` at the logits of each pull."""
    top = next(iter(terms.values())).top
    ids = ids_ck.get("ids") if top is None else heaviest(logits_cV[top[0]], top[1])
    full = {name: x.log_softmax(-1) for name, x in logits_cV.items()}
    log_probs = {**(full if ids is None else {name: collapse(x, ids) for name, x in full.items()}), **bins_cK}
    values, found = {}, {}
    for loss, term in terms.items():
        log_q = log_target(term, log_probs, floor)
        values[loss], left, target = value_and_gradients(
            term, log_probs[term.left], log_q, attached=bool(term.attached)
        )
        for name in (view for of, view in pulls if of == loss):
            shares = [left] if name == term.left else []
            shares += [target * term.target[name]] if target is not None and name in term.attached else []
            gradient = reduce(torch.add, shares).mul(weights_c[loss][:, None])
            found[loss, name] = gradient if ids is None else expand(gradient, full[name], log_probs[name], ids)
    return values, [found[pull] for pull in pulls]


def _by_blocks(
    size: int, terms: Mapping[str, Term], floor: float | None, pulls: Sequence[_Pull], *rows: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """:func:`_losses` on a few rows after the other, so that what it computes on the way is small and cached."""
    logits_CV = rows[0]
    first = next(iter(logits_CV.values()))
    C, V = first.shape
    step = max(1, (2**18 if first.device.type == "cpu" else 2**25) // V)
    # What a target is made of is not read again: a gradient is written over it.
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


def _compiled(
    size: int, terms: Mapping[str, Term], floor: float | None, pulls: Sequence[_Pull], *rows: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """:func:`_losses` compiled for chunks of one size; the last is filled up with rows of weight zero."""
    C = len(next(iter(rows[0].values())))
    padded = [{name: pad(x, (0, 0) * (x.ndim - 1) + (0, size - C)) for name, x in y.items()} for y in rows]
    values, found = _compile()(terms, floor, pulls, *padded)
    return {loss: value[:C] for loss, value in values.items()}, [gradient[:C] for gradient in found]


@cache
def _compile() -> Callable[..., Any]:
    return torch.compile(_losses, dynamic=False)
