import copy
import math
from dataclasses import replace

import pytest
import torch

from steer_optim import Geometry, Steer, SteeredOptimizer, Sum
from steer_optim.monitor import Monitor, scalars


def geometry(names=("lang", "vis"), *, scopes=(), losses=True, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    k, shape = len(names), (len(scopes),) if scopes else ()
    g = torch.randn(*shape, k, 5, dtype=torch.float64, generator=generator)
    weights = torch.rand(*shape, k, dtype=torch.float64, generator=generator)
    values = torch.rand(k, dtype=torch.float64, generator=generator)
    return Geometry(
        names, (g @ g.mT).to(device), weights.to(device), values.to(device) if losses else None, tuple(scopes)
    )


def test_scalars_are_the_numbers_of_the_geometry():
    step = geometry()
    assert scalars(step) == {
        "steer/loss/lang": float(step.losses[0]),
        "steer/loss/vis": float(step.losses[1]),
        "steer/norm/lang": float(step.norm("lang")),
        "steer/norm/vis": float(step.norm("vis")),
        "steer/weight/lang": float(step.weight("lang")),
        "steer/weight/vis": float(step.weight("vis")),
        "steer/cos/lang~vis": float(step.cosine("lang", "vis")),
        "steer/angle/lang~vis": float(step.angle("lang", "vis")),
        "steer/conflict/lang~vis": float(step.conflicts[0, 1]),
        "steer/update_norm": pytest.approx(float(step.update_norm), rel=1e-15),  # squared and rooted once more
        "steer/update_norm_ratio": pytest.approx(float(step.update_norm / step.sum_norm), rel=1e-15),
    }


def test_unknown_losses_are_left_out():
    assert not any(key.startswith("steer/loss/") for key in scalars(geometry(losses=False)))


def test_names_do_not_depend_on_the_order_of_components():
    step = geometry(("vis", "lp", "std"))
    order = [2, 0, 1]
    names = tuple(step.names[i] for i in order)
    other = Geometry(names, step.G[order][:, order], step.weights[order], step.losses[order])
    assert scalars(other) == pytest.approx(scalars(step), rel=1e-14)  # sums in another order
    assert {key for key in scalars(step) if "cos" in key} == {
        "steer/cos/lp~std",
        "steer/cos/lp~vis",
        "steer/cos/std~vis",
    }


def test_scopes_add_up_to_the_whole_model():
    step = geometry(scopes=("a", "b", "c"), seed=3)
    values = scalars(step)
    whole = Geometry(step.names, step.G.sum(0), torch.ones(2, dtype=torch.float64))
    assert values["steer/norm/vis"] == float(whole.norm("vis"))
    assert values["steer/cos/lang~vis"] == float(whole.cosine("lang", "vis"))
    assert values["steer/weight/vis"] == float(step.weights[:, 1].mean())
    conflicting = [bool(G[0, 1] < 0) for G in step.G]
    assert set(conflicting) == {True, False}, "the example must have scopes of both kinds"
    assert values["steer/conflict/lang~vis"] == pytest.approx(sum(conflicting) / 3, rel=1e-15)
    update = math.sqrt(sum(float(w @ G @ w) for w, G in zip(step.weights, step.G, strict=True)))
    assert values["steer/update_norm"] == pytest.approx(update, rel=1e-14)
    assert values["steer/update_norm_ratio"] == pytest.approx(update / float(whole.sum_norm), rel=1e-14)


def test_every_scope_of_a_step_has_the_same_norms_and_cosines():
    def step(scope):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        optimizer = SteeredOptimizer(torch.optim.SGD(model.parameters()), Sum(), scope=scope)
        y = model(torch.randn(5, 3, dtype=torch.float64))
        return optimizer.backward_components({"a": y[:, 0].square().mean(), "b": (y.sum(1) - 1).square().mean()})

    whole, scoped = scalars(step("model")), step("tensor")
    assert scoped.G.shape == (4, 2, 2)
    values = scalars(scoped)
    for key in whole.keys() - {"steer/conflict/a~b"}:
        assert values[key] == pytest.approx(whole[key], rel=1e-12), key  # the dot products are cut otherwise


def test_history_is_scalars_over_training():
    monitor = Monitor()
    steps = [geometry(seed=seed) for seed in range(600)]  # more than two batches, and a rest
    for step in steps:
        monitor.record(step)
    history = monitor.history()
    assert len(monitor) == 600
    assert history.pop("step").tolist() == list(range(600))
    rows = [scalars(step) for step in steps]
    assert history.keys() == rows[0].keys()
    for key, column in history.items():
        assert column.tolist() == [row[key] for row in rows]


@pytest.mark.parametrize("batch", [1, 4, 256])
def test_absent_components_are_nan(monkeypatch, batch):
    monkeypatch.setattr("steer_optim.monitor._BATCH", batch)
    monitor = Monitor()
    names = [
        ("std", "vis"),
        ("std", "vis", "lp"),
        ("vis", "std"),
        ("lp", "std", "vis"),
        ("std",),
        ("std", "vis"),
    ]
    steps = [geometry(n, seed=seed) for seed, n in enumerate(names)]
    for step in steps:
        monitor.record(step)
    history = monitor.history()
    for i, step in enumerate(steps):
        values = scalars(step)
        found = {key: float(column[i]) for key, column in history.items() if key != "step" and not column[i].isnan()}
        assert found == values
    assert history["steer/norm/lp"].isnan().tolist() == [True, False, True, False, True, True]


def test_means_are_over_what_the_last_steps_have():
    monitor = Monitor()
    steps = [geometry(), geometry(seed=1), replace(geometry(seed=2), age=1), geometry(("lang",), seed=3)]
    for step in steps:
        monitor.record(step)
    rows = [scalars(step) for step in steps]
    for last in (1, 2, 3, 100):
        present = {key: [row[key] for row in rows[-last:] if key in row] for row in rows[-last:] for key in row}
        # Sums of at most four float64 values of order 1 (angles: 100), in another order.
        assert monitor.means(last) == pytest.approx({k: sum(v) / len(v) for k, v in present.items()}, rel=1e-14)
    assert Monitor().means(last=1) == {}


def test_a_micro_batch_has_nothing_to_record():
    monitor = Monitor()
    monitor.record(None)
    assert len(monitor) == 0


def test_steps_are_counted_from_the_last_one():
    monitor = Monitor()
    for step in (10, None, 20, None):
        monitor.record(geometry(), step=step)
    assert monitor.history()["step"].tolist() == [10, 11, 20, 21]


def test_recording_reads_nothing_from_the_device():
    # A meta tensor has no values: anything that would wait for them raises.
    monitor = Monitor()
    monitor.record(geometry(device="meta"))
    monitor.record(geometry(scopes=("a", "b"), device="meta"))
    with pytest.raises(NotImplementedError):
        monitor.history()


def test_record_does_not_alias_the_geometry():
    monitor, step = Monitor(), geometry()
    expected = scalars(step)
    monitor.record(step)
    for tensor in (step.G, step.weights, step.losses):
        tensor.zero_()
    assert {key: float(column[0]) for key, column in monitor.history().items() if key != "step"} == expected


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_resumes(tmp_path, default):
    """Also where new tensors are made on another device by default."""
    straight, before, after = Monitor(), Monitor(), Monitor()
    steps = [geometry(("std", "vis", "lp")[: 2 + seed % 2], seed=seed) for seed in range(20)]
    other = geometry(("other",))
    for step in steps:
        straight.record(step)
    expected = straight.history()
    with torch.device(default):
        for step in steps[:7]:
            before.record(step)
        torch.save(before.state_dict(), tmp_path / "monitor.pt")
        after.record(other)  # dropped by loading
        after.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
        for step in steps[7:]:
            after.record(step)
        found = after.history()
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=0, equal_nan=True)


