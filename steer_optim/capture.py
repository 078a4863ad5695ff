"""One backward pass gives one gradient set: the gradients of a component, by parameter.

In one process and over shards, each ``.grad`` points to the set during the pass, and autograd accumulates into it. This
makes no copies and is exact wherever ``backward()`` is, also with reentrant checkpointing. Under DDP a step that takes
a Gramian uses ``torch.autograd.grad`` to bypass the reducer, which would average only the first of several passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Losses: TypeAlias = Mapping[str, "Tensor | Callable[[], Tensor] | None"]
"""Components by name: scalar losses, callables that return one, or None for a component that is absent."""

Gradients: TypeAlias = dict[Tensor, Tensor]
"""A gradient set: gradients by parameter; a parameter that the component does not reach is absent."""


def check_losses(losses: Losses, *, grad: bool = True) -> None:
    """Raise, before anything runs, if there are no components, or a name or loss is invalid; see `check_loss`."""
    if not isinstance(losses, Mapping):
        raise TypeError(
            f"components must be a mapping from names to scalar losses; got {type(losses).__name__}. Name them: "
            '{"main": main, "side": side}'
        )
    if not losses:
        raise ValueError("there are no components: pass named losses, None for each that this micro-batch lacks")
    for name, loss in losses.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of a component must be a str; got {name!r}")
        if "~" in name:
            raise ValueError(f"the name of a component must not contain '~', which stands between two; got {name!r}")
        if isinstance(loss, Tensor):
            check_loss(name, loss, grad=grad)
        elif loss is not None and not callable(loss):
            raise TypeError(
                f"component {name!r} must be a tensor or a callable; got {type(loss).__name__}. Pass None if there is "
                "no loss, and name the parts of a nested mapping one by one"
            )


def check_loss(name: str, loss: Tensor, *, grad: bool) -> None:
    """Raise if a component is not a scalar tensor, or lacks the graph that ``grad`` demands; the error names it."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the callable of component {name!r} must return a tensor; got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"component {name!r} must be a scalar; got shape {tuple(loss.shape)}. Reduce it first")
    if grad and not loss.requires_grad:
        raise ValueError(
            f"component {name!r} is detached: it does not require grad. Look for .detach(), no_grad, inference_mode "
            "or frozen parameters in its graph, or pass None if there is no loss"
        )


def evaluate(losses: Losses, *, retain_graph: bool) -> Iterator[tuple[str, Tensor | None, bool]]:
    """Yield each component's name and loss in turn, and whether its backward pass must keep the graph.

    Tensors may share a graph, so only the last of them frees it; a callable has its own. This generator keeps no loss:
    if the caller deletes it, its graph is freed before the next callable runs.
    """
    graphs = [isinstance(loss, Tensor) for loss in losses.values()]
    for i, (name, loss) in enumerate(losses.items()):
        keep = retain_graph or (graphs[i] and any(graphs[i + 1 :]))
        yield name, None if loss is None else evaluated(name, loss), keep


def evaluated(name: str, loss: Tensor | Callable[[], Tensor], *, grad: bool = True) -> Tensor:
    """Return a component as a tensor, after calling a callable; raise if it is invalid."""
    try:
        with torch.set_grad_enabled(grad):
            value = loss if isinstance(loss, Tensor) else loss()
    except StopIteration as error:  # which Python replaces in the generators on its way
        raise RuntimeError(
            f"the callable of component {name!r} raised StopIteration: an iterator that it reads is exhausted. Draw "
            "the batch before the call, where StopIteration ends the loop"
        ) from error
    check_loss(name, value, grad=grad)
    return value


def unreached_error(name: str) -> ValueError:
    """Return the error for a component whose backward pass reaches no parameter."""
    return ValueError(
        f"component {name!r} is detached from every given parameter: its backward pass reaches none of them. Pass None "
        "for it, or give also the parameters that it depends on, after whatever replaces them (fully_shard, "
        "load_state_dict(assign=True)). Under FSDP2 leave gradient sync on in every micro-batch"
    )


def capture(
    losses: Sequence[Tensor],
    grad_tensors: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    own: Gradients,
    *,
    retain_graph: bool,
    others: Sequence[Tensor] = (),
    reducer: bool = False,
) -> Gradients:
    """Backpropagate some losses in one pass; hooks and reducers on the parameters run.

    Args:
        losses: scalars.
        grad_tensors: the gradient that comes in at each; None for 1.
        parameters: whose gradients are taken. Their ``.grad`` is restored. Other leaves of the graph accumulate the
            gradients that ``grad_tensors`` give: of the plain sum, or between two refreshes of the weighted sum.
        own: the gradient set that the new gradients are added to, in place.
        retain_graph: whether the graph is kept.
        others: parameters whose gradients are dropped, and whose ``.grad`` is restored, too.
        reducer: whether DDP's reducer may run, and may write to the memory of an old ``.grad``.

    Returns:
        The gradient set.
    """
    before = [(p, p.grad.clone() if reducer and p.grad is not None else p.grad) for p in (*parameters, *others)]
    try:
        try:
            put_back((p, own.get(p)) for p, _ in before)
            _with_remedy(lambda: torch.autograd.backward(losses, grad_tensors, retain_graph=retain_graph))
            return own | unshared({p: p.grad for p in parameters if p.grad is not None})
        finally:
            put_back(before)
    finally:
        put_back(before)  # again, in case the first call was interrupted


