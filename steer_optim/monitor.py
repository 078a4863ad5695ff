"""Record what steering did over training: the numbers of each step's geometry, for any logger and for plots.

:func:`scalars` names the numbers of one step for a logger; :class:`Monitor` keeps the same numbers over
training, under the same names. For components ``lang`` and ``vis`` these are

=========================== ==========================================================================
``steer/loss/vis``          value of the component, summed over micro-batches
``steer/norm/vis``          norm of its gradient
``steer/weight/vis``        its weight in the update; mean over the scopes that have gradients
``steer/cos/lang~vis``      cosine between two gradients; the names of a pair are in alphabetical order
``steer/angle/lang~vis``    the angle, in degrees
``steer/conflict/lang~vis`` 1 if the two conflict, else 0; with scopes, the fraction of those that have both
``steer/update_norm``       norm of the steered update
``steer/update_norm_ratio`` the same, divided by the norm of the plain sum
=========================== ==========================================================================

Norms, cosines and angles are over all parameters under any scope, so that runs are comparable. A step that reused
weights (``geometry.age > 0``) has losses and weights only; one in which a component has no gradient lacks the numbers
of its pairs. A component that is absent, between refreshes in this process, has NaN for its loss, norm and weight;
other NaNs are left out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from steer_optim.gramian import Geometry

Keys = tuple[str, ...]

# Kept even if NaN: the component is absent, or something overflowed.
_ALWAYS = ("steer/loss/", "steer/norm/", "steer/weight/")
# Rows kept on the device before they are copied to the host: one synchronization for all of them.
_BATCH = 256


def scalars(geometry: Geometry) -> dict[str, float]:
    """Return the numbers of one step by name, read from the device in one transfer.

    Args:
        geometry: of the step, under any scope.

    Returns:
        Python floats under the names in the header of this module, for
        ``SummaryWriter.add_scalar``, ``wandb.log``, ``Trainer.log`` and the like.

    Example:
        >>> import torch
        >>> from steer_optim import Geometry
        >>> from steer_optim.monitor import scalars
        >>> G = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
        >>> values = scalars(Geometry(("lang", "vis"), G, weights=torch.ones(2, dtype=torch.float64)))
        >>> values["steer/norm/lang"], values["steer/cos/lang~vis"], values["steer/conflict/lang~vis"]
        (2.0, -0.5, 1.0)
    """
    keys, row = _row(geometry)
    numbers = dict(zip(keys, row.tolist(), strict=True))
    return {key: value for key, value in numbers.items() if key.startswith(_ALWAYS) or not math.isnan(value)}


def from_log(log: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the numbers of a training log by name, as :meth:`Monitor.history` does.

    Args:
        log: of transformers' ``Trainer``, ``state.log_history``; lines without a training loss are skipped.

    Returns:
        One list for each name, NaN in lines that lack it.

    Example:
        >>> from steer_optim.monitor import from_log
        >>> from_log([{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 2.5}, {"step": 2, "loss": 1.0}])
        {'loss': [2.0, 1.0], 'step': [1, 2]}
    """
    lines = [line for line in log if "loss" in line]
    return {name: [line.get(name, math.nan) for line in lines] for name in sorted({key for x in lines for key in x})}