def test_a_state_dict_is_a_snapshot():
    monitor = Monitor()
    monitor.record(geometry())
    state = monitor.state_dict()
    kept = copy.deepcopy(state)
    monitor.record(geometry(seed=1))
    monitor.history()
    assert state["step"].tolist() == [0]
    assert state.keys() == kept.keys() == monitor.state_dict().keys()
    assert all(torch.equal(state[key], kept[key]) for key in kept)


@pytest.mark.parametrize(
    "record",
    [{}, {"weight": torch.ones(2, 2)}, {"step": [0, 1], "steer/norm/a": [1.0]}, {"step": [[0]]}, {"step": 3}],
    ids=["empty", "another", "ragged", "nested", "number"],
)
def test_what_is_no_record_is_refused_and_changes_nothing(record):
    monitor = Monitor()
    monitor.record(Geometry(("a",), torch.ones(1, 1).double(), torch.ones(1).double()))
    before = monitor.history()
    with pytest.raises(ValueError, match="a record has 'step' and other columns of the same length; got shapes"):
        monitor.load_state_dict(record)
    assert str(monitor.history()) == str(before)


def test_empty():
    assert list(Monitor().history()) == ["step"]
    monitor = Monitor()
    monitor.load_state_dict(Monitor().state_dict())
    assert len(monitor) == 0


