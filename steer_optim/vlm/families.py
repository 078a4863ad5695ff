"""The facts about model types: the tokens of an image in a prompt, and the keys with a value per token.

Most configs name the ids themselves, in the attributes listed first; a family with such a config needs no entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_PLACEHOLDERS = ("image_token", "video_token", "audio_token", "image_patch")
_OPENING = (
    *("vision_start_token", "image_start_token", "video_start_token", "audio_start_token", "frame_start_token"),
    *("low_res_image_start_token", "image_bos_token", "audio_bos_token", "boi_token", "boa_token"),
    *("start_image_token", "start_of_img_token", "img_start_token", "image_id_start_token", "slice_start_token"),
)
_CLOSING = (
    *("vision_end_token", "image_end_token", "video_end_token", "audio_end_token", "frame_end_token"),
    *("eoi_token", "eoa_token", "end_image_token", "end_of_img_token", "img_end_token"),
    *("image_id_end_token", "slice_end_token", "image_break_token", "visual_indicator_token"),
)
_AROUND = ("fake_image_token",)


@dataclass(frozen=True)
class Family:
    """The facts about a model type that its config does not name.

    Attributes:
        opening: tokens before an image that only the tokenizer knows.
        closing: tokens after an image, or after a part of it, that only the tokenizer knows.
        around: tokens on both sides of every part of an image.
        bare: whether placeholders need no closing token.
        newlines: ids of one newline, two, ...: the processor writes two on either side of an image, and the tokenizer
            merges them with those of the text.
        per_token: for a key with a value per token, the value of response tokens; None for that of the last prompt
            token. Keys with None describe images only, so that the view without images lacks them.
        mixed: whether a row without images is unaffected by rows with images in its batch.
        refused: the reason why the model cannot read a prompt followed by a response.
    """

    opening: tuple[str, ...] = ()
    closing: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    bare: bool = False
    newlines: range = range(0)
    per_token: Mapping[str, int | None] = field(default_factory=dict)
    mixed: bool = True
    refused: str = ""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens to look up in the tokenizer."""
        return self.opening + self.closing + self.around


_DEFAULT = Family(per_token={"token_type_ids": 0, "mm_token_type_ids": 0})
_BARE = (
    *("deepseek_ocr2", "deepseek_vl", "deepseek_vl_hybrid", "fast_vlm", "granite4_vision", "inkling_mm_model"),
    *("lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision", "perception_lm", "phi4_multimodal"),
    *("unlimited_ocr", "video_llama_3", "video_llava", "vipllava"),
)
_PIXELS = Family(refused="it needs pixel values in every prompt")
_INTERN = Family(opening=("<img>",), closing=("</img>",))
_COHERE = Family(opening=("<|START_OF_IMG|>",), closing=("<|END_OF_IMG|>",))

