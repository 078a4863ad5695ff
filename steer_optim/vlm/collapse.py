"""The student's probabilities of a few ids and of all others together, without an ``(N, V)`` intermediate.

:mod:`steer_optim.vlm.topk` says what for. Logits are widened, or computed from hidden states, a chunk of tokens at a
time, and once more in the backward pass.

Dimensions: ``V`` vocabulary entries, ``k`` slots for ids, ``N`` tokens with an id, ``C`` tokens of a chunk, ``M`` ids
of a chunk, ``d`` hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steer_optim.vlm.heads import HiddenStates
from steer_optim.vlm.rows import Gradients, Place, Rows

# The log-probability of a slot without an id: its mass is zero in every floating type, so that neither a divergence
# nor the target of `vis` sees it, and where -inf would give NaN, differences of it are zero.
ABSENT = -1e4


def collapse(student_BTV: Tensor | HiddenStates, ids_BTk: Tensor) -> Tensor:
    """The student's collapsed log-probabilities: those of the ids, and that of all others together, differentiable.

    The tail is summed over its entries and not taken as a difference, so that its gradient is right however small it
    is. From hidden states nothing of the size ``(N, V)`` is ever held; from logits their rows and their gradient.

    Args:
        student_BTV: ``(..., V)``, floating, the student's logits of one view, or hidden states.
        ids_BTk: ``(..., k)``, int64, without duplicates in a row; -1 where a slot holds none. Logits of tokens
            without ids are not read.

    Returns:
        ``(..., k + 1)``, float32 or float64, the tail last. Not finite where the logits are not, which the losses
        refuse.

    Raises:
        TypeError: the logits are not floating, or the ids not int64.
        ValueError: shapes or devices do not fit each other; an id occurs twice in a row or is out of range.

    Example:
        The losses of a teacher that scored the ids 1 and 4.

        >>> import torch
        >>> from steer_optim.vlm import token_losses
        >>> from steer_optim.vlm.topk import with_tail
        >>> student, student_text = torch.randn(2, 3, 7, requires_grad=True)
        >>> teacher, teacher_text = torch.tensor([[0.5, 0.3], [0.2, 0.3]]).log().unsqueeze(1).expand(2, 3, 2)
        >>> ids = torch.tensor([1, 4]).expand(3, 2)
        >>> losses = token_losses(
        ...     collapse(student, ids),
        ...     collapse(student_text, ids),
        ...     with_tail(teacher, ids),
        ...     with_tail(teacher_text, ids),
        ... )
        >>> losses.vis.mean().backward()
    """
    check_ids(ids_BTk, student_BTV.shape[-1])
    if student_BTV.shape[:-1] != ids_BTk.shape[:-1] or student_BTV.device != ids_BTk.device:
        raise ValueError(
            "the student and ids_BTk must have the same tokens on one device, and may differ in their last dimension "
            f"only; got {tuple(student_BTV.shape)} on {student_BTV.device} and {tuple(ids_BTk.shape)} on "
            f"{ids_BTk.device}"
        )
    ids_Rk = ids_BTk.flatten(0, -2) if ids_BTk.ndim > 1 else ids_BTk.unsqueeze(0)
    token_N = (ids_Rk >= 0).any(dim=-1).nonzero().squeeze(-1)
    student = StudentRows(student_BTV, token_N)
    apply: Callable[..., Tensor] = _Collapse.apply
    collapsed_NK = apply(student, ids_Rk[token_N], *student.inputs)
    collapsed_RK = collapsed_NK.new_full((len(ids_Rk), ids_Rk.shape[-1] + 1), ABSENT)
    collapsed_RK[:, -1] = 0.0
    return collapsed_RK.index_copy(0, token_N, collapsed_NK).view(*ids_BTk.shape[:-1], ids_Rk.shape[-1] + 1)


class _Collapse(torch.autograd.Function):
    """Collapsed log-probabilities of rows, whose logits are computed anew in the backward pass.

    With the softmax ``s`` of the tail's own logits, its log-probability ``L`` and the sum ``G`` of the incoming
    gradient ``g``, the gradient is ``g_i - G exp(L_i)`` at id ``i`` and ``s (g_tail - G exp(L_tail))`` elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, student: StudentRows, ids_Nk: Tensor, *inputs: Tensor) -> Tensor:
        N, k = ids_Nk.shape
        collapsed_NK = torch.empty(N, k + 1, dtype=student.dtype, device=ids_Nk.device)
        rest_N1 = collapsed_NK.new_empty(N, 1)
        for part, logits_CV in student.chunks():
            slot_M, entry_M = _entries(ids_Nk[part])
            known_Ck = logits_CV.new_full(ids_Nk[part].shape, -torch.inf)
            known_Ck[slot_M] = logits_CV[entry_M]
            logits_CV[entry_M] = -torch.inf
            rest_N1[part] = rest_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
            bins_CK = torch.cat([known_Ck, rest_C1], dim=-1)
            bins_CK -= bins_CK.logsumexp(dim=-1, keepdim=True)
            collapsed_NK[part] = bins_CK.masked_fill(_absent(ids_Nk[part], rest_C1), ABSENT)
        ctx.student = student
        ctx.save_for_backward(ids_Nk, collapsed_NK, rest_N1, *inputs)
        return collapsed_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, ...]:
        # Unpacking the inputs too is what refuses a head that was updated between the passes.
        ids_Nk, collapsed_NK, rest_N1, *_ = ctx.saved_tensors
        student, needed = ctx.student, ctx.needs_input_grad[2:]
        with torch.enable_grad():
            totals = Gradients([x for x, need in zip(student.inputs, needed, strict=True) if need], student.sum_dtype)
        for part, logits_CV in student.chunks():
            slot_M, entry_M = _entries(ids_Nk[part])
            rest_C1 = rest_N1[part]
            g_CK = grad_NK[part].masked_fill(_absent(ids_Nk[part], rest_C1), 0.0)
            g_CK = g_CK - g_CK.sum(dim=-1, keepdim=True) * collapsed_NK[part].exp()
            # An empty tail has no entry to hand a gradient to; its logarithm must not make one up.
            tail_CV = (logits_CV - rest_C1.masked_fill(rest_C1 == -torch.inf, torch.inf)).exp_()
            tail_CV *= g_CK[:, -1:]
            tail_CV[entry_M] = g_CK[:, :-1][slot_M]
            student.pull(part, logits_CV, tail_CV, totals)
        sums = ((totals.of(x), x.dtype) for x in student.inputs)
        return None, None, *(None if total is None else total.to(dtype) for total, dtype in sums)


