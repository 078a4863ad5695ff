from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    BOS,
    END,
    FAMILIES,
    GLOBAL,
    IMAGE,
    NEWLINE,
    PLACEHOLDER,
    ROW_1,
    START,
    VIDEO,
    VOCABULARY,
    Family,
    transformers,
)
from torch import Tensor, nn

from steer_optim.vlm.families import image_ids
from steer_optim.vlm.forward import response_logits
from steer_optim.vlm.prompts import Rollout, append_response, left_padded, text_only

# The models normalise and rotate in float32 whatever the dtype, and padding moves the positions that are rotated: a
# few roundings of 6e-8 per layer, over logits of up to 20 (Gemma 3).
ATOL = 2e-5

# One image, none, several in a row, newlines beside an image, and rows of different lengths.
PROMPTS = [
    [BOS, 20, IMAGE, 21, 22],
    [BOS, 30, 31],
    [IMAGE, 40, IMAGE, 41, 42, 43, 44, 45, 46, 47],
    [BOS, 50, NEWLINE, IMAGE, 51, NEWLINE, 52],
    [BOS, IMAGE, NEWLINE, IMAGE, 60],
]
WITHOUT_IMAGES = [[token for token in prompt if token != IMAGE] for prompt in PROMPTS]

family_of = cache(lambda name: FAMILIES[name]())
families = pytest.mark.parametrize("name", FAMILIES)
sides = pytest.mark.parametrize("side", ["left", "right"])


