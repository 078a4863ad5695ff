"""Responses sampled from a student whose parameters are sharded."""

import pytest
import torch
import torch.distributed as dist
from launcher import processes
from tiny_models import BOS, FAMILIES, IMAGE
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from steer_optim.vlm.rollout import rollout

PROMPTS = [[BOS, 20, IMAGE, 21, 22], [BOS, 30, IMAGE, 31, 32, 33]]


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
@processes(2, reshard_after_forward=[True, None])
def test_a_sharded_student_says_what_the_whole_one_says(name, reshard_after_forward):
    torch.manual_seed(0)  # biases are drawn
    family, rank = FAMILIES[name](), dist.get_rank()
    device = torch.get_default_device()
    model = family.model.to(device)

    def ask(rank: int, **options):
        batch = {key: value.to(device) for key, value in family.batch([PROMPTS[rank]]).items()}
        return rollout(model, batch, temperature=0, max_new_tokens=6, **options)

    free = [ask(other, eos_ids=()).response_BT[0].tolist() for other in range(2)]
    # The first response ends after one token, the other goes on: all processes run as many passes.
    end = free[0][0]
    assert end not in free[1]
    model.train()
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=init_device_mesh(device.type, (2,)), reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=init_device_mesh(device.type, (2,)), reshard_after_forward=reshard_after_forward)
    for _ in range(2):
        responses = ask(rank, eos_ids=[end])
        assert responses.response_BT[0, responses.mask_BT[0]].tolist() == ([end], free[1])[rank]
        assert isinstance(model, FSDPModule)
        assert "generate" not in vars(model)
        assert model.training
