"""Rows of logits computed a chunk at a time, and the way back from their gradients to hidden states and head.

Gradients are taken while a chunk is at hand, so that its logits can be forgotten, and are handed on in the backward
pass.

Dimensions: ``N`` rows, ``C`` rows of a chunk, ``V`` vocabulary entries, ``d`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steer_optim.vlm.heads import HiddenStates

# The memory of a tensor, where it begins, its shape and its strides, and the dtype that it was cast to.
Place = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


class Rows:
    """The logits of ``N`` rows divided by a temperature, and the gradients that reach what they are made of.

    Args:
        view: hidden states ``(N, d)``, or logits ``(N, V)``, which receive no gradient.
        temperature: all logits are divided by it.
        dtype: of the logits, float32 or float64.
        vocabulary: how many ids are read; all by default.
        casts: tensors that this and other rows have cast, by their memory and dtype; a head is cast once.

    Attributes:
        inputs: what gradients can reach.
    """

    def __init__(
        self,
        view: Tensor | HiddenStates,
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float32,
        vocabulary: int | None = None,
        casts: MutableMapping[Place, Tensor] | None = None,
    ) -> None:
        self.V = vocabulary or view.shape[-1]
        self.device = view.device
        self._N, self._dtype = view.shape[0], torch.promote_types(view.dtype, dtype)
        self._factor, self._temperature = 1 / temperature, temperature
        self._casts: MutableMapping[Place, Tensor] = {} if casts is None else casts
        self._space_CV: Tensor | None = None
        self._view = view[:, : self.V] if isinstance(view, Tensor) else replace(view, head=view.head.cut(self.V))
        self.inputs: list[Tensor] = []
        if isinstance(self._view, HiddenStates):
            self._factor *= self._view.head.scale
            self.inputs = [self._view.hidden_BTd, *self._view.head.tensors().values()]
            if any(x.numel() and not x.untyped_storage().size() for x in self.inputs):
                raise RuntimeError(
                    "FSDP2 has sharded the head again since its hidden states were computed: compute the losses before "
                    "any backward pass, or further forward pass, of the model"
                )

    def __len__(self) -> int:
        return self._N

    @torch.no_grad()
    def logits(self, part: slice) -> Tensor:
        """The logits of some rows, ``(C, V)``, in memory that the next call writes over. Takes no gradient."""
        C = part.stop - part.start
        if self._space_CV is None or len(self._space_CV) < C:
            self._space_CV = torch.empty(C, self.V, dtype=self._dtype, device=self.device)
        out_CV, view = self._space_CV[:C], self._view
        if isinstance(view, Tensor):
            return torch.mul(view[part], self._factor, out=out_CV)
        x_Cd, head = view.hidden_BTd[part], view.head
        self._multiply(out_CV, x_Cd, head.weight_Vd, keep=False)
        if head.lora_B_Vr is not None:
            self._multiply(out_CV, head.adapt(x_Cd.to(self._dtype)), head.lora_B_Vr)
        if head.bias_V is not None:
            out_CV += head.bias_V
        if self._factor != 1:
            out_CV *= self._factor
        if head.softcap is not None:
            cap = head.softcap / self._temperature
            out_CV.div_(cap).tanh_().mul_(cap)
        return out_CV

    def finite(self, size: int) -> bool:
        """Whether all logits are."""
        return all(bool(self.logits(part).isfinite().all()) for part in chunks(self, size))

    @torch.no_grad()
    def pull(self, part: slice, logits_CV: Tensor, gradient_CV: Tensor, into: Gradients) -> None:
        """Adds what a gradient at the logits of some rows comes to at the inputs; writes over it."""
        assert isinstance(self._view, HiddenStates)
        x_Nd, head = self._view.hidden_BTd, self._view.head
        if head.softcap is not None:
            gradient_CV.mul_(1 - (logits_CV * self._temperature / head.softcap).square())
        if self._factor != 1:
            gradient_CV.mul_(self._factor)
        x_Cd, dx_Nd = x_Nd[part], into.of(x_Nd)
        dx_Cd = None if dx_Nd is None else dx_Nd[part]
        self._pull(gradient_CV, x_Cd, head.weight_Vd, dx_Cd, into.of(head.weight_Vd))
        if head.lora_A_rd is not None and head.lora_B_Vr is not None:
            inner_Cr = head.adapt(x_Cd.to(self._dtype))
            dinner_Cr = torch.zeros_like(inner_Cr)
            self._pull(gradient_CV, inner_Cr, head.lora_B_Vr, dinner_Cr, into.of(head.lora_B_Vr))
            self._pull(dinner_Cr.mul_(head.lora_scaling), x_Cd, head.lora_A_rd, dx_Cd, into.of(head.lora_A_rd))
        if head.bias_V is not None and (db_V := into.of(head.bias_V)) is not None:
            db_V += gradient_CV.sum(0)

    def _multiply(self, out_Cn: Tensor, x_Ck: Tensor, w_nk: Tensor, *, keep: bool = True) -> None:
        x_Ck, w_nk = self._operands(x_Ck, w_nk)
        _add_product(out_Cn, x_Ck, w_nk.T, keep=keep)

    def _pull(
        self, gradient_Cn: Tensor, x_Ck: Tensor, w_nk: Tensor, dx_Ck: Tensor | None, dw_nk: Tensor | None
    ) -> None:
        """Adds what a gradient at ``x w^T`` comes to at both factors, where that is asked for."""
        x_Ck, w_nk = self._operands(x_Ck, w_nk, gradient=True)
        gradient_Cn = gradient_Cn.to(x_Ck.dtype)
        if dx_Ck is not None:
            _add_product(dx_Ck, gradient_Cn, w_nk)
        if dw_nk is not None:
            _add_product(dw_nk, gradient_Cn.T, x_Ck)

    def _operands(self, x: Tensor, w: Tensor, *, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Both factors in one dtype, from which a product comes out in the dtype of the logits.

        A CPU multiplies half precision into half precision only, and no device into float64, so that both are upcast
        there. So are the factors of a gradient in float16, in which a token's share of it would underflow. Under
        autocast the model's own head would multiply in half precision, and so does this one.
        """
        keep = (torch.bfloat16,) if gradient else (torch.bfloat16, torch.float16)
        half = self._view.autocast if isinstance(self._view, HiddenStates) else None
        dtype = half or (x.dtype if x.dtype == w.dtype else self._dtype)
        widens = x.is_cuda and self._dtype == torch.float32 and hasattr(torch.ops.aten.mm, "dtype")
        if not (widens and dtype in keep):
            dtype = self._dtype
        if w.dtype != dtype:
            place = (w.data_ptr(), w.shape, w.stride(), dtype)  # views may have detached the one head, each by itself
            if place not in self._casts:
                self._casts[place] = w.to(dtype)
            w = self._casts[place]
        return x.to(dtype), w


