"""Draw what steering did: norms, cosines, weights and losses over training, angles by visual dependency.

Every function takes plain data (``Monitor.history()``, or mappings of names to values), draws on the given axes or on a
new figure, and returns the figure: ``figure.savefig("x.png")``. Nothing here touches pyplot or its global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The ratio of two median norms above which a linear axis would show the smaller one as zero.
_APART = 20.0

Values: TypeAlias = "Tensor | Sequence[float]"

_Lines: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]  # steps and values by label

# The palette of Okabe and Ito, for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def norms(history: Mapping[str, Values], *, smooth: int = 1, axes: Axes | None = None) -> Figure:
    """Draw the norms of the component gradients over training (upper half of the paper's Fig. 7).

    The axis is logarithmic if one component's median norm is more than twenty times another's.

    Args:
        history: of a :class:`steer_optim.monitor.Monitor`: ``"step"`` and ``"steer/norm/..."``, ``(n,)`` each.
        smooth: draw the mean over this many last values, NaN left out.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the history has no norms.

    Example:
        >>> from steer_optim import plots
        >>> history = {"step": [0, 1], "steer/norm/std": [1.0, 0.9], "steer/norm/vis": [0.8, 0.7]}
        >>> figure = plots.norms(history)
        >>> figure.axes[0].get_ylabel()
        'gradient norm'

    References:
        arXiv 2606.00564, Fig. 7.
    """
    return _norms(axes, _columns(history, "norm"), smooth, ylabel="gradient norm")


def cosines(history: Mapping[str, Values], *, smooth: int = 1, axes: Axes | None = None) -> Figure:
    """Draw the cosines between the component gradients over training; below zero they conflict.

    Args:
        history: of a :class:`steer_optim.monitor.Monitor`: ``"step"`` and ``"steer/cos/..."``, ``(n,)`` each.
        smooth: as in :func:`norms`.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the history has no cosines, as with one component.

    Example:
        >>> from steer_optim import plots
        >>> figure = plots.cosines({"step": [0, 1], "steer/cos/std~vis": [0.4, -0.1]})
        >>> figure.axes[0].get_ylabel()
        'cosine between gradients'

    References:
        arXiv 2606.00564, Fig. 7.
    """
    columns = _columns(history, "cos")
    return _lines(axes, columns, smooth, level=0, ylabel="cosine between gradients", ylim=(-1.05, 1.05))


def lines(history: Mapping[str, Values], kind: str, *, smooth: int = 1, axes: Axes | None = None) -> Figure:
    """Draw any kind of number over training, a line for each component or pair.

    Args:
        history: of a :class:`steer_optim.monitor.Monitor`, or :func:`steer_optim.monitor.from_log`.
        kind: ``"loss"``, ``"weight"``, ``"norm"``, ``"cos"``, ``"angle"`` or ``"conflict"``.
        smooth: as in :func:`norms`.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the history has nothing of this kind.

    Example:
        >>> from steer_optim import plots
        >>> figure = plots.lines({"step": [0, 1], "steer/angle/std~vis": [40.0, 45.0]}, "angle")
        >>> figure.axes[0].get_ylabel()
        'angle'
    """
    return _lines(axes, _columns(history, kind), smooth, ylabel=kind)


def geometry(history: Mapping[str, Values], *, smooth: int = 1) -> Figure:
    """Draw norms above cosines over training, the paper's Fig. 7.

    If both are stable, a constant eta, and so a rarely refreshed Gramian, is as good as an exact one.

    Args:
        history: of a :class:`steer_optim.monitor.Monitor`.
        smooth: as in :func:`norms`.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the history has no norms or no cosines.

    Example:
        >>> from steer_optim import plots
        >>> history = {"step": [0, 1], "steer/norm/std": [1.0, 0.9], "steer/norm/vis": [0.8, 0.7]}
        >>> figure = plots.geometry({**history, "steer/cos/std~vis": [0.4, 0.3]})
        >>> len(figure.axes)
        2

    References:
        arXiv 2606.00564, Fig. 7.
    """
    figure = _figure(height=6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    norms(history, smooth=smooth, axes=above)
    cosines(history, smooth=smooth, axes=below)
    above.set_xlabel("")
    return figure


def weights(history: Mapping[str, Values], *, smooth: int = 1) -> Figure:
    """Draw the weights of the components above the norm of the update, over training.

    The norm is drawn beside that of the plain sum, an unsteered step. Steps that reused weights have none.

    Args:
        history: of a :class:`steer_optim.monitor.Monitor`.
        smooth: as in :func:`norms`.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the history has no weights.

    Example:
        >>> from steer_optim import plots
        >>> history = {"step": [0, 1], "steer/weight/std": [1.0, 0.9], "steer/weight/vis": [1.0, 2.1]}
        >>> figure = plots.weights({**history, "steer/update_norm": [3.0, 4.0], "steer/update_norm_ratio": [1.0, 2.0]})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['weight', 'norm of the update']
    """
    columns = _columns(history, "weight")
    if "steer/update_norm" not in history:
        raise ValueError("no step of the history took a Gramian: all of them reused weights")
    figure = _figure(height=6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    _lines(above, columns, smooth, xlabel="", ylabel="weight")
    steps, update = _tensor(history["step"]), _tensor(history["steer/update_norm"])
    plain = update / _tensor(history["steer/update_norm_ratio"])
    _norms(below, {"plain sum": (steps, plain), "steered": (steps, update)}, smooth, ylabel="norm of the update")
    below.lines[0].set(linewidth=5, alpha=0.4)  # seen where both are the same, as under a rule that preserves the norm
    return figure


def losses(
    histories: Mapping[str, Mapping[str, Values]], *, component: str, smooth: int = 1, axes: Axes | None = None
) -> Figure:
    """Draw one component's loss over training, a line per method.

    Args:
        histories: the history of a :class:`steer_optim.monitor.Monitor` for each method, by its name in the
            legend: ``"step"`` and ``"steer/loss/<component>"``, ``(n,)`` each.
        component: whose loss is drawn.
        smooth: as in :func:`norms`.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a history does not have the component.

    Example:
        >>> from steer_optim import plots
        >>> standard = {"step": [0, 1], "steer/loss/vis": [1.0, 1.1]}
        >>> steered = {"step": [0, 1], "steer/loss/vis": [1.0, 0.6]}
        >>> figure = plots.losses({"plain sum": standard, "steered": steered}, component="vis")
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['plain sum', 'steered']
    """
    lines = {}
    for method, history in histories.items():
        columns = _columns(history, "loss")
        if component not in columns:
            raise ValueError(f"the history of {method!r} has losses {sorted(columns)}; {component!r} is not one")
        lines[method] = columns[component]
    return _lines(axes, lines, smooth, ylabel=f"loss {_plain(repr(component))}")


def angles_by_decile(angles: Mapping[str, Values], *, axes: Axes | None = None) -> Figure:
    """Draw the angles between component gradients, from the least visual tokens to the most (the paper's Fig. 3).

    Args:
        angles: ``(bins,)`` by pair, in degrees: ``angle(...)`` of the geometry that
            :func:`steer_optim.vlm.analysis.angles_by_decile` returns, or a mean of several.
        axes: where to draw; a new figure by default.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: there are no angles.

    Example:
        >>> from steer_optim import plots
        >>> figure = plots.angles_by_decile({"lang, vis": [60.0, 75.0, 92.0], "std, vis": [50.0, 45.0, 42.0]})
        >>> figure.axes[0].get_ylabel()
        'angle between gradients (degrees)'

    References:
        arXiv 2606.00564, Fig. 3.
    """
    if not angles:
        raise ValueError("there are no angles to draw: pass at least one pair")
    axes = axes or _figure().subplots()
    axes.locator_params(axis="x", integer=True)
    lines = {pair: (torch.arange(len(values), device="cpu"), _tensor(values)) for pair, values in angles.items()}
    axes.set_ylabel("angle between gradients (degrees)")
    return _lines(axes, lines, marker="o", level=90, xlabel="visual dependency of the tokens (decile)")


def _columns(history: Mapping[str, Values], kind: str) -> _Lines:
    """Return steps and values of every number of a kind, by the name of its component or pair."""
    if not isinstance(history, Mapping):
        raise TypeError(f"a history must be a mapping, as of monitor.history(); got {type(history).__name__}")
    prefix = f"steer/{kind}/"
    found = {key.removeprefix(prefix): _tensor(values) for key, values in history.items() if key.startswith(prefix)}
    if not found:
        pairs = ": no two components had a gradient in one step" if kind in ("cos", "angle", "conflict") else ""
        raise ValueError(f"the history has no {prefix}...{pairs}; it has {', '.join(history) or 'nothing'}")
    steps = _tensor(history["step"])
    return {name: (steps, values) for name, values in found.items()}


def _norms(axes: Axes | None, lines: _Lines, smooth: int, *, ylabel: str) -> Figure:
    axes = axes or _figure().subplots()
    positive = [median for _, y in lines.values() if (median := y.nanmedian().item()) > 0]
    figure = _lines(axes, lines, smooth, ylabel=ylabel)
    if positive and max(positive) > _APART * min(positive):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    return figure


def _lines(
    axes: Axes | None, lines: _Lines, smooth: int = 1, *, marker: str = "", level: float | None = None, **settings: Any
) -> Figure:
    """Draw some lines on the given axes or on new ones, and a thin one at ``level``; return the figure."""
    axes = axes or _figure().subplots()
    for i, (label, (x, y)) in enumerate(lines.items()):
        present = ~y.isnan()  # the line of a component continues over steps without it
        x, y = x[present], y[present]
        if smooth > 1 and len(y):
            y = pad(y, (smooth - 1, 0), value=torch.nan).unfold(0, smooth, 1).nanmean(1)
        colour = COLOURS[i % len(COLOURS)]
        dot = marker or ("." if len(y) == 1 else None)  # a line of one point would not show
        axes.plot(x.tolist(), y.tolist(), color=colour, marker=dot, linewidth=1.6, label=_plain(label))
    if level is not None:
        axes.axhline(level, color="0.4", linewidth=0.8, zorder=1)
    axes.set(**{"xlabel": "step", **settings})
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return cast("Figure", axes.figure)


def _tensor(values: Values) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()


def _figure(*, height: float = 3.6) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'steer_optim[plots]'") from error
    return Figure(figsize=(5.4, height), dpi=160, layout="constrained")


def _plain(label: str) -> str:
    """Return a label that matplotlib shows as it is: it hides one that begins with ``_``, and ``$`` begins math."""
    return " " * label.startswith("_") + label.replace("$", r"\$")
