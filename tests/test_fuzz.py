"""Random training programs, held against the dense float64 model of `fuzzing.py`, and interrupts at any line."""

import functools
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Program, Run, dense, is_pending, memory_of, programs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from properties import RULES
from torch import Tensor, nn

import steer_optim
from steer_optim import SteeredOptimizer, Steering, Sum
from steer_optim.steering import _ALIVE

# torch's own, of an empty parameter that is stored column by column.
pytestmark = [
    pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract"),
    pytest.mark.filterwarnings("ignore:accumulated micro-batches were never steered"),
]
THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
# An explanation would take minutes, and a program is short when it has been shrunk.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(per_hundred: int) -> Callable[..., Any]:
    """So many for every hundred that the profile wants, and 8 times as many where it is to be thorough."""
    count = settings.default.max_examples * per_hundred // 100 * (8 if THOROUGH else 1)
    return settings(max_examples=count, phases=PHASES, suppress_health_check=SLOW)


@pytest.mark.slow
@examples(300)
@given(programs(precise=True))
def test_programs_in_float64(program: Program):
    Run(program).run()


@pytest.mark.slow
@examples(200)
@given(programs(precise=False))
def test_programs_of_many_dtypes(program: Program):
    Run(program).run()


# An interrupt at any line

PACKAGE = str(Path(steer_optim.__file__).parent)
WAYS = ["tensors", "callables", "join"]
MOMENTS = {
    "first step": "PCGrad",
    "exact step": "GradVac",
    "last micro-batch": "Weighting",
    "micro-batch": "PCD",
    "second micro-batch": "GradVac",
    "between refreshes": "Steer",
    "last micro-batch between refreshes": "PCGrad",
}


