"""Visual Gradient Steering in a training loop of your own: `python -m steer_optim.vlm.train` without TRL's trainer.

The defaults are what `python examples/distill_digits.py` has made.
"""

import argparse
import copy
from itertools import islice

import torch
from datasets import load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from steer_optim import SteeredOptimizer
from steer_optim.vlm import DecomposedDistillation, render, rollout, score
from steer_optim.vlm.data import Rows, answer, conversation

DEFAULTS = {name: f"runs/digits/{name}" for name in ("student", "teacher", "data")} | {"out": "runs/plain-loop"}
DEFAULTS |= {"steps": 200, "batch-size": 64, "max-new-tokens": 9, "lr": 1e-3}  # the paper's rate is 1e-6
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in DEFAULTS.items():
    parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
args = parser.parse_args()
torch.manual_seed(0)
device, load = "cuda" if torch.cuda.is_available() else "cpu", AutoModelForImageTextToText.from_pretrained
autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
processor = AutoProcessor.from_pretrained(args.student)
train, test = (Rows(load_dataset(args.data, split=split)) for split in ("train", "test"))
student = load(args.student, dtype=torch.float32).to(device).train()  # bfloat16 would round small updates away
prior = copy.deepcopy(student).eval().requires_grad_(False)
teacher = load(args.teacher, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
method = DecomposedDistillation("vgs-frozen", gamma=2.0)
optimizer = SteeredOptimizer(torch.optim.AdamW(student.parameters(), lr=args.lr), method.rule(), refresh_every=10)


def prompts_of(rows):
    return render(processor, [conversation(row) for row in rows]).to(device)


loader = torch.utils.data.DataLoader(train, args.batch_size, shuffle=True, collate_fn=list)
for step, rows in enumerate(islice(loader, args.steps)):
    prompts = prompts_of(rows)
    with autocast:
        response = rollout(student, prompts, max_new_tokens=args.max_new_tokens)
    with autocast:  # anew: before torch 2.11 it keeps weights that were cast without gradients
        views = score(student, teacher, prompts, response, method=method, prior=prior)
    optimizer.zero_grad()
    geometry = optimizer.backward_components(method(views, response.scored_BT))
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    if geometry.age == 0:
        print(f"step {step}: std and vis {geometry.angle('std', 'vis'):.0f} degrees apart, losses", geometry.losses)

student.save_pretrained(args.out)
processor.save_pretrained(args.out)
rows = [test[i] for i in range(min(200, len(test)))]
with autocast:
    response = rollout(student, prompts_of(rows), max_new_tokens=args.max_new_tokens, temperature=0)
said = processor.batch_decode(response.response_BT, skip_special_tokens=True)
print(sum(text == answer(row) for text, row in zip(said, rows, strict=True)), "of", len(rows), "answers are right")
