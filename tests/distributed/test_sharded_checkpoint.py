"""Checkpoints of several processes: sharded ones are read by any number of processes, replicas share one file."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from launcher import NEEDS_FSDP2, processes
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toys import assert_equal, memory
from training import assert_close, assert_same_bits, make_model, train, whole

from steer_optim import PCD, GradVac, PCGrad, SteeredOptimizer, checkpoint

RULES = {"PCGrad": PCGrad(seed=3), "GradVac": GradVac(beta=0.3), "PCD": PCD("vis", tau=0.5, beta=0.9)}


def steer(model, rule, **options):
    inner = torch.optim.AdamW(model.parameters(), lr=0.05, amsgrad=True)
    return SteeredOptimizer(inner, rule, **options)


def make_sharded(rule):
    """Sharded where there are several processes, whole in one; 3 rows do not divide by 2, nor 4 columns by 3."""
    model = make_model()
    if dist.get_world_size() > 1:
        for layer in (model[0], model[2]):
            fully_shard(layer)
        fully_shard(model)
    return model, steer(model, rule)


def snapshot(model, optimizer):
    """Parameters and inner state as they are on one process, and the rule's memory."""
    states = [optimizer.state[p] for p in model.parameters()]
    tensors = {key: whole(state[key] for state in states) for key in states[0]}
    return {"parameters": whole(model.parameters()), **tensors}, memory(optimizer)


def assert_same(found, expected):
    assert_equal(found[0], expected[0])
    assert found[1] == expected[1]


@processes(2)
def save_and_continue(folder):
    for name, rule in RULES.items():
        model, optimizer = make_sharded(rule)
        train(model, optimizer, steps=range(4))
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / name)
        saved = snapshot(model, optimizer)
        train(model, optimizer, steps=range(4, 8))
        continued = snapshot(model, optimizer)
        if dist.get_rank() == 0:
            torch.save((saved, continued), folder / f"{name}.pt")


def load_and_continue(folder):
    for name, rule in RULES.items():
        model, optimizer = make_sharded(rule)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / name)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        saved, continued = torch.load(folder / f"{name}.pt", weights_only=True)
        assert_same(snapshot(model, optimizer), saved)
        train(model, optimizer, steps=range(4, 8))
        found, _ = snapshot(model, optimizer)
        # Means over other shares of the batch are summed in another order: a few roundings of float64 (1e-16), which
        # Adam makes more of where a gradient is small.
        for key, value in continued[0].items():
            assert_close(found[key], value, 1e-13)
        assert_same_bits(found["parameters"])


@processes(1)
def load_in_one(folder):
    load_and_continue(folder)


@processes(3)
def load_in_three(folder):
    load_and_continue(folder)


@NEEDS_FSDP2
def test_a_sharded_checkpoint_continues_on_other_numbers_of_processes(tmp_path):
    save_and_continue(folder=tmp_path)
    load_in_one(folder=tmp_path)
    load_in_three(folder=tmp_path)


@processes(2)
def test_replicas_continue_from_one_file(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    for rule in RULES.values():
        model = DistributedDataParallel(make_model())
        optimizer = steer(model, rule, data_parallel=True)
        train(model, optimizer, steps=range(4))
        if dist.get_rank() == 0:
            checkpoint.save(path, optimizer, extra={"model": dict(model.module.state_dict())})
        dist.barrier()
        train(model, optimizer, steps=range(4, 8))

        resumed = make_model()
        other = steer(resumed, rule, data_parallel=True)
        resumed.load_state_dict(checkpoint.load(path, other)["model"])
        train(DistributedDataParallel(resumed), other, steps=range(4, 8))
        assert_same(snapshot(resumed, other), snapshot(model, optimizer))
        assert_same_bits(whole(resumed.parameters()))
        dist.barrier()  # the file is replaced only when all have read it


@NEEDS_FSDP2
@processes(2)
def test_one_file_does_not_take_shards(tmp_path):
    model, optimizer = make_sharded(PCGrad())
    train(model, optimizer, steps=range(1))
    path = tmp_path / f"{dist.get_rank()}.safetensors"
    with pytest.raises(TypeError, match=r"optimizer\.state\.0\.exp_avg is .*DTensor.*torch\.distributed\.checkpoint"):
        checkpoint.save(path, optimizer)
    with pytest.raises(TypeError, match=r"extra\.weight is .*DTensor.*full_tensor\(\)"):
        checkpoint.save(path, torch.optim.SGD(model.parameters()), extra={"weight": model[0].weight})
    assert not path.exists()
