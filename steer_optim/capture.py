"""One gradient set per component: taken, accumulated over micro-batches, combined in place, released.

Each component is backpropagated on its own while every ``.grad`` is set aside by pointer, so that autograd itself
accumulates into the component's set: no copies, and exact wherever ``backward()`` is, reentrant checkpointing included.
``torch.autograd.grad`` would be shorter, but may return one tensor for two parameters, or an expanded one, and work in
place on those is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

Losses: TypeAlias = Mapping[str, "Tensor | Callable[[], Tensor]"]
"""Components by name: scalar losses, or callables that return one."""

Gradients: TypeAlias = dict[Tensor, Tensor]
"""A gradient set: gradients by parameter; a parameter that the component does not reach is absent."""


def check_losses(losses: Losses) -> None:
    """Refuses what can be refused before anything runs: no components, bad names, bad losses."""
    if not isinstance(losses, Mapping):
        raise TypeError(f"components come as a mapping from names to scalar losses; got {type(losses).__name__}")
    if not losses:
        raise ValueError("there are no components: pass at least one named loss")
    for name, loss in losses.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of a component is a str; got {name!r}")
        if isinstance(loss, Tensor):
            check_loss(name, loss)
        elif not callable(loss):
            raise TypeError(f"component {name!r} must be a tensor or a callable; got {type(loss).__name__}")


def check_loss(name: str, loss: Tensor) -> None:
    """Refuses, by name, a component that is not one number or that no gradient can flow from."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the callable of component {name!r} must return a tensor; got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"component {name!r} must be a scalar; got shape {tuple(loss.shape)}. Reduce it first")
    if not loss.requires_grad:
        raise ValueError(
            f"component {name!r} is detached: it does not require grad. Look for .detach(), no_grad or frozen "
            "parameters on its way, or leave it out"
        )


def evaluate(losses: Losses, *, retain_graph: bool) -> Iterator[tuple[str, Tensor, bool]]:
    """Each component's name and loss when its turn comes, and whether its backward pass is to keep the graph.

    Tensors may share a graph, which only the last of them frees; that of a callable is its own. Nothing of a loss is
    held here, so its graph goes before the next callable runs if the caller lets go of it by then.
    """
    graphs = [isinstance(loss, Tensor) for loss in losses.values()]
    for i, (name, loss) in enumerate(losses.items()):
        yield name, _checked(name, loss), retain_graph or (graphs[i] and any(graphs[i + 1 :]))


def _checked(name: str, loss: Tensor | Callable[[], Tensor]) -> Tensor:
    with torch.enable_grad():
        value = loss if isinstance(loss, Tensor) else loss()
    check_loss(name, value)
    return value


def refuse_unreached(name: str) -> ValueError:
    """The error for a component whose backward pass reaches no parameter."""
    return ValueError(
        f"component {name!r} is detached from every parameter of the optimizer: its backward pass reaches none of "
        "them. Leave it out, or give the optimizer the parameters that it depends on"
    )


def refuse_pending(names: Iterable[str]) -> RuntimeError:
    """The error for a step on gradients that lack what was accumulated."""
    return RuntimeError(
        f"components {sorted(names)} were accumulated and never steered, so that .grad lacks them: call "
        "backward_components or join without accumulate=True for the last micro-batch of a step"
    )


