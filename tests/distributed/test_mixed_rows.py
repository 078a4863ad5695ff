"""Rows without images on one process, whose vision tower is sharded by FSDP2: all processes must run it."""

import torch
import torch.distributed as dist
from launcher import processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import assert_close, assert_same_bits, whole
from zoo import Image, Zoo

from steer_optim import SteeredOptimizer
from steer_optim.vlm import DecomposedDistillation, Prompts, Rollout, render, rollout, score


def picture(seed: int) -> dict:
    torch.manual_seed(seed)
    return {"type": "image", "image": Image.fromarray(torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy())}


def conversation(*content: dict | str) -> list[dict]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}]


# One process has images in some rows, the other in none.
ROWS = [conversation(picture(0), "a"), conversation("b?"), conversation("c a"), conversation("d")]
RESPONSES = [[40, 41, 42], [43], [44, 45], [46, 47]]


def step(student: nn.Module, teacher: nn.Module, prompts: Prompts, response: Rollout, count: float, **options) -> None:
    method = DecomposedDistillation("vgs", lam=0.5)
    optimizer = SteeredOptimizer(torch.optim.AdamW(student.parameters(), lr=0.01), method.rule(), **options)
    for _ in range(2):
        views = score(student, teacher, prompts, response, method=method)
        optimizer.zero_grad()
        losses = method(views, response.scored_BT, count=count, gate_BT=response.scored_BT)
        optimizer.backward_components(losses)
        optimizer.step()


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Zoo("qwen3_vl").model.double()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def in_double(prompts: Prompts) -> Prompts:
    image = {key: x.double() if x.is_floating_point() else x for key, x in prompts.image.items()}
    return prompts._replace(image=image)


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh(torch.get_default_device().type, (2,))
    for block in (*model.model.visual.blocks, *model.model.language_model.layers):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@processes(2)
def test_a_process_without_images_trains_with_one_that_has_some():
    zoo, rank = Zoo("qwen3_vl"), dist.get_rank()
    response = Rollout.of(RESPONSES, config=zoo.config)
    alone = make(0)
    step(alone, make(1), in_double(render(zoo.processor, ROWS)), response, 8, data_parallel=False)

    mine = slice(2 * rank, 2 * rank + 2)
    prompts = in_double(render(zoo.processor, ROWS[mine], blank_image=True))
    assert prompts.blank == rank
    student = shard(make(0))
    part = Rollout(response.response_BT[mine], response.mask_BT[mine])
    step(student, shard(make(1)), prompts, part, 8 / 2)
    found, expected = whole(student.parameters()), whole(alone.parameters())
    assert_same_bits(found)
    # The norms of Qwen compute in float32 whatever the model is, and rows of other lengths round otherwise.
    assert_close(found, expected, 1e-6)
    sampled = rollout(student, prompts, max_new_tokens=3, temperature=0)
    assert len(sampled.response_BT) == 2
