"""The trainer on tiny LLaVAs, and the plain loop that it must equal. Run as a program, it trains in two processes.

python tests/vlm/tiny_trainer.py OUT {ddp,fsdp} {whole,lora} DECOMPOSITION
"""

import copy
import os
import sys
from pathlib import Path

import peft
import torch
import transformers
from datasets import Dataset
from tiny_llava import make_dataset, make_model, make_processor
from torch.distributed.tensor import DTensor

from steer_optim import SteeredOptimizer
from steer_optim.vlm import DecomposedDistillation, score, visual_dependency, visual_tokens
from steer_optim.vlm.trainer import SteeredDistillationConfig, SteeredDistillationTrainer

OPTIONS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 4,
    "learning_rate": 0.01,
    "refresh_every": 2,
    "optim": "sgd",  # unlike Adam's, its steps are as close as the gradients
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def make_rows():
    """Twelve rows, of which one has no image and one has two."""
    rows = [{"messages": r["prompt"], "images": [r["image"]], "answer": "it is red"} for r in make_dataset()]
    rows[1]["images"] = []
    rows[3]["images"] *= 2
    return rows


def make_trainer(
    out, *, rows=None, lora=False, teacher=None, student=None, held_out=None, optimizers=(None, None), **options
):
    return SteeredDistillationTrainer(
        student or make_model(seed=0),
        teacher or make_model(seed=1, hidden_size=32),
        SteeredDistillationConfig(str(out), **{**OPTIONS, **options}),
        Dataset.from_list(rows or make_rows()),
        held_out,
        make_processor(),
        optimizers=optimizers,
        **({"peft_config": peft.LoraConfig(**LORA)} if lora else {}),
    )


def recorded(trainer):
    """The micro-batches that the trainer will compute losses of, as it goes on."""
    compute_loss, batches = trainer.compute_loss, []

    def record(model, inputs, **options):
        if trainer.model.training:
            batches.append(copy.copy(inputs))
        return compute_loss(model, inputs, **options)

    trainer.compute_loss = record
    return batches


def plain_loop(steps, decomposition, *, lora=False, **options):
    """Trains the same student on the micro-batches of each step, as README does; returns its parameters.

    Returns:
        The student; and by step the norm of the gradient and the weighted sum of the components.
    """
    options = {**OPTIONS, **options}
    student, teacher = make_model(seed=0), make_model(seed=1, hidden_size=32)
    method = DecomposedDistillation(decomposition)
    prior = copy.deepcopy(student).requires_grad_(False) if method.prior == "frozen" and not lora else None
    if lora:
        transformers.set_seed(42)
        student = peft.get_peft_model(student, peft.LoraConfig(**LORA))
    trained = [p for p in student.parameters() if p.requires_grad]
    make = {"sgd": torch.optim.SGD, "adamw_torch": torch.optim.AdamW}[options["optim"]]
    optimizer = make(trained, lr=options["learning_rate"], weight_decay=0.0)
    steered = SteeredOptimizer(optimizer, method.rule(), refresh_every=options["refresh_every"])
    log = []
    for number, batches in enumerate(steps):
        masks = [batch.response.scored_BT for batch in batches]
        views = [
            score(student, teacher, batch.prompts, batch.response, method=method, prior=prior) for batch in batches
        ]
        gates = [None] * len(batches)
        if method.gated:
            scores = [
                visual_dependency(v["teacher"], v["teacher_text"], m).flatten()
                for v, m in zip(views, masks, strict=True)
            ]
            every = torch.cat([m.flatten() for m in masks])
            gate = visual_tokens(torch.cat(scores), every, quantile=method.quantile)
            gates = [g.view_as(m) for g, m in zip(gate.split([m.numel() for m in masks]), masks, strict=True)]
        count = sum(mask_BT.sum() for mask_BT in masks)
        for i, (view, mask_BT, gate_BT) in enumerate(zip(views, masks, gates, strict=True)):
            losses = method(view, mask_BT, count=count, gate_BT=gate_BT)
            geometry = steered.backward_components(losses, accumulate=i < len(batches) - 1)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        log.append((norm.item(), float(geometry.weights @ geometry.losses)))
        for group in steered.param_groups:
            group["lr"] = options["learning_rate"] * (1 - number / options["max_steps"])
        steered.step()
        steered.zero_grad()
    return student, log


def shard_on_the_cpu():
    """Has accelerate take two processes on the CPU for ones that may shard with FSDP2, as it does on GPUs."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    initialize = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **options):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if self.__dict__.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = patched
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}


def main():
    out, way, adapters, decomposition = sys.argv[1:]
    if way == "fsdp":
        shard_on_the_cpu()
    trainer = make_trainer(Path(out) / "run", lora=adapters == "lora", decomposition=decomposition)
    batches = recorded(trainer)
    trainer.train()
    assert str(trainer.accelerator.distributed_type).endswith({"ddp": "MULTI_CPU", "fsdp": "FSDP"}[way])
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = [(batch.prompts, batch.response) for batch in batches]
    torch.save((kept, whole, log), Path(out) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
