"""What a step costs on 8, 64 and 512 GPUs, and what fits on which: on paper, from what small models were seen to do.

    python -m benchmarks.scale    # some minutes

Collectives are counted in one step of a tiny Qwen3-VL in two processes (gloo), for each method: how often each part of
each model is gathered, and how often its gradients are reduced. At the real size each part has its own number of
parameters, and every message goes around a ring. Peaks of memory are sums of what the fits of
:mod:`benchmarks.memory_model` have found, with one set of gradients for each component; they are compared with peaks of
small models, for each method.

Dimensions: ``R`` processes, ``k`` components; the others as in ``memory_model``.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import common
from benchmarks.memory_model import GIB, HELD_OUT, REAL, Sizes, layer_parameters

SETUPS = ("FSDP2", "DDP, LoRA")
REFRESH = 10
FOREVER = 10**9
NODE = 8  # GPUs
LAYOUTS = {  # GPUs, and whether a model is sharded inside a node only, and replicated over nodes
    "8 GPUs": (8, True),
    "64, sharded over all": (64, False),
    "64, HSDP": (64, True),
    "512, sharded over all": (512, False),
    "512, HSDP": (512, True),
}
# Nominal rates of an H100: bytes per second and direction of NVLink and of a network of 400 Gb/s for each GPU; 40 % of
# the dense bfloat16 peak. A hop is from one GPU of a ring to the next.
NVLINK, NETWORK, FLOPS, HOP = 450e9, 50e9, 0.4 * 989e12, 5e-6
VISION = {"student": (24, 1024), "teacher": (27, 1152)}  # layers and width of the towers; 4096 patches an image
PATCHES = 4096
GPUS = (24, 40, 80, 141)  # GiB
ALWAYS = ("student and AdamW", "teacher", "prior", "frozen roots")
MOMENTS = {"passes": "views", "losses": "losses", "backward passes": "backward"}  # and their names in step_memory
UNITS = {"student": {"layers": 28, "blocks": 24, "root": 1, "embedding": 1}}
UNITS |= {"prior": UNITS["student"], "teacher": {"layers": 36, "blocks": 27, "root": 1}}


@dataclass(frozen=True)
class Method:
    """The passes of a step: ``backward`` names the view of each component's backward pass."""

    backward: tuple[str, ...]
    views: int  # that the losses read
    teacher_views: int
    prior: bool = False

    @property
    def k(self) -> int:
        return len(self.backward)

    @property
    def trained_views(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.backward))


METHODS = {
    "standard": Method(("image",), views=2, teacher_views=1),
    "vgs-frozen": Method(("image", "image"), views=4, teacher_views=2, prior=True),
    "vgs": Method(("image", "image", "text"), views=4, teacher_views=2),
}
STEPS = {name: (name, 1) for name in METHODS}
STEPS |= {f"{name}, weights known": (name, FOREVER) for name in METHODS if name != "standard"}
AVERAGES = {f"{name}, refresh_every={REFRESH}": name for name in METHODS if name != "standard"}


# Counting


class Collectives(TorchDispatchMode):
    """Counts messages by collective, elements and bytes of the whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function).startswith("c10d."):
            whole = max((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), key=lambda x: x.nbytes)
            self.found[str(function).split(".")[1].strip("_"), whole.numel(), whole.nbytes] += 1
        return function(*args, **(kwargs or {}))


def parts(model: nn.Module) -> dict[str, list[int]]:
    """The numbers of parameters of what is sharded together: each layer, each block of the tower, and the rest."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.language_model.layers]  # type: ignore[union-attr]
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.model.visual.blocks]  # type: ignore[union-attr]
    root = sum(p.numel() for p in model.parameters()) - sum(layers) - sum(blocks)
    text = model.model.language_model  # type: ignore[union-attr]
    embedding = sum(p.numel() for module in (text.embed_tokens, text.norm) for p in module.parameters())
    return {"layers": layers, "blocks": blocks, "root": [root], "embedding": [embedding]}


