"""Measure the component gradients of some batches, and give the advice of docs/how-to-choose.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any, TypeAlias

from torch import Tensor

from steer_optim.capture import Losses
from steer_optim.gramian import list_parameters, measure
from steer_optim.monitor import Monitor

Pair: TypeAlias = tuple[str, str]

# There is nothing to resolve if no pair conflicts in more than one batch in ten. One loss dominates the update if its
# gradient is a hundred times as long as the next. Gradients further apart than 170 degrees leave PCD no descent.
_RARE, _DOMINANT, _OPPOSED = 0.1, 100.0, 170.0


@dataclass(frozen=True)
class Survey:
    """Summarize the component gradients of some batches; ``print`` it for sentences and advice.

    Attributes:
        batches: how many were measured. A batch without a component, or with a zero gradient of it, does not count for
            that component and its pairs.
        angles: mean and standard deviation over the batches, in degrees, by pair of names in alphabetical order.
        conflicts: the fraction of the batches in which the inner product is negative, by pair.
        norms: the mean norm of the gradient, by component; 0 if it was zero in all batches.

    Example: see :func:`survey`.
    """

    batches: int
    angles: Mapping[Pair, tuple[float, float]]
    conflicts: Mapping[Pair, float]
    norms: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """The largest norm, divided by the next; 1 for a single component."""
        largest, *others = sorted(self.norms.values(), reverse=True)
        if not others or largest == 0:
            return 1.0
        return largest / others[0] if others[0] else math.inf

    @property
    def advice(self) -> str:
        """The advice of docs/how-to-choose.md for these numbers."""
        if silent := [name for name, norm in self.norms.items() if norm == 0]:
            found = ", ".join(map(repr, silent))
            return f"{found} had no gradient in any batch: check that it is computed from these parameters."
        if self.ratio >= _DOMINANT:
            largest = max(self.norms, key=self.norms.__getitem__)
            return f"{largest!r} is the update, whatever the rule: weigh the losses first."
        if len(self.norms) < 2:
            return "There is a single component, and nothing that it could conflict with: name two or more."
        if not self.conflicts:
            return "No two components had a gradient in the same batch: measure larger batches."
        if all(fraction <= _RARE for fraction in self.conflicts.values()):
            return "There is nothing to resolve: use Sum(). If a loss should count for more, give it a larger weight."
        opposed = any(mean > _OPPOSED for mean, _ in self.angles.values())
        pcd = "" if opposed else ", or PCD if the others must keep improving"
        return (
            f"If one loss is what you train for: Steer(toward=...){pcd}. If the losses are equals: PCGrad(), or "
            "GradVac() if they are related."
        )

    def __str__(self) -> str:
        lines = [
            f"{first!r} and {second!r} are {mean:.0f} ± {spread:.0f} degrees apart, and conflict in "
            f"{self.conflicts[first, second]:.0%} of the batches."
            for (first, second), (mean, spread) in self.angles.items()
        ]
        norms = ", ".join(f"{name!r} {norm:.3g}" for name, norm in self.norms.items())
        return "\n".join(
            [*lines, f"The norms are {norms}: the largest is {self.ratio:.3g} times the next.", self.advice]
        )


def survey(
    losses: Callable[[Any], Losses], batches: Iterable[Any], parameters: Iterable[Tensor], *, most: int | None = None
) -> Survey:
    """Measure the component gradients of each batch; no ``.grad`` is touched, and nothing is trained.

    The model keeps its mode: in training mode BatchNorm layers update their statistics. If tqdm is installed, a
    progress bar appears after five seconds.

    Args:
        losses: returns the components of a batch by name, as for :func:`~steer_optim.measure`.
        batches: such as a ``DataLoader``.
        parameters: whose gradients are compared.
        most: how many batches are measured; all by default.

    Returns:
        The :class:`Survey`.

    Raises:
        ValueError: there are no batches, or a gradient is not finite.
        TypeError, ValueError, RuntimeError: as for :func:`~steer_optim.measure`.

    Example:
        >>> import torch
        >>> from steer_optim.survey import survey
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> print(survey(lambda batch: {"main": (x * batch).sum(), "side": -x[0]}, [torch.ones(2)], [x]))
        'main' and 'side' are 135 ± 0 degrees apart, and conflict in 100% of the batches.
        The norms are 'main' 1.41, 'side' 1: the largest is 1.41 times the next.
        If one loss is what you train for: Steer(toward=...), or PCD if the others must keep improving. If the losses
        are equals: PCGrad(), or GradVac() if they are related.
    """
    monitor, parameters = Monitor(), list_parameters(parameters)
    for number, batch in enumerate(_progress(batches if most is None else islice(batches, most))):
        geometry = measure(losses(batch), parameters, retain_graph=False)
        if not geometry.norms.isfinite().all():
            found = dict(zip(geometry.names, geometry.norms.tolist(), strict=True))
            raise ValueError(f"a gradient of batch {number} is not finite: the norms are {found}")
        monitor.record(geometry)
    if not len(monitor):
        raise ValueError("there are no batches to measure")
    history = monitor.history()
    kind = "steer/norm/"
    norms = {key.removeprefix(kind): column for key, column in history.items() if key.startswith(kind)}
    angles, conflicts = {}, {}
    for first, second in combinations(sorted(norms), 2):
        angle = history.get(f"steer/angle/{first}~{second}")
        if angle is None:  # never together, or never finite
            continue
        together = (norms[first] > 0) & (norms[second] > 0) & angle.isfinite()
        if together.any():
            angles[first, second] = angle[together].mean().item(), angle[together].std(correction=0).item()
            conflict = history[f"steer/conflict/{first}~{second}"]
            conflicts[first, second] = conflict[together].mean().item()
    means = {name: norm[norm > 0].mean().nan_to_num().item() for name, norm in norms.items()}
    return Survey(len(monitor), angles, conflicts, means)


def _progress(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    bar: Iterable[Any] = tqdm(batches, desc="survey", delay=5)
    return bar