def default_size(views: int, device: torch.device) -> int:
    """How many rows of each view meet a head at once: on a CPU 384 in all views together, 3072 on an accelerator."""
    return (384 if device.type == "cpu" else 3072) // views


def chunks(rows: Rows, size: int) -> Iterator[slice]:
    """Slices of the rows, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield slice(start, min(start + size, len(rows)))


class Gradients:
    """The gradients of one scalar with respect to its inputs, added up before the backward pass that asks for them.

    Args:
        inputs: what the scalar depends on; tensors that need no gradient are passed over, and none needs one in
            ``torch.no_grad``.
        dtype: to add up in, float32 or float64. In half precision the sum over chunks would stop growing, and small
            gradients would underflow before a gradient scaler's factor comes in.
    """

    def __init__(self, inputs: Iterable[Tensor], dtype: torch.dtype) -> None:
        needed = (x for x in inputs if x.requires_grad and torch.is_grad_enabled())
        self._inputs = list({id(x): x for x in needed}.values())
        self._totals = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in self._inputs]
        self._by_id = {id(x): total for x, total in zip(self._inputs, self._totals, strict=True)}

    def __bool__(self) -> bool:
        return bool(self._inputs)

    def of(self, x: Tensor) -> Tensor | None:
        """Where the gradient of ``x`` is added up; None where it needs none."""
        return self._by_id.get(id(x))

    def attach(self, value: Tensor) -> Tensor:
        """The scalar ``value`` with these gradients."""
        if not self._inputs:
            return value
        apply: Callable[..., Tensor] = _Attach.apply
        return apply(value, self._totals, *self._inputs)


class _Attach(torch.autograd.Function):
    """A scalar whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [x.dtype for x in inputs]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        twice = torch.is_grad_enabled()
        found: list[Tensor | None] = []
        with torch.no_grad():
            for x, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[2:], strict=True):
                # Multiplied before the cast: a gradient scaler's factor lifts what half precision cannot hold.
                found.append((incoming * x).to(dtype) if needed else None)
        if twice:
            once: Callable[..., Tensor] = _Once.apply
            found = [None if x is None else once(x.requires_grad_()) for x in found]
        return None, None, *found


class _Once(torch.autograd.Function):
    """A gradient that cannot be differentiated, and must not pass for a constant when it is."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        raise RuntimeError(
            "the losses of hidden states have first derivatives only, computed in their forward pass: to "
            "differentiate twice, pass logits (HiddenStates.logits()), which are differentiated by autograd"
        )


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, keep: bool = True) -> None:
    """``out = a b``, added to what ``out`` was if ``keep``, in the dtype of ``out`` though factors are half."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=1 if keep else 0, out=out)
    elif keep:
        out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        out.copy_(torch.mm(a, b, out_dtype=out.dtype))
