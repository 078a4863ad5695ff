"""The tasks of the grid, and the settings that the numbers of a run depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from studies.vgs import models
from studies.vgs.questions import (
    Digits,
    Digits3x3,
    Questions,
    Shapes,
    ShapesMiscountingStudent,
    ShapesMiscountingTeacher,
    ShapesTopics,
    ShapesTopicsVoices,
    ShapesVoices,
)


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers of a run depend on beside its task, its method and its seed.

    Attributes:
        steps: of distillation.
        batch_size: responses in a step.
        lr: of AdamW, constant.
        weight_decay: of AdamW.
        teacher_size: hidden size of the teacher.
        student_size: hidden size of the student.
        teacher_steps: supervised steps of the teacher, on 64 right answers each.
        reader_steps: likewise of the student, which make its language.
        eye_steps: supervised steps of its fresh tower alone: its perception before distillation.
        examined: held-out problems at the end; a quarter of them at the checkpoints before.
        observations: of losses and angles over training, each as dear as five steps.
        decile_batches: over which angles by decile are averaged, before training; none where it is 0.
        device: where it runs.
    """

    steps: int
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    teacher_size: int = 96
    student_size: int = 48
    teacher_steps: int = 1500
    reader_steps: int = 1000
    eye_steps: int = 60
    examined: int = 2000
    observations: int = 40
    decile_batches: int = 4
    device: str = "cpu"

    def preparation(self, who: str) -> tuple[Any, ...]:
        """What the teacher or the initial student depends on."""
        own = (self.teacher_size, self.teacher_steps)
        if who == "student":
            own = (self.student_size, self.reader_steps, self.eye_steps)
        return (*own, self.examined, self.device)


@dataclass(frozen=True)
class Task:
    """A task: its questions, its family of models, and its settings where nothing else is asked for.

    Attributes:
        taught_by: the task whose teacher of seed 0 teaches here under every seed; by default its own, of that seed.
    """

    name: str
    questions: type[Questions]
    model: Callable[[Any, int], nn.Module]
    settings: Settings
    taught_by: str = ""

    def settled(self, **changes: Any) -> tuple[Settings, str]:
        """Settings with changes, and a name for them that a file can have: ``default``, or what is different."""
        settings = replace(self.settings, **changes)
        differences = [
            f"{field.name}={getattr(settings, field.name)}"
            for field in fields(Settings)
            if getattr(settings, field.name) != getattr(self.settings, field.name)
        ]
        return settings, ",".join(differences) or "default"


_TOPICS = Settings(
    steps=400,
    lr=1e-3,
    teacher_steps=1500,
    reader_steps=500,
    eye_steps=30,
    examined=1000,
    observations=10,
    decile_batches=0,
)
_SHAPES = Settings(steps=500, lr=3e-4, teacher_steps=700, reader_steps=500, eye_steps=30)
TASKS = {
    task.name: task
    for task in (
        Task(
            "digits",
            Digits,
            models.qwen,
            Settings(steps=400, lr=3e-4, teacher_size=64, student_size=32, teacher_steps=700, reader_steps=500),
        ),
        Task("digits-3x3", Digits3x3, models.llava, Settings(steps=600, lr=3e-4, teacher_steps=1000, reader_steps=600)),
        Task("shapes", Shapes, models.llava, _SHAPES),
        Task("shapes-miscounting-teacher", ShapesMiscountingTeacher, models.llava, _SHAPES),
        Task("shapes-miscounting-student", ShapesMiscountingStudent, models.llava, _SHAPES),
        Task("shapes-voices", ShapesVoices, models.llava, _SHAPES),
        Task("shapes-topics", ShapesTopics, models.llava, _TOPICS, taught_by="shapes-topics"),
        Task("shapes-topics-voices", ShapesTopicsVoices, models.llava, _TOPICS, taught_by="shapes-topics"),
    )
}