class Scene:
    """The moment before a call, the same in every detail each time that it is made.

    There are gradients that share memory, sparse ones, half precision, a parameter outside and one of another steering.
    """

    def __init__(self, way: str, moment: str) -> None:
        _ALIVE.clear()  # those of earlier scenes would be asked for their parameters: further lines
        random = torch.Generator().manual_seed(0)
        make = lambda *shape: nn.Parameter(torch.randn(*shape, generator=random, dtype=torch.float64))  # noqa: E731
        self.way, self.accumulate = way, moment.endswith("micro-batch") and not moment.startswith("last")
        self.views, self.table, self.outside, self.others = (make(2, 2), make(4)), make(3, 2), make(2), make(2)
        self.half = nn.Parameter(make(3).detach().bfloat16())
        groups = [{"params": [*self.views]}, {"params": [self.table, self.half]}]
        every = 5 if "refreshes" in moment else 1
        scope = "model" if every > 1 or moment == "first step" else "tensor"
        sgd = torch.optim.SGD(groups, lr=0.1)
        self.optimizer = SteeredOptimizer(sgd, RULES[MOMENTS[moment]], scope=scope, refresh_every=every)
        self.other = Steering([self.others], Sum())
        self.parameters = [*self.views, self.table, self.half, self.others]
        if moment != "first step":
            self.optimizer.backward_components(self.losses(1))
            for p in self.parameters[1:]:
                p.grad = torch.ones_like(p)
        if moment.startswith(("last", "second")):
            self.optimizer.backward_components(self.losses(2), accumulate=True)

    def losses(self, seed: int) -> dict[str, Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        a, b = self.views
        rows = nn.functional.embedding(torch.tensor([0, 2]), self.table, sparse=True)
        std = ((a.view(4) + b) * x).sum() ** 2 + rows.sin().sum() + self.half.double().square().sum()
        vis = -0.5 * std + (rows * self.outside * self.others * x[:2]).sum()
        return {"std": std, "vis": vis, "lp": ((a.view(4) + b) * x).sum() + (self.outside * x[2:]).sum()}

    def call(self) -> None:
        losses: dict[str, Any] = self.losses(3)
        if self.way == "join":
            (2.0 * self.optimizer.join(losses, accumulate=self.accumulate)).backward()
            return
        if self.way == "callables":
            losses = {name: lambda name=name: self.losses(3)[name] for name in losses}
        self.optimizer.backward_components(losses, accumulate=self.accumulate)

    def state(self) -> tuple[Any, ...]:
        """All that a call may change."""
        gradients = [None if p.grad is None else dense(p.grad).tolist() for p in self.parameters]
        return gradients, memory_of(self.optimizer, self.optimizer), is_pending(self.optimizer)

    def next(self) -> tuple[Any, ...]:
        """The state after an ordinary step."""
        self.optimizer.backward_components(self.losses(4))
        return self.state()


class Interrupt(KeyboardInterrupt):
    pass


@dataclass(frozen=True)
class Line:
    module: str
    function: str
    number: int
    text: str


@contextmanager
def tracing(visit: Callable[[Line], None]) -> Iterator[None]:
    """Calls ``visit`` before every line of the package at which Python may be interrupted."""

    def trace(frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            text = linecache.getline(code.co_filename, frame.f_lineno).strip()
            if text != "try:":  # signals are handled after calls, at loops and in new frames: never here
                visit(Line(Path(code.co_filename).name, code.co_name, frame.f_lineno, text))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupted(call: Callable[[], None], n: int) -> Line | None:
    """Runs ``call`` up to the n-th line of the package; the line, or None if there are fewer."""
    lines: list[Line] = []

    def visit(line: Line) -> None:
        lines.append(line)
        if len(lines) == n + 1:
            raise Interrupt

    try:
        with tracing(visit):
            call()
    except Interrupt:
        return lines[-1]
    return None


@functools.cache
def states(way: str, moment: str) -> dict[str, tuple[Any, Any]]:
    """What may be found after an interrupt, and what an ordinary step then has to lead to."""
    found = {}
    for name in ("as before", "nothing pending", "complete"):
        scene = Scene(way, moment)
        if name == "complete":
            scene.call()
        elif name == "nothing pending":
            scene.optimizer.steering.drop_pending()
        found[name] = scene.state(), scene.next()
    return found


def trouble(way: str, moment: str, n: int) -> tuple[Line | None, str]:
    """The line of an interrupt, and what is wrong after it."""
    known, written = states(way, moment), length(way, moment).written  # by scenes of their own
    scene = Scene(way, moment)
    before = [p.grad for p in scene.parameters]
    line = interrupted(scene.call, n)
    if line is None:
        return None, ""
    for p in [*scene.parameters, scene.outside]:
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return line, "a hook is left"
    state = scene.state()
    possible = [name for name, (expected, _) in known.items() if state == expected]
    if n <= written:
        possible = [name for name in possible if name != "complete"]
        if not all(p.grad is g for p, g in zip(scene.parameters, before, strict=True)):
            return line, "other tensors in .grad"
    if not possible:
        return line, ".grad, the memory or what is pending is neither as before nor complete"
    following = scene.next()
    return line, "" if any(following == known[name][1] for name in possible) else f"after it is {possible}, and is not"


@dataclass(frozen=True)
class Length:
    lines: int
    written: int  # the last line that takes part in writing


@functools.cache
def length(way: str, moment: str) -> Length:
    """How many lines of the package a call runs."""
    lines: list[Line] = []
    scene = Scene(way, moment)
    with tracing(lines.append):
        scene.call()
    # Where a micro-batch is kept for the next one, this is done just before the function returns.
    last = ("_steer",) if scene.accumulate else ("write", "put_back")
    written = max(i for i, line in enumerate(lines) if line.function in last)
    return Length(len(lines), written - scene.accumulate)


@settings(phases=PHASES, suppress_health_check=SLOW)
@given(st.sampled_from(WAYS), st.sampled_from([*MOMENTS]), st.integers(0, 2**16))
def test_an_interrupt_at_any_line(way: str, moment: str, n: int):
    line, wrong = trouble(way, moment, n % length(way, moment).lines)
    assert line is not None
    assert not wrong, (line, wrong)


@pytest.mark.skipif(not THOROUGH, reason="takes minutes: HYPOTHESIS_PROFILE=thorough")
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_at_every_line(way: str, moment: str):
    found = {trouble(way, moment, n) for n in range(length(way, moment).lines)}
    assert not {(line, wrong) for line, wrong in found if wrong}
