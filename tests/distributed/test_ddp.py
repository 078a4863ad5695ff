"""DistributedDataParallel: replicas stay equal bit for bit and train as one process on the whole batch."""

import contextlib
import itertools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from launcher import processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from training import (
    OPTIONS,
    assert_close,
    assert_same_bits,
    assert_trained_alike,
    batch,
    components,
    make_model,
    replicated,
    share,
    steered,
    train,
    train_alone,
    whole,
)

from steer_optim import VGS, GradVac, Steer, SteeredOptimizer, Sum, holding
from steer_optim.rules import Rule, Weighting
from steer_optim.vlm import DecomposedDistillation


def sgd(parameters: list[nn.Parameter], rule: Rule | None = None, **options) -> SteeredOptimizer:
    return SteeredOptimizer(torch.optim.SGD(parameters, lr=1.0), rule or Sum(), data_parallel=True, **options)


@processes(2, option=OPTIONS)
def test_replicas_train_as_one_process(option):
    model = replicated(option)
    train(model, steered(model, data_parallel=True))
    assert_trained_alike(model, train_alone())


@processes(2, option=["find_unused_parameters", "static_graph"], every=[1, 3])
def test_a_model_of_several_outputs_of_which_a_component_reads_one(option, every):
    """DDP joins the outputs in one node, which passes no gradient on to the others."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.a, self.b = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

        def forward(self, x):
            x = self.trunk(x).tanh()
            return {"a": self.a(x), "b": self.b(x)}

    def train_on(rows, *, data_parallel):
        torch.manual_seed(0)
        model = Heads()
        optimizer = steered(model, Steer("a"), refresh_every=every, data_parallel=data_parallel)
        wrapped = DistributedDataParallel(model, **OPTIONS[option]) if data_parallel else model
        for step in range(4):
            optimizer.zero_grad()
            out = wrapped(rows(batch(step)))
            optimizer.backward_components({name: x.square().mean(0).sum() for name, x in out.items()})
            optimizer.step()
        return model

    assert_trained_alike(train_on(share, data_parallel=True), train_on(lambda x: x, data_parallel=False))


@processes(2, fused=[True, False])
def test_gradients_keep_the_memory_format_of_their_parameters(fused):
    """A fused kernel pairs parameters and gradients in the order of memory."""
    rows = torch.randn(4, 3, 5, 5)

    def trained(module: nn.Module, images: torch.Tensor, **options) -> torch.Tensor:
        parameters = list(module.parameters())
        optimizer = SteeredOptimizer(torch.optim.AdamW(parameters, lr=0.1, fused=fused), Steer("b"), **options)
        for _ in range(2):
            optimizer.zero_grad()
            out = module(images)
            optimizer.backward_components({"a": out.square().mean(), "b": -out.mean()})
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in parameters])

    def convolution() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last)

    rows = rows.double().to(memory_format=torch.channels_last)
    found = trained(DistributedDataParallel(convolution()), share(rows), data_parallel=True)
    # The means of the halves are added in another order: a few roundings of 1e-16, enlarged by Adam.
    torch.testing.assert_close(found, trained(convolution(), rows, data_parallel=False), rtol=0, atol=1e-12)


@processes(3, scope=["model", "group", "tensor"], rule=[VGS(), GradVac(beta=0.3)])
def test_every_scope(scope, rule):
    model = replicated()
    train(model, steered(model, rule, scope=scope, data_parallel=True))
    assert_trained_alike(model, train_alone(rule, scope=scope))


@processes(2, option=OPTIONS, no_sync=[False, True])
def test_accumulated_micro_batches_are_one_batch(option, no_sync):
    if no_sync and "static" in option:
        return  # torch itself fails there, in one plain backward pass
    model = replicated(option)
    optimizer = steered(model, data_parallel=True)
    for step in range(4):
        optimizer.zero_grad()
        for i in range(3):
            with model.no_sync() if no_sync and i < 2 else contextlib.nullcontext():
                output = model(share(share(batch(step)), 3, i))
            losses = {name: loss / 3 for name, loss in components(output).items()}
            optimizer.backward_components(losses, accumulate=i < 2)
        optimizer.step()
    assert_trained_alike(model, train_alone())


@processes(2, rank_1=[[-1.0, 1.0], [1.0, 1.0]])
def test_the_mean_is_projected_and_not_what_each_replica_projected(rank_1):
    """The mean of (-1, 1) and (1, 1) has no conflict with (1, 0); that of one (-1, 1) for all has."""
    p = nn.Parameter(torch.zeros(2))
    v = torch.tensor([-1.0, 1.0] if dist.get_rank() == 0 else rank_1)
    sgd([p], Steer(toward="first", preserve_norm=False)).backward_components({"first": p[0], "second": p @ v})
    assert p.grad.tolist() == [1, 1]


@processes(2, option=OPTIONS)
def test_a_parameter_used_on_one_rank_only_is_zero_elsewhere_and_none_if_used_nowhere(option):
    model = make_model()
    model.here, model.nowhere = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    model = DistributedDataParallel(model, **OPTIONS[option])
    optimizer = sgd(list(model.parameters()))
    for _ in range(2):  # a static graph delays its first reduction
        optimizer.zero_grad()
        loss = model(share(batch(0))).sum()
        if dist.get_rank() == 1:
            loss = loss + model.module.here @ torch.tensor([2.0, 4.0])
        optimizer.backward_components({"loss": loss})
        assert model.module.here.grad.tolist() == [1, 2]
        assert model.module.nowhere.grad is None


@processes(2)
def test_a_component_may_reach_nothing_here_if_it_does_elsewhere():
    p, other = nn.Parameter(torch.zeros(2)), torch.zeros(2, requires_grad=True)
    second = (p if dist.get_rank() == 1 else other).sum()
    geometry = sgd([p]).backward_components({"first": p[0], "second": second})
    assert p.grad.tolist() == [1.5, 0.5]
    assert geometry.G.tolist() == [[1, 0.5], [0.5, 0.5]]
    # A leaf that no module has gets what a plain backward pass gives it.
    assert other.grad is None if dist.get_rank() == 1 else other.grad.tolist() == [1, 1]


@processes(2, decomposition=["vgs-frozen", "vgs", "standard", "exact", "language"], reduction=["token", "sequence"])
def test_a_rank_without_tokens(decomposition, reduction):
    """As if its rows were not there; gradients are averaged, so the count is that of all ranks over their number."""
    method = DecomposedDistillation(decomposition, reduction=reduction)
    logits = {name: torch.randn(4, 3, 7, dtype=torch.float64) for name in method.views}
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[0, 1:] = False

    def gradient(rows: slice, mask: torch.Tensor, count: torch.Tensor, **options) -> torch.Tensor:
        p = nn.Parameter(torch.ones(7, dtype=torch.float64))
        views = {name: p * x[rows] if name.startswith("student") else x[rows] for name, x in logits.items()}
        losses = method(views, mask, count=count)
        optimizer = SteeredOptimizer(torch.optim.SGD([p], lr=1.0), method.rule(), **options)
        optimizer.backward_components(losses)
        return p.grad

    expected = gradient(slice(2), mask[:2], method.count(mask[:2]), data_parallel=False)
    mask[2:] = False
    rank = dist.get_rank()
    mine = slice(2 * rank, 2 * rank + 2)
    found = gradient(mine, mask[mine], method.count(mask) / 2, data_parallel=True)
    assert_same_bits(found)
    assert_close(found, expected)


@processes(2)
def test_several_dtypes():
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
    ps = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes * 2]
    rank = dist.get_rank()
    first = sum((p[0] * (1 + 2 * rank)).real.double() for p in ps)
    second = sum((p[1:] * (1 - rank)).real.double().sum() for p in ps)
    geometry = sgd(ps).backward_components({"first": first, "second": second})
    for p in ps:
        assert p.grad.dtype == p.dtype
        assert p.grad.tolist() == [2, 0.5, 0.5]
    assert geometry.G.tolist() == [[40, 0], [0, 5]]


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has one dtype for both")
@processes(2, refresh_every=[1, 2])
def test_gradients_of_another_dtype_than_their_parameters(refresh_every):
    """Also of one that is reached on one replica only."""
    a, b = parameters = [nn.Parameter(torch.zeros(3, dtype=torch.bfloat16)) for _ in range(2)]
    for p in parameters:
        p.grad_dtype = torch.float32
    rank, optimizer = dist.get_rank(), sgd(parameters, refresh_every=refresh_every)
    for _ in range(2):
        optimizer.zero_grad()
        loss = (1 + 2.0**-7 * rank) * (a.float().sum() + (b.float().sum() if rank else 0))
        optimizer.backward_components({"loss": loss})
        assert a.grad.dtype == b.grad.dtype == torch.float32
    assert a.grad.tolist() == [1 + 2.0**-8] * 3  # bfloat16 has no such number
    assert b.grad.tolist() == [0.5 + 2.0**-8] * 3


@processes(4, scope=["model", "tensor"])
def test_more_replicas_than_elements(scope):
    """Some hold nothing but padding, or nothing at all."""
    ps = [nn.Parameter(torch.ones(n)) for n in (1, 0, 2)]
    loss = ps[0].sum() * dist.get_rank() + ps[1].sum() + ps[2] @ torch.tensor([1.0, 2.0])
    geometry = sgd(ps, scope=scope).backward_components({"loss": loss})
    assert [p.grad.tolist() for p in ps] == [[1.5], [], [1, 2]]
    assert geometry.G.flatten().tolist() == ([7.25] if scope == "model" else [2.25, 0, 5])


@processes(2, chunk=[1, 7, 30], scope=["model", "tensor"])
def test_a_model_larger_than_one_message(chunk, scope):
    holding._SHORTEST = holding._LONGEST = chunk
    model = replicated()
    train(model, steered(model, scope=scope, data_parallel=True))
    assert_trained_alike(model, train_alone(scope=scope))


@given(
    sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=8),
    replicas=st.integers(1, 4),
    length=st.integers(1, 20),
)
def test_every_element_is_in_one_piece_of_one_replica_and_counts_to_its_scope(sizes, replicas, length):
    members = [(scope, torch.empty(n)) for scope, n in sorted(sizes, key=lambda size: size[0])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holding, "_SHORTEST", length)
        patch.setattr(holding, "_LONGEST", length)
        buffer = holding._FlatBuffer(members, replicas)
    owner = [scope for scope, p in members for _ in range(p.numel())]
    assert all(message % replicas == 0 for message in buffer.messages)
    assert len(owner) <= sum(buffer.messages) < len(owner) + replicas
    found = {}
    for rank in range(replicas):
        begins = iter(sum(buffer.messages[:i]) for i in range(len(buffer.messages)))
        for scope, start, stop in buffer.parts(rank, replicas):
            if start == 0:
                begin = next(begins)
                size = buffer.messages[[*itertools.accumulate(buffer.messages, initial=0)].index(begin)] // replicas
            places = range(begin + rank * size + start, begin + rank * size + stop)
            assert not found.keys() & set(places)
            found |= dict.fromkeys(places, scope)
    assert sorted(found) == list(range(sum(buffer.messages)))
    assert [found[i] for i in range(len(owner))] == owner


@processes(2)
def test_an_inf_on_one_rank_makes_all_skip():
    model = replicated()
    optimizer = steered(model, GradVac(beta=0.3), data_parallel=True)
    scaler = torch.amp.GradScaler(batch(0).device.type, init_scale=2.0**10, growth_interval=100)

    def step(i: int, factor: float = 1.0) -> None:
        optimizer.zero_grad()
        losses = components(model(share(batch(i))))
        scaler.scale(optimizer.join({**losses, "vis": losses["vis"] * factor})).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    step(0)
    before, memory = whole(model.parameters()), optimizer.state_dict()["param_groups"]
    step(1, factor=float("inf") if dist.get_rank() == 1 else 1.0)
    assert torch.equal(whole(model.parameters()), before)
    assert optimizer.state_dict()["param_groups"] == memory
    assert scaler.get_scale() == 2.0**9
    step(1)
    alone = make_model()
    train(alone, steered(alone, GradVac(beta=0.3), data_parallel=False), rows=lambda x: x, steps=range(2))
    assert_trained_alike(model, alone, tolerance=1e-12)  # the scaler unscales by a reciprocal rounded to float32


@processes(2)
def test_rule_memory_is_the_same_on_every_rank_and_resumes():
    rule = GradVac(beta=0.3)
    model = replicated()
    optimizer = steered(model, rule, data_parallel=True)
    train(model, optimizer, steps=range(2))
    resumed = replicated()
    resumed.load_state_dict(model.state_dict())
    other = steered(resumed, rule, data_parallel=True)
    other.load_state_dict(optimizer.state_dict())
    train(resumed, other, steps=range(2, 4))
    assert_trained_alike(resumed, train_alone(rule))


@processes(4)
def test_a_group_of_some_processes():
    """Two models, each on two replicas that do not sit side by side."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[dist.get_rank() % 2]
    model = DistributedDataParallel(make_model(), process_group=group)
    optimizer = steered(model, data_parallel=group)
    train(model, optimizer, rows=lambda x: share(x, 2, dist.get_rank() // 2))
    assert_trained_alike(model, train_alone())


@processes(2)
def test_processes_that_train_by_themselves():
    p = nn.Parameter(torch.zeros(1))
    optimizer = SteeredOptimizer(torch.optim.SGD([p], lr=1.0), Sum(), data_parallel=False)
    optimizer.backward_components({"loss": p * (1 + dist.get_rank())})
    assert p.grad.item() == 1 + dist.get_rank()


@processes(4, k=[1, 2, 3])
def test_traffic_is_half_of_k_plus_one_all_reduces(k):
    """In bytes that a rank sends in a ring: an all-reduce is a reduce-scatter and an all-gather, of as much each."""
    sent = []

    def counted(collective: Callable[..., object], times: int) -> Callable[..., object]:
        def run(*arguments: object, **options: object) -> object:
            sent.append(times * max(t.nbytes for t in arguments if isinstance(t, torch.Tensor)))
            return collective(*arguments, **options)

        return run

    p = nn.Parameter(torch.ones(4000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holding, "_COPYING", ())
        patch.setattr(holding, "_reduce_scatter", counted(holding._reduce_scatter, 1))
        patch.setattr(holding, "_all_gather", counted(holding._all_gather, 1))
        patch.setattr(dist, "all_reduce", counted(dist.all_reduce, 2))
        sgd([p]).backward_components({str(i): p @ torch.randn(4000) for i in range(k)})
    # What must be alike, the values of the one parameter, what is reached, the Gramian.
    small = 2 * (8 * 2 * 10 + 8 * 2 * 1 + 4 * 3 * k + 8 * k * k)
    assert sum(sent) == (k + 1) / 2 * (2 * p.nbytes) + small


@processes(2)
def test_an_inner_optimizer_that_shards_its_state():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it compiles others, in a deprecated way, as it is imported
        from torch.distributed.optim import ZeroRedundancyOptimizer
    model = replicated()
    inner = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.05)
    train(model, SteeredOptimizer(inner, Steer(toward="vis", gain=0.5), data_parallel=True))
    assert_trained_alike(model, train_alone())


@processes(2)
def test_weights_that_float32_cannot_hold():
    """They are multiplied in float64, not in place."""
    p = nn.Parameter(torch.ones(2))
    rule = Weighting(lambda G: torch.tensor([2e30, 1.0], dtype=G.dtype))
    sgd([p], rule).backward_components({"a": 1e-30 * p.sum(), "b": p[0]})
    torch.testing.assert_close(p.grad, torch.tensor([3.0, 2.0]))
