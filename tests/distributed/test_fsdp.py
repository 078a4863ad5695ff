"""FSDP2 and tensor parallelism: sharded parameters train as whole ones in one process."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from launcher import NEEDS_FSDP2, processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from training import (
    assert_close,
    assert_same_bits,
    assert_trained_alike,
    batch,
    components,
    make_model,
    share,
    steered,
    train,
    train_alone,
    whole,
)

from steer_optim import VGS, GradVac, Steer, SteeredOptimizer, Sum

SCOPES = ["model", "tensor"]
pytestmark = NEEDS_FSDP2


def mesh(*shape: int, names: tuple[str, ...] = ("shard",)) -> DeviceMesh:
    # The launcher makes it a GPU where every process has one of its own.
    return init_device_mesh(torch.get_default_device().type, shape, mesh_dim_names=names)


def sharded(model: nn.Module, **options) -> nn.Module:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


@processes(2, scope=SCOPES, reshard_after_forward=[True, False])
def test_shards_train_as_one_process(scope, reshard_after_forward):
    rule = GradVac(beta=0.3)
    model = sharded(make_model(), mesh=mesh(2), reshard_after_forward=reshard_after_forward)
    train(model, steered(model, rule, scope=scope))
    assert_trained_alike(model, train_alone(rule, scope=scope))


@processes(4, scope=SCOPES)
def test_uneven_shards(scope):
    """Rows of 6 and 3 over 4 processes: some hold nothing."""
    model = sharded(make_model(), mesh=mesh(4))
    assert model[2].weight.to_local().numel() == (0 if dist.get_rank() == 3 else 6)
    train(model, steered(model, scope=scope))
    assert_trained_alike(model, train_alone(scope=scope))


@processes(4, scope=SCOPES)
def test_hybrid_shards(scope):
    """Replicas of shards: inner products are summed over the shards, and not over the replicas."""
    model = sharded(make_model(), mesh=mesh(2, 2, names=("replicate", "shard")))
    train(model, steered(model, scope=scope))
    assert_trained_alike(model, train_alone(scope=scope))


@processes(2, scope=SCOPES)
def test_tensor_parallel(scope):
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(make_model(), mesh(2, names=("tensor",)), plan)
    train(model, steered(model, scope=scope), rows=lambda x: x)
    assert_trained_alike(model, train_alone(scope=scope))


@processes(4, scope=SCOPES)
def test_shards_of_tensor_parallel_layers(scope):
    both = mesh(2, 2, names=("shard", "tensor"))
    model = parallelize_module(make_model(), both["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    model = fully_shard(model, mesh=both["shard"])
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # returns a view, to which nothing is done in place
    train(model, steered(model, scope=scope), rows=lambda x: share(x, 2, both["shard"].get_local_rank()))
    assert_trained_alike(model, train_alone(scope=scope))


@processes(2)
def test_partial_gradients_are_summed_before_their_inner_products():
    """Those of a replicated parameter that meets sharded activations."""
    tensor = mesh(2, names=("tensor",))
    p = nn.Parameter(distribute_tensor(torch.zeros(2), tensor, [Replicate()]))
    x = distribute_tensor(torch.tensor([[1.0, 0.0], [-2.0, 1.0]]), tensor, [Shard(0)])
    (gradient,) = torch.autograd.grad((x @ p).sum().full_tensor(), p)
    assert gradient.placements == (Partial(),)
    optimizer = SteeredOptimizer(torch.optim.SGD([p], lr=1.0), Steer(toward="second", preserve_norm=False))
    second = distribute_tensor(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), tensor, [Shard(0)])
    losses = {"first": (x @ p).sum().full_tensor(), "second": (second @ p).sum().full_tensor()}
    geometry = optimizer.backward_components(losses)
    assert geometry.G.tolist() == [[2, -1], [-1, 1]]
    assert p.grad.placements == p.placements
    assert p.grad.to_local().tolist() == [1, 1]  # (-1, 1), projected off (1, 0), and (1, 0)


@processes(2, reshard_after_forward=[True, False])
def test_accumulated_micro_batches_are_one_batch(reshard_after_forward):
    model = sharded(make_model(), mesh=mesh(2), reshard_after_forward=reshard_after_forward)
    optimizer = steered(model)
    for step in range(4):
        optimizer.zero_grad()
        for i in range(3):
            losses = components(model(share(share(batch(step)), 3, i)))
            optimizer.backward_components({name: loss / 3 for name, loss in losses.items()}, accumulate=i < 2)
        optimizer.step()
    assert_trained_alike(model, train_alone())


@processes(2, reshard_after_forward=[True, False])
def test_a_joined_loss_of_several_forward_passes_and_another_one_before(reshard_after_forward):
    """As of a student with and without its image."""

    def trained(model: nn.Module, rows: Callable[[Tensor], Tensor], **options) -> nn.Module:
        optimizer = steered(model, VGS(), **options)
        for step in range(3):
            optimizer.zero_grad()
            x = rows(batch(step))
            model(x.cos()).mean().backward()
            optimizer.join({"std": components(model(x))["std"], "vis": components(model(x.sin()))["vis"]}).backward()
            optimizer.step()
        return model

    model = sharded(make_model(), mesh=mesh(2), reshard_after_forward=reshard_after_forward)
    assert_trained_alike(trained(model, share), trained(make_model(), lambda x: x, data_parallel=False))


@processes(2, shard=[sharded, fully_shard], forward=["shared", "own"], accumulate=[False, True])
def test_another_loss_together_with_a_joined_one_is_refused(shard, forward, accumulate):
    """FSDP2 reduces the first layer at the end of the whole backward pass, over both losses at once.

    Where that is the only one, there is nothing yet when the components are to be told apart.
    """
    model = shard(make_model(), mesh=mesh(2))
    optimizer = steered(model)
    output = model(share(batch(0)))
    joined = optimizer.join(components(output), accumulate=accumulate)
    other = (output if forward == "shared" else model(share(batch(1)))).sin().mean()
    with pytest.raises((RuntimeError, ValueError), match=r"another loss was backpropagated together|is detached from"):
        (joined + other).backward(retain_graph=True)


@processes(2, use_reentrant=[True, False], reshard_after_forward=[True, False])
def test_activation_checkpointing(use_reentrant, reshard_after_forward):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = make_model()
            self.more = make_model()[0]

        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(lambda x: self.middle(self.more(x)), x.requires_grad_(), use_reentrant=use_reentrant)
            return self.last(x)

    whole_model = Model()
    model = Model()
    fully_shard(model.last, mesh=mesh(2), reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh(2), reshard_after_forward=reshard_after_forward)
    train(model, steered(model))
    train(whole_model, steered(whole_model, data_parallel=False), rows=lambda x: x)
    assert_trained_alike(model, whole_model)


@processes(2, reshard_after_forward=[True, False])
def test_mixed_precision(reshard_after_forward):
    """As one process that computes in bfloat16: every gradient is that of autograd, which keeps 8 bits."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(
        make_model(torch.float32), mesh=mesh(2), reshard_after_forward=reshard_after_forward, mp_policy=policy
    )
    optimizer = steered(model)
    geometry = optimizer.backward_components(components(model(share(batch(0, torch.float32))).float()))
    found = whole(p.grad for p in model.parameters())
    assert_same_bits(found)
    rows = []
    for name in geometry.names:
        model.zero_grad()
        components(model(share(batch(0, torch.float32))).float())[name].backward()
        rows.append(whole(p.grad for p in model.parameters()))
    J = torch.stack(rows)
    assert_close(geometry.G, J @ J.T, tolerance=1e-6)  # sums of float32 products
    assert_close(found, geometry.weights @ J, tolerance=1e-6)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@processes(2)
