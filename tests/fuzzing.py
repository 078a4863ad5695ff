"""Random training programs, and a dense float64 model of what steering has to leave behind in each of their operations.

A `Program` is plain data: some parameters, units of arithmetic that the losses are made of, one or two steerings and
a list of operations. `Run` executes it and holds every operation against `Model`, which knows the component gradients
as vectors, taken with `torch.autograd.grad` from the same graph. Data is random numbers from seeds, so that a program
prints as a few lines and can be run again.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from properties import RULES, names_for
from torch import Tensor, nn

from steer_optim import SteeredOptimizer, Steering
from steer_optim.steering import BOUND

OUTSIDE = -1  # the owner of a parameter that no steering has

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


# Programs


class Short:
    """Says in its repr only what is not usual."""

    def __repr__(self) -> str:
        usual = {f.name: f.default for f in fields(self)}
        given = [(name, value) for name, value in vars(self).items() if usual[name] != value]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"


@dataclass(frozen=True, repr=False)
class Parameter(Short):
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    owner: int = 0
    group: int = 0
    frozen: bool = False
    plain: bool = False  # a tensor instead of an nn.Parameter, which is copied in another way
    seed: int = 0

    def make(self) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        dtype = torch.complex128 if self.dtype.is_complex else torch.float64
        if self.layout == "transposed":
            value = torch.randn(self.shape[::-1], generator=random, dtype=dtype).permute(
                *reversed(range(len(self.shape)))
            )
        elif self.layout == "gaps":
            value = torch.randn(*self.shape, 2, generator=random, dtype=dtype)
        else:
            value = torch.randn(self.shape, generator=random, dtype=dtype)
        value = value.to(self.dtype)
        if self.layout == "channels_last":
            value = value.to(memory_format=torch.channels_last)
        elif self.layout == "gaps":
            value = value[..., 0]
        return value.requires_grad_(not self.frozen) if self.plain else nn.Parameter(value, not self.frozen)


@dataclass(frozen=True, repr=False)
class Unit(Short):
    """Some arithmetic on some parameters, whose results the components share.

    ``each`` uses a parameter in two places. ``sum of views`` and ``end to end`` give several parameters views of one
    tensor as their gradients. ``rows`` has a sparse gradient, and ``rows and all`` is used densely, too.
    """

    kind: str
    members: tuple[int, ...]
    narrow: bool = False  # whether the arithmetic is that of the parameter's dtype, or of float64


@dataclass(frozen=True, repr=False)
class Steered(Short):
    rule: str
    scope: str = "model"
    refresh_every: int = 1
    form: str = "optimizer"  # a SteeredOptimizer, or a Steering beside the optimizer
    empty_group: bool = False


@dataclass(frozen=True, repr=False)
class Program(Short):
    names: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    units: tuple[Unit, ...]
    uses: tuple[frozenset[int], ...]  # the units of each component
    relations: tuple[tuple[int, float] | None, ...]  # a component that is a multiple of an earlier one
    losses: tuple[tuple[torch.dtype, tuple[int, ...]], ...]  # their dtypes and shapes
    steered: tuple[Steered, ...]
    operations: tuple[Any, ...]

    @property
    def precise(self) -> bool:
        """Whether everything is float64."""
        dtypes = {p.dtype for p in self.parameters} | {dtype for dtype, _ in self.losses}
        return dtypes <= {torch.float64, torch.complex128}


@dataclass(frozen=True, repr=False)
class Failure(Short):
    kind: str
    at: int = 0
    error: type[BaseException] = ValueError


@dataclass(frozen=True, repr=False)
class Step(Short):
    who: int = 0
    way: str = "tensors"
    present: tuple[str, ...] = ()  # of each component: "loss", "None" or "left out"
    late: tuple[bool, ...] = ()  # which components are callables, where the way is mixed
    seed: int = 0
    factors: tuple[float, ...] = ()
    scale: float = 1.0  # of a join
    accumulate: bool = False
    again: str = ""  # "retained": a second time; "freed": a second time, which is refused
    shared: bool = False  # whether callables share a graph, which is retained
    added: bool = False  # whether another loss is added to a join
    clear: bool = False  # zero_grad between a join and its backward pass
    failure: Failure | None = None


@dataclass(frozen=True, repr=False)
class Auxiliary(Short):
    """A plain backward pass of another loss."""

    seed: int = 0


@dataclass(frozen=True, repr=False)
class Zero(Short):
    who: int = 0
    set_to_none: bool = True


@dataclass(frozen=True, repr=False)
class Halve(Short):
    """What clips and scalers do: in place, one gradient after the other."""

    who: int = 0


@dataclass(frozen=True, repr=False)
class Move(Short):
    """A step of the inner optimizer."""

    who: int = 0


@dataclass(frozen=True, repr=False)
class Refresh(Short):
    who: int = 0
    every: int = 1


@dataclass(frozen=True, repr=False)
class Rule(Short):
    """Another rule object, or the one that is set already; a copy of that if there is no name."""

    who: int = 0
    name: str | None = None


@dataclass(frozen=True, repr=False)
class Save(Short):
    who: int = 0


@dataclass(frozen=True, repr=False)
class Load(Short):
    """What was saved last, or is saved now, into the same steering or another, which may have another rule."""

    who: int = 0
    fresh: bool = True
    rule: str | None = None


@dataclass(frozen=True, repr=False)
class Copy(Short):
    pass


@dataclass(frozen=True, repr=False)
class Freeze(Short):
    which: int = 0
    frozen: bool = True


@dataclass(frozen=True, repr=False)
class AddGroup(Short):
    who: int = 0
    which: int = 0


SHAPES = [(4,), (2, 2), (), (3,), (0,), (2, 0), (3, 2), (5, 3), (2, 3, 2, 2), (1, 2, 1, 2), (1,)]
ERRORS = [ValueError, RuntimeError, KeyboardInterrupt]


def rarely(draw: st.DrawFn, one_in: int) -> bool:
    return draw(st.integers(0, one_in - 1)) == one_in - 1


@st.composite
def programs(draw: st.DrawFn, *, precise: bool, most_operations: int = 18) -> Program:
    k = draw(st.sampled_from([2, 3, 1, 4]))
    names = names_for(RULES["Sum"], k)
    fitting = [name for name, rule in RULES.items() if names_for(rule, k) == names]
    steered = []
    for _ in range(1 + rarely(draw, 3)):
        scope = draw(st.sampled_from(["model", "model", "group", "tensor"]))
        every = draw(st.sampled_from([1, 2, 3, 9, 9])) if scope == "model" else 1
        form = draw(st.sampled_from(["optimizer", "steering"]))
        steered.append(Steered(draw(st.sampled_from(fitting)), scope, every, form, rarely(draw, 6)))

    def dtype() -> torch.dtype:
        return torch.float64 if precise else draw(st.sampled_from(DTYPES))

    # The first parameter of each steering trains always and is used by every component.
    parameters = [Parameter((3,), dtype(), owner=i, seed=draw(seeds)) for i in range(len(steered))]
    anchors = len(parameters)
    units = [Unit("each", (i,)) for i in range(anchors)]
    owners = [*range(anchors), *range(anchors), OUTSIDE]
    for _ in range(draw(st.integers(0, 4))):
        first = draw_parameter(draw, dtype(), owners)
        parameters.append(first)
        members = (len(parameters) - 1,)
        if first.dtype.is_complex:
            units.append(Unit("each", members))
            continue
        kinds = [
            "each",
            "sum of views",
            "end to end",
            "product",
            *(["rows", "rows and all"] if is_table(first) else []),
        ]
        kind = draw(st.sampled_from(kinds))
        if kind in ("sum of views", "end to end", "product"):
            for _ in range(draw(st.integers(1, 2))):
                other = draw_parameter(draw, first.dtype, owners)
                shape = draw(st.sampled_from([s for s in SHAPES if numel(s) == numel(first.shape)]))
                other = replace(other, dtype=first.dtype, shape=shape, layout=fitting_layout(other.layout, shape))
                if OUTSIDE in [parameters[i].owner for i in members]:
                    # Two of them may share memory in .grad: torch adds to both whatever it adds to either.
                    other = replace(other, owner=0)
                parameters.append(other)
                members = (*members, len(parameters) - 1)
        units.append(Unit(kind, members, narrow=first.dtype not in HALF and draw(st.booleans())))
    some = st.lists(st.sampled_from([True, True, True, False]), min_size=len(units), max_size=len(units))
    uses = [frozenset(u for u, used in enumerate(draw(some)) if used or u < anchors) for _ in names]
    relations: list[tuple[int, float] | None] = [None] * k
    for i in range(1, k):
        if rarely(draw, 6):
            relations[i] = (draw(st.integers(0, i - 1)), draw(st.sampled_from([-1.0, 1.0, 0.0, -0.5, 3.0])))
    shapes = st.sampled_from([(), (), (1,), (1, 1)])
    losses = tuple((dtype() if rarely(draw, 2) else torch.float64, draw(shapes)) for _ in names)
    half = any(p.dtype in HALF for p in parameters)
    most = 1.0 if half else 100.0
    # Weights that float32 does not hold, or gradients whose squares it does not.
    tiny = [1e-40] if precise else [] if half else [1e-25]
    operation = draw_operation(names, len(steered), fitting, len(parameters), most=most, tiny=tiny)
    length = draw(st.integers(1, most_operations))  # or lists are mostly short
    operations = draw(st.lists(operation, min_size=length, max_size=length))
    return Program(
        names, tuple(parameters), tuple(units), tuple(uses), tuple(relations), losses, tuple(steered), tuple(operations)
    )


seeds = st.integers(0, 2**16)


def draw_parameter(draw: st.DrawFn, dtype: torch.dtype, owners: Sequence[int]) -> Parameter:
    shape = draw(st.sampled_from(SHAPES))
    layout = fitting_layout(draw(st.sampled_from(["contiguous", "contiguous", "dense", "gaps"])), shape)
    return Parameter(
        shape,
        COMPLEX[dtype] if dtype in COMPLEX and rarely(draw, 6) else dtype,
        layout,
        owner=draw(st.sampled_from(owners)),
        group=draw(st.integers(0, 1)),
        frozen=rarely(draw, 8),
        plain=rarely(draw, 4),
        seed=draw(seeds),
    )


def fitting_layout(layout: str, shape: tuple[int, ...]) -> str:
    if layout in ("dense", "transposed", "channels_last"):
        return {2: "transposed", 4: "channels_last"}.get(len(shape), "contiguous")
    return layout if numel(shape) else "contiguous"


def is_table(p: Parameter) -> bool:
    # torch itself does not keep the strides of others where it adds sparse gradients and dense ones.
    return len(p.shape) == 2 and min(p.shape) > 0 and p.dtype not in HALF and p.layout == "contiguous"


def numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def draw_operation(
    names: tuple[str, ...],
    steered: int,
    rules: Sequence[str],
    parameters: int,
    *,
    most: float,
    tiny: Sequence[float],
) -> st.SearchStrategy[Any]:
    who = st.integers(0, steered - 1)

    def each(values: Sequence[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
        return st.tuples(*[st.sampled_from(values)] * len(names))

    failures = st.builds(
        Failure,
        st.sampled_from(["callable", "backward", "detached", "vector", "nothing", "unreached", "unknown", "rule"]),
        st.integers(0, 7),
        st.sampled_from(ERRORS),
    )
    factors = [1.0] * 12 + [0.01, min(100.0, most), -min(30.0, most), 0.0, *tiny]
    usual: dict[str, Any] = {
        "who": who,
        "way": st.sampled_from(["tensors", "callables", "mixed", "join", "join callables"]),
        "present": each(["loss"] * 6 + ["None", "left out"]),
        "late": each([False, True]),
        "seed": seeds,
        "factors": each(factors) | each(factors + [torch.inf] * (len(factors) // 2)) if most > 1 else each(factors),
        "scale": st.sampled_from([1.0, 0.5, 3.0, 0.75, 0.0, -1.0]),
        "accumulate": st.sampled_from([False, False, True]),
        "again": st.sampled_from([""] * 6 + ["retained", "freed"]),
        "shared": st.booleans(),
        "added": st.sampled_from([False] * 3 + [True]),
        "clear": st.sampled_from([False] * 7 + [True]),
    }
    plain = {"present": st.just(("loss",) * len(names)), "factors": st.just((1.0,) * len(names)), "again": st.just("")}
    step, simple = st.builds(Step, **usual), st.builds(Step, **{**usual, **plain})
    which = st.integers(0, parameters - 1)
    return one_in_proportion(
        (30, simple),
        (22, step),
        (10, st.builds(Step, **usual, failure=failures)),
        (3, st.builds(Auxiliary, seeds)),
        (4, st.builds(Zero, who, st.booleans())),
        (3, st.builds(Halve, who)),
        (5, st.builds(Move, who)),
        (3, st.builds(Refresh, who, st.sampled_from([1, 2, 3, 9]))),
        (5, st.builds(Rule, who, st.sampled_from([None, "", "", *rules]))),
        (2, st.builds(Save, who)),
        (4, st.builds(Load, who, st.booleans(), st.sampled_from([None, None, *rules]))),
        (2, st.builds(Copy)),
        (3, st.builds(Freeze, which, st.booleans())),
        (2, st.builds(AddGroup, who, which)),
    )


@st.composite
def one_in_proportion(draw: st.DrawFn, *choices: tuple[int, st.SearchStrategy[Any]]) -> Any:
    indices = [i for i, (count, _) in enumerate(choices) for _ in range(count)]
    return draw(choices[draw(st.sampled_from(indices))][1])


# Losses


class Break(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: type[BaseException]) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        raise ctx.error("in the backward pass")


class Forward:
    """One forward pass: components that share the units they have in common."""

    def __init__(self, program: Program, tensors: Sequence[Tensor], seed: int) -> None:
        self.program, self.tensors = program, list(tensors)
        random = torch.Generator().manual_seed(seed)
        shape = (2, len(program.names), len(program.units))
        self.linear, self.quadratic = torch.randn(shape, generator=random, dtype=torch.float64).unbind()
        self.data = [
            [torch.randn(2, *tensors[i].shape, generator=random, dtype=wide(tensors[i])) for i in unit.members]
            for unit in program.units
        ]
        self.rows = torch.randint(0, 2, (4,), generator=random)
        self.done: dict[int, tuple[Tensor, Tensor]] = {}

    def unit(self, u: int) -> tuple[Tensor, Tensor]:
        if u not in self.done:
            unit = self.program.units[u]
            members = [self.tensors[i] for i in unit.members]
            self.done[u] = features(unit, members, self.data[u], self.rows)
        return self.done[u]

    def component(self, i: int) -> Tensor:
        """A sum of what is linear and the square of what is not, over the units that the component uses."""
        relation = self.program.relations[i]
        if relation is not None:
            return relation[1] * self.component(relation[0])
        used = [(u, *self.unit(u)) for u in sorted(self.program.uses[i])]
        square = sum(self.quadratic[i, u] * first for u, first, _ in used)
        return 0.5 * square * square + sum(self.linear[i, u] * second for u, _, second in used)

    def loss(self, i: int, factor: float) -> Tensor:
        dtype, shape = self.program.losses[i]
        return (factor * self.component(i)).to(dtype).reshape(shape)


def wide(t: Tensor) -> torch.dtype:
    return torch.complex128 if t.is_complex() else torch.float64


def features(unit: Unit, members: list[Tensor], data: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers; those of a joint unit are functions of one."""
    p, x = members[0], data[0]
    if unit.kind in ("sum of views", "end to end"):
        flat = [m.reshape(-1) for m in members]
        joint = torch.cat(flat) if unit.kind == "end to end" else sum(flat[1:], flat[0])
        weights = torch.cat([d[0].reshape(-1) for d in data])[: joint.numel()].to(joint.dtype)
        value = (joint * weights).sum().double()
        return value, value.sin()
    if unit.kind == "product":
        product = p.reshape(-1) if unit.narrow else p.double().reshape(-1)
        for m in members[1:]:
            product = product * (m.reshape(-1) if unit.narrow else m.double().reshape(-1))
        value = (product * x[0].reshape(-1).to(product.dtype)).sum().double()
        return value, value.sin()
    if unit.kind.startswith("rows"):
        found = nn.functional.embedding(rows.clamp(max=len(p) - 1), p, sparse=True)
        found = found.sum() + (p * x[1]).sum() if unit.kind == "rows and all" else found[0].sum() + found.sum()
        return found.double(), found.double().sin()
    p = p if unit.narrow else p.to(wide(p))
    x = x.to(p.dtype)
    if p.is_complex():
        return (x[0] * p).real.sum().double(), (x[1].real * p.conj().imag).sum().double() + p.abs().sum().double()
    return (x[0] * p).sum().double(), (x[1] * p.sin()).sum().double()


