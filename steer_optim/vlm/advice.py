"""Measure a few batches to tell whether steering is worth it, with the advice of docs/how-to-choose.md.

Nothing is trained. Dimensions: ``B`` prompts, ``T`` response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

import torch

from steer_optim import Geometry, Sum, measure
from steer_optim.monitor import scalars
from steer_optim.vlm.distillation import Component, DecomposedDistillation, Decomposition
from steer_optim.vlm.divergences import TERMS
from steer_optim.vlm.examination import examine, table
from steer_optim.vlm.forward import score
from steer_optim.vlm.gate import visual_dependency, visual_tokens

_NAMES = ("std", "vis", "lang")
_MEASURED = Decomposition({name: Component(TERMS[name]) for name in _NAMES}, lambda gamma: Sum())

# How many standard errors a difference must exceed, and the smallest in nats that is worth acting on.
_ERRORS, _LEAST = 2.0, 0.05


@dataclass(frozen=True)
class Findings:
    """Hold the measurements, as means over batches. Example: see :func:`investigate`.

    Attributes:
        angles: between gradients, by pair, in degrees.
        dose: the angle between the gradient of standard distillation and the steered one, in degrees.
        norms: of the gradients.
        losses: ``std`` and ``lang``: the divergence from the teacher with the image and without, in nats per token.
        visual: the share of the visual dependency that the most visual 30 % of the tokens have.
        language: the teacher's loss of right answers without the image minus the student's, in nats per token: mean and
            standard error over rows; None with fewer than two answers.
        right: the share of rows that the teacher answers right with the image; None without answers.
    """

    angles: Mapping[str, float]
    dose: float
    norms: Mapping[str, float]
    losses: Mapping[str, float]
    visual: float
    language: tuple[float, float] | None
    right: float | None = None


def investigate(trainer: Any, rows: Any, *, batches: int = 8) -> tuple[Findings, str]:
    """Measure a few batches, and examine student and teacher.

    Args:
        trainer: a ``SteeredDistillationTrainer`` in one process, before training.
        rows: of a map-style data set.
        batches: how many, of ``per_device_train_batch_size`` rows, are sampled and scored; the examination reads all
            rows.

    Returns:
        The :class:`Findings`, and the examination as a table.

    Example:
        >>> found, text = investigate(trainer, rows)  # doctest: +SKIP
    """
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    if trainer.args.gradient_checkpointing and trainer.model.supports_gradient_checkpointing:
        # As in training, but not reentrant, which cannot be measured; after a rollout TRL reads the arguments.
        trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": False}
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    student, method = trainer.model.train(), DecomposedDistillation(_MEASURED, temperature=trainer.args.temperature)
    size, geometries, visual = trainer.args.per_device_train_batch_size, [], []
    for i in range(min(batches, math.ceil(len(rows) / size))):
        (batch,) = trainer.sample([rows[j] for j in range(i * size, min((i + 1) * size, len(rows)))], parts=1)
        mask_BT = batch.response.scored_BT
        with trainer.accelerator.autocast():
            views = score(student, trainer.teacher_model, batch.prompts, batch.response, method=method)
            losses = method(views, mask_BT)
        vds_BT = visual_dependency(views["teacher"], views["teacher_text"], mask_BT)
        top_BT = visual_tokens(vds_BT, mask_BT, quantile=0.7)
        visual.append(float(vds_BT[top_BT].sum() / vds_BT.sum().clamp(min=1e-12)))
        geometries.append(measure(losses, student.parameters(), retain_graph=False))
    student_means, of_student = examine(trainer, student, rows)
    teacher_means, of_teacher = examine(trainer, trainer.teacher_model, rows)
    differences = [
        theirs["scores"]["text_loss"] - mine["scores"]["text_loss"]
        for mine, theirs in zip(of_student, of_teacher, strict=True)
        if "text_loss" in mine["scores"]
    ]
    language = None
    if len(differences) > 1:
        language = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    found = Findings(
        angles={f"{a}, {b}": fmean(float(g.angle(a, b)) for g in geometries) for a, b in combinations(_NAMES, 2)},
        dose=fmean(_dose(g, trainer.args.gamma) for g in geometries),
        norms={name: fmean(float(g.norm(name)) for g in geometries) for name in _NAMES},
        losses={name: fmean(scalars(g)[f"steer/loss/{name}"] for g in geometries) for name in ("std", "lang")},
        visual=fmean(visual),
        language=language,
        right=teacher_means["with_image"],
    )
    return found, table({"teacher": teacher_means, "student": student_means}, len(rows))


def advise(found: Findings) -> str:
    """Return the findings in words, and the advice of docs/how-to-choose.md.

    Args:
        found: the result of :func:`investigate`.

    Example:
        >>> found = Findings({"std, vis": 12.0}, 8.0, {"std": 1.0}, {"std": 0.3, "lang": 0.1}, 0.9, (-0.4, 0.1))
        >>> print(advise(found).splitlines()[-1])
        Advice: --decomposition standard. The teacher knows the language of the answers better, or as well. If much is
        left to learn without the image, and training does not change that, the student is too small for it: try
        --decomposition tokens.
    """
    lines = [
        f"angles between gradients: {', '.join(f'{pair} {angle:.0f}°' for pair, angle in found.angles.items())}",
        f"dose: steering would turn the gradient of standard distillation by {found.dose:.0f}°",
        f"norms: {', '.join(f'{name} {norm:.3g}' for name, norm in found.norms.items())}",
        f"left to learn: {found.losses['std']:.3f} nats per token with the image, {found.losses['lang']:.3f} without",
        f"the most visual 30 % of the tokens have {found.visual:.0%} of the visual dependency",
    ]
    choice = "standard"
    if found.language is None:
        reason = (
            "Nobody can tell whose language is better from fewer than two held-out rows with right answers: add a "
            "column answer, or more rows."
        )
    else:
        gain, error = found.language
        lines.append(
            f"without the image, right answers cost the student {abs(gain):.3f} ± {error:.3f} nats per token "
            f"{'less' if gain > 0 else 'more'} than the teacher"
        )
        if found.right == 0:
            reason = "The teacher's answers never equal the column answer: word it as a response, then measure again."
        elif gain > max(_ERRORS * error, _LEAST):
            choice, reason = "vgs-frozen", "The student knows the language of the answers better; steering keeps it."
        else:
            reason = (
                "The teacher knows the language of the answers better, or as well. If much is left to learn without "
                "the image, and training does not change that, the student is too small for it: try --decomposition "
                "tokens."
            )
    return "\n".join([*lines, f"Advice: --decomposition {choice}. {reason}"])


def _dose(geometry: Geometry, gamma: float) -> float:
    """Return the angle between ``std`` and ``std + gamma * vis``, in degrees; 0 if there is nothing to learn."""
    G = geometry.G.double()
    steered = torch.tensor([1.0, gamma, 0.0], dtype=G.dtype, device=G.device)
    cosine = (G[0] @ steered) / (G[0, 0] * (steered @ G @ steered)).sqrt()
    return math.degrees(math.acos(float(cosine.nan_to_num(1.0).clamp(-1, 1))))
