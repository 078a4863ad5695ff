"""``refresh_every`` in several processes: all use the same weights again, and train as one."""

from copy import deepcopy

import pytest
import torch
from launcher import NEEDS_FSDP2, processes
from test_fsdp import mesh, sharded
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

from steer_optim import VGS, GradVac, SteeredOptimizer
from steer_optim.rules import Rule

RULES = [VGS(), GradVac(beta=0.3)]
STEPS = range(7)  # of refresh_every=3: exact, two in between, and again, and exact


def alone(rule: Rule) -> torch.nn.Module:
    model = make_model()
    optimizer = steered(model, rule, data_parallel=False, refresh_every=3)
    train(model, optimizer, rows=lambda x: x, steps=STEPS)
    assert optimizer.geometry.age == 0
    exact = whole(train_alone(rule).parameters())
    model_of_four = make_model()
    train(model_of_four, steered(model_of_four, rule, data_parallel=False, refresh_every=3), rows=lambda x: x)
    assert (whole(model_of_four.parameters()) - exact).norm() > 1e-4 * exact.norm()  # it makes a difference
    return model


@processes(2, option=OPTIONS, rule=RULES)
def test_replicas(option, rule):
    model = replicated(option)
    train(model, steered(model, rule, data_parallel=True, refresh_every=3), steps=STEPS)
    assert_trained_alike(model, alone(rule))


@NEEDS_FSDP2
@processes(2, rule=RULES)
def test_shards(rule):
    model = sharded(make_model(), mesh=mesh(2))
    train(model, steered(model, rule, refresh_every=3), steps=STEPS)
    assert_trained_alike(model, alone(rule))


@processes(2, join=[False, True])
def test_accumulated_micro_batches(join):
    model = replicated()
    optimizer = steered(model, data_parallel=True, refresh_every=2)
    for step in range(4):
        optimizer.zero_grad()
        for i, rows in enumerate(share(batch(step)).chunk(3)):
            losses = {name: loss / 3 for name, loss in components(model(rows)).items()}
            if join:
                optimizer.join(losses, accumulate=i < 2).backward()
            else:
                optimizer.backward_components(losses, accumulate=i < 2)
        assert optimizer.geometry.age == step % 2
        optimizer.step()
    other = make_model()
    train(other, steered(other, data_parallel=False, refresh_every=2), rows=lambda x: x)
    assert_trained_alike(model, other)


@processes(2)
def test_an_overflow_on_one_replica_makes_the_next_step_exact_on_all():
    model = replicated()
    optimizer = steered(model, VGS(), data_parallel=True, refresh_every=5)
    rank = torch.distributed.get_rank()
    for step in range(3):
        rows = share(batch(step)) * (float("inf") if rank == 1 and step == 0 else 1.0)
        geometry = optimizer.backward_components(components(model(rows)))
        assert geometry.age == max(0, step - 1)
        optimizer.zero_grad()


@processes(2)
def test_replicas_that_disagree_are_refused():
    model = DistributedDataParallel(make_model())
    every = 1 + torch.distributed.get_rank()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SteeredOptimizer(inner, GradVac(), data_parallel=True, refresh_every=every)
    with pytest.raises(ValueError, match=r"the replicas differ in refresh_every.* this one has refresh_every="):
        optimizer.backward_components(components(model(share(batch(0)))))


@processes(2)
def test_weights_that_travel_in_a_checkpoint_are_used_on_all_replicas():
    model = replicated()
    optimizer = steered(model, GradVac(), data_parallel=True, refresh_every=3)
    train(model, optimizer, steps=range(2))
    copy = replicated()
    copy.load_state_dict(model.state_dict())
    resumed = steered(copy, GradVac(), data_parallel=True, refresh_every=3)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    train(model, optimizer, steps=range(2, 6))
    train(copy, resumed, steps=range(2, 6))
    assert_same_bits(whole(copy.parameters()))
    assert_close(whole(copy.parameters()), whole(model.parameters()), 0.0)
