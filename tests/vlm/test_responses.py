"""Responses, sampled anywhere, behind either view of a prompt."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import BOS, FAMILIES, IMAGE, PLACEHOLDER
from torch import Tensor
from zoo import Zoo

from steer_optim.vlm.forward import response_logits
from steer_optim.vlm.prompts import Rollout, append_response, left_padded, text_only
from steer_optim.vlm.rollout import rollout

# Float32 sums in another order, at logits of up to 20.
ATOL = 2e-5
CONFIG = SimpleNamespace(model_type="mystery", image_token_id=3, video_token_id=4, audio_token_index=5)
PROMPTS = [[BOS, 20, IMAGE, 21, 22], [IMAGE, 30, IMAGE, 31, 32, 33, 34], [BOS, 40, IMAGE, 41]]

zoo = cache(Zoo)
texts = st.lists(st.integers(20, 100), max_size=6)
responses = st.lists(texts, min_size=1, max_size=4)


@given(rows=responses, data=st.data())
def test_lists_of_any_lengths_become_a_rollout_and_back(rows, data):
    scored = [data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))) for row in rows]
    made = Rollout.of(rows, config=CONFIG, scored=scored)
    assert made.response_BT.shape == (len(rows), max(map(len, rows)))
    assert made.response_BT.dtype == torch.int64
    assert [ids[mask].tolist() for ids, mask in zip(made.response_BT, made.mask_BT, strict=True)] == rows
    assert [flags[mask].tolist() for flags, mask in zip(made.scored_BT, made.mask_BT, strict=True)] == scored
    assert not (made.scored_BT & ~made.mask_BT).any()
    assert Rollout.of(rows, config=CONFIG).scored_BT.equal(made.mask_BT)
    assert Rollout.of(list(map(torch.tensor, rows)), config=CONFIG).response_BT.equal(made.response_BT)
    integers = Rollout(made.response_BT, made.mask_BT.long(), made.scored_BT.long())
    assert integers.mask_BT.equal(made.mask_BT)
    assert integers.scored_BT.equal(made.scored_BT)


@given(rows=responses, data=st.data())
def test_holes_change_what_is_scored_and_nothing_that_the_model_reads(rows, data):
    scored = [data.draw(st.lists(st.booleans(), min_size=len(row), max_size=len(row))) for row in rows]
    batch = {"input_ids": torch.full((len(rows), 2), 20)}
    holes, whole = (Rollout.of(rows, config=CONFIG, scored=flags) for flags in (scored, None))
    for key, value in append_response(batch, holes, CONFIG).items():
        assert value.equal(append_response(batch, whole, CONFIG)[key])


@given(rows=responses, data=st.data())
def test_placeholders_are_refused_where_they_are(rows, data):
    row = data.draw(st.integers(0, len(rows) - 1))
    position = data.draw(st.integers(0, len(rows[row])))
    token = data.draw(st.sampled_from([3, 4, 5]))
    rows[row].insert(position, token)
    unchecked = Rollout.of(rows, config=SimpleNamespace())
    batch = {"input_ids": torch.full((len(rows), 2), 20)}
    for f in (lambda: Rollout.of(rows, config=CONFIG), lambda: append_response(batch, unchecked, CONFIG)):
        with pytest.raises(ValueError, match=f"response {row} has the placeholder {token} at token {position}"):
            f()
    padded = Rollout(unchecked.response_BT.where(unchecked.mask_BT, token), unchecked.mask_BT & False)
    append_response(batch, padded, CONFIG)  # not attended


@pytest.mark.parametrize("use", [lambda *given: append_response(*given), lambda batch, _, __: sampled(batch)])
def test_placeholders_without_pixels_are_refused(use):
    response = Rollout.of([[30], [31]], config=CONFIG)
    batch = {"input_ids": torch.tensor([[20, 21, 22], [20, 4, 22]]), "position_ids": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"prompt 1 has placeholders of images, but .* only the keys input_ids, pos"):
        use(batch, response, CONFIG)


def test_padding_with_a_placeholder_is_no_image():
    ids, mask = [[20, 21, 22], [4, 4, 22]], [[1, 1, 1], [0, 0, 1]]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    view = append_response(batch, Rollout.of([[30], [31]], config=CONFIG), CONFIG)
    assert view["input_ids"].tolist() == [[20, 21, 22, 30], [0, 0, 22, 31]]


@pytest.mark.parametrize("config", [SimpleNamespace(model_type="llama"), SimpleNamespace(image_token_id=9)])
def test_pixels_that_the_model_would_not_read_are_refused(config):
    """A language model takes pixels among other keywords, and sees no image."""
    batch = {"input_ids": torch.tensor([[20, 3, 3, 22]]), "pixel_values": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"has pixel_values, but no prompt has a placeholder .* names (none|\[9\])"):
        append_response(batch, Rollout.of([[30]], config=config), config)


def sampled(batch):
    return rollout(SimpleNamespace(config=CONFIG), batch, max_new_tokens=1)


def test_what_is_no_rollout_is_refused():
    with pytest.raises(ValueError, match="there are no responses"):
        Rollout.of([], config=CONFIG)
    for scored in ([[1]], [[1], [1]], [[1, 1], []]):
        with pytest.raises(ValueError, match="scored must have one flag per token: responses have"):
            Rollout.of([[20, 21], [22]], config=CONFIG, scored=scored)
    ids_BT = torch.full((2, 3), 20)
    hole, late = torch.tensor([[1, 1, 1], [1, 0, 1]]).bool(), torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    for mask_BT in (hole, late):
        with pytest.raises(ValueError, match=r"mask_BT of response 1 has a hole or begins late: .* scored_BT"):
            Rollout(ids_BT, mask_BT)
    with pytest.raises(ValueError, match="response 1 has scored tokens outside mask_BT"):
        Rollout(ids_BT, torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(), torch.ones(2, 3).bool())


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3"])
def test_a_tools_answer_is_attended(name):
    """What follows the hole is predicted from it: from its ids, not from zeros, nor as if it were not there."""
    family = FAMILIES[name]()
    batch, config = family.batch([[BOS, IMAGE, 20]]), family.model.config
    ids = [30, 31, 32, 33, 34]

    def logits(ids: list[int], scored: list[int]) -> Tensor:
        given = Rollout.of([ids], config=config, scored=[scored])
        with torch.no_grad():
            return response_logits(family.model, append_response(batch, given, config), len(ids))

    with_hole = logits(ids, [1, 0, 0, 1, 1])
    assert with_hole.equal(logits(ids, [1] * 5))
    other = logits([30, 40, 41, 33, 34], [1, 0, 0, 1, 1])
    assert ((with_hole - other)[:, 3:].abs().amax(dim=-1) > 0.01).all()


# Types of a response, a mask over images, a family's own types: what only some families have per token.
@pytest.mark.parametrize("name", ["paligemma", "mllama", "ernie4_5_vl_moe", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("view", ["image", "text"])
def test_what_is_per_token_goes_on_as_the_model_means_it(name, side, view):
    family = zoo(name)
    model, config = family.model, family.config
    batch = family.batch(PROMPTS, side)
    if view == "text":
        batch = text_only(batch, config, tokenizer=family.tokenizer)
    generated = model.generate(
        **left_padded(batch),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        suppress_tokens=[PLACEHOLDER, *range(20)],
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    ids_BT = generated.sequences[:, -5:]
    appended = append_response(batch, Rollout(ids_BT, torch.ones_like(ids_BT).bool()), config)
    assert "labels" not in appended
    with torch.no_grad():
        logits_BTV = response_logits(model, appended, 5)
    torch.testing.assert_close(logits_BTV, torch.stack(generated.logits, dim=1), rtol=0, atol=ATOL)
    changed_BT = ids_BT.clone()
    changed_BT[:, 3] = torch.where(ids_BT[:, 3] == 60, 61, 60)
    changed = append_response(batch, Rollout(changed_BT, torch.ones_like(ids_BT).bool()), config)
    with torch.no_grad():
        changed_BTV = response_logits(model, changed, 5)
    torch.testing.assert_close(changed_BTV[:, :4], logits_BTV[:, :4], rtol=0, atol=ATOL)
    assert ((changed_BTV - logits_BTV)[:, 4].abs().amax(dim=-1) > 0.01).all()


@pytest.mark.parametrize("name", ["mllama", "ernie4_5_vl_moe", "paligemma"])
def test_every_key_moves_to_the_left_with_its_token(name):
    family = zoo(name)
    right, left = (left_padded(family.batch(PROMPTS, side)) for side in ("right", "left"))
    assert right.keys() == left.keys()
    real_BL = left["attention_mask"].bool()
    for key, value in left.items():
        per_token = value.shape[:2] == real_BL.shape
        assert (right[key][real_BL] if per_token else right[key]).equal(value[real_BL] if per_token else value), key


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5)])
def test_a_key_that_no_family_has_is_refused_by_name(shape):
    batch = {"input_ids": torch.tensor([[20, 3, 20]] * 2), "novel_ids": torch.zeros(shape)}
    given = Rollout.of([[20], [21]], config=CONFIG)
    with pytest.raises(ValueError, match=r"'novel_ids' has the shape .*leave it out of the batch, or name it in per"):
        append_response(batch, given, CONFIG)
    batch["labels"] = batch.pop("novel_ids")
    batch["novel_pixels"] = torch.zeros(2, 4, 3)
    assert append_response(batch, given, CONFIG).keys() == {"input_ids", "attention_mask", "novel_pixels"}


@pytest.mark.parametrize("responses", [[3, 4], [[[3, 4]]], [[3.5]], ["a cat"], [None, [3]], [[[3], [4, 5]]]])
def test_responses_that_are_no_lists_of_integers_are_refused(responses):
    with pytest.raises(ValueError, match="one list of integer ids for each prompt"):
        Rollout.of(responses, config=SimpleNamespace(image_token_id=7))
