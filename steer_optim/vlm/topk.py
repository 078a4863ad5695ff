"""A teacher behind a server, which gives log-probabilities of a few ids and not its logits.

All distributions of a token are collapsed to the same bins: its ``k`` ids, and one *tail* that holds the rest of the
vocabulary. Every loss of this package takes :class:`TopLogProbs` in the place of a teacher's logits, and is then a
divergence over ``k + 1`` bins, which is always defined. The tail is never dropped, and an id that the server left out
is never made up: it is in the tail of all views.

=======================================  ================================================================
the server scores ids that it is sent    :func:`top_ids` of the student, of which the teacher scores both views
the server gives its own top ``k``       :func:`intersect` keeps the ids that are known in both views
=======================================  ================================================================

Where the server gives hidden states, :class:`~steer_optim.vlm.heads.HiddenStates` is exact and to be preferred.

``std``, ``lang`` and the visual dependency are never above those of the full vocabulary. ``vis`` and ``vp`` have no
such bound, for the target ``q*`` of the bins is not the collapsed ``q*``. ``benchmarks/topk_bias.py`` measures the bias
of all of them.

The temperature must be 1: the mass of a tail at another temperature depends on what is in it.

Dimensions: ``V`` vocabulary entries, ``k`` slots for ids, ``B`` prompts, ``T`` response tokens, ``N`` tokens that are
computed, ``C`` those of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from steer_optim.vlm.heads import HiddenStates
from steer_optim.vlm.rows import Rows, chunks, default_size

# The log-probability of a slot without an id: its mass is zero in every floating type, so that neither a divergence
# nor a target sees it, and where -inf would give NaN, differences of it are zero.
ABSENT = -1e4
# One minus a sum of float32 probabilities is noise below this.
TAIL_FLOOR = torch.finfo(torch.float32).eps
# How far probabilities rounded to bfloat16 may exceed one in sum.
EXCESS = 0.01


@dataclass(frozen=True, eq=False)
class TopLogProbs:
    """A teacher's view as a server gives it: log-probabilities of a few ids, the rest in a tail.

    Indexing gives the part of some tokens.

    Attributes:
        ids_BTk: ``(..., k)``, int64, without duplicates in a row; -1 where a slot holds none, and in all slots of a
            token that is no response token.
        log_probs_BTk: ``(..., k)``, floating, natural logarithms of probabilities over the whole vocabulary, at
            temperature 1 and before any top-k or top-p cut. Not read where the id is -1. Receives no gradient.

    Raises:
        TypeError: the log-probabilities are not floating, or the ids not int64.
        ValueError: shapes or devices do not fit each other; an id occurs twice in a row or is below -1; a
            log-probability is NaN, infinite or positive; the probabilities of a row exceed one in sum.

    Example:
        >>> import torch
        >>> top = TopLogProbs(torch.tensor([[5, 8], [3, -1]]), torch.tensor([[0.7, 0.2], [0.4, torch.nan]]).log())
        >>> top.bins().exp()
        tensor([[0.7000, 0.2000, 0.1000],
                [0.4000, 0.0000, 0.6000]])
    """

    ids_BTk: Tensor
    log_probs_BTk: Tensor

    def __post_init__(self) -> None:
        ids, log_probs = self.ids_BTk, self.log_probs_BTk
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
                "both views, and its mass is in the tail"
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

    @property
    def shape(self) -> torch.Size:
        """That of the ids, ``(..., k)``."""
        return self.ids_BTk.shape

    @property
    def device(self) -> torch.device:
        """Where the ids and log-probabilities are."""
        return self.ids_BTk.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the log-probabilities."""
        return self.log_probs_BTk.dtype

    requires_grad = False

    def detach(self) -> TopLogProbs:
        """Itself: it has no gradients."""
        return self

    def __getitem__(self, index: Any) -> TopLogProbs:
        part = object.__new__(TopLogProbs)  # checked already
        object.__setattr__(part, "ids_BTk", self.ids_BTk[index])
        object.__setattr__(part, "log_probs_BTk", self.log_probs_BTk[index])
        return part

    def bins(self) -> Tensor:
        """The collapsed log-probabilities ``(..., k + 1)``, float32 or float64, finite, the tail last.

        The tail's mass is one minus the others', which is noise where the ids have nearly all of it: below the
        rounding of float32 it counts as that. A token without ids has all mass in the tail.
        """
        log_probs = self.log_probs_BTk.detach().double().masked_fill(self.ids_BTk < 0, -torch.inf)
        largest, place = log_probs.max(dim=-1, keepdim=True)
        others = log_probs.scatter(-1, place, -torch.inf).exp().sum(dim=-1, keepdim=True)
        rest = -torch.expm1(largest) - others  # exact where one of the probabilities is nearly one
        # What the floor adds to the tail and rounding to the sum is taken from all alike.
        bins = torch.log_softmax(torch.cat([log_probs, rest.clamp(min=TAIL_FLOOR).log()], dim=-1), dim=-1)
        return bins.clamp(min=ABSENT).to(torch.promote_types(self.dtype, torch.float32))


