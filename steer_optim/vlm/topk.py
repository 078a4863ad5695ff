"""A teacher behind a server that returns log-probabilities of a few ids instead of its logits.

All distributions of a token are collapsed to the same bins: its ``k`` ids, and one *tail* for the rest of the
vocabulary. Every loss of this package accepts :class:`TopLogProbs` in place of a teacher's logits, and is then a
divergence over ``k + 1`` bins, which is always defined. The tail is never dropped, and no probability is made up for an
id that the server left out: it belongs to the tail of all views.

=======================================  ================================================================
the server scores ids that it is sent    :func:`top_ids` of the student, which the teacher scores in both views
the server gives its own top ``k``       :func:`intersect` keeps the ids that are known in both views
=======================================  ================================================================

If the server can return hidden states, prefer :class:`~steer_optim.vlm.heads.HiddenStates`, which are exact.

``std``, ``lang`` and the visual dependency never exceed those of the full vocabulary. ``vis`` and ``vp`` have no such
bound, because the target ``q*`` of the bins is not the collapsed ``q*``. ``benchmarks/topk_bias.py`` measures the bias
of all of them.

The temperature must be 1: the mass of a tail at another temperature depends on its entries.

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

# The log-probability of an empty slot. Its mass is zero in every floating dtype, so that it changes no divergence and
# no target; differences of two are zero, where -inf would give NaN.
ABSENT = -1e4
# Below this, one minus a sum of float32 probabilities is noise.
TAIL_FLOOR = torch.finfo(torch.float32).eps
# How far a sum of probabilities in bfloat16 may exceed one.
EXCESS = 0.01


@dataclass(frozen=True, eq=False)
class TopLogProbs:
    """Hold a teacher's view from a server: log-probabilities of a few ids, the rest in a tail.

    Indexing selects tokens.

    Attributes:
        ids_BTk: ``(..., k)``, int64, without duplicates in a row; -1 in an empty slot, and in all slots outside the
            response.
        log_probs_BTk: ``(..., k)``, floating, natural logarithms of probabilities over the full vocabulary, at
            temperature 1 and before any top-k or top-p cut. Not read where the id is -1. Receives no gradient.

    Raises:
        TypeError: the log-probabilities are not floating, or the ids not int64.
        ValueError: shapes or devices differ; an id is duplicated in a row or below -1; a log-probability is NaN,
            infinite or positive; the probabilities of a row sum to more than one.

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
                "log-probabilities must be finite; found NaN or infinity: if the server gave none for an id, set the "
                "id to -1 in both views, and its mass goes to the tail"
            )
        if largest > EXCESS:
            raise ValueError(
                f"log-probabilities must not be positive; found {largest:.3g}: pass neither logits nor their "
                "log_softmax over a few ids, but log-probabilities over the full vocabulary"
            )
        if mass > 1 + EXCESS:
            raise ValueError(
                f"the probabilities of a token must not exceed one in sum; found {mass:.3g}: pass those of the full "
                "vocabulary at temperature 1, as natural logarithms"
            )

    @property
    def shape(self) -> torch.Size:
        """The shape of the ids, ``(..., k)``."""
        return self.ids_BTk.shape

    @property
    def device(self) -> torch.device:
        """The device of the ids and log-probabilities."""
        return self.ids_BTk.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the log-probabilities."""
        return self.log_probs_BTk.dtype

    requires_grad = False

    def detach(self) -> TopLogProbs:
        """Return itself: it has no gradients."""
        return self

    def __getitem__(self, index: Any) -> TopLogProbs:
        part = object.__new__(TopLogProbs)  # checked already
        object.__setattr__(part, "ids_BTk", self.ids_BTk[index])
        object.__setattr__(part, "log_probs_BTk", self.log_probs_BTk[index])
        return part

    def bins(self) -> Tensor:
        """Return the collapsed log-probabilities ``(..., k + 1)``, float32 or float64, finite, the tail last.

        The mass of the tail is one minus that of the ids. Below the rounding of float32 this difference is noise, and
        is raised to that rounding. A token without ids has all mass in the tail.
        """
        log_probs = self.log_probs_BTk.detach().double().masked_fill(self.ids_BTk < 0, -torch.inf)
        largest, place = log_probs.max(dim=-1, keepdim=True)
        others = log_probs.scatter(-1, place, -torch.inf).exp().sum(dim=-1, keepdim=True)
        rest = -torch.expm1(largest) - others  # exact if one of the probabilities is nearly one
        # The log_softmax removes what the floor and rounding add, from all bins alike.
        bins = torch.log_softmax(torch.cat([log_probs, rest.clamp(min=TAIL_FLOOR).log()], dim=-1), dim=-1)
        return bins.clamp(min=ABSENT).to(torch.promote_types(self.dtype, torch.float32))


def collapse(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return log-probabilities ``(..., V)`` collapsed to bins ``(..., k + 1)``: those of the ids, then the tail.

    Differentiable. A bin without an entry is ``ABSENT``. The tail is summed over its entries rather than computed as a
    difference, so that its gradient is accurate however small it is.
    """
    padded, place = _slots(log_probs, ids)
    rest = padded.scatter(-1, place, 10 * ABSENT)[..., :-1].logsumexp(-1, keepdim=True)
    return torch.cat([padded.gather(-1, place), rest], dim=-1).clamp(min=ABSENT)


def expand(gradient: Tensor, log_probs: Tensor, bins: Tensor, ids: Tensor) -> Tensor:
    """Return the gradient at logits ``(..., V)``, given that at the logits of their bins ``(..., k + 1)``.

    The gradient of the tail is distributed over its entries in proportion to their mass.
    """
    shares = (log_probs - bins[..., -1:]).exp_().mul_(gradient[..., -1:])
    padded, place = _slots(shares, ids)
    return padded.scatter_(-1, place, gradient[..., :-1])[..., :-1]


