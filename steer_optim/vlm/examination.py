"""Examine a student: its answers with the image and without, and its distance from the teacher.

Dimensions: ``B`` prompts, ``T`` response tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from steer_optim import plots
from steer_optim.monitor import from_log
from steer_optim.vlm.data import ROW, answer, conversation, numbered
from steer_optim.vlm.distillation import DecomposedDistillation
from steer_optim.vlm.families import image_ids
from steer_optim.vlm.forward import in_evaluation, score
from steer_optim.vlm.gate import sampled_log_probs
from steer_optim.vlm.prompts import Prompts, Rollout, unpadded
from steer_optim.vlm.rollout import rollout

COLUMNS = {
    "with_image": "right with the image, %",
    "without_image": "right without, %",
    "kl": "KL to the teacher",
    "text_kl": "KL without the image",
    "text_loss": "text-only loss of the answers",
}


@torch.no_grad()
def examine(trainer: Any, model: Any, rows: Any) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Return the scores of a model on held-out rows, and its answers, equal on all processes. Decoding is greedy.

    Args:
        trainer: a ``SteeredDistillationTrainer``, whose processor, teacher and arguments are used.
        model: its student, or its teacher.
        rows: a map-style data set of :mod:`steer_optim.vlm.data`.

    Returns:
        The means of ``with_image`` and ``without_image`` (exact matches of the answer, up to case and spaces),
        ``kl`` and ``text_kl`` (divergence from the teacher per token of the greedy response, under each view, in nats),
        and ``text_loss`` (cross-entropy of right answers without the image and an end token, in nats per token); None
        if nothing can be compared. And one record per row: ``row``, ``answer``, the responses ``with_image`` and
        ``without_image``, and its ``scores``.

    Example:
        >>> means, records = examine(trainer, trainer.model, rows)  # doctest: +SKIP
    """
    rows = numbered(rows)
    accelerator, size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    rank, world = accelerator.process_index, accelerator.num_processes
    # All processes run equally many batches, or a sharded model would deadlock.
    batches, records = math.ceil(len(rows) / (size * world)), []
    for i in range(batches):
        numbers = [((i * world + rank) * size + j) % len(rows) for j in range(size)]
        records += _examine_batch(trainer, model, [rows[n] for n in numbers])
    everyone = {record["row"]: record for record in gather_object(records)}
    ordered = [everyone[row] for row in sorted(everyone)]
    means = {name: _mean(record["scores"].get(name) for record in ordered) for name in COLUMNS}
    return means, ordered