# By model type, or by model type and that of the vision tower. First those that several model types share.
FAMILIES = {
    **dict.fromkeys(_BARE, Family(bare=True)),
    **dict.fromkeys(("gemma3", "gemma3n", "shieldgemma2", "t5gemma2"), Family(newlines=range(107, 138))),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), Family(around=("<fake_token_around_image>",))),
    **dict.fromkeys(("llava/pixtral", "mistral3", "mistral_large4"), Family(closing=("[IMG_BREAK]", "[IMG_END]"))),
    **dict.fromkeys(("internvl", "nemotron_h_omni", "pp_chart2table", "qianfan_ocr"), _INTERN),
    **dict.fromkeys(("aya_vision", "cohere2_vision"), _COHERE),
    **dict.fromkeys(("blip-2", "idefics", "instructblip", "kosmos-2"), _PIXELS),
    "aria": Family(opening=("<fim_prefix>",), closing=("<fim_suffix>",)),
    "blip": Family(refused="its text model attends to one image and needs it in every prompt"),
    "diffusion_gemma": Family(refused="it generates blocks of tokens at once and predicts no next token"),
    "dots3_note": Family(opening=("<|img|>",), closing=("<|endofimg|>",)),
    "emu3": Family(opening=("<|image start|>",), closing=("<|image end|>",)),
    "ernie4_5_vl_moe": Family(per_token={"moe_mm_token_type_ids": 0}),
    "evolla": Family(refused="its prompts hold proteins, not images"),
    "exaone4_5": Family(opening=("<vision>",), closing=("</vision>",)),
    "fuyu": Family(refused="its processor puts the image before the entire prompt, with coordinates in the text"),
    "git": Family(refused="its prompt ids hold no tokens for the image"),
    "granite_docling": Family(
        # An image of one tile is not closed by a token. The newline of each row of tiles stays in the text view.
        opening=("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 11) for column in range(1, 11))),
        around=("<fake_token_around_image>",),
        bare=True,
    ),
    "hunyuan_vl": Family(
        refused="transformers numbers images across the rows of a batch, so that a row's logits depend on the rows "
        "before it"
    ),
    "hyperclovax_vision_v2": Family(opening=("<|image_start|>",), closing=("<|image_end|>",)),
    "inkling2": Family(bare=True, opening=("<|content_image|>",)),
    "instructblipvideo": Family(refused="it takes videos only"),
    "janus": Family(opening=("<begin_of_image>",), closing=("<end_of_image>",)),
    "kosmos-2.5": Family(refused="its placeholders are the same token that begins every text"),
    "lfm2_vl": Family(opening=("<|image_start|>",), closing=("<|image_end|>",)),
    "minimax_m3_vl": Family(opening=("]<]start of image[>[",), closing=("]<]end of image[>[",)),
    # In a mixed batch the tokens of a row without images attend to zeros, in place of other rows' images.
    "mllama": Family(bare=True, mixed=False, per_token={"cross_attention_mask": None}),
    "paddleocr_vl": Family(opening=("<|IMAGE_START|>",), closing=("<|IMAGE_END|>",)),
    "paligemma": Family(bare=True, per_token={"token_type_ids": 1}),
    "pi0": Family(refused="it predicts robot actions, not tokens"),
    "qwen2_5_omni_thinker": Family(opening=("<|vision_bos|>",), closing=("<|vision_eos|>",)),
    "qwen3_omni_moe_thinker": Family(
        opening=("<|vision_start|>", "<|audio_start|>"), closing=("<|vision_end|>", "<|audio_end|>")
    ),
    "step3p7": Family(opening=("<patch_start>", "<im_start>"), closing=("<patch_end>", "<im_end>", "<patch_newline>")),
}


def per_token_keys() -> set[str]:
    """Return the keys that hold a value per token in any family, other than ids and mask."""
    return {key for family in (_DEFAULT, *FAMILIES.values()) for key in family.per_token}


def family_of(config: Any) -> Family:
    """Return the entry of a model, by its config; the default entry if there is none."""
    model_type, tower = type_of(config), getattr(config, "vision_config", None)
    tower_type = getattr(tower, "model_type", None)
    return FAMILIES.get(f"{model_type}/{tower_type}") or FAMILIES.get(model_type) or _DEFAULT


def type_of(config: Any) -> str:
    """Return the model type, as messages name it."""
    return getattr(config, "model_type", None) or type(config).__name__


