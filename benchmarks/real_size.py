"""A step of Visual Gradient Steering at its real size: a Qwen3-VL-2B taught by an 8B, on a GPU, beside a standard step.

    python -m benchmarks.real_size                   # on a GPU with 80 GB or more; two minutes
    python -m benchmarks.real_size --student lora    # adapters (r = 16) on the attention projections
    python -m benchmarks.real_size --tiny            # the program itself, also on a CPU; seconds, writes no result

The models are built from the public configurations of Qwen3-VL-2B-Instruct and 8B-Instruct, with random weights: what a
step costs depends on shapes and lengths only. As the README advises, the trained weights are float32 under bfloat16
autocast, layers are checkpointed, and the losses read hidden states. Teacher and prior are bfloat16, and so is the
frozen student below adapters. A prompt has one image of 1024 visual tokens and 64 of text, a response 512.

The rollout is the same for every method. It is estimated from two short ones. Where a method runs out of memory, it and
its standard step are measured again with half as many prompts.

Dimensions: ``B`` prompts, ``L`` prompt tokens, ``T`` response tokens.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks import common
from benchmarks.host_reads import syncs
from benchmarks.step_memory import adapted
from steer_optim import SteeredOptimizer
from steer_optim.vlm import DecomposedDistillation, Prompts, Rollout, rollout, score, text_only

GIB = 2**30
VIEWS = ("student", "student_text", "prior", "teacher", "teacher_text")
PARTS = ("text prompts", *VIEWS, "losses", "backward", "optimizer")
STUDENTS = ("full", "lora")
METHODS = {"vgs-frozen": 2, "vgs": 2}  # backward passes of an exact step through the view with the image
FOREVER = 10**9
REFRESH = 10
IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
IDS |= {"vision_end_token_id": 151653}


@dataclass(frozen=True)
class Size:
    """The models and the lengths."""

    teacher: Qwen3VLConfig
    student: Qwen3VLConfig
    grid: int  # an image has grid x grid patches, and a quarter as many visual tokens
    text_tokens: int
    response_tokens: int
    rollouts: tuple[int, int]  # tokens of the two that are measured


def config(
    text: dict[str, int], vision: dict[str, Any], *, tied: bool, sections: list[int], **ids: int
) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config={**text, "rope_parameters": rope, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied},
        vision_config={**vision, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2},
        tie_word_embeddings=tied,
        **ids,
    )


def real() -> Size:
    shared = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 262144}
    options = {"sections": [24, 20, 20], **IDS}
    student = config(
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, **shared},
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        tied=True,
        **options,
    )
    teacher = config(
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, **shared},
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        tied=False,
        **options,
    )
    return Size(teacher, student, grid=64, text_tokens=64, response_tokens=512, rollouts=(8, 40))


def tiny() -> Size:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 128}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    student = config(text, vision, tied=True, sections=[4, 2, 2], **ids)
    wider = {"intermediate_size": 64}  # no part of the teacher has the size of one of the student
    teacher = config(text | wider, vision | wider, tied=False, sections=[4, 2, 2], **ids)
    return Size(teacher, student, grid=4, text_tokens=6, response_tokens=5, rollouts=(2, 4))


class Patches(nn.Conv3d):
    """The product of patches and weights that this convolution is: cuDNN needs seconds for it in bfloat16.

    https://github.com/pytorch/pytorch/issues/174051
    """

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1), self.weight.flatten(1), self.bias)


def build(config: Qwen3VLConfig, device: torch.device, dtype: torch.dtype) -> Qwen3VLForConditionalGeneration:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):  # random numbers are drawn where the weights are
            model = Qwen3VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.__class__ = Patches
    return model


def draw(size: Size, prompts: int, device: torch.device) -> tuple[dict[str, Tensor], Rollout]:
    """Prompts of one image and some random text, as the processor would give them, and responses."""
    ids, vision = size.student, size.student.vision_config
    visual = (size.grid // vision.spatial_merge_size) ** 2
    image = torch.tensor([ids.vision_start_token_id, *[ids.image_token_id] * visual, ids.vision_end_token_id])
    plain_ids = min(ids.image_token_id, ids.vision_start_token_id)
    text_BL, response_BT = (
        torch.randint(1, plain_ids, (prompts, length)) for length in (size.text_tokens, size.response_tokens)
    )
    input_ids_BL = torch.cat([image.expand(prompts, -1), text_BL], dim=1)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    batch = {
        "input_ids": input_ids_BL,
        "attention_mask": torch.ones_like(input_ids_BL),
        "mm_token_type_ids": (input_ids_BL == ids.image_token_id).long(),
        "pixel_values": torch.randn(prompts * size.grid**2, patch),
        "image_grid_thw": torch.tensor([[1, size.grid, size.grid]]).repeat(prompts, 1),
    }
    response_BT = response_BT.to(device)
    sampled = Rollout(response_BT, torch.ones_like(response_BT, dtype=torch.bool))
    return {name: x.to(device) for name, x in batch.items()}, sampled


class Bench:
    """The models, one batch with its responses, and the steps that are compared on them."""

    def __init__(self, size: Size, *, lora: bool, prompts: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.size, self.device = size, device
        self.teacher = build(size.teacher, device, torch.bfloat16).eval().requires_grad_(False)
        self.prior = None if lora else build(size.student, device, torch.bfloat16).eval().requires_grad_(False)
        self.student = build(size.student, device, torch.bfloat16 if lora else torch.float32).train()
        with warnings.catch_warnings():  # transformers 5.13 has another name for it, and 5.0 only this one
            warnings.simplefilter("ignore", FutureWarning)
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        if lora:
            self.student = adapted(self.student)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        # Not foreach, the default: its temporaries are as large as a set of gradients.
        self.inner = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        self.draw(prompts)

    def draw(self, prompts: int) -> None:
        self.prompt, self.sampled = draw(self.size, prompts, self.device)

    def counts(self) -> dict[str, int]:
        """Numbers of parameters; tied ones count once."""
        models = {"teacher": self.teacher, "student": self.student}
        found = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
        return {**found, "trained": sum(p.numel() for group in self.inner.param_groups for p in group["params"])}

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def rollout_seconds(self) -> float:
        """Of the whole response, by the two that are measured after one that warms up."""
        seconds = []
        for tokens in (self.size.rollouts[0], *self.size.rollouts):
            self.synchronise()
            start = time.perf_counter()
            with self.autocast():
                rollout(self.student, self.prompt, max_new_tokens=tokens, eos_ids=(), pad_id=0)
            self.synchronise()
            seconds.append(time.perf_counter() - start)
        few, many = self.size.rollouts
        a_token = (seconds[2] - seconds[1]) / (many - few)
        return seconds[2] + (self.size.response_tokens - many) * a_token

    def step(self, method: DecomposedDistillation, *, refresh_every: int = 1) -> Callable[[], dict[str, Any]]:
        """A training step, as a call that returns the seconds, synchronizations and peak of memory of its parts."""
        plain = method.decomposition == "standard"
        steered = None if plain else SteeredOptimizer(self.inner, method.rule(), refresh_every=refresh_every)
        cuda = self.device.type == "cuda"

        def run() -> dict[str, Any]:
            parts: dict[str, dict[str, float]] = {}
            self.synchronise()
            resident = torch.cuda.memory_allocated(self.device) if cuda else 0
            last, waited = time.perf_counter(), 0
            with syncs(self.device) as count:

                def done(part: str) -> None:
                    nonlocal last, waited
                    self.synchronise()
                    now, so_far = time.perf_counter(), count()
                    peak = torch.cuda.max_memory_allocated(self.device) if cuda else 0
                    parts[part] = {"seconds": now - last, "syncs": so_far - waited, "peak": peak}
                    if cuda:
                        torch.cuda.reset_peak_memory_stats(self.device)
                    last, waited = time.perf_counter(), so_far

                if cuda:
                    torch.cuda.reset_peak_memory_stats(self.device)
                prompts = Prompts(self.prompt, {} if plain else text_only(self.prompt, self.student.config))
                done("text prompts")
                models = {"student": self.student, "student_text": self.student, "prior": self.prior or self.student}
                models |= {"teacher": self.teacher, "teacher_text": self.teacher}
                with self.autocast(), common.forward_passes(done, {view: models[view] for view in method.views}):
                    views = score(self.student, self.teacher, prompts, self.sampled, method=method, prior=self.prior)
                components = method(views, self.sampled.scored_BT)
                del views
                done("losses")
                self.inner.zero_grad()
                if steered is None:
                    components.pop("std").backward()
                else:
                    steered.backward_components(components)
                del components
                done("backward")
                torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
                (self.inner if steered is None else steered).step()
                done("optimizer")
            self.inner.zero_grad()
            return {"parts": parts, "resident": resident}

        return run


def measure(bench: Bench, *, repeats: int, save: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    """A row per variant: medians of its parts. ``save`` gets all rows after every round."""
    rows: list[dict[str, Any]] = []
    for name in METHODS:
        if "prior" not in DecomposedDistillation(name).views:
            bench.prior = None
        while True:
            try:
                for runs in rounds(bench, name, repeats=repeats):
                    found = summary(name, runs)
                    save(rows + found)
                rows += found
                break
            except torch.OutOfMemoryError as error:
                print(f"{name}: {error}", flush=True)
            prompts = len(bench.sampled.response_BT) // 2
            if not prompts:
                break
            bench.inner.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
            bench.draw(prompts)
    return rows


def rounds(bench: Bench, name: str, *, repeats: int) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """What the steps of a method and the standard step have taken so far, after each round of turns."""
    method = DecomposedDistillation(name)
    steps = {
        "standard": bench.step(DecomposedDistillation("standard")),
        name: bench.step(method),
        f"{name}, weights known": bench.step(method, refresh_every=FOREVER),
    }
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in steps}
    order = random.Random(0)
    # The first round warms up and takes the weights that are known from then on; the second reads whether they may be.
    for repeat in range(-2, repeats):
        for variant in order.sample(list(steps), len(steps)):
            found = steps[variant]()
            gc.collect()
            if repeat >= 0:
                runs[variant].append({**found, "prompts": len(bench.sampled.response_BT)})
        if repeat >= 0:
            yield runs


def summary(method: str, runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of a method, also with one exact step in ``REFRESH``, and of the standard step beside it."""
    seconds = {v: [{p: x["seconds"] for p, x in run["parts"].items()} for run in mine] for v, mine in runs.items()}
    pairs = zip(seconds[method], seconds[f"{method}, weights known"], strict=True)
    seconds[f"{method}, refresh_every={REFRESH}"] = [
        {part: (a[part] + (REFRESH - 1) * b[part]) / REFRESH for part in a} for a, b in pairs
    ]
    whole = {variant: [sum(run.values()) for run in mine] for variant, mine in seconds.items()}
    rows = []
    for variant, mine in seconds.items():
        row: dict[str, Any] = {"method": method, "variant": variant, "seconds": statistics.median(whole[variant])}
        row["parts"] = {part: statistics.median(run[part] for run in mine) for part in mine[0]}
        row["ratio without rollout"] = common.quartiles(whole[variant], whole["standard"])
        if steps := runs.get(variant):
            row |= {key: steps[0][key] for key in ("prompts", "resident")}
            for key in ("syncs", "peak"):
                row[key] = {part: max(step["parts"][part][key] for step in steps) for part in mine[0]}
        rows.append(row)
    plain = next(row["syncs"] for row in rows if row["variant"] == "standard")
    for row in rows:
        if "syncs" in row:  # a vision tower waits in every backward pass that recomputes it
            passes = METHODS[method] if row["variant"] == method else 1
            row["own syncs"] = sum(row["syncs"][x] - n * plain[x] for x, n in (("backward", passes), ("optimizer", 1)))
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Milliseconds of every part and their ratio to the standard step's, the whole, memory and synchronizations."""
    rows = [row for row in result["rows"] if row["variant"] != "standard" or row["method"] == next(iter(METHODS))]
    standard = {row["method"]: row for row in result["rows"] if row["variant"] == "standard"}
    roll_out = result["rollout seconds"]

    def part(row: dict[str, Any], name: str) -> str:
        mine, other = row["parts"].get(name), standard[row["method"]]["parts"].get(name)
        beside = f" ({mine / other:.2f})" if mine and other and row["variant"] != "standard" else ""
        return "–" if mine is None else f"{1e3 * mine:,.0f}{beside}"

    def with_rollout(row: dict[str, Any]) -> str:
        return f"{(row['seconds'] + roll_out) / (standard[row['method']]['seconds'] + roll_out):.2f}"

    def waits(row: dict[str, Any], *parts: str) -> str:
        return str(sum(row["syncs"].get(part, 0) for part in parts))

    measured: dict[str, Callable[[dict[str, Any]], str]] = {
        "prompts": lambda row: str(row["prompts"]),
        "peak memory, GiB": lambda row: f"{max(row['peak'].values()) / GIB:.1f}",
        "the peak is in": lambda row: max(row["peak"], key=row["peak"].get),
        "memory between two steps, GiB": lambda row: f"{row['resident'] / GIB:.1f}",
        "host synchronizations: prompts and passes": lambda row: waits(row, "text prompts", *VIEWS),
        "host synchronizations: losses": lambda row: waits(row, "losses"),
        "host synchronizations: backward and optimizer": lambda row: waits(row, "backward", "optimizer"),
        "beyond those of as many plain passes": lambda row: str(row["own syncs"]),
    }
    cells = [[f"{name}, ms", *(part(row, name) for row in rows)] for name in PARTS]
    cells += [
        ["step without rollout, ms", *(f"{1e3 * row['seconds']:,.0f}" for row in rows)],
        ["÷ standard, without rollout", *(f"{row['ratio without rollout'][1]:.2f}" for row in rows)],
        ["÷ standard, with rollout", *map(with_rollout, rows)],
        *([name, *(of(row) if "peak" in row else "–" for row in rows)] for name, of in measured.items()),
    ]
    table = common.table([result["student"], *(row["variant"] for row in rows)], cells)
    sizes = ", ".join(f"{name} {count / 1e9:.2f} B" for name, count in result["parameters"].items())
    return (
        f"{table}\n\nPrompts of {result['prompt tokens']:,} tokens, responses of {result['response tokens']}; "
        f"parameters: {sizes}. A rollout of {result['prompts']} prompts by `generate` takes {roll_out:.1f} s."
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny models: a test of the program itself")
    parser.add_argument("--student", choices=STUDENTS, default="full", help="what is trained")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        raise SystemExit("real_size needs a GPU: there is none here. --tiny runs the program itself on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(
        tiny() if options.tiny else real(), lora=options.student == "lora", prompts=options.prompts, device=device
    )
    result: dict[str, Any] = {
        "student": options.student,
        "parameters": bench.counts(),
        "prompts": options.prompts,
        "prompt tokens": bench.prompt["input_ids"].shape[1],
        "response tokens": bench.sampled.response_BT.shape[1],
        "rollout seconds": bench.rollout_seconds(),
    }
    print(result, flush=True)

    def save(rows: list[dict[str, Any]]) -> None:
        result["rows"] = rows
        if not options.tiny:
            common.write(f"real_size_{options.student}", result, options.results, partial=options.partial)

    measure(bench, repeats=options.repeats, save=save)
    print(markdown(result))


if __name__ == "__main__":
    main()