class StudentRows:
    """The logits of some tokens of one view, a chunk at a time, and the way back from their gradients.

    Attributes:
        inputs: what gradients can reach.
        dtype: of the logits, float32 or float64.
        sum_dtype: in which the gradients of the inputs are added up.
    """

    def __init__(self, view_BTV: Tensor | HiddenStates, token_N: Tensor) -> None:
        view_NV = _flat(view_BTV)[token_N]
        self.dtype = torch.promote_types(view_NV.dtype, torch.float32)
        self._upcast: dict[Place, Tensor] = {}
        self._rows = Rows(view_NV, dtype=self.dtype, upcast=self._upcast)
        self._shape = view_NV.shape
        if isinstance(view_NV, Tensor):
            self.inputs, self.sum_dtype = [view_NV], view_NV.dtype
        else:
            self.inputs, self.sum_dtype = self._rows.inputs, self.dtype

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the tokens and their logits ``(C, V)``, which the next chunk overwrites."""
        N, V = self._shape
        C = min(N, 128 if self.inputs[0].device.type == "cpu" else 1024)
        space_CV = torch.empty(C, V, dtype=self.dtype, device=self.inputs[0].device)
        for start in range(0, N, max(C, 1)):
            part = slice(start, min(start + C, N))
            logits_CV = space_CV[: part.stop - start]
            self._rows.logits(part, logits_CV)
            yield part, logits_CV
        self._upcast.clear()  # a head in another dtype is not held until the backward pass

    def pull(self, part: slice, logits_CV: Tensor, gradient_CV: Tensor, totals: Gradients) -> None:
        """Adds what a gradient at the logits of some tokens comes to at the inputs."""
        if not self._rows.inputs:
            if (total_NV := totals.of(self.inputs[0])) is not None:
                total_NV[part] = gradient_CV
            return
        if self._rows.cap is not None:
            gradient_CV *= 1 - (logits_CV / self._rows.cap).square()
        self._rows.pull(part, gradient_CV, totals)


def _flat(view: Tensor | HiddenStates) -> Tensor | HiddenStates:
    """The same with one dimension of rows."""
    if isinstance(view, Tensor):
        if not view.is_floating_point():
            raise TypeError(f"the student's logits must be floating; got {view.dtype}")
        return view.reshape(-1, view.shape[-1])
    return replace(view, hidden_BTd=view.hidden_BTd.reshape(-1, view.hidden_BTd.shape[-1]))


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
            f"; found {int(ids.min())} to {int(ids.max())}: put -1 for an id that the student does not have, in all "
            "that is collapsed, and its mass is in the tail"
        )
    if twice:
        raise ValueError(
            "ids must not occur twice in a row, or their mass counts twice; found duplicates: put -1 for all but one"
        )


def _entries(ids_Ck: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Where the ids of a chunk are: as indices of its slots ``(C, k)`` and of its logits ``(C, V)``."""
    row_M, slot_M = (ids_Ck >= 0).nonzero(as_tuple=True)
    return (row_M, slot_M), (row_M, ids_Ck[row_M, slot_M])


def _absent(ids_Ck: Tensor, rest_C1: Tensor) -> Tensor:
    """Which of the ``k + 1`` bins hold no entry of the vocabulary."""
    return torch.cat([ids_Ck < 0, rest_C1 == -torch.inf], dim=-1)
