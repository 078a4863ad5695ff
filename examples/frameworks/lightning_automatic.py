"""Steering under Lightning: `plain_loop.py` as a module with automatic optimization.

`training_step` returns the joined loss; Lightning divides it by the number of micro-batches, clips, steps, schedules,
and saves. `watch_lightning` logs and saves what steering does, and tells `join` which micro-batch is the last of a
step.

    python examples/frameworks/lightning_automatic.py
    torchrun --nproc-per-node 2 examples/frameworks/lightning_automatic.py
"""

import argparse
import os
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from plain_loop import ACCUMULATE, BATCH, CLIP, EPOCHS, Regression, components, make_dataset, make_optimizer
from torch.utils.data import DataLoader, DistributedSampler

from steer_optim.callbacks import watch_lightning


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Regression()

    def configure_optimizers(self):
        optimizer, scheduler = make_optimizer(self.model, data_parallel=self.trainer.world_size > 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self):
        samples, processes = make_dataset(), self.trainer.world_size
        # In the order of the plain loop: under DDP Lightning would shuffle.
        sampler = DistributedSampler(samples, processes, self.trainer.global_rank, shuffle=False)
        return DataLoader(samples, BATCH // processes, sampler=sampler)

    def training_step(self, batch, batch_idx):
        losses = components(self.model(batch["x"]), batch["labels"])
        return self.optimizers(use_pl_optimizer=False).join(losses)


def make_trainer(directory, **options):
    options = {"accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP, "logger": False, **options}
    processes = int(os.environ.get("WORLD_SIZE", 1))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=EPOCHS,
        callbacks=[ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    return trainer, watch_lightning(trainer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small regression with Lightning.")
    parser.add_argument("--out", type=Path, default="runs/lightning", help="where the checkpoints go")
    module = Module()
    trainer, monitor = make_trainer(parser.parse_args().out)
    trainer.fit(module)
    print(module.optimizers(use_pl_optimizer=False).geometry)
