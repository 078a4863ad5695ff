"""What makes replicas differ is refused on all of them, by name; what is absent, or steered elsewhere, is not."""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from launcher import NEEDS_FSDP2, processes
from torch import nn
from torch.distributed.fsdp import fully_shard
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

from benchmarks.replica_memory import measure
from steer_optim import VGS, GradVac, PCGrad, Steer, SteeredOptimizer, Steering, Sum
from steer_optim.rules import Weighting


def refused(optimizer, model, match: str) -> None:
    """On every rank, with ``.grad`` as before."""
    with pytest.raises(ValueError, match=match):
        optimizer.backward_components(components(model(share(batch(0)))))
    assert all(p.grad is None for p in model.parameters())
    dist.barrier()


@processes(2)
def test_parameters_in_another_order():
    """Also where the swapped ones are of one shape, as in weight-decay groups that were built from a set."""
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).double())
    parameters = list(model.parameters())
    first, *rest = parameters
    swapped = [*rest[1:2], rest[0], first, *rest[2:]] if dist.get_rank() else parameters
    refused(
        steered(swapped_model(model, swapped), data_parallel=True), model, r"the replicas differ in the order or the"
    )
    train(model, steered(model, data_parallel=True))


def swapped_model(model: nn.Module, parameters: list[nn.Parameter]) -> nn.Module:
    class Ordered(nn.Module):
        def parameters(self):
            return iter(parameters)

    return Ordered()


@processes(2)
def test_parameters_of_other_shapes_dtypes_names_or_numbers():
    rank = dist.get_rank()
    for there, match in (
        ([torch.ones(3), torch.ones(2)], "the shapes, strides, dtypes, names or groups"),
        ([torch.ones(2), torch.ones(3).double()], "the shapes, strides, dtypes, names or groups"),
        ([torch.ones(2)], "the number of their parameters"),
        ([torch.ones(2), torch.ones(3) + 1e-7], "the order or the values of 1 parameters, first in number 1"),
    ):
        tensors = [torch.ones(2), torch.ones(3)] if rank == 0 else there
        ps = [nn.Parameter(t) for t in tensors]
        optimizer = SteeredOptimizer(torch.optim.SGD(ps, lr=0.1), Sum(), data_parallel=True)
        with pytest.raises(ValueError, match=match):
            optimizer.backward_components({"loss": sum(p.sum() for p in ps)})
        dist.barrier()
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    names = ["p", "q"] if rank == 0 else ["q", "p"]
    inner = torch.optim.SGD([*zip(names, (p, q), strict=True)], lr=0.1)
    with pytest.raises(ValueError, match=r"names or groups of their parameters.*; this one has"):
        SteeredOptimizer(inner, Sum(), data_parallel=True).backward_components({"loss": (p * q).sum()})


@processes(2)
def test_values_in_another_order():
    for here, there in (([[1.0, 0.0]], [[0.0, 1.0]]), ([[1.0], [2.0]], [[2.0], [1.0]])):
        parameters = [nn.Parameter(torch.tensor(values)) for values in (there if dist.get_rank() else here)]
        optimizer = SteeredOptimizer(torch.optim.SGD(parameters, lr=0.1), Sum(), data_parallel=True)
        with pytest.raises(ValueError, match=f"the order or the values of {len(here)} parameters"):
            optimizer.backward_components({"loss": sum(p.sum() for p in parameters)})
        dist.barrier()


