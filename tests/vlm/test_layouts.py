"""The text view from ids: every way in which an image stands in a prompt, and what is refused."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steer_optim.vlm import families
from steer_optim.vlm.families import FAMILIES, Family, family_of, image_ids, placeholder_ids, roles
from steer_optim.vlm.prompts import Rollout, append_response, text_only

P, OPEN, CLOSE, MORE, LAST, OUTER, END_OUTER = range(3, 10)  # placeholder, tokens around, tiles, a video's tokens
NEWLINE = 107  # of one newline; 108 of two
TEXT = st.integers(20, 100)


def config(model_type: str = "mystery", **ids: int | None) -> SimpleNamespace:
    return SimpleNamespace(model_type=model_type, **{"image_token_id": P, **ids})


def tokenizer(*tokens: str, **attributes: str) -> SimpleNamespace:
    """Knows ``tokens`` under the ids from OPEN on."""
    vocabulary = {token: OPEN + i for i, token in enumerate(tokens)}
    return SimpleNamespace(convert_tokens_to_ids=lambda token: vocabulary.get(token, 1), unk_token_id=1, **attributes)


def images(*pieces: list[int]) -> st.SearchStrategy[list[int]]:
    return st.sampled_from(pieces)


# A family's config, its tokenizer, and what its processor may write for one image.
TILES = tokenizer("<fake_token_around_image>", "<row_1_col_1>", "<global-img>")
LAYOUTS = {
    "qwen": (config(vision_start_token_id=OPEN, vision_end_token_id=CLOSE), None, images([OPEN, P, P, CLOSE])),
    "gemma4": (config(boi_token_id=OPEN, eoi_token_index=CLOSE), None, images([OPEN, P, CLOSE])),
    # One tile has the token of the whole image before its placeholders.
    "llama4": (
        config("llama4", boi_token_index=OPEN, eoi_token_index=CLOSE),
        None,
        images([OPEN, 50, P, P, CLOSE], [OPEN, P, MORE, P, LAST, 50, P, CLOSE]),
    ),
    # The size is written as text.
    "emu3": (config("emu3"), tokenizer("<|image start|>", "<|image end|>"), images([OPEN, 40, 41, P, P, 50, CLOSE])),
    # A newline before the whole image, text between the tokens of a tile.
    "idefics3": (config("idefics3"), TILES, images([OPEN, 5, P, 50, OPEN, 5, P, 50, 50, OPEN, 6, P, P, OPEN])),
    "smolvlm": (config("smolvlm"), TILES, images([OPEN, 6, P, OPEN])),
    # Nothing opens an image.
    "pixtral": (config("mistral3"), tokenizer("[IMG_BREAK]", "[IMG_END]"), images([P, P, OPEN, P, P, CLOSE])),
    "llava": (config("llava"), None, images([P], [P, P, P])),
    "ovis": (config(visual_indicator_token_ids=[OPEN, CLOSE, MORE]), None, images([OPEN, P, CLOSE, P, MORE])),
    "glm": (
        config(image_start_token_id=OPEN, image_end_token_id=CLOSE, video_start_token_id=OUTER),
        None,
        images([OPEN, P, CLOSE]),
    ),
    "internvl": (config("internvl"), tokenizer("<img>", "</img>"), images([OPEN, P, CLOSE])),
    # A processor names what its config does not.
    "hunyuan": (
        config(),
        SimpleNamespace(
            tokenizer=tokenizer("<im_start>", "<im_end>"), image_start_token="<im_start>", image_end_token="<im_end>"
        ),
        images([OPEN, P, P, CLOSE]),
    ),
    "audio": (
        config(audio_token_id=MORE, boa_token_id=OPEN, eoa_token_id=CLOSE, boi_token_id=OPEN, eoi_token_id=CLOSE),
        None,
        images([OPEN, MORE, MORE, CLOSE], [OPEN, P, CLOSE]),
    ),
}
layouts = pytest.mark.parametrize("name", LAYOUTS)


def prompts(image: st.SearchStrategy[list[int]]) -> st.SearchStrategy[list[list[list[int]]]]:
    """Rows of pieces, text and images, with some text in each row."""
    row = st.lists(st.one_of(TEXT.map(lambda token: [token]), image), max_size=6)
    return st.lists(st.tuples(row, TEXT).map(lambda pair: [*pair[0], [pair[1]]]), min_size=1, max_size=4)


def joined(pieces: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(pieces))


def padded(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, rows))
    fill = [[0] * (width - len(row)) for row in rows]
    pairs = list(zip(rows, fill, strict=True))
    left = side == "left"
    ids = [pad + row if left else row + pad for row, pad in pairs]
    mask = [[0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad) for row, pad in pairs]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def assert_same(view: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert view.keys() == expected.keys()
    for key in view:
        assert view[key].tolist() == expected[key].tolist()


@layouts
@given(data=st.data())
def test_the_text_stays_and_nothing_else(name, data):
    settings, known, image = LAYOUTS[name]
    rows, side = data.draw(prompts(image)), data.draw(st.sampled_from(["left", "right"]))
    batch = padded(list(map(joined, rows)), side)
    text = [[piece[0] for piece in row if len(piece) == 1 and piece[0] >= 20] for row in rows]
    view = text_only(batch, settings, tokenizer=known)
    # Rows of one length tell no side; then it is the left.
    assert_same(view, padded(text, "left" if batch["attention_mask"].all() else side))
    assert_same(text_only(view, settings, tokenizer=known), view)


@layouts
@given(data=st.data())
def test_a_row_does_not_depend_on_the_others_nor_on_padding(name, data):
    settings, known, image = LAYOUTS[name]
    rows = list(map(joined, data.draw(prompts(image))))
    side = data.draw(st.sampled_from(["left", "right"]))
    view = text_only(padded(rows, side), settings, tokenizer=known)
    for number, row in enumerate(rows):
        alone = text_only(padded([row], "left"), settings, tokenizer=known)["input_ids"][0].tolist()
        assert view["input_ids"][number, view["attention_mask"][number].bool()].tolist() == alone


@pytest.mark.parametrize("name", ["qwen", "llama4", "idefics3", "pixtral", "internvl"])
@given(data=st.data())
def test_an_image_that_is_cut_off_is_refused(name, data):
    settings, known, image = LAYOUTS[name]
    ids = joined([*data.draw(prompts(image))[0], data.draw(image)])
    last = len(ids) - 1 - ids[::-1].index(P)
    for tail in ([], [30]):
        with pytest.raises(ValueError, match="an image of row 1 is not closed by any known token"):
            text_only(padded([[20], ids[: last + 1] + tail], "right"), settings, tokenizer=known)


@pytest.mark.parametrize("model_type", ["gemma3", "gemma3n", "shieldgemma2", "t5gemma2"])
def test_newlines_that_the_processor_writes_are_taken_back(model_type):
    settings = config(model_type, boi_token_index=OPEN, eoi_token_index=CLOSE)
    two, three = NEWLINE + 1, NEWLINE + 2
    ids = torch.tensor([[20, two, OPEN, P, CLOSE, three, 21, two, 22]])
    assert text_only({"input_ids": ids}, settings)["input_ids"].tolist() == [[20, NEWLINE, 21, two, 22]]


def test_frames_of_a_video_go_and_their_times_stay():
    settings = config(
        image_start_token_id=OPEN, image_end_token_id=CLOSE, video_start_token_id=OUTER, video_end_token_id=END_OUTER
    )
    ids = torch.tensor([[20, OUTER, OPEN, P, CLOSE, 50, OPEN, P, CLOSE, 51, END_OUTER, 21]])
    assert text_only({"input_ids": ids}, settings)["input_ids"].tolist() == [[20, 50, 51, 21]]


def test_tokens_around_audio_do_not_stand_for_those_around_images():
    settings = config("qwen2_5_omni_thinker", audio_token_index=MORE, audio_start_token_id=9, audio_end_token_id=10)
    batch = {"input_ids": torch.tensor([[20, OPEN, P, CLOSE, 21, 9, MORE, 10, 22]])}
    with pytest.raises(
        ValueError, match=r"does not name the tokens <\|vision_bos\|> <\|vision_eos\|>: pass tokenizer="
    ):
        text_only(batch, settings)
    known = tokenizer("<|vision_bos|>", "<|vision_eos|>")
    assert text_only(batch, settings, tokenizer=known)["input_ids"].tolist() == [[20, 21, 22]]
    settings.model_type = "mystery"
    with pytest.raises(ValueError, match="an image of row 0 is not closed"):
        text_only(batch, settings)


def test_a_token_that_opens_nothing_goes_alone():
    settings = config(vision_start_token_id=OPEN, vision_end_token_id=CLOSE)
    assert text_only({"input_ids": torch.tensor([[20, OPEN, 21]])}, settings)["input_ids"].tolist() == [[20, 21]]


def test_a_config_that_names_everything_needs_no_entry():
    settings = config("qwen3_vl", vision_start_token_id=OPEN, vision_end_token_id=CLOSE, video_token_id=None)
    assert "qwen3_vl" not in FAMILIES
    assert family_of(settings) == Family(per_token={"token_type_ids": 0, "mm_token_type_ids": 0})
    assert roles(settings) == {OPEN: "o", CLOSE: "c", P: "p"}
    assert image_ids(settings) == {OPEN, CLOSE, P}
    assert placeholder_ids(settings) == {P}


def test_a_family_is_one_entry(monkeypatch):
    """Tokens, bare placeholders and a key per token, all from the table."""
    entry = Family(opening=("<open>",), bare=True, per_token={"token_type_ids": 2, "novel_mask": None})
    monkeypatch.setitem(families.FAMILIES, "novel", entry)
    settings, known = config("novel"), tokenizer("<open>")
    batch = {"input_ids": torch.tensor([[20, OPEN, P, P, 21]]), "token_type_ids": torch.tensor([[0, 1, 1, 1, 0]])}
    view = text_only(batch, settings, tokenizer=known)
    assert view["input_ids"].tolist() == [[20, 21]]
    appended = append_response(view, Rollout.of([[30]], config=settings), settings)
    assert appended["token_type_ids"].tolist() == [[0, 0, 2]]
    batch |= {"novel_mask": torch.arange(10).view(1, 5, 2), "pixel_values": torch.zeros(1, 3, 4, 4)}
    assert "novel_mask" not in text_only(batch, settings, tokenizer=known)
    novel = append_response(batch, Rollout.of([[30, 31]], config=settings), settings)["novel_mask"]
    assert novel.tolist() == [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [8, 9], [8, 9]]]


def test_the_tower_may_decide(monkeypatch):
    settings = config("llava", vision_config=SimpleNamespace(model_type="pixtral"))
    assert family_of(settings) is FAMILIES["mistral3"]
    settings.vision_config.model_type = "clip_vision_model"
    assert family_of(settings).bare


@pytest.mark.parametrize("settings", [config("florence2", is_encoder_decoder=True), config("diffusion_gemma")])
def test_models_that_no_response_can_follow_are_refused_by_name(settings):
    batch = {"input_ids": torch.tensor([[20, 21]])}
    with pytest.raises(ValueError, match=f"'{settings.model_type}' cannot be distilled on responses .*: it "):
        append_response(batch, Rollout.of([[30]], config=settings), settings)