def capture(
    losses: Losses,
    parameters: Sequence[Tensor],
    sets: MutableMapping[str, Gradients],
    *,
    scale: Tensor | None,
    retain_graph: bool,
    isolate: bool = False,
) -> dict[str, Tensor]:
    """Backpropagates each component into its own gradient set.

    Args:
        losses: the components. A callable is evaluated only when its turn comes, and its graph is freed before the
            next one is built.
        parameters: whose gradients are taken. Their ``.grad`` is as before when this returns or raises. Other
            leaves of the graph accumulate the plain sum of the components, as from ``sum(losses).backward()``.
        sets: the gradient sets, added to in place.
        scale: what the components are multiplied by on the way back, as a gradient scaler does; None for 1.
        retain_graph: whether the graph is kept after the last component.
        isolate: take the gradients without accumulating any, so that nothing runs that waits for accumulation: the
            reducer of a data-parallel model, which averages the first of several backward passes only. Other
            leaves then get nothing, and a component may reach no parameter: it may on another replica.

    Returns:
        The detached value of each component.

    Raises:
        ValueError: a component is not a scalar, or is detached from every parameter.
        TypeError: a parameter has a layout other than strided or sparse COO.
        RuntimeError: a compiled graph does not allow a second backward pass, or a parameter has a
            post-accumulate-grad hook.
    """
    check_parameters(parameters)
    values: dict[str, Tensor] = {}
    for name, loss, keep in evaluate(losses, retain_graph=retain_graph):
        own = sets.setdefault(name, {})
        gradient = None if scale is None else root_gradient(loss, scale)
        backpropagate([loss], [gradient], parameters, own, retain_graph=keep, isolate=isolate)
        if not own and not isolate:
            raise refuse_unreached(name)
        values[name] = loss.detach()
        del loss  # and its graph, before the next one is built
    return values


def backpropagate(
    losses: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    own: Gradients,
    *,
    retain_graph: bool,
    isolate: bool,
) -> None:
    """One backward pass from ``losses``, each with the gradient that comes in at it, added to the gradient set ``own``.

    See :func:`capture` for ``isolate``.
    """
    if isolate:
        taken = take(losses, parameters, gradients, retain_graph=retain_graph)
        # Not in place: these may be views of each other, or expanded.
        own.update({p: own[p] + g if p in own else g for p, g in taken.items()})
        return
    with _set_aside(parameters), _explained():
        for p in parameters:
            p.grad = own.get(p)
        torch.autograd.backward(losses, gradients, retain_graph=retain_graph)
        own.update(_materialised({p: p.grad for p in parameters if p.grad is not None}))


def root_gradient(loss: Tensor, scale: Tensor) -> Tensor:
    """What comes in at ``loss`` that is multiplied by ``scale``, on its device and in its dtype and shape."""
    # Memory of its own: autograd may make a view of it some parameter's gradient.
    return torch.empty_like(loss).copy_(scale)


def take(
    losses: Sequence[Tensor],
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None] | None = None,
    *,
    retain_graph: bool,
) -> Gradients:
    """The gradients of the sum of some losses, of which none is accumulated."""
    with _explained():
        taken = torch.autograd.grad(losses, parameters, gradients, retain_graph=retain_graph, allow_unused=True)
    if any(g is None for g in taken) and any(_is_checkpointed(loss) for loss in losses):
        # autograd went around it without a word where nothing before it has parameters.
        raise RuntimeError(_REENTRANT)
    return {p: g for p, g in zip(parameters, taken, strict=True) if g is not None}


def _is_checkpointed(loss: Tensor) -> bool:
    """Whether a part of the graph of ``loss`` is checkpointed reentrantly."""
    nodes = [loss.grad_fn]
    seen = set(nodes)
    for node in nodes:
        if node is not None:
            if node.name() == "CheckpointFunctionBackward":
                return True
            before = {n for n, _ in node.next_functions} - seen
            seen |= before
            nodes.extend(before)
    return False


def combine(sets: Sequence[Gradients], parameters: Sequence[Tensor], weights: Tensor) -> Gradients:
    """``sum_i weights[i] * g_i`` over ``parameters``, in place; the sets are emptied of them.

    Args:
        sets: the ``k`` gradient sets; their tensors are overwritten.
        parameters: those of one scope.
        weights: ``(k,)``; not read by the host.
    """
    total: Gradients = {}
    for own, weight in zip(sets, weights.unbind(), strict=True):
        gradients = {p: own.pop(p) for p in parameters if p in own}
        for (device, dtype), members in _by_kind(gradients).items():
            # In the dtype of the gradients an accelerator multiplies them in one kernel; a CPU would round a weight
            # in half precision.
            wide = torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype
            torch._foreach_mul_([gradients[p] for p in members], weight.to(device, wide))
        add_into(total, gradients)
    return total


