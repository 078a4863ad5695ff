"""Decomposed distillation losses, token by token, in the words of the paper's equations.

Every loss is a reverse KL over the full vocabulary. ``p`` and ``q`` are the next-token distributions of student and
teacher with the image, ``p_tx`` and ``q_tx`` without it, all on the same response, which the student sampled with
the image. This is the eager form: it holds every ``(N, V)`` intermediate, and is the oracle for any faster one.

Dimensions: ``B`` prompts, ``T`` response tokens, ``V`` vocabulary entries.

Reference: *Decomposed On-Policy Distillation for Vision-Language Reasoning: Steering Gradients for Visual
Grounding*, arXiv 2606.00564.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from steer_optim.vlm.heads import HiddenStates


@dataclass(frozen=True)
class TokenLosses:
    """The losses of each token, ``(...)``, float32 or float64, before any gate, weight or mean.

    Attributes:
        std: ``KL(p || q)``, standard distillation (Eq. 3). Reaches the student's logits with the image.
        vis: ``KL(p || q*)``, the visual component (Eq. 11). Reaches the student's logits with the image, and those
            without it where the prior of ``q*`` is not detached.
        prior: ``std - vis``, what standard distillation asks beyond the visual component. Reaches what ``vis`` does.
        lang: ``KL(p_tx || q_tx)``, the language component (Eq. 6). Reaches the student's logits without the image.
        vp: ``KL(p_tx || q*)``, what preserves vision when language is steered towards (Eq. 21). Reaches the
            student's logits without the image.
        vds: ``KL(q || q_tx)``, the visual dependency score (Eq. 12). A constant.
        floored: how much of ``p`` lies on entries whose visual gain the floor changed, in [0, 1]. A constant; None
            without a floor.
    """

    std: Tensor
    vis: Tensor
    prior: Tensor
    lang: Tensor
    vp: Tensor
    vds: Tensor
    floored: Tensor | None = None


def token_losses(
    student: Tensor,
    student_text: Tensor,
    teacher: Tensor,
    teacher_text: Tensor,
    *,
    temperature: float = 1.0,
    detach_prior: bool = True,
    floor: float | None = None,
) -> TokenLosses:
    """All decomposed losses of each token, from the logits of both models on both views.

    The target of the visual component is the student's own prior with the teacher's visual gain (Eq. 10)::

        q* = softmax(log p_tx + log q - log q_tx)

    Everything is computed in float32 at least. Where the student's vocabulary and the teacher's differ in size, as
    padded heads do, all four are cut to the common ids and renormalised (the softmax is taken after the cut); an id
    must mean the same token to both. Asking whether the logits are finite waits once for the device.

    Args:
        student: ``(..., V)``, floating, the student's logits with the image.
        student_text: ``(..., V)``, its logits without the image.
        teacher: ``(..., V')``, floating, the teacher's logits with the image. Receives no gradient.
        teacher_text: ``(..., V')``, its logits without the image. Receives no gradient.
        temperature: all logits are divided by it; the losses are not multiplied by its square.
        detach_prior: whether ``p_tx`` is a constant in ``q*``. If not, ``vis`` also pulls the text-only view, by
            ``q* - p``.
        floor: the smallest probability that the teacher is taken to give when its visual gain
            ``log q - log q_tx`` is computed, which a peaked teacher otherwise makes unbounded. None is the paper's
            equation.

    Returns:
        The losses, each ``(...)``.

    Raises:
        TypeError: logits are not floating.
        ValueError: shapes or devices do not fit each other; logits are not finite; ``temperature`` or ``floor`` is
            out of range.

    Example:
        >>> import torch
        >>> student, student_text = torch.randn(2, 5, 11, requires_grad=True).unbind()
        >>> teacher, teacher_text = torch.randn(2, 5, 11).unbind()
        >>> losses = token_losses(student, student_text, teacher, teacher_text)
        >>> losses.vis.shape
        torch.Size([5])
        >>> torch.allclose(losses.prior + losses.vis, losses.std)
        True

    References:
        arXiv 2606.00564, Eqs. 3, 6, 10-12, 16, 21.
    """
    check_floor(floor)
    log_p, log_ptx, log_q, log_qtx = log_probs(
        temperature,
        student=student,
        student_text=student_text,
        teacher=teacher.detach(),
        teacher_text=teacher_text.detach(),
    )
    gain = log_q - log_qtx
    floored = None
    if floor is not None:
        unfloored = gain
        gain = log_q.clamp(min=math.log(floor)) - log_qtx.clamp(min=math.log(floor))
        floored = (log_p.detach().exp() * (gain != unfloored)).sum(-1)
    log_prior = log_ptx.detach() if detach_prior else log_ptx
    log_target = torch.log_softmax(log_prior + gain, dim=-1)

    std = kl(log_p, log_q)
    vis = kl(log_p, log_target)
    return TokenLosses(
        std=std,
        vis=vis,
        prior=std - vis,
        lang=kl(log_ptx, log_qtx),
        vp=kl(log_ptx, log_target),
        vds=kl(log_q, log_qtx),
        floored=floored,
    )


class EagerLosses:
    """The losses of rows of logits, summed with weights; the twin of :class:`~steer_optim.vlm.chunked.ChunkedLosses`.

    Args:
        views: ``student`` and ``teacher``, ``(N, V)``, and for everything but ``std`` ``student_text`` and
            ``teacher_text``, by name.
        temperature: as of :func:`token_losses`, like the two that follow.
        detach_prior: whether ``p_tx`` is a constant in ``q*``.
        floor: on the teacher's probabilities before its visual gain is taken.

    Example:
        >>> import torch
        >>> losses = EagerLosses({"student": torch.zeros(2, 3), "teacher": torch.ones(2, 3)})
        >>> losses.weighted({"std": torch.ones(2)})
        {'std': tensor(0.)}
    """

    def __init__(
        self,
        views: Mapping[str, Tensor],
        *,
        temperature: float = 1.0,
        detach_prior: bool = True,
        floor: float | None = None,
    ) -> None:
        student, teacher = views["student"], views["teacher"].detach()
        self._losses: dict[str, Tensor]
        if "student_text" not in views:
            self._losses = {"std": kl(*log_probs(temperature, student=student, teacher=teacher))}
            return
        losses = token_losses(
            student,
            views["student_text"],
            teacher,
            views["teacher_text"],
            temperature=temperature,
            detach_prior=detach_prior,
            floor=floor,
        )
        self._losses = {name: getattr(losses, name) for name in ("std", "vis", "lang", "vp", "vds")}

    @property
    def dtype(self) -> torch.dtype:
        """Float32 or float64."""
        return self._losses["std"].dtype

    @property
    def vds_N(self) -> Tensor:
        """The visual dependency score of each row."""
        return self._losses["vds"]

    def weighted(self, weights: Mapping[str, Tensor], *, where: Tensor | None = None) -> dict[str, Tensor]:
        """The sums over rows of ``weight * loss``, by the name of the loss; over the rows of a bool mask if given."""
        kept = weights if where is None else {name: where * weight for name, weight in weights.items()}
        return {name: (weight * self._losses[name]).sum() for name, weight in kept.items()}


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q)`` over the last dimension, from log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def log_probs(temperature: float, **logits: Tensor) -> list[Tensor]:
    """Log-probabilities over the common vocabulary, in float32 at least.

    The logits are named for the errors; ``name`` and ``name_text`` are the two views of one model.
    """
    check_temperature(temperature)
    check_views(**logits)
    vocabulary = min(x.shape[-1] for x in logits.values())
    cut = {name: x[..., :vocabulary] for name, x in logits.items()}
    # A non-finite entry gives NaN losses without a word about where it came from. One verdict on all inputs, because
    # every read from the device stalls it.
    finite = torch.stack([x.isfinite().all() for x in cut.values()]).tolist()
    refuse_non_finite([name for name, ok in zip(cut, finite, strict=True) if not ok])
    return [
        torch.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)) / temperature, dim=-1) for x in cut.values()
    ]


def check_views(**views: Tensor | HiddenStates) -> None:
    """Raises TypeError or ValueError where the views are not floating logits or hidden states of the same rows.

    ``name`` and ``name_text`` are the two views of one model; ``student_text`` may be that of a frozen copy.
    """
    first_name, first = next(iter(views.items()))
    models: dict[str, tuple[str, Tensor | HiddenStates]] = {}
    for name, x in views.items():
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise TypeError(f"{name} must be floating logits; got {x.dtype}")
        if x.device != first.device:
            raise ValueError(
                f"all logits must be on one device; {first_name} is on {first.device} and {name} on {x.device}"
            )
        twin_name, twin = models.setdefault(name.removesuffix("_text"), (name, x))
        if isinstance(x, HiddenStates) != isinstance(twin, HiddenStates) or (
            isinstance(x, HiddenStates)
            and isinstance(twin, HiddenStates)
            and not x.head.same(twin.head)
            and (name != "student_text" or x.requires_grad)
        ):
            raise ValueError(
                f"{twin_name} and {name} are two views of one model and must both be logits, or both hidden states "
                "under one head (of the same tensors). Only student_text may be that of a frozen copy of the student, "
                "computed in torch.no_grad()"
            )
        if x.shape != twin.shape:
            raise ValueError(
                f"{twin_name} and {name} are rows of one head and must have one shape; got {tuple(twin.shape)} and "
                f"{tuple(x.shape)}"
            )
        if x.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"all logits must have the same rows, and may differ in their last dimension only; {first_name} is "
                f"{tuple(first.shape)} and {name} {tuple(x.shape)}: score the same response tokens in every view"
            )


def refuse_non_finite(names: Sequence[str]) -> None:
    """Raises ValueError that these views hold logits that are not finite; nothing where there are none."""
    if names:
        raise ValueError(
            f"logits must be finite in every response row; found NaN or infinity in {', '.join(names)}. If entries of "
            "the vocabulary are masked with -inf, pass the logits from before that mask"
        )


_View = TypeVar("_View", Tensor, HiddenStates, Tensor | HiddenStates)


def select_rows(mask_BT: Tensor, **logits_BTV: _View) -> dict[str, _View]:
    """The rows of each ``(B, T, V)`` view where the mask is True, ``(N, V)``, by the same names.

    Rows are dropped before anything is computed from them: a NaN in a row of weight zero would survive the weight.
    """
    if mask_BT.dtype != torch.bool:
        raise TypeError(f"mask_BT must be bool, True at response tokens; got {mask_BT.dtype}: pass mask.bool()")
    for name, x in logits_BTV.items():
        if mask_BT.ndim != 2 or len(x.shape) != 3 or x.shape[:2] != mask_BT.shape:
            raise ValueError(
                f"mask_BT must be (B, T) and {name} (B, T, V) with the same B and T; got {tuple(mask_BT.shape)} and "
                f"{tuple(x.shape)}"
            )
        if x.device != mask_BT.device:
            raise ValueError(f"mask_BT and {name} must be on one device; got {mask_BT.device} and {x.device}")
    return {name: x[mask_BT] for name, x in logits_BTV.items()}


def check_temperature(temperature: float) -> None:
    """Raises ValueError where ``temperature`` is not a positive finite number."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature}")


def check_floor(floor: float | None) -> None:
    """Raises ValueError where ``floor`` is neither None nor a probability inside (0, 1)."""
    if floor is not None and not 0 < floor < 1:
        raise ValueError(f"floor must be a probability inside (0, 1), or None for no floor; got {floor}")
