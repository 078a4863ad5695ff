from collections import Counter, OrderedDict, deque
from contextlib import nullcontext

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from saving import assert_identical, bits, round_trip, snapshot, trained

from steer_optim import Geometry, SteeredOptimizer, checkpoint
from steer_optim.monitor import Monitor
from steer_optim.rules import PCGrad

SAFETENSORS = tuple(int(part) for part in safetensors.__version__.split(".")[:2])
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *((torch.uint64, torch.uint32, torch.uint16) if SAFETENSORS >= (0, 6) else ()),
    *((torch.complex64,) if SAFETENSORS >= (0, 7) else ()),
    *((torch.float8_e4m3fnuz, torch.float8_e5m2fnuz) if SAFETENSORS >= (0, 8) else ()),
]


# Save, load, continue.

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "tensor_lr": (torch.optim.Adam, {"lr": torch.tensor(1e-2), "foreach": False}),
    "fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
    "rprop": (torch.optim.Rprop, {"lr": 1e-2}),
    "asgd": (torch.optim.ASGD, {"lr": 1e-2}),
    "lbfgs": (torch.optim.LBFGS, {"lr": 0.1, "max_iter": 3, "history_size": 2}),
    "lbfgs_search": (torch.optim.LBFGS, {"max_iter": 3, "line_search_fn": "strong_wolfe"}),
}


def run(model, optimizer, steps):
    for x in steps:

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model(x) ** 2).mean() + (model(x.flip(0)) - 1).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def conv(name):
    # A channels_last state must stay so: fused kernels pair elements in the order of memory. LBFGS refuses it.
    layout = torch.contiguous_format if name.startswith("lbfgs") else torch.channels_last
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2).to(memory_format=layout), torch.nn.Flatten())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_continues_bit_for_bit(tmp_path, name):
    make, options = OPTIMIZERS[name]
    path = tmp_path / "optimizer.safetensors"
    data = torch.randn(6, 4, 2, 3, 3)
    model = conv(name)
    optimizer = make(model.parameters(), **options)
    run(model, optimizer, data[:3])
    checkpoint.save(path, optimizer)

    resumed = conv(name)
    resumed.load_state_dict(model.state_dict())
    other = make(resumed.parameters(), **options)
    checkpoint.load(path, other)
    assert_identical(other.state_dict(), snapshot(optimizer))
    run(model, optimizer, data[3:])
    run(resumed, other, data[3:])
    assert_identical(other.state_dict(), optimizer.state_dict())
    assert_identical(dict(resumed.state_dict()), dict(model.state_dict()))


def test_sparse_adam_continues(tmp_path):
    def make():
        embedding = torch.nn.Embedding(5, 2, sparse=True)
        return embedding, torch.optim.SparseAdam(embedding.parameters(), lr=0.1)

    (a, opt_a), (b, opt_b) = make(), make()
    a(torch.tensor([1, 3])).sum().backward()
    opt_a.step()
    checkpoint.save(tmp_path / "x", opt_a)
    b.load_state_dict(a.state_dict())
    checkpoint.load(tmp_path / "x", opt_b)
    for model, optimizer in ((a, opt_a), (b, opt_b)):
        optimizer.zero_grad()
        model(torch.tensor([0, 3])).square().sum().backward()
        optimizer.step()
    assert_identical(opt_b.state_dict(), opt_a.state_dict())
    assert bits(a.weight) == bits(b.weight)


def test_steered_optimizer_continues_with_its_rule(tmp_path):
    # PCGrad draws its order from a generator of its own, which is part of its state.
    def make():
        x = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        return x, SteeredOptimizer(torch.optim.AdamW([x], lr=0.1), PCGrad(seed=3))

    def step(x, optimizer):
        optimizer.zero_grad()
        optimizer.backward_components({"a": x @ x, "b": (x - 1).abs().sum(), "c": (x[0] + 2 * x[1] - x[2]) ** 2})
        optimizer.step()

    (x, optimizer), (y, resumed) = make(), make()
    for _ in range(5):
        step(x, optimizer)
    checkpoint.save(tmp_path / "x", optimizer)
    y.data.copy_(x.data)
    checkpoint.load(tmp_path / "x", resumed)
    assert_identical(resumed.state_dict(), optimizer.state_dict())
    for _ in range(20):
        step(x, optimizer)
        step(y, resumed)
    assert bits(x.data) == bits(y.data)
    assert_identical(resumed.state_dict(), optimizer.state_dict())


def test_plain_and_steered_read_each_other(tmp_path):
    plain = trained()
    checkpoint.save(tmp_path / "x", plain)
    steered = SteeredOptimizer(trained(steps=0), PCGrad())
    checkpoint.load(tmp_path / "x", steered)
    assert_identical(steered.inner.state_dict(), plain.state_dict())


def test_monitor_travels_in_extra(tmp_path):
    monitor, optimizer = Monitor(), trained()
    G = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    monitor.record(Geometry(("lang", "vis"), G, torch.ones(2, dtype=torch.float64)))
    checkpoint.save(tmp_path / "x", optimizer, extra={"monitor": monitor.state_dict()})
    other = Monitor()
    other.load_state_dict(checkpoint.load(tmp_path / "x", optimizer)["monitor"])
    assert_identical(other.history(), monitor.history())


