"""Steering under Lightning with manual optimization: the loop of `plain_loop.py` inside `training_step`.

Accumulation, clipping and the scheduler are the module's own here. `manual_backward` applies the precision and the
strategy of the trainer, so it gets the joined loss; `backward_components` would go around both.

    python examples/frameworks/lightning_manual.py
"""

import argparse
from pathlib import Path

from lightning_automatic import Module, make_trainer
from plain_loop import ACCUMULATE, CLIP, components


class ManualModule(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        last = (batch_idx + 1) % ACCUMULATE == 0 or self.trainer.is_last_batch
        losses = components(self.model(batch["x"]), batch["labels"])
        steered = self.optimizers(use_pl_optimizer=False)
        self.manual_backward(steered.join(losses, accumulate=not last) / ACCUMULATE)
        if last:
            self.clip_gradients(optimizer, CLIP, "norm")
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


def make_manual_trainer(directory, **options):
    return make_trainer(directory, accumulate_grad_batches=1, gradient_clip_val=None, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small regression with Lightning, step by step.")
    parser.add_argument("--out", type=Path, default="runs/lightning_manual", help="where the checkpoints go")
    module = ManualModule()
    trainer, monitor = make_manual_trainer(parser.parse_args().out)
    trainer.fit(module)
    print(module.optimizers(use_pl_optimizer=False).geometry)
