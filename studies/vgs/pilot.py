"""The pilot: a network without sampling and without words that depend on words, too small for its language or not.

    python -m studies.vgs.pilot     some minutes; writes studies/vgs/pilot.json

Dimensions: B responses, T tokens of a response, V vocabulary (things first, then words), d of what is seen.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.common import table as as_table
from steer_optim import SteeredOptimizer
from studies.vgs.intervals import cell, interval, paired, points
from studies.vgs.methods import parse

RESULTS = Path(__file__).parent / "pilot.json"
METHODS = ("standard", "vgs", "vgs-frozen", "reweighting")
WIDTHS, SEEDS = (32, 128), range(8)
TOPICS, WORDS, THINGS, LEVEL = 40, 20, 6, -12.0  # the logit of what is never said
SEEN = torch.tensor([2, 5, 8, 11])  # places of what is seen; between them are words
LENGTH, SIZE = 12, 12  # tokens of a response; d
STEPS, RATE = 160, 0.01


class World:
    """Images and a teacher, which sees well and draws its words from a table for each topic and place."""

    def __init__(self, seed: int) -> None:
        generator = Generator().manual_seed(seed)
        self.things = torch.randn(len(SEEN), THINGS, SIZE, generator=generator)
        self.mix = torch.randn(SIZE, SIZE, generator=generator) / math.sqrt(SIZE)
        words = torch.randn(TOPICS, LENGTH, WORDS, generator=generator) * 2
        self.text = torch.full((TOPICS, LENGTH, THINGS + WORDS), LEVEL)
        self.text[..., THINGS:] = words
        self.text[:, SEEN] = torch.tensor([0.0] * THINGS + [LEVEL] * WORDS)

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """What is shown ``(B, 4 d)``, the things in it ``(B, 4)`` and the topics ``(B,)``."""
        things = torch.randint(THINGS, (count, len(SEEN)), generator=generator)
        topic_B = torch.randint(TOPICS, (count,), generator=generator)
        shown = self.things[torch.arange(len(SEEN)), things]
        shown = shown + 0.7 * torch.randn(shown.shape, generator=generator)
        return (shown @ self.mix * 0.7).flatten(1), things, topic_B

    def teacher(self, things: Tensor, topic_B: Tensor) -> Tensor:
        """Logits with the image, ``(B, T, V)``."""
        q_BTV = self.text[topic_B].clone()
        q_BTV[:, SEEN] = q_BTV[:, SEEN].scatter(2, things[..., None], 5.0)
        return q_BTV


class Student(nn.Module):
    """One hidden layer on the place, the topic and what is shown."""

    def __init__(self, width: int, generator: Generator) -> None:
        super().__init__()

        def made(*shape: int, scale: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * scale)

        self.place, self.topic = made(LENGTH, width, scale=0.5), made(TOPICS, width, scale=0.5)
        self.eye, self.bias = made(len(SEEN) * SIZE, width, scale=0.05), made(width, scale=0.1)
        self.head = made(width, THINGS + WORDS, scale=1 / math.sqrt(width))
        self.habit = made(LENGTH, THINGS + WORDS, scale=0.05)

    def forward(self, shown: Tensor | None, topic_B: Tensor) -> Tensor:
        """Logits ``(B, T, V)``; without the image where ``shown`` is None."""
        hidden = self.place + self.topic[topic_B][:, None] + self.bias
        if shown is not None:
            hidden = hidden + (shown @ self.eye)[:, None]
        return torch.tanh(hidden) @ self.head + self.habit


def prepare(world: World, width: int, seed: int) -> Student:
    """A student that has learned to talk as well as it can, and has hardly learned to see."""
    generator = Generator().manual_seed(1000 + seed)
    student = Student(width, generator)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    said = torch.ones(LENGTH, dtype=torch.bool)
    said[SEEN] = False
    for step in range(150):
        shown, things, topic_B = world.draw(64, generator)
        learned = said if step < 120 else torch.ones_like(said)
        loss = _distil(student(shown, topic_B)[:, learned], world.teacher(things, topic_B)[:, learned])
        loss = loss + _distil(student(None, topic_B), world.text[topic_B])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def _distil(p_BTV: Tensor, q_BTV: Tensor) -> Tensor:
    return cross_entropy(p_BTV.flatten(0, 1), q_BTV.flatten(0, 1).softmax(-1))


def run(world: World, initial: Student, name: str, seed: int) -> float:
    """Trains by a method; the share of things that are named right."""
    student, method, generator = copy.deepcopy(initial), parse(name), Generator().manual_seed(99 + seed)
    optimizer = SteeredOptimizer(torch.optim.AdamW(student.parameters(), lr=RATE), method.rule(method.losses))
    for _ in range(STEPS):
        shown, things, topic_B = world.draw(32, generator)
        views = {"teacher": world.teacher(things, topic_B), "teacher_text": world.text[topic_B]}
        views |= {"student": student(shown, topic_B), "student_text": student(None, topic_B)}
        views["prior"] = initial(None, topic_B).detach()
        views = {name: views[name] for name in method.views}
        optimizer.zero_grad()
        optimizer.backward_components(method.components(views, torch.ones(32, LENGTH, dtype=torch.bool)))
        optimizer.step()
    shown, things, topic_B = world.draw(1000, Generator().manual_seed(7))
    with torch.no_grad():
        named = student(shown, topic_B)[:, SEEN].argmax(-1) == things
    return float(named.double().mean())


def results(file: Path = RESULTS) -> str:
    """A row for each width: standard distillation, and the others to it."""
    found = json.loads(file.read_text())
    lines = []
    for width, runs in found.items():
        of = {method: dict(enumerate(shares)) for method, shares in runs.items()}
        standard = cell(interval([*of["standard"].values()]), scale=100)
        lines.append([width, standard, *(points(paired(of[method], of["standard"])) for method in METHODS[1:])])
    return as_table(["width", "`standard`, %", *(f"`{method}`, points to it" for method in METHODS[1:])], lines)


if __name__ == "__main__":
    found: dict[int, dict[str, list[float]]] = {width: {method: [] for method in METHODS} for width in WIDTHS}
    for width in WIDTHS:
        for seed in SEEDS:
            world = World(seed)
            student = prepare(world, width, seed)
            for method in METHODS:
                found[width][method].append(run(world, student, method, seed))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(results())