def empty_bins(ids: Tensor, vocabulary: int) -> Tensor:
    """Return which bins ``(..., k + 1)`` have no entry: empty slots, and the tail if the ids are the whole vocabulary.

    ``vocabulary`` is its size, or 0 if unknown.
    """
    slots = ids < 0
    return torch.cat([slots, (~slots).sum(dim=-1, keepdim=True) >= (vocabulary or math.inf)], dim=-1)


def heaviest(scores: Tensor, k: int) -> Tensor:
    """Return the ids of the ``k`` largest scores of each row, in no order; all ids if there are fewer."""
    return scores.topk(min(k, scores.shape[-1]), dim=-1, sorted=False).indices


def _slots(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x`` with one more column, and the column of each slot, which is the added one for an empty slot."""
    return pad(x, (0, 1), value=ABSENT), ids.where(ids >= 0, x.shape[-1])


def top_ids(
    student_BTV: Tensor | HiddenStates, student_text_BTV: Tensor | HiddenStates | None, mask_BT: Tensor, *, k: int
) -> Tensor:
    """Return the ids of each token that the teacher should score: the ``k`` with the largest ``max(p, p_tx)``.

    ``std`` and ``vis`` are expectations under ``p``, ``lang`` and ``vp`` under ``p_tx``, and all ids outside the
    support share the tail. So the ids are those with the most mass in either view.

    Args:
        student_BTV: ``(B, T, V)``, floating, the student's logits with the image, or its hidden states.
        student_text_BTV: ``(B, T, V)``, those without it; None if only ``std`` is needed.
        mask_BT: ``(B, T)``, bool, True at response tokens.
        k: how many, at most ``V``.

    Returns:
        ``ids_BTk``, int64, in no order; -1 where the mask is False.

    Raises:
        TypeError: the mask is not bool.
        ValueError: shapes or devices differ; ``k`` is out of range.

    Example:
        >>> import torch
        >>> student_BTV, mask_BT = torch.tensor([[[0.0, 3.0, 1.0, 2.0]] * 2]), torch.tensor([[True, False]])
        >>> top_ids(student_BTV, None, mask_BT, k=2).sort().values
        tensor([[[ 1,  3],
                 [-1, -1]]])
    """
    check_mask(mask_BT)
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
    """Return both views of a teacher over the ids of both its top ``k`` with the image and its top ``k'`` without.

    Returns:
        Both views over the ids of ``image``, with -1 for an id that is not known in both.

    Raises:
        ValueError: the views have different tokens.

    Example:
        >>> import torch
        >>> image = TopLogProbs(torch.tensor([7, 2, 5]), torch.tensor([0.5, 0.3, 0.1]).log())
        >>> text = TopLogProbs(torch.tensor([5, 9, 7]), torch.tensor([0.4, 0.3, 0.2]).log())
        >>> [view.bins().exp() for view in intersect(image, text)]
        [tensor([0.5000, 0.0000, 0.1000, 0.4000]), tensor([0.2000, 0.0000, 0.4000, 0.4000])]
    """
    if image.shape[:-1] != text.shape[:-1]:
        raise ValueError(
            "both views must have the same tokens and the same shape, except for the last dimension; got "
            f"{tuple(image.shape)} with the image and {tuple(text.shape)} without"
        )
    sorted_ids, order = text.ids_BTk.sort(dim=-1)
    place = torch.searchsorted(sorted_ids, image.ids_BTk.contiguous()).clamp(max=sorted_ids.shape[-1] - 1)
    common = sorted_ids.gather(-1, place) == image.ids_BTk
    text_log_probs = text.log_probs_BTk.gather(-1, order.gather(-1, place)).masked_fill(~common, ABSENT)
    ids = image.ids_BTk.masked_fill(~common, -1)
    return TopLogProbs(ids, image.log_probs_BTk), TopLogProbs(ids, text_log_probs)


def check_mask(mask_BT: Tensor) -> None:
    """Raise TypeError unless the mask is bool: an integer one would select rows by number."""
    if mask_BT.dtype != torch.bool:
        raise TypeError(f"mask_BT must be bool, True at response tokens; got {mask_BT.dtype}: pass mask.bool()")


def check_ids(ids: Tensor, vocabulary: int = 0) -> None:
    """Raise TypeError or ValueError if ids are not int64, are duplicated in a row, or are out of range.

    ``vocabulary`` is the student's size, or 0 if unknown.
    """
    if ids.dtype != torch.int64:
        raise TypeError(f"ids must be int64, -1 where a slot holds none; got {ids.dtype}: pass ids.long()")
    if not ids.ndim or not ids.shape[-1]:
        raise ValueError(f"ids must be (..., k) with k at least 1; got {tuple(ids.shape)}")
    ordered = ids.sort(dim=-1).values
    twice = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()
    outside = ((ids < -1) | (ids >= (vocabulary or math.inf))).any()
    outside, twice = torch.stack([outside, twice]).tolist()  # one read, because each synchronizes with the device
    if outside:
        raise ValueError(
            f"ids must be -1, or entries of the student's vocabulary{f' of {vocabulary}' if vocabulary else ''}"
            f"; found {int(ids.min())} to {int(ids.max())}: put -1 for an id that the student does not have, in both "
            "views, and its mass goes to the tail"
        )
    if twice:
        raise ValueError(
            "ids must be unique in a row, or their mass counts twice; found duplicates: put -1 for all but one"
        )
