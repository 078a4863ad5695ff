"""Steering under `transformers.Trainer`: `plain_loop.py` with a `compute_loss_func` and no subclass.

The optimizer is made first and handed over; the loss function closes over it. `watch_trainer` logs and saves what
steering does, and tells `join` which micro-batch is the last of a step. The trainer counts the items of a whole step,
over micro-batches and processes, and leaves the division by them to the loss function.

    python examples/frameworks/transformers_trainer.py
    torchrun --nproc-per-node 2 examples/frameworks/transformers_trainer.py
"""

import argparse
import os
from pathlib import Path

from plain_loop import ACCUMULATE, BATCH, CLIP, EPOCHS, Regression, components, make_dataset, make_optimizer
from transformers import Trainer, TrainingArguments

from steer_optim.callbacks import watch_trainer


def make_trainer(directory):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    model = Regression()
    optimizer, scheduler = make_optimizer(model, data_parallel=processes > 1)

    def steered_loss(outputs, labels, num_items_in_batch=None):
        share = 1 if num_items_in_batch is None else labels.numel() / num_items_in_batch
        losses = {name: loss * share for name, loss in components(outputs, labels).items()}
        return optimizer.join(losses)

    arguments = TrainingArguments(
        directory,
        per_device_train_batch_size=BATCH // processes,
        gradient_accumulation_steps=ACCUMULATE,
        num_train_epochs=EPOCHS,
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=1,
        logging_strategy="steps",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],  # by default those that the model's forward takes: none
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=make_dataset(),
        optimizers=(optimizer, scheduler),
        compute_loss_func=steered_loss,
    )
    return trainer, optimizer, watch_trainer(trainer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small regression with transformers.Trainer.")
    parser.add_argument("--out", type=Path, default="runs/trainer", help="where the checkpoints go")
    trainer, optimizer, monitor = make_trainer(parser.parse_args().out)
    trainer.train()
    if trainer.is_world_process_zero():
        print(optimizer.geometry)
