"""One scalar for all components, whose backward pass steers: for loops that call ``loss.backward()``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def join(losses: Sequence[Tensor], backward: Callable[..., object]) -> Tensor:
    """Return the sum of some losses; its backward pass calls ``backward(scale=..., retain_graph=...)``."""
    apply: Callable[..., Tensor] = _Join.apply
    return apply(torch.zeros((), requires_grad=torch.is_grad_enabled()), losses, backward)


class _Join(torch.autograd.Function):
    """Detach the sum from the graphs of the losses, which are backpropagated one by one instead."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, losses: Sequence[Tensor], backward: Callable[..., object]) -> Tensor:
        """Return the sum; ``anchor`` only makes it require grad."""
        ctx.steer = backward
        # Saved only because autograd frees it with the graph, so that a second backward pass raises.
        ctx.save_for_backward(anchor)
        if not losses:
            return torch.zeros(())
        dtype = functools.reduce(torch.promote_types, (loss.dtype for loss in losses))
        first, *others = (loss.detach().reshape(()).to(losses[0].device, dtype) for loss in losses)
        return sum(others, first.clone())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[None, None, None]:
        """Steer; the anchor gets no gradient."""
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True is not supported: the steered gradients have no graph of their own")
        _ = ctx.saved_tensors
        ctx.steer(scale=scale, retain_graph=torch._C._autograd._get_current_graph_task_keep_graph())
        return None, None, None
