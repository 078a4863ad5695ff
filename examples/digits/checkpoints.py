"""The data set, and the checkpoints to start from: a teacher, and a student that reads well and sees badly."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import LlavaForConditionalGeneration

from digits.models import Problems, eye, make_model, make_processor, teach
from digits.task import write_data


def make(
    out: Path,
    *,
    seed: int,
    rows: int,
    held_out: int,
    teacher_steps: int,
    reader_steps: int,
    student_steps: int,
    batch_size: int,
) -> None:
    """Write ``data``, ``teacher``, ``reader`` and ``student`` into ``out``, each unless it is there."""
    processor = make_processor()
    once(out / "data", lambda path: write_data(path, train=rows, test=held_out, seed=seed))

    @cache
    def problems() -> Problems:
        return Problems(processor, load_dataset(str(out / "data"), split="train"))

    def taught(name: str, make: Callable[[], LlavaForConditionalGeneration], steps: int, lr: float) -> None:
        def write(path: Path) -> None:
            # Or the fresh tower would be the one that the reader began with.
            torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            model = make()
            teach(model, problems(), steps=steps, batch_size=batch_size, lr=lr, name=name)
            model.save_pretrained(path)
            processor.save_pretrained(path)

        once(out / name, write)

    taught("teacher", lambda: make_model(64), teacher_steps, lr=2e-3)
    taught("reader", lambda: make_model(48), reader_steps, lr=2e-3)
    taught("student", lambda: with_untrained_eye(out / "reader"), student_steps, lr=3e-4)


def with_untrained_eye(path: Path) -> LlavaForConditionalGeneration:
    """A model with a fresh vision tower in place of its own, which alone can learn."""
    model = LlavaForConditionalGeneration.from_pretrained(path).requires_grad_(False)
    fresh = make_model(model.config.text_config.hidden_size)
    for old, new in zip(eye(model), eye(fresh), strict=True):
        old.load_state_dict(new.state_dict())
        old.requires_grad_(True)
    return model


def once(path: Path, write: Callable[[Path], None]) -> None:
    """Write a directory, which appears under its name when it is complete."""
    if path.exists():
        print(f"{path}: found", flush=True)
        return
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    partial.rename(path)
