"""The check that users run on their own model and processor: it passes, and each of its parts can fail."""

import re
from functools import cache

import pytest
import torch
from zoo import Zoo, noise

from steer_optim.vlm import families
from steer_optim.vlm.check import check_views
from steer_optim.vlm.families import Family

zoo = cache(Zoo)


def messages(name: str) -> list:
    sizes = zoo(name).entry.sizes
    first, second = ({"type": "image", "image": noise(i, sizes[i % len(sizes)])} for i in range(2))
    say = {"type": "text", "text": "what is it"}
    return [[{"role": "user", "content": content}] for content in ([first, say], [say, first, say, second], [say])]


def check(name: str, rows: slice = slice(None)):
    return check_views(zoo(name).model, zoo(name).processor, messages(name)[rows])


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3", "idefics3"])
def test_a_family_that_is_right_passes(name):
    model = zoo(name).model.train()
    report = check(name)
    assert report.text_view == ""
    assert report.future == 0
    # Float32 sums with and without a cache, at logits of this size.
    assert 0 < report.generation < 1e-5 * report.scale
    assert str(report).startswith("the text view from ids equals the one from messages\na later token moves logits by")
    assert model.training
    model.eval()


@pytest.mark.parametrize("name", ["gemma3", "mllama"])
def test_examples_are_made_where_none_are_given(name):
    assert check_views(zoo(name).model, zoo(name).processor).text_view == ""


def test_half_precision_has_its_own_limits():
    model = Zoo("qwen2_vl").model.bfloat16()
    report = check_views(model, zoo("qwen2_vl").processor, messages("qwen2_vl"))
    assert report.generation > 1e-3  # what float32 would refuse


def test_a_text_view_that_ids_cannot_give_is_shown_beside_the_right_one():
    """LLaVA's template writes a newline after an image."""
    report = check("llava")
    assert re.match(
        r"prompt 0 without its images has '.*:\\nwhat.*' from ids and '.*:what.*' from mess", report.text_view
    )
    assert "the second is right" in str(report)


def test_a_text_view_that_ids_cannot_give_at_all_is_no_failure(monkeypatch):
    monkeypatch.setitem(families.FAMILIES, "llava", Family())
    report = check("llava")
    assert report.text_view.startswith("text_only makes no text view from ids (the config of 'llava' does not name")


def test_a_response_that_sees_its_future_is_found(monkeypatch):
    """Tokens of type 1 are those of an image to Gemma 3, which see each other."""
    monkeypatch.setitem(families.FAMILIES, "gemma3", Family(per_token={"token_type_ids": 1}))
    with pytest.raises(
        RuntimeError, match=r"sees its own future in the image view: logits of up to .* move by .*per_tok"
    ):
        check("gemma3")


def test_a_response_that_generate_would_not_have_written_is_found(monkeypatch):
    """Mllama's response has to see the images that the prompt sees."""
    check("mllama", slice(2))
    monkeypatch.setitem(families.FAMILIES, "mllama", Family(bare=True, per_token={"cross_attention_mask": 0}))
    with pytest.raises(RuntimeError, match=r"appended response differ by .* from those of generate in the image view"):
        check("mllama", slice(2))


def test_logits_that_are_no_numbers_are_found(monkeypatch):
    model = Zoo("qwen2_vl").model
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits * torch.nan)
    with pytest.raises(RuntimeError, match="move by nan"):
        check_views(model, zoo("qwen2_vl").processor, messages("qwen2_vl"))
    hook.remove()
