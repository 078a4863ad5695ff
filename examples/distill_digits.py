"""Visual Gradient Steering on two cores: on-policy distillation of a tiny vision-language model, with and without it.

A teacher learns to answer questions about handwritten digits; a smaller student knows the language of the answers
and has an eye that has hardly learned to see. Then `python -m steer_optim.vlm.train` distils the teacher into the
student, once per method, from the same start, over the same prompts, for the same number of steps:

    python examples/distill_digits.py                       # standard distillation and VGS, some minutes
    python examples/distill_digits.py --rule vgs            # one more, beside what runs/digits has
    python examples/distill_digits.py --quick --out runs/quick
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars, load_dataset
from digits import checkpoints, report
from digits.models import Problems, answer_loss, greedy_answers
from digits.task import ANSWER_LENGTH, grade
from transformers import AutoProcessor, LlavaForConditionalGeneration

from steer_optim.vlm import DecomposedDistillation, angles_by_decile, rollout, score, token_losses

METHODS = {
    "standard": ["--decomposition", "standard"],
    "vgs-frozen": ["--decomposition", "vgs-frozen"],
    "vgs": ["--decomposition", "vgs"],
    "reweighting": ["--decomposition", "tokens"],
    "language": ["--decomposition", "language"],
    "steer": ["--decomposition", "exact", "--rule", 'Steer("vis")'],
    "pcgrad": ["--decomposition", "exact", "--rule", "PCGrad()"],
}
COMPONENTS = ("std", "vis", "lang")


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers of a run depend on."""

    seed: int
    rows: int = 12_800  # of training data, for distillation to see each prompt once
    steps: int = 200
    batch_size: int = 64
    teacher_steps: int = 700
    reader_steps: int = 500
    student_steps: int = 60
    held_out: int = 1000
    # For models tens of thousands of times smaller than the paper's, whose rate is 1e-6.
    lr: float = 1e-3


QUICK = {"rows": 500, "steps": 6, "batch_size": 16, "held_out": 50}
QUICK |= {"teacher_steps": 20, "reader_steps": 20, "student_steps": 4}


def command(out: Path, method: str, settings: Settings) -> list[str]:
    """What a user calls."""
    options = {
        "model_name_or_path": out / "student",
        "teacher_model_name_or_path": out / "teacher",
        "dataset_name": out / "data",
        "output_dir": out / f"student-{method}",
        "bf16": False,
        "activation_checkpointing": False,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "max_completion_length": ANSWER_LENGTH,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "constant",
        "refresh_every": 1,
        "seed": settings.seed,
        "held_out": settings.held_out,
        "per_device_eval_batch_size": 250,
        "logging_steps": max(1, settings.steps // 20),
        "save_steps": 50,
        "save_total_limit": 1,
        "report_to": "none",
    }
    pairs = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "steer_optim.vlm.train", *pairs, *METHODS[method]]


@torch.no_grad()
def scores(path: Path, problems: Problems) -> dict[str, float]:
    """How well a model does on held-out problems, by the answers that its run has left where there are some."""
    model = LlavaForConditionalGeneration.from_pretrained(path)
    if (file := path / "answers.jsonl").exists():
        responses = [json.loads(line)["with_image"] for line in file.read_text().splitlines()]
    else:
        responses = greedy_answers(model, AutoProcessor.from_pretrained(path), problems)
    answer, perception = grade(responses, problems.answers)
    prompts, answers = problems[:]
    return {
        "answer": answer,
        "perception": perception,
        "text_loss": float(answer_loss(model, prompts.text, answers)),
    }


def deciles(out: Path, problems: Problems, settings: Settings, *, batches: int = 4) -> dict[str, list[float]]:
    """The angles between the components at the initial student, by decile of visual dependency."""
    teacher, student = (LlavaForConditionalGeneration.from_pretrained(out / name) for name in ("teacher", "student"))
    angles = dict.fromkeys(combinations(COMPONENTS, 2), 0.0)
    for batch in range(batches):
        torch.manual_seed(batch)
        prompts, _ = problems[torch.randint(len(problems.answers), (settings.batch_size,))]
        response = rollout(student, prompts, max_new_tokens=ANSWER_LENGTH)
        views = score(student, teacher, prompts, response, method=DecomposedDistillation("vgs"), hidden_states=False)
        losses = token_losses(views)
        components = {name: losses[name] for name in COMPONENTS}
        geometry = angles_by_decile(components, losses["vds"], response.scored_BT, student.parameters())
        angles = {pair: mean + geometry.angle(*pair) / batches for pair, mean in angles.items()}
    return {", ".join(pair): mean.tolist() for pair, mean in angles.items()}


def claim(out: Path, settings: Settings, *, fresh: bool) -> None:
    """Make the directory of a run, or find it; refuse one with other settings, or with something else in it."""
    file = out / "settings.json"
    if out.exists() and not file.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run (it has no settings.json): choose another --out")
    if fresh and out.exists():
        shutil.rmtree(out)
    if file.exists() and (found := json.loads(file.read_text())) != asdict(settings):
        raise ValueError(f"{out} holds a run with other settings, {found}: choose another --out, or add --fresh")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(settings), indent=2) + "\n")


def work(out: Path, settings: Settings, methods: list[str]) -> None:
    """All of it: the data and the checkpoints, each method, the table and the figures."""
    checkpoints.make(out, **{name: value for name, value in asdict(settings).items() if name not in ("steps", "lr")})
    for method in methods:
        if not (out / f"student-{method}" / "answers.jsonl").exists():
            subprocess.run(command(out, method, settings), check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    finished = {name: out / f"student-{name}" for name in METHODS if (out / f"student-{name}/answers.jsonl").exists()}
    runs = {name: report.history(path) for name, path in finished.items()}
    test = Problems(AutoProcessor.from_pretrained(out / "teacher"), load_dataset(str(out / "data"), split="test"))
    rows = {"teacher": report.row(scores(out / "teacher", test))}
    rows["initial student"] = report.row(scores(out / "student", test))
    rows |= {name: report.row(scores(path, test), runs[name]) for name, path in finished.items()}
    if runs:
        report.write_figures(out, runs, deciles(out, test, settings))
    report.write_table(out, rows, asdict(settings))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    methods = ["standard", "vgs-frozen"]
    parser.add_argument("--rule", nargs="*", choices=list(METHODS), default=methods, help="methods to run")
    parser.add_argument("--steps", type=int, help=f"steps of distillation ({Settings.steps})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"), help="the directory of the run (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: whether it works, no results")
    parser.add_argument("--fresh", action="store_true", help="delete what a former run left in --out")
    args = parser.parse_args()
    settings = replace(Settings(args.seed), **(QUICK if args.quick else {}))
    if args.steps:
        settings = replace(settings, steps=args.steps)
    try:
        claim(args.out, settings, fresh=args.fresh)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # on tensors this small threads cost more than they bring, and the numbers stay the same
    try:
        work(args.out, settings, args.rule)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command goes on from what {args.out} has", file=sys.stderr)
        return 130
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
