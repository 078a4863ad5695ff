"""A teacher behind a server, which gives log-probabilities of a few ids and not its logits.

All four distributions of a token are collapsed to the same bins: its ``k`` ids, and one *tail* that holds the rest of
the vocabulary. A collapsed distribution is ``k + 1`` log-probabilities that sum to one, and every loss of this package
takes them where it takes logits: the losses are then divergences over ``k + 1`` bins, always defined. The tail is
never dropped and an id that the server left out is never made up: it is in the tail of all four.

=======================================  ================================================================
the server scores ids that it is sent    :func:`top_ids` of the student, of which the teacher scores both views
the server gives its own top ``k``       :func:`intersect` keeps the ids that are known in both views
=======================================  ================================================================

Then :func:`with_tail` completes what the server sent and :func:`collapse` brings the student to the same ids. Where
the server gives hidden states, :class:`~steer_optim.vlm.heads.HiddenStates` is exact and to be preferred.

``std``, ``lang`` and the visual dependency are never above those of the full vocabulary. ``vis`` and ``vp`` have no
such bound, for the target ``q*`` of the bins is not the collapsed ``q*``. How far all are off is measured by
``benchmarks/topk_bias.py``.

Ids are ``-1`` where a slot holds none: a token with fewer than ``k`` of them, and all slots of a token that is no
response token, which is then not computed.

**The temperature must be 1**, in the losses and in the method. That of a collapsed distribution cannot be changed: the
mass of the tail at another temperature depends on what is in it.

Dimensions: ``V`` vocabulary entries, ``k`` slots for ids, ``B`` prompts, ``T`` response tokens, ``R`` all ``B * T``,
``N`` those of them that are computed, ``C`` those of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer_optim.vlm.collapse import ABSENT, StudentRows, check_ids, collapse
from steer_optim.vlm.heads import HiddenStates

__all__ = ["collapse", "intersect", "top_ids", "with_tail"]

# One minus a sum of float32 probabilities is noise below this.
TAIL_FLOOR = torch.finfo(torch.float32).eps
# How far probabilities rounded to bfloat16 may exceed one in sum.
EXCESS = 0.01


def top_ids(
    student_BTV: Tensor | HiddenStates, student_text_BTV: Tensor | HiddenStates | None, mask_BT: Tensor, *, k: int
) -> Tensor:
    """The ids of each token that the teacher is to score: the ``k`` with the largest ``max(p, p_tx)``.

    ``std`` and ``vis`` are expectations under ``p``, ``lang`` and ``vp`` under ``p_tx``, and an id outside the
    support is seen through the tail only; so the ids are those that weigh most in either view.

    Args:
        student_BTV: ``(B, T, V)``, floating, the student's logits with the image, or its hidden states.
        student_text_BTV: ``(B, T, V)``, those without it; None where only ``std`` is wanted.
        mask_BT: ``(B, T)``, bool, True at response tokens.
        k: how many, at most ``V``.

    Returns:
        ``ids_BTk``, int64, in no order; -1 where the mask is False.

    Raises:
        TypeError: the mask is not bool.
        ValueError: shapes or devices do not fit each other; ``k`` is out of range.

    Example:
        >>> import torch
        >>> student_BTV, mask_BT = torch.tensor([[[0.0, 3.0, 1.0, 2.0]] * 2]), torch.tensor([[True, False]])
        >>> top_ids(student_BTV, None, mask_BT, k=2).sort().values
        tensor([[[ 1,  3],
                 [-1, -1]]])
    """
    if mask_BT.dtype != torch.bool:
        raise TypeError(f"mask_BT must be bool, True at response tokens; got {mask_BT.dtype}: pass mask.bool()")
    views = [student_BTV] if student_text_BTV is None else [student_BTV, student_text_BTV]
    for view in views:
        if view.shape[:-1] != mask_BT.shape or view.shape != student_BTV.shape or view.device != mask_BT.device:
            raise ValueError(
                "the student's views must have one shape, and the tokens and the device of mask_BT, "
                f"{tuple(mask_BT.shape)} on {mask_BT.device}; got {tuple(view.shape)} on {view.device}"
            )
    if not 0 < k <= student_BTV.shape[-1]:
        raise ValueError(f"k must be at least 1 and at most the vocabulary of {student_BTV.shape[-1]}; got {k}")
    ids_Rk = torch.full((mask_BT.numel(), k), -1, device=mask_BT.device)
    token_N = mask_BT.flatten().nonzero().squeeze(-1)
    with torch.no_grad():
        for chunks in zip(*(StudentRows(view, token_N).chunks() for view in views), strict=True):
            scores = [torch.log_softmax(logits_CV, dim=-1) for _, logits_CV in chunks]
            part, _ = chunks[0]
            ids_Rk[token_N[part]] = torch.maximum(scores[0], scores[-1]).topk(k, dim=-1, sorted=False).indices
    return ids_Rk.view(*mask_BT.shape, k)


def intersect(
    ids_BTk: Tensor, log_probs_BTk: Tensor, text_ids_BTk: Tensor, text_log_probs_BTk: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a teacher's own top ``k`` of both views have in common.

    Args:
        ids_BTk: ``(..., k)``, int64, the teacher's top ids with the image; -1 where a slot holds none, and at tokens
            that are no response tokens.
        log_probs_BTk: ``(..., k)``, floating, their log-probabilities, at temperature 1; not read where the id is -1.
        text_ids_BTk: ``(..., k')``, int64, the top ids without the image.
        text_log_probs_BTk: ``(..., k')``, their log-probabilities.

    Returns:
        ``ids_BTk`` with -1 in place of an id that is not known without the image, ``log_probs_BTk`` as it was, and
        the log-probabilities without the image in the same order.

    Raises:
        TypeError, ValueError: as :func:`with_tail` does for either view; the views differ in their tokens.

    Example:
        >>> import torch
        >>> ids, log_probs = torch.tensor([7, 2, 5]), torch.tensor([0.5, 0.3, 0.1]).log()
        >>> text_ids, text_log_probs = torch.tensor([5, 9, 7]), torch.tensor([0.4, 0.3, 0.2]).log()
        >>> ids, log_probs, text_log_probs = intersect(ids, log_probs, text_ids, text_log_probs)
        >>> ids
        tensor([ 7, -1,  5])
        >>> text_log_probs.exp()
        tensor([0.2000, 0.0000, 0.4000])
        >>> with_tail(log_probs, ids).exp(), with_tail(text_log_probs, ids).exp()
        (tensor([0.5000, 0.0000, 0.1000, 0.4000]), tensor([0.2000, 0.0000, 0.4000, 0.4000]))
    """
    _check_log_probs(log_probs_BTk, ids_BTk)
    _check_log_probs(text_log_probs_BTk, text_ids_BTk)
    if ids_BTk.shape[:-1] != text_ids_BTk.shape[:-1]:
        raise ValueError(
            "both views must have the same tokens, and may differ in their last dimension only; got "
            f"{tuple(ids_BTk.shape)} with the image and {tuple(text_ids_BTk.shape)} without"
        )
    sorted_ids, order = text_ids_BTk.sort(dim=-1)
    place = torch.searchsorted(sorted_ids, ids_BTk.contiguous()).clamp(max=sorted_ids.shape[-1] - 1)
    common = sorted_ids.gather(-1, place) == ids_BTk
    text_log_probs = text_log_probs_BTk.gather(-1, order.gather(-1, place))
    return ids_BTk.masked_fill(~common, -1), log_probs_BTk, text_log_probs.masked_fill(~common, ABSENT)


