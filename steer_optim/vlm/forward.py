"""Forward passes over one response, under each view of a prompt: its logits, or the hidden states before the head.

Dimensions: ``B`` prompts, ``L`` prompt tokens, ``T`` response tokens, ``V`` vocabulary, ``d`` hidden size.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steer_optim.vlm.distillation import DecomposedDistillation
from steer_optim.vlm.divergences import View
from steer_optim.vlm.families import per_token_keys
from steer_optim.vlm.heads import Head, HiddenStates, output_embeddings
from steer_optim.vlm.prompts import Prompts, Rollout, append_response, unpadded

# By model, the identities of the heads that were compared with it.
_COMPARED: weakref.WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = weakref.WeakKeyDictionary()

# How LoRA begins where it takes its initial value out of the weights.
_MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")


def response_logits(model: nn.Module, batch: Mapping[str, Tensor], num_tokens: int) -> Tensor:
    """Return the logits that predict the response: row ``t`` is computed before the model sees response token ``t``.

    Only these rows go through the head if the model takes ``logits_to_keep``. No cache is written, and rotary offsets
    that an earlier pass left on the model (Qwen's ``rope_deltas``) are neither read nor changed.

    Args:
        model: a transformers model, or a wrapper that passes keywords on.
        batch: the result of ``append_response``.
        num_tokens: ``T``, the number of columns of the response.

    Returns:
        (B, T, V) logits in the model's dtype. Rows outside the response mask are finite and meaningless.

    Raises:
        ValueError: the batch has no prompt before ``num_tokens`` tokens.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
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
    """Return the hidden states before the head, and the head: :func:`response_logits` without computing the logits.

    The model runs its own forward pass, but its head gets one row, so that no logits are held. In the first pass of a
    model, its logits of that row are compared with those of :class:`Head`. Under ``torch.no_grad`` both the states and
    the head are detached, or a loss would still train the head.

    Args:
        model: a transformers model, or a wrapper that passes keywords on, with a head that :meth:`Head.of` reads. Under
            DDP with ``find_unused_parameters``, pass the losses to ``SteeredOptimizer``, not to a plain ``backward()``.
        batch: as in :func:`response_logits`.
        num_tokens: as in :func:`response_logits`.
        head: the head from another view of the same model, to gather a sharded one only once.

    Returns:
        Hidden states ``(B, T, d)`` in the model's dtype with their head, in place of ``(B, T, V)`` logits.

    Raises:
        ValueError: as in :meth:`Head.of` and :func:`response_logits`.
        RuntimeError: the model changes its logits in a way that ``Head`` does not, or does not call its head exactly
            once; or it is DDP with ``static_graph``.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes))
        >>> states = response_states(model, {"input_ids": torch.tensor([[5, 6, 3, 4]])}, 2)
        >>> states.hidden_BTd.shape, states.shape
        (torch.Size([1, 2, 4]), torch.Size([1, 2, 10]))
    """
    if isinstance(model, DistributedDataParallel) and model.static_graph and torch.is_grad_enabled():
        # The backward pass of a static graph begins at the output of DDP, which holds no logits here.
        raise RuntimeError(
            "DDP with static_graph does not average the gradients of losses of hidden states: build it without "
            "static_graph, pass model.module if SteeredOptimizer(data_parallel=True) averages, or use response_logits"
        )
    _, module = output_embeddings(model)
    around: list[Any] = [x for x in model.modules() if hasattr(x, "unshard") and any(y is module for y in x.modules())]
    taken: list[Any] = []

    def take(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        taken.append(args[0])
        return (args[0].detach()[:1, -1:], *args[1:])

    def give(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # A leaf, at which the backward pass that runs the hooks of FSDP2 ends; also under a frozen head.
        return output.detach().clone().requires_grad_(taken[-1].requires_grad) if around else output

    with module.register_forward_pre_hook(take, prepend=True), module.register_forward_hook(give):
        logits_BLV = _forward(model, batch, num_tokens).logits
    if len(taken) != 1:
        raise RuntimeError(
            f"{type(model).__name__} must call its head, {type(module).__name__}, once in a forward pass, with its "
            f"hooks; it did {len(taken)} times. Pass response_logits instead; if the model is compiled, compile only "
            "its decoder"
        )
    x_BLd = taken[0].full_tensor() if isinstance(taken[0], Tensor) and hasattr(taken[0], "full_tensor") else taken[0]

    def gather(_: Tensor | None = None) -> None:
        for fsdp in around:
            fsdp.unshard()

    # FSDP2 gathers the head, unless it is whole after the pass, and reduces its gradient in the backward pass.
    gather()
    head = head or Head.of(model)
    # Enabling or disabling an adapter makes another head.
    made_of = tuple(id(x) if isinstance(x, nn.Parameter) else type(x) for x in vars(head).values())
    compared = _COMPARED.setdefault(model, set())
    if made_of not in compared and x_BLd.numel() and _compare(model, head, x_BLd[:1, -1:], logits_BLV):
        compared.add(made_of)
    if x_BLd.requires_grad and around:
        # FSDP2 gathers a module for the backward pass, and reduces its gradients after it, when a gradient reaches the
        # module's output: here logits that no loss reads.
        x_BLd.register_hook(gather)
        beside: Callable[..., Tensor] = _Beside.apply
        x_BLd = beside(x_BLd, logits_BLV)
    device = x_BLd.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    x_BTd = x_BLd[:, -(num_tokens + 1) : -1]
    if torch.is_grad_enabled():
        return HiddenStates(x_BTd, head, autocast)
    return HiddenStates(x_BTd.clone(), head, autocast).detach()  # the prompt's states are freed


def score(
    student: nn.Module,
    teacher: nn.Module | None,
    prompts: Prompts,
    response: Rollout,
    *,
    method: DecomposedDistillation,
    prior: nn.Module | None = None,
    teacher_prompts: Prompts | None = None,
    names: Collection[str] | None = None,
    known: Mapping[str, View] | None = None,
    hidden_states: bool = True,
) -> dict[str, View]:
    """Return the views of one response that a decomposition reads, each computed once. You may add further views.

    The student runs as it is, in the caller's autocast, with gradients if a component trains the view. Teacher and
    prior run in evaluation mode without gradients. The teacher's hidden states serve both the gate and the losses.

    Args:
        student: a transformers model, or a wrapper that passes keywords on. Keep its weights in float32, and use
            ``torch.autocast`` to compute in bfloat16.
        teacher: the same, in any dtype under autocast; for self-distillation, a frozen or averaged copy of the student.
        prompts: both views of the prompts.
        response: sampled from the student with the image.
        method: whose :attr:`~steer_optim.vlm.distillation.DecomposedDistillation.views` are computed.
        prior: if the method's prior is frozen, a copy of the student before training. Default: the student with its
            adapters disabled, if it has some (PEFT). Pass a copy if they were trained before.
        teacher_prompts: prompts for the teacher, if they differ: another crop, or additional text.
        names: the views to compute; by default all that the method reads. A gate over several micro-batches first needs
            ``teacher`` and ``teacher_text``.
        known: views from such a call, which are not computed again.
        hidden_states: whether to stop before the head. Pass False if :class:`Head` cannot read the model's head; this
            holds ``(B, T, V)`` logits.

    Returns:
        Hidden states or ``(B, T, V)`` logits, by the name of the view.

    Raises:
        ValueError: the prior is frozen and there is none; or as in :func:`response_states`.

    Example:
        >>> import copy, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> student = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))  # a text model, for brevity
        >>> prompt = {"input_ids": torch.tensor([[5, 6, 7]])}
        >>> response = Rollout(torch.tensor([[8, 9]]), torch.ones(1, 2, dtype=torch.bool))
        >>> method = DecomposedDistillation("vgs")
        >>> views = score(student, copy.deepcopy(student), Prompts(prompt, prompt), response, method=method)
        >>> {name: tuple(view.shape) for name, view in views.items()}["student_text"]
        (1, 2, 16)
        >>> losses = method(views, response.scored_BT)
    """
    if not (isinstance(prompts, Prompts) and isinstance(response, Rollout)):
        raise TypeError(
            "score takes Prompts, from render or Prompts(batch, text_only(batch, config)), and a Rollout, from rollout "
            f"or Rollout.of; got {type(prompts).__name__} and {type(response).__name__}"
        )
    B, T = response.response_BT.shape
    others = teacher_prompts or prompts
    batches = {"student": prompts.image, "student_text": prompts.text, "prior": prompts.text}
    batches |= {"teacher": others.image, "teacher_text": others.text}
    models: dict[str, Any] = {"student": student, "prior": prior or student, "teacher": teacher}
    if unknown := {*(names or ())} - {*batches}:
        raise ValueError(f"score computes the views {', '.join(batches)}; got {', '.join(sorted(unknown))}")
    views: dict[str, View] = dict(known or {})
    wanted = [x for x in (method.views if names is None else names) if x in batches and x not in views]
    without_adapter: Any = _without_adapter(student) if "prior" in wanted and prior is None else nullcontext
    if prior is not None and shares_trained(student, prior):
        raise ValueError("prior is the student itself, or inside it, and is trained: pass a copy made before training")
    for name in wanted:
        if models[name.removesuffix("_text")] is None:
            raise ValueError(
                f"the view {name} needs a teacher: pass one, or the view itself as known={{{name!r}: ...}}"
            )
    for name in wanted:
        role = name.removesuffix("_text")
        model, blank = models[role], (others if role == "teacher" else prompts).blank
        batch = append_response(batches[name], response.with_empty(blank), _config(model))
        trained = name == "student" or (name == "student_text" and method.trains_text)
        with (
            torch.set_grad_enabled(trained and torch.is_grad_enabled()),
            nullcontext() if role == "student" else in_evaluation(model),
            without_adapter() if name == "prior" else nullcontext(),
        ):
            if hidden_states:
                head = getattr(views.get(role), "head", None)
                views[name] = response_states(model, batch, T, head=head)[:B]
            else:
                views[name] = response_logits(model, batch, T)[:B]
    if "teacher_text" in wanted:
        _equate_rows_without_images(views, others)
    return views


def _equate_rows_without_images(views: Mapping[str, View], prompts: Prompts) -> None:
    """Give both views of the teacher the same bits where the prompts are equal, or a gate selects by their rounding."""
    seen, blind = (getattr(views.get(name), "hidden_BTd", views.get(name)) for name in ("teacher", "teacher_text"))
    pixels = prompts.text.keys() - {"input_ids", "attention_mask", *per_token_keys()}  # of a masked image
    if isinstance(seen, Tensor) and isinstance(blind, Tensor) and seen.shape == blind.shape and not pixels:
        ids = ((x["input_ids"].cpu(), x.get("attention_mask")) for x in (prompts.image, prompts.text))
        rows = (unpadded(x, torch.ones_like(x) if mask is None else mask.cpu()) for x, mask in ids)
        for row, (image, text) in enumerate(zip(*rows, strict=True)):
            if image == text and row < len(seen):  # the blank one is not there any more
                blind[row] = seen[row]


def shares_trained(student: nn.Module, other: nn.Module) -> bool:
    """Return whether a model has parameters that are trained as the student's."""
    return not {p for p in student.parameters() if p.requires_grad}.isdisjoint(other.parameters())


def in_evaluation(model: nn.Module) -> AbstractContextManager[None]:
    """Set evaluation mode, and restore that of every module afterwards."""
    # Per module, because a frozen tower may be in evaluation mode while the rest trains.
    return overridden(model, "training", False)


@contextmanager
def overridden(model: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set attribute ``name`` of every module that has it, and restore the old values afterwards."""
    # vars, because wrappers forward attribute reads, and a write would shadow the model's own.
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
    """Return the model's output; if possible, only the rows that predict the response, and the last, pass its head."""
    length = batch["input_ids"].shape[1]
    if not 0 <= num_tokens < length:
        raise ValueError(f"a response of {num_tokens} tokens needs a prompt before it; the batch has {length} columns")
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # The row before the first response token predicts it. The last row predicts no response token.
    keep = {"logits_to_keep": num_tokens + 1} if takes_any or "logits_to_keep" in parameters else {}
    positions = _positions(model, batch) if takes_any or "position_ids" in parameters else {}
    with overridden(model, "rope_deltas", None):
        return model(**positions, **batch, use_cache=False, **keep)


def _positions(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the positions that ``generate`` passes, in which padding does not count; none if the model makes its own.

    The length of a prompt matters to models that scale attention or queries by the position.
    """
    name = "_prepare_position_ids_for_generation"
    inner: Any = next((x for x in model.modules() if hasattr(type(x), name)), None)  # wrappers forward attributes
    mask = batch.get("attention_mask")
    if inner is None or inner.config.is_encoder_decoder or mask is None or mask.ndim != 2 or "position_ids" in batch:
        return {}
    make = getattr(inner, name)
    if "position_ids" not in inspect.signature(inner.forward).parameters or "models" in make.__module__.split("."):
        return {}
    return {"position_ids": make(batch["input_ids"], {"attention_mask": mask})}


class _Beside(torch.autograd.Function):
    """Hidden states whose backward pass runs the hooks of the logits, too, which get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        return incoming, None


def _compare(model: nn.Module, head: Head, x_BLd: Tensor, logits_BLV: Any) -> bool:
    """Raise RuntimeError if the model's logits of a row are not those of the head; return False if they are NaN."""
    with torch.no_grad():
        expected_BLV = head(x_BLd)
        found_BLV = logits_BLV.full_tensor() if hasattr(logits_BLV, "full_tensor") else logits_BLV.detach()
    if expected_BLV.isnan().any() and found_BLV.isnan().any():
        return False  # the losses name the view
    same = found_BLV.shape == expected_BLV.shape
    error = float((found_BLV - expected_BLV).abs().max()) if same else math.inf
    # The error of products in half precision; that of a missed factor or cap is larger.
    if not error <= 0.02 * float(expected_BLV.abs().max()):
        raise RuntimeError(
            f"{type(model).__name__} changes its logits in a way that Head.of does not know: a row differs by "
            f"{error:.3g}. Pass response_logits instead, or HiddenStates with a Head of your own"
        )
    return True


def _without_adapter(student: nn.Module) -> Any:
    """Return the context manager that disables the student's adapters, which gives the initial student."""
    peft: Any = next((x for x in student.modules() if hasattr(x, "disable_adapter")), None)
    if peft is None:
        raise ValueError(
            "the method's prior is frozen: pass prior=copy.deepcopy(student).eval(), made before training and before "
            "fully_shard. Only a student with PEFT adapters needs none"
        )
    starts = {str(getattr(config, "init_lora_weights", "")) for config in peft.peft_config.values()}
    if found := [start for start in sorted(starts) if start.startswith(_MOVED)]:
        raise ValueError(
            f"init_lora_weights={found[0]!r} moves a part of the weights into the adapter, so the student without it "
            "is not the initial one: pass prior=, a copy made before training"
        )
    own = (getattr(peft.base_model, "prefix", "lora_"), "modules_to_save", "trainable_tokens")
    others = [n for n, x in peft.named_parameters() if x.requires_grad and not any(part in n for part in own)]
    if others:
        raise ValueError(
            f"{others[0]} is trained but not part of an adapter, so the student without its adapters is not the "
            "initial one: freeze it, or pass prior=, a copy made before training"
        )
    return peft.disable_adapter


def _config(model: nn.Module) -> Any:
    """Return the configuration of a transformers model, or of the one inside a wrapper."""
    return next((config for module in model.modules() if (config := getattr(module, "config", None))), None)