def count(setup: str, name: str, refresh_every: int, mesh: Any) -> list[dict[str, Any]]:
    """The messages of one step of a tiny model, after three that warm up."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from benchmarks import real_size
    from benchmarks.step_memory import adapted
    from steer_optim import SteeredOptimizer
    from steer_optim.vlm import DecomposedDistillation, Prompts, score, text_only

    torch.manual_seed(0)
    size, cpu, lora = real_size.tiny(), torch.device("cpu"), setup != "FSDP2"
    wide = copy.deepcopy(size.student)  # told apart from the student by its sizes
    wide.text_config.intermediate_size = wide.vision_config.intermediate_size = 80
    wide.vision_config.num_position_embeddings = 36
    models: dict[str, nn.Module] = {
        "student": real_size.build(size.student, cpu, torch.bfloat16 if lora else torch.float32).train(),
        "teacher": real_size.build(size.teacher, cpu, torch.bfloat16).requires_grad_(False),
        "prior": real_size.build(wide, cpu, torch.bfloat16).requires_grad_(False),
    }
    # What the prior has in common with the student in size is never gathered again, and never reduced.
    known = {
        numbers[0]: (of, part) for of in ("teacher", "prior", "student") for part, numbers in parts(models[of]).items()
    }
    units = {(of, part): len(numbers) for of, x in models.items() for part, numbers in parts(x).items()}
    if lora:
        models["student"] = DistributedDataParallel(adapted(models["student"]))
        trained = [p for p in models["student"].parameters() if p.requires_grad]
        known[sum(p.numel() for p in trained)] = ("student", "adapters")
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for model in models.values():
            for unit in (*model.model.language_model.layers, *model.model.visual.blocks, model):  # type: ignore[union-attr]
                fully_shard(unit, mesh=mesh, mp_policy=policy)
        trained = list(models["student"].parameters())
    method = DecomposedDistillation(name)
    inner = torch.optim.AdamW(trained, lr=1e-6)
    replicas = {"data_parallel": True} if lora else {}
    steered = SteeredOptimizer(inner, method.rule(), refresh_every=refresh_every, **replicas)
    batch, sampled = real_size.draw(size, 2, cpu)
    prompts = Prompts(batch, text_only(batch, size.student))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if lora else nullcontext():
            prior = None if lora else models["prior"]
            views = score(models["student"], models["teacher"], prompts, sampled, method=method, prior=prior)
        losses = method(views, sampled.scored_BT)
        if name == "standard":
            losses["std"].backward()
        else:
            steered.backward_components(losses)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        inner.step()
        inner.zero_grad()

    for _ in range(3):
        step()
    with Collectives() as collectives:
        step()
    rows = []
    for (collective, numel, nbytes), times in sorted(collectives.found.items()):
        of, part = known.get(numel, ("other", "other"))
        row = {"collective": collective, "model": of, "part": part, "bytes an element": nbytes / numel}
        rows.append({**row, "passes": times / units.get((of, part), 1), "bytes": times * nbytes})
    return rows


def count_all(steps: Mapping[str, tuple[str, int]] = STEPS, setups: tuple[str, ...] = SETUPS) -> dict[str, Any]:
    """The messages of every step in both setups, of the first of two processes."""
    found: dict[str, Any] = common.in_group(2, _count_all, dict(steps), setups)
    return found


def _count_all(steps: Mapping[str, tuple[str, int]], setups: tuple[str, ...]) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    from steer_optim import holding

    holding._COPYING = ()  # reduce-scatters as with NCCL; with gloo they are all-reduces
    mesh = init_device_mesh("cpu", (2,))
    return {setup: {step: count(setup, *of, mesh) for step, of in steps.items()} for setup in setups}


def real_parts() -> dict[str, Any]:
    """The parameters of the real models' parts, and of the adapters."""
    from benchmarks import real_size
    from benchmarks.step_memory import adapted

    size, found = real_size.real(), {}
    for name in ("student", "teacher"):
        model = real_size.build(getattr(size, name), torch.device("meta"), torch.bfloat16)
        found[name] = {part: sum(numbers) for part, numbers in parts(model).items()}
        if name == "student":
            adapters = sum(p.numel() for p in adapted(model).parameters() if p.requires_grad)
    return {**found, "prior": found["student"], "adapters": adapters}


# Traffic at the real size


def messages(result: Mapping[str, Any], setup: str, step: str) -> Iterator[tuple[str, float, float]]:
    """Collective, bytes of the whole tensors and number of messages of a step at the real size."""
    for row in result["traffic"][setup][step]:
        of, part = row["model"], row["part"]
        if of == "other":  # the Gramian, checks, buffers: bytes to kilobytes at any size
            continue
        numel = result["parameters"]["adapters"] if part == "adapters" else result["parameters"][of][part]
        yield row["collective"], row["passes"] * numel * row["bytes an element"], row["passes"] * UNITS[of].get(part, 1)


