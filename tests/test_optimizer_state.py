"""Items 6 and 8 of the contract: copies, pickles and checkpoints continue bit for bit, the rule's memory included."""

import copy
import io
import json
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from toys import assert_equal, bare_step, components, make_model, memory, steer_step, train, weights

from steer_optim import SteeredOptimizer, Steering
from steer_optim.rules import PCD, GradVac, PCGrad, Steer, Sum

STATEFUL = {"PCGrad": PCGrad, "GradVac": lambda: GradVac(beta=0.5), "PCD": lambda: PCD("a", tau=0.5, beta=0.9)}
SCOPES = ["model", "group", "tensor"]
# As AdamW: full_state_dict of a plain SGD fails in torch itself, and flattening with it does for any optimizer.
KEEPING = {
    "default": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True),
    "cpu_offload": StateDictOptions(cpu_offload=True),
    "full and cpu_offload": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


def make(rule=None, *, scope="model", model=None):
    model = model or make_model()
    groups = [{"params": [p]} for p in model.parameters()]
    return model, SteeredOptimizer(torch.optim.AdamW(groups, lr=0.05), rule or GradVac(beta=0.5), scope=scope)


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Copies


def through_pickle(both):
    return pickle.loads(pickle.dumps(both))


@pytest.mark.parametrize("schedule", ["never", "before", "after a step"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_works_and_is_independent(duplicate, schedule):
    model, optimizer = make()
    if schedule != "never":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)  # patches optimizer.step
    train(steer_step, optimizer, model, range(2))
    if schedule == "after a step":
        scheduler.step()
    before = weights(model), memory(optimizer)
    twin_model, twin = duplicate((model, optimizer))

    assert twin.inner is not optimizer.inner
    assert twin.param_groups[0]["params"][0] is next(twin_model.parameters())
    after = train(steer_step, twin, twin_model, range(2, 4))
    assert_equal(weights(model), before[0])
    assert memory(optimizer) == before[1]
    assert_equal(train(steer_step, optimizer, model, range(2, 4)), after)
    assert memory(optimizer) == memory(twin)

    twin_scheduler = torch.optim.lr_scheduler.StepLR(twin, step_size=1)
    train(steer_step, twin, twin_model, range(1))
    twin_scheduler.step()
    assert twin.inner.param_groups[0]["lr"] < optimizer.inner.param_groups[0]["lr"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_carries_what_is_pending_and_no_hooks(duplicate):
    model, optimizer = make()
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("step"))
    optimizer.backward_components(components(model, 0), accumulate=True)
    twin_model, twin = duplicate((model, optimizer))
    for o, m in ((optimizer, model), (twin, twin_model)):
        o.backward_components(components(m, 1))
        o.step()
    assert_equal(weights(twin_model), weights(model))
    assert calls == ["step"]


# Checkpoints


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rule_name", STATEFUL)
def test_save_and_resume_is_bitwise_equal(rule_name, scope):
    rule = STATEFUL[rule_name]
    model, optimizer = make(rule(), scope=scope)
    expected = train(steer_step, optimizer, model, range(8))

    model, optimizer = make(rule(), scope=scope)
    train(steer_step, optimizer, model, range(4))
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed_model, resumed = make(rule(), scope=scope)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert memory(resumed) == memory(optimizer)
    assert_equal(train(steer_step, resumed, resumed_model, range(4, 8)), expected)

    # Without the rule's memory it is another run, so that the equality above means something.
    forgetful_model, forgetful = make(rule(), scope=scope)
    forgetful_model.load_state_dict(saved["model"])
    del saved["optimizer"]["param_groups"][0]["steer_optim"]
    forgetful.load_state_dict(saved["optimizer"])
    assert not torch.equal(train(steer_step, forgetful, forgetful_model, range(4, 8))[0], expected[0])


def test_loading_replaces_what_a_warm_wrapper_remembers():
    model, optimizer = make()
    train(steer_step, optimizer, model, range(2))
    saved, before = optimizer.state_dict(), memory(optimizer)
    train(steer_step, optimizer, model, range(2, 4))
    optimizer.backward_components(components(model, 4), accumulate=True)
    optimizer.load_state_dict(saved)
    assert memory(optimizer) == before
    optimizer.step()  # nothing is pending any more


def test_a_saved_state_does_not_move_when_training_goes_on():
    model, optimizer = make(PCGrad())
    train(steer_step, optimizer, model, range(2))
    saved = optimizer.state_dict()["param_groups"][0]["steer_optim"]
    train(steer_step, optimizer, model, range(1))
    assert json.loads(saved)["state"]["draws"][1] == [2]


def test_a_plain_inner_checkpoint_loads_and_the_rule_starts_afresh():
    plain_model = make_model()
    plain = torch.optim.AdamW([{"params": [p]} for p in plain_model.parameters()], lr=0.01)
    train(bare_step, plain, plain_model, range(2))
    model, optimizer = make()
    _, fresh = make()
    train(steer_step, optimizer, model, range(1))
    optimizer.load_state_dict(through_file(plain.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert_equal(optimizer.inner.state_dict()["state"], plain.state_dict()["state"])
    assert memory(optimizer) == memory(fresh)


def test_the_plain_inner_optimizer_loads_a_steered_checkpoint():
    model, optimizer = make()
    train(steer_step, optimizer, model, range(2))
    plain = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    plain.load_state_dict(through_file(optimizer.state_dict()))
    assert_equal(plain.state_dict()["state"], optimizer.state_dict()["state"])


def test_the_live_groups_hold_nothing_of_ours():
    model, optimizer = make()
    train(steer_step, optimizer, model, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert "steer_optim" not in optimizer.param_groups[0]


@pytest.mark.parametrize(("rule", "scope"), [(PCGrad(), "model"), (GradVac(), "tensor")])
def test_the_memory_of_another_rule_or_scope_is_refused_before_anything_changes(rule, scope):
    model, optimizer = make()
    train(steer_step, optimizer, model, range(1))
    _, other = make(rule, scope=scope)
    with pytest.raises(ValueError, match="memory of GradVac, scope='model'"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_the_memory_of_more_groups_is_refused_by_that_name():
    model, optimizer = make(PCGrad(), scope="group")
    train(steer_step, optimizer, model, range(1))
    fewer = Steering(model.parameters(), PCGrad(), scope="group")
    with pytest.raises(ValueError, match="parameter groups, and tensors, may be added but not removed"):
        fewer.load_state_dict(optimizer.steering.state_dict())


def test_a_rule_without_memory_loads_into_any_other():
    model, optimizer = make(Sum())
    train(steer_step, optimizer, model, range(1))
    _, other = make(Steer("a"), scope="tensor")
    other.load_state_dict(optimizer.state_dict())
    assert_equal(other.inner.state_dict(), optimizer.inner.state_dict())


def test_a_state_dict_that_does_not_fit_leaves_the_memory():
    model, optimizer = make()
    train(steer_step, optimizer, model, range(2))
    before = memory(optimizer)
    too_many = optimizer.state_dict()
    too_many["param_groups"].append(too_many["param_groups"][1])
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(too_many)
    assert memory(optimizer) == before


def test_half_precision_and_large_counters_survive_as_they_are():
    class Odd(Sum):
        def init(self, G, names):
            return {
                "count": torch.tensor([2**62 + 1]),
                "half": torch.tensor([[0.1, float("inf")]], dtype=torch.bfloat16),
                "double": torch.tensor([1 / 3], dtype=torch.float64),
                "flag": torch.tensor([True]),
            }

        def update(self, G, names, state):
            return super().update(G, names, state)[0], state

    model, optimizer = make(Odd())
    train(steer_step, optimizer, model, range(1))
    _, other = make(Odd())
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert_equal(other.steering._memory.state, optimizer.steering._memory.state)


def test_a_rule_without_finite_weights_for_orthogonal_gradients_is_resumed():
    class Counted(PCGrad):
        def update(self, G, names, state):
            return (1 / G[:, 0, 1:2]).expand(-1, len(names)), {"draws": state["draws"] + 1}

    model, optimizer = make(Counted())
    train(steer_step, optimizer, model, range(1))
    _, other = make(Counted())
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert memory(other) == memory(optimizer)


def test_a_tensor_that_is_frozen_and_thaws_keeps_its_row():
    """The parameters that require grad change; whose memory is whose must not."""
    model, optimizer = make(PCGrad(), scope="tensor")
    first = next(model.parameters())
    train(steer_step, optimizer, model, range(2))
    first.requires_grad_(False)
    frozen = first.detach().clone()
    train(steer_step, optimizer, model, range(2, 4))
    assert_equal(first.detach(), frozen)
    assert first.grad is None
    resumed_model, resumed = make(PCGrad(), scope="tensor", model=copy.deepcopy(model))
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for m in (model, resumed_model):
        next(m.parameters()).requires_grad_()
    assert_equal(
        train(steer_step, resumed, resumed_model, range(4, 6)), train(steer_step, optimizer, model, range(4, 6))
    )


# torch.distributed.checkpoint, in one process


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("option", KEEPING)
def test_get_and_set_optimizer_state_dict_keep_the_memory(option, scope):
    model, optimizer = make(scope=scope)
    expected = train(steer_step, optimizer, model, range(4))
    model, optimizer = make(scope=scope)
    train(steer_step, optimizer, model, range(2))
    saved = through_file(get_optimizer_state_dict(model, optimizer, options=KEEPING[option]))
    resumed_model, resumed = make(scope=scope, model=copy.deepcopy(model))
    set_optimizer_state_dict(resumed_model, resumed, saved, options=KEEPING[option])
    assert memory(resumed) == memory(optimizer)
    assert_equal(train(steer_step, resumed, resumed_model, range(2, 4)), expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is .*uninitialized")  # that it is one process is meant
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.6 uses it itself
@pytest.mark.parametrize("option", KEEPING)
def test_a_distributed_checkpoint_on_disk_keeps_the_memory(option, tmp_path):
    """It loads no leaf that the state dict of the fresh optimizer lacks, and reads sizes from the fresh one too."""
    options = KEEPING[option]
    model, optimizer = make()
    train(steer_step, optimizer, model, range(2))
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(state, checkpoint_id=tmp_path)

    resumed_model, resumed = make(model=copy.deepcopy(model))
    state = {"optimizer": get_optimizer_state_dict(resumed_model, resumed, options=options)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(resumed_model, resumed, state["optimizer"], options=options)
    assert memory(resumed) == memory(optimizer)
    assert_equal(train(steer_step, resumed, resumed_model, range(2)), train(steer_step, optimizer, model, range(2)))


def test_a_flattened_distributed_checkpoint_starts_the_rule_afresh():
    """Flattening looks up only the keys of the live groups: the inner state is kept and the rule's memory is not."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = make()
    train(steer_step, optimizer, model, range(2))
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    resumed_model, resumed = make(model=copy.deepcopy(model))
    fresh = memory(resumed)
    set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
    assert_equal(resumed.inner.state_dict()["state"], optimizer.inner.state_dict()["state"])
    assert memory(resumed) == fresh


def test_asking_a_fresh_wrapper_for_its_state_moves_and_counts_nothing():
    """torch.distributed.checkpoint steps a fresh optimizer on zero gradients with lr = 0."""
    model, optimizer = make(PCGrad())
    before = weights(model), memory(optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert_equal(weights(model), before[0])
    assert memory(optimizer) == before[1]
    assert optimizer.geometry is None
    assert all(group["lr"] == 0.05 for group in optimizer.param_groups)
    assert all(p.grad is None for p in model.parameters())
