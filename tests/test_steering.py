"""`Steering`: one over several optimizers, several over one loss, components that are absent."""

import copy
import pickle
import re
from threading import Thread

import pytest
import torch
from properties import RULES
from steering import EACH_RULE, STEER, assert_close, clear, conflicting, expected_update, flat_grad, network, steered
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import assert_equal

from steer_optim import GradVac, PCGrad, Steer, SteeredOptimizer, Steering, Sum, measure


def batch(step: int = 0, rows: int = 8) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(step)).double()


# Several optimizers under one steering


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)]


def train_several(
    model: nn.Module, steering: Steering, optimizers: list[torch.optim.Optimizer], steps: range
) -> list[Tensor]:
    for step in steps:
        steering.zero_grad()
        steering.backward_components(conflicting(model(batch(step))))
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("scope", ["model", "group", "tensor"])
def test_it_gives_every_parameter_what_one_steered_optimizer_gives(scope):
    model = network()
    groups = [{"params": list(layer.parameters())} for layer in model if list(layer.parameters())]
    steered_sgd = SteeredOptimizer(torch.optim.SGD(groups, lr=0.1), STEER, scope=scope)
    one = steered_sgd.backward_components(conflicting(model(batch())))
    expected = flat_grad(model.parameters())
    clear(model.parameters())
    two = Steering(groups, STEER, scope=scope).backward_components(conflicting(model(batch())))
    assert torch.equal(flat_grad(model.parameters()), expected)
    assert_equal([two.G, two.weights], [one.G, one.weights])
    assert two.scopes == one.scopes


def test_micro_batches_that_were_never_steered_are_dropped_with_a_warning():
    model = network()
    steering = Steering(model.parameters(), STEER)
    steering.zero_grad()
    steering.backward_components(conflicting(model(batch())), accumulate=True)
    with pytest.warns(UserWarning, match="never steered, and are dropped"):
        steering.zero_grad()
    steering.backward_components(conflicting(model(batch(1))))
    found = flat_grad(model.parameters())
    clear(model.parameters())
    Steering(model.parameters(), STEER).backward_components(conflicting(model(batch(1))))
    assert torch.equal(found, flat_grad(model.parameters()))


