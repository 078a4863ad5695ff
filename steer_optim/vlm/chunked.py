"""The decomposed losses from hidden states, a chunk of rows at a time: no ``(N, V)`` tensor is ever held.

Every loss is ``KL(softmax a || softmax b)`` for logits ``a`` of the student and ``b`` of a target, whose gradient with
respect to ``a`` is ``p (log(p / q) - KL)``. So the forward pass also computes the gradients with respect to hidden
states and heads, chunk by chunk, each token weighted with what the caller's mean gives it, and the backward pass of a
component multiplies them by the gradient that comes in. :func:`~steer_optim.vlm.losses.token_losses` is the oracle.

Dimensions: ``N`` rows, ``C`` rows of a chunk, ``V`` vocabulary entries, ``d`` hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor

from steer_optim.vlm.heads import HiddenStates
from steer_optim.vlm.losses import check_floor, check_temperature, check_views, refuse_non_finite
from steer_optim.vlm.rows import Gradients, Place, Rows

# Where intermediates of a block of rows are written; fresh tensors are what a compiler fuses best.
_Scratch = Sequence[Tensor | None]
_FRESH: _Scratch = (None,) * 4

# The student's view whose distribution is on the left of the divergence, and the target on its right.
_DIVERGENCES = {
    "std": ("student", "teacher"),
    "vis": ("student", "target"),
    "lang": ("student_text", "teacher_text"),
    "vp": ("student_text", "target"),
}


class ChunkedLosses:
    """The losses of :func:`~steer_optim.vlm.losses.token_losses`, summed with weights, from hidden states.

    Args:
        views: ``student`` and ``teacher``, and for everything but ``std`` also ``student_text`` and
            ``teacher_text``, by name: hidden states ``(..., d)``, those of one model under one head; ``student_text``
            may be that of a frozen copy, under its own. The teacher's may be logits ``(..., V')``. The vocabularies
            are cut to the common ids.
        temperature: as of ``token_losses``, like the two that follow.
        detach_prior: whether ``p_tx`` is a constant in ``q*``.
        floor: on the teacher's probabilities before its visual gain is taken.
        chunk_size: how many rows meet a head at once. By default 128 on a CPU, 1024 on an accelerator.
        compile: whether ``torch.compile`` fuses what happens to the logits of a chunk.

    Raises:
        TypeError, ValueError: as ``token_losses``; the student's views are logits, or have two heads.

    Example:
        >>> import torch
        >>> from steer_optim.vlm.heads import Head, HiddenStates
        >>> head = Head(torch.randn(7, 4, requires_grad=True))
        >>> views = {name: HiddenStates(torch.randn(5, 4), head) for name in ("student", "student_text")}
        >>> views |= {name: HiddenStates(torch.randn(5, 4), head) for name in ("teacher", "teacher_text")}
        >>> losses = ChunkedLosses(views)
        >>> components = losses.weighted({"std": torch.full((5,), 1 / 5), "vis": torch.full((5,), 1 / 5)})
        >>> components["vis"].backward()
        >>> head.weight_Vd.grad.shape
        torch.Size([7, 4])
    """

    def __init__(
        self,
        views: Mapping[str, Tensor | HiddenStates],
        *,
        temperature: float = 1.0,
        detach_prior: bool = True,
        floor: float | None = None,
        chunk_size: int | None = None,
        compile: bool = False,
    ) -> None:
        check_temperature(temperature)
        check_floor(floor)
        check_chunk_size(chunk_size)
        self._views = _flat(views)
        self._V = next(iter(self._views.values())).shape[-1]
        self._device = next(iter(self._views.values())).device
        self._chunk_size = chunk_size or (128 if self._device.type == "cpu" else 1024)
        self._temperature, self._detach_prior, self._compile = temperature, detach_prior, compile
        self._log_floor = None if floor is None else math.log(floor)
        self._vds_N: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Float32 or float64, of everything that is computed."""
        dtypes = (view.dtype for view in self._views.values())
        return reduce(torch.promote_types, dtypes, torch.float32)

    @property
    def vds_N(self) -> Tensor:
        """The visual dependency score of each row, ``KL(q || q_tx)``; known already after ``vis``, all rows read."""
        if self._vds_N is None:
            self._pass({}, None)
        assert self._vds_N is not None
        return self._vds_N

    def weighted(self, weights: Mapping[str, Tensor], *, where: Tensor | None = None) -> dict[str, Tensor]:
        """The sums over rows of ``weight * loss``, each with a backward pass of its own.

        Args:
            weights: ``(N,)`` by the name of the loss: ``std``, ``vis``, ``lang`` or ``vp``. Constants.
            where: ``(N,)``, bool: the only rows that are read; all by default.

        Returns:
            Scalars by name, float32 or float64.

        Raises:
            ValueError: logits are not finite.
        """
        # In one pass the target of one loss takes the place of the teacher's text-only logits.
        passes = (("std", "vis"), ("lang",), ("vp",)) if "vis" in weights else (("std", "lang"), ("vp",))
        losses: dict[str, Tensor] = {}
        for names in passes:
            if asked := {name: weights[name] for name in names if name in weights}:
                losses |= self._pass(asked, where)
        return {name: losses[name] for name in weights}

    def _pass(self, weights: Mapping[str, Tensor], where: Tensor | None) -> dict[str, Tensor]:
        """One pass over the chunks. Scores the rows on its way where both views of the teacher are there."""
        score = self._vds_N is None and where is None and "teacher_text" in self._views
        read = {name for loss in weights for name in _DIVERGENCES[loss]}
        read |= {"teacher", "teacher_text"} if score or "target" in read else set()
        read |= {"student_text"} if "target" in read else set()
        dtype = self.dtype
        views = {name: view if where is None else view[where] for name, view in self._views.items() if name in read}
        weights = {name: (w if where is None else w[where]).detach().to(dtype) for name, w in weights.items()}
        upcast: dict[Place, Tensor] = {}
        rows = {
            name: Rows(view, temperature=self._temperature, dtype=dtype, upcast=upcast) for name, view in views.items()
        }
        gradients = {}
        for loss in weights:
            view, right = _DIVERGENCES[loss]
            reached = {view, "student_text"} if right == "target" and not self._detach_prior else {view}
            gradients[loss] = Gradients([x for name in sorted(reached) for x in rows[name].inputs], dtype)

        N = len(next(iter(rows.values())))
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            kls = {name: torch.zeros(N, dtype=dtype, device=self._device) for name in (*weights, "vds")}
            C = self._chunk_size if self._compile else min(self._chunk_size, N)
            # Zeros: where chunks are padded, what no row has written is computed with as well.
            names = [name for name in ("teacher", "teacher_text") if name in rows] + ["student"] * bool(weights)
            space = {name: torch.zeros(C, self._V, dtype=dtype, device=self._device) for name in names}
            for start in range(0, N, max(C, 1)):
                part = slice(start, min(start + C, N))
                used = C if self._compile else part.stop - start
                chunk = {name: x[:used] for name, x in space.items()}
                self._chunk(part, chunk, rows, weights, gradients, kls)
            if not torch.stack([*kls.values()]).isfinite().all():
                self._refuse(rows, next(iter(space.values())))
        if score:
            self._vds_N = kls["vds"]
        return {loss: total.attach((weights[loss] * kls[loss]).sum()) for loss, total in gradients.items()}

    def _chunk(
        self,
        part: slice,
        right: dict[str, Tensor],
        rows: Mapping[str, Rows],
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Gradients],
        kls: Mapping[str, Tensor],
    ) -> None:
        """Writes the divergences of some rows, and adds their gradients; in the space of three ``(C, V)`` tensors."""
        n = part.stop - part.start
        run = _compiled if self._compile else _by_blocks
        for name in rows.keys() & {"teacher", "teacher_text"}:
            rows[name].logits(part, right[name])
        to_target = any(_DIVERGENCES[loss][1] == "target" for loss in weights)
        if {"teacher", "teacher_text"} <= rows.keys():
            options = {"log_floor": self._log_floor, "write": to_target}
            kls["vds"][part] = run(_visual_gain, right["teacher"], right["teacher_text"], **options)[:n]
        if to_target:
            right["target"] = right["teacher_text"]
            rows["student_text"].logits(part, right["student"])
            right["target"] += right["student"]

        for view in ("student", "student_text"):
            losses = [loss for loss in weights if _DIVERGENCES[loss][0] == view]
            if not losses:
                continue
            left = right["student"]
            rows[view].logits(part, left)
            last = gradients[losses[-1]]
            prior = not self._detach_prior and _DIVERGENCES[losses[-1]][1] == "target" and bool(last)
            pairs = [
                x for loss in losses for x in (right[_DIVERGENCES[loss][1]], _padded(weights[loss][part], len(left)))
            ]
            values = run(_divergences, left, *pairs, cap=rows[view].cap, prior=prior, write=bool(last))
            for loss, value, gradient in zip(losses, values, pairs[::2], strict=True):
                kls[loss][part] = value[:n]
                rows[view].pull(part, gradient[:n], gradients[loss])
            if prior:
                text = rows["student_text"]
                if text.cap is not None:
                    text.logits(part, right["teacher"])
                    left *= 1 - (right["teacher"] / text.cap) ** 2
                text.pull(part, left[:n], last)

    def _refuse(self, rows: Mapping[str, Rows], space_CV: Tensor) -> None:
        """Names the views whose logits are not finite; the divergences of others may overflow, as in the oracle."""
        culprits = []
        for name in sorted(rows):
            for start in range(0, len(rows[name]), len(space_CV)):
                part = slice(start, min(start + len(space_CV), len(rows[name])))
                rows[name].logits(part, space_CV)
                if not space_CV[: part.stop - start].isfinite().all():
                    culprits.append(name)
                    break
        refuse_non_finite(culprits)


