"""What the losses, and a whole step of Visual Gradient Steering, hold at their peak: what grows, and with which size.

    python -m benchmarks.step_memory                                # all paths; half an hour
    python -m benchmarks.step_memory --paths "losses from states"   # one of them

A path is measured in child processes on small models of several sizes, by the allocator's events, and its peaks are
fitted as sums of multiples of what they can consist of: a hidden state per token and layer, the logits of a chunk, the
head, a set of gradients. The same multiples and the sizes of a real run give what it would hold: extrapolated.

The models are language models (Qwen3) in the proportions of Qwen3-VL, without a vision tower: float32 under bfloat16
autocast.

Dimensions: ``N`` response tokens, ``M`` tokens that pass the student's layers in both views, prompts included, ``V``
vocabulary entries, ``d`` hidden size, ``L`` layers, ``w`` parameters of a layer, ``C`` rows of a chunk, ``c`` rows of a
block of it, ``R`` processes.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import common, memory_model
from benchmarks.memory_model import HELD_OUT, TOKENS, Sizes
from steer_optim import SteeredOptimizer
from steer_optim.vlm import DecomposedDistillation, Head, HiddenStates, Rollout, score, visual_dependency, visual_tokens
from steer_optim.vlm.prompts import Prompts


def language_model(V: int, d: int, L: int, *, tied: bool) -> nn.Module:
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=d,
        intermediate_size=3 * d,
        num_hidden_layers=L,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=d // 4,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Qwen3ForCausalLM(config)


def adapted(student: nn.Module) -> nn.Module:
    """The student with adapters of rank 16 on the attention projections, which are float32."""
    from peft import LoraConfig, get_peft_model

    projections = [f"{name}_proj" for name in "qkvo"]
    with warnings.catch_warnings():  # peft reads what transformers 5.13 deprecates
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(student, LoraConfig(r=16, lora_alpha=32, target_modules=projections))


@dataclass(frozen=True)
class Path:
    """A way to take the losses or the step."""

    what: str  # losses or step
    views: str  # logits or states
    sharded: bool = False
    checkpointing: bool = False
    method: str = "vgs"
    lora: bool = False  # adapters on a frozen bfloat16 student


PATHS = {
    "losses from logits": Path("losses", "logits"),
    "losses from states": Path("losses", "states"),
    "losses from states, sharded head": Path("losses", "states", sharded=True),
    "step from logits": Path("step", "logits"),
    "step from logits, checkpointing": Path("step", "logits", checkpointing=True),
    "step from logits, FSDP2": Path("step", "logits", sharded=True),
    "step from states": Path("step", "states"),
    "step from states, checkpointing": Path("step", "states", checkpointing=True),
    "step from states, FSDP2": Path("step", "states", sharded=True),
    "step from states, FSDP2, checkpointing": Path("step", "states", sharded=True, checkpointing=True),
}
# Measured by benchmarks.scale, to check what it says of each method.
METHODS = {
    f"{method}{', LoRA' * lora}": Path("step", "states", checkpointing=True, method=method, lora=lora)
    for lora in (False, True)
    for method in ("standard", "vgs-frozen", "vgs")
}


def design(path: Path) -> list[Sizes]:
    """The sizes that are measured: four numbers of tokens, every other size changed, and what is held out."""
    changes: list[dict[str, int]] = [{"V": 8192}, {"d": 256}, {"L": 4}, {"C": 128}, {"C": 128, "V": 8192}]
    changes += [{"d": 256, "V": 8192}, {"d": 256, "L": 3}, {"teacher_d": 256}, {"image_prompt": 96, "text_prompt": 12}]
    if path.what == "losses":
        changes = [change for change in changes if change.keys() <= {"V", "d", "C"}]
    sizes = [Sizes(N // Sizes.T) for N in TOKENS]
    sizes += [Sizes(6, **change) for change in changes] + [Sizes(2, **change) for change in changes[:3]]
    if not path.sharded:
        return [*sizes, HELD_OUT]
    more = [{}, {"V": 8192}, {"d": 256}, {"teacher_d": 256}, {"L": 4}]
    return [*(replace(s, R=2) for s in (*sizes, HELD_OUT)), *(Sizes(2, R=4, **change) for change in more)]


def mark(phase: str) -> None:
    """The beginning of a phase, in a profile."""
    with torch.profiler.record_function(f"phase: {phase}"):
        pass


def timeline(work: Callable[[], object]) -> dict[str, dict[str, int]]:
    """By phase, the bytes in use at its start and at its peak beyond what was there before ``work``."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        work()
    phases: dict[str, dict[str, int]] = {}
    used, phase = 0, {"peak": 0}
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith("phase: "):
            phase = phases[event.name().removeprefix("phase: ")] = {"before": used, "peak": used}
        elif event.name() == "[memory]":
            used += event.nbytes()
            phase["peak"] = max(phase["peak"], used)
    return phases