@pytest.mark.skipif(torch.__version__ < (2, 9), reason="torch 2.9 brought Muon")
@pytest.mark.parametrize("rule", [Steer("vis"), GradVac(beta=0.5), PCGrad()], ids=repr)
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_muon_with_adamw_resumes_bit_for_bit(rule, refresh_every):
    def make() -> tuple[nn.Module, Steering, list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        model = network()
        return model, Steering(model.parameters(), rule, refresh_every=refresh_every), muon_and_adamw(model)

    expected = train_several(*make(), range(8))
    model, steering, optimizers = make()
    train_several(model, steering, optimizers, range(5))
    other, resumed, others = make()
    other.load_state_dict(model.state_dict())
    for optimizer, saved in zip(others, optimizers, strict=True):
        optimizer.load_state_dict(saved.state_dict())
    resumed.load_state_dict(copy.deepcopy(steering.state_dict()))
    assert_equal(train_several(other, resumed, others, range(5, 8)), expected)


def test_it_takes_what_torch_optimizers_take_and_refuses_what_they_refuse():
    model = network()
    geometry = Steering(model.named_parameters(), Sum(), scope="tensor").backward_components(
        conflicting(model(batch()))
    )
    assert geometry.scopes == ("0.weight", "0.bias", "2.weight", "2.bias")
    with pytest.raises(ValueError, match="empty parameter list"):
        Steering([], Sum())
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        Steering([1.0], Sum())
    with pytest.raises(TypeError, match="rule must be a Rule"):
        Steering(model.parameters(), Sum)
    with pytest.raises(ValueError, match="got 'layer'"):
        Steering(model.parameters(), Sum(), scope="layer")


def test_over_an_optimizer_it_sees_groups_that_are_added():
    model = network()
    inner = torch.optim.SGD(model[0].parameters(), lr=0.1)
    steering = Steering(inner, STEER)
    steering.backward_components(conflicting(model(batch())))
    inner.add_param_group({"params": list(model[2].parameters())})
    clear(model.parameters())
    steering.backward_components(conflicting(model(batch())))
    assert_close(
        flat_grad(model.parameters()),
        expected_update(lambda: conflicting(model(batch())), model.parameters(), STEER),
    )


def test_a_copy_is_independent():
    model = network()
    steering = Steering(model.parameters(), GradVac(beta=0.5))
    steering.backward_components(conflicting(model(batch())))
    other_model, other = copy.deepcopy((model, steering))
    before = steering.state_dict()
    other.backward_components(conflicting(other_model(batch(1))))
    assert steering.state_dict() == before != other.state_dict()


def test_the_state_of_something_else_does_not_reset_the_rule():
    model = network()
    steering, optimizer = Steering(model.parameters(), GradVac()), steered(model.parameters(), GradVac())
    steering.backward_components(conflicting(model(batch())))
    before = steering.state_dict()
    for other in (optimizer, optimizer.inner, model):
        with pytest.raises(ValueError, match="not the state dict of a Steering: it has no 'steer_optim', only '"):
            steering.load_state_dict(other.state_dict())
    assert steering.state_dict() == before


# Several steerings over one loss


@EACH_RULE
@pytest.mark.parametrize("ways", [("backward_components",) * 2, ("join",) * 2, ("join", "backward_components")])
def test_two_steered_optimizers_over_one_loss_leave_each_others_parameters_alone(rule, ways):
    model = network()
    matrices, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    optimizers = [steered(matrices, rule), steered(biases, rule)]
    losses = conflicting(model(batch()), rule)
    for optimizer, way, last in zip(optimizers, ways, (False, True), strict=True):
        if way == "join":
            optimizer.join(losses).backward(retain_graph=not last)
        else:
            optimizer.backward_components(losses, retain_graph=not last)
    for own in (matrices, biases):
        expected = expected_update(lambda: conflicting(model(batch()), rule), own, rule)
        assert_close(flat_grad(own), expected, 1e-12)


def test_a_generator_and_a_discriminator():
    """The generator's losses go through the discriminator, and leave no gradient there."""
    generator, discriminator = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
    first = Steering(discriminator.parameters(), Steer("real"))
    second = Steering(generator.parameters(), Steer("fool"))
    noise, real = torch.randn(5, 2).double(), torch.randn(5, 3).double()
    fake = generator(noise)
    first.backward_components(
        {"real": discriminator(real).square().mean(), "fake": -discriminator(fake.detach()).square().mean()}
    )
    before = flat_grad(discriminator.parameters())
    second.backward_components({"fool": discriminator(fake).square().mean(), "spread": -fake.square().mean()})
    assert torch.equal(flat_grad(discriminator.parameters()), before)
    expected = expected_update(
        lambda: {"fool": discriminator(generator(noise)).square().mean(), "spread": -generator(noise).square().mean()},
        generator.parameters(),
        Steer("fool"),
    )
    assert_close(flat_grad(generator.parameters()), expected)


def test_a_steering_that_is_gone_owns_nothing():
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    other = Steering([b], Sum())
    steering = Steering([a], Sum())
    steering.backward_components({"loss": a * b})
    assert b.grad is None
    del other
    steering.backward_components({"loss": a * b})
    assert b.grad.item() == 1


# Components that are absent


@EACH_RULE
@pytest.mark.parametrize("way", ["None", "left out"])
def test_an_absent_component_is_a_zero_gradient(rule, way):
    model = network()
    optimizers = [steered(model.parameters(), rule) for _ in range(2)]
    for step in range(4):
        updates = []
        for optimizer, absent in zip(optimizers, (True, False), strict=True):
            clear(model.parameters())
            losses = conflicting(model(batch(step)), rule)
            last = [*losses][-1] if [*losses][-1] != "vis" else "std"
            if step == 2:
                losses[last] = None if absent else 0.0 * model(batch(step)).sum()
                if absent and way == "left out":
                    del losses[last]
            geometry = optimizer.backward_components(losses)
            updates.append((flat_grad(model.parameters()), geometry.G, geometry.weights))
        assert_equal(updates[0], updates[1])
    assert geometry.names == tuple(conflicting(model(batch()), rule))


def test_the_loss_of_an_absent_component_is_not_a_number():
    x = nn.Parameter(torch.ones(1))
    geometry = steered([x], Sum()).backward_components({"a": None, "b": 2 * x})
    assert geometry.losses.isnan().tolist() == [True, False]
    assert geometry.G.tolist() == [[0, 0], [0, 4]]
    assert x.grad.item() == 2
    assert measure({"a": None, "b": 2 * x}, [x]).G.tolist() == [[0, 0], [0, 4]]


@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize("way", ["backward_components", "join"])
def test_micro_batches_of_one_component_each(way, refresh_every):
    """From the first step on, whose names are those of all its micro-batches."""
    model = network()
    optimizer = steered(model.parameters(), STEER, refresh_every=refresh_every)
    for step in range(2 * refresh_every):
        clear(model.parameters())
        for i, name in enumerate(conflicting(model(batch()))):
            losses = {name: conflicting(model(batch(step)))[name]}
            if way == "join":
                optimizer.join(losses, accumulate=i < 2).backward()
            else:
                optimizer.backward_components(losses, accumulate=i < 2)
        together = conflicting(model(batch(step)))
        values = torch.stack([loss.detach() for loss in together.values()])
        assert_equal(optimizer.geometry.losses, values)
        if optimizer.geometry.age == 0:
            expected = expected_update(lambda step=step: conflicting(model(batch(step))), model.parameters(), STEER)
            assert_close(flat_grad(model.parameters()), expected)
    assert optimizer.geometry.age == refresh_every - 1


def test_a_framework_says_whether_more_micro_batches_follow():
    x = nn.Parameter(torch.ones(1))
    optimizer = steered([x], Sum())
    more = True
    optimizer.steering.accumulating = lambda: more
    copied = pickle.loads(pickle.dumps(optimizer))  # which trains in another loop
    assert copied.steering.accumulating is None
    assert optimizer.backward_components({"a": x.sum()}) is None
    optimizer.join({"a": x.sum()}).backward()
    assert x.grad is None
    optimizer.backward_components({"a": x.sum()}, accumulate=False)  # what is passed counts
    assert x.grad.item() == 3
    optimizer.join({"a": x.sum()}).backward()
    more = False
    optimizer.join({"a": x.sum()}).backward()
    assert x.grad.item() == 5


def test_a_step_without_any_component_writes_nothing():
    x = nn.Parameter(torch.ones(1))
    optimizer = steered([x], GradVac())
    for losses in ({"a": x.sum(), "b": -x.sum()}, {"a": None, "b": None}, {"a": None}):
        x.grad = None
        optimizer.backward_components(losses)
    assert x.grad is None
    assert optimizer.geometry.G.eq(0).all()
    loss = optimizer.join({"a": None})
    assert loss.item() == 0
    loss.backward()
    assert x.grad is None


def test_the_component_that_the_rule_needs_may_be_absent_but_not_unknown():
    x = nn.Parameter(torch.ones(1))
    optimizer = steered([x], Steer("vis"))
    optimizer.backward_components({"std": x.sum(), "vis": None})
    optimizer.backward_components({"std": x.sum()})
    assert x.grad.item() == 2
    with pytest.raises(ValueError, match=re.escape("Steer needs its component 'vis'")):
        steered([x], Steer("vis")).backward_components({"std": x.sum()})


@pytest.mark.parametrize("name", sorted(set(RULES) - {"Weighting"}))
def test_another_rule_object_starts_without_memory(name):
    """Also one of the same class: it is the object that remembers."""
    model = network()
    rule = RULES[name]
    optimizer, fresh = (steered(model.parameters(), rule, refresh_every=9) for _ in range(2))
    for step in range(2):
        optimizer.backward_components(conflicting(model(batch(step)), rule))
    optimizer.rule = copy.deepcopy(rule)
    clear(model.parameters())
    geometry = optimizer.backward_components(conflicting(model(batch(2)), rule))
    assert geometry.age == 0
    again = fresh.backward_components(conflicting(model(batch(2)), rule))
    assert_equal(geometry.weights, again.weights)
    assert optimizer.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]