def collapse(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities ``(..., V)`` collapsed to those of the ids ``(..., k)`` and that of the rest, differentiable.

    The tail is summed over its entries and not taken as a difference, so that its gradient is right however small it
    is.

    Returns:
        ``(..., k + 1)``, the tail last; ``ABSENT`` where a bin holds no entry.

    Example:
        >>> import torch
        >>> collapse(torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([2, -1])).exp()
        tensor([0.2000, 0.0000, 0.8000])
    """
    padded, place = _slots(log_probs, ids)
    rest = padded.scatter(-1, place, 10 * ABSENT)[..., :-1].logsumexp(-1, keepdim=True)
    return torch.cat([padded.gather(-1, place), rest], dim=-1).clamp(min=ABSENT)


def expand(gradient: Tensor, log_probs: Tensor, bins: Tensor, ids: Tensor) -> Tensor:
    """The gradient at logits ``(..., V)`` of one at the logits of their bins ``(..., k + 1)``.

    The tail hands its own on in the shares that its entries have of its mass.
    """
    shares = (log_probs - bins[..., -1:]).exp_().mul_(gradient[..., -1:])
    padded, place = _slots(shares, ids)
    return padded.scatter_(-1, place, gradient[..., :-1])[..., :-1]


def heaviest(scores: Tensor, k: int) -> Tensor:
    """The ids of the ``k`` largest scores of each row, in no order; all where there are fewer."""
    return scores.topk(min(k, scores.shape[-1]), dim=-1, sorted=False).indices


def _slots(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with one more column, and the column of each slot: that one where it holds no id."""
    return pad(x, (0, 1), value=ABSENT), ids.where(ids >= 0, x.shape[-1])


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
    V = student_BTV.shape[-1]
    if not 0 < k <= V:
        raise ValueError(f"k must be at least 1 and at most the vocabulary of {V}; got {k}")
    rows = [Rows(view[mask_BT].detach()) for view in views]
    ids_Nk = torch.empty(len(rows[0]), k, dtype=torch.int64, device=mask_BT.device)
    for part in chunks(rows[0], default_size(len(rows), mask_BT.device)):
        scores = [row.logits(part).log_softmax(dim=-1) for row in rows]
        ids_Nk[part] = heaviest(torch.maximum(scores[0], scores[-1]), k)
    return ids_Nk.new_full((*mask_BT.shape, k), -1).masked_scatter(mask_BT[..., None], ids_Nk)


def intersect(image: TopLogProbs, text: TopLogProbs) -> tuple[TopLogProbs, TopLogProbs]:
    """What a teacher's own top ``k`` with the image and its top ``k'`` without it have in common.

    Returns:
        Both views over the ids of ``image``, with -1 in the place of an id that is not known in both.

    Raises:
        ValueError: the views differ in their tokens.

    Example:
        >>> import torch
        >>> image = TopLogProbs(torch.tensor([7, 2, 5]), torch.tensor([0.5, 0.3, 0.1]).log())
        >>> text = TopLogProbs(torch.tensor([5, 9, 7]), torch.tensor([0.4, 0.3, 0.2]).log())
        >>> [view.bins().exp() for view in intersect(image, text)]
        [tensor([0.5000, 0.0000, 0.1000, 0.4000]), tensor([0.2000, 0.0000, 0.4000, 0.4000])]
    """
    if image.shape[:-1] != text.shape[:-1]:
        raise ValueError(
            "both views must have the same tokens, and may differ in their last dimension only; got "
            f"{tuple(image.shape)} with the image and {tuple(text.shape)} without"
        )
    sorted_ids, order = text.ids_BTk.sort(dim=-1)
    place = torch.searchsorted(sorted_ids, image.ids_BTk.contiguous()).clamp(max=sorted_ids.shape[-1] - 1)
    common = sorted_ids.gather(-1, place) == image.ids_BTk
    text_log_probs = text.log_probs_BTk.gather(-1, order.gather(-1, place)).masked_fill(~common, ABSENT)
    ids = image.ids_BTk.masked_fill(~common, -1)
    return TopLogProbs(ids, image.log_probs_BTk), TopLogProbs(ids, text_log_probs)


def check_ids(ids: Tensor, vocabulary: int | None = None) -> None:
    """Raises TypeError or ValueError where ids are no int64, occur twice in a row, or are out of range.

    The vocabulary is that of the student, or None where it is not known.
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, -1 where a slot holds none; got {ids.dtype}: pass ids.long()")
    if not ids.ndim or not ids.shape[-1]:
        raise ValueError(f"ids must be (..., k) with k at least 1; got {tuple(ids.shape)}")
    ordered = ids.sort(dim=-1).values
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()
    outside = ((ids < -1) | (ids >= (math.inf if vocabulary is None else vocabulary))).any()
    outside, twice = torch.stack([outside, twice]).tolist()  # one verdict: every read from the device stalls it
    if outside:
        raise ValueError(
            f"ids must be -1, or entries of the student's vocabulary{'' if vocabulary is None else f' of {vocabulary}'}"
            f"; found {int(ids.min())} to {int(ids.max())}: put -1 for an id that the student does not have, in both "
            "views, and its mass is in the tail"
        )
    if twice:
        raise ValueError(
            "ids must not occur twice in a row, or their mass counts twice; found duplicates: put -1 for all but one"
        )
