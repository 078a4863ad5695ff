from contextlib import contextmanager
from functools import cache

import pytest
import torch
from tiny_models import BOS, EOS, FAMILIES, IMAGE, PAD, SPECIAL_IDS, Family, transformers
from torch import Tensor

from steer_optim.vlm.forward import response_logits
from steer_optim.vlm.prompts import append_response, text_only
from steer_optim.vlm.rollout import Rollout, rollout

# Cached and full passes order their float32 sums differently; probabilities are at most 1, log-probs reach -30.
ATOL = 2e-5

PROMPTS = [[BOS, 20, IMAGE, 21, 22], [BOS, 30, 31], [IMAGE, 40, IMAGE, 41, 42, 43, 44, 45, 46, 47]]

family_of = cache(lambda name: FAMILIES[name]())
families = pytest.mark.parametrize("name", FAMILIES)
sides = pytest.mark.parametrize("side", ["left", "right"])


def suppressed(family: Family) -> list[int]:
    """The special ids that this family has: others with these numbers are text."""
    video = getattr(family.model.config, "video_token_id", PAD)
    return sorted({PAD, video, *family.image, *(family.drop_ids or ())} & set(SPECIAL_IDS))


def ask(family: Family, prompts=PROMPTS, side: str = "left", **options) -> Rollout:
    options = {"max_new_tokens": 5, "suppress_ids": family.drop_ids or (), **options}
    return rollout(family.model, family.batch(prompts, side), **options)


@contextmanager
def biased(family: Family, bias_V: dict[int, float]):
    """Adds to the logits of some ids."""

    def add(_, __, logits: Tensor) -> Tensor:
        logits = logits.clone()
        for token, value in bias_V.items():
            logits[..., token] += value
        return logits

    hook = family.model.get_output_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


