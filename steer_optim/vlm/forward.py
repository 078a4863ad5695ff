"""What a model says to one response: its logits, or the hidden states before its head, under each view of a prompt.

Dimensions: ``B`` prompts, ``L`` prompt tokens, ``T`` response tokens, ``V`` vocabulary, ``d`` hidden size.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steer_optim.vlm.distillation import DecomposedDistillation
from steer_optim.vlm.heads import Head, HiddenStates, output_embeddings
from steer_optim.vlm.prompts import Prompts, Rollout, append_response

# By model, what the heads consist of whose row was compared.
_COMPARED: weakref.WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = weakref.WeakKeyDictionary()


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


def response_states(
    model: nn.Module, batch: Mapping[str, Tensor], num_tokens: int, *, head: Head | None = None
) -> HiddenStates:
    """The twin of :func:`response_logits` that stops before the head: what the head would take, and the head.

    The pass is the model's own, whose head is handed one row, so that no logits are held. In the first pass of a
    model, what it makes of that row is compared with what :class:`Head` does. In ``torch.no_grad`` neither the states
    nor the head have gradients: a loss of them would reach the head alone.

    Args:
        model: a transformers model, or a wrapper that passes keywords on, with a head that :meth:`Head.of` reads.
            From DDP with ``find_unused_parameters``, losses that ``SteeredOptimizer`` takes and no plain backward.
        batch: what ``append_response`` gave.
        num_tokens: ``T``, the number of columns of the response.
        head: that of another view of the same model, where it is sharded and was gathered for that one.

    Returns:
        Hidden states ``(B, T, d)`` in the model's dtype with their head, in the place of ``(B, T, V)`` logits.

    Raises:
        ValueError: as :meth:`Head.of`; the batch has no prompt before ``num_tokens`` tokens.
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
    if isinstance(model, DistributedDataParallel) and model.static_graph and torch.is_grad_enabled():
        # What DDP returns holds no logits, and the backward pass of a static graph begins there.
        raise RuntimeError(
            "DDP with static_graph averages no gradient of a loss of hidden states: build it without static_graph. Or "
            "pass the model inside, model.module, where SteeredOptimizer(data_parallel=True) averages, or take "
            "response_logits"
        )
    _, module = output_embeddings(model)
    sharded = any(hasattr(x, "unshard") for x in model.modules())
    taken: list[Any] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        taken.append(args[0])
        # Under a frozen head the logits would have no graph, and FSDP2 could not hook them.
        return (args[0].detach()[:1, -1:].requires_grad_(sharded and args[0].requires_grad), *args[1:])

    handle = module.register_forward_pre_hook(take, prepend=True)
    try:
        logits_BLV = _forward(model, batch, num_tokens).logits
    finally:
        handle.remove()
    if len(taken) != 1:
        raise RuntimeError(
            f"{type(model).__name__} must call its head, {type(module).__name__}, once in a forward pass, with its "
            f"hooks; it did {len(taken)} times. Pass response_logits instead; where the model was compiled, compile "
            "its decoder alone"
        )
    x_BLd = taken[0].full_tensor() if isinstance(taken[0], Tensor) and hasattr(taken[0], "full_tensor") else taken[0]
    # After the pass: then FSDP2 has the parameters of the root whole.
    head = head or Head.of(model)
    # An adapter that is switched on or off makes another head.
    made_of = tuple(id(x) if isinstance(x, nn.Parameter) else type(x) for x in vars(head).values())
    if made_of not in _COMPARED.setdefault(model, set()) and x_BLd.numel():
        _compare(model, head, x_BLd[:1, -1:], logits_BLV)
        _COMPARED[model].add(made_of)
    if x_BLd.requires_grad and sharded:
        # FSDP2 gathers a module for the backward pass, and reduces its gradients after it, when a gradient reaches what
        # it returned, here logits that no loss reads.
        beside: Callable[..., Tensor] = _Beside.apply
        x_BLd = beside(x_BLd, logits_BLV)
    device = x_BLd.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    states = HiddenStates(x_BLd, head, autocast)[:, -(num_tokens + 1) : -1]
    return states if torch.is_grad_enabled() else states.detach()


