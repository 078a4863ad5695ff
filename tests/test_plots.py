import sys

import pytest
import torch

from steer_optim import Geometry, plots
from steer_optim.monitor import Monitor

pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _no_pyplot(monkeypatch):
    # Importing it chooses a backend and keeps every figure alive: a library must not.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)


@pytest.fixture
def history():
    monitor = Monitor()
    for step in range(6):
        names = ("std", "vis", "lp") if step % 2 else ("std", "vis")
        g = torch.randn(len(names), 4, dtype=torch.float64)
        weights, losses = torch.ones(len(names), dtype=torch.float64), torch.rand(len(names), dtype=torch.float64)
        monitor.record(Geometry(names, g @ g.T, weights, losses), step=10 * step)
    return monitor.history()


def lines(axes):
    """What is drawn, by the label in the legend."""
    handles, labels = axes.get_legend_handles_labels()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == labels
    return {label: line.get_xydata().tolist() for line, label in zip(handles, labels, strict=True)}


def points(history, key):
    pairs = zip(history["step"].tolist(), history[key].tolist(), strict=True)
    return [[float(x), y] for x, y in pairs if y == y]


def test_norms(history):
    (axes,) = plots.norms(history).axes
    assert lines(axes) == {name: points(history, f"steer/norm/{name}") for name in ("std", "vis", "lp")}
    assert [x for x, _ in lines(axes)["lp"]] == [10.0, 30.0, 50.0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "gradient norm")
    assert axes.get_ylim()[0] == 0


def test_cosines(history):
    (axes,) = plots.cosines(history).axes
    assert lines(axes) == {pair: points(history, f"steer/cos/{pair}") for pair in ("std~vis", "lp~std", "lp~vis")}
    assert axes.get_ylim()[0] < -1 < 1 < axes.get_ylim()[1]


def test_geometry_is_norms_above_cosines(history):
    above, below = plots.geometry(history).axes
    assert lines(above) == lines(plots.norms(history).axes[0])
    assert lines(below) == lines(plots.cosines(history).axes[0])
    assert above.get_position().y0 > below.get_position().y0
    assert (above.get_xlabel(), below.get_xlabel()) == ("", "step")


def test_norms_far_apart_are_on_a_logarithmic_axis():
    history = {"step": [0, 1, 2], "steer/norm/a": [9.0, 2.0, 1.0], "steer/norm/b": [0.0, 0.1, 0.11]}
    (axes,) = plots.norms(history).axes
    assert axes.get_yscale() == "linear"  # not exactly twenty times
    (axes,) = plots.norms({**history, "steer/norm/b": [0.0, 0.09, 0.1]}).axes
    assert axes.get_yscale() == "log"
    (axes,) = plots.norms({**history, "steer/norm/b": [0.0, 0.0, 0.1]}).axes
    assert axes.get_yscale() == "linear"  # which shows a zero


def test_weights_above_the_length_of_the_update(history):
    above, below = plots.weights(history).axes
    assert lines(above) == {name: points(history, f"steer/weight/{name}") for name in ("std", "vis", "lp")}
    found = lines(below)
    assert found["steered"] == points(history, "steer/update_norm")
    # The history's weights are 1: the update is the plain sum.
    assert found["plain sum"] == [[x, pytest.approx(y)] for x, y in found["steered"]]
    assert (above.get_ylabel(), below.get_ylabel(), below.get_xlabel()) == ("weight", "norm of the update", "step")


def test_smoothing_is_the_mean_of_the_last_values(history):
    (axes,) = plots.losses({"run": history}, component="lp", smooth=2).axes
    (x, a), (y, b), (z, c) = points(history, "steer/loss/lp")
    assert lines(axes)["run"] == [[x, a], [y, pytest.approx((a + b) / 2)], [z, pytest.approx((b + c) / 2)]]
    for figure in (plots.norms, plots.cosines, plots.geometry, plots.weights):
        smoothed, plain = ([lines(axes) for axes in figure(history, smooth=n).axes] for n in (3, 1))
        assert smoothed != plain


def test_losses(history):
    other = {"step": [0, 1], "steer/loss/vis": [3.0, 2.0]}
    (axes,) = plots.losses({"plain": other, "steered": history}, component="vis").axes
    assert lines(axes) == {"plain": [[0.0, 3.0], [1.0, 2.0]], "steered": points(history, "steer/loss/vis")}
    assert "vis" in axes.get_ylabel()


def test_angles_by_decile():
    angles = {"lang, vis": torch.linspace(60, 92, 10), "std, vis": [45.0] * 10}
    (axes,) = plots.angles_by_decile(angles).axes
    assert lines(axes)["std, vis"] == [[float(i), 45.0] for i in range(10)]
    assert lines(axes)["lang, vis"][9] == [9.0, 92.0]
    assert "degrees" in axes.get_ylabel()
    assert "decile" in axes.get_xlabel()


def test_draws_on_the_axes_it_is_given(history):
    figure = plots.norms(history)
    (axes,) = figure.axes
    axes.clear()
    assert plots.cosines(history, axes=axes) is figure
    assert "std~vis" in lines(axes)


def test_colours_differ(history):
    (axes,) = plots.norms(history).axes
    assert len({line.get_color() for line in axes.get_lines()}) == 3


def test_saves_without_a_display(history, tmp_path):
    plots.geometry(history).savefig(tmp_path / "x.png")
    plots.geometry(history).savefig(tmp_path / "x.svg")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_there_is_named(history):
    with pytest.raises(ValueError, match=r"no steer/cos/.*; it has step, steer/norm/std"):
        plots.cosines({"step": [0], "steer/norm/std": [1.0]})
    with pytest.raises(ValueError, match=r"history of 'b' has losses \['std'\]; 'vis' is not one"):
        plots.losses({"a": history, "b": {"step": [0], "steer/loss/std": [1.0]}}, component="vis")
    with pytest.raises(ValueError, match="no angles"):
        plots.angles_by_decile({})


def test_matplotlib_missing_names_the_extra(history, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'steer_optim\[plots\]'"):
        plots.norms(history)


def test_any_name_is_in_the_legend(tmp_path):
    monitor, names = Monitor(), ("_aux", "$x^{$", "100%")
    monitor.record(Geometry(names, torch.eye(3).double(), torch.ones(3).double(), torch.ones(3).double()))
    figure = plots.geometry(monitor.history())
    figure.savefig(tmp_path / "x.png")
    found = [text.get_text().strip().replace(r"\$", "$") for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(found) == sorted(names)
    plots.losses({"_run": monitor.history()}, component="$x^{$").savefig(tmp_path / "x.png")
