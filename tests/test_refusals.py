"""What is refused, by name and with a remedy, and that nothing is left behind: contract, items 14, 19 and 20."""

import re

import pytest
import torch
from steering import conflicting, network, steered
from torch import Tensor, nn

from steer_optim import VGS, GradVac, Steer, SteeredOptimizer, Sum, measure
from steer_optim.survey import survey

X = nn.Parameter(torch.tensor([1.0, 2.0]))
OTHER = nn.Parameter(torch.tensor([3.0]))  # belongs to no optimizer

REFUSED = {
    "no components": ({}, ValueError, "there are no components"),
    "a list": ([X.sum], TypeError, "mapping from names to scalar losses; got list"),
    "a tensor": (X, TypeError, "mapping from names to scalar losses; got Parameter"),
    "a name that is a number": ({"vis": X.sum, 1: X.sum}, TypeError, "must be a str; got 1"),
    "a float": ({"vis": X.sum, "std": 1.0}, TypeError, "'std' must be a tensor or a callable; got float"),
    "a vector": ({"vis": X.sum, "std": lambda: X * 2}, ValueError, r"'std' must be a scalar; got shape \(2,\)"),
    "nothing": ({"vis": X.sum, "std": lambda: None}, TypeError, "'std' must return a tensor; got NoneType"),
    "a detached one": ({"vis": X.sum, "std": lambda: X.sum().detach()}, ValueError, "'std' is detached: it does not"),
    "another's": ({"vis": X.sum, "std": OTHER.sum}, ValueError, "'std' is detached from every given par"),
}
EACH_REFUSAL = pytest.mark.parametrize(("losses", "error", "message"), REFUSED.values(), ids=REFUSED)


@pytest.fixture(autouse=True)
def _no_gradients():
    X.grad = OTHER.grad = None


def evaluated(losses):
    """The same with tensors for callables, where they can be told apart."""
    return {k: v() if callable(v) else v for k, v in losses.items()} if isinstance(losses, dict) else losses


def assert_usable(optimizer: SteeredOptimizer) -> None:
    """Nothing is pending, and the next step is as if nothing had happened."""
    X.grad = None
    optimizer.step()
    optimizer.backward_components({"std": X.sum(), "vis": X[0]})
    assert X.grad.tolist() == [2, 1]


@EACH_REFUSAL
@pytest.mark.parametrize("given", [lambda losses: losses, evaluated], ids=["callables", "tensors"])
@pytest.mark.parametrize("pending", [False, True])
def test_bad_components_are_refused_and_leave_everything_as_it_was(losses, error, message, given, pending):
    optimizer = steered([X], Sum())
    X.grad = gradient = torch.ones(2)
    if pending and losses is not REFUSED["another's"][0]:  # an earlier micro-batch did reach a parameter
        optimizer.backward_components({"std": X.sum(), "vis": X[0]}, accumulate=True)
    if given is evaluated and message.startswith("'std' must return"):
        return  # None is no loss, and nothing wrong
    with pytest.raises(error, match=message):
        optimizer.backward_components(given(losses))
    assert X.grad is gradient
    assert X.grad.tolist() == [1, 1]
    optimizer.zero_grad()
    assert_usable(optimizer)


@EACH_REFUSAL
def test_bad_components_cannot_be_measured(losses, error, message):
    with pytest.raises(error, match=message.removesuffix(" of the opt")):
        measure(losses, [X])
    assert X.grad is None


@EACH_REFUSAL
def test_bad_components_cannot_be_joined(losses, error, message):
    optimizer = steered([X], Sum())
    with pytest.raises(error, match=message):
        optimizer.join(losses).backward()
    assert X.grad is None
    assert_usable(optimizer)


def test_measuring_needs_a_trainable_parameter():
    for parameters in ([], [torch.zeros(2)]):
        with pytest.raises(ValueError, match="no parameter to measure on"):
            measure({"std": X.sum()}, parameters)
    for parameters in (X, nn.Linear(1, 1), [nn.Linear(1, 1)], [("x", X)], [{"params": [X]}], None):
        with pytest.raises(TypeError, match="parameters must be a list of tensors"):
            measure({"std": X.sum()}, parameters)
        with pytest.raises(TypeError, match="parameters must be a list of tensors"):
            survey(lambda batch: {"std": X.sum()}, [0], parameters)


def test_an_error_in_a_callable_drops_what_is_pending():
    optimizer = steered([X], Sum())
    optimizer.backward_components({"std": X.sum(), "vis": X[0]}, accumulate=True)

    def broken() -> Tensor:
        raise KeyError("no such batch")

    with pytest.raises(KeyError, match="no such batch"):
        optimizer.backward_components({"std": X.sum(), "vis": broken})
    assert_usable(optimizer)


