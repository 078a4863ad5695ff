"""The teacher and the initial student of a task and a seed: made once, then found again by every method.

Both learn from right answers with the image and, in every fourth step, without it too. The student is then given an
untrained eye, and a few steps in which nothing else learns: its language is mature, its perception a bottleneck. What
follows has to teach it to see.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from studies.vgs import models
from studies.vgs.questions import Prompt, Questions
from studies.vgs.tasks import Settings, Task

BATCH, LR = 64, 2e-3
CACHE = Path("runs/vgs")


def seed_step(*key: object) -> None:
    """Seeds torch for one step by what the step is.

    No random state has to be saved then, and two methods see the same problems in the same step.
    """
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def warm_up_and_decay(step: int, steps: int) -> float:
    """The factor on the learning rate: up over 50 steps, down to zero over the last two fifths."""
    return min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))


def move(prompt: Prompt, answer_BT: Tensor, device: str) -> tuple[Prompt, Tensor]:
    """Prompts and answers on the device."""
    return {name: value.to(device) for name, value in prompt.items()}, answer_BT.to(device)


def prepare(task: Task, settings: Settings, seed: int, *, cache: Path = CACHE) -> tuple[Any, Any, dict[str, Any]]:
    """The teacher, the initial student and how they do on held-out problems; from the cache where it has them."""
    questions, own = task.questions(held_out=False), task.questions(held_out=False, speaker="student")
    place, first = (task.taught_by, 0) if task.taught_by else (task.name, seed)
    seed_step(first, "teacher")
    teacher = task.model(questions, settings.teacher_size).to(settings.device).eval()
    seed_step(seed, "student")
    student = task.model(questions, settings.student_size).to(settings.device).eval()
    fresh = task.model(questions, settings.student_size).to(settings.device)

    def teach() -> None:
        _supervise(teacher, questions, settings, first, "teacher", settings.teacher_steps)

    def read() -> None:
        _supervise(student, own, settings, seed, "reader", settings.reader_steps)
        for old, new in zip(models.eye(student), models.eye(fresh), strict=True):
            old.load_state_dict(new.state_dict())
        student.requires_grad_(False)
        for module in models.eye(student):
            module.requires_grad_(True)
        _supervise(student, own, settings, seed, "eye", settings.eye_steps)

    scores = {}
    made = (
        ("teacher", "teacher", place, first, teacher, teach),
        ("student", "initial", task.name, seed, student, read),
    )
    for who, when, folder, of_seed, model, make in made:
        slug = ",".join(str(value) for value in settings.preparation(who))
        file = cache / folder / f"{who},{slug},seed{of_seed}.pt"
        if not file.exists():
            make()
            record = Examination(task, settings, settings.examined)(model)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.partial")  # it appears under its name when it is whole
            torch.save({"model": model.state_dict(), "record": record}, partial)
            os.replace(partial, file)
        found = torch.load(file, weights_only=True, map_location=settings.device)
        model.load_state_dict(found["model"])
        scores[when] = found["record"]
    return teacher.requires_grad_(False), student.requires_grad_(True), scores


def _supervise(model: Any, questions: Questions, settings: Settings, seed: int, phase: str, steps: int) -> None:
    """Teaches a model by right answers, with what of it requires grad."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.01)
    for step in range(steps):
        seed_step(seed, phase, step)
        optimizer.param_groups[0]["lr"] = LR * warm_up_and_decay(step, steps)
        prompt, answer_BT = move(*questions.draw(BATCH), settings.device)
        loss = _answer_loss(model, models.with_image(model, prompt), answer_BT)
        if step % 4 == 0 and phase != "eye":
            loss = loss + _answer_loss(model, models.without_image(model, prompt), answer_BT)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _answer_loss(model: Any, prefix: models.Prefix, answer_BT: Tensor) -> Tensor:
    logits_BTV = models.response_logits(model, prefix, answer_BT)
    return cross_entropy(logits_BTV.flatten(0, 1), answer_BT.flatten())


class Examination:
    """Held-out problems, the same ones for every run; calling it examines a model with greedy decoding.

    Returns:
        ``answer`` and ``perception``, the shares of responses with the right result and with everything named that was
        to be seen; ``named``, the share of things named right. Without the image: ``text_loss``, the cross-entropy of
        right answers in nats per token, and ``language``, the share of right answers whose every word that follows from
        those before it is the most likely one there: questions that need no image. Right answers are those of the
        reliable speakers in turn, and how they are worded counts in neither.
    """

    def __init__(self, task: Task, settings: Settings, count: int) -> None:
        speakers = [task.questions(held_out=True, speaker=speaker) for speaker in task.questions.reliable]
        self.questions = speakers[0]
        generator, chunk = Generator().manual_seed(0), min(count, 250)
        drawn = [speakers[i % len(speakers)].draw(chunk, generator=generator) for i in range(max(1, count // chunk))]
        self.batches = [move(*batch, settings.device) for batch in drawn]

    @torch.no_grad()
    def __call__(self, model: Any) -> dict[str, float]:
        questions, scores = self.questions, []
        asked = [column for column in range(questions.length) if column not in questions.said]
        follows = [column for column in asked if column not in questions.seen]
        for prompt, answer_BT in self.batches:
            response_BT = models.sample(model, models.with_image(model, prompt), questions, greedy=True)
            logits_BTV = models.response_logits(model, models.without_image(model, prompt), answer_BT)
            said_BT = logits_BTV.argmax(-1) == answer_BT
            text_loss = cross_entropy(logits_BTV[:, asked].flatten(0, 1), answer_BT[:, asked].flatten())
            right_B = questions.right(response_BT, answer_BT)
            perceived_B = questions.perceived(response_BT, answer_BT)
            seen = list(questions.seen)
            named_BT = response_BT[:, seen] == answer_BT[:, seen]
            counted = (right_B, perceived_B, named_BT, said_BT[:, follows].all(dim=1))
            shares = [share.double().mean() for share in counted]
            scores.append(torch.stack([*shares, text_loss.double()]))
        names = ("answer", "perception", "named", "language", "text_loss")
        return dict(zip(names, torch.stack(scores).mean(0).tolist(), strict=True))
