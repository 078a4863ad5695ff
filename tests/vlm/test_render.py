"""Both views of a prompt, rendered from messages by the processors themselves."""

import copy
import io
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", minversion="5.23")

from PIL import Image
from tiny_llava import make_processor
from torch import Tensor
from zoo import Zoo, noise

from steer_optim.vlm.families import placeholder_ids
from steer_optim.vlm.forward import response_logits
from steer_optim.vlm.prompts import BadConversation, Rollout, append_response, render, text_only

# Flat pixels, pixels by grid, tiles in rows of a batch, a mask over images, text that the processor writes.
NAMES = ["qwen2_vl", "llava", "llava_next", "gemma3", "idefics3", "smolvlm"]
zoo = cache(Zoo)
# Float32 sums in another order, at logits of up to 20.
ATOL = 2e-5

texts = st.text("abc ", min_size=1, max_size=5).map(lambda text: {"type": "text", "text": text})
seeds = st.integers(0, 3)


def picture(name: str, seed: int) -> dict:
    sizes = zoo(name).entry.sizes
    return {"type": "image", "image": noise(seed, sizes[seed % len(sizes)])}


@st.composite
def conversations(draw, name):
    """A few turns of text with images anywhere in them, or nowhere."""
    part = st.one_of(texts, seeds.map(lambda seed: picture(name, seed)))
    turns = [("user", [*draw(st.lists(part, max_size=3)), draw(texts)])]
    if draw(st.booleans()):
        turns += [("assistant", [draw(texts)]), ("user", [*draw(st.lists(part, max_size=1)), draw(texts)])]
    return [{"role": role, "content": content} for role, content in turns]


def rows(batch: dict) -> list[list[int]]:
    return [ids[real.bool()].tolist() for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def written(conversation: list) -> str:
    """The prompt as the template writes it without images, by hand."""
    turns = [
        f"{turn['role']}:{''.join(part['text'] for part in turn['content'] if part['type'] == 'text')}\n"
        for turn in conversation
    ]
    return "".join(turns) + "assistant:"


@pytest.mark.parametrize("name", [*NAMES, "mllama"])
@settings(max_examples=15)
@given(data=st.data())
def test_a_batch_is_its_rows_and_its_text_is_written_without_images(name, data):
    family = zoo(name)
    messages = data.draw(st.lists(conversations(name), min_size=1, max_size=3))
    views = render(family.processor, messages)
    alone = [render(family.processor, [row]) for row in messages]
    assert rows(views.image) == [rows(view.image)[0] for view in alone]
    assert rows(views.text) == [rows(view.text)[0] for view in alone]
    bare = [family.tokenizer(written(row), add_special_tokens=False)["input_ids"] for row in messages]
    bos = [family.tokenizer.bos_token_id]
    assert rows(views.text) in (bare, [bos + row for row in bare])
    for view in (views.image, views.text):
        assert view["attention_mask"][:, -1].all()
    placeholders = torch.tensor(sorted(placeholder_ids(family.config)))
    assert not torch.isin(views.text["input_ids"], placeholders).any()
    has_images = any(part["type"] == "image" for row in messages for turn in row for part in turn["content"])
    assert bool(torch.isin(views.image["input_ids"], placeholders).any()) == has_images
    assert ("pixel_values" in views.image) == has_images
    assert "pixel_values" not in views.text


@pytest.mark.parametrize("name", NAMES)
def test_a_response_is_predicted_as_in_every_row_by_itself(name):
    family = zoo(name)
    say = {"type": "text", "text": "what is it"}
    contents = [
        [picture(name, 1), say],
        [say],
        [picture(name, 2), {"type": "text", "text": "and"}, picture(name, 3), say],
    ]
    messages = [[{"role": "user", "content": content}] for content in contents]
    given = Rollout.of([[30, 31, 32]] * 3, config=family.config)

    def logits(messages: list, view: str, given: Rollout) -> Tensor:
        batch = getattr(render(family.processor, messages), view)
        with torch.no_grad():
            return response_logits(family.model, append_response(batch, given, family.config), 3)

    for view in ("image", "text"):
        together = logits(messages, view, given)
        for row, message in enumerate(messages):
            one = Rollout(given.response_BT[:1], given.mask_BT[:1])
            torch.testing.assert_close(together[row], logits([message], view, one)[0], rtol=0, atol=ATOL)
    with_images = logits(messages, "image", given)
    differ = (with_images - together).abs().amax(dim=(1, 2))
    assert differ[1] < ATOL
    assert (differ[[0, 2]] > 0.01).all()


def conversation(*content) -> list:
    return [{"role": "user", "content": list(content)}]


HELLO = {"type": "text", "text": "hello"}


def test_images_may_be_files_and_bytes_and_contents_strings(tmp_path):
    family = zoo("qwen2_vl")
    image = picture("qwen2_vl", 1)["image"]
    image.save(tmp_path / "image.png")
    expected = render(family.processor, [conversation({"type": "image", "image": image}, HELLO)])
    for part in (
        {"path": str(tmp_path / "image.png")},
        {"image": str(tmp_path / "image.png")},
        {"url": _base64(image)},
    ):
        views = render(family.processor, [conversation({"type": "image", **part}, HELLO)])
        assert all(torch.equal(views.image[key], expected.image[key]) for key in expected.image)
    openai = render(
        family.processor, [conversation({"type": "image_url", "image_url": {"url": _base64(image)}}, HELLO)]
    )
    assert openai.image["pixel_values"].equal(expected.image["pixel_values"])
    assert rows(openai.text) == rows(expected.text)


def _base64(image) -> str:
    import base64

    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_messages_are_left_as_they_were_and_options_passed_on():
    family = zoo("gemma3")
    messages = [conversation(picture("gemma3", 1), HELLO), conversation(HELLO)]
    before = copy.deepcopy(messages)
    views = render(family.processor, messages)
    assert [[turn["content"][-1] for turn in row] for row in messages] == [[HELLO], [HELLO]]
    assert [len(row[0]["content"]) for row in messages] == [len(row[0]["content"]) for row in before]
    shorter = render(family.processor, messages, add_generation_prompt=False)
    prompt = len(family.tokenizer("assistant:", add_special_tokens=False)["input_ids"])
    for view in ("image", "text"):
        assert [row[:-prompt] for row in rows(getattr(views, view))] == rows(getattr(shorter, view))
    family.tokenizer.padding_side = "right"
    moved = render(family.processor, messages)
    family.tokenizer.padding_side = "left"
    explicit = render(family.processor, messages, processor_kwargs={"padding_side": "right"})
    for again in (moved, explicit):
        for key, value in views.image.items():
            assert value.equal(again.image[key])


@pytest.mark.parametrize(
    "options",
    [
        {"truncation": True},
        {"processor_kwargs": {"truncation": "longest_first"}},
        {"processor_kwargs": {"text_kwargs": {"truncation": True}}},
    ],
)
def test_truncation_which_cuts_views_at_different_words_is_refused(options):
    messages = [[{"role": "user", "content": [picture("gemma3", 0), {"type": "text", "text": 30 * "abc"}]}]]
    with pytest.raises(ValueError, match="truncation cuts the two views at different words"):
        render(zoo("gemma3").processor, messages, **options, max_length=20)
    render(zoo("gemma3").processor, messages, processor_kwargs={"truncation": False})


def test_keys_that_arrow_stores_are_not_there_for_a_template():
    """Qwen's template writes an image for a part that has the key."""
    processor = make_processor()
    processor.chat_template = processor.chat_template.replace("part['type'] == 'image'", "'image' in part")
    image, text = Image.new("RGB", (8, 8)), {"type": "text", "text": "what"}
    plain = [[{"role": "user", "content": [{"type": "image", "image": image}, text]}]]
    stored = [{"type": "image", "image": image, "text": None}, {**text, "image": None}]
    prompts = [render(processor, x) for x in (plain, [[{"role": "user", "content": stored, "tool_calls": None}]])]
    for view, meant in zip(prompts[1][:2], prompts[0][:2], strict=True):
        assert view["input_ids"].equal(meant["input_ids"])


def test_older_processors_take_their_options_among_those_of_the_template():
    asked = []

    class Processor:
        def apply_chat_template(self, conversation, **options):
            asked.append(options)
            return {"input_ids": torch.full((len(conversation), 3), 20)}

    render(Processor(), [conversation(HELLO)], processor_kwargs={"fps": 2})
    common = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    assert asked == [{**common, "padding": True, "fps": 2}] * 2


def test_bad_conversations_are_named_by_their_index(tmp_path):
    family = zoo("qwen2_vl")
    good, missing = conversation(HELLO), conversation({"type": "image", "path": str(tmp_path / "missing.png")}, HELLO)
    with pytest.raises(ValueError, match=r"the processor cannot render conversation 1: .*missing"):
        render(family.processor, [good, missing, good])
    for nothing in ([], conversation(HELLO), ["hello"]):
        with pytest.raises(ValueError, match="messages must be a list of conversations, each a list of messages"):
            render(family.processor, nothing)


def test_a_conversation_of_images_only_is_named():
    picture = {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (8, 8))}]}
    for messages in ([[picture]], [[{"role": "user", "content": [{"type": "text", "text": "what"}]}], [picture]]):
        with pytest.raises(BadConversation, match=f"conversation {len(messages) - 1} has nothing but images"):
            render(make_processor(), messages)


