"""One run: one method from one initial student over one sequence of prompts, and what is written down of it.

Dimensions: B responses of a step, T response tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import machine
from steer_optim import Geometry, SteeredOptimizer, measure
from steer_optim.vlm import angles_by_decile, token_losses
from studies.vgs import models
from studies.vgs.methods import Method, parse
from studies.vgs.prepare import CACHE, Examination, move, prepare, seed_step
from studies.vgs.records import Series, rounded
from studies.vgs.tasks import Settings, Task

COMPONENTS = ("std", "vis", "lang")  # observed under every method, whatever it trains on
FOUR_VIEWS = ("student", "student_text", "teacher", "teacher_text")
WINDOWS, CHECKPOINTS = 40, 10
GROUP = 8  # responses to one prompt, for GRPO
EMA = 0.99
HELD_OUT = 250


class Run:
    """A student in training; :meth:`work` trains it and returns the record of the run."""

    def __init__(self, task: Task, settings: Settings, method: str, seed: int, *, cache: Path = CACHE) -> None:
        self.task, self.settings, self.name, self.seed = task, settings, method, seed
        self.method: Method = parse(method)
        self.teacher, self.student, self.prepared = prepare(task, settings, seed, cache=cache)
        self.questions = task.questions(held_out=False, speaker=task.questions.reliable[0])
        frozen = copy.deepcopy(self.student).requires_grad_(False)
        self.prior = None if self.method.prior == "live" else frozen
        groups = [{"params": part} for part in self._parts()]
        if self.method.trains == "eye":
            groups = groups[:1]
        adamw = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        self.optimizer = SteeredOptimizer(
            adamw,
            self.method.rule(self.method.losses),
            scope=self.method.scope,
            refresh_every=self.method.refresh_every,
        )
        self.shadow: dict[str, Tensor] = {}  # the memory of the rule, had it been asked in every step

    def work(self) -> dict[str, Any]:
        settings = self.settings
        examine = Examination(self.task, settings, settings.examined // 4)
        every = max(1, settings.steps // settings.observations)
        checkpoints = {round(settings.steps * i / CHECKPOINTS) for i in range(CHECKPOINTS)}
        steps, observed, examined, ahead = (Series() for _ in range(4))
        seconds, diverged = [], None
        deciles = {"initial": self.deciles()} if settings.decile_batches else {}
        held_out = HeldOut(self)
        for step in range(settings.steps):
            if step in checkpoints:
                examined.add(step, examine(self.student))
                gradient, before = held_out.gradient(), self.weights()
            if step % every == 0:
                observed.add(step, self.observe(step))
            start = time.perf_counter()
            try:
                steps.add(step, self.step(step))
            except ValueError as error:
                if "finite" not in str(error):
                    raise
                diverged = step
                break
            seconds.append(time.perf_counter() - start)
            if step in checkpoints:
                gain = torch.cosine_similarity(self.weights() - before, gradient, dim=0)
                ahead.add(step, {"gain": float(gain), "lang": held_out.language()})
        final = Examination(self.task, settings, settings.examined)(self.student)
        examined.add(settings.steps, final)
        return {
            "seconds": rounded(median(seconds)) if seconds else None,
            "diverged": diverged,
            "parameters": {"teacher": _size(self.teacher), "student": _size(self.student)},
            "rule": repr(self.optimizer.rule),
            "losses": repr(self.method.losses),
            "scores": rounded({**self.prepared, "final": final}),
            "examined": examined.history(),
            "ahead": {**ahead.history(), "lang end": [rounded(held_out.language())]},
            "observed": observed.history(),
            "steps": steps.history(points=WINDOWS),
            "deciles": deciles,
            "machine": machine(),
        }

    def weights(self) -> Tensor:
        """All weights that are trained, as one vector, a copy."""
        return torch.cat([p.detach().flatten() for p in self.trained()])

    def trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, step: int) -> dict[str, float]:
        """One step of training; returns the weights of the components and the like."""
        method, optimizer = self.method, self.optimizer
        prompt, answer_BT, response_BT, seen = self.rollout("distillation", step)
        if method.off_policy:
            response_BT = answer_BT
        views = self.views(prompt, response_BT, seen, method.views, train_text=method.trains_text)
        mask_BT = self.questions.mask(response_BT)
        optimizer.zero_grad()
        record: dict[str, float] = {}
        if method.reward:
            loss, record["reward"] = self.grpo(views["student"], response_BT, answer_BT, mask_BT)
            (method.reward * loss).backward(retain_graph=method.reward < 1)
        if method.reward < 1:
            components = method.components(views, mask_BT)
            losses = {name: (1 - method.reward) * method.weight * loss for name, loss in components.items()}
            exact = measure(losses, self.student.parameters()) if method.refresh_every > 1 else None
            geometry = optimizer.backward_components(losses)
            record |= {f"weight {name}": float(geometry.weight(name).mean()) for name in geometry.names}
            if exact is not None:
                record["cosine to exact"], record["length to exact"] = self.compare(geometry, exact)
        nn.utils.clip_grad_norm_(self.trained(), 1.0)
        optimizer.step()
        if self.prior is not None and method.prior == "ema":
            with torch.no_grad():
                for mean, new in zip(self.prior.parameters(), self.student.parameters(), strict=True):
                    mean.lerp_(new, 1 - EMA)
        return record

    def rollout(self, *key: object) -> tuple[dict[str, Tensor], Tensor, Tensor, models.Prefix]:
        """Prompts, right answers, the student's responses, and its prompts with the image, by what is asked for."""
        seed_step(self.seed, *key)
        repeats = GROUP if self.method.reward else 1
        prompt, answer_BT = move(*self.questions.draw(self.settings.batch_size // repeats), self.settings.device)
        if repeats > 1:
            answer_BT = answer_BT.repeat_interleave(repeats, dim=0)
            prompt = {
                name: value.unflatten(0, (self.settings.batch_size // repeats, -1))
                .repeat_interleave(repeats, dim=0)
                .flatten(0, 1)
                for name, value in prompt.items()
            }
        seen = models.with_image(self.student, prompt)
        return prompt, answer_BT, models.sample(self.student, seen.detach(), self.questions), seen

    def views(
        self,
        prompt: dict[str, Tensor],
        response_BT: Tensor,
        seen: models.Prefix,
        names: Iterable[str],
        *,
        train_text: bool,
    ) -> dict[str, Tensor]:
        """Logits ``(B, T, V)`` by the name of the view."""
        of = {"student": self.student, "student_text": self.student, "prior": self.prior}
        of |= {"teacher": self.teacher, "teacher_text": self.teacher}
        views = {}
        for name in names:
            with torch.set_grad_enabled(name == "student" or (name == "student_text" and train_text)):
                if name == "student":
                    prefix = seen
                else:
                    prefix = (models.with_image if name == "teacher" else models.without_image)(of[name], prompt)
                views[name] = models.response_logits(of[name], prefix, response_BT)
        return views

    def grpo(
        self, student_BTV: Tensor, response_BT: Tensor, answer_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, float]:
        """GRPO without KL; on-policy, so that the ratio is 1 and nothing is clipped. The loss and the mean reward."""
        reward_B = self.questions.right(response_BT, answer_BT).float()
        group = reward_B.view(-1, GROUP)
        advantage_B = ((group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        log_p_BT = student_BTV.log_softmax(-1).gather(2, response_BT[..., None])[..., 0]
        return -(advantage_B * log_p_BT)[mask_BT].sum() / mask_BT.sum(), float(reward_B.mean())

    def compare(self, taken: Geometry, exact: Geometry) -> tuple[float, float]:
        """The update that was taken beside the one that a fresh Gramian would have given: cosine, ratio of lengths."""
        weights, self.shadow = self.optimizer.rule(exact.G, exact.names, self.shadow)
        both = torch.stack([taken.weights.to(weights), weights])
        products = both @ exact.G @ both.T
        (stale, between), (_, fresh) = products.tolist()
        # PCD may stand still; two updates of length zero are one.
        cosine = between / math.sqrt(stale * fresh) if stale * fresh > 0 else float(stale == fresh)
        return cosine, math.sqrt(stale / fresh) if fresh > 0 else 1.0

    def observe(self, step: int) -> dict[str, float]:
        """Losses, by tercile of visual dependency too, and the geometry of their gradients, on rollouts of its own."""
        losses, mask_BT = self.sampled_losses("observation", step)
        geometry = measure(
            {name: losses[name][mask_BT].mean() for name in COMPONENTS},
            self.student.parameters(),
            retain_graph=False,
        )
        record: dict[str, float] = {}
        terciles = torch.tensor_split(losses["vds"][mask_BT].argsort(stable=True), 3)
        for name in COMPONENTS:
            loss_N = losses[name].detach()[mask_BT]
            record[f"loss {name}"] = float(loss_N.mean())
            record[f"norm {name}"] = float(geometry.norm(name))
            record |= {f"{name} tercile {i}": float(loss_N[rows].mean()) for i, rows in enumerate(terciles)}
        record["vds"] = float(losses["vds"][mask_BT].mean())
        return record | {f"angle {a}~{b}": float(geometry.angle(a, b)) for a, b in combinations(COMPONENTS, 2)}

    def deciles(self) -> dict[str, list[float]]:
        """The angles between the components by decile of visual dependency, mean over some batches."""
        angles = dict.fromkeys(combinations(COMPONENTS, 2), torch.zeros(10, dtype=torch.float64))
        batches = self.settings.decile_batches
        for batch in range(batches):
            losses, mask_BT = self.sampled_losses("deciles", batch)
            parts = {name: losses[name] for name in COMPONENTS}
            geometry = angles_by_decile(parts, losses["vds"], mask_BT, self.student.parameters())
            angles = {pair: total + geometry.angle(*pair).cpu() / batches for pair, total in angles.items()}
        return {", ".join(pair): rounded(mean.tolist()) for pair, mean in angles.items()}

    def sampled_losses(self, *key: object) -> tuple[dict[str, Tensor], Tensor]:
        prompt, _, response_BT, seen = self.rollout(*key)
        views = self.views(prompt, response_BT, seen, FOUR_VIEWS, train_text=True)
        return token_losses(views), self.questions.mask(response_BT)

    def _parts(self) -> list[list[Tensor]]:
        """The parameters that see and the others: what ``scope="group"`` tells apart."""
        seeing = {id(p) for module in models.eye(self.student) for p in module.parameters()}
        split: tuple[list[Tensor], list[Tensor]] = ([], [])
        for p in self.student.parameters():
            split[id(p) not in seeing].append(p)
        return list(split)


class HeldOut:
    """Held-out answers, worded as the teacher does: how the student would read them on."""

    def __init__(self, run: Run) -> None:
        self.run, task = run, run.task
        self.questions = task.questions(held_out=True, speaker="teacher")
        drawn = self.questions.draw(HELD_OUT, generator=torch.Generator().manual_seed(1))
        self.prompt, self.answer_BT = move(*drawn, run.settings.device)
        self.told = [column for column in range(self.questions.length) if column not in self.questions.seen]
        self.teacher_BTV = self._text(run.teacher)

    def gradient(self) -> Tensor:
        """Of the mean log-probability of what is to be seen, by all weights that are trained, as one vector."""
        student, seen = self.run.student, list(self.questions.seen)
        logits_BTV = models.response_logits(student, models.with_image(student, self.prompt), self.answer_BT)
        log_p = logits_BTV[:, seen].log_softmax(-1).gather(2, self.answer_BT[:, seen, None]).mean()
        trained = self.run.trained()
        gradients = torch.autograd.grad(log_p, trained, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, gradients, strict=True)]
        return torch.cat([part.flatten() for part in parts])

    def language(self) -> float:
        """What is left of the teacher's language to be learnt: KL(q_tx || p_tx) of a word that is not to be seen."""
        p_BTV, q_BTV = self._text(self.run.student), self.teacher_BTV
        return float((q_BTV.exp() * (q_BTV - p_BTV)).sum(-1)[:, self.told].mean())

    @torch.no_grad()
    def _text(self, model: Any) -> Tensor:
        prefix = models.without_image(model, self.prompt)
        return models.response_logits(model, prefix, self.answer_BT).log_softmax(-1)


def _size(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())