@processes(2, what=["frozen", "frozen after a micro-batch", "in another group", "in another memory order"])
def test_parameters_that_only_their_state_tells_apart(what):
    rank, (a, b, c) = dist.get_rank(), [nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    if what == "in another memory order" and rank:
        a.data = a.data.t()
    first, named = 1 + (what == "in another group" and rank), [("a", a), ("b", b), ("c", c)]
    inner = torch.optim.SGD([{"params": named[:first]}, {"params": named[first:]}], lr=0.1)
    optimizer = SteeredOptimizer(inner, Sum(), scope="group", data_parallel=True)
    if what == "frozen after a micro-batch":
        a.requires_grad_(not rank)
        optimizer.backward_components({"loss": (a + b + c).sum()}, accumulate=True)
        a.requires_grad_(False)
    if what == "frozen":
        (a if rank else b).requires_grad_(False)
    with pytest.raises(
        ValueError, match="names or groups of their parameters, or in which are frozen; this one has a "
    ):
        optimizer.backward_components({"loss": (a + b + c).sum()})
    assert a.grad is b.grad is c.grad is None


DIFFERENT = {
    "rule": (lambda rank: (Steer("vis") if rank else PCGrad(), {}), "their rule or its hyperparameters"),
    "hyperparameter": (lambda rank: (VGS(1.0 + rank), {}), r"their rule .*; this one has VGS\(gamma="),
    "seed": (lambda rank: (PCGrad(seed=rank), {}), r"their rule or its hyperparameters; this one has PCGrad\(seed="),
    "scope": (lambda rank: (PCGrad(), {"scope": ["model", "tensor"][rank]}), "their rule .*scope="),
    "refresh": (lambda rank: (PCGrad(), {"refresh_every": 1 + rank}), "refresh_every"),
}


@processes(2, what=DIFFERENT)
def test_other_rules(what):
    make, match = DIFFERENT[what]
    rule, options = make(dist.get_rank())
    model = replicated()
    refused(steered(model, rule, data_parallel=True, **options), model, f"the replicas differ in .*{match}")


@processes(2, refresh_every=[1, 3])
def test_memory_that_was_loaded_on_one_rank_only(refresh_every):
    model = replicated()
    optimizer = steered(model, GradVac(beta=0.3), data_parallel=True, refresh_every=refresh_every)
    train(model, optimizer, steps=range(1))
    saved = optimizer.state_dict()
    fresh = steered(model, GradVac(beta=0.3), data_parallel=True)
    if dist.get_rank() == 0:
        fresh.load_state_dict(saved)
    optimizer.zero_grad()
    refused(fresh, model, "the replicas differ in the memory of the rule.*load the optimizer's state on all")
    fresh.load_state_dict(saved)
    train(model, fresh)
    assert_same_bits(whole(model.parameters()))


@processes(2, loaded_before=[1, 2, 4, 5], other=[False, True])
def test_a_load_on_one_rank_between_refreshes(loaded_before, other):
    """The state that it has already changes nothing; that of another run is refused at the next Gramian."""
    model, other_model = replicated(), replicated()
    optimizer, elsewhere = (
        steered(m, GradVac(beta=0.3), data_parallel=True, refresh_every=4) for m in (model, other_model)
    )
    train(model, optimizer, steps=range(loaded_before))
    train(other_model, elsewhere, steps=range(1, 1 + loaded_before))
    if dist.get_rank() == 0:
        optimizer.load_state_dict(copy.deepcopy((elsewhere if other else optimizer).state_dict()))
    refresh = -(-loaded_before // 4) * 4
    if other:
        train(model, optimizer, steps=range(loaded_before, refresh))
        optimizer.zero_grad()
        refused(optimizer, model, "the replicas differ in the memory of the rule")
    else:
        train(model, optimizer, steps=range(loaded_before, refresh + 2))
        assert_trained_alike(model, train_alone(GradVac(beta=0.3), steps=range(refresh + 2), refresh_every=4))


@processes(2)
def test_checkpoints_of_other_steps():
    """One rank would take a Gramian, the other reuse weights."""
    model = replicated()
    optimizer = steered(model, PCGrad(), data_parallel=True, refresh_every=4)
    states = []
    for step in range(4):
        train(model, optimizer, steps=[step])
        states.append(copy.deepcopy(optimizer.state_dict()))
    optimizer.load_state_dict(states[3 - dist.get_rank()])
    optimizer.zero_grad()
    refused(optimizer, model, "the replicas differ in refresh_every, or in the age of their weights")


@processes(2, scope=["model", "tensor"])
def test_a_weighting_that_is_another_function_on_each(scope):
    p, share = nn.Parameter(torch.zeros(4)), (1.0 + dist.get_rank()) * torch.ones(2).double()
    optimizer = SteeredOptimizer(
        torch.optim.SGD([p], lr=0.1), Weighting(lambda G: share), scope=scope, data_parallel=True
    )
    optimizer.backward_components({"a": p.sum(), "b": p[0]})
    p.grad = None
    with pytest.raises(ValueError, match="differ in the weights that the rule gave to the same Gramian"):
        optimizer.backward_components({"a": p.sum(), "b": p[0]})
    assert p.grad is None


@processes(2)
def test_a_change_on_the_way_is_compared_again():
    model = replicated()
    optimizer = steered(model, PCGrad(), data_parallel=True)
    train(model, optimizer, steps=range(2))
    extra = nn.Parameter(torch.full((2,), 1.0 + dist.get_rank(), dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    optimizer.zero_grad()
    refused(optimizer, model, "the order or the values of 1 parameters, first in number 4")
    extra.data.fill_(1)
    train(model, optimizer, steps=range(2, 4))
    if dist.get_rank():
        optimizer.rule = PCGrad(seed=7)
    optimizer.zero_grad()
    refused(optimizer, model, "their rule or its hyperparameters")


@processes(2)
def test_parameters_that_no_steering_has():
    model = make_model()
    outside = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = steered(model, data_parallel=True)

    def losses():
        output = model(share(batch(0)))
        return components(output * outside if dist.get_rank() == 0 else output)

    message = r"parameters that the optimizer does not have .*Give Steering\(...\) all parameters"
    with pytest.raises(ValueError, match=message):
        optimizer.backward_components(losses())
    assert outside.grad is None
    other = Steering([outside], Sum(), data_parallel=True)  # another's are left alone
    optimizer.backward_components(losses())
    assert outside.grad is None
    assert model[0].weight.grad is not None
    del other


# What is not refused


@processes(2, rule=[VGS(), GradVac(beta=0.3)], refresh_every=[1, 3], option=["default", "find_unused_parameters"])
def test_a_component_that_is_absent_on_one_replica(rule, refresh_every, option):
    model = replicated(option)
    optimizer = steered(model, rule, data_parallel=True, refresh_every=refresh_every)
    alone = make_model()
    single = steered(alone, rule, data_parallel=False, refresh_every=refresh_every)
    for step in range(5):
        x = batch(step)
        losses = components(model(share(x)))
        if step % 2 and dist.get_rank() == 1:
            losses["vis"] = None
        optimizer.zero_grad()
        optimizer.backward_components(losses)
        optimizer.step()
        halves = [components(alone(half)) for half in x.chunk(2)]
        if step % 2:
            halves[1]["vis"] = 0 * halves[1]["vis"]
        single.zero_grad()
        single.backward_components({name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]})
        single.step()
        assert optimizer.geometry.age == single.geometry.age
    assert_trained_alike(model, alone, 1e-12)


@processes(2)
def test_a_replica_without_any_component():
    p = nn.Parameter(torch.zeros(2))
    steering = Steering([p], Steer("a"), data_parallel=True)
    rank = dist.get_rank()
    losses = {"a": p[0], "b": p[1]} if rank == 0 else {"a": None, "b": None}
    geometry = steering.backward_components(losses)
    assert p.grad.tolist() == [0.5, 0.5]
    assert geometry.losses.isnan().tolist() == [rank == 1] * 2
    p.grad = None
    steering.backward_components({"a": None})
    assert p.grad is None
    assert steering.join({"a": None}).item() == 0


@processes(2, refresh_every=[1, 3])
def test_two_steered_optimizers_over_one_loss(refresh_every):
    def train_two(model, module, rows, **options):
        matrices, biases = [module[0].weight, module[2].weight], [module[0].bias, module[2].bias]
        optimizers = [
            SteeredOptimizer(torch.optim.AdamW(ps, lr=0.05), Steer("vis"), refresh_every=refresh_every, **options)
            for ps in (matrices, biases)
        ]
        for step in range(5):
            losses = components(model(rows(batch(step))))
            for optimizer, last in zip(optimizers, (False, True), strict=True):
                optimizer.zero_grad()
                optimizer.backward_components(losses, retain_graph=not last)
            for optimizer in optimizers:
                optimizer.step()

    # Between refreshes DDP's reducer takes one backward pass in a step: the second one is averaged here.
    model = replicated()
    train_two(model, model.module, share, data_parallel=True)
    alone = make_model()
    train_two(alone, alone, lambda x: x, data_parallel=False)
    assert_trained_alike(model, alone)


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch 2.9 brought Muon")
@processes(2, refresh_every=[1, 3])
def test_muon_with_adamw_under_one_steering_resumes(refresh_every):
    def make(model, **options):
        steering = Steering(model.parameters(), GradVac(beta=0.3), refresh_every=refresh_every, **options)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        biases = [p for p in model.parameters() if p.ndim != 2]
        return steering, [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(biases, lr=0.01)]

    def train_both(model, steering, optimizers, rows, steps):
        for step in steps:
            steering.zero_grad()
            steering.backward_components(components(model(rows(batch(step)))))
            for optimizer in optimizers:
                optimizer.step()

    model = replicated()
    made = make(model, data_parallel=True)
    train_both(model, *made, share, range(4))
    resumed = replicated()
    resumed.load_state_dict(model.state_dict())
    steering, optimizers = make(resumed, data_parallel=True)
    steering.load_state_dict(made[0].state_dict())
    for optimizer, saved in zip(optimizers, made[1], strict=True):
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    train_both(resumed, steering, optimizers, share, range(4, 7))
    train_both(model, *made, share, range(4, 7))
    assert torch.equal(whole(resumed.parameters()), whole(model.parameters()))
    alone = make_model()
    train_both(alone, *make(alone, data_parallel=False), lambda x: x, range(7))
    # Muon orthogonalises in bfloat16, which makes more of the last bits.
    assert_same_bits(whole(model.parameters()))
    assert_close(whole(model.parameters()), whole(alone.parameters()), 1e-3)


# Between refreshes


@processes(2, option=OPTIONS)
def test_communication_hooks_see_the_steps_between_refreshes(option):
    model = replicated(option)
    calls = []

    def hook(state, bucket):
        calls.append(bucket.index())
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    optimizer = steered(model, data_parallel=True, refresh_every=3)
    counts = []
    for step in range(7):
        calls.clear()
        train(model, optimizer, steps=[step])
        counts.append(len(calls) > 0)
    alone = make_model()
    train(alone, steered(alone, data_parallel=False, refresh_every=3), rows=lambda x: x, steps=range(7))
    assert_trained_alike(model, alone)
    if "static" not in option:  # whose first backward pass has to be a plain one
        assert counts == [False, True, True, False, True, True, False]


@processes(2)
def test_replicas_without_a_reducer_are_averaged_between_refreshes_too():
    model = make_model()
    train(model, steered(model, data_parallel=True, refresh_every=3), steps=range(7))
    alone = make_model()
    train(alone, steered(alone, data_parallel=False, refresh_every=3), rows=lambda x: x, steps=range(7))
    assert_trained_alike(model, alone)


@processes(2, first=[None, 0.0], reducer=[False, True])
def test_a_step_without_gradients_does_not_tell_whether_there_is_a_reducer(first, reducer):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0)
    run = DistributedDataParallel(model) if reducer else model
    optimizer = steered(model, Sum(), data_parallel=True, refresh_every=4)
    found = []
    for factor in (1.0, first, 1.0, first, 1.0):
        optimizer.zero_grad()
        x = torch.full((1, 1), dist.get_rank() + 1.0)
        optimizer.backward_components({"loss": None if factor is None else factor * run(x).sum()})
        found.append(0 if model.weight.grad is None else model.weight.grad.item())
    assert found == [1.5, 0, 1.5, 0, 1.5]


@processes(2)
def test_a_reducer_that_stops_is_noticed_at_the_next_refresh():
    model = replicated()
    optimizer = steered(model, data_parallel=True, refresh_every=4)
    train(model, optimizer, steps=range(2))
    with model.no_sync():
        train(model, optimizer, steps=[2])
    train(model, optimizer, steps=[3])
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="update of a step between two refreshes: something that averaged"):
        train(model, optimizer, steps=[4])


@processes(2, option=["default", "gradient_as_bucket_view", "find_unused_parameters"], existing=[False, True])
def test_an_existing_gradient_and_micro_batches_between_refreshes(option, existing):
    model = replicated(option)
    optimizer = steered(model, data_parallel=True, refresh_every=4)
    alone = make_model()
    single = steered(alone, data_parallel=False, refresh_every=4)
    for step in range(6):
        for module, steers, rows in ((model, optimizer, share), (alone, single, lambda x: x)):
            steers.zero_grad()
            if existing:
                module(rows(batch(50 + step))).square().mean().backward()
            pieces = rows(batch(step)).chunk(3)
            for i, piece in enumerate(pieces):
                losses = {name: loss / 3 for name, loss in components(module(piece)).items()}
                steers.backward_components(losses, accumulate=i < 2)
            steers.step()
        assert optimizer.geometry.age == single.geometry.age
    assert_trained_alike(model, alone, 1e-12)


# What is held, and when it travels


@processes(2, k=[1, 2, 3])
def test_a_set_travels_while_the_next_is_computed(k):
    from steer_optim import holding

    events = []

    class Waited:
        def __init__(self, work, name):
            self.work, self.name = work, name

        def wait(self):
            events.append(f"wait {self.name}")
            self.work.wait()

    sets = itertools.count()

    def started(collective):
        def run(*arguments, async_op=False, **options):
            work = collective(*arguments, async_op=async_op, **options)
            if not async_op:  # not of a set
                return work
            name = next(sets)
            events.append(f"send {name}")
            return Waited(work, name)

        return run

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, i):
            ctx.i = i
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            events.append(f"backward {ctx.i}")
            return gradient, None

    p = nn.Parameter(torch.ones(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holding, "_reduce_scatter", started(holding._reduce_scatter))
        patch.setattr(dist, "all_reduce", started(dist.all_reduce))
        losses = {str(i): Seen.apply(p @ torch.randn(100), i) for i in range(k)}
        Steering([p], Sum(), data_parallel=True).backward_components(losses)
    waits = {event: i for i, event in enumerate(events) if event.startswith("wait")}
    for i in range(1, k):
        assert events.index(f"send {i - 1}") < events.index(f"backward {i}") < waits[f"wait {i - 1}"]
        assert waits[f"wait {i - 1}"] < events.index(f"send {i}")  # before more than one set would be held
    assert len(waits) == k


@pytest.mark.slow
@processes(2, k=[2, 4])
def test_a_step_of_two_replicas_holds_one_set_and_its_pieces(k):
    assert_held(k)


@pytest.mark.slow
@processes(4, k=[3])
def test_a_step_of_four_replicas_holds_one_set_and_its_pieces(k):
    assert_held(k)


def assert_held(k: int) -> None:
    """By allocator events, against a plain backward pass, which holds one set; the least of three steps counts."""
    least = torch.tensor(math.inf)
    for _ in range(3):
        found = measure(k, repeats=1)
        least = least.clamp(max=found["sets over plain"] - found["k/R"])
        most = least.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)  # so that all stop at once
        if most <= 0.05:
            return
    pytest.fail(f"{most.item():.2f} of a set more than the pieces")


