"""What steering remembers from step to step, as one JSON string in the first group of a state dict.

``torch.distributed.checkpoint`` drops unknown keys at the top level and keeps those of a group, but loads no leaf that
a fresh optimizer does not have: so the memory is a single leaf, which is always there.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from steer_optim.gramian import Geometry
from steer_optim.rules.base import State

KEY = "steer_optim"


def put(
    state_dict: dict[str, Any],
    *,
    owner: str,
    names: tuple[str, ...],
    state: State,
    last: tuple[str, Geometry] | None,
) -> dict[str, Any]:
    """A state dict with the memory in it.

    Args:
        state_dict: of the inner optimizer.
        owner: whose memory it is: the rule and its scope.
        names: the components, in the order of the rule's rows.
        state: of the rule.
        last: the geometry whose weights may be used again, and whose they are; None where none are.
    """
    first, *others = state_dict["param_groups"]
    record: dict[str, Any] = {"rule": owner, "names": names, "state": {k: _pack(v) for k, v in state.items()}}
    if last is not None:
        rule, geometry = last
        tensors = {"G": _pack(geometry.G), "weights": _pack(geometry.weights)}
        record["last"] = {"rule": rule, "age": geometry.age, **tensors}
    return {**state_dict, "param_groups": [{**first, KEY: json.dumps(record)}, *others]}


def take(
    state_dict: dict[str, Any], *, owner: str, device: torch.device
) -> tuple[dict[str, Any], tuple[str, ...], State, tuple[str, Geometry] | None]:
    """The inner state dict, names, rule state and last geometry that :func:`put` put together.

    A plain state dict of the inner optimizer has no memory: steering then starts afresh.

    Raises:
        ValueError: the memory is that of another rule or scope.
    """
    first, *others = state_dict["param_groups"]
    record = json.loads(first.get(KEY, '{"names": [], "state": {}}'))
    names, last = tuple(record["names"]), None
    if record["state"] and record["rule"] != owner:
        raise ValueError(
            f"the checkpoint holds the memory of {record['rule']} and this optimizer steers with {owner}: use the same "
            f"rule and scope, or delete state_dict['param_groups'][0][{KEY!r}] to start this one afresh"
        )
    if "last" in record:
        G, weights = (_unpack(record["last"][key]).to(device) for key in ("G", "weights"))
        last = record["last"]["rule"], Geometry(names, G, weights, age=record["last"]["age"])
    first = {key: value for key, value in first.items() if key != KEY}
    state = {key: _unpack(value) for key, value in record["state"].items()}
    return {**state_dict, "param_groups": [first, *others]}, names, state, last


def _pack(value: Tensor) -> list[Any]:
    return [str(value.dtype), value.tolist()]


def _unpack(packed: list[Any]) -> Tensor:
    dtype, value = packed
    return torch.tensor(value, dtype=getattr(torch, dtype.removeprefix("torch.")))