def test_a_step_that_is_no_whole_number_is_refused():
    geometry = Geometry(("a",), torch.eye(1).double(), torch.ones(1).double())
    monitor = Monitor()
    with pytest.raises(TypeError, match="integer"):
        monitor.record(geometry, step=0.25)
    assert len(monitor) == 0
    monitor.record(replace(geometry, losses=torch.ones(1)), step=3)
    assert monitor.history()["steer/loss/a"].tolist() == [1.0]


def test_a_component_without_a_gradient_has_no_angle():
    x, monitor = torch.ones(2, requires_grad=True), Monitor()
    optimizer = SteeredOptimizer(torch.optim.SGD([x]), Sum())
    for present in (True, False, False):
        monitor.record(optimizer.backward_components({"a": x[0], "b": x[1] - x[0] if present else None}))
    means, geometry = monitor.means(3), optimizer.geometry
    assert (means["steer/angle/a~b"], means["steer/conflict/a~b"]) == pytest.approx((135.0, 1.0))
    assert "steer/cos/a~b" not in scalars(geometry)


def test_means_of_norms_and_weights_leave_out_absent_components():
    """Of two tasks in turn, each of norm 1, and of a third whose gradient is zero."""
    x, monitor = torch.ones(3, requires_grad=True), Monitor()
    optimizer = SteeredOptimizer(torch.optim.SGD([x]), Sum())
    for step in range(4):
        monitor.record(optimizer.backward_components({"a": x[step % 2] if step else None, "b": 0 * x[2]}))
    means = monitor.means(4)
    assert (means["steer/norm/a"], means["steer/weight/a"], means["steer/norm/b"]) == (1.0, 1.0, 0.0)
    assert monitor.history()["steer/norm/a"].isnan().tolist() == [True, False, False, False]


def test_a_component_that_only_another_process_has_keeps_its_numbers():
    step = geometry()
    values = scalars(replace(step, losses=torch.tensor([1.0, torch.nan], dtype=torch.float64)))
    assert values["steer/norm/vis"] == float(step.norm("vis"))


def test_a_component_that_is_absent_between_refreshes_has_no_weight():
    x = torch.ones(2, requires_grad=True)
    optimizer = SteeredOptimizer(torch.optim.SGD([x]), Sum(), refresh_every=3)
    for present in (True, False):
        values = scalars(optimizer.backward_components({"a": x[0], "b": x[1] if present else None}))
    assert math.isnan(values["steer/weight/b"])
    assert values["steer/weight/a"] == 1


def test_scopes_without_any_gradient_have_their_mean_weight():
    x = torch.ones(2, requires_grad=True)
    optimizer = SteeredOptimizer(torch.optim.SGD([x]), Steer("a", gain=1.0, preserve_norm=False), scope="tensor")
    values = scalars(optimizer.backward_components({"a": 0 * x[0], "b": 0 * x[1]}))
    assert (values["steer/weight/a"], values["steer/weight/b"]) == (2.0, 1.0)


@pytest.mark.parametrize("frozen", [0, 5])
def test_scopes_without_gradients_change_no_number(frozen):
    parameters = [torch.ones(2, requires_grad=i >= frozen) for i in range(frozen + 1)]
    optimizer = SteeredOptimizer(torch.optim.SGD(parameters), Steer("a", preserve_norm=False), scope="tensor")
    x = parameters[-1]
    values = scalars(optimizer.backward_components({"a": x[0], "b": -2 * x[0]}))
    assert (values["steer/weight/a"], values["steer/weight/b"], values["steer/conflict/a~b"]) == (3.0, 1.0, 1.0)
    assert values["steer/angle/a~b"] == 180


def test_gradients_that_share_no_tensor_are_perpendicular_and_in_no_conflict():
    x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = SteeredOptimizer(torch.optim.SGD([x, y]), Sum(), scope="tensor")
    values = scalars(optimizer.backward_components({"a": x[0], "b": y[0]}))
    assert values["steer/angle/a~b"] == 90
    assert "steer/conflict/a~b" not in values


@pytest.mark.parametrize("other", [None, torch.ones(())])
def test_something_else_than_a_geometry_is_refused(other):
    with pytest.raises(TypeError, match=r"must be a Geometry.*after the backward pass"):
        scalars(other)
