"""The views of a response, computed once each."""

import warnings

import pytest
import torch

from steer_optim.vlm import DecomposedDistillation, Prompts, Rollout, score, visual_dependency
from steer_optim.vlm.forward import _equate_rows_without_images

transformers = pytest.importorskip("transformers", minversion="5.0")


def make_model():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    options = {"attention_dropout": 0.5, "initializer_range": 0.5}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes, **options))


def adapted(model):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():  # peft reads an attribute that transformers has renamed
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).train()


@pytest.mark.parametrize("hidden_states", [True, False])
def test_the_image_changes_nothing_at_all_where_there_is_none(hidden_states):
    """Other rows make the padding differ, and so the rounding, by which a gate would select."""
    torch.manual_seed(0)
    ids_BL = torch.randint(3, 16, (2, 40))
    ids_BL[1, :-2] = 0
    image = {"input_ids": ids_BL, "attention_mask": ids_BL.sign()}
    text = {"input_ids": torch.stack([ids_BL[0, -3:], ids_BL[1, -3:]])}
    text["attention_mask"] = text["input_ids"].sign()
    response = Rollout(torch.randint(3, 16, (2, 6)), torch.ones(2, 6, dtype=torch.bool))
    method, teacher = DecomposedDistillation("tokens"), make_model().bfloat16()
    views = score(make_model(), teacher, Prompts(image, text), response, method=method, hidden_states=hidden_states)
    vds_BT = visual_dependency(views["teacher"], views["teacher_text"], response.mask_BT)
    assert (vds_BT[0] > 1e-3).all()
    assert vds_BT[1].tolist() == [0.0] * 6


def test_a_masked_image_is_an_image():
    """It may stand in the place of the text view, with the same ids."""
    prompt = {"input_ids": torch.tensor([[5, 6]])}
    views = {"teacher": torch.zeros(1, 2, 3), "teacher_text": torch.ones(1, 2, 3)}
    _equate_rows_without_images(views, Prompts(prompt, {**prompt, "pixel_values": torch.zeros(1, 3, 4, 4)}))
    assert views["teacher_text"].all()


def test_a_prior_inside_the_student_is_refused():
    base = make_model()
    student, prompt = adapted(base), {"input_ids": torch.tensor([[5, 6, 7]])}
    response = Rollout(torch.tensor([[8, 9]]), torch.ones(1, 2, dtype=torch.bool))
    for prior in (student, base):
        with pytest.raises(ValueError, match="prior is the student itself, or inside it"):
            score(
                student, make_model(), Prompts(prompt, prompt), response, method=DecomposedDistillation(), prior=prior
            )


def test_a_prior_without_adapters_is_in_evaluation_mode():
    torch.manual_seed(0)
    models = [make_model() for _ in range(2)]
    student = adapted(models[0])
    student.get_base_model().model.norm.eval()  # as a frozen part may be
    modes = [module.training for module in student.modules()]
    prompt, ids = {"input_ids": torch.tensor([[5, 6, 7]])}, torch.tensor([[8, 9]])
    response = Rollout(ids, torch.ones_like(ids))
    method = DecomposedDistillation("vgs-frozen")
    once, again = (score(student, models[1], Prompts(prompt, prompt), response, method=method) for _ in range(2))
    assert torch.equal(once["prior"].hidden_BTd, again["prior"].hidden_BTd)
    assert not torch.equal(once["student"].hidden_BTd, again["student"].hidden_BTd)
    assert [module.training for module in student.modules()] == modes