@processes(2)
def test_the_host_reads_twice_in_an_exact_step_and_never_between():
    """Apart from what a CPU reads of its own weights and Gramian, which an accelerator does not."""
    import sys

    from steering import NoHostRead

    reads = []
    original = torch.Tensor.tolist

    def tolist(tensor):
        reads.append(sys._getframe(1).f_code.co_filename.rsplit("/", 1)[-1])
        return original(tensor)

    model = replicated()
    optimizer = steered(model, data_parallel=True, refresh_every=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", tolist)
        for step in range(7):
            reads.clear()
            losses = components(model(share(batch(step))))
            if step % 3 == 1:
                optimizer.backward_components(losses)  # reads one flag, and in the first such step whether DDP is there
            else:
                with NoHostRead():
                    optimizer.backward_components(losses)
            optimizer.step()
            optimizer.zero_grad()
            mine = [name for name in reads if name in ("agreement.py", "holding.py")]
            expected = {0: 3, 1: 1, 3: 2, 6: 2}.get(step, 0)
            assert len(mine) == expected, (step, reads)


def test_training_alone_is_what_it_was():
    torch.testing.assert_close(whole(train_alone().parameters()), whole(train_alone().parameters()), rtol=0, atol=0)


@NEEDS_FSDP2
@processes(2, sharded=[False, True])
def test_losses_that_each_rank_scales_by_itself_are_bounded_alike(sharded):
    """As by a count of its own tokens: the bound on an update between refreshes is one for all."""
    model = fully_shard(make_model()) if sharded else replicated()
    optimizer = steered(model, Sum(), data_parallel=None if sharded else True, refresh_every=3, lr=1e-3)
    weights = []
    for step in range(6):
        optimizer.zero_grad()
        size = 50.0 if step % 3 else 1.0
        losses = {name: size * loss for name, loss in components(model(share(batch(step)))).items()}
        (optimizer.join(losses) / (10 + dist.get_rank() * (step % 3))).backward()
        weights.append(optimizer.geometry.weights)
        optimizer.step()
    assert any(w[0] < 1 for w in weights)  # some were bounded
    assert_same_bits(torch.stack(weights))
    assert_same_bits(whole(model.parameters()))


@NEEDS_FSDP2
@processes(2)
def test_shards_whose_rules_or_memory_differ():
    model = fully_shard(make_model())
    rank = dist.get_rank()
    for rule, options, match in (
        (Steer("vis", gain=float(rank)), {}, r"their rule or its hyperparameters; this one has Steer\("),
        (Sum(), {"refresh_every": 1 + rank}, "refresh_every"),
    ):
        refused(steered(model, rule, **options), model, match)
        model.reshard()
    first = steered(model, GradVac(beta=0.3))
    first.backward_components(components(model(share(batch(0)))))
    second = steered(model, GradVac(beta=0.3))
    if rank == 0:
        second.load_state_dict(first.state_dict())
    first.zero_grad()
    refused(second, model, "the memory of the rule")
    model.reshard()
    mine = torch.tensor([1.0, 1.0, 2.0 + rank]).double()
    third = steered(model, Weighting(lambda G: mine))
    third.backward_components(components(model(share(batch(0)))))
    third.zero_grad()
    refused(third, model, "the weights that the rule gave to the same Gramian")


@processes(2)
def test_a_parameter_that_no_steering_has_is_noticed_in_every_micro_batch():
    model, outside = make_model(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = steered(model, data_parallel=True)
    output = model(share(batch(1)))
    optimizer.backward_components(components(output * outside), accumulate=True, retain_graph=True)
    with pytest.raises(ValueError, match="parameters that the optimizer does not have"):
        optimizer.backward_components(components(output))


@processes(2, every=[1, 3])
def test_leaves_that_are_no_parameters_get_the_plain_sum(every):
    """Such as log-variances, or inputs; DDP does not average them either."""
    model, leaf = make_model(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = steered(model, Sum(), data_parallel=True, refresh_every=every)
    for step in range(3):
        losses = components(model(share(batch(step))) * leaf)
        (expected,) = torch.autograd.grad(sum(losses.values()), [leaf], retain_graph=True)
        leaf.grad = None
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward_components(losses, retain_graph=True)
        assert_close(leaf.grad, 2 * expected)


@processes(2)
def test_a_parameter_that_no_steering_has_and_that_is_reached_later():
    model, outside = make_model(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = steered(model, data_parallel=True)
    optimizer.backward_components(components(model(share(batch(0)))))
    optimizer.zero_grad()
    output = model(share(batch(1)))
    with pytest.raises(ValueError, match="parameters that the optimizer does not have"):
        optimizer.backward_components(components(output * outside if dist.get_rank() else output))
