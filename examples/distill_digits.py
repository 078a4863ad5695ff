"""Visual Gradient Steering on two cores: on-policy distillation of a tiny Qwen3-VL, with and without steering.

A teacher learns to answer questions about handwritten digits; a smaller student knows the language of the answers
and has an eye that has hardly learned to see. Each method distils the teacher into a copy of that student, from the
same start, over the same prompts, for the same number of steps:

    python examples/distill_digits.py                       # standard distillation and VGS, some minutes
    python examples/distill_digits.py --rule steer pcgrad   # two more, beside what runs/digits has
    python examples/distill_digits.py --quick --out runs/quick

`Job.distill` is the loop to copy. `digits.py` has the task, `digits_models.py` the models, `digits_report.py` the
table and the figures, and `digits_run.py` lets a run be interrupted.

Dimensions: B prompts, T response tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import transformers
from digits import ANSWER_LENGTH, DigitProblems, make_tokenizer
from digits_models import examine, make_model, teach, warm_up_and_decay, with_untrained_eye
from digits_report import write_figures, write_table
from digits_run import Clock, Run, seed_step
from torch import Generator, Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import Qwen3VLForConditionalGeneration

from steer_optim import Geometry, PCGrad, Steer, SteeredOptimizer, measure
from steer_optim.monitor import Monitor, scalars
from steer_optim.rules import Rule
from steer_optim.vlm import (
    DecomposedDistillation,
    Prompts,
    Rollout,
    angles_by_decile,
    rollout,
    score,
    text_only,
    token_losses,
)

COMPONENTS = ("std", "vis", "lang")  # what is measured under every method, whatever it trains on


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers of a run depend on."""

    seed: int
    device: str
    steps: int = 200
    batch_size: int = 64
    teacher_steps: int = 700
    reader_steps: int = 500
    eye_steps: int = 60
    held_out: int = 1000
    measure_every: int = 10
    refresh_every: int = 1
    gamma: float = 2.0
    lam: float = 0.01  # of vgs, the paper's form
    floor: float = 1e-3  # of vgs-frozen
    # For models tens of thousands of times smaller than the paper's, whose rate is 1e-6.
    lr: float = 1e-3
    weight_decay: float = 0.01


QUICK = {
    "steps": 6,
    "batch_size": 16,
    "teacher_steps": 20,
    "reader_steps": 20,
    "eye_steps": 4,
    "held_out": 50,
    "measure_every": 2,
}


class Method(NamedTuple):
    """The loss components, and the rule that weighs them."""

    losses: DecomposedDistillation
    rule: Rule


def methods(settings: Settings) -> dict[str, Method]:
    """What can be compared; docs/how-to-choose.md says when to take which."""
    paper = DecomposedDistillation("vgs", gamma=settings.gamma, lam=settings.lam)
    exact = DecomposedDistillation("exact", gamma=settings.gamma)
    losses = {
        "standard": DecomposedDistillation("standard"),
        "vgs-frozen": DecomposedDistillation("vgs-frozen", gamma=settings.gamma, floor=settings.floor),
        "vgs": paper,
        "vgs-adaptive": replace(paper, adaptive=True),
        "language": replace(paper, decomposition="language"),
    }
    steered = {name: Method(method, method.rule()) for name, method in losses.items()}
    return {**steered, "steer": Method(exact, Steer(toward="vis")), "pcgrad": Method(exact, PCGrad())}