def check_chunk_size(chunk_size: int | None) -> None:
    """Raises ValueError where ``chunk_size`` is neither None nor at least 1."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, or None for the default; got {chunk_size}")


def _flat(views: Mapping[str, Tensor | HiddenStates]) -> dict[str, Tensor | HiddenStates]:
    """The views as rows over their common vocabulary."""
    check_views(**views)
    V = min(view.shape[-1] for view in views.values())
    flat: dict[str, Tensor | HiddenStates] = {}
    for name, view in views.items():
        student = name.startswith("student")
        if isinstance(view, HiddenStates):
            rows = HiddenStates(view.hidden_BTd.flatten(0, -2), view.head.cut(V))
            flat[name] = rows if student else rows.detach()
        elif student:
            raise ValueError(
                f"{name} is logits, and the losses need what they were computed from: pass HiddenStates, as "
                "response_states gives them, for the student too"
            )
        else:
            flat[name] = view.detach()[..., :V].flatten(0, -2)
    return flat


def _padded(x_n: Tensor, size: int) -> Tensor:
    return x_n if len(x_n) == size else torch.nn.functional.pad(x_n, (0, size - len(x_n)))


def _visual_gain(
    teacher_CV: Tensor, teacher_text_CV: Tensor, *, log_floor: float | None, write: bool, scratch: _Scratch = _FRESH
) -> Tensor:
    """``KL(q || q_tx)``, ``(C,)``; writes the visual gain ``log q - log q_tx`` over the text-only logits."""
    log_q = torch.log_softmax(teacher_CV, -1, out=scratch[0])
    log_qtx = torch.log_softmax(teacher_text_CV, -1, out=scratch[1])
    gain = torch.sub(log_q, log_qtx, out=scratch[2])
    vds_C = torch.mul(torch.exp(log_q, out=scratch[3]), gain, out=scratch[3]).sum(-1)
    if write and log_floor is not None:
        floored = torch.clamp(log_q, min=log_floor, out=scratch[2])
        gain = torch.sub(floored, torch.clamp(log_qtx, min=log_floor, out=scratch[3]), out=scratch[2])
    if write:
        teacher_text_CV.copy_(gain)
    return vds_C


def _divergences(
    student_CV: Tensor,
    *pairs: Tensor,
    cap: float | None,
    prior: bool,
    write: bool,
    scratch: _Scratch = _FRESH,
) -> Tensor:
    """``KL(p || softmax(target))`` for pairs of target logits and the weights of their rows, ``(losses, C)``.

    Writes over each target the weighted gradient with respect to the student's logits, before their soft-cap; and, for
    the last target if ``prior``, over the student's logits that with respect to the prior in the target.
    """
    log_p = torch.log_softmax(student_CV, -1, out=scratch[0])
    p = torch.exp(log_p, out=scratch[1])
    kls = []
    for i, (target_CV, weight_C) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        log_target = torch.log_softmax(target_CV, -1, out=scratch[2])
        log_ratio = torch.sub(log_p, log_target, out=scratch[3])
        product = torch.mul(p, log_ratio, out=scratch[3])
        kl_C1 = product.sum(-1, keepdim=True)
        kls.append(kl_C1[:, 0])
        if not write:
            continue
        gradient = torch.addcmul(product, p, kl_C1, value=-1, out=scratch[3])
        gradient = torch.mul(gradient, weight_C[:, None], out=scratch[3])
        if cap is not None:
            slope = 1 - (student_CV / cap) ** 2
            gradient = torch.mul(gradient, slope, out=scratch[3])
        target_CV.copy_(gradient)
        if prior and 2 * i + 2 == len(pairs):
            pull = torch.sub(torch.exp(log_target, out=scratch[2]), p, out=scratch[2])
            student_CV.copy_(torch.mul(pull, weight_C[:, None], out=scratch[2]))
    return torch.stack(kls)


def _by_blocks(function: Callable[..., Tensor], *rows: Tensor, **options: Any) -> Tensor:
    """``function`` on a few rows after the other, so that what it computes on the way is small and cached."""
    C, V = rows[0].shape
    entries = 2**20 if rows[0].device.type == "cpu" else 2**25
    size = max(1, min(C, entries // V))
    # One space for all blocks: allocators scatter so many short-lived tensors over far more memory than they take.
    space = [rows[0].new_empty(size, V) for _ in range(4)]
    parts = []
    for start in range(0, C, size):
        block = [x[start : start + size] for x in rows]
        parts.append(function(*block, scratch=[x[: len(block[0])] for x in space], **options))
    return torch.cat(parts, dim=-1)


def _compiled(function: Callable[..., Tensor], *rows: Tensor, **options: Any) -> Tensor:
    return _compile(function)(*rows, **options)


@cache
def _compile(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)
