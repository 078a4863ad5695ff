"""The views of a response, computed once each."""

import warnings

import pytest
import torch

from steer_optim.vlm import DecomposedDistillation, Prompts, Rollout, score

transformers = pytest.importorskip("transformers", minversion="5.0")


def test_a_prior_without_adapters_is_in_evaluation_mode():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.LlamaConfig(vocab_size=16, attention_dropout=0.5, **sizes)
    models = [transformers.LlamaForCausalLM(config) for _ in range(2)]
    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.simplefilter("ignore")
        student = peft.get_peft_model(models[0], peft.LoraConfig(r=2, target_modules=["q_proj"])).train()
    student.get_base_model().model.norm.eval()  # as a frozen part may be
    modes = [module.training for module in student.modules()]
    prompt, ids = {"input_ids": torch.tensor([[5, 6, 7]])}, torch.tensor([[8, 9]])
    response = Rollout(ids, torch.ones_like(ids))
    method = DecomposedDistillation("vgs-frozen")
    once, again = (score(student, models[1], Prompts(prompt, prompt), response, method=method) for _ in range(2))
    assert torch.equal(once["prior"].hidden_BTd, again["prior"].hidden_BTd)
    assert not torch.equal(once["student"].hidden_BTd, again["student"].hidden_BTd)
    assert [module.training for module in student.modules()] == modes