@families
@sides
@pytest.mark.parametrize("view", ["image", "text"])
def test_tokens_are_drawn_from_the_policy_that_the_losses_see(name, side, view, monkeypatch):
    family = family_of(name)
    batch = family.batch(PROMPTS, side)
    if view == "text":
        batch = text_only(batch, family.model.config, drop_ids=family.drop_ids)
    drawn_from = []
    multinomial = torch.multinomial

    def spy(probabilities: Tensor, *args, **kwargs) -> Tensor:
        drawn_from.append(probabilities)
        return multinomial(probabilities, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", spy)
    # What a checkpoint may ship must not bend the distribution.
    shipped = {"temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.2, "repetition_penalty": 1.7}
    monkeypatch.setattr(
        family.model,
        "generation_config",
        transformers.GenerationConfig(**shipped, no_repeat_ngram_size=1, eos_token_id=EOS, pad_token_id=PAD),
    )
    responses = rollout(family.model, batch, max_new_tokens=5, suppress_ids=family.drop_ids or ())
    appended = append_response(batch, responses, family.model.config)
    T = responses.response_BT.shape[1]
    with torch.no_grad():
        logits_BTV = response_logits(family.model, appended, T)
    logits_BTV[..., suppressed(family)] = -torch.inf
    probabilities_BTV = torch.stack(drawn_from, dim=1)
    expected_BTV = logits_BTV.softmax(dim=-1)
    mask_BT = responses.mask_BT
    assert mask_BT.any(dim=1).all()
    torch.testing.assert_close(probabilities_BTV[mask_BT], expected_BTV[mask_BT], rtol=0, atol=ATOL)
    # Of the tokens that were drawn, the log-probs themselves: small probabilities count there.
    drawn_BT1 = responses.response_BT[..., None]
    log_probs_BT = expected_BTV.log().gather(-1, drawn_BT1)[..., 0]
    torch.testing.assert_close(
        probabilities_BTV.log().gather(-1, drawn_BT1)[..., 0][mask_BT], log_probs_BT[mask_BT], rtol=0, atol=ATOL
    )


@families
@sides
def test_greedy_is_the_argmax_of_every_row_by_itself(name, side):
    family = family_of(name)
    responses = ask(family, side=side, temperature=0, max_new_tokens=4, eos_ids=())
    for row, prompt in enumerate(PROMPTS):
        tokens: list[int] = []
        for _ in range(4):
            with torch.no_grad():
                logits_V = family.model(**family.batch([[*prompt, *tokens]]), use_cache=False).logits[0, -1]
            logits_V[suppressed(family)] = -torch.inf
            tokens.append(int(logits_V.argmax()))
        assert responses.response_BT[row].tolist() == tokens
    assert responses.mask_BT.all()


@families
@sides
def test_the_mask_ends_with_the_end_of_sequence(name, side):
    family = family_of(name)
    free = ask(family, side=side, temperature=0, max_new_tokens=6, eos_ids=()).response_BT
    # A token that some response holds early makes it end there, and the others go on.
    end = int(free[0, 1])
    responses = ask(family, side=side, temperature=0, max_new_tokens=6, eos_ids=end)
    lengths = [(row.index(end) + 1 if end in row else 6) for row in free.tolist()]
    assert lengths[0] <= 2
    T = max(lengths)
    assert responses.response_BT.shape == responses.mask_BT.shape == (3, T)
    assert responses.response_BT.dtype == torch.int64
    assert responses.mask_BT.dtype == torch.bool
    for row, length in enumerate(lengths):
        assert responses.mask_BT[row].tolist() == [True] * length + [False] * (T - length)
        assert responses.response_BT[row].tolist() == free[row, :length].tolist() + [PAD] * (T - length)


@sides
def test_rows_that_end_at_different_lengths(side):
    family = family_of("llava")
    # The head calls the end for row r after r tokens: prefill first, then one call per token.
    calls = []

    def end(_, __, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, -1, EOS] = -1e4
        if len(calls) < 3:
            logits[len(calls), -1, EOS] = 1e4
        calls.append(None)
        return logits

    hook = family.model.get_output_embeddings().register_forward_hook(end)
    responses = ask(family, side=side, max_new_tokens=8)
    hook.remove()
    assert responses.mask_BT.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert (responses.response_BT == EOS).tolist() == torch.eye(3, dtype=torch.bool).tolist()
    assert (responses.response_BT[~responses.mask_BT] == PAD).all()


@families
def test_all_end_at_once_or_never(name):
    family = family_of(name)
    with biased(family, {EOS: 1e4}):
        at_once = ask(family)
    assert at_once.response_BT.tolist() == [[EOS]] * 3
    assert at_once.mask_BT.tolist() == [[True]] * 3
    with biased(family, {EOS: -1e4}):
        never = ask(family)
    assert never.mask_BT.tolist() == [[True] * 5] * 3
    assert not (never.response_BT == EOS).any()


@families
def test_special_ids_are_never_sampled(name):
    family = family_of(name)
    with biased(family, dict.fromkeys(suppressed(family), 1e4)):
        for options in ({}, {"temperature": 0}):
            sampled = ask(family, **options)
            tokens_N = sampled.response_BT[sampled.mask_BT]  # what follows an end is padding
            assert not torch.isin(tokens_N, torch.tensor(suppressed(family))).any()
        assert (ask(family, suppress_ids=[*(family.drop_ids or ()), 50]).response_BT != 50).all()
    # The bias is strong enough to be the whole response where nothing forbids it.
    with biased(family, {50: 1e4}):
        assert (ask(family).response_BT == 50).all()


def test_padding_is_sampled_only_where_it_is_the_end():
    family = family_of("llava")
    with biased(family, {60: 1e4}):
        assert (ask(family, pad_id=60).response_BT != 60).all()
        ended = ask(family, pad_id=60, eos_ids=[60])
    assert ended.response_BT.tolist() == [[60]] * 3
    assert ended.mask_BT.all()


def test_padding_falls_back_to_an_end_id(monkeypatch):
    family = family_of("llava")
    monkeypatch.setattr(family.model, "generation_config", transformers.GenerationConfig(eos_token_id=[70, 80]))
    free = ask(family, temperature=0, eos_ids=()).response_BT
    responses = ask(family, temperature=0, eos_ids=[int(free[0, 0]), 80])
    assert responses.mask_BT[0].tolist()[:2] == [True, False]
    assert (responses.response_BT[~responses.mask_BT] == min(int(free[0, 0]), 80)).all()


@families
def test_everything_is_left_as_it_was(name):
    family = FAMILIES[name]()
    model = family.model.train()
    frozen = next(module for key, module in model.named_modules() if key.endswith(("visual", "vision_model", "tower")))
    frozen.eval()
    before = {key: module.training for key, module in model.named_modules()}
    config = model.generation_config
    stale = [module for module in model.modules() if "rope_deltas" in vars(module)]
    for module in stale:
        module.rope_deltas = offsets = torch.full((7, 1), 5)
    ask(family)
    assert {key: module.training for key, module in model.named_modules()} == before
    assert any(before.values())
    assert not all(before.values())
    assert model.generation_config is config
    assert all(module.rope_deltas is offsets for module in stale)
    model.get_output_embeddings().register_forward_hook(_fail)
    with pytest.raises(ValueError, match="fails on purpose"):
        ask(family)
    assert {key: module.training for key, module in model.named_modules()} == before
    assert model.generation_config is config


def _fail(*_):
    raise ValueError("fails on purpose")


@families
def test_a_training_model_with_checkpointing_samples_as_in_evaluation(name):
    family = FAMILIES[name]()
    expected = ask(family, temperature=0)
    # Later versions of transformers have the first name and warn of the second.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(family.model, key) for key in names if hasattr(family.model, key))()
    family.model.train()
    family.model.config.use_cache = False
    lengths = []
    embeddings = family.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    responses = ask(family, temperature=0)
    handle.remove()
    assert responses.response_BT.equal(expected.response_BT)
    assert len(lengths) > 1
    assert set(lengths[1:]) == {1}  # one new token a pass: the cache was in use
    assert not responses.response_BT.requires_grad


def test_sampling_follows_the_global_seed_and_its_options():
    family = family_of("qwen3_vl")
    rows = [PROMPTS[0]] * 8
    torch.manual_seed(3)
    first, second = (ask(family, rows).response_BT for _ in range(2))
    torch.manual_seed(3)
    assert ask(family, rows).response_BT.equal(first)
    assert not first.equal(second)
    greedy = ask(family, rows, temperature=0).response_BT
    assert ask(family, rows, top_p=1e-6).response_BT.equal(greedy)
    assert ask(family, rows, temperature=1e-4).response_BT.equal(greedy)
    assert not first.equal(greedy)


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}]
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"a rollout needs max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1"):
        ask(family_of("llava"), **options)


def test_a_rollout_of_what_is_no_batch_or_no_token_is_refused():
    with pytest.raises(TypeError, match=r"prompts must be those of render, or a processor's batch; got list"):
        rollout(FAMILIES["llava"]().model, [[{"role": "user", "content": "a"}]], max_new_tokens=2)
    for wrong in (-100, 10_000):
        with pytest.raises(ValueError, match=f"response 1 has the id {wrong} at token 2: no such token"):
            Rollout.of([[20], [21, 22, wrong]], config=FAMILIES["llava"]().model.config)