def refuse(config: Any, batch: Mapping[str, Any]) -> None:
    """Raise ValueError if a response cannot follow the prompts of ``batch`` in the same columns.

    The model is an encoder-decoder; its family is refused; it takes no mixed batches and the batch is one; the batch
    has placeholders and nothing to put in their places, which a model reads as words; or pixels and no placeholder.
    """
    family = family_of(config)
    reason = family.refused
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, which takes prompt and response as separate inputs"
    if reason:
        raise ValueError(f"{type_of(config)!r} cannot be distilled on responses that follow their prompts: {reason}")
    ids_BL, mask_BL = batch["input_ids"], batch.get("attention_mask")
    if mask_BL is not None and mask_BL.shape == ids_BL.shape:
        ids_BL = ids_BL.where(mask_BL.bool(), -1)  # some pad with a placeholder
    placed_B = torch.isin(ids_BL, torch.tensor(sorted(placeholder_ids(config)), device=ids_BL.device)).any(dim=1)
    if not family.mixed and len(placed_B.unique()) > 1:
        raise ValueError(
            f"rows with and without images are in one batch, and {type_of(config)!r} reads the latter as if they had "
            "an empty image: put each kind in its own batch"
        )
    others = batch.keys() - {"input_ids", "attention_mask", "labels", "position_ids", *per_token_keys()}
    tensors = {k: x for k in sorted(others) if isinstance(x := batch[k], torch.Tensor) and x.shape[:2] != ids_BL.shape}
    if (pixels := [k for k, x in tensors.items() if x.is_floating_point() and x.numel()]) and not placed_B.any():
        raise ValueError(
            f"the batch has {', '.join(pixels)}, but no prompt has a placeholder of {type_of(config)!r}, whose config "
            f"names {sorted(placeholder_ids(config)) or 'none'}: the model would not see the images. Pass a model that "
            "reads images, prompts of its own processor, or set image_token_id in its config"
        )
    if not others and placed_B.any():
        raise ValueError(
            f"prompt {int(placed_B.nonzero()[0])} has placeholders of images, but the batch has only the keys "
            f"{', '.join(sorted(batch))}: pass all that the processor returns, pixels included, or text_only(...)"
        )


def roles(config: Any, tokenizer: Any = None) -> dict[int, str]:
    """Return the role of ids: ``p`` is a placeholder, ``o`` opens an image, ``c`` closes it, ``b`` is on both sides.

    The ``tokenizer``, or a processor, gives the tokens that the config does not name.
    """
    family, found = family_of(config), {}
    names = {"o": (_OPENING, family.opening), "c": (_CLOSING, family.closing), "b": (_AROUND, family.around)}
    for role, (attributes, tokens) in names.items():
        found.update(dict.fromkeys(_looked_up(tokenizer, attributes, tokens), role))
    for role, attributes in {"o": _OPENING, "c": _CLOSING, "p": _PLACEHOLDERS}.items():
        found.update(dict.fromkeys(_named(config, attributes), role))
    return found


def image_ids(config: Any) -> set[int]:
    """Return the ids that ``config`` names for images, videos and audio: placeholders, and the tokens around them.

    Example:
        >>> from types import SimpleNamespace
        >>> sorted(image_ids(SimpleNamespace(image_token_id=7, vision_start_token_id=6, vision_end_token_id=8)))
        [6, 7, 8]
    """
    return set(roles(config))


def placeholder_ids(config: Any) -> set[int]:
    """Return the ids that the model replaces by the features of images, videos and audio."""
    return set(_named(config, _PLACEHOLDERS))


def _named(config: Any, names: tuple[str, ...]) -> list[int]:
    owners = [config, *(getattr(config, f"{part}_config", None) for part in ("vision", "audio"))]
    attributes = [f"{name}_{end}" for name in names for end in ("id", "index", "ids")]
    return [one for owner in owners for attribute in attributes for one in flat(getattr(owner, attribute, None))]


def flat(ids: Any) -> list[int]:
    """Return ids that configs give as one, several or None, as a list."""
    return [] if ids is None else [ids] if isinstance(ids, int) else [*ids]


def _looked_up(tokenizer: Any, attributes: tuple[str, ...], tokens: tuple[str, ...]) -> list[int]:
    """Return the ids of tokens, and of those in attributes of the tokenizer or processor, without unknown ones."""
    if tokenizer is None:
        return []
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    texts = [getattr(owner, name, None) for owner in (tokenizer, inner) for name in attributes] + list(tokens)
    # One call per token: get_vocab copies the vocabulary, which takes a tenth of a second.
    ids = [inner.convert_tokens_to_ids(str(text)) for text in texts if text is not None]
    return [token for token in ids if token not in (None, inner.unk_token_id)]