def score(
    student: nn.Module,
    teacher: nn.Module,
    prompts: Prompts,
    response: Rollout,
    *,
    method: DecomposedDistillation,
    prior: nn.Module | None = None,
    teacher_prompts: Prompts | None = None,
    names: Collection[str] | None = None,
    known: Mapping[str, Tensor | HiddenStates] | None = None,
    hidden_states: bool = True,
) -> dict[str, Tensor | HiddenStates]:
    """The views of one response that a decomposition reads, each computed once; views of other names are yours to add.

    The student runs as it is, in the caller's autocast, with gradients where a component trains the view; teacher and
    prior run in evaluation mode without gradients. The teacher's hidden states serve the gate and the losses.

    Args:
        student: a transformers model, or a wrapper that passes keywords on. Its weights should be float32, under
            ``torch.autocast`` where it is to compute in bfloat16.
        teacher: likewise, in any dtype; or, for self-distillation, a frozen or averaged copy of the student.
        prompts: both views of the prompts.
        response: what was sampled from the student with the image.
        method: whose :attr:`~steer_optim.vlm.distillation.DecomposedDistillation.views` are computed.
        prior: where the method's prior is frozen, a copy of the student as it was before training. By default the
            student itself with its adapters switched off, where it has some (PEFT).
        teacher_prompts: what the teacher sees, where that is not the same: another crop, further text.
        names: of the views that are computed; by default all that the method reads. ``teacher`` and ``teacher_text``
            are those that a gate over several micro-batches needs first.
        known: views that are there already, from such a call, and are not computed again.
        hidden_states: whether to stop before the head; False for a model whose head :class:`Head` cannot be read, at
            the price of ``(B, T, V)`` logits.

    Returns:
        ``(B, T, V)`` logits that have not been computed, or have been, by the name of the view.

    Raises:
        ValueError: the prior is frozen and there is none; or as :func:`response_states`.

    Example:
        >>> import copy, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from steer_optim.vlm import DecomposedDistillation, Prompts, Rollout, score
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> student = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))  # which cannot see
        >>> prompt = {"input_ids": torch.tensor([[5, 6, 7]])}
        >>> response = Rollout(torch.tensor([[8, 9]]), torch.ones(1, 2, dtype=torch.bool))
        >>> method = DecomposedDistillation("vgs")
        >>> views = score(student, copy.deepcopy(student), Prompts(prompt, prompt), response, method=method)
        >>> {name: tuple(view.shape) for name, view in views.items()}["student_text"]
        (1, 2, 16)
        >>> losses = method(views, response.scored_BT)
    """
    B, T = response.response_BT.shape
    others = teacher_prompts or prompts
    batches = {"student": prompts.image, "student_text": prompts.text, "prior": prompts.text}
    batches |= {"teacher": others.image, "teacher_text": others.text}
    adapters = (x.disable_adapter for x in student.modules() if prior is None and hasattr(x, "disable_adapter"))
    without_adapter: Any = next(adapters, None)
    if "prior" in (names or method.views) and prior is None and without_adapter is None:
        raise ValueError(
            "the method's prior is frozen: pass prior=copy.deepcopy(student), made before training; a student with "
            "PEFT adapters needs none, for they are switched off"
        )
    models = {"student": student, "student_text": student, "prior": prior or student}
    models |= {"teacher": teacher, "teacher_text": teacher}
    teacher.eval()
    if prior is not None:
        prior.eval()
    views = dict(known or {})
    for name in [name for name in names or method.views if name in models and name not in views]:
        model = models[name]
        twin = views.get(name.removesuffix("_text"))
        blank = (others if name.startswith("teacher") else prompts).blank
        batch = append_response(batches[name], response.with_empty(blank), _config(model))
        trained = name == "student" or (name == "student_text" and method.trains_text)
        with (
            torch.set_grad_enabled(trained and torch.is_grad_enabled()),
            without_adapter() if name == "prior" and without_adapter else nullcontext(),
        ):
            if hidden_states:
                head = twin.head if isinstance(twin, HiddenStates) else None
                views[name] = response_states(model, batch, T, head=head)[:B]
            else:
                views[name] = response_logits(model, batch, T)[:B]
    return views


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


class _Beside(torch.autograd.Function):
    """Hidden states whose backward pass runs the hooks of the logits, too, which get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        return incoming, None


def _compare(model: nn.Module, head: Head, x_BLd: Tensor, logits_BLV: Any) -> None:
    """Raises RuntimeError where the model's logits of a row are not those of the head."""
    with torch.no_grad():
        expected_BLV = head(x_BLd)
        found_BLV = logits_BLV.full_tensor() if hasattr(logits_BLV, "full_tensor") else logits_BLV.detach()
    same = found_BLV.shape == expected_BLV.shape
    error = float((found_BLV - expected_BLV).abs().max()) if same else math.inf
    # What products in half precision are good for; a factor or a cap that was missed is more.
    if not error <= 0.02 * float(expected_BLV.abs().max()):
        raise RuntimeError(
            f"{type(model).__name__} does something to its logits that Head.of does not know: a row differs by "
            f"{error:.3g}. Pass response_logits instead, or HiddenStates with a Head of your own"
        )


def _config(model: nn.Module) -> Any:
    """The configuration of a transformers model, or of the one inside a wrapper."""
    return next((config for module in model.modules() if (config := getattr(module, "config", None))), None)
