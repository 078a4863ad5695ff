"""A training process is killed at any moment, and resumes from a whole checkpoint as if nothing had happened."""

import itertools
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from torch import nn

from steer_optim import PCD, GradVac, PCGrad, SteeredOptimizer, checkpoint

RULES = {"PCGrad": PCGrad(seed=3), "GradVac": GradVac(beta=0.3), "PCD": PCD("vis", tau=0.5, beta=0.9)}
KILLS = 20  # of each
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def make(rule):
    torch.manual_seed(0)
    # Large enough, with 0.6 MB of state, that writing it takes a while.
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Dropout(0.2), nn.Linear(256, 64))
    return model, SteeredOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True), rule)


def train(path, rule, steps, clock):
    """Trains up to a number of steps, saved each. The clock is 0 at first, odd in a step, even in a save."""
    torch.set_num_threads(1)
    data = torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    model, optimizer = make(rule)
    order = torch.Generator().manual_seed(2)
    losses = []
    if path.exists():
        extra = checkpoint.load(path, optimizer)
        model.load_state_dict(extra["model"])
        order.set_state(extra["order"])
        torch.set_rng_state(extra["rng"])
        losses = extra["losses"]
    while len(losses) < steps:
        clock.value += 1
        x = data[torch.randperm(len(data), generator=order)[:8]]
        out = model(x)
        optimizer.zero_grad()
        geometry = optimizer.backward_components(
            {"std": (out - x).square().mean(), "vis": (out + x.roll(1, 1)).abs().mean(), "lp": out[:, 0].exp().mean()}
        )
        optimizer.step()
        losses.append(geometry.losses.tolist())
        clock.value += 1
        extra = {
            "model": dict(model.state_dict()),
            "order": order.get_state(),
            "rng": torch.get_rng_state(),
            "losses": losses,
        }
        checkpoint.save(path, optimizer, extra=extra)


def start(fork, *args):
    process = fork.Process(target=train, args=args, daemon=True)
    process.start()
    return process


def steps_saved(path, rule):
    return len(checkpoint.load(path, make(rule)[1])["losses"])


def content(path):
    """All that a checkpoint holds, to the bit."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118
        return file.metadata()["structure"], tensors


def save_until_line(path, optimizer, line):
    """Kills itself before the n-th line that ``save`` runs."""
    lines = itertools.count()

    def trace(frame, event, _):
        if frame.f_code.co_filename != checkpoint.__file__ or frame.f_code.co_name not in ("save", "_flush"):
            return None
        if event == "line" and next(lines) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    checkpoint.save(path, optimizer, extra={"step": 1})


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_save_can_be_killed_before_each_of_its_lines(tmp_path):
    fork, optimizer, path = multiprocessing.get_context("fork"), make(PCGrad())[1], tmp_path / "x"
    steps = []
    for line in itertools.count():
        checkpoint.save(path, optimizer, extra={"step": 0})
        process = fork.Process(target=save_until_line, args=(path, optimizer, line))
        process.start()
        process.join(60)
        steps.append(checkpoint.load(path, optimizer)["step"])
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, "the save failed"
    # The old file up to a line, and the new one from there on.
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-2:] == [1, 1]


def kill_and_resume(folder):
    """Runs in a process of its own that never trains, so that it can be forked."""
    fork = multiprocessing.get_context("fork")
    clock = fork.Value("l", lock=False)
    dice = random.Random(0)
    hits = Counter()
    for name, rule in RULES.items():
        killed, uninterrupted, done = folder / f"{name}.killed", folder / f"{name}.uninterrupted", 0
        for _ in range(KILLS):
            clock.value = 0
            process = start(fork, killed, rule, done + 100, clock)  # it does not get that far
            wait_for(process, clock, dice.randrange(-4, 10))  # a third of the time at once, while it loads
            time.sleep(10 ** dice.uniform(-4, -2))  # a step or a save takes some milliseconds
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL, "training failed"
            hits["load" if clock.value == 0 else "step" if clock.value % 2 else "save"] += 1
            if killed.exists() or done:
                before, done = done, steps_saved(killed, rule)
                # All that was saved is there; what was being saved may be.
                assert max(0, (clock.value - 1) // 2) <= done - before <= clock.value // 2

        for path in (killed, uninterrupted):
            process = start(fork, path, rule, done + 5, clock)
            process.join()
            assert process.exitcode == 0, "training failed"
        assert content(killed) == content(uninterrupted)
    assert min(hits["load"], hits["step"], hits["save"]) >= 5, f"the kills did not hit everywhere: {hits}"


def wait_for(process, clock, moment):
    deadline = time.monotonic() + 60
    while clock.value < moment:
        assert process.is_alive(), "training failed"
        assert time.monotonic() < deadline, "training hangs"
        time.sleep(1e-4)


@pytest.mark.slow
@needs_fork
def test_sixty_kills_change_nothing(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=kill_and_resume, args=(tmp_path,))
    process.start()
    try:
        process.join(240)
        assert process.exitcode == 0, "see the traceback in stderr"
    finally:
        process.kill()
        process.join()