# The model


def dense(g: Tensor) -> Tensor:
    """A copy in one dimension, float64."""
    g = g.detach().to_dense() if g.is_sparse else g.detach()
    g = torch.view_as_real(g.resolve_conj()) if g.is_complex() else g
    return g.double().reshape(-1).clone()


@dataclass
class Gradient:
    """Of one component with respect to one parameter, summed over micro-batches."""

    value: Tensor
    size: float  # the norms of what was summed
    sparse: bool
    weight: float = 1.0  # what it was multiplied by

    def __add__(self, other: Gradient | None) -> Gradient:
        if other is None:
            return self
        return Gradient(self.value + other.value, self.size + other.size, self.sparse and other.sparse)


@dataclass
class Last:
    """The last exact step."""

    key: object
    G: Tensor
    weights: Tensor
    before: Tensor
    scale: tuple[float, float]
    age: int = 0

    @property
    def finite(self) -> bool:
        return bool(self.G.isfinite().all() and self.weights.isfinite().all())

    @property
    def norms(self) -> Tensor:
        return self.G.diagonal().clamp(min=0).sqrt()

    @property
    def length(self) -> float:
        return float((self.weights @ self.G @ self.weights).clamp(min=0).sqrt())

    def serves_again(self) -> bool:
        """No gradient is zero, not finite, or blown up by its weight unless it was as small the time before.

        They do not cancel, either.
        """
        norms, largest = self.norms.tolist(), float(self.norms.max())
        for norm, before, weight in zip(norms, self.before.tolist(), self.weights.tolist(), strict=True):
            if not 0 < norm < float("inf"):
                return False
            steady = norm <= 4 * before and before <= 4 * norm
            if not steady and abs(weight) * largest > 10 * self.length:
                return False
        return not self.length <= 1e-6 * largest


