"""What the tests of the core share: a small model with conflicting components, and the dense update to expect."""

from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from properties import RULES, names_for
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import peak_bytes as peak_bytes
from benchmarks.host_reads import is_read
from steer_optim import SteeredOptimizer, reference
from steer_optim.rules import Rule

STEER = RULES["Steer"]
EACH_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def steered(parameters: Iterable[Tensor], rule: Rule = STEER, **options) -> SteeredOptimizer:
    return SteeredOptimizer(torch.optim.SGD(list(parameters), lr=0.1), rule, **options)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6, dtype=dtype), nn.Tanh(), nn.Linear(6, 3, dtype=dtype))


def conflicting(output: Tensor, rule: Rule = STEER) -> dict[str, Tensor]:
    """As many components of one graph as the rule can weigh, up to three; the first two conflict."""
    std = output.square().mean(0).sum()
    losses = [std, -0.5 * std + output[:, 0].mean(), output.exp().mean()]
    return dict(zip(names_for(rule, 3), losses, strict=False))


def clear(parameters: Iterable[Tensor]) -> None:
    for p in parameters:
        p.grad = None


def flat(gradients: Iterable[Tensor | None], parameters: Iterable[Tensor]) -> Tensor:
    """Gradients end to end, float64: absent ones are zero, sparse ones dense, complex ones pairs."""
    dense = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(gradients, parameters, strict=True)]
    return reference.flatten([[torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in dense]])[0]


def flat_grad(parameters: Iterable[Tensor]) -> Tensor:
    parameters = list(parameters)
    return flat([p.grad for p in parameters], parameters)


def dense_gradients(losses: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> Tensor:
    """The component gradients as a matrix ``(k, n)``, float64; the graph is kept."""
    parameters = list(parameters)
    rows = [torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in losses.values()]
    return torch.stack([flat(row, parameters) for row in rows])


def expected_update(losses: Callable[[], dict[str, Tensor]], parameters: Iterable[Tensor], rule: Rule) -> Tensor:
    """The first update of a rule, ``(n,)``, from the component gradients as one dense matrix."""
    parameters = list(parameters)
    values = losses()
    J = dense_gradients(values, parameters)
    return reference.combine(J, rule(reference.gramian(J), list(values))[0])


def assert_steered(
    losses: Callable[[], dict[str, Tensor]], parameters: Iterable[Tensor], rule: Rule = STEER, tolerance: float = 1e-13
) -> None:
    """``backward_components`` writes the dense update, up to a relative rounding error."""
    parameters = list(parameters)
    expected = expected_update(losses, parameters, rule)
    clear(parameters)
    steered(parameters, rule).backward_components(losses())
    assert_close(flat_grad(parameters), expected, tolerance)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-13) -> None:
    """Equal up to an error relative to the norm; 1e-13 is a few hundred roundings of float64."""
    assert expected.norm() > 0
    assert (found - expected).norm() <= tolerance * expected.norm()


class NoHostRead(TorchDispatchMode):
    """Fails where a number is read or copied to another device, which is where an accelerator would be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not is_read(function), str(function)
        found = function(*args, **(kwargs or {}))
        if "copy" in str(function):
            assert len({x.device for x in tree_leaves((args, found)) if isinstance(x, Tensor)}) == 1, str(function)
        return found