def add_into(total: Gradients, gradients: Gradients) -> None:
    """Adds one gradient set to another, in place where the layouts allow it."""
    dense = {p: g for p, g in gradients.items() if p in total and not (total[p].is_sparse or g.is_sparse)}
    for members in _by_kind(dense).values():
        torch._foreach_add_([total[p] for p in members], [gradients[p] for p in members])
    for p, gradient in gradients.items():
        if p not in total:
            total[p] = gradient
        elif p not in dense:
            # torch adds a sparse tensor to a dense one, not the other way around.
            first, second = (gradient, total[p]) if total[p].is_sparse else (total[p], gradient)
            total[p] = first + second


def write(update: Gradients) -> None:
    """Adds the update to ``.grad``, as autograd does; a ``.grad`` of None becomes the update itself."""
    existing = _materialised({p: p.grad for p in update if p.grad is not None})
    add_into(existing, update)
    for p, gradient in existing.items():
        p.grad = gradient


@contextmanager
def _set_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Empties every ``.grad`` and puts it back at the end, by pointer."""
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        yield
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient


_DONATED = (
    "a compiled graph gave its buffers away after one backward pass, and several components need it. Set "
    "torch._functorch.config.donated_buffer = False before the first backward pass, or pass the components as "
    "callables, each with a forward pass of its own"
)
_REENTRANT = (
    "the model is checkpointed reentrantly, and such a part has no gradient with respect to given parameters, which "
    "data_parallel and measure need. Checkpoint with use_reentrant=False (transformers: "
    'gradient_checkpointing_enable({"use_reentrant": False}))'
)


@contextmanager
def _explained() -> Iterator[None]:
    """Adds the remedy to torch's refusal of a second backward pass through a compiled graph, or of a reentrant one."""
    try:
        yield
    except RuntimeError as error:
        for sign, remedy in (("donated buffer", _DONATED), ("use_reentrant=True", _REENTRANT)):
            if sign in str(error):
                raise RuntimeError(remedy) from error
        raise


def _materialised(gradients: Gradients) -> Gradients:
    """The same gradients, each in memory of its own.

    After ``a.view(2, 2) + b.view(2, 2)`` autograd makes two views of one tensor the gradients of ``a`` and ``b``, and
    what is then done in place to either is done to both. A complex gradient may be a conjugate that is yet to be taken.
    """
    storages: set[int] = set()
    result: Gradients = {}
    for p, gradient in gradients.items():
        if gradient.layout is torch.strided and not is_dtensor(gradient):
            gradient = gradient.resolve_conj().resolve_neg()
            storage = gradient.untyped_storage().data_ptr()
            if storage in storages:
                gradient = gradient.clone()
            storages.add(storage)
        result[p] = gradient
    return result


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is sharded or replicated over a mesh of processes."""
    # By name: importing DTensor costs half a second, and whoever holds one has imported it.
    return type(tensor).__name__ == "DTensor"


def check_parameters(parameters: Sequence[Tensor]) -> None:
    """Refuses parameters whose gradients cannot be taken one component at a time."""
    for i, p in enumerate(parameters):
        if p.layout not in (torch.strided, torch.sparse_coo):
            raise TypeError(
                f"parameter {i} of the optimizer (shape {tuple(p.shape)}) has layout {p.layout}, and gradients are "
                "combined where they are dense or sparse COO. Convert it, or leave it to an optimizer of its own"
            )
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"parameter {i} of the optimizer (shape {tuple(p.shape)}) has a post-accumulate-grad hook, which would "
                "run once per component on a gradient that is not steered yet. Remove the hook, and step "
                "the optimizer after backward_components"
            )


def _by_kind(gradients: Gradients) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """The parameters whose gradients can share a kernel."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p, gradient in gradients.items():
        kinds.setdefault((gradient.device, gradient.dtype), []).append(p)
    return kinds