def alive() -> int:
    """The bytes of all dense tensors on the CPU that there are."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    tensors = [x for x in tensors if x.layout == torch.strided and x.device.type == "cpu"]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def losses_alone(path: Path, s: Sizes, mesh: Any) -> dict[str, dict[str, int]]:
    """Three components and their backward passes, from hidden states to hidden states and head."""
    method, mask_BT = DecomposedDistillation("vgs", chunk_size=s.C), torch.ones(1, s.N, dtype=torch.bool)
    heads = [nn.Linear(s.d, s.V, bias=False) for _ in range(2)]
    heads[1].requires_grad_(False)
    if mesh is not None:
        for head in heads:
            fully_shard(head, mesh=mesh)
    names = ("student", "student_text", "teacher", "teacher_text")
    states = {name: torch.randn(1, s.N, s.d).requires_grad_(name.startswith("student")) for name in names}

    def run() -> None:
        mark("losses")
        student, teacher = (Head(head.weight) for head in heads)
        views: dict[str, Any] = {
            name: HiddenStates(x, student if x.requires_grad else teacher) for name, x in states.items()
        }
        if path.views == "logits":
            views = {name: view.logits() for name, view in views.items()}
        components = list(method(views, mask_BT).values())
        del views, student, teacher
        mark("backward")
        while components:
            components.pop().backward(retain_graph=bool(components))
        mark("end")
        for x in (heads[0].weight, *states.values()):
            x.grad = None

    run()
    return timeline(run)


def whole_step(path: Path, s: Sizes, mesh: Any) -> dict[str, dict[str, int]]:
    """Four views, the gate, the components, their backward passes and the optimizer's step."""
    student = language_model(s.V, s.d, s.L, tied=True).train()
    teacher = language_model(s.V, s.teacher_d, s.teacher_L, tied=False).requires_grad_(False)
    method, prior = DecomposedDistillation(path.method, chunk_size=s.C), None
    if "prior" in method.views and not path.lora:
        prior = language_model(s.V, s.d, s.L, tied=True).bfloat16().requires_grad_(False)
    with warnings.catch_warnings():  # transformers 5.13 has another name for it, and 5.0 only this one
        warnings.simplefilter("ignore", FutureWarning)
        if path.checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        if path.lora:
            student = adapted(student.bfloat16())
    if mesh is not None:
        for model in (student, teacher):
            for layer in model.model.layers:  # type: ignore[union-attr]
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = SteeredOptimizer(torch.optim.AdamW(trained, lr=1e-6), method.rule())
    image_BL, text_BL, response_BT = (
        torch.randint(2, s.V, (s.responses, n)) for n in (s.image_prompt, s.text_prompt, s.T)
    )
    mask_BT = torch.ones_like(response_BT, dtype=torch.bool)
    prompts, response = Prompts({"input_ids": image_BL}, {"input_ids": text_BL}), Rollout(response_BT, mask_BT)
    group = None if mesh is None else dist.group.WORLD

    def step() -> None:
        mark("views")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = path.views == "states"
            views = score(student, teacher, prompts, response, method=method, hidden_states=states, prior=prior)
        mark("gate")
        gate_BT = None
        if method.lam:
            vds_BT = visual_dependency(views["teacher"], views["teacher_text"], mask_BT)
            gate_BT = visual_tokens(vds_BT, mask_BT, quantile=method.quantile, group=group)
        mark("losses")
        components = method(views, mask_BT, count=method.count(mask_BT), gate_BT=gate_BT)
        del views
        mark("backward")
        optimizer.backward_components(components)
        del components
        mark("step")
        optimizer.step()
        mark("end")
        optimizer.zero_grad()

    step()  # makes the optimizer's state, compares heads and replicas
    resident = alive()
    # There is one set of gradients at the end. More is what the profile has missed, as another thread freed it.
    found = min((timeline(step) for _ in range(1 if mesh is None else 2)), key=lambda found: found["end"]["before"])
    return {"resident": {"before": resident, "peak": resident}, **found}


def measure_here(name: str, s: Sizes, mesh: Any = None) -> dict[str, Any]:
    """One path at one size, in this process."""
    torch.manual_seed(0)
    path = (PATHS | METHODS)[name]
    return {"sizes": asdict(s), "phases": (losses_alone if path.what == "losses" else whole_step)(path, s, mesh)}


def await_collectives() -> None:
    """Waits in every collective of FSDP2 until gloo's thread has let go of its tensors.

    A profile misses what another thread frees, and that thread may be the last to hold a tensor.
    """
    for name in ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor"):
        if collective := getattr(dist, name, None):
            setattr(dist, name, _awaited(collective))


def _awaited(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        work = collective(*args, **options)
        if work is not None:
            work.wait()
        time.sleep(0.01)
        return work

    return call


def in_processes(name: str, sizes: list[Sizes]) -> list[dict[str, Any]]:
    """One path at some sizes, by as many processes as these say; the rows of the first process."""
    rows = []
    for R in dict.fromkeys(s.R for s in sizes):
        rows += common.in_group(R, _work, name, [s for s in sizes if s.R == R])
    return rows


def _work(name: str, sizes: list[Sizes]) -> list[dict[str, Any]]:
    mesh = None
    if (PATHS | METHODS)[name].sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        await_collectives()
    rows = []
    for s in sizes:
        rows.append(measure_here(name, s, mesh))
        if dist.get_rank() == 0:
            peaks = {phase: round(marks["peak"] / common.MIB, 1) for phase, marks in rows[-1]["phases"].items()}
            print(name, s, peaks, flush=True)
    return rows


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--jobs", type=int, default=2, help="paths that are measured beside each other")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda name: in_processes(name, design(PATHS[name])), options.paths))
    result = {"rows": dict(zip(options.paths, found, strict=True))}
    common.write("step_memory", result, options.results, partial=options.partial)
    for part in ("losses", "step", "multiples", "real"):
        if not options.partial:
            print(memory_model.markdown(result, part), end="\n\n")


if __name__ == "__main__":
    main()
