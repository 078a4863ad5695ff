"""Losses of hidden states whose head is sharded, by FSDP2 or tensor parallelism: as in one process."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from launcher import processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from training import assert_close, assert_same_bits, share, whole

from steer_optim import SteeredOptimizer
from steer_optim.vlm import DecomposedDistillation, Rollout, response_states, score
from steer_optim.vlm.prompts import Prompts

transformers = pytest.importorskip("transformers", minversion="5.0")

ROWS, V, T = 4, 24, 3
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": V}
METHODS = {
    "vgs": DecomposedDistillation("vgs", lam=0.5, chunk_size=2),
    "vgs-frozen": DecomposedDistillation("vgs-frozen", chunk_size=2),
    "standard": DecomposedDistillation("standard"),
}


def make(seed: int, dtype: torch.dtype, *, tied: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied, pad_token_id=0, eos_token_id=1)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    return model


def shard(model: nn.Module, how: str, mesh) -> nn.Module:
    """``root``: layers by themselves, the head with the rest; ``head``: the head by itself, too, and gathered anew;
    ``one`` and ``one anew``: all in one, gathered for both passes or for each.
    """
    if how.startswith("one"):
        return fully_shard(model, mesh=mesh, reshard_after_forward=how == "one anew")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if how != "root":
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=how == "head")
    return fully_shard(model, mesh=mesh, reshard_after_forward=True if how == "all" else None)


def step_of(index: int, part=lambda x: x) -> tuple[Prompts, Rollout]:
    """Prompts of two views, which differ by more than an image would, and their responses."""
    torch.manual_seed(10 + index)
    ids_BL, text_BL = torch.randint(2, V, (2, ROWS, 4)).unbind()
    response_BT, mask_BT = torch.randint(2, V, (ROWS, T)), torch.arange(T) < torch.tensor([3, 1, 0, 2])[:, None]
    prompts = Prompts({"input_ids": part(ids_BL)}, {"input_ids": part(text_BL)})
    return prompts, Rollout(part(response_BT), part(mask_BT))


def train(student, teacher, prior, method, *, part=lambda x: x, replicas=1, **options) -> None:
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = SteeredOptimizer(torch.optim.AdamW(parameters, lr=0.01), method.rule(), **options)
    for index in range(4):
        prompts, response = step_of(index, part)
        views = score(student, teacher, prompts, response, method=method, prior=prior)
        # The tokens of the whole batch, over which gradients are averaged, and all of them are visual.
        gate_BT = response.scored_BT
        optimizer.zero_grad()
        losses = method(views, response.scored_BT, count=6 / replicas, gate_BT=gate_BT)
        geometry = optimizer.backward_components(losses)
        assert geometry.G.isfinite().all()
        optimizer.step()


def models(dtype, tied):
    student, teacher = make(0, dtype, tied=tied), make(1, dtype)
    return student, teacher, copy.deepcopy(student).requires_grad_(False)


def check_shards(method: str, how: str, dtype, tied: bool, refresh_every: int) -> None:
    options = {"refresh_every": refresh_every}
    alone = models(dtype, tied)
    train(*alone, METHODS[method], data_parallel=False, **options)
    size = dist.get_world_size()
    mesh = init_device_mesh(torch.get_default_device().type, (size,))
    student, teacher, prior = (shard(model, how, mesh) for model in models(dtype, tied))
    train(student, teacher, prior, METHODS[method], part=share, replicas=size, **options)
    found, expected = (whole(model.parameters()) for model in (student, alone[0]))
    assert_same_bits(found)
    # Sums over tokens in another order, of which Adam makes more where a gradient is small.
    assert_close(found, expected, 1e-12 if dtype == torch.float64 else 1e-6)


@processes(2, method=["vgs", "vgs-frozen"], tied=[False, True], refresh_every=[1, 3])
def test_a_head_that_the_root_holds(method, tied, refresh_every):
    check_shards(method, "root", torch.float64, tied, refresh_every)


@processes(2, how=["head", "whole head", "all"], refresh_every=[1, 3])
def test_a_head_that_is_sharded_by_itself(how, refresh_every):
    check_shards("vgs", how, torch.float64, False, refresh_every)


@processes(2, how=["one", "one anew"], method=["vgs", "vgs-frozen"])
def test_a_model_that_is_sharded_in_one_piece(how, method):
    """Its gradients are reduced although no loss reads what it returns."""
    check_shards(method, how, torch.float64, False, 1)


@processes(2, how=["one", "one anew", "root", "head"], frozen_head=[False, True])
def test_a_plain_backward_pass(how, frozen_head):
    def gradients(student, teacher, part, replicas):
        student.lm_head.requires_grad_(not frozen_head)
        prompts, response = step_of(0, part)
        views = score(student, teacher, prompts, response, method=METHODS["standard"])
        METHODS["standard"](views, response.scored_BT, count=6 / replicas)["std"].backward()
        return whole(p.grad for p in student.parameters() if p.requires_grad)

    (alone, teacher, _), (student, _, _) = models(torch.float64, False), models(torch.float64, False)
    mesh = init_device_mesh(torch.get_default_device().type, (2,))
    found = gradients(shard(student, how, mesh), teacher, share, 2)
    assert_close(found, gradients(alone, teacher, lambda x: x, 1), 1e-12)


@processes(4, how=["root", "head"])
def test_four_processes_and_one_precision_less(how):
    check_shards("vgs", how, torch.float32, False, 1)


def adapted(target: list[str], dtype: torch.dtype) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(0, dtype), peft.LoraConfig(r=2, target_modules=target)).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@processes(2, target=[["q_proj", "v_proj"], ["lm_head", "q_proj"]], how=["root", "head"])
def test_adapters_are_trained_and_switched_off_for_the_prior(target, how):
    """The prior is the student itself with its adapters switched off."""
    alone = adapted(target, torch.float64)
    train(alone, make(1, torch.float64), None, METHODS["vgs-frozen"], data_parallel=False)
    mesh = init_device_mesh(torch.get_default_device().type, (2,))
    student, teacher = adapted(target, torch.float64), shard(make(1, torch.float64), how, mesh)
    base = student.get_base_model()
    shard(base, how, mesh)
    train(student, teacher, None, METHODS["vgs-frozen"], part=share, replicas=2)
    found, expected = (whole(p for p in model.parameters() if p.requires_grad) for model in (student, alone))
    assert_same_bits(found)
    assert_close(found, expected, 1e-12)


@processes(2, method=["vgs", "vgs-frozen"], gathered=[True, False])
def test_a_tensor_parallel_head(method, gathered):
    """All processes compute the losses of all tokens, and none may count twice."""
    alone = models(torch.float64, False)
    train(*alone, METHODS[method], data_parallel=False)
    mesh = init_device_mesh(torch.get_default_device().type, (2,), mesh_dim_names=("tensor",))
    student, teacher, prior = models(torch.float64, False)
    for model in (student, teacher, prior):
        layout = Replicate() if gathered else Shard(-1)
        plan = {"lm_head": ColwiseParallel(output_layouts=layout, use_local_output=gathered)}
        parallelize_module(model, mesh, plan)
    train(student, teacher, prior, METHODS[method], data_parallel=False)  # as the whole layers are in all of them
    found, expected = (whole(model.parameters()) for model in (student, alone[0]))
    assert_same_bits(found)
    assert_close(found, expected, 1e-12)


@processes(4)
def test_a_tensor_parallel_head_in_a_model_that_is_sharded():
    alone = models(torch.float64, False)
    train(*alone, METHODS["vgs"], data_parallel=False)
    mesh = init_device_mesh(torch.get_default_device().type, (2, 2), mesh_dim_names=("data", "tensor"))
    student, teacher, prior = models(torch.float64, False)
    for model in (student, teacher, prior):
        parallelize_module(model, mesh["tensor"], {"lm_head": ColwiseParallel(output_layouts=Replicate())})
        shard(model, "root", mesh["data"])
    rank = mesh["data"].get_local_rank()
    train(student, teacher, prior, METHODS["vgs"], part=lambda x: x.chunk(2)[rank], replicas=2)
    assert_close(whole(student.parameters()), whole(alone[0].parameters()), 1e-12)


@processes(2)
def test_a_head_that_was_sharded_again_is_not_read():
    mesh = init_device_mesh(torch.get_default_device().type, (2,))
    model = shard(make(0, torch.float64), "root", mesh)
    prompts, response = step_of(0, share)
    views = score(model, model, prompts, response, method=METHODS["standard"])
    METHODS["standard"](views, response.scored_BT)["std"].backward()
    with pytest.raises(RuntimeError, match="has resharded the head"):
        METHODS["standard"](views, response.scored_BT)


@processes(2, tensor_parallel=[False, True])
def test_a_head_that_was_gathered_for_one_view_serves_the_other(tensor_parallel):
    """FSDP2 keeps the whole head; that of a tensor-parallel model is gathered anew, unless it is passed on."""
    mesh = init_device_mesh(torch.get_default_device().type, (2,))
    model = make(0, torch.float64)
    if tensor_parallel:
        parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    else:
        shard(model, "head", mesh)
    prompts, response = step_of(0, (lambda x: x) if tensor_parallel else share)
    views = (prompts.image, prompts.text)
    batches = [{**view, "input_ids": torch.cat([view["input_ids"], response.response_BT], 1)} for view in views]
    first, anew = (response_states(model, batch, T) for batch in batches)
    second = response_states(model, batches[1], T, head=first.head)
    assert first.head.same(second.head)
    assert first.head.same(anew.head) != tensor_parallel
    if tensor_parallel:
        teacher = first.detach().logits()
        views = {"student": first, "student_text": anew, "teacher": teacher, "teacher_text": teacher}
        with pytest.raises(ValueError, match="pass the head of one to response_states of the other"):
            METHODS["vgs"](views, response.scored_BT)
    states = second.detach()
    assert_close(states.logits(), anew.detach().head(states.hidden_BTd), 1e-12)


@processes(2, how=["root", "head", "one"])
def test_gradients_that_are_not_reduced_are_refused(how):
    """`set_requires_gradient_sync(False)`: no gradient arrives where the optimizer could see it."""
    mesh = init_device_mesh(torch.get_default_device().type, (2,))
    student, teacher, _ = (shard(model, how, mesh) for model in models(torch.float64, False))
    optimizer = SteeredOptimizer(torch.optim.AdamW(student.parameters()), METHODS["vgs"].rule())
    prompts, response = step_of(0, share)
    student.set_requires_gradient_sync(False)
    views = score(student, teacher, prompts, response, method=METHODS["vgs"])
    losses = METHODS["vgs"](views, response.scored_BT, gate_BT=response.scored_BT)
    with pytest.raises(ValueError, match="gradient sync"):
        optimizer.backward_components(losses)