@dataclass
class Totals:
    """What micro-batches have added up to."""

    last: Last | None
    rows: dict[str, dict[int, Gradient]] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    scales: list[float] = field(default_factory=list)  # of joined losses
    calls: int = 0
    as_is: bool = True  # whether nothing was rounded after autograd
    orphaned: bool = False  # whether another rule was set on the way

    @property
    def scale(self) -> tuple[float, float]:
        """What the losses were multiplied by, if that is known: in sum, and at most."""
        sizes = [abs(scale) for scale in self.scales] or [1.0]
        return sum(sizes), max(sizes)


@dataclass
class Call:
    """The gradients and values of one call."""

    rows: dict[str, dict[int, Gradient]] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


@dataclass
class Memory:
    names: tuple[str, ...] = ()
    state: dict[str, Tensor] = field(default_factory=dict)
    last: Last | None = None


class Model:
    """One steering, in dense float64 vectors."""

    def __init__(self, steered: Steered, groups: list[list[int]], frozen: set[int]) -> None:
        self.rule, self.rule_name = RULES[steered.rule], steered.rule
        self.scope, self.refresh_every, self.groups = steered.scope, steered.refresh_every, groups
        self.frozen = frozen  # of all parameters
        self.memory = Memory()
        self.names: tuple[str, ...] = ()
        self.totals: Totals | None = None

    @property
    def parameters(self) -> list[int]:
        return [i for group in self.groups for i in group]

    @property
    def key(self) -> object:
        """What weights are made of."""
        return self.rule_name, [i in self.frozen for i in self.parameters]

    def scopes(self) -> list[tuple[str, list[int]]]:
        if self.scope == "model":
            return [("", self.parameters)]
        if self.scope == "group":
            return [(f"group {i}", group) for i, group in enumerate(self.groups) if group]
        return [(f"group {i} tensor {j}", [p]) for i, group in enumerate(self.groups) for j, p in enumerate(group)]

    def named(self, names: Sequence[str], *, accumulate: bool) -> tuple[str, ...]:
        """The names of the step if these take part; ValueError if they cannot."""
        unknown = [name for name in names if name not in self.names]
        if self.memory.names and unknown:
            raise ValueError(f"{unknown} are unknown")
        found = (*self.names, *unknown) if self.memory.names or self.totals else tuple(names)
        if not accumulate:
            self.rule.check(found)
        return found

    def serving(self) -> Last | None:
        """The exact step whose weights this step uses."""
        if self.totals is not None:
            return self.totals.last
        last = self.memory.last
        fresh = last is None or last.age + 1 >= self.refresh_every or last.key != self.key
        return None if fresh or not (last.age or last.serves_again()) else last

    def add(self, call: Call, names: tuple[str, ...], scale: float, *, joined: bool) -> None:
        if self.totals is None:
            self.totals = Totals(self.serving())
        self.names, totals = names, self.totals
        totals.scales += [scale] * joined
        totals.calls += 1
        totals.as_is &= totals.calls == 1 and scale == 1
        for name, row in call.rows.items():
            mine = totals.rows.setdefault(name, {})
            for p, g in row.items():
                if p in self.parameters:
                    mine[p] = Gradient(scale * g.value, abs(scale) * g.size, g.sparse) + mine.get(p)
        for name, value in call.losses.items():
            before, size = totals.losses.get(name, (0.0, 0.0))
            totals.losses[name] = before + value, size + abs(value)

    def matrix(self, scope: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The component gradients ``(k, n)`` over some parameters, and how large what they are sums of is ``(k,)``."""
        rows = [self.totals.rows.get(name, {}) for name in self.names]
        like = {p: row[p].value for row in rows for p in row}
        columns = [
            torch.stack([row[p].value if p in row else torch.zeros_like(like[p]) for row in rows])
            for p in scope
            if p in like
        ]
        J = torch.cat([torch.zeros(len(rows), 0, dtype=torch.float64), *columns], 1)
        sizes = [torch.tensor([row[p].size for p in row if p in scope], dtype=torch.float64).norm() for row in rows]
        return J, torch.stack(sizes)


def carry_over(state: dict[str, Tensor], fresh: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with new rows for scopes that came since."""
    return {key: torch.cat([state[key], new[len(state[key]) :]]) for key, new in fresh.items()} if state else fresh


# Tolerances

EPSILON = {torch.complex128: 2.0**-52, torch.complex64: 2.0**-23, **{d: torch.finfo(d).eps for d in DTYPES}}


def rounding(dtype: torch.dtype, calls: int) -> float:
    """How far what is added up in a dtype may be off, relative to the norms of its parts."""
    if dtype in HALF:
        # One rounding for each micro-batch, and for its scale; combined and added to .grad in float32 or at once.
        return EPSILON[dtype] * (3 + calls)
    # Dozens of roundings of the backward pass; the Gramian of float32 is good to 4e-6.
    return 1e-12 if EPSILON[dtype] < 1e-15 else 64 * EPSILON[dtype]


def assert_near(found: Tensor, expected: Tensor, allowed: float, most: float = torch.inf) -> None:
    """Equal where finite, and not finite in the same places, but for what may have overflowed near ``most``."""
    finite = expected.isfinite() & (expected.abs() < 0.9 * most)
    assert (found.isfinite() == expected.isfinite())[expected.isnan() | expected.isinf() | finite].all(), (
        found,
        expected,
    )
    error = float((found - expected)[finite].norm())
    assert not error > allowed, f"off by {error:.1e}, allowed {allowed:.1e}: {found.tolist()}, {expected.tolist()}"


# Running a program


@dataclass
class Before:
    """A ``.grad`` before an operation."""

    tensor: Tensor | None
    copy: Tensor | None
    dense: Tensor | None

    @staticmethod
    def of(p: Tensor) -> Before:
        g = p.grad
        return Before(g, None if g is None else g.detach().clone(), None if g is None else dense(g))


@dataclass
class Copied:
    """What a copy was made of, which nothing may change any more."""

    tensors: list[Tensor]
    gradients: list[Before]
    pairs: list[tuple[Any, Any]]
    memories: list[str]
    pending: list[bool]


class Run:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.tensors = [p.make() for p in program.parameters]
        self.frozen = {i for i, p in enumerate(self.tensors) if not p.requires_grad}
        self.owners = [p.owner for p in program.parameters]
        self.models: list[Model] = []
        for who, steered in enumerate(program.steered):
            mine = [i for i, owner in enumerate(self.owners) if owner == who]
            groups = [[i for i in mine if program.parameters[i].group == g] for g in (0, 1)]
            groups = [[]] * steered.empty_group + [group for group in groups if group]
            self.models.append(Model(steered, groups, self.frozen))
        self.pairs = [self.build(who) for who in range(len(self.models))]
        self.saved: dict[int, tuple[bytes, Memory, str]] = {}
        self.copied: list[Copied] = []

    def build(self, who: int) -> tuple[Any, Any]:
        """What steers, and what steps."""
        model, form = self.models[who], self.program.steered[who].form
        groups = [{"params": [self.tensors[i] for i in group]} for group in model.groups]
        sgd = torch.optim.SGD(groups, lr=1e-3)
        options = {"scope": model.scope, "refresh_every": model.refresh_every}
        if form == "optimizer":
            optimizer = SteeredOptimizer(sgd, model.rule, **options)
            return optimizer, optimizer
        return Steering(sgd, model.rule, **options), sgd

    def run(self) -> None:
        actions: dict[type, Callable[[Any], None]] = {
            Step: self.step,
            Auxiliary: self.auxiliary,
            Zero: self.zero,
            Halve: self.halve,
            Move: self.move,
            Refresh: self.refresh,
            Rule: self.set_rule,
            Save: self.save,
            Load: self.load,
            Copy: self.copy,
            Freeze: self.freeze,
            AddGroup: self.add_group,
        }
        for operation in self.program.operations:
            actions[type(operation)](operation)
            self.check_rest()
        for who in range(len(self.models)):
            self.check_memory(who)
        for copied in self.copied:
            assert_untouched(copied.tensors, copied.gradients)
            assert [memory_of(*pair) for pair in copied.pairs] == copied.memories
            assert [is_pending(steering) for steering, _ in copied.pairs] == copied.pending

    def check_rest(self) -> None:
        """After every operation."""
        for (steering, _), model in zip(self.pairs, self.models, strict=True):
            assert is_pending(steering) == (model.totals is not None)
        for p in self.tensors:
            assert not p._backward_hooks
            assert not getattr(p, "_post_accumulate_grad_hooks", None)

    def check_memory(self, who: int) -> None:
        """The memory in the state dict is that of the model."""
        record, model = json.loads(memory_of(*self.pairs[who])), self.models[who]
        memory = model.memory
        found = {
            key: torch.tensor(value, dtype=getattr(torch, dtype.removeprefix("torch.")))
            for key, (dtype, value) in record["state"].items()
        }
        assert found.keys() == memory.state.keys()
        assert all(torch.equal(found[key].view(memory.state[key].shape), memory.state[key]) for key in found)
        assert tuple(record["names"]) == memory.names
        assert ("last" in record) == (model.refresh_every > 1 and memory.last is not None and memory.last.finite)

    @contextmanager
    def untouched(self, indices: Sequence[int]) -> Iterator[None]:
        tensors = [self.tensors[i] for i in indices]
        before = [Before.of(p) for p in tensors]
        yield
        assert_untouched(tensors, before)

    def owned(self) -> list[int]:
        return [i for i, owner in enumerate(self.owners) if owner != OUTSIDE]

    # Operations

    def auxiliary(self, operation: Auxiliary) -> None:
        self.auxiliary_loss(operation.seed).backward()

    def auxiliary_loss(self, seed: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        random = torch.Generator().manual_seed(seed)
        for p in self.tensors:
            if p.requires_grad:
                x = torch.randn(p.shape, generator=random, dtype=wide(p))
                q = p.to(wide(p))
                total = total + (x * q * q.conj()).real.sum() if p.is_complex() else total + (x * q * q).sum()
        return total

    def zero(self, operation: Zero) -> None:
        model = self.models[operation.who]
        others = [i for i in range(len(self.tensors)) if i not in model.parameters]
        had = [self.tensors[i].grad is not None for i in model.parameters]
        with self.untouched(others):
            self.pairs[operation.who][0].zero_grad(operation.set_to_none)
        model.totals = None
        for i, was in zip(model.parameters, had, strict=True):
            g = self.tensors[i].grad
            assert (g is None) == (operation.set_to_none or not was)
            assert g is None or not dense(g).any()

    def halve(self, operation: Halve) -> None:
        model = self.models[operation.who]
        others = [i for i in range(len(self.tensors)) if i not in model.parameters]
        before = [Before.of(self.tensors[i]) for i in model.parameters]
        with self.untouched(others):
            for i in model.parameters:
                if self.tensors[i].grad is not None:
                    self.tensors[i].grad.mul_(0.5)
        for i, b in zip(model.parameters, before, strict=True):
            if b.dense is not None:
                subnormal = torch.finfo(self.tensors[i].dtype).smallest_normal
                assert_near(dense(self.tensors[i].grad), 0.5 * b.dense, subnormal)

    def move(self, operation: Move) -> None:
        steering, optimizer = self.pairs[operation.who]
        model = self.models[operation.who]
        before = [p.detach().clone() for p in self.tensors]
        if model.totals is not None:
            if optimizer is steering:
                with pytest.raises(RuntimeError, match="accumulated and never steered"):
                    optimizer.step()
            assert all(torch.equal(p, b) for p, b in zip(self.tensors, before, strict=True))
            return
        gradients = [dense(self.tensors[i].grad) for i in model.parameters if self.tensors[i].grad is not None]
        if all(g.norm() < 1e2 for g in gradients):  # as a scaler would, and so that nothing grows without bound
            with self.untouched(range(len(self.tensors))):
                optimizer.step()

    def refresh(self, operation: Refresh) -> None:
        model, (steering, _) = self.models[operation.who], self.pairs[operation.who]
        if model.scope == "model":
            steering.refresh_every = model.refresh_every = operation.every
        elif operation.every > 1:
            with pytest.raises(ValueError, match="needs scope='model'"):
                steering.refresh_every = operation.every

    def set_rule(self, operation: Rule) -> None:
        model, (steering, _) = self.models[operation.who], self.pairs[operation.who]
        if operation.name is None:
            steering.rule = steering.rule
            return
        model.rule_name = operation.name or model.rule_name
        model.rule = RULES[model.rule_name]
        steering.rule = copy.deepcopy(model.rule)
        model.memory = replace(model.memory, state={}, last=None)
        if model.totals is not None:
            model.totals.orphaned = True

    def save(self, operation: Save) -> None:
        steering, optimizer = self.pairs[operation.who]
        model = self.models[operation.who]
        with self.untouched(range(len(self.tensors))):
            file = io.BytesIO()
            both = {
                "steering": None if steering is optimizer else steering.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(both, file)
        self.check_memory(operation.who)
        last = model.memory.last if model.refresh_every > 1 else None
        last = last if last is not None and last.finite else None  # no other would serve
        self.saved[operation.who] = file.getvalue(), replace(model.memory, last=last), type(model.rule).__name__

    def load(self, operation: Load) -> None:
        who, model = operation.who, self.models[operation.who]
        if who not in self.saved:
            self.save(Save(who))
        data, memory, rule = self.saved[who]
        both = torch.load(io.BytesIO(data), weights_only=True)
        if operation.rule is not None:
            self.set_rule(Rule(who, operation.rule))
        steering, optimizer = self.build(who) if operation.fresh else self.pairs[who]
        before = memory_of(steering, optimizer)
        other = rule != type(model.rule).__name__
        with self.untouched(range(len(self.tensors))):
            if other and memory.state:
                with pytest.raises(ValueError, match="holds the memory of"):
                    load_both(steering, optimizer, both)
                assert memory_of(steering, optimizer) == before
                return
            load_both(steering, optimizer, both)
        self.pairs[who] = steering, optimizer
        model.memory = Memory() if other else memory
        model.names, model.totals = model.memory.names, None
        assert steering.geometry is None

    def copy(self, _: Copy) -> None:
        gradients = [Before.of(p) for p in self.tensors]
        memories = [memory_of(*pair) for pair in self.pairs]
        pending = [is_pending(steering) for steering, _ in self.pairs]
        self.copied.append(Copied(self.tensors, gradients, self.pairs, memories, pending))
        self.tensors, self.pairs = copy.deepcopy((self.tensors, self.pairs))
        for p, before in zip(self.tensors, gradients, strict=True):
            p.grad = None if before.copy is None else before.copy.clone()  # torch copies it with a plain tensor only
        assert [memory_of(*pair) for pair in self.pairs] == memories

    def freeze(self, operation: Freeze) -> None:
        if operation.which >= len(self.models):  # the first of each steering trains always
            self.tensors[operation.which].requires_grad_(not operation.frozen)
            (self.frozen.add if operation.frozen else self.frozen.discard)(operation.which)

    def add_group(self, operation: AddGroup) -> None:
        if self.owners[operation.which] != OUTSIDE:
            return
        self.pairs[operation.who][1].add_param_group({"params": [self.tensors[operation.which]]})
        self.models[operation.who].groups.append([operation.which])
        self.owners[operation.which] = operation.who
        self.saved.pop(operation.who, None)  # torch refuses to load a state of fewer groups

    # A step

    def step(self, operation: Step) -> None:
        StepRun(self, operation).run()


def assert_untouched(tensors: Sequence[Tensor], gradients: Sequence[Before]) -> None:
    for p, before in zip(tensors, gradients, strict=True):
        assert p.grad is before.tensor
        if before.tensor is not None:
            found, expected = dense(p.grad), dense(before.copy)
            assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def memory_of(steering: Any, optimizer: Any) -> str:
    state = steering.state_dict()
    return state["param_groups"][0]["steer_optim"] if steering is optimizer else state["steer_optim"]


def load_both(steering: Any, optimizer: Any, both: dict[str, Any]) -> None:
    if both["steering"] is not None:
        steering.load_state_dict(both["steering"])
    optimizer.load_state_dict(both["optimizer"])


def is_pending(steering: Any) -> bool:
    steering = steering.steering if isinstance(steering, SteeredOptimizer) else steering
    try:
        steering.refuse_pending()
    except RuntimeError:
        return True
    return False


class StepRun:
    """One `Step` of a program: what is passed, what is expected, and whether it came true."""

    def __init__(self, run: Run, operation: Step) -> None:
        self.outer, self.op, self.program = run, operation, run.program
        self.model, (self.steering, _) = run.models[operation.who], run.pairs[operation.who]
        self.tensors = run.tensors
        k = len(self.program.names)
        present = list(operation.present or ("loss",) * k)
        if not self.model.memory.names and self.model.totals is None and operation.seed % 8:
            # Mostly the first step has a name for all, since it is what the later ones are held to.
            present = ["None" if state == "left out" else state for state in present]
        self.present = present
        self.joined = operation.way.startswith("join")
        self.late = {
            "callables": (True,) * k,
            "join callables": (True,) * k,
            "mixed": operation.late or (False,) * k,
        }.get(operation.way, (False,) * k)
        self.given = [i for i in range(k) if present[i] != "left out"]
        self.there = [i for i in range(k) if present[i] == "loss"]
        self.scale = operation.scale if self.joined else 1.0
        if operation.accumulate or self.model.totals is not None:
            self.scale = abs(self.scale) or 1.0  # micro-batches that cancel are no larger batch
        self.shared = operation.shared and not self.joined and any(self.late[i] for i in self.there)
        self.failure = self.applicable(operation.failure)
        self.call = Call()  # what the tensors among the losses contribute
        self.late_call = Call()  # and the callables
        self.turns: list[int] = []

    def applicable(self, failure: Failure | None) -> Failure | None:
        """The failure, at a component that is there; None where it cannot happen."""
        if failure is None or not self.there:
            return None
        at = self.there[failure.at % len(self.there)]
        exact = self.model.serving() is None
        reached = self.model.totals is not None and self.program.names[at] in self.model.totals.rows
        possible = {
            "callable": self.late[at],
            "nothing": self.late[at],
            "unknown": bool(self.model.memory.names),
            "unreached": exact and not reached,
            "rule": exact and not self.op.accumulate,
        }
        return replace(failure, at=at) if possible.get(failure.kind, True) else None

    # What is passed

    def forward(self) -> Forward:
        tensors = list(self.tensors)
        if self.failure is not None and self.failure.kind == "backward":
            used = sorted(self.program.uses[self.base(self.failure.at)])
            members = [i for u in used for i in self.program.units[u].members if tensors[i].requires_grad]
            broken = members[self.op.seed % len(members)]
            tensors[broken] = Break.apply(tensors[broken], self.failure.error)
        return Forward(self.program, tensors, self.op.seed)

    def base(self, i: int) -> int:
        """The component that this one is a multiple of."""
        relation = self.program.relations[i]
        return i if relation is None else self.base(relation[0])

    def losses(self) -> dict[str, Any]:
        forward, result = self.forward(), {}
        for i in self.given:
            if self.present[i] == "None":
                result[self.program.names[i]] = None
            elif self.late[i]:
                result[self.program.names[i]] = lambda i=i: self.evaluate(i, forward if self.shared else self.forward())
            else:
                result[self.program.names[i]] = self.loss(i, forward, self.call)
        if self.failure is not None and self.failure.kind == "unknown":
            result["other"] = self.tensors[0].real.sum()
        return result

    def evaluate(self, i: int, forward: Forward) -> Tensor | None:
        self.turns.append(i)
        assert torch.is_grad_enabled()
        if self.failure is not None and self.failure.at == i:
            if self.failure.kind == "callable":
                raise self.failure.error("in a callable")
            if self.failure.kind == "nothing":
                return None
        return self.loss(i, forward, self.late_call)

    def loss(self, i: int, forward: Forward, call: Call) -> Tensor:
        factors = self.op.factors or (1.0,) * len(self.program.names)
        loss = forward.loss(i, factors[i])
        kind = self.failure.kind if self.failure is not None and self.failure.at == i else None
        if kind == "detached":
            return loss.detach()
        if kind == "vector":
            return loss.reshape(1).expand(2)
        if kind == "unreached":
            return torch.ones(2, requires_grad=True).sum()
        if self.failure is None:
            call.rows[self.program.names[i]] = self.gradients(loss)
            call.losses[self.program.names[i]] = float(loss.detach())
        return loss

    def gradients(self, loss: Tensor) -> dict[int, Gradient]:
        trainable = [i for i, p in enumerate(self.tensors) if p.requires_grad]
        taken = torch.autograd.grad(loss, [self.tensors[i] for i in trainable], retain_graph=True, allow_unused=True)
        found = {}
        for i, g in zip(trainable, taken, strict=True):
            if g is not None:
                value = dense(g)
                found[i] = Gradient(value, float(value.norm()), g.is_sparse)
        return found

    # What happens

    def run(self) -> None:
        losses = self.losses()
        begin = self.begin_join(losses) if self.joined else self.begin(losses)
        if begin is None:
            return
        if self.failure is not None:
            self.fail(begin)
            return
        again = self.op.again == "retained"
        self.execute(begin, retain=again or self.shared)
        if again:
            self.execute(begin, retain=self.shared)
        elif self.op.again == "freed" and not self.shared and any(self.joined or not self.late[i] for i in self.there):
            self.refuse_freed(begin)

    def names(self) -> list[str]:
        return [self.program.names[i] for i in self.given]

    def refusal(self) -> bool:
        """Whether the names are refused, or what can be known of the losses before anything runs."""
        if not self.given:
            return True
        try:
            self.model.named(self.names(), accumulate=self.op.accumulate)
        except ValueError:
            return True
        if self.failure is None:
            return False
        bad = self.failure.kind in ("detached", "vector") and (self.joined or not self.late[self.failure.at])
        return bad or self.failure.kind == "unknown"

    def begin(self, losses: dict[str, Any]) -> Callable[[bool], Any] | None:
        def backward(retain: bool) -> Any:
            return self.steering.backward_components(losses, accumulate=self.op.accumulate, retain_graph=retain)

        if self.refusal():
            with self.nothing_changes(), pytest.raises((ValueError, TypeError)):
                backward(False)
            return None
        return backward

    def begin_join(self, losses: dict[str, Any]) -> Callable[[bool], Any] | None:
        def join() -> Tensor:
            return self.steering.join(losses, accumulate=self.op.accumulate)

        raised: Any = (ValueError, TypeError) if self.refusal() else None
        if self.failure is not None and self.failure.kind in ("callable", "nothing"):
            raised = raised or (self.failure.error if self.failure.kind == "callable" else TypeError)
        with self.nothing_changes():
            if raised is not None:
                with pytest.raises(raised):
                    join()
                return None
            total = join()
        assert self.turns == [i for i in self.there if self.late[i]]
        if self.failure is None:
            assert total.shape == ()
            values = [*self.call.losses.values(), *self.late_call.losses.values()]
            dtypes = [self.program.losses[i][0] for i in self.there] or [torch.float32]
            size, dtype = sum(map(abs, values)), reduce(torch.promote_types, dtypes)
            assert total.dtype == dtype
            expected = torch.tensor(sum(values), dtype=torch.float64)
            assert_near(total.detach().double(), expected, 8 * EPSILON[dtype] * size, torch.finfo(dtype).max)
        if self.op.clear:
            self.steering.zero_grad()
            self.model.totals = None
        added = self.op.added and not (self.op.again or self.op.clear or self.failure)
        other = self.outer.auxiliary_loss(self.op.seed) if added else None
        self.other = {} if other is None else self.gradients(other)

        def backward(retain: bool) -> Any:
            scaled = total if self.scale == 1 else self.scale * total
            (scaled if other is None else scaled + other).backward(retain_graph=retain)
            return None if self.op.accumulate else self.steering.geometry

        if self.op.clear and self.refusal():  # by names that were known from what was pending
            with self.nothing_changes(), pytest.raises(ValueError):
                backward(False)
            return None
        return backward

    @contextmanager
    def nothing_changes(self) -> Iterator[None]:
        memory, geometry = memory_of(*self.outer.pairs[self.op.who]), self.steering.geometry
        with self.outer.untouched(range(len(self.tensors))):
            yield
        assert memory_of(*self.outer.pairs[self.op.who]) == memory
        assert self.steering.geometry is geometry

    def fail(self, begin: Callable[[bool], Any]) -> None:
        errors: dict[str, Any] = {
            "detached": ValueError,
            "vector": ValueError,
            "nothing": TypeError,
            "unreached": ValueError,
        }
        error = errors.get(self.failure.kind, self.failure.error)
        broken: Any = nullcontext()
        if self.failure.kind == "rule":
            broken = mock.patch.object(type(self.model.rule), "update", side_effect=error("in the rule"))
        self.interrupted(begin, error, broken)

    def interrupted(self, begin: Callable[[bool], Any], error: Any, broken: Any) -> None:
        """An error after a backward pass had begun."""
        memory, geometry = memory_of(*self.outer.pairs[self.op.who]), self.steering.geometry
        with self.outer.untouched(self.outer.owned()), broken, pytest.raises(error):
            begin(self.shared)
        assert memory_of(*self.outer.pairs[self.op.who]) == memory
        assert self.steering.geometry is geometry
        self.model.totals = None

    def refuse_freed(self, begin: Callable[[bool], Any]) -> None:
        if self.joined:
            with self.nothing_changes(), pytest.raises(RuntimeError, match="second time"):
                begin(False)
        else:
            self.interrupted(begin, RuntimeError, nullcontext())

    def execute(self, begin: Callable[[bool], Any], *, retain: bool) -> None:
        model, tensors = self.model, self.tensors
        names = model.named(self.names(), accumulate=self.op.accumulate)
        before = [Before.of(p) for p in tensors]
        geometry = self.steering.geometry
        if not self.joined:
            self.turns.clear()
            self.other = {}
        result = begin(retain)
        order = sorted(self.there, key=lambda i: names.index(self.program.names[i]))
        assert self.joined or self.turns == [i for i in order if self.late[i]]
        call = Call(self.call.rows | self.late_call.rows, self.call.losses | self.late_call.losses)
        model.add(call, names, self.scale, joined=self.joined)
        totals = model.totals
        weights = (
            dict.fromkeys(names, 1.0)
            if totals.last is None
            else dict(zip(names, totals.last.weights.tolist(), strict=True))
        )
        if self.op.accumulate:
            assert result is None
            assert self.steering.geometry is geometry
            update: dict[int, list[Gradient]] = {}
        else:
            assert result is self.steering.geometry
            update = Check(self.program, model, result).finish()
            model.totals = None
        for i, p in enumerate(tensors):
            parts = list(update.get(i, []))
            if self.outer.owners[i] == OUTSIDE:
                parts = [scaled(row[i], self.scale * weights[name]) for name, row in call.rows.items() if i in row]
            if i in self.other:
                parts.append(self.other[i])
            if not parts:
                assert_untouched([p], [before[i]])
            else:
                self.check_gradient(p, before[i], parts, totals.calls)

    def check_gradient(self, p: Tensor, before: Before, parts: list[Gradient], calls: int) -> None:
        g = p.grad
        assert g is not None
        assert (g.dtype, g.shape, g.device) == (p.dtype, p.shape, p.device)
        assert not g.requires_grad
        if not g.is_sparse and before.tensor is None:
            expected = torch.empty_like(p).stride()  # the parameter's, if it has no gaps: as from autograd
            assert all(n <= 1 or a == b for n, a, b in zip(p.shape, g.stride(), expected, strict=True)) or not g.numel()
        assert g.is_sparse == (
            all(part.sparse for part in parts) and (before.tensor is None or before.tensor.is_sparse)
        )
        total, size = sum(part.value for part in parts), sum(part.size for part in parts)
        if before.dense is not None:
            total, size = total + before.dense, size + float(before.dense.norm())
        dtypes = {p.dtype, *(dtype for dtype, _ in self.program.losses)}
        allowed = max(rounding(dtype, calls) for dtype in dtypes) * size
        info = torch.finfo(p.dtype)
        # The smallest numbers are that far apart, whatever is added up.
        allowed += (
            16 * info.smallest_normal * info.eps * (1 + sum(part.weight for part in parts)) * max(1, p.numel()) ** 0.5
        )
        assert_near(dense(g), total, allowed, info.max)


def scaled(g: Gradient, weight: float) -> Gradient:
    return Gradient(weight * g.value, abs(weight) * g.size, g.sparse, abs(weight) * g.weight)


class Check:
    """The geometry of a step, and the update that follows from it."""

    def __init__(self, program: Program, model: Model, geometry: Any) -> None:
        self.program, self.model, self.geometry, self.totals = program, model, geometry, model.totals
        self.scopes = model.scopes()
        self.dtypes = {program.parameters[p].dtype for p in model.parameters} | {d for d, _ in program.losses}

    def finish(self) -> dict[int, list[Gradient]]:
        """Checks, and goes on to the next step; the parts of the update by parameter."""
        model, names, geometry = self.model, self.model.names, self.geometry
        assert geometry.names == names
        assert geometry.scopes == (() if model.scope == "model" else tuple(name for name, _ in self.scopes))
        self.check_losses()
        if self.totals.last is None:
            weights, memory = self.exact()
        else:
            weights, memory = self.between()
        if self.totals.orphaned and self.totals.last is not None:
            memory = replace(memory, last=replace(memory.last, key="another"))
        model.memory = memory
        update: dict[int, list[Gradient]] = {}
        _, sizes = model.matrix(model.parameters)
        for (_, scope), own in zip(self.scopes, weights, strict=True):
            for name, weight, size in zip(names, own.tolist(), sizes.tolist(), strict=True):
                for p, g in self.totals.rows.get(name, {}).items():
                    if p in scope:
                        # What cancels within one gradient leaves the rounding errors of the others.
                        rest = 0.0 if self.program.parameters[p].dtype in HALF else size
                        update.setdefault(p, []).append(scaled(replace(g, size=g.size + rest), weight))
        return update

    def check_losses(self) -> None:
        dtypes = dict(zip(self.program.names, (dtype for dtype, _ in self.program.losses), strict=True))
        for name, found in zip(self.model.names, self.geometry.losses.tolist(), strict=True):
            value, size = self.totals.losses.get(name, (torch.nan, 0.0))
            expected = torch.tensor(value, dtype=torch.float64)
            allowed = self.totals.calls * EPSILON[dtypes[name]] * size
            assert_near(torch.tensor(found, dtype=torch.float64), expected, allowed, torch.finfo(dtypes[name]).max)

    def exact(self) -> tuple[Tensor, Memory]:
        model, names, old = self.model, self.model.names, self.model.memory
        one = model.scope == "model"
        G, weights = (t[None] if one else t for t in (self.geometry.G, self.geometry.weights))
        assert G.dtype == weights.dtype == torch.float64
        assert self.geometry.age == 0
        matrices = [model.matrix(scope) for _, scope in self.scopes]
        exact_G = torch.stack([J @ J.T for J, _ in matrices])
        sizes = torch.stack([sizes for _, sizes in matrices])
        if not self.totals.as_is:
            sizes = sizes + model.matrix(model.parameters)[1]  # what cancels within a gradient leaves its roundings
        assert G.shape == exact_G.shape
        if exact_G.isfinite().all():
            self.check_gramian(G, exact_G, sizes)
        else:
            assert not G.isfinite().all()
        state = carry_over(old.state, model.rule.init(G, names))
        expected, new = model.rule(G, names, state)
        assert torch.equal(weights, expected)
        if not old.state and not G.isfinite().all():
            new = {}  # it begins with the first finite Gramian
        if self.program.precise and exact_G.isfinite().all():
            self.check_update(weights, exact_G, [J for J, _ in matrices], sizes, state)
        last = None
        if one:
            before = torch.zeros(len(names), dtype=torch.float64) if old.last is None else old.last.norms
            before = torch.where(before.isfinite(), before, 0.0)
            last = Last(model.key, G[0], weights[0], before, self.totals.scale)
        return weights, Memory(names, new, last)

    def check_gramian(self, G: Tensor, exact: Tensor, sizes: Tensor) -> None:
        # Products of float32 gradients are good to 4e-6, those of float64 ones to dozens of roundings.
        rounded = max(rounding(dtype, self.totals.calls) for dtype in self.dtypes)
        tolerance = 1e-13 if self.program.precise else 4e-6 if self.totals.as_is else 2 * rounded
        error = (G - exact).abs()
        assert (error <= tolerance * sizes[:, :, None] * sizes[:, None, :]).all(), (G, exact)

    def check_update(self, weights: Tensor, G: Tensor, Js: Sequence[Tensor], sizes: Tensor, state: Any) -> None:
        """The dense Gramian gives the same update, where the rule answers alike to Gramians a rounding away.

        The weights may differ: of two components with one gradient, either may be taken.
        """
        names = self.model.names
        dense_weights, _ = self.model.rule(G, names, state)

        def error(others: Tensor) -> Tensor:
            """How far their update is from the dense one, relative to its parts."""
            parts = [w @ J for w, J in zip(others - dense_weights, Js, strict=True)]
            return torch.cat(parts).norm() / (dense_weights.abs() * sizes).sum()

        random = torch.Generator().manual_seed(0)
        noise = 1e-13 * torch.randn(G.shape, generator=random, dtype=torch.float64)
        for nudge in (noise + noise.mT, -noise - noise.mT):  # on both sides of where an answer may be cut off
            if error(self.model.rule(G + nudge * sizes[:, :, None] * sizes[:, None, :], names, state)[0]) > 1e-11:
                return
        assert not error(weights) > 1e-10, (weights, dense_weights)

    def between(self) -> tuple[Tensor, Memory]:
        """One pass of the weighted sum, bounded by the last exact update."""
        model, last = self.model, self.totals.last
        ((_, scope),) = self.scopes
        J, sizes = model.matrix(scope)
        update = last.weights @ J
        length, most = float(update.norm()), BOUND * last.length
        most *= max(now / before for now, before in zip(self.totals.scale, last.scale, strict=True))
        factor = most / length if most < length < float("inf") else 1.0
        assert self.geometry.age == last.age + 1
        assert torch.equal(self.geometry.G, last.G)
        rounded = max(rounding(dtype, self.totals.calls) for dtype in self.dtypes)
        # The length may have cancelled to less than its parts.
        parts = float((last.weights.abs() * sizes).sum())
        tolerance = rounded * (1 + parts / length) if length > 0.5 * most else rounded
        found = self.geometry.weights
        error = float((found - factor * last.weights).norm())
        if max(length, most) <= 8 * rounded * parts:  # an update that cancels: which rounding is longer nobody knows
            error = 0.0
        assert not error > tolerance * float(last.weights.norm()), (found, factor, last.weights)
        return found[None], Memory(model.names, model.memory.state, replace(last, age=last.age + 1))
