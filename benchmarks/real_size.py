"""A step of Visual Gradient Steering at its real size: a Qwen3-VL-2B taught by an 8B, on a GPU, beside a standard step.

    python -m benchmarks.real_size           # on a GPU with 80 GB or more; minutes
    python -m benchmarks.real_size --tiny    # the program itself on a CPU, in seconds; writes no result

The models are built from the public configurations of Qwen3-VL-2B-Instruct and 8B-Instruct, with random weights in
bfloat16: what a step costs depends on shapes and lengths only. A prompt has one image of 1024 visual tokens and 64 of
text, a response 512. The rollout is the same for every variant, and measured by itself.

Dimensions: ``B`` prompts, ``L`` prompt tokens, ``T`` response tokens.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from benchmarks import common
from steer_optim import SteeredOptimizer
from steer_optim.vlm import DecomposedDistillation, Prompts, Rollout, rollout, score, text_only

GIB = 2**30
PARTS = ("views", "student", "student, text only", "teacher", "teacher, text only", "losses", "backward", "optimizer")
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
    return Size(teacher, student, grid=64, text_tokens=64, response_tokens=512)


def tiny() -> Size:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "max_position_embeddings": 128}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    student, teacher = (config(text, vision, tied=tied, sections=[4, 2, 2], **ids) for tied in (True, False))
    return Size(teacher, student, grid=4, text_tokens=6, response_tokens=5)


def build(config: Qwen3VLConfig, device: torch.device) -> Qwen3VLForConditionalGeneration:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):  # random numbers are drawn where the weights are
            return Qwen3VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)


def draw(size: Size, prompts: int, device: torch.device) -> dict[str, Tensor]:
    """Prompts of one image and some random text, as the processor would give them."""
    ids, vision = size.student, size.student.vision_config
    visual = (size.grid // vision.spatial_merge_size) ** 2
    image = torch.tensor([ids.vision_start_token_id, *[ids.image_token_id] * visual, ids.vision_end_token_id])
    plain_ids = min(ids.image_token_id, ids.vision_start_token_id)
    text_BL = torch.randint(1, plain_ids, (prompts, size.text_tokens))
    input_ids_BL = torch.cat([image.expand(prompts, -1), text_BL], dim=1)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    batch = {
        "input_ids": input_ids_BL,
        "attention_mask": torch.ones_like(input_ids_BL),
        "mm_token_type_ids": (input_ids_BL == ids.image_token_id).long(),
        "pixel_values": torch.randn(prompts * size.grid**2, patch, dtype=torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, size.grid, size.grid]]).repeat(prompts, 1),
    }
    return {name: x.to(device) for name, x in batch.items()}


class Bench:
    """Two models, one batch with its responses, and the steps that are compared on them."""

    def __init__(self, size: Size, *, prompts: int, device: torch.device, checkpointing: bool) -> None:
        torch.manual_seed(0)
        self.size, self.device = size, device
        self.teacher = build(size.teacher, device).eval().requires_grad_(False)
        self.student = build(size.student, device).train()
        if checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
        self.inner = torch.optim.AdamW(self.student.parameters(), lr=1e-6)
        self.prompt = draw(size, prompts, device)
        self.sampled: Rollout

    def roll_out(self) -> None:
        self.sampled = rollout(
            self.student, self.prompt, max_new_tokens=self.size.response_tokens, eos_ids=(), pad_id=0
        )

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def step(self, method: DecomposedDistillation, *, refresh_every: int = 1) -> Callable[[], dict[str, Any]]:
        """A training step, as a call that returns the seconds of its parts, its syncs and its peak of memory."""
        plain = method.decomposition == "standard"
        steered = None if plain else SteeredOptimizer(self.inner, method.rule(), refresh_every=refresh_every)

        def update(components: dict[str, Tensor]) -> None:
            if steered is None:
                components["std"].backward()
            else:
                steered.backward_components(components)

        def run() -> dict[str, Any]:
            seconds = dict.fromkeys(PARTS, 0.0)
            self.synchronise()
            last = time.perf_counter()

            def done(part: str) -> None:
                nonlocal last
                self.synchronise()
                now = time.perf_counter()
                seconds[part], last = now - last, now

            resident = 0
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
                resident = torch.cuda.memory_allocated(self.device)
            prompts = Prompts(self.prompt, {} if plain else text_only(self.prompt, self.student.config))
            done("views")
            with common.forward_passes(done, student=self.student, teacher=self.teacher):
                views = score(self.student, self.teacher, prompts, self.sampled, method=method)
            components = method(views, self.sampled.scored_BT)
            done("losses")
            self.inner.zero_grad()
            syncs = count_syncs(lambda: update(components), self.device)
            done("backward")
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            syncs += count_syncs(self.inner.step if steered is None else steered.step, self.device)
            done("optimizer")
            peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
            return {"parts": seconds, "syncs": syncs, "peak": peak, "resident": resident}

        return run

    def variants(self) -> dict[str, Callable[[], dict[str, Any]]]:
        vgs, without = DecomposedDistillation("vgs"), DecomposedDistillation("vgs", lam=0)
        return {
            "standard": self.step(DecomposedDistillation("standard")),
            "VGS": self.step(vgs),
            "VGS, weights known": self.step(vgs, refresh_every=FOREVER),
            "VGS without lp": self.step(without),
            "VGS without lp, weights known": self.step(without, refresh_every=FOREVER),
        }


def count_syncs(run: Callable[[], object], device: torch.device) -> int:
    """How many times the host waits for the GPU while ``run`` runs."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def measure(bench: Bench, *, repeats: int) -> list[dict[str, Any]]:
    """A row per variant: medians of its parts, the variants taking turns."""
    rounds: dict[str, list[dict[str, Any]]] = {}

    def noted(name: str, step: Callable[[], dict[str, Any]]) -> Callable[[], None]:
        runs = rounds.setdefault(name, [])
        return lambda: runs.append(step())

    # The round that warms up takes the weights that are known from then on.
    common.take_turns({name: noted(name, step) for name, step in bench.variants().items()}, repeats=repeats)
    parts = {name: [run["parts"] for run in runs[1:]] for name, runs in rounds.items()}
    for exact in ("VGS", "VGS without lp"):
        pairs = list(zip(parts[exact], parts[f"{exact}, weights known"], strict=True))
        name = f"{exact}, refresh_every={REFRESH}"
        parts[name] = [{p: (a[p] + (REFRESH - 1) * b[p]) / REFRESH for p in PARTS} for a, b in pairs]
    whole = {name: [sum(run.values()) for run in runs] for name, runs in parts.items()}
    rows = []
    for name, runs in parts.items():
        row = {
            "variant": name,
            "parts": {part: statistics.median(run[part] for run in runs) for part in PARTS},
            "seconds": statistics.median(whole[name]),
            "ratio without rollout": common.quartiles(whole[name], whole["standard"]),
        }
        if name in rounds:
            row |= {key: max(run[key] for run in rounds[name][1:]) for key in ("syncs", "peak", "resident")}
        rows.append(row)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """Seconds of every part, the whole with the rollout, memory and synchronisations."""
    rows = result["rows"]
    roll_out = result["rollout seconds"]
    standard = rows[0]["seconds"]
    cells = [[f"{part}, ms", *(f"{1e3 * row['parts'][part]:.0f}" for row in rows)] for part in PARTS]
    cells += [
        ["step without rollout, ms", *(f"{1e3 * row['seconds']:.0f}" for row in rows)],
        ["÷ standard, without rollout", *(f"{row['ratio without rollout'][1]:.2f}" for row in rows)],
        ["÷ standard, with rollout", *(f"{(row['seconds'] + roll_out) / (standard + roll_out):.2f}" for row in rows)],
        ["peak memory, GiB", *(f"{row['peak'] / GIB:.1f}" if "peak" in row else "–" for row in rows)],
        ["of it before the step, GiB", *(f"{row['resident'] / GIB:.1f}" if "peak" in row else "–" for row in rows)],
        ["host syncs of backward and step", *(str(row.get("syncs", "–")) for row in rows)],
    ]
    return common.table(["", *(row["variant"] for row in rows)], cells)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="on a CPU, for a test of the program itself")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="of the student's activations")
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        raise SystemExit("real_size needs a GPU: there is none here. --tiny runs the program itself on a CPU")
    device = torch.device("cpu" if options.tiny else "cuda")
    size = tiny() if options.tiny else real()
    bench = Bench(size, prompts=options.prompts, device=device, checkpointing=options.checkpointing)
    counts = {
        name: sum(p.numel() for p in getattr(bench, name).parameters())  # tied ones count once
        for name in ("teacher", "student")
    }
    print(*(f"{name}: {count:,} parameters" for name, count in counts.items()), sep=", ", flush=True)

    bench.roll_out()  # warms up
    seconds = common.take_turns({"rollout": bench.roll_out}, repeats=1, warm_up=0, synchronise=bench.synchronise)
    result = {
        "parameters": counts,
        "prompts": options.prompts,
        "prompt tokens": bench.prompt["input_ids"].shape[1],
        "response tokens": bench.sampled.response_BT.shape[1],
        "checkpointing": options.checkpointing,
        "repeats": options.repeats,
        "rollout seconds": seconds["rollout"][0],
        "rows": measure(bench, repeats=options.repeats),
    }
    if not options.tiny:
        common.write("real_size", result, options.results, partial=options.partial)
    print(markdown(result))


if __name__ == "__main__":
    main()
