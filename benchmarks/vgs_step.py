"""A training step of Visual Gradient Steering beside one of standard distillation, part by part.

    python -m benchmarks.vgs_step                      # some minutes
    python -m benchmarks.vgs_step --settings digits    # seconds

Both are the loop of the README: the same code, the same prompts.
A step whose weights are known from an earlier one (``refresh_every``) is measured by itself, and a step every ``N`` of
which is exact is the mean over ``N`` steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch.nn.functional import pad

from benchmarks.common import forward_passes, parser, quartiles, table, take_turns, use_one_core, write
from benchmarks.vlm_models import SETTINGS, Setting, make
from steer_optim import SteeredOptimizer
from steer_optim.vlm import (
    DecomposedDistillation,
    Prompts,
    append_response,
    response_states,
    rollout,
    score,
    text_only,
)

STANDARD = "standard"
PARTS = ("rollout", "views", "student", "student, text only", "teacher", "teacher, text only", "losses", "backward")
PARTS += ("optimizer",)
REFRESH = (10, 50)
FOREVER = 10**9
Step = Callable[[], dict[str, float]]


class Stopwatch:
    """Seconds by part: each call ends one. Of the processor, since a part is too short to take turns with others."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = time.process_time()

    def __call__(self, part: str) -> None:
        now = time.process_time()
        self.seconds[part] = now - self._last
        self._last = now


def step(setting: Setting, method: DecomposedDistillation, *, refresh_every: int) -> Step:
    """A training step, as a call that returns the seconds of its parts."""
    teacher, student = setting.teacher, setting.student
    adamw = torch.optim.AdamW(student.parameters(), lr=1e-6)
    optimizer = SteeredOptimizer(adamw, method.rule(), refresh_every=refresh_every)
    text = method.decomposition != "standard"
    passes = {"student": student, "student, text only": student, "teacher": teacher, "teacher, text only": teacher}

    def run() -> dict[str, float]:
        prompt = setting.draw()
        mark = Stopwatch()
        sampled = rollout(student, prompt, max_new_tokens=setting.max_new_tokens)
        mark("rollout")
        prompts = Prompts(prompt, text_only(prompt, student.config) if text else {})
        mark("views")
        with forward_passes(mark, passes):
            views = score(student, teacher, prompts, sampled, method=method)
        losses = method(views, sampled.scored_BT)
        mark("losses")
        optimizer.zero_grad()
        optimizer.backward_components(losses)
        mark("backward")
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        mark("optimizer")
        return mark.seconds

    return run


def variants(setting: Setting) -> dict[str, Step]:
    vgs, without = DecomposedDistillation("vgs"), DecomposedDistillation("vgs", lam=0)
    return {
        STANDARD: step(setting, DecomposedDistillation("standard"), refresh_every=1),
        "VGS": step(setting, vgs, refresh_every=1),
        "VGS, weights known": step(setting, vgs, refresh_every=FOREVER),
        "VGS without lp": step(setting, without, refresh_every=1),
        "VGS without lp, weights known": step(setting, without, refresh_every=FOREVER),
    }


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """The seconds of every variant's parts, the variants taking turns, and their ratios to the standard step."""
    setting = make(name)
    parts: dict[str, list[dict[str, float]]] = {}

    def noted(variant: str, step: Step) -> Callable[[], None]:
        seconds = parts.setdefault(variant, [])

        def run() -> None:
            torch.manual_seed(len(seconds))  # the same prompts for every variant
            seconds.append(step())

        return run

    take_turns({variant: noted(variant, step) for variant, step in variants(setting).items()}, repeats=repeats)
    parts = {variant: rounds[-repeats:] for variant, rounds in parts.items()}
    for exact in ("VGS", "VGS without lp"):
        for N in REFRESH:
            pairs = zip(parts[exact], parts[f"{exact}, weights known"], strict=True)
            parts[f"{exact}, refresh_every={N}"] = [
                {part: (first[part] + (N - 1) * later[part]) / N for part in first} for first, later in pairs
            ]
    whole = {variant: [sum(parts.values()) for parts in rounds] for variant, rounds in parts.items()}
    rest = {variant: [sum(parts.values()) - parts["rollout"] for parts in rounds] for variant, rounds in parts.items()}
    return [
        {
            "setting": name,
            "variant": variant,
            "seconds": median(whole[variant]),
            "ratio": quartiles(whole[variant], whole[STANDARD]),
            "ratio without rollout": quartiles(rest[variant], rest[STANDARD]),
            "parts": {part: median(seconds[part] for seconds in rounds) for part in PARTS},
        }
        for variant, rounds in parts.items()
    ]


def teacher_passes(name: str, repeats: int) -> dict[str, Any]:
    """The teacher's two views in two passes, or in one that pads the view without the image to the other's length."""
    setting = make(name)
    prompt = setting.draw()
    sampled = rollout(setting.student, prompt, max_new_tokens=setting.max_new_tokens)
    T = sampled.response_BT.shape[1]
    image, bare = (
        append_response(view, sampled, setting.teacher.config)
        for view in (prompt, text_only(prompt, setting.teacher.config))
    )

    @torch.no_grad()
    def two() -> None:
        for view in (image, bare):
            response_states(setting.teacher, view, T)

    @torch.no_grad()
    def one() -> None:
        gap = image["input_ids"].shape[1] - bare["input_ids"].shape[1]
        both = image | {key: torch.cat([image[key], pad(value, (gap, 0))]) for key, value in bare.items()}
        response_states(setting.teacher, both, T)

    seconds = take_turns({"one": one, "two": two}, repeats=repeats)
    return {"setting": name, "one pass over two": quartiles(seconds["one"], seconds["two"])}


def markdown(result: Mapping[str, Any]) -> str:
    """For each setting: milliseconds of every part of a step, and what the step takes over the standard one."""
    lines = []
    for name, facts in result["settings"].items():
        rows = [row for row in result["rows"] if row["setting"] == name]
        head = [f"{name}, ms", *(row["variant"] for row in rows)]
        cells = [[part, *(f"{1e3 * row['parts'][part]:.1f}" for row in rows)] for part in PARTS]
        cells.append(["whole step", *(f"{1e3 * row['seconds']:.1f}" for row in rows)])
        cells.append(["÷ standard", *(f"{row['ratio'][1]:.2f}" for row in rows)])
        cells.append(["÷ standard, without rollout", *(f"{row['ratio without rollout'][1]:.2f}" for row in rows)])
        (passes,) = (row["one pass over two"] for row in result["teacher"] if row["setting"] == name)
        described = ", ".join(f"{key} {value:,}" for key, value in facts.items())
        lines += [table(head, cells), "", f"{name}: {described}."]
        lines += [
            f"The teacher's two views in one padded pass take {passes[1]:.2f} times as long as in two passes.",
            "",
        ]
    return "\n".join(lines).strip()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments.add_argument("--repeats", type=int, default=9)
    options = arguments.parse_args()
    use_one_core()
    result = {
        "repeats": options.repeats,
        "settings": {name: make(name).describe() for name in options.settings},
        "rows": [row for name in options.settings for row in measure(name, options.repeats)],
        "teacher": [teacher_passes(name, options.repeats) for name in options.settings],
    }
    write("vgs_step", result, options.results, partial=options.partial)
    print(markdown(result))


if __name__ == "__main__":
    main()