def with_tail(log_probs_BTk: Tensor, ids_BTk: Tensor) -> Tensor:
    """The teacher's collapsed log-probabilities: those of its ids, and that of all others together.

    The tail's mass is one minus the others', which is noise where the ids have nearly all of it: below the rounding
    of float32 it counts as that.

    Args:
        log_probs_BTk: ``(..., k)``, floating, natural logarithms of probabilities over the whole vocabulary, at
            temperature 1 and before any top-k or top-p cut. Not read where the id is -1. Receives no gradient.
        ids_BTk: ``(..., k)``, int64, without duplicates in a row; -1 where a slot holds none.

    Returns:
        ``(..., k + 1)``, float32 or float64, finite, the tail last. A token without ids has all mass in the tail.

    Raises:
        TypeError: the log-probabilities are not floating, or the ids not int64.
        ValueError: shapes or devices do not fit each other; an id occurs twice in a row or is below -1; a
            log-probability is NaN, infinite or positive; the probabilities of a row exceed one in sum.

    Example:
        >>> import torch
        >>> with_tail(torch.tensor([[0.7, 0.2], [0.4, torch.nan]]).log(), torch.tensor([[5, 8], [3, -1]])).exp()
        tensor([[0.7000, 0.2000, 0.1000],
                [0.4000, 0.0000, 0.6000]])
    """
    _check_log_probs(log_probs_BTk, ids_BTk)
    log_probs = log_probs_BTk.detach().double().masked_fill(ids_BTk < 0, -torch.inf)
    tail = _rest(log_probs).clamp(min=TAIL_FLOOR).log()
    # What the floor adds to the tail and rounding to the sum is taken from all alike.
    collapsed = torch.log_softmax(torch.cat([log_probs, tail], dim=-1), dim=-1)
    return collapsed.clamp(min=ABSENT).to(torch.promote_types(log_probs_BTk.dtype, torch.float32))


def _rest(log_probs: Tensor) -> Tensor:
    """One minus the sum of the probabilities, ``(..., 1)``, exact where one of them is nearly one."""
    largest, place = log_probs.max(dim=-1, keepdim=True)
    others = log_probs.scatter(-1, place, -torch.inf).exp().sum(dim=-1, keepdim=True)
    return -torch.expm1(largest) - others


def _check_log_probs(log_probs: Tensor, ids: Tensor) -> None:
    if not log_probs.is_floating_point():
        raise TypeError(f"log-probabilities must be floating; got {log_probs.dtype}")
    if log_probs.shape != ids.shape or log_probs.device != ids.device:
        raise ValueError(
            "log-probabilities and ids must have one shape on one device; got "
            f"{tuple(log_probs.shape)} on {log_probs.device} and {tuple(ids.shape)} on {ids.device}"
        )
    check_ids(ids)
    if not ids.numel():
        return
    masked = log_probs.detach().double().masked_fill(ids < 0, -torch.inf)
    broken = (masked.isnan() | (masked.isinf() & (ids >= 0))).any().double()
    broken, largest, mass = torch.stack([broken, masked.amax(), masked.exp().sum(dim=-1).amax()]).tolist()
    if broken:
        raise ValueError(
            "log-probabilities must be finite; found NaN or infinity: put the id -1 where the server gave none, in "
            "all that is collapsed, and its mass is in the tail"
        )
    if largest > EXCESS:
        raise ValueError(
            f"log-probabilities must not be positive; found {largest:.3g}: logits are not normalised, and their "
            "log_softmax over a few ids is not what is wanted either"
        )
    if mass > 1 + EXCESS:
        raise ValueError(
            f"the probabilities of a token must not exceed one in sum; found {mass:.3g}: they must be those of the "
            "whole vocabulary at temperature 1, as natural logarithms"
        )