# Values.

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
tensors = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.ones(shape).to(dtype))
)
trees = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.booleans() | st.none(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=trees)
def test_any_value_comes_back(tmp_path_factory, value):
    assert_identical(round_trip(tmp_path_factory.getbasetemp(), value), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6, 16), dtype=torch.uint8)
    value = [raw.view(dtype), raw.view(dtype)[0, 0], raw.view(dtype)[:, :0]]  # NaN payloads, 0-dim, empty
    assert_identical(round_trip(tmp_path, value), value)


def test_views_are_stored_as_what_they_show(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    value = {
        "same": base,
        "again": base,
        "slice": base[:, 1],
        "transposed": base.transpose(0, 2),
        "expanded": torch.tensor(7.0).expand(2, 3),
        **({"conjugate": torch.tensor([1 + 2j]).conj()} if torch.complex64 in DTYPES else {}),
        "grad": torch.ones(2, requires_grad=True) * 2,
    }
    found = round_trip(tmp_path, value)
    assert_identical(found, value)
    assert found["same"].data_ptr() != found["again"].data_ptr()
    assert found["expanded"].is_contiguous()  # each element is its own, so that an optimizer can write to it
    assert not found["grad"].requires_grad


def test_dense_strides_are_kept(tmp_path):
    value = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert round_trip(tmp_path, value).stride() == value.stride()


def test_names_that_look_alike_stay_apart(tmp_path):
    one, two, three = torch.ones(3).unbind()
    value = {"a.b": one, "a": {"b": two * 2, 0: three * 3, "0": three * 4}}
    assert_identical(round_trip(tmp_path, value), value)


def test_the_file_is_plain_safetensors(tmp_path):
    optimizer = trained()
    checkpoint.save(tmp_path / "x.safetensors", optimizer)
    stored = load_file(tmp_path / "x.safetensors")
    assert torch.equal(stored["optimizer.state.0.exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_modules_state_dict_keeps_its_order_and_its_metadata(tmp_path):
    state = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)).state_dict()
    state.move_to_end("0.weight")
    checkpoint.save(tmp_path / "x", trained(), extra={"model": state})
    loaded = checkpoint.load(tmp_path / "x", trained())["model"]
    assert type(loaded) is OrderedDict
    assert list(loaded) == list(state)
    assert loaded._metadata == state._metadata
    assert type(loaded._metadata) is OrderedDict
    assert_identical(dict(loaded), dict(state))
    checkpoint.save(tmp_path / "y", trained(), extra=state)
    assert checkpoint.load(tmp_path / "y", trained())._metadata == state._metadata


def test_names_that_are_no_text_are_kept(tmp_path):
    """As os.fsdecode gives for a file name in another encoding."""
    extra = {"\udcff": torch.ones(1), "\\udcff": torch.zeros(1)}
    checkpoint.save(tmp_path / "x", trained(), extra=extra)
    assert_identical(checkpoint.load(tmp_path / "x", trained()), extra)


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # of torch 2.6, from its own call
def test_a_scheduler_with_a_counter_of_milestones_comes_back(tmp_path):
    def make():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        parts = [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5], gamma=0.5) for _ in range(2)]
        return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])

    (optimizer, scheduler), (other, restored) = make(), make()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    checkpoint.save(tmp_path / "x", optimizer, extra={"scheduler": scheduler.state_dict()})
    restored.load_state_dict(checkpoint.load(tmp_path / "x", other)["scheduler"])
    assert restored.state_dict() == scheduler.state_dict()
    assert type(restored._schedulers[0].milestones) is Counter


def test_extra_is_on_the_cpu_whatever_the_default_device(tmp_path):
    optimizer, state = trained(), torch.get_rng_state()
    checkpoint.save(tmp_path / "x", optimizer, extra={"rng": state})
    with torch.device("meta"):
        extra = checkpoint.load(tmp_path / "x", optimizer)
    assert torch.equal(extra["rng"], state)


def test_the_wrappers_of_a_model_do_not_change_the_names_of_its_parameters(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1] = torch.compile(model[1], backend="eager")
    names = [name for name, _ in model.named_parameters()]
    assert "1._orig_mod.weight" in names
    for prefix, fits in (("", True), ("module.", True), ("other.", False)):
        parameters = [(f"{prefix}{name.replace('_orig_mod.', '')}", p) for name, p in model.named_parameters()]
        checkpoint.save(tmp_path / "x", torch.optim.SGD(model.named_parameters(), lr=0.1))
        with nullcontext() if fits else pytest.raises(ValueError, match=r"parameter 0 of group 0 is 0\.weight"):
            checkpoint.load(tmp_path / "x", torch.optim.SGD(parameters, lr=0.1))


CYCLE: list[object] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {2}]}, r"extra\.a\.1 is a builtins\.set"),
        ({"a": np.float64(1)}, r"extra\.a is a numpy\.float64"),
        ({"c": deque()}, r"extra\.c is a collections\.deque"),
        ({"t": torch.zeros(2).to_sparse()}, r"extra\.t, a torch\.sparse_coo tensor"),
        ({"t": torch.zeros(2, dtype=torch.complex128)}, r"extra\.t, a .* of torch\.complex128"),
        ({"t": torch.zeros(2, device="meta")}, r"extra\.t, a torch\.strided tensor of torch\.float32 on meta"),
        ({"a": CYCLE}, "nested too deeply, or contains itself"),
        ({"k": {frozenset(): 1}}, r"a key of extra\.k is a builtins\.frozenset"),
    ],
)
def test_unknown_types_are_refused_by_name(tmp_path, value, message):
    with pytest.raises(TypeError, match=message):
        checkpoint.save(tmp_path / "x", trained(), extra=value)
    assert not list(tmp_path.iterdir())