def view_of(family: Family, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return text_only(batch, family.model.config, drop_ids=family.drop_ids)


def responses(rows: int) -> Rollout:
    """Responses of 4, 0, 1, 2, ... tokens; what follows them is a label that no embedding has."""
    lengths = torch.tensor([4, 0, 1, 2, 3])[:rows]
    mask_BT = torch.arange(4) < lengths[:, None]
    return Rollout(torch.randint(20, 100, (rows, 4)).masked_fill(~mask_BT, -100), mask_BT)


def naive_logits(family: Family, prompt: list[int], response: list[int]) -> Tensor:
    """The rows that predict the response, of a full pass over this row alone, never padded."""
    batch = family.batch([[*prompt, *response]])
    first = len(family.ids(prompt)) - 1
    with torch.no_grad():
        return family.model(**batch, use_cache=False).logits[0, first : first + len(response)]


@families
@sides
def test_the_text_view_is_the_prompt_written_without_an_image(name, side):
    family = family_of(name)
    view, written = view_of(family, family.batch(PROMPTS, side)), family.batch(WITHOUT_IMAGES, side)
    assert view.keys() == written.keys()
    for key in view:
        torch.testing.assert_close(view[key], written[key], rtol=0, atol=0)
    with torch.no_grad():
        logits, expected = family.model(**view).logits, family.model(**written).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@families
@sides
def test_response_rows_are_those_of_every_row_by_itself(name, side):
    family = family_of(name)
    batch = family.batch(PROMPTS, side)
    given = responses(len(PROMPTS))
    for view, prompts in ((batch, PROMPTS), (view_of(family, batch), WITHOUT_IMAGES)):
        appended = append_response(view, given, family.model.config)
        with torch.no_grad():
            logits_BTV = response_logits(family.model, appended, 4)
        assert logits_BTV.shape == (len(PROMPTS), 4, VOCABULARY)
        assert logits_BTV.isfinite().all()
        for row, prompt in enumerate(prompts):
            expected = naive_logits(family, prompt, given.response_BT[row, given.mask_BT[row]].tolist())
            torch.testing.assert_close(logits_BTV[row, : len(expected)], expected, rtol=0, atol=ATOL)


@families
def test_the_image_changes_the_logits_and_no_image_does_not(name):
    family = family_of(name)
    batch = family.batch(PROMPTS)
    given = Rollout.of([[33, 33]] * 5, config=family.model.config)
    with torch.no_grad():
        with_image, without = (
            response_logits(family.model, append_response(view, given, family.model.config), 2)
            for view in (batch, view_of(family, batch))
        )
    difference_B = (with_image - without).abs().amax(dim=(1, 2))
    assert difference_B[1] < ATOL
    assert (difference_B[[0, 2, 3, 4]] > 0.1).all()


@families
@settings(max_examples=40)
@given(data=st.data())
def test_any_mixture_of_text_and_images(name, data):
    family = family_of(name)
    text = st.integers(20, 100).map(lambda token: [token])
    piece = st.one_of(text, st.just([IMAGE]), st.just([NEWLINE, IMAGE]), st.just([30, NEWLINE + 3, 31]))
    prompt = st.tuples(text, st.lists(piece, max_size=5)).map(lambda p: sum(p[1], p[0]))
    prompts = data.draw(st.lists(prompt, min_size=1, max_size=4))
    side = data.draw(st.sampled_from(["left", "right"]))
    view = view_of(family, family.batch(prompts, side))
    written = family.batch([[token for token in row if token != IMAGE] for row in prompts], side)
    # Left-over newlines of one image and of the next are two tokens here, one where the text is tokenized anew.
    real_rows = [ids[mask.bool()].tolist() for ids, mask in zip(view["input_ids"], view["attention_mask"], strict=True)]
    assert list(map(family.ids, real_rows)) == [
        ids[mask.bool()].tolist() for ids, mask in zip(written["input_ids"], written["attention_mask"], strict=True)
    ]


def test_gemma_takes_back_its_own_newlines_only():
    config = family_of("gemma3").model.config
    two, three, four, five = (NEWLINE + n for n in (1, 2, 3, 4))
    image = [START, PLACEHOLDER, PLACEHOLDER, END]

    def left(*ids: int) -> list[int]:
        return text_only({"input_ids": torch.tensor([ids])}, config)["input_ids"][0].tolist()

    assert left(20, two, *image, two, 21) == [20, 21]
    assert left(20, three, *image, five, 21) == [20, four, 21]  # the text's on both sides, in one token
    assert left(20, two, *image, four, *image, two, 21) == [20, 21]
    assert left(20, two, *image, five, *image, two, 21) == [20, NEWLINE, 21]
    assert left(20, two, NEWLINE, 21, two, *image, two, NEWLINE, two) == [20, two, NEWLINE, 21, NEWLINE, two]


def test_a_newline_between_two_images_stays_where_it_belongs_to_the_text():
    config = family_of("smolvlm").model.config
    whole = [START, GLOBAL, PLACEHOLDER, START]
    tiles = [START, ROW_1, PLACEHOLDER, NEWLINE, NEWLINE, *whole]
    batch = {"input_ids": torch.tensor([[20, *tiles, NEWLINE, *whole, NEWLINE, 21]])}
    view = text_only(batch, config, drop_ids=(START, ROW_1, GLOBAL))
    assert view["input_ids"].tolist() == [[20, NEWLINE, NEWLINE, 21]]


def test_videos_go_too():
    config = family_of("qwen3_vl").model.config
    assert image_ids(config) == {START, PLACEHOLDER, VIDEO, END}
    batch = {"input_ids": torch.tensor([[20, START, VIDEO, VIDEO, END, 21]]), "pixel_values_videos": torch.ones(1)}
    view = text_only(batch, config)
    assert view.keys() == {"input_ids", "attention_mask"}
    assert view["input_ids"].tolist() == [[20, 21]]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_tokens_that_only_the_tokenizer_knows_must_be_named(name):
    family = family_of(name)
    with pytest.raises(
        ValueError, match=f"config of '{name}' does not name the tokens <fake_token_around_image>: pass"
    ):
        text_only(family.batch(PROMPTS), family.model.config)
    # The token that closes an image is missing: what follows the image would look like a part of it.
    with pytest.raises(ValueError, match="an image of row 0 is not closed by any known token"):
        text_only(family.batch(PROMPTS), family.model.config, drop_ids=(ROW_1, GLOBAL))


def test_a_config_without_any_known_id_is_refused():
    batch = {"input_ids": torch.tensor([[20, 21]])}
    with pytest.raises(ValueError, match="config of 'mystery' does not name the tokens of an image"):
        text_only(batch, SimpleNamespace(model_type="mystery"))
    pixtral = SimpleNamespace(
        model_type="llava", image_token_index=10, vision_config=SimpleNamespace(model_type="pixtral")
    )
    with pytest.raises(ValueError, match=r"config of 'llava' does not name the tokens \[IMG_BREAK\] \[IMG_END\]: pass"):
        text_only(batch, pixtral)
    bare = SimpleNamespace(model_type="mystery", image_token_id=20)
    with pytest.raises(ValueError, match="config of 'mystery' does not name the tokens around an image"):
        text_only(batch, bare)
    assert text_only(batch, bare, drop_ids=())["input_ids"].tolist() == [[21]]


def test_a_cut_image_and_a_row_without_text_are_refused():
    config = family_of("qwen3_vl").model.config
    rows = torch.tensor([[20, 21, 22, 23], [20, START, PLACEHOLDER, PLACEHOLDER]])
    with pytest.raises(ValueError, match="an image of row 1 is not closed"):
        text_only({"input_ids": rows}, config)
    rows = torch.tensor([[20, 21, 22], [START, PLACEHOLDER, END]])
    with pytest.raises(ValueError, match="row 1 holds images only"):
        text_only({"input_ids": rows}, config)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_rotary_offsets_of_another_pass_are_neither_read_nor_changed(name):
    family = family_of(name)
    batch = family.batch(PROMPTS)
    given, config = responses(len(PROMPTS)), family.model.config
    views = [append_response(view, given, config) for view in (batch, view_of(family, batch))]
    with torch.no_grad():
        expected = [response_logits(family.model, view, 4) for view in views]
        family.model.generate(**family.batch(PROMPTS[:1] * 3), max_new_tokens=1, do_sample=False, pad_token_id=0)
        offsets = family.model.model.rope_deltas
        assert offsets.shape[0] == 3  # the generation did leave something behind
        for view, logits in zip(views, expected, strict=True):
            torch.testing.assert_close(response_logits(family.model, view, 4), logits, rtol=0, atol=0)
    assert family.model.model.rope_deltas is offsets


@families
def test_only_the_response_rows_meet_the_head(name):
    family = family_of(name)
    rows = []
    head = family.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    appended = append_response(family.batch(PROMPTS), responses(len(PROMPTS)), family.model.config)
    with torch.no_grad():
        response_logits(family.model, appended, 4)
    hook.remove()
    assert rows == [5]


class Wrapper(nn.Module):
    """Passes everything on, and forwards attribute reads, as wrappers do."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapped_model_gives_the_same_logits():
    model = family_of("qwen3_vl").model
    appended = append_response(family_of("qwen3_vl").batch(PROMPTS), responses(len(PROMPTS)), model.config)
    model.model.rope_deltas = offsets = torch.full((7, 1), 5)
    inner, model.model = model.model, Wrapper(model.model)
    try:
        with torch.no_grad():
            logits = response_logits(Wrapper(model), appended, 4)
        assert "rope_deltas" not in vars(model.model)  # it would hide what the model writes from now on
    finally:
        model.model = inner
    with torch.no_grad():
        expected = response_logits(model, appended, 4)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert inner.rope_deltas is offsets


@families
def test_gradients_through_padded_rows_are_finite(name):
    family = FAMILIES[name]()
    given = responses(len(PROMPTS))
    appended = append_response(family.batch(PROMPTS, "right"), given, family.model.config)
    response_logits(family.model.train(), appended, 4)[given.mask_BT].logsumexp(dim=-1).sum().backward()
    gradients = [p.grad for p in family.model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.count_nonzero() for gradient in gradients) > 0


@families
def test_a_response_without_tokens(name):
    family = family_of(name)
    batch = family.batch(PROMPTS)
    config = family.model.config
    empty = append_response(batch, Rollout.of([[]] * 5, config=config), config)
    assert empty["input_ids"].shape == batch["input_ids"].shape
    assert response_logits(family.model, empty, 0).shape == (5, 0, VOCABULARY)
    masked = append_response(batch, Rollout(torch.full((5, 3), -100), torch.zeros(5, 3, dtype=torch.bool)), config)
    with torch.no_grad():
        first_BV = response_logits(family.model, masked, 3)[:, 0]
        expected_BV = family.model(**batch).logits[:, -1]
    torch.testing.assert_close(first_BV, expected_BV, rtol=0, atol=ATOL)


@sides
def test_appending_extends_what_is_per_token_and_nothing_else(side):
    family = family_of("gemma3")
    batch = family.batch(PROMPTS, side)
    batch["position_ids"] = batch["attention_mask"].cumsum(dim=1)
    given = responses(len(PROMPTS))
    appended = append_response(batch, given, family.model.config)
    length = batch["input_ids"].shape[1]
    assert "position_ids" not in appended
    assert appended["pixel_values"] is batch["pixel_values"]
    assert appended["input_ids"][:, length:].equal(given.response_BT.where(given.mask_BT, 0))
    assert appended["attention_mask"][:, length:].equal(given.mask_BT.long())
    assert not appended["token_type_ids"][:, length:].any()
    expected = family.batch(PROMPTS, "left")
    for key in ("input_ids", "attention_mask", "token_type_ids"):
        assert appended[key][:, :length].equal(expected[key])
        assert appended[key].dtype == batch[key].dtype


def test_prompts_are_moved_to_the_left_whole():
    family = family_of("qwen3_vl")
    moved, expected = left_padded(family.batch(PROMPTS, "right")), family.batch(PROMPTS, "left")
    assert moved.keys() == expected.keys()
    assert all(moved[key].equal(expected[key]) for key in moved)


def test_shapes_that_do_not_fit_are_refused():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    response_BT, mask_BT = torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)
    for wrong in ((response_BT, mask_BT[:, :3]), (response_BT[0], mask_BT[0]), (response_BT, mask_BT, mask_BT[:1])):
        with pytest.raises(ValueError, match=r"response_BT, mask_BT and scored_BT must have one shape \(B, T\); got"):
            Rollout(*wrong)
    with pytest.raises(ValueError, match="there are 1 responses to 2 prompts"):
        append_response(batch, Rollout(response_BT[:1], mask_BT[:1]), SimpleNamespace())
    with pytest.raises(ValueError, match="response of 3 tokens needs a prompt before it; the batch has 3 columns"):
        response_logits(family_of("llava").model, batch, 3)


BATCHES = {
    "one prompt": ({"input_ids": torch.ones(3).long()}, r"input_ids must be \(B, L\)"),
    "a short mask": ({"attention_mask": torch.ones(2, 2)}, r"value for each token; got .*'attention_mask': \(2, 2\)"),
    "long types": ({"token_type_ids": torch.ones(2, 4)}, r"value for each token; got .*'token_type_ids': \(2, 4\)"),
    "an additive mask": ({"attention_mask": torch.tensor([[0, 0, 0], [-1e9, 0, 0]])}, "1 at the tokens .* 0 at its"),
    "packed prompts": ({"attention_mask": torch.tensor([[1, 2, 2], [1, 1, 2]])}, "1 at the tokens .* 0 at its padding"),
    "an empty prompt": ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "prompt 1 has no tokens"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_prompts_that_do_not_fit_are_refused(name):
    given, match = BATCHES[name]
    batch = {"input_ids": torch.full((2, 3), 20), **given}
    config = SimpleNamespace(image_token_id=3)
    for use in (left_padded, lambda batch: text_only(batch, config, drop_ids=())):
        with pytest.raises(ValueError, match=match):
            use(batch)


def test_processor_batches_are_taken_as_they_are():
    family = family_of("qwen3_vl")
    batch = transformers.BatchFeature(family.batch(PROMPTS))
    assert view_of(family, batch)["input_ids"].equal(family.batch(WITHOUT_IMAGES)["input_ids"])
    appended = append_response(batch, responses(len(PROMPTS)), family.model.config)
    assert response_logits(family.model, appended, 4).shape == (5, 4, VOCABULARY)