def links(result: Mapping[str, Any], setup: str, step: str, R: int, inside: bool) -> dict[str, float]:
    """Bytes that each GPU sends over NVLink and over its network link, and hops around rings; ring collectives."""
    nodes, found = R // NODE, {"NVLink": 0.0, "network": 0.0, "hops": 0.0}
    for collective, whole, number in messages(result, setup, step):
        times = 2 if "allreduce" in collective else 1  # an all-reduce is a reduce-scatter and an all-gather
        ring = NODE if inside and setup == "FSDP2" else R
        sent = times * whole * (ring - 1) / ring
        found["hops"] += times * number * (ring - 1)
        # Of the links of a ring through all GPUs one in eight leaves a node.
        across = 0.0 if ring == NODE else sent / NODE
        found["network"] += across
        found["NVLink"] += sent - across
        if ring < R and "reduce_scatter" in collective:  # its eighth is then averaged over the nodes
            found["network"] += 2 * whole / NODE * (nodes - 1) / nodes
            found["hops"] += 2 * number * (nodes - 1)
    return found


def average(of: Callable[..., dict[str, float]], step: str) -> dict[str, float]:
    """What a step has, or the mean over ``REFRESH`` of which one is exact."""
    if step not in AVERAGES:
        return of(step=step)
    exact, known = of(step=AVERAGES[step]), of(step=f"{AVERAGES[step]}, weights known")
    return {key: (exact[key] + (REFRESH - 1) * known[key]) / REFRESH for key in exact}


def flops(result: Mapping[str, Any], step: str, responses: int) -> dict[str, float]:
    """Of the products with weights: two per weight and token forwards, six backwards of which two recompute."""
    method, known = METHODS[step.split(",")[0]], step.endswith("known")
    s, sizes = replace(REAL, responses=responses), result["parameters"]
    tokens = {"image": responses * (s.image_prompt + s.T), "text": responses * (s.text_prompt + s.T)}

    def forward(of: str, view: str) -> float:
        head = s.V * (s.teacher_d if of == "teacher" else s.d)
        tower = sizes[of]["blocks"] * responses * PATCHES if view == "image" else 0
        return 2 * (sizes[of]["layers"] * tokens[view] + head * s.N + tower)

    total = sum(forward("teacher", view) for view in ("image", "text")[: method.teacher_views])
    total += sum(forward("student", view) for view in method.trained_views)
    total += forward("prior", "text") * method.prior
    passes = method.trained_views if known else method.backward
    return {"all": total + 3 * sum(forward("student", view) for view in passes)}


# Memory


