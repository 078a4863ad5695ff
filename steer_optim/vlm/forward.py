"""The logits, or the hidden states before the head, that a model gives for one response.

Dimensions: ``B`` prompts, ``L`` prompt tokens, ``T`` response tokens, ``V`` vocabulary, ``d`` hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from steer_optim.vlm.heads import HiddenStates, states_before_head


def response_logits(model: nn.Module, batch: Mapping[str, Tensor], num_tokens: int) -> Tensor:
    """The logits that predict the response: row ``t`` is what the model says before it sees response token ``t``.

    Only these rows meet the head where the model takes ``logits_to_keep``. No cache is written, and rotary offsets that
    an earlier pass left on the model (Qwen's ``rope_deltas``) are neither read nor changed.

    Args:
        model: a transformers model; a wrapper that passes keywords on is fine.
        batch: what ``append_response`` gave.
        num_tokens: ``T``, the number of columns of the response.

    Returns:
        (B, T, V) logits in the model's dtype. Rows outside the response mask are finite and mean nothing.

    Raises:
        ValueError: the batch has no prompt before ``num_tokens`` tokens.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from steer_optim.vlm.forward import response_logits
        >>> class Echo(torch.nn.Module):
        ...     def forward(self, input_ids, use_cache):
        ...         return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 10))
        >>> logits_BTV = response_logits(Echo(), {"input_ids": torch.tensor([[5, 6, 3, 4]])}, 2)
        >>> logits_BTV.argmax(dim=-1)  # an echo predicts the token that it has just read
        tensor([[6, 3]])
    """
    logits: Tensor = _forward(model, batch, num_tokens).logits
    return logits[:, -(num_tokens + 1) : -1]


def response_states(model: nn.Module, batch: Mapping[str, Tensor], num_tokens: int) -> HiddenStates:
    """The twin of :func:`response_logits` that stops before the head: what the head would take, and the head.

    The pass is the model's own, whose head is handed no rows, so that no logits are computed or held. In the first
    pass of a model it is handed one row, and what the model makes of it is compared with what :class:`Head` does. In
    ``torch.no_grad`` the head, too, is detached.

    Args:
        model: a transformers model, or a wrapper that passes keywords on, with a head that :meth:`Head.of` reads.
            From DDP with ``find_unused_parameters``, losses that ``SteeredOptimizer`` takes and no plain backward.
        batch: what ``append_response`` gave.
        num_tokens: ``T``, the number of columns of the response.

    Returns:
        Hidden states ``(B, T, d)`` in the model's dtype with their head, in the place of ``(B, T, V)`` logits.

    Raises:
        TypeError, ValueError: as :meth:`Head.of`; the batch has no prompt before ``num_tokens`` tokens.
        RuntimeError: the model does something to its logits that ``Head`` does not, or does not call its head once;
            or it is DDP with ``static_graph``.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> class Bigram(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embedding, self.head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10)
        ...     def get_output_embeddings(self):
        ...         return self.head
        ...     def forward(self, input_ids, use_cache):
        ...         return SimpleNamespace(logits=self.head(self.embedding(input_ids)))
        >>> states = response_states(Bigram(), {"input_ids": torch.tensor([[5, 6, 3, 4]])}, 2)
        >>> states.hidden_BTd.shape, states.shape
        (torch.Size([1, 2, 4]), torch.Size([1, 2, 10]))
    """
    return states_before_head(model, lambda: _forward(model, batch, num_tokens).logits)[:, -(num_tokens + 1) : -1]


@contextmanager
def overridden(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Sets attribute ``name`` of every module that has it, and puts back what was there."""
    # vars: wrappers forward attribute reads, and writing to them would shadow the model's own.
    owners: list[Any] = [module for module in model.modules() if name in vars(module)]
    before = [getattr(module, name) for module in owners]
    try:
        for module in owners:
            setattr(module, name, value)
        yield
    finally:
        for module, old in zip(owners, before, strict=True):
            setattr(module, name, old)


def _forward(model: nn.Module, batch: Mapping[str, Tensor], num_tokens: int) -> Any:
    """What the model returns; only the rows that predict the response, and one more, meet its head if it can."""
    length = batch["input_ids"].shape[1]
    if not 0 <= num_tokens < length:
        raise ValueError(f"a response of {num_tokens} tokens needs a prompt before it; the batch has {length} columns")
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # The row before the first response token predicts it, and the last row predicts nothing that is known.
    keep = {"logits_to_keep": num_tokens + 1} if takes_any or "logits_to_keep" in parameters else {}
    with overridden(model, "rope_deltas", None):
        return model(**batch, use_cache=False, **keep)
