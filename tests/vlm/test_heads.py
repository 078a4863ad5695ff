import copy
import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from hidden_states import EXACT, views_of
from tiny_models import _TEXT, BOS, FAMILIES, IMAGE, VOCABULARY, transformers
from torch import nn
from torch.testing import assert_close

from steer_optim.vlm import (
    DecomposedDistillation,
    Head,
    HiddenStates,
    Prompts,
    Rollout,
    append_response,
    response_logits,
    response_states,
    score,
    text_only,
)
from steer_optim.vlm.rows import Rows

MASK = torch.tensor([[True, True, True], [True, False, False]])
RESPONSE = torch.tensor([[30, 31, 32], [33, 0, 0]])
# The same products and norms in another order: a few units of 6e-8 in logits of size up to 30.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def text_model(name, **options):
    """A tiny language model whose head is followed by something, or preceded by an adapter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **_TEXT, **options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch_of(*prompts):
    return append_response({"input_ids": torch.tensor(prompts)}, Rollout(RESPONSE, MASK), transformers.LlamaConfig())


AFTER = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 4.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "hyperclovax": {"logits_scaling": 0.125},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", AFTER)
def test_the_head_of_a_language_model(name, tied):
    model, batch = text_model(name, **AFTER[name], tie_word_embeddings=tied), batch_of([2, 20, 21], [2, 22, 23])
    meant = response_logits(model, batch, 3)
    for _ in range(2):  # the first pass compares a row, later ones compute none
        states = response_states(model, batch, 3)
        assert states.shape == meant.shape
        assert_close(states.logits(), meant, **CLOSE)
    plain = nn.functional.linear(states.hidden_BTd, states.head.weight_Vd)
    assert torch.equal(states.logits(), plain) == (name == "llama")
    assert_close(Rows(states[MASK], temperature=2.0).logits(slice(1, 4)), meant[MASK][1:4] / 2, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # an attribute that peft reads
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_a_model_that_ignores_what_its_text_model_does_to_logits(name, wrapped):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {"model_type": "clip_vision_model", **sizes, "image_size": 8, "patch_size": 4}
    text = {"model_type": name, **_TEXT, **AFTER[name]}
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=5)
    ).eval()
    if wrapped:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    batch = batch_of([2, 20, 21], [2, 22, 23])
    assert_close(response_states(model, batch, 3).logits(), response_logits(model, batch, 3), **CLOSE)
    assert (Head.of(model).scale, Head.of(model).softcap) == (1.0, None)


def test_a_model_without_source_does_to_logits_what_its_config_says():
    def forward(self, hidden):
        return self.lm_head(hidden) * self.config.logit_scale

    methods = {"forward": forward, "get_output_embeddings": lambda self: self.lm_head}
    kind = type("FromANotebook", (transformers.PreTrainedModel,), methods)
    model = kind(transformers.CohereConfig(**_TEXT, logit_scale=0.25))
    model.lm_head = nn.Linear(16, 7)
    assert Head.of(model).scale == 0.25


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vision_language_model_trains_through_its_states_as_through_its_logits(name):
    family = FAMILIES[name]()
    student = family.model.double()
    batch = family.batch([[BOS, 20, IMAGE, 21], [BOS, IMAGE, 22, 23]])
    batch = {key: x.double() if x.is_floating_point() else x for key, x in batch.items()}
    prompts = batch, text_only(batch, student.config, drop_ids=family.drop_ids)
    views = [append_response(prompt, Rollout(RESPONSE, MASK), student.config) for prompt in prompts]
    teacher = [0.5 * torch.randn(2, 3, VOCABULARY, dtype=torch.float64) for _ in range(2)]
    # Large random weights of Gemma make one token certain, whose gradient is a difference of nearly equal numbers.
    method = DecomposedDistillation("vgs", lam=1.0, temperature=8.0, chunk_size=2)
    found, meant = (
        method(views_of([*(f(student, view, 3) for view in views), *teacher]), MASK)
        for f in (response_states, response_logits)
    )
    parameters = [x for x in student.parameters() if x.requires_grad]
    for key, loss in meant.items():
        assert_close(found[key], loss, **EXACT)
        pairs = (torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (found[key], loss))
        for x, y in zip(*pairs, strict=True):
            assert (x is None) == (y is None)
            if y is not None:
                assert float((x - y).norm()) <= 1e-9 * float(y.norm()) + 1e-15


class Counting(nn.Linear):
    rows = 0

    def forward(self, x):
        Counting.rows += x.numel() // x.shape[-1]
        return super().forward(x)


class Bigram(nn.Module):
    """A model without logits_to_keep, and whatever it does to its logits."""

    def __init__(self, after=lambda x: x, head=None):
        super().__init__()
        self.embedding, self.head, self.after = nn.Embedding(VOCABULARY, 6), head or Counting(6, VOCABULARY), after

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.after(self.head(self.embedding(input_ids))))


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, input_ids, attention_mask, use_cache):
        return self.module(input_ids, attention_mask, use_cache)


def test_the_head_computes_one_row_and_the_wrapper_is_passed_through():
    model, batch = Wrapper(Bigram()), batch_of([2, 20], [2, 21])
    meant = response_logits(model.module, batch, 3)
    rows = []
    for _ in range(3):
        Counting.rows = 0
        states = response_states(model, batch, 3)
        rows.append(Counting.rows)
        assert_close(states.logits(), meant, **CLOSE)
    assert rows == [1, 1, 1]
    assert response_states(model, batch, 0).shape == (2, 0, VOCABULARY)


def test_a_model_that_is_not_what_its_head_says_is_refused():
    batch = batch_of([2, 20], [2, 21])
    with pytest.raises(RuntimeError, match=r"changes its logits in a way that Head.of does not know"):
        response_states(Bigram(after=lambda x: x * 1.1), batch, 3)
    twice = Bigram()
    twice.after = lambda logits: twice.head(twice.embedding.weight[:1, None])
    with pytest.raises(RuntimeError, match=r"once in a forward pass.*it did 2 times"):
        response_states(twice, batch, 3)
    with pytest.raises(ValueError, match=r"must be a torch.nn.Linear; got Sequential"):
        response_states(Bigram(head=nn.Sequential(nn.Linear(6, VOCABULARY))), batch, 3)
    with pytest.raises(ValueError, match="Linear names no head: it needs get_output_embeddings"):
        Head.of(nn.Linear(2, 3))
    failed = Bigram(after=lambda x: x * 1.1)
    with pytest.raises(RuntimeError):
        response_states(failed, batch, 3)
    assert not failed.head._forward_pre_hooks
    reference = weakref.ref(failed)
    del failed
    assert reference() is None


def test_hidden_states_that_are_nan_are_named_by_the_losses():
    model, batch = Bigram(), batch_of([2, 20], [2, 21])
    nn.init.constant_(model.embedding.weight, torch.nan)
    views = {"student": response_states(model, batch, 3), "teacher": torch.randn(2, 3, VOCABULARY)}
    with pytest.raises(ValueError, match=r"logits must be finite in every .*; found NaN or infinity in student"):
        DecomposedDistillation("standard")(views, MASK)
    nn.init.normal_(model.embedding.weight)
    model.after = lambda x: x * 1.1
    with pytest.raises(RuntimeError, match=r"changes its logits in a way that Head.of does not know"):
        response_states(model, batch, 3)


# transformers warns of an attribute that peft reads, and peft of a bias that could not be merged.
peft_warnings = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*lora_bias=True")


def peft_model(**options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(text_model("llama", tie_word_embeddings=False), peft.LoraConfig(r=2, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:  # as after training
            nn.init.normal_(parameter)
    return model


@peft_warnings
@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}]
)
def test_adapters_on_the_head_are_trained(options):
    model, batch = peft_model(**options), batch_of([2, 20, 21], [2, 22, 23])
    teacher = torch.randn(2, 3, VOCABULARY)
    views = [f(model, batch, 3) for f in (response_states, response_logits)]
    assert_close(views[0].logits(), views[1], **CLOSE)
    method = DecomposedDistillation("standard", chunk_size=2)
    losses = [method({"student": view, "teacher": teacher}, MASK)["std"] for view in views]
    parameters = [x for x in model.parameters() if x.requires_grad]
    for x, y in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        assert_close(x, y, **CLOSE)
        assert y.any()
    with model.disable_adapter():
        assert_close(response_states(model, batch, 3).logits(), response_logits(model, batch, 3), **CLOSE)
    if "modules_to_save" not in options:
        model.merge_adapter()
        assert_close(response_states(model, batch, 3).logits(), response_logits(model, batch, 3), **CLOSE)


@peft_warnings
def test_the_head_of_an_adapter_that_is_switched_off_is_compared_by_itself(monkeypatch):
    model, batch = peft_model(target_modules=["lm_head"]), batch_of([2, 20], [2, 21])
    response_states(model, batch, 3)
    head = Head.of(model)
    monkeypatch.setattr(Head, "of", lambda model: dataclasses.replace(head, lora_A_rd=None, lora_B_Vr=None))
    with pytest.raises(RuntimeError, match=r"changes its logits in a way that Head.of does not know"):
        response_states(model, batch, 3)


@peft_warnings
@pytest.mark.parametrize(
    "options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=lambda options: next(iter(options))
)
def test_adapters_that_are_more_than_a_product_are_refused(options):
    model = peft_model(target_modules=["lm_head"], **options).train()
    with pytest.raises(ValueError, match=r"must be one plain LoRA.*pass logits instead"):
        Head.of(model)
    if "lora_dropout" in options:
        assert Head.of(model.eval()).lora_B_Vr is not None


@peft_warnings
@pytest.mark.parametrize("kind", ["IA3", "LoHa", "AdaLora", "TrainableTokens"])
def test_adapters_of_another_kind_on_the_head_are_refused(kind):
    peft = pytest.importorskip("peft")
    options = {"AdaLora": {"total_step": 10}, "IA3": {"feedforward_modules": []}, "TrainableTokens": {}}.get(kind, {})
    where = {"token_indices": [3]} if kind == "TrainableTokens" else {"target_modules": ["lm_head"]}
    config = getattr(peft, f"{kind}Config")(**where, **options)
    model = peft.get_peft_model(text_model("llama", tie_word_embeddings=kind == "TrainableTokens"), config)
    with pytest.raises(ValueError, match=r"must be one plain LoRA.*or no LoRA: pass logits instead"):
        Head.of(model)
    with model.disable_adapter():
        assert Head.of(model).lora_B_Vr is None


@peft_warnings
def test_two_active_adapters_are_refused():
    model = peft_model(target_modules=["lm_head"])
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"adapters \['default', 'other'\]"):
        Head.of(model)


def test_heads_and_states_that_do_not_fit_are_refused_by_name():
    weight = torch.randn(7, 4)

    for match, options in (
        (r"bias_V must be \(7,\) .*got \(4,\)", {"bias_V": torch.zeros(4)}),
        ("the two factors of one adapter", {"lora_A_rd": torch.zeros(2, 4)}),
        (r"lora_B_Vr must be \(7, 2\).*got \(7, 3\)", {"lora_A_rd": torch.zeros(2, 4), "lora_B_Vr": torch.zeros(7, 3)}),
        ("softcap must be positive", {"softcap": 0.0}),
    ):
        with pytest.raises(ValueError, match=match):
            Head(weight, **options)
    with pytest.raises(ValueError, match=r"weight_Vd must be \(V, d\) and floating; got \(0,\)"):
        Head(torch.zeros(0))
    for wrong in (torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, device="meta")):
        with pytest.raises(ValueError, match=r"hidden states must be floating, \(\.\.\., 4\)"):
            HiddenStates(wrong, Head(weight))


def test_heads_are_the_same_where_they_are_made_of_the_same():
    weight, bias = nn.Parameter(torch.randn(7, 4)), torch.randn(7)
    for same in (weight, weight.detach(), weight.view(7, 4)):
        assert Head(weight, bias_V=bias).same(Head(same, bias_V=bias.detach()))
    for other in (weight.clone(), weight[:6], weight.T.contiguous().T):
        assert not Head(weight).same(Head(other))
    assert not Head(weight).same(Head(weight, softcap=3.0))
    assert not Head(weight).same(Head(weight, bias_V=bias))


@pytest.mark.parametrize("padded", [0, -20])
@pytest.mark.parametrize("kind", ["weight", "adapter"])
@peft_warnings
def test_a_view_without_gradients_is_a_constant_to_the_head_too(kind, padded):
    model = Bigram() if kind == "weight" else peft_model(target_modules=["lm_head"])
    batch = batch_of([2, 20], [2, 21])
    teacher = torch.randn(2, 2, 3, VOCABULARY + padded).unbind()
    found, meant = {}, {}
    for components, of in ((found, response_states), (meant, response_logits)):
        with torch.no_grad():
            text = of(model, batch, 3)
        views = views_of([of(model, batch, 3), text, *teacher])
        components |= DecomposedDistillation("vgs", lam=0.0)(views, MASK)
        with pytest.raises(ValueError, match="student_text requires no grad"):
            DecomposedDistillation("vgs", lam=1.0)(views, MASK)
    assert {key: loss.requires_grad for key, loss in found.items()} == {"std": True, "vis": True}
    parameters = [x for x in model.parameters() if x.requires_grad]
    for key in ("std", "vis"):
        pairs = (torch.autograd.grad(losses[key], parameters, retain_graph=True) for losses in (found, meant))
        for x, y in zip(*pairs, strict=True):
            assert_close(x, y, **CLOSE)


def test_a_static_graph_which_would_not_average_is_refused():
    """DDP averages in the backward pass of what it returned, which states are no part of."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        batch = batch_of([2, 20], [2, 21])
        model = nn.parallel.DistributedDataParallel(text_model("llama"), static_graph=True)
        with pytest.raises(RuntimeError, match=r"static_graph does not average the gradients.*model\.module"):
            response_states(model, batch, 3)
        with torch.no_grad():
            assert response_states(model, batch, 3).shape == (2, 3, VOCABULARY)
    finally:
        torch.distributed.destroy_process_group()