def test_a_model_that_takes_no_mixed_batch_says_so():
    family = zoo("mllama")
    messages = [conversation(picture("mllama", 1), HELLO), conversation(HELLO)]
    views = render(family.processor, messages)
    given = Rollout.of([[30]] * 2, config=family.config)
    with pytest.raises(ValueError, match="rows with and without images are in one batch, and 'mllama'"):
        append_response(views.image, given, family.config)
    append_response(views.text, given, family.config)
    append_response(render(family.processor, messages[:1] * 2).image, given, family.config)


@pytest.mark.filterwarnings("ignore")  # numpy's, of the image processor
def test_a_processor_that_demands_an_image_is_named_and_ids_are_offered():
    family = zoo("paligemma")
    messages = [conversation(picture("paligemma", 1), HELLO)]
    with pytest.raises(ValueError, match=r"cannot render conversation 0 without its images; make .* text_only"):
        render(family.processor, messages)
    batch = family.batch([[2, -1, 20, 21]])
    assert rows(text_only(batch, family.config))[0] == [2, 20, 21, 107]


@pytest.mark.parametrize("content", ["a", None, [], ({"type": "text", "text": "a"},)])
def test_a_blank_image_is_added_whatever_holds_the_text(content):
    prompts = render(zoo("qwen2_vl").processor, [[{"role": "user", "content": content}]], blank_image=True)
    assert prompts.blank == 1
    assert "pixel_values" in prompts.image


def test_a_part_that_is_no_mapping_is_the_processors_to_refuse():
    with pytest.raises(ValueError, match="cannot render conversation 1"):
        render(zoo("qwen2_vl").processor, [[{"role": "user", "content": x}] for x in ("a", [1])])