def test_steerings_in_two_threads_train_as_one_after_the_other():
    def make(seed: int) -> tuple[nn.Module, SteeredOptimizer]:
        torch.manual_seed(seed)
        model = network()
        return model, SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), PCGrad())

    def train(model: nn.Module, optimizer: SteeredOptimizer) -> None:
        for step in range(60):
            optimizer.zero_grad()
            optimizer.backward_components(conflicting(model(batch(step, rows=64))))
            optimizer.step()

    expected = [make(seed) for seed in (0, 1)]
    for model, optimizer in expected:
        train(model, optimizer)
    found = [make(seed) for seed in (0, 1)]
    threads = [Thread(target=train, args=pair) for pair in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (model, _), (other, _) in zip(found, expected, strict=True):
        assert_equal([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])


def test_another_steerings_parameters_behind_a_reentrant_checkpoint_are_left_alone():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    other = steered(second.parameters(), Sum())
    x = torch.ones(2, 3, requires_grad=True)
    out = checkpoint(lambda x: second(first(x)), x, use_reentrant=True)
    steered(first.parameters(), Sum()).backward_components({"a": out.sum(), "b": out.square().sum()})
    assert first.weight.grad is not None
    assert second.weight.grad is None
    del other


def test_the_names_of_a_rule_without_memory_are_resumed():
    x = nn.Parameter(torch.ones(3))
    first, second, another = (steered([x], rule) for rule in (Steer("a"), Steer("a"), Sum()))
    first.backward_components({"a": x.sum(), "b": -x.prod()})
    for optimizer in (second, another):
        optimizer.load_state_dict(first.state_dict())
    assert second.backward_components({"b": -x.prod()}).names == ("a", "b")
    assert another.backward_components({"c": x.sum()}).names == ("c",)  # another rule starts afresh
