"""The memory of steering from step to step, and its form in a state dict: one JSON string.

``torch.distributed.checkpoint`` drops unknown keys at the top level of an optimizer's state dict and keeps those of a
group, but loads only leaves that a fresh optimizer has: so the memory is a single leaf, which always exists.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steer_optim.gramian import Geometry
from steer_optim.rules.base import Rule, State
from steer_optim.rules.weighting import Weighting

KEY = "steer_optim"

# Weights are reused if for each gradient |w_i| max_j ||g_j|| <= _AMPLIFIED ||update||, or its norm changed by at most a
# factor _STEADY since the previous Gramian. Gradients cancel if the update is shorter than _ROUNDING max_j ||g_j||,
# unless the rule chose so: the plain sum is longer, and the update is longer than _ROUNDING max_j ||w_j g_j||.
_AMPLIFIED, _STEADY, _ROUNDING = 10.0, 4.0, 1e-6


@dataclass(frozen=True)
class Last:
    """The last Gramian and its weights, which the steps until the next Gramian reuse.

    Attributes:
        rule: the rule that gave the weights, hyperparameters included, and which parameters were trainable.
        geometry: of the step that took the Gramian, over the whole model.
        previous_norms: ``(k,)``, the norms at the Gramian before this one; 0 where there was none.
        scale: ``(2,)``, the factor on the losses (gradient scaler, division): its sum over micro-batches, and the
            largest.
        age: how many steps ago it was taken.
        functions: what the rule calls, since two of them may look alike in its name; None if this was loaded.
    """

    rule: str
    geometry: Geometry
    previous_norms: Tensor
    scale: Tensor
    age: int = 0
    functions: tuple[Any, ...] | None = None

    def on(self, device: torch.device) -> Last:
        """Return the same on another device."""
        geometry = replace(self.geometry, G=self.geometry.G.to(device), weights=self.geometry.weights.to(device))
        norms, scale = self.previous_norms.to(device), self.scale.to(device)
        return replace(self, geometry=geometry, previous_norms=norms, scale=scale)

    def reusable(self) -> Tensor:
        """Return whether later steps may reuse the weights; a bool on the device.

        A projection on a nearly zero gradient gives it a large weight, which would be far too large once that gradient
        grows. Such a weight is reused only if the norm was about the same at the previous Gramian. If the gradients
        cancelled, a rule that preserves the norm gives weights near zero, and the bound on later updates is as small.
        """
        norms, weights = self.geometry.norms, self.geometry.weights
        amplified = weights.abs() * norms.max() > _AMPLIFIED * self.geometry.update_norm
        steady = (norms <= _STEADY * self.previous_norms) & (self.previous_norms <= _STEADY * norms)
        update, short = self.geometry.update_norm, _ROUNDING * norms.max()
        weighted = _ROUNDING * (weights.abs() * norms).max()
        cancelled = (update <= short) & ((self.geometry.sum_norm <= short) | (update <= weighted))
        return (weights.isfinite() & norms.isfinite() & (norms > 0) & (steady | ~amplified) & ~cancelled).all()


@dataclass(frozen=True)
class Memory:
    """Everything that one step passes to the next."""

    names: tuple[str, ...] = ()
    state: State = field(default_factory=dict)
    last: Last | None = None
    geometry: Geometry | None = None
    started: Tensor | None = None  # whether a Gramian was finite, so that the state is more than `Rule.init` of noise


def pack(memory: Memory, *, owner: str, keep_last: bool) -> str:
    """Return the memory as a string; ``owner`` names the rule and its scope."""
    kept = memory.state if memory.started is None or bool(memory.started) else {}
    state = {key: _pack(value) for key, value in kept.items()}
    record: dict[str, Any] = {"rule": owner, "names": memory.names, "state": state}
    last = memory.last
    if keep_last and last is not None and bool((last.geometry.G.sum() + last.geometry.weights.sum()).isfinite()):
        tensors = {"G": last.geometry.G, "weights": last.geometry.weights}
        tensors |= {"previous_norms": last.previous_norms, "scale": last.scale}
        record["last"] = {"rule": last.rule, "age": last.age, **{key: _pack(t) for key, t in tensors.items()}}
    return json.dumps(record)


def unpack(text: str, *, owner: str, rule: Rule, scopes: int, device: torch.device) -> Memory:
    """Check and return the memory in a string of :func:`pack`.

    Raises:
        ValueError: the memory is that of another rule or scope, or damaged.
    """
    try:
        record = json.loads(text)
        theirs = record["rule"]
        if theirs == owner:
            return _checked(record, rule, scopes, device)
        if not record["state"]:
            return Memory()
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError, RecursionError) as error:
        raise ValueError(
            f"the memory in the state dict, [{KEY!r}] or param_groups[0][{KEY!r}], is damaged ({error}): take an older "
            "checkpoint, or delete this entry to reset the rule"
        ) from error
    raise ValueError(
        f"the state dict holds the memory of {theirs}, but the rule here is {owner}: load it with the same rule and "
        f"scope, and set another rule afterwards (optimizer.rule = ...); or delete [{KEY!r}] from it or from its "
        "param_groups[0] to reset the rule"
    )


def _checked(record: dict[str, Any], rule: Rule, scopes: int, device: torch.device) -> Memory:
    names = tuple(record["names"])
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("names must be distinct strings")
    k = len(names)
    state: State = {}
    if record["state"]:
        rule.check(names)
        G = torch.eye(k, dtype=torch.float64, device="cpu").expand(scopes, k, k)
        fresh = rule.init(G, names)
        if record["state"].keys() != fresh.keys():
            raise ValueError(f"state must be {', '.join(fresh)}; got {', '.join(record['state'])}")
        for key, like in fresh.items():
            state[key] = _unpack(key, record["state"][key], like.shape, rows=scopes)
            if state[key].dtype != like.dtype or (state[key].isnan().any() and not like.isnan().any()):
                raise ValueError(f"{key} must be {like.dtype} without NaN; got {state[key].dtype}")
        if not isinstance(rule, Weighting):  # do not call its function, which is the user's
            probe = G[: max(map(len, state.values()))]
            if rule(probe, names)[0].isfinite().all() and not rule(probe, names, state)[0].isfinite().all():
                raise ValueError("the rule finds no finite weights with this state")
    last = None
    if "last" in record:
        shapes = {"G": (k, k), "weights": (k,), "previous_norms": (k,), "scale": (2,)}
        tensors = {key: _unpack(key, record["last"][key], shape).to(device) for key, shape in shapes.items()}
        if not all(t.dtype == torch.float64 and (t.abs() < 1e300).all() for t in tensors.values()):
            raise ValueError("the last weights and their Gramian must be float64 and finite")
        key, age = record["last"]["rule"], record["last"]["age"]
        if not isinstance(key, str) or not isinstance(age, int) or age < 0 or (tensors["scale"] < 0).any():
            raise ValueError("the last weights need a rule (str), an age (int, at least 0) and a scale of at least 0")
        geometry = Geometry(names, tensors["G"], tensors["weights"])
        last = Last(key, geometry, tensors["previous_norms"], tensors["scale"], age)
    started = torch.ones((), dtype=torch.bool, device=device) if state else None
    return Memory(names, state, last, started=started)


def _pack(value: Tensor) -> list[Any]:
    return [str(value.dtype), value.tolist()]


def _unpack(name: str, packed: Any, shape: Sequence[int], rows: int | None = None) -> Tensor:
    """Check the shape (with ``rows``, at most that many rows), then return the tensor."""
    dtype, value = packed
    found, inner = [], value
    while isinstance(inner, list):
        found.append(len(inner))
        inner = inner[0] if inner else None
    fits = found == list(shape) if rows is None else found[1:] == list(shape[1:]) and found[:1] <= [rows]
    if not fits:
        more = rows is not None and found[1:] == list(shape[1:])
        why = "; parameter groups, and tensors, may be added but not removed" if more else ""
        raise ValueError(f"{name} has shape {tuple(found)}; it should be {tuple(shape)}{why}")
    return torch.tensor(value, dtype=getattr(torch, str(dtype).removeprefix("torch.")), device="cpu")