class Job:
    """A run: its directory, its settings, and the problems to train and to test on."""

    def __init__(self, run: Run, settings: Settings) -> None:
        self.run, self.settings = run, settings
        self.tokenizer = make_tokenizer()
        self.training = DigitProblems(self.tokenizer, held_out=False, device=settings.device)
        test = DigitProblems(self.tokenizer, held_out=True, device=settings.device)
        chunk, generator = min(settings.held_out, 250), Generator().manual_seed(0)
        self.held_out = [test.draw(chunk, generator=generator) for _ in range(settings.held_out // chunk)]

    def distill(self, phase: str, method: Method) -> None:
        """Distils the teacher into a copy of the initial student; leaves it as ``phase``."""
        settings, teacher, student = self.settings, self.load("teacher"), self.load("student")
        prior = self.load("student").requires_grad_(False) if method.losses.prior == "frozen" else None
        adamw = torch.optim.AdamW(student.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        optimizer = SteeredOptimizer(adamw, method.rule, refresh_every=settings.refresh_every)
        steering, components, clock = Monitor(), Monitor(), Clock()
        state = {"student": student, "optimizer": optimizer}
        state |= {"steering": steering, "components": components, "clock": clock}
        steps = self.run.steps(phase, settings.steps, state)

        with SummaryWriter(self.run.path / "tensorboard" / phase, purge_step=steps.first) as log:
            for step in steps:
                if step % settings.measure_every == 0:
                    components.record(self.measure_components(student, teacher, step), step=step)

                seed_step(settings.seed, "distillation", step)
                with clock:
                    prompts, response = self.respond(student)
                    views = score(student, teacher, prompts, response, method=method.losses, prior=prior)
                    optimizer.zero_grad()
                    geometry = optimizer.backward_components(method.losses(views, response.scored_BT))
                    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                    optimizer.step()

                steering.record(geometry, step=step)
                for tag, value in scalars(geometry).items():
                    log.add_scalar(tag, value, step)
                log.flush()

        record: dict[str, Any] = {"seconds": fmean(clock.seconds)}
        for name, monitor in (("steering", steering), ("components", components)):
            # None where a step did not measure something: JSON has no NaN.
            record[name] = {
                key: [None if math.isnan(value) else value for value in values.tolist()]
                for key, values in monitor.history().items()
            }
        self.finish(phase, student, record)

    def supervise(self, phase: str, model: Qwen3VLForConditionalGeneration, *, steps: int, lr: float) -> None:
        """Teaches a model by right answers, with what of it requires grad; leaves it as ``phase``."""
        model.to(self.settings.device)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=self.settings.weight_decay)
        for step in self.run.steps(phase, steps, {"model": model, "optimizer": optimizer}):
            seed_step(self.settings.seed, phase, step)
            for group in optimizer.param_groups:
                group["lr"] = lr * warm_up_and_decay(step, steps)
            teach(model, optimizer, self.training, step=step, batch_size=self.settings.batch_size)
        self.finish(phase, model, {})

    def measure_components(
        self, student: Qwen3VLForConditionalGeneration, teacher: Qwen3VLForConditionalGeneration, step: int
    ) -> Geometry:
        """How the gradients of the components lie to each other on fresh rollouts, for any method."""
        seed_step(self.settings.seed, "components", step)
        losses, mask_BT = self.sampled_losses(student, teacher)
        means = {name: losses[name][mask_BT].mean() for name in COMPONENTS}
        return measure(means, student.parameters(), retain_graph=False)

    def measure_deciles(self, *, batches: int = 4) -> dict[str, list[float]]:
        """The angles between the components at the initial student, by decile of visual dependency."""
        teacher, student = self.load("teacher"), self.load("student")
        angles = dict.fromkeys(combinations(COMPONENTS, 2), 0.0)
        for batch in tqdm(range(batches), "angles by decile", disable=None):
            seed_step(self.settings.seed, "deciles", batch)
            losses, mask_BT = self.sampled_losses(student, teacher)
            components = {name: losses[name] for name in COMPONENTS}
            geometry = angles_by_decile(components, losses["vds"], mask_BT, student.parameters())
            angles = {pair: mean + geometry.angle(*pair) / batches for pair, mean in angles.items()}
        return {", ".join(pair): mean.tolist() for pair, mean in angles.items()}

    def sampled_losses(
        self, student: Qwen3VLForConditionalGeneration, teacher: Qwen3VLForConditionalGeneration
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses ``(B, T)`` of a batch of fresh rollouts, and their mask."""
        prompts, response = self.respond(student)
        views = score(student, teacher, prompts, response, method=DecomposedDistillation("vgs"), hidden_states=False)
        return token_losses(views), response.scored_BT

    def respond(self, student: Qwen3VLForConditionalGeneration) -> tuple[Prompts, Rollout]:
        """A batch of prompts, with the image and without, and what the student says to them."""
        prompt = self.training.draw(self.settings.batch_size).prompt
        response = rollout(student, prompt, max_new_tokens=ANSWER_LENGTH)
        return Prompts(prompt, text_only(prompt, student.config)), response

    def load(self, phase: str) -> Qwen3VLForConditionalGeneration:
        return self.run.load(phase).to(self.settings.device)

    def finish(self, phase: str, model: Qwen3VLForConditionalGeneration, record: dict[str, Any]) -> None:
        """Examines a trained model and keeps it."""
        held_out = tqdm(self.held_out, f"{phase} on held-out digits", disable=None)
        record["scores"] = scores = examine(model, self.tokenizer, held_out)
        self.run.finish(phase, model, self.tokenizer, record)
        print(f"{phase}: answer {scores['answer']:.1%}, perception {scores['perception']:.1%}", flush=True)

    def work(self, rules: list[str]) -> None:
        """All of it: the teacher, the initial student, each method, the table and the figures."""
        settings, run, seed = self.settings, self.run, self.settings.seed
        if run.lacks("teacher"):
            seed_step(seed, "teacher")
            model = make_model(self.tokenizer, hidden_size=64)
            self.supervise("teacher", model, steps=settings.teacher_steps, lr=2e-3)
        if run.lacks("reader"):
            seed_step(seed, "reader")
            model = make_model(self.tokenizer, hidden_size=32)
            self.supervise("reader", model, steps=settings.reader_steps, lr=2e-3)
        if run.lacks("student"):
            seed_step(seed, "student")
            model = with_untrained_eye(run.load("reader"))
            self.supervise("student", model, steps=settings.eye_steps, lr=1e-3)
        for name, method in methods(settings).items():
            if name in rules and run.lacks(f"student-{name}"):
                self.distill(f"student-{name}", method)

        teacher, initial = run.record("teacher"), run.record("student")
        compared = {name: run.record(f"student-{name}") for name in methods(settings) if run.has(f"student-{name}")}
        write_figures(run.path, compared, self.measure_deciles())
        write_table(run.path, {"teacher": teacher, "initial student": initial, **compared}, asdict(settings))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    names = list(methods(Settings(seed=0, device="cpu")))
    parser.add_argument("--rule", nargs="+", choices=names, default=["standard", "vgs-frozen"], help="methods to run")
    parser.add_argument("--steps", type=positive, help=f"steps of distillation ({Settings.steps})")
    parser.add_argument(
        "--refresh-every", type=positive, default=Settings.refresh_every, help="steps to each Gramian (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="the directory of the run (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: whether it works, no results")
    parser.add_argument("--fresh", action="store_true", help="delete what a former run left in --out")
    args = parser.parse_args()

    settings = Settings(args.seed, args.device)
    if args.quick:
        settings = replace(settings, **QUICK)
    settings = replace(settings, refresh_every=args.refresh_every)
    if args.steps:
        settings = replace(settings, steps=args.steps)
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device must be one that torch can use here; got {args.device!r}: {error}")
    try:
        run = Run(args.out, asdict(settings), fresh=args.fresh)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # on tensors this small threads cost more than they bring, and the numbers stay the same
    try:
        Job(run, settings).work(args.rule)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {args.out} has all that was finished; the same command goes on from there", file=sys.stderr
        )
        return 130
    return 0


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