def test_a_callable_whose_data_is_exhausted_is_named():
    x = nn.Parameter(torch.ones(1))
    losses, optimizer = {"vis": x.sum, "std": lambda: next(iter([])) * x.sum()}, steered([x], Sum())
    for use in (optimizer.backward_components, optimizer.join, lambda losses: measure(losses, [x])):
        with pytest.raises(RuntimeError, match="the callable of component 'std' raised StopIteration"):
            use(losses)


def test_an_error_while_the_graph_is_walked_leaves_the_gradients_as_they_were():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise OverflowError("in the backward pass")

    optimizer = steered([X], Sum())
    X.grad = gradient = torch.ones(2)
    with pytest.raises(OverflowError, match="in the backward pass"):
        optimizer.backward_components({"std": X.sum(), "vis": Broken.apply(X).sum()})
    assert X.grad is gradient
    assert_usable(optimizer)


@pytest.mark.parametrize("way", ["backward_components", "join"])
@pytest.mark.parametrize("rule", [Steer("vis"), VGS()], ids=repr)
def test_names_that_the_rule_does_not_know(rule, way):
    optimizer = steered([X], rule)
    with pytest.raises(ValueError, match=re.escape("'vis'")) as refused:
        getattr(optimizer, way)({"std": X.sum(), "visual": X[0]})
    assert "'visual'" in str(refused.value)
    assert X.grad is None


@pytest.mark.parametrize("way", ["backward_components", "join"])
@pytest.mark.parametrize("rule", [Sum(), GradVac(), Steer("vis")], ids=repr)
def test_a_name_that_is_not_one_of_the_first_step(rule, way):
    optimizer = steered([X], rule)
    optimizer.backward_components({"std": X.sum(), "vis": X[0]})
    X.grad = None
    with pytest.raises(ValueError, match=r"component 'viz' is unknown: this steering has 'std', 'vis'.*None for those"):
        getattr(optimizer, way)({"std": X.sum(), "viz": X[0]})
    assert X.grad is None
    optimizer.backward_components({"vis": X[0], "std": X.sum()})
    with pytest.raises(ValueError, match=re.escape("steering.load_state_dict({}) (optimizer.steering) forgets them")):
        getattr(optimizer, way)({"std": X.sum(), "viz": X[0]})
    optimizer.steering.load_state_dict({})
    optimizer.rule = Sum()
    assert optimizer.backward_components({"std": X.sum(), "viz": X[0]}).names == ("std", "viz")


def test_hooks_that_step_in_the_backward_pass():
    model, batch = network(), torch.randn(2, 4).double()
    handle = model[2].weight.register_post_accumulate_grad_hook(lambda p: None)
    optimizer = steered(model.parameters())
    with pytest.raises(RuntimeError, match=r"parameter 2 .*\(3, 6\).* post-accumulate-grad hook.*Remove the hook"):
        optimizer.backward_components(conflicting(model(batch)))
    assert all(p.grad is None for p in model.parameters())
    handle.remove()
    optimizer.backward_components(conflicting(model(batch)))
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_parameters_of_another_layout():
    weight = nn.Parameter(torch.eye(3).to_sparse_csr())
    losses = {"std": (weight @ torch.ones(3, 1)).sum() + X.sum(), "vis": (weight @ torch.randn(3, 1)).sum()}
    with pytest.raises(TypeError, match=r"parameter 1 .*\(3, 3\).* has layout torch.sparse_csr.*Convert it"):
        steered([X, weight], Sum()).backward_components(losses)
    assert X.grad is None
    assert weight.grad is None


def test_an_optimizer_without_a_trainable_parameter():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        steered([frozen], Sum()).backward_components({"std": X.sum()})


def test_what_cannot_be_wrapped():
    sgd = torch.optim.SGD([X], lr=0.1)
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer; got list"):
        SteeredOptimizer([X], Sum())
    with pytest.raises(TypeError, match=r"got the class SGD. Create one"):
        SteeredOptimizer(torch.optim.SGD, Sum())
    with pytest.raises(TypeError, match=r"steered already: wrap optimizer.inner"):
        SteeredOptimizer(SteeredOptimizer(sgd, Sum()), Sum())
    with pytest.raises(TypeError, match=r"must be a Rule.*Wrap a function of the Gramian in Weighting"):
        SteeredOptimizer(sgd, lambda G: G.diagonal())
    optimizer = SteeredOptimizer(sgd, Sum())
    with pytest.raises(TypeError, match=r"must be a Rule; got 'main'. Create one: Steer"):
        optimizer.rule = "main"
    with pytest.raises(AttributeError):
        optimizer.steering.scope = "group"
    with pytest.raises(ValueError, match="'model', 'group' or 'tensor'; got 'layer'"):
        SteeredOptimizer(sgd, Sum(), scope="layer")