def test_states_remember_the_autocast_of_their_pass():
    """On an accelerator the losses then multiply as the model's own head would have."""
    model, batch = text_model("llama"), batch_of([2, 20], [2, 21])
    assert response_states(model, batch, 3).autocast is None
    with torch.autocast("cpu", torch.bfloat16):
        states = response_states(model, batch, 3)
    assert states.autocast == states[:1].detach().autocast == torch.bfloat16


def test_score_names_what_it_lacks():
    student, teacher, method = text_model("llama"), text_model("llama"), DecomposedDistillation("vgs-frozen")
    prompt = {"input_ids": torch.tensor([[2, 20], [2, 21]])}
    prompts, response = Prompts(prompt, prompt), Rollout(RESPONSE, MASK)

    def refuse(kind, match, *models, **options):
        with pytest.raises(kind, match=match):
            score(*models, **{"prompts": prompts, "response": response, "method": method, **options})

    refuse(ValueError, r"pass prior=copy\.deepcopy\(student\).*before\s+fully_shard", student, teacher)
    refuse(ValueError, "prior is the student itself", student, teacher, prior=student)
    refuse(ValueError, "computes the views student, .*; got teachr", student, teacher, names=("teachr",))
    refuse(ValueError, "the view teacher needs a teacher", student, None, prior=teacher)
    refuse(TypeError, "score takes Prompts, .* got dict and Rollout", student, teacher, prompts=prompt)
    refuse(TypeError, "got Prompts and list", student, teacher, response=[[1]])
    known = score(student, teacher, prompts, response, method=method, names=("teacher", "teacher_text"))
    assert list(known) == ["teacher", "teacher_text"]
    assert score(student, teacher, prompts, response, method=method, names=()) == {}
    views = score(student, None, prompts, response, method=method, prior=teacher, known=known)
    assert {*views} == {*method.views}
    assert views["teacher"] is known["teacher"]
    assert method(views, response.scored_BT)["vis"].requires_grad