def memory(
    s: Sizes, name: str, sizes: Mapping[str, Any], *, lora: bool = False, patches: int = 0, gpu: bool = True
) -> dict[str, float]:
    """Bytes on a GPU by what they are, and the peak, with checkpointing and fused AdamW.

    A student with adapters is whole in every process; the other models are sharded over ``R``. Without ``gpu`` it is
    as in the measurements of small models: a float32 teacher, heads cast to float32, a student that is gathered in
    float32, and a chunk of fixed size.
    """
    m, R = METHODS[name], s.R
    student, teacher = (sum(sizes[of][x] for x in ("layers", "blocks", "root")) for of in ("student", "teacher"))
    trained = sizes["adapters"] if lora else student
    shards, half, wide = 1 if lora else R, 2 if gpu else 4, 2 if lora else 4  # bytes of the teacher and of a state
    student_root = sizes["student"]["root"]
    head, C = s.V * s.d, 3072 // m.views if gpu else s.C
    block = s.V * max(1, min(C, s.block // s.V))
    text, image = s.responses * (s.text_prompt + s.T), s.responses * (s.image_prompt + s.T)
    tokens = {"image": image, "text": text}
    roots = 0.0 if R == 1 else half * sizes["teacher"]["root"]  # FSDP2 keeps those of frozen models whole
    if m.prior and not lora and R > 1:
        roots += 2 * student_root
    whole = 0.0 if shards == 1 else half * student_root
    found = {
        "student and AdamW": (2 * student + 12 * trained) if lora else 12 * student / R,
        "teacher": half * teacher / R,
        "prior": 0.0 if lora or not m.prior else 2 * student / R,
        "frozen roots": roots,
        "activations": (s.L + 3) * sum(tokens[view] for view in m.trained_views) * s.d * wide
        + (VISION["student"][0] + 3) * patches * VISION["student"][1] * wide,
    }
    states = m.teacher_views * s.N * s.teacher_d * half + m.prior * s.N * s.d * 2
    # What autocast has cast is kept to the end of its context. FSDP2 gathers bfloat16, two layers at a time.
    copies = (0 if lora or (gpu and R > 1) else 2 * student) + (0 if gpu else 2 * teacher - sizes["teacher"]["root"])
    ahead = 0.0 if R == 1 else 2 * half * sizes["teacher"]["layers"] / s.teacher_L
    found["passes"] = whole + states + copies + ahead + 3 * 4 * image * (s.d + s.teacher_d)
    by_head = 0 if lora else head * 4  # gradients of the head, one for each component
    logits = 4 * m.views * (C * s.V + 3.2 * block)
    casts = head * 2 + C * s.V * 6 + by_head if gpu else head * 4 * (lora or m.prior)
    found["losses"] = whole + states + min(m.k, 2) * by_head + logits + casts + 6.6 * s.N * s.d * 4
    one_set = 4 * trained / shards
    recomputed = 15 * 4 * max(tokens[m.backward[-1]] * s.d, patches * VISION["student"][1])
    kept = whole + m.k * (by_head + s.N * s.d * 4)
    in_flight = 0.0 if shards == 1 else 2 * half * sizes["student"]["layers"] / s.L
    first = found["activations"] + kept + (m.k - 1) * one_set + by_head + recomputed + in_flight
    found["backward passes"] = max(first, m.k * one_set + kept) - found["activations"]
    always = sum(found[part] for part in ALWAYS)
    found["peak"] = always + found["activations"] + max(found[moment] for moment in MOMENTS)
    return found


def small(s: Sizes) -> dict[str, Any]:
    """The parameters of the small models of ``step_memory``, which have no towers."""
    layers, wide = s.L * layer_parameters(s.d), s.teacher_L * layer_parameters(s.teacher_d)
    adapters = 16 * s.L * (2 * 2 * s.d + 2 * (s.d + s.d // 2))
    return {
        "student": {"layers": layers, "blocks": 0, "root": s.student - layers},
        "teacher": {"layers": wide, "blocks": 0, "root": s.teacher() - wide},
        "adapters": adapters,
    }


def against(rows: Mapping[str, Any], sharded: Any) -> dict[str, list[float]]:
    """By moment, the paper's peak over the measured one of small models: every method alone, ``vgs`` under FSDP2."""
    found: dict[str, list[float]] = {moment: [] for moment in MOMENTS}
    shards = (sharded or {"rows": {}})["rows"].get("step from states, FSDP2, checkpointing", [])
    for name, mine in {**rows, "vgs, FSDP2": shards}.items():
        method, _, setup = name.partition(", ")
        for row in mine:
            s = Sizes(**row["sizes"])
            paper = memory(s, method, small(s), lora=setup == "LoRA", gpu=False)
            for moment, phase in MOMENTS.items():
                peak = sum(paper[part] for part in (*ALWAYS, "activations", moment))
                found[moment].append(peak / sum(row["phases"][part]["peak"] for part in ("resident", phase)))
    return found


def at_real_size(result: Mapping[str, Any], name: str, *, lora: bool, R: int, responses: int) -> dict[str, float]:
    s = replace(REAL, responses=responses, R=R)
    return memory(s, name, result["parameters"], lora=lora, patches=responses * PATCHES)


def most(result: Mapping[str, Any], name: str, gib: int, *, lora: bool, R: int) -> int:
    """The most responses in one micro-batch, with a tenth and 1 GiB left for fragments, context and buffers."""
    room, responses = (0.9 * gib - 1) * GIB, 0
    while responses < 64 and at_real_size(result, name, lora=lora, R=R, responses=responses + 1)["peak"] <= room:
        responses += 1
    return responses


# Tables


def markdown(result: Mapping[str, Any], part: str) -> str:
    """The table of one part: ``counted``, ``links``, ``time``, ``memory`` or ``fits``."""
    return {"counted": _counted, "links": _links, "time": _time, "memory": _memory, "fits": _fits}[part](result)


def _counted(result: Mapping[str, Any]) -> str:
    lines = []
    for setup, steps in result["traffic"].items():
        for step, rows in steps.items():
            cells: dict[str, list[str]] = {key: [] for key in ("allgather", "reduce_scatter", "allreduce")}
            for row in rows:
                if row["model"] != "other":
                    key = row["collective"].removesuffix("_base")
                    cells[key].append(f"{row['passes']:g} × {row['model']} {row['part']}")
            rest = sum(row["bytes"] for row in rows if row["model"] == "other")
            lines.append([f"{setup}: {step}", *(", ".join(found) or "–" for found in cells.values()), str(rest)])
    return common.table(["step", "all-gathers", "reduce-scatters", "all-reduces", "all other, bytes"], lines)


def _links(result: Mapping[str, Any]) -> str:
    lines = []
    for setup in SETUPS:
        unit, word = (1e9, "GB") if setup == "FSDP2" else (1e6, "MB")
        for step in _steps():
            line = [f"{setup}: {step}, {word}"]
            for R, inside in LAYOUTS.values():
                mine = average(
                    lambda step, setup=setup, R=R, inside=inside: links(result, setup, step, R, inside), step
                )  # type: ignore[misc]
                line.append(f"{mine['NVLink'] / unit:.1f} + {mine['network'] / unit:.1f}")
            lines.append(line)
    return common.table(["sent by each GPU in a step, NVLink + network", *LAYOUTS], lines)


def _time(result: Mapping[str, Any]) -> str:
    lines = []
    for step in _steps():
        work = [average(partial(flops, result, responses=responses), step)["all"] for responses in (8, 1)]
        columns = [average(partial(links, result, "FSDP2", R=R, inside=x), step) for R, x in LAYOUTS.values()]
        sent = [max(mine["NVLink"] / NVLINK, mine["network"] / NETWORK) for mine in columns]
        hops = [mine["hops"] * HOP for mine in columns]
        cells = (f"{x:.2f} / {y:.2f}" for x, y in zip(sent, hops, strict=True))
        lines.append([step, *(f"{x / FLOPS:.2f}" for x in work), *cells])
    head = ["s", "compute, 8 responses a GPU", "1 response a GPU", *(f"{name}: links / hops" for name in LAYOUTS)]
    return common.table(head, lines)


def _steps() -> list[str]:
    return [x for name in METHODS for x in (name, f"{name}, refresh_every={REFRESH}") if x == name or x in AVERAGES]


def _memory(result: Mapping[str, Any]) -> str:
    columns = {
        f"{name}{', LoRA' * lora}, R = {R}": at_real_size(result, name, lora=lora, R=R, responses=8)
        for lora in (False, True)
        for R in ((1, 8, 64, 512) if not lora else (1, 8))
        for name in METHODS
    }
    names = list(next(iter(columns.values())))
    lines = [[column, *(f"{found[name] / GIB:.1f}" for name in names)] for column, found in columns.items()]
    return common.table(["GiB on each GPU, 8 responses", *names], lines) + "\n\n" + _against(result)


def _against(result: Mapping[str, Any]) -> str:
    found = against(result["memory"], common.newest("step_memory"))
    ranges = (f"{moment} {min(ratios):.2f} to {max(ratios):.2f}" for moment, ratios in found.items())
    s = replace(REAL, responses=4, T=512)
    steps = {f"{name}{', LoRA' * lora}": (name, lora) for lora in (False, True) for name in METHODS}
    gpu = (
        f"{step} {memory(s, name, result['parameters'], lora=lora, patches=4 * PATCHES)['peak'] / GIB:.0f}"
        for step, (name, lora) in steps.items()
    )
    return (
        f"The same sums over the measured peaks of {len(found['losses'])} small steps: {', '.join(ranges)}. "
        f"For the step of `make gpu`, 4 responses of 512 tokens, they give {', '.join(gpu)} GiB."
    )


def _fits(result: Mapping[str, Any]) -> str:
    lines = []
    for lora in (False, True):
        for name in METHODS:
            line = [f"{'LoRA' if lora else 'full'}, {name}"]
            for R in (1, 8):
                found = [most(result, name, gib, lora=lora, R=R) for gib in GPUS]
                line += ["–" if not x else "≥ 64" if x == 64 else str(x) for x in found]
            lines.append(line)
    return common.table(["responses in a micro-batch", *(f"{R} × {gib} GB" for R in (1, 8) for gib in GPUS)], lines)


def main() -> None:
    parser = common.parser(__doc__)
    options = parser.parse_args()
    from benchmarks import step_memory

    sizes = (HELD_OUT, replace(HELD_OUT, responses=2), Sizes(16))
    result = {
        "parameters": real_parts(),
        "traffic": count_all(),
        "memory": {name: step_memory.in_processes(name, list(sizes)) for name in step_memory.METHODS},
    }
    common.write("scale", result, options.results, partial=options.partial)
    for part in ("counted", "links", "time", "memory", "fits"):
        print(markdown(result, part), end="\n\n")


if __name__ == "__main__":
    main()