class Examination(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Examine teacher and student before the first step; :meth:`finish` examines the student after the last.

    Args:
        trainer: a ``SteeredDistillationTrainer``.
        rows: the held-out rows.

    Example:
        >>> trainer.add_callback(examination := Examination(trainer, rows))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> print(examination.finish())  # doctest: +SKIP
    """

    def __init__(self, trainer: Any, rows: Any) -> None:
        self.trainer, self.rows, self.path = trainer, rows, Path(trainer.args.output_dir)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Examine both models, unless the run resumes from a checkpoint."""
        if state.global_step == 0:
            self.trainer.accelerator.print(f"examining teacher and student on {len(self.rows)} held-out rows ...")
            models = {"teacher": self.trainer.teacher_model, "student before": self.trainer.model}
            found = {name: examine(self.trainer, model, self.rows)[0] for name, model in models.items()}
            self._write("evaluation.json", json.dumps(found, indent=2))

    def finish(self) -> str:
        """Examine the trained student; write ``evaluation.json``, ``answers.jsonl`` and ``training.png``.

        Returns:
            The table, as text.
        """
        means, answers = examine(self.trainer, self.trainer.model, self.rows)
        file = self.path / "evaluation.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        found["student after"] = means
        self._write("evaluation.json", json.dumps(found, indent=2))
        self._write("answers.jsonl", "".join(json.dumps(record) + "\n" for record in answers))
        if self.trainer.is_world_process_zero():
            draw(self.trainer.state.log_history, self.path / "training.png")
        return table(found, len(answers))

    def _write(self, name: str, text: str) -> None:
        if self.trainer.is_world_process_zero():
            partial = self.path / f"{name}.partial"
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            partial.replace(self.path / name)


def table(found: Mapping[str, Mapping[str, float | None]], count: int) -> str:
    """Return the examinations as a table, without empty columns.

    Args:
        found: by model, the means of :func:`examine`.
        count: the number of rows, for the caption.

    Example:
        >>> print(table({"student": {"kl": 0.25}}, 8))
                 KL to the teacher
        student              0.250
        8 held-out rows, greedy decoding; divergences and losses in nats per token
    """
    columns = [name for name in COLUMNS if any(means.get(name) is not None for means in found.values())]
    lines = [["", *(COLUMNS[name] for name in columns)]]
    for who, means in found.items():
        lines.append([who, *(_cell(name, means.get(name)) for name in columns)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, f"{count} held-out rows, greedy decoding; divergences and losses in nats per token"])


def draw(log: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw losses, angles and weights over training.

    Args:
        log: the trainer's ``state.log_history``.
        file: where the figure is saved.

    Example:
        >>> draw(trainer.state.log_history, Path("training.png"))  # doctest: +SKIP
    """
    from matplotlib.figure import Figure

    history = from_log(log)
    panels = {"loss": "loss", "angle": "angle between gradients (degrees)", "weight": "weight in the update"}
    figure = Figure(figsize=(12, 3.6), dpi=160, layout="constrained")
    for (kind, label), axes in zip(panels.items(), figure.subplots(1, 3), strict=True):
        if any(key.startswith(f"steer/{kind}/") for key in history):
            plots.lines(history, kind, axes=axes)
        axes.set(xlabel="step", ylabel=label)
    figure.savefig(file)


def _examine_batch(trainer: Any, model: Any, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    device, teacher, tokenizer = trainer.accelerator.device, trainer.teacher_model, trainer._tokenizer
    prompts = trainer.render([conversation(row) for row in rows], [row[ROW] for row in rows]).to(device)
    options = {"max_new_tokens": trainer.args.max_completion_length, "temperature": 0}
    options |= {"eos_ids": trainer.eos_token_ids, "pad_id": tokenizer.pad_token_id}
    right = [answer(row) for row in rows]
    scores: list[dict[str, float]] = [{} for _ in rows]
    with trainer.accelerator.autocast(), in_evaluation(model):
        seen = rollout(model, prompts, **options)
        blind = rollout(model, Prompts(prompts.text, prompts.text, prompts.blank), **options)
        if model is not teacher:
            both = DecomposedDistillation("both-views")
            views = score(model, teacher, prompts, seen, method=both)
            for i in range(len(rows)):
                mine = {name: view[i : i + 1] for name, view in views.items()}
                losses = both(mine, seen.scored_BT[i : i + 1])
                scores[i] |= {"kl": losses["std"].item(), "text_kl": losses["lang"].item()}
        # Rows without an answer, too: all processes run equally many passes.
        ids = [tokenizer(x or "", add_special_tokens=False)["input_ids"] for x in right]
        # Something to score, without ids that the model takes for an image.
        fit = [bool(each) and not image_ids(model.config) & {*each} for each in ids]
        ids = [each if fits else [tokenizer.eos_token_id] for each, fits in zip(ids, fit, strict=True)]
        answers = Rollout.of(ids, config=model.config, device=device)
        only: Any = score(model, teacher, prompts, answers, method=trainer.method, names=("student_text",))
        log_p_BT = sampled_log_probs(only["student_text"], answers.response_BT, answers.mask_BT)
    decoded = [
        tokenizer.batch_decode(unpadded(r.response_BT, r.mask_BT), skip_special_tokens=True) for r in (seen, blind)
    ]
    records = []
    for i, row in enumerate(rows):
        said = {"with_image": decoded[0][i].strip(), "without_image": decoded[1][i].strip()}
        if right[i] is not None:
            scores[i] |= {name: float(_plain(text) == _plain(str(right[i]))) for name, text in said.items()}
        if right[i] is not None and fit[i]:
            scores[i]["text_loss"] = -float(log_p_BT[i].sum() / answers.mask_BT[i].sum())
        records.append({"row": row[ROW], "answer": right[i], **said, "scores": scores[i]})
    return records


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" if name.startswith("with") else f"{value:.3f}"
