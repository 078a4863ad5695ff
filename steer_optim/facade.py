"""A torch optimizer that wraps another and behaves like it: the part of the wrapper that knows nothing of steering.

Properties read `param_groups`, `state` and `defaults` from the inner optimizer, because copied references go stale when
`load_state_dict` rebinds them. `Optimizer.__init__` would make new ones, so it is not called. Only `train` and `eval`
are forwarded besides: a gradient scaler that sees `_step_supports_amp_scaling` of a fused optimizer would step on inf.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def forward(owner: str, name: str) -> Any:
    """Return a property that reads and writes the attribute ``name`` of ``self.<owner>``."""

    def write(self: Any, value: Any) -> None:
        setattr(getattr(self, owner), name, value)

    return property(attrgetter(f"{owner}.{name}"), write)


class OptimizerFacade(Optimizer):
    """Behave like ``inner`` for schedulers, gradient scalers, checkpoints and loops, but with separate hooks."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self._reset_hooks()

    param_groups: list[dict[str, Any]] = forward("inner", "param_groups")
    state: defaultdict[Tensor, Any] = forward("inner", "state")
    defaults: dict[str, Any] = forward("inner", "defaults")
    # AttributeError if the inner optimizer has none, so `hasattr` works.
    train: Any = forward("inner", "train")
    eval: Any = forward("inner", "eval")

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        """Step the inner optimizer between this optimizer's step hooks, and return its result."""
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        step: Callable[..., float | None] = self.inner.step
        if not hasattr(type(self.inner).step, "hooked"):  # its step fires no hooks, not even torch's global ones
            args, kwargs = self._pre(self.inner, args, {})
            loss = step(*args[1:], **kwargs)
            self._post(self.inner, args, kwargs)
            return loss
        try:
            try:
                # On the inner optimizer, so that global hooks run first and last, as for any torch optimizer.
                self.inner.register_step_pre_hook(self._pre)
                self.inner.register_step_post_hook(self._post)
                return step(*args[1:])
            finally:
                self._take_hooks_back()
        finally:
            self._take_hooks_back()  # again, in case the first call was interrupted

    def _pre(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        args = (self, *args[1:])
        for hook in self._optimizer_step_pre_hooks.values():
            args, kwargs = hook(self, args, kwargs) or (args, kwargs)
        return (self.inner, *args[1:]), kwargs

    def _post(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (self, *args[1:]), kwargs)

    def _take_hooks_back(self) -> None:
        for hooks in (self.inner._optimizer_step_pre_hooks, self.inner._optimizer_step_post_hooks):
            for key in [key for key, hook in hooks.items() if hook in (self._pre, self._post)]:
                del hooks[key]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; steering rereads the groups in every call."""
        self.inner.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` as the inner optimizer does."""
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save; call this optimizer's state-dict hooks around it."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._export_state()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    # The argument is named as in torch: torch.distributed.checkpoint passes it by name.
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state; call this optimizer's load-state-dict hooks around it."""
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self._import_state(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _export_state(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def _import_state(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler patches `step` of this instance with a closure over it. Hooks belong to this instance, too.
        return {key: value for key, value in vars(self).items() if key != "step" and not key.endswith("_hooks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_hooks()

    def _reset_hooks(self) -> None:
        for event in ("step", "state_dict", "load_state_dict"):
            setattr(self, f"_optimizer_{event}_pre_hooks", OrderedDict())
            setattr(self, f"_optimizer_{event}_post_hooks", OrderedDict())
