"""Rows of logits computed a chunk at a time, and the gradients at hidden states and head.

Gradients are computed while the logits of a chunk exist, and are passed on in the backward pass.

Dimensions: ``N`` rows, ``C`` rows of a chunk, ``V`` vocabulary entries, ``d`` hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steer_optim.vlm.heads import HiddenStates

# A tensor's address, shape and strides, and the dtype it was cast to.
Place = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


class Rows:
    """The logits of ``N`` rows divided by a temperature, and the gradients at the tensors they are computed from.

    ``view`` is hidden states ``(N, d)``, or logits ``(N, V)``, which receive no gradient. The logits have ``dtype``,
    float32 or float64, and the first ``vocabulary`` ids. Rows that share ``casts`` cast a head once. ``inputs`` are the
    tensors that can receive a gradient.
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
        self._dtype = torch.promote_types(view.dtype, dtype)
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
                    "FSDP2 has resharded the head since its hidden states were computed: compute the losses before any "
                    "backward pass, or other forward pass, of the model"
                )

    def __len__(self) -> int:
        return self._view.shape[0]

    @torch.no_grad()
    def logits(self, part: slice) -> Tensor:
        """Return the logits of some rows, ``(C, V)``, without graph. The next call overwrites them."""
        C = part.stop - part.start
        if self._space_CV is None or len(self._space_CV) < C:
            self._space_CV = torch.empty(C, self.V, dtype=self._dtype, device=self.device)
        out_CV, view = self._space_CV[:C], self._view
        if isinstance(view, Tensor):
            return out_CV.copy_(view[part]).mul_(self._factor)  # in the dtype of the result
        x_Cd, head = view.hidden_BTd[part], view.head
        with torch.autocast(self.device.type, enabled=False):  # it would round the adapter's product
            x, w = self._operands(x_Cd, head.weight_Vd)
            _add_product(out_CV, x, w.T, keep=False)
            if head.lora_B_Vr is not None:
                x, w = self._operands(head.adapt(x_Cd.to(self._dtype)), head.lora_B_Vr)
                _add_product(out_CV, x, w.T)
        if head.bias_V is not None:
            out_CV += head.bias_V
        if self._factor != 1:
            out_CV *= self._factor
        if head.softcap is not None:
            cap = head.softcap / self._temperature
            out_CV.div_(cap).tanh_().mul_(cap)
        return out_CV

    def finite(self, size: int) -> bool:
        """Return whether all logits are finite."""
        return all(bool(self.logits(part).isfinite().all()) for part in chunks(self, size))

    @torch.no_grad()
    def pull(self, part: slice, logits_CV: Tensor, gradient_CV: Tensor, into: Gradients) -> None:
        """Add the gradient at the inputs, given that at the logits of some rows, which is overwritten."""
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

    def _pull(
        self, gradient_Cn: Tensor, x_Ck: Tensor, w_nk: Tensor, dx_Ck: Tensor | None, dw_nk: Tensor | None
    ) -> None:
        """Add the gradients at both factors of ``x w^T``, for those that are not None."""
        x_Ck, w_nk = self._operands(x_Ck, w_nk, gradient=True)
        gradient_Cn = gradient_Cn.to(x_Ck.dtype)
        if dx_Ck is not None:
            _add_product(dx_Ck, gradient_Cn, w_nk)
        if dw_nk is not None:
            _add_product(dw_nk, gradient_Cn.T, x_Ck)

    def _operands(self, x: Tensor, w: Tensor, *, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Return both factors in a dtype whose product has the dtype of the logits.

        A CPU returns half-precision products in half precision, and no device returns them in float64, so both factors
        are upcast there. So are the factors of a gradient in float16, in which a token's share would underflow. Under
        autocast the model's own head would multiply in half precision, and so does this one.
        """
        keep = (torch.bfloat16,) if gradient else (torch.bfloat16, torch.float16)
        half = self._view.autocast if isinstance(self._view, HiddenStates) else None
        dtype = half or (x.dtype if x.dtype == w.dtype else self._dtype)
        widens = x.is_cuda and self._dtype == torch.float32 and hasattr(torch.ops.aten.mm, "dtype")
        if not (widens and dtype in keep):
            dtype = self._dtype
        if w.dtype != dtype:
            place = (w.data_ptr(), w.shape, w.stride(), dtype)  # not id: views may have detached the same head
            if place not in self._casts:
                self._casts[place] = w.to(dtype)
            w = self._casts[place]
        return x.to(dtype), w


def default_size(views: int, device: torch.device) -> int:
    """Return how many rows of each view pass a head at once, by default."""
    return (384 if device.type == "cpu" else 3072) // views


def chunks(rows: Rows, size: int) -> Iterator[slice]:
    """Yield slices of the rows, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield slice(start, min(start + size, len(rows)))


class Gradients:
    """The gradients of one scalar with respect to its inputs, summed before its backward pass.

    ``inputs`` that need no gradient are ignored, all of them under ``torch.no_grad``. Sums are in ``dtype``, float32 or
    float64: in half precision the sum over chunks would stop growing, and small gradients would underflow before a
    gradient scaler's factor is applied.
    """

    def __init__(self, inputs: Iterable[Tensor], dtype: torch.dtype) -> None:
        needed = (x for x in inputs if x.requires_grad and torch.is_grad_enabled())
        self._inputs = list({id(x): x for x in needed}.values())
        self._totals = {id(x): torch.zeros(x.shape, dtype=dtype, device=x.device) for x in self._inputs}

    def __bool__(self) -> bool:
        return bool(self._inputs)

    def of(self, x: Tensor) -> Tensor | None:
        """Return the sum for the gradient of ``x``; None if it needs none."""
        return self._totals.get(id(x))

    def attach(self, value: Tensor) -> Tensor:
        """Return the scalar ``value`` with these gradients."""
        apply: Callable[..., Tensor] = _Attach.apply
        return apply(value, [*self._totals.values()], *self._inputs)


class _Attach(torch.autograd.Function):
    """A scalar whose gradients are already known."""

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
                # Multiply before the cast: a gradient scaler's factor prevents underflow in half precision.
                found.append((incoming * x).to(dtype) if needed else None)
        if twice:
            once: Callable[..., Tensor] = _Once.apply
            found = [None if x is None else once(x.requires_grad_()) for x in found]
        return None, None, *found


class _Once(torch.autograd.Function):
    """A gradient that raises if it is differentiated, also where ``once_differentiable`` returns a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> Tensor:
        raise RuntimeError(
            "losses of hidden states have first derivatives only: to differentiate twice, pass logits "
            "(HiddenStates.logits())"
        )


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, keep: bool = True) -> None:
    """Write ``a b`` to ``out``, or add it if ``keep``, in the dtype of ``out`` even for factors in half precision."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=1 if keep else 0, out=out)
    elif keep:
        out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        out.copy_(torch.mm(a, b, out_dtype=out.dtype))