def put_back(gradients: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Set every ``.grad`` to the given tensor."""
    for p, gradient in gradients:
        p.grad = gradient


def capture_isolated(
    losses: Sequence[Tensor],
    grad_tensors: Sequence[Tensor | None] | None,
    parameters: Sequence[Tensor],
    own: Gradients,
    *,
    retain_graph: bool,
    leaves: Sequence[Tensor] = (),
    on_gradient: Callable[[Tensor | None], None] | None = None,
) -> Gradients:
    """Capture like :func:`capture`, but accumulate into no parameter, so that no reducer runs.

    Args:
        losses: as there.
        grad_tensors: as there; None for all 1.
        parameters: as there.
        own: as there; not written to.
        retain_graph: as there.
        leaves: other tensors, whose ``.grad`` accumulates as in a backward pass.
        on_gradient: called with every gradient as it is computed; None if a node passes none on.

    Returns:
        The gradient set. Its tensors may share memory: do not write to them.
    """
    try:
        try:
            if on_gradient is not None:
                for p in parameters:
                    p.register_hook(on_gradient)
            taken = _with_remedy(
                lambda: torch.autograd.grad(
                    losses, (*parameters, *leaves), grad_tensors, retain_graph=retain_graph, allow_unused=True
                )
            )
        finally:
            _remove_hooks(parameters, on_gradient)
    finally:
        _remove_hooks(parameters, on_gradient)  # again, in case the first call was interrupted
    if any(g is None for g in taken) and any(map(is_reentrant, graph(losses))):
        # torch.autograd.grad skips it without an error if no parameter is upstream of it.
        raise RuntimeError(_REMEDIES["use_reentrant=True"])
    for leaf, g in zip(leaves, taken[len(parameters) :], strict=True):
        before = leaf.grad
        leaf.grad = g.clone() if before is None else g + before if before.is_sparse else before + g
    new = zip(parameters, taken[: len(parameters)], strict=True)
    return own | {p: own[p] + g if p in own else g for p, g in new if g is not None}


def _remove_hooks(parameters: Iterable[Tensor], hook: Callable[[Tensor | None], None] | None) -> None:
    for hooks in (p._backward_hooks for p in parameters if p._backward_hooks):
        for key in [key for key, registered in hooks.items() if registered == hook]:
            del hooks[key]


def graph(losses: Iterable[Tensor]) -> Iterator[Any]:
    """Yield every node of the graph of some losses."""
    nodes = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(nodes)
    for node in nodes:
        yield node
        before = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= before
        nodes.extend(before)


def is_reentrant(node: Any) -> bool:
    """Return whether a node of a graph is a reentrant checkpoint."""
    return bool(node.name() == "CheckpointFunctionBackward")


_REMEDIES = {
    "donated buffer": "a compiled graph freed its buffers after one backward pass, and several components need them. "
    "Import torch._functorch.config, and set its donated_buffer = False before the first backward pass; or pass the "
    "components as callables, each with its own forward pass",
    "use_reentrant=True": "the model uses reentrant checkpointing. It does not support torch.autograd.grad, "
    "which data_parallel and measure need. Checkpoint with use_reentrant=False (transformers: "
    'gradient_checkpointing_enable({"use_reentrant": False}))',
    "Untracked tensor": "offloaded activations can be restored for one backward pass only. Pass the "
    "components as callables, each with its own forward pass, or disable offloading",
    "mark a variable ready only once": "DDP's reducer did not expect this backward pass between two refreshes. Call "
    "the module inside DDP (ddp.module), whose gradients data_parallel=True averages, too, or set refresh_every=1",
    "backward an extra time": "selective activation checkpointing recomputes for one backward pass only. Pass the "
    "components as callables, each with its own forward pass, or checkpoint entire layers",
}


def _with_remedy(run: Callable[[], Any]) -> Any:
    """Run a backward pass; replace torch's error by one with the remedy, if one is known."""
    try:
        return run()
    except Exception as error:
        for sign, remedy in _REMEDIES.items():
            if sign in str(error):
                raise RuntimeError(remedy) from error
        raise


def unshared(gradients: Gradients) -> Gradients:
    """Return the same gradients, each in its own memory.

    After ``a.view(2, 2) + b.view(2, 2)`` the gradients of ``a`` and ``b`` are two views of one tensor, so that an
    in-place operation on either changes both; ``b`` may be another's, or no parameter. Memory of numpy or DLPack may be
    shared unseen, or written again. A complex gradient may be a lazy conjugate.
    """
    result = {}
    for p, gradient in gradients.items():
        if gradient.layout is torch.strided and not is_dtensor(gradient):
            gradient = gradient.resolve_conj().resolve_neg()
            if _holders(gradient) > _ALONE or not gradient.untyped_storage().resizable():
                gradient = gradient.clone()
        result[p] = gradient
    return result


def _holders(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


# Torch 2.6 counts the tensor that holds the memory; later versions also count the handle that asks.
_ALONE = _holders(torch.empty(0, device="cpu"))


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor: sharded or replicated over a mesh of processes."""
    # By name, because importing DTensor takes half a second.
    return type(tensor).__name__ == "DTensor"


def check_parameters(parameters: Sequence[Tensor]) -> None:
    """Raise if the gradients of a parameter cannot be taken one component at a time."""
    for i, p in enumerate(parameters):
        if p.layout not in (torch.strided, torch.sparse_coo):
            raise TypeError(
                f"parameter {i} of the optimizer (shape {tuple(p.shape)}) has layout {p.layout}; only dense and sparse "
                "COO gradients can be combined. Convert it, or give it its own optimizer"
            )
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"parameter {i} of the optimizer (shape {tuple(p.shape)}) has a post-accumulate-grad hook, which would "
                "run once per component on a gradient that is not steered yet. Remove the hook, and step "
                "the optimizer after backward_components"
            )
