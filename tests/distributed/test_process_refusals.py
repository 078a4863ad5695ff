"""What several processes cannot steer is refused in all of them alike, by name and with the way out."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launcher import NEEDS_FSDP2, processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from training import batch, components, make_model, share, steered

from steer_optim import SteeredOptimizer, Sum


def optimizer_of(parameters: list[nn.Parameter], **options) -> SteeredOptimizer:
    return SteeredOptimizer(torch.optim.SGD(parameters, lr=1.0), Sum(), **options)


def assert_refused(optimizer: SteeredOptimizer, losses, error: type[Exception], message: str) -> None:
    """In every process, so that none waits for the others; and the next step is as if nothing had happened."""
    with pytest.raises(error, match=message):
        optimizer.backward_components(losses)
    dist.barrier()
    (p, *_) = optimizer.param_groups[0]["params"]
    assert p.grad is None
    optimizer.step()


@processes(2)
def test_processes_of_which_nothing_was_said():
    p = nn.Parameter(torch.ones(2))
    message = r"there are 2 processes, and the optimizer cannot see .* data_parallel=True\), or .* data_parallel=False"
    assert_refused(optimizer_of([p]), {"loss": p.sum()}, RuntimeError, message)


@processes(2)
def test_replicas_that_ddp_wraps_and_that_are_said_to_train_alone():
    """They would drift apart: its reducer averages the first component only."""
    model, alone = make_model(), make_model()
    wrapped = DistributedDataParallel(model)
    steered(alone, data_parallel=False).backward_components(components(alone(batch(0))))
    optimizer = steered(model, data_parallel=False)
    message = "DistributedDataParallel wraps the parameters: pass data_parallel=True"
    assert_refused(optimizer, components(wrapped(batch(0))), RuntimeError, message)
    with wrapped.no_sync():  # as in local SGD
        optimizer.backward_components(components(wrapped(batch(0))))
    other = make_model()
    by_itself = DistributedDataParallel(
        other, process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True)
    )
    steered(other, data_parallel=False).backward_components(components(by_itself(batch(0))))


@pytest.mark.parametrize("data_parallel", [True, object()])
def test_replicas_without_a_process_group(data_parallel):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group before"):
        optimizer_of([p], data_parallel=data_parallel).backward_components({"loss": p.sum()})
    assert p.grad is None


@processes(2)
def test_what_is_no_process_group_of_this_process():
    p = nn.Parameter(torch.ones(2))
    mesh = init_device_mesh("cuda" if p.is_cuda else "cpu", (2,))
    for wrong in (mesh, "ddp", 2):
        message = "a bool or a process group that this process is in; got .* pass mesh.get_group"
        assert_refused(optimizer_of([p], data_parallel=wrong), {"loss": p.sum()}, TypeError, message)
    other = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(TypeError, match="that this process is in"):
            optimizer_of([p], data_parallel=other).backward_components({"loss": p.sum()})


@NEEDS_FSDP2
@processes(2)
def test_replicas_of_shards():
    model = fully_shard(make_model())
    optimizer = steered(model, data_parallel=True)
    losses = components(model(share(batch(0))))
    assert_refused(optimizer, losses, RuntimeError, "these are DTensors.*leave data_parallel out")


@NEEDS_FSDP2
@processes(2)
def test_whole_parameters_beside_sharded_ones_of_which_nothing_was_said():
    sharded, whole = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
    sharded = fully_shard(sharded)
    parameters = [*sharded.parameters(), whole]

    def losses():
        out = sharded(torch.ones(2, 3)) * whole
        return {"a": out.sum(), "b": out.square().sum()}

    message = "some parameters are sharded .* and others are whole.* data_parallel=False"
    assert_refused(optimizer_of(parameters), losses(), RuntimeError, message)
    optimizer_of(parameters, data_parallel=False).backward_components(losses())
    assert whole.grad is not None


@processes(2, use_orig_params=[True, False])
def test_fsdp1(use_orig_params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        model = FullyShardedDataParallel(make_model(), use_orig_params=use_orig_params, device_id=batch(0).device)
        losses = components(model(share(batch(0))))
    for data_parallel in (None, True):
        optimizer = steered(model, data_parallel=data_parallel)
        assert_refused(optimizer, losses, RuntimeError, r"\(FSDP1\), which breaks .*fully_shard")


@processes(4)
def test_tensor_parallel_inside_ddp():
    mesh = init_device_mesh("cuda" if batch(0).is_cuda else "cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(make_model(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    model = DistributedDataParallel(model, device_mesh=mesh["data"])
    optimizer = steered(model, data_parallel=mesh["data"].get_group())
    losses = components(model(batch(0)))
    assert_refused(optimizer, losses, RuntimeError, r"sharded by tensor parallelism, which .*Replicate .* fully_shard")


def test_deepspeed():
    p = nn.Parameter(torch.ones(2))
    p.ds_id = 0
    with pytest.raises(RuntimeError, match=r"DeepSpeed ZeRO, which breaks .*fully_shard"):
        optimizer_of([p]).backward_components({"loss": p.sum()})
    zero = type("DeepSpeedZeroOptimizer", (SimpleNamespace,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    with pytest.raises(TypeError, match=r"DeepSpeedZeroOptimizer is an optimizer of DeepSpeed, which .*fully_shard"):
        SteeredOptimizer(zero, Sum())


@processes(2, first=[0, 1], second=[0, 1])
def test_sparse_gradients(first, second):
    """Also where only one rank has them."""
    embedding = nn.Embedding(4, 2, sparse=True)
    sparse, dense = embedding(torch.tensor(1)).sum(), embedding.weight.sum()
    rank = dist.get_rank()
    losses = {"first": sparse if rank == first else dense, "second": sparse if rank == second else dense}
    optimizer = optimizer_of([embedding.weight], data_parallel=True)
    message = r"'first' has a sparse gradient \(parameter of shape \(4, 2\)\).* sparse=False"
    assert_refused(optimizer, losses, TypeError, message)


@processes(2)
def test_a_component_that_reaches_nothing_on_any_rank():
    p, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = optimizer_of([p], data_parallel=True)
    message = "'second' is detached from every given parameter"
    assert_refused(optimizer, {"first": p.sum(), "second": other.sum()}, ValueError, message)


@processes(2)
def test_replicas_that_differ():
    """The collectives would hang, or add one component to another."""
    p, more = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    rank = dist.get_rank()
    a, b = p.sum(), p[0]
    for there in ({"a": a}, {"b": b, "a": a}, {"a": a, "c": b}):
        losses = {"a": a, "b": b} if rank == 0 else there
        message = f"the replicas differ in their components, or the order .* this one has '{next(iter(losses))}'"
        assert_refused(optimizer_of([p], data_parallel=True), losses, ValueError, message)
        a, b = p.sum(), p[0]
    optimizer = optimizer_of([p, more] if rank == 0 else [p], data_parallel=True)
    assert_refused(optimizer, {"a": p.sum()}, ValueError, f"the number of their parameters; this one has {2 - rank}")


@processes(2)
def test_copies():
    """A process group has none; the optimizer that was only told that all are replicas can be copied."""
    p = nn.Parameter(torch.ones(2))
    optimizer = optimizer_of([p], data_parallel=dist.group.WORLD)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="ProcessGroup"):
            copied(optimizer)
    for copied in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        other = copied(optimizer_of([p], data_parallel=True))
        (q,) = other.param_groups[0]["params"]
        other.backward_components({"loss": q[0] * dist.get_rank()})
        assert q.grad.tolist() == [0.5, 0]
        assert p.grad is None
