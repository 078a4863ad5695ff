"""Visual Gradient Steering on TRL's `DistillationTrainer`: on-policy distillation of a vision-language model.

TRL samples the responses, with the image, from the student as it is; batches, accumulates, clips, schedules, logs and
saves. Its own divergence knows one view and one loss, so `compute_loss`, its documented hook, is overridden: student
and teacher are scored with the image and without, the losses decomposed, and `join` makes one scalar of them.

    python examples/frameworks/trl_distillation.py

Dimensions: B prompts, T response tokens, V vocabulary.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from tiny_llava import make_dataset, make_model, make_processor
from trl import DistillationConfig, DistillationTrainer

from steer_optim import SteeredOptimizer
from steer_optim.vlm import DecomposedDistillation, Prompts, Rollout, score, text_only, visual_dependency, visual_tokens

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
PIXELS = ("pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes")


class SteeredDistillationTrainer(DistillationTrainer):
    """TRL's trainer with the losses of `method` and an optimizer that steers them."""

    def __init__(self, *, method, optimizer, **options):
        super().__init__(optimizers=(optimizer, None), **options)
        self.method, self.steered = method, optimizer  # self.optimizer will be Accelerate's wrapper

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = self.method(
            self._views(model, inputs, known=inputs["teacher_views"]),
            inputs["completion_mask"].bool(),
            # TRL counts the tokens of the whole step on all processes, over which gradients are averaged.
            count=inputs["num_items_in_batch"] / self.accelerator.num_processes,
            gate_BT=inputs["gate_BT"],
        )
        loss = self.steered.join(losses, accumulate=not self.accelerator.sync_gradients)
        return (loss, None) if return_outputs else loss

    def _prepare_inputs(self, generation_batch):
        """Scores the teacher in all micro-batches of the step, and gates their tokens, of all processes, at once."""
        inputs = super()._prepare_inputs(generation_batch)
        if "gate_BT" not in inputs:
            step = self._buffered_inputs if self.model.training else [inputs]
            masks = [batch["completion_mask"].bool() for batch in step]
            teachers = [self._views(self.model, batch, names=("teacher", "teacher_text")) for batch in step]
            scores = [visual_dependency(*views.values(), mask) for views, mask in zip(teachers, masks, strict=True)]
            everyone = dist.group.WORLD if self.accelerator.num_processes > 1 else None
            gate_BT = visual_tokens(torch.cat(scores), torch.cat(masks), quantile=self.method.quantile, group=everyone)
            gates = gate_BT.split([len(mask) for mask in masks])
            for batch, views, gate in zip(step, teachers, gates, strict=True):
                batch |= {"teacher_views": views, "gate_BT": gate}
        return inputs

    def _views(self, model, inputs, **options):
        """What the models say to the responses: hidden states before their heads."""
        length = inputs["prompt_ids"].shape[1]
        prompt = {"input_ids": inputs["prompt_ids"], "attention_mask": inputs["prompt_mask"]}
        prompt |= {name: inputs[name][:, :length] for name in TOKEN_TYPES if name in inputs}
        prompt |= {name: inputs[name] for name in PIXELS if name in inputs}
        prompts = Prompts(prompt, text_only(prompt, self.model.config))
        response = Rollout(inputs["completion_ids"], inputs["completion_mask"].bool())
        return score(model, self.teacher_model, prompts, response, method=self.method, **options)


def make_trainer(directory, *, adapt=lambda model: model, max_steps=3):
    """A trainer of the tiny student; `adapt` may wrap it, in adapters for instance."""
    # Before the optimizer, which must hold the adapters: TRL's own peft_config would add them too late.
    student = adapt(make_model(seed=0))
    method = DecomposedDistillation("vgs", gamma=2.0)
    optimizer = SteeredOptimizer(
        torch.optim.AdamW(student.parameters(), lr=0.01),
        method.rule(),
        data_parallel=int(os.environ.get("WORLD_SIZE", 1)) > 1,
    )
    arguments = DistillationConfig(
        str(directory),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_completion_length=4,
        max_grad_norm=1.0,
        lr_scheduler_type="linear",
        save_steps=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
    )
    return SteeredDistillationTrainer(
        method=method,
        optimizer=optimizer,
        model=student,
        teacher_model=make_model(seed=1, hidden_size=32),
        args=arguments,
        train_dataset=Dataset.from_list(make_dataset()),
        processing_class=make_processor(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Distil a tiny vision-language model with TRL, steered towards vision."
    )
    parser.add_argument("--out", type=Path, default="runs/trl", help="where the checkpoints go")
    trainer = make_trainer(parser.parse_args().out)
    trainer.train()
    print(trainer.steered.geometry)