class Monitor:
    """Record the numbers of steps, by name.

    Recording waits for the device only once in 256 steps, when the rows move to the host. Numbers that a step does not
    have, such as the angles of one that reused weights, are NaN.

    Example:
        >>> import torch
        >>> from steer_optim import Geometry
        >>> from steer_optim.monitor import Monitor
        >>> monitor = Monitor()
        >>> for norm in 1.0, 2.0:
        ...     G = torch.tensor([[norm**2, 0.0], [0.0, 1.0]], dtype=torch.float64)
        ...     monitor.record(Geometry(("lang", "vis"), G, weights=torch.ones(2, dtype=torch.float64)))
        >>> history = monitor.history()
        >>> history["step"].tolist(), history["steer/norm/lang"].tolist()
        ([0, 1], [1.0, 2.0])
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._columns: dict[str, Tensor] = {}  # the steps on the host
        self._pending: list[tuple[Keys, Tensor]] = []  # the last steps, still on the device

    def __len__(self) -> int:
        return len(self._steps)

    def record(self, geometry: Geometry | None, *, step: int | None = None) -> None:
        """Record the numbers of one step.

        Args:
            geometry: the result of ``backward_components``, or ``optimizer.geometry``. None, the result with
                ``accumulate=True``, is skipped.
            step: the number of the step; by default one more than the last, beginning at 0.

        Raises:
            TypeError: ``step`` is not an integer.
        """
        if geometry is None:
            return
        if step is None:
            step = self._steps[-1] + 1 if self._steps else 0
        step = operator.index(step)
        self._pending.append(_row(geometry))
        self._steps.append(step)
        if len(self._pending) >= _BATCH:
            self._move_to_host()

    def history(self) -> dict[str, Tensor]:
        """Return all recorded numbers over training.

        Returns:
            ``"step"``, ``(n,)`` int64, and each name in the header of this module that ever occurred, ``(n,)``
            float64 on the CPU, NaN in the steps that had no such number.
        """
        self._move_to_host()
        known = {k: c.clone() for k, c in self._columns.items() if k.startswith(_ALWAYS) or not c.isnan().all()}
        return {"step": torch.tensor(self._steps, dtype=torch.int64, device="cpu"), **known}

    def means(self, last: int) -> dict[str, float]:
        """Return the mean of each number over the last steps, for a logger that writes one line for several steps.

        Args:
            last: how many steps.

        Returns:
            Python floats by name. NaN, which a step does not have, is left out.

        Example:
            >>> import torch
            >>> from steer_optim import Geometry
            >>> from steer_optim.monitor import Monitor
            >>> monitor = Monitor()
            >>> for norm in 1.0, 2.0, 4.0:
            ...     G = torch.tensor([[norm**2, 0.0], [0.0, 1.0]], dtype=torch.float64)
            ...     monitor.record(Geometry(("lang", "vis"), G, weights=torch.ones(2, dtype=torch.float64)))
            >>> monitor.means(last=2)["steer/norm/lang"]
            3.0
        """
        self._move_to_host()
        means = {key: column[max(0, len(self) - last) :].nanmean().item() for key, column in self._columns.items()}
        return {key: mean for key, mean in means.items() if not math.isnan(mean)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the record so far, the tensors of :meth:`history`, for any checkpoint."""
        return self.history()

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Continue from a record; drop what was recorded here before.

        Raises:
            ValueError: it is not the record of a monitor. Then nothing is changed.
        """
        columns = {name: torch.as_tensor(c, dtype=torch.float64, device="cpu") for name, c in state_dict.items()}
        shapes = {name: tuple(column.shape) for name, column in columns.items()}
        if "step" not in shapes or set(shapes.values()) != {(columns["step"].numel(),)}:
            raise ValueError(f"a record has 'step' and other columns of the same length; got shapes {shapes}")
        self._steps = columns.pop("step").long().tolist()
        self._columns, self._pending = columns, []

    def _move_to_host(self) -> None:
        groups: dict[Keys, dict[int, Tensor]] = {}
        for place, (keys, row) in enumerate(self._pending, len(self) - len(self._pending)):
            groups.setdefault(keys, {})[place] = row
        columns = {key: pad(c, (0, len(self._pending)), value=math.nan) for key, c in self._columns.items()}
        for keys, rows in groups.items():
            for key, column in zip(keys, torch.stack([*rows.values()]).cpu().double().unbind(1), strict=True):
                absent = torch.full((len(self),), math.nan, dtype=torch.float64, device="cpu")
                columns.setdefault(key, absent)[[*rows]] = column
        self._columns, self._pending = columns, []


def _row(geometry: Geometry) -> tuple[Keys, Tensor]:
    """Return the names of a step's numbers, and the numbers as one vector, still on the device."""
    if not isinstance(geometry, Geometry):
        raise TypeError(
            f"geometry must be a Geometry, as backward_components returns; got {type(geometry).__name__}. With join "
            "read optimizer.geometry after the backward pass"
        )
    names, k, whole = geometry.names, len(geometry.names), geometry.overall
    numbers: dict[str, Tensor] = {}

    def add(kind: str, values: Tensor) -> None:
        numbers.update((f"steer/{kind}/{name}", value) for name, value in zip(names, values.unbind(), strict=True))

    absent = torch.zeros_like(whole.norms, dtype=torch.bool)
    if geometry.losses is not None:
        add("loss", geometry.losses)
        absent = geometry.losses.isnan()
        if not geometry.age:
            absent &= whole.norms == 0  # or another process has it
    add("weight", whole.weights.masked_fill(absent, math.nan))
    if not geometry.age:
        update_norm = geometry.update_norm.square().sum().sqrt()
        add("norm", whole.norms.masked_fill(absent, math.nan))
        there = geometry.norms.reshape(-1, k) != 0
        both = (there[:, :, None] & there[:, None]).to(whole.G.dtype).sum(0)
        conflicts = geometry.conflicts.reshape(-1, k, k).to(whole.G.dtype).sum(0) / both
        apart = (whole.norms == 0) | (whole.norms == 0)[:, None]
        for kind, matrix in (("cos", whole.cosines), ("angle", whole.angles), ("conflict", conflicts)):
            matrix = matrix.masked_fill(apart, math.nan)
            for i, j in combinations(sorted(range(k), key=names.__getitem__), 2):
                numbers[f"steer/{kind}/{names[i]}~{names[j]}"] = matrix[i, j]
        numbers |= {"steer/update_norm": update_norm, "steer/update_norm_ratio": update_norm / whole.sum_norm}
    return tuple(numbers), torch.stack(list(numbers.values()))