@peft_warnings
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_takes_its_start_from_the_weights_is_no_prior(start):
    model, method = peft_model(target_modules=["q_proj"], init_lora_weights=start), DecomposedDistillation("vgs-frozen")
    prompt = {"input_ids": torch.tensor([[2, 20], [2, 21]])}
    given = Prompts(prompt, prompt), Rollout(RESPONSE, MASK)
    with pytest.raises(
        ValueError, match=f"init_lora_weights='{start}' moves a part .* pass prior=, a copy made before"
    ):
        score(model, None, *given, method=method, names=("prior",))
    assert score(model, None, *given, method=method, names=("prior",), prior=copy.deepcopy(model))


@peft_warnings
def test_an_adapters_student_is_its_own_prior_unless_more_is_trained():
    model, method = peft_model(target_modules=["q_proj"]), DecomposedDistillation("vgs-frozen")
    prompt = {"input_ids": torch.tensor([[2, 20], [2, 21]])}
    arguments = {"prompts": Prompts(prompt, prompt), "response": Rollout(RESPONSE, MASK), "method": method}
    views = score(nn.DataParallel(model), text_model("llama"), **arguments, names=("prior",))
    with model.disable_adapter():
        meant = response_logits(model, batch_of([2, 20], [2, 21]), 3)
    assert_close(views["prior"].logits(), meant, **CLOSE)
    model.base_model.model.model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"model\.norm\.weight is trained but not part of an adapter"):
        score(model, text_model("llama"), **arguments)