def test_a_parameter_that_no_component_uses_keeps_no_gradient():
    model = make_model()
    model.unused = nn.Parameter(torch.ones(4, dtype=torch.float64))
    fully_shard(model, mesh=mesh(2))
    optimizer = steered(model, Sum())
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward_components({"first": model(share(batch(0))).sum(), "second": model(share(batch(1))).sum()})
        assert model.unused.grad is None
        optimizer.step()
    assert model.unused.full_tensor().tolist() == [1, 1, 1, 1]


@processes(2)
def test_a_rank_without_data_for_a_component():
    """A zero that depends on the parameters: all run the same backward passes."""
    model = sharded(make_model(), mesh=mesh(2))
    factor = 2.0 * dist.get_rank()
    rows = share(batch(0))
    steered(model).backward_components({name: factor * c for name, c in components(model(rows)).items()})
    alone = make_model()
    steered(alone, data_parallel=False).backward_components(components(alone(share(batch(0), 2, 1))))
    found = whole(p.grad for p in model.parameters())
    assert_same_bits(found)
    assert_close(found, whole(p.grad for p in alone.parameters()))


@processes(2)
def test_rule_memory_travels_with_the_distributed_state_dict():
    rule = GradVac(beta=0.3)
    model = sharded(make_model(), mesh=mesh(2))
    optimizer = steered(model, rule)
    train(model, optimizer, steps=range(2))
    saved = get_optimizer_state_dict(model, optimizer)
    resumed = sharded(make_model(), mesh=mesh(2))
    resumed.load_state_dict(model.state_dict())
    other = steered(resumed, rule)
    set_optimizer_state_dict(resumed, other, saved)
    train(resumed, other, steps=range(2, 4))
    assert_trained_alike(resumed, train_alone(rule))


@processes(2)
def test_an_inf_on_one_rank_reaches_all():
    """So that every gradient scaler skips, and the rule remembers nothing of the step."""
    model = sharded(make_model(), mesh=mesh(2))
    optimizer = steered(model, GradVac(beta=0.3))
    losses = components(model(share(batch(0))))
    losses["vis"] = losses["vis"] * (float("inf") if dist.get_rank() == 1 else 1.0)
    geometry = optimizer.backward_components(losses)
    assert geometry.weights.tolist() == [1, 1, 1]
    assert not any(p.grad.full_tensor().isfinite().all() for p in model.parameters())
    train(model, optimizer)
    assert_trained_alike(model, train_alone(GradVac(beta=0.3)))
