"""Steering under Hugging Face Accelerate: `plain_loop.py` with an `Accelerator`.

`accelerator.backward` wants one scalar, which is what `join` gives. `watch_accelerator` logs and saves what steering
does, and tells `join` which micro-batch is the last of a step. `prepare` hides the optimizer in a wrapper of its own,
so keep the name of the steered one.

    python examples/frameworks/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/frameworks/accelerate_loop.py
"""

import argparse
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from plain_loop import ACCUMULATE, BATCH, CLIP, EPOCHS, Regression, components, make_dataset, make_optimizer
from torch.utils.data import DataLoader

from steer_optim.callbacks import watch_accelerator


def train(directory, *, first_epoch=0):
    """Trains from the checkpoint of `first_epoch`, and leaves one after every epoch."""
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATE,
        # By default each process takes a batch of its own, and a prepared scheduler makes a step for each of them.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    model = Regression()
    steered, scheduler = make_optimizer(model, data_parallel=accelerator.num_processes > 1)
    model, optimizer, scheduler, loader = accelerator.prepare(
        model, steered, scheduler, DataLoader(make_dataset(), BATCH)
    )
    monitor = watch_accelerator(accelerator, steered)
    if first_epoch:
        accelerator.load_state(directory / f"epoch-{first_epoch}")
    for epoch in range(first_epoch, EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                losses = components(model(batch["x"]), batch["labels"])
                accelerator.backward(steered.join(losses))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.save_state(directory / f"epoch-{epoch + 1}")
    return accelerator.unwrap_model(model), steered, monitor


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small regression with Accelerate.")
    parser.add_argument("--out", type=Path, default="runs/accelerate", help="where the checkpoints go")
    print(train(parser.parse_args().out)[1].geometry)
