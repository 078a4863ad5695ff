"""The families of the zoo, one entry each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tests.vlm.zoo_pixels import (
    Noise,
    gemma4_unified,
    grids,
    inkling,
    inkling2,
    lfm2,
    minicpm,
    molmo2,
    tiles,
    views,
)


@dataclass(frozen=True)
class Entry:
    """What distinguishes a family.

    Attributes:
        tokens: special tokens by the name under which the tokenizer knows them; with an underscore first where it
            knows none.
        image: how the chat template writes an image: the text that the processor expands, and what it writes beside.
        ids: the attributes of the configuration that name tokens.
        config: what the configuration has besides ``SIZES``, nested as it is.
        start: what the default configuration lacks before it shrinks.
        pixels: arguments of the image processor, or a stand-in for it.
        processor: arguments of the processor.
        processor_class: where the mapping of transformers names none.
        sizes: heights and widths of the images, taken in turn.
        after: text that the template writes after an image; the text view from ids keeps it.
        kept: what the processor writes beside an image of each size and the text view from ids keeps.
        nested: whether images go to the processor as one list a row.
        newlines: whether the tokenizer has one token for each run of newlines, as Gemma's has.
        call: further arguments of each call of the processor.
        alone: whether the processor takes prompts without an image.
        images: how many images a prompt may have.
        loose: whether the steps of `generate` are not those of a full pass to rounding, as in Mamba layers.
        front: whether images stand before all text.
        frame: what the processor makes of a text without an image, where it takes none.
    """

    tokens: Mapping[str, str] = field(default_factory=dict)
    image: str = "<image>"
    ids: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    start: Mapping[str, Any] = field(default_factory=dict)
    pixels: Mapping[str, Any] | Noise = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    processor_class: str = ""
    image_class: str = ""
    sizes: Sequence[tuple[int, int]] = ((16, 16),)
    after: str = ""
    kept: Sequence[str] = ()
    nested: bool = True
    newlines: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = True
    images: Sequence[int] = (1, 0, 2)
    loose: bool = False
    front: bool = False
    frame: str = "{}"

    @property
    def noise(self) -> bool:
        """Whether pixels are made up."""
        return isinstance(self.pixels, Noise)


def _qwen(**more: Any) -> Entry:
    """Qwen's habits: a grid for each image, and two tokens around its placeholders, which the template writes."""
    names = {"vision_start_token": "<|vision_start|>", "image_token": "<|image_pad|>"}
    names |= {"vision_end_token": "<|vision_end|>", "video_token": "<|video_pad|>"}
    tokens = more.pop("tokens", names)
    image = more.pop("image", "<|vision_start|><|image_pad|><|vision_end|>")
    ids = {f"{name}_id": tokens[name] for name in more.pop("named", names)}
    pixels = {**_PATCHES, **more.pop("pixels", {})} if isinstance(more.get("pixels", {}), dict) else more.pop("pixels")
    return Entry(tokens=tokens, image=image, ids=ids, pixels=pixels, sizes=((16, 16), (16, 24)), **more)


def _mrope(*section: int, **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return {"text_config": {"rope_parameters": rope, **more}}


_PATCHES = {"patch_size": 4, "temporal_patch_size": 1, "merge_size": 2, "do_resize": False}
_OMNI = {"image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>"}
_OMNI |= {"vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>"}
_OMNI |= {"audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
_OMNI_3 = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "audio_token": "<|audio_pad|>"}
_OMNI_3 |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
_OMNI_3 |= {"audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}
_GLM = {"image_token": "<|image|>", "video_token": "<|video|>"}
_GLM |= {"image_start_token": "<|begin_of_image|>", "image_end_token": "<|end_of_image|>"}
_GLM |= {"video_start_token": "<|begin_of_video|>", "video_end_token": "<|end_of_video|>"}


def _glm(**more: Any) -> Entry:
    return _qwen(tokens=_GLM, named=tuple(_GLM), image="<|begin_of_image|><|image|><|end_of_image|>", **more)


def _omni(tokens: dict[str, str], **more: Any) -> Entry:
    """The thinker of Qwen's models that hear and see; its processor is that of the whole."""
    ids = {f"{name}_token_id": tokens[f"{name}_token"] for name in ("image", "video", "audio")}
    ids |= {f"{name}_token_index": tokens[f"{name}_token"] for name in ("image", "video", "audio")}
    ids |= {"vision_start_token_id": tokens["vision_bos_token"], "audio_start_token_id": tokens["audio_bos_token"]}
    image = tokens["vision_bos_token"] + tokens["image_token"] + tokens["vision_eos_token"]
    sizes, pixels = ((16, 16), (16, 24)), {**_PATCHES}
    return Entry(tokens, image, ids, pixels=pixels, sizes=sizes, image_class="Qwen2VLImageProcessorPil", **more)


_SQUARE = {"do_resize": False, "do_center_crop": False}


def _llava(**more: Any) -> Entry:
    """LLaVA's habits: placeholders and nothing else."""
    more = {"config": {"vision_feature_select_strategy": "default"}, **more}
    processor = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    more = {"processor": processor, **more}
    more = {"pixels": _SQUARE, "ids": {"image_token_id": "<image>"}, "after": "\n", **more}
    return Entry(tokens={"_s": "<s>", "image_token": "<image>", "_e": "</s>", "video_token": "<video>"}, **more)


_PINPOINTS = [[16, 32], [32, 16], [32, 32]]
_GEMMA = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
_AUDIO = {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
_GEMMA_4 = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "video_token": "<|video|>"}
_GEMMA_4 |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
_GEMMA_4_IDS = {
    f"{name}_token_id": _GEMMA_4[f"{name}_token"] for name in ("image", "boi", "eoi", "video", "audio", "boa")
}
_GEMMA_4_IDS |= {"eoa_token_index": "<audio|>"}
_GEMMA_IDS = {f"{name}_token_index": _GEMMA[f"{name}_token"] for name in ("boi", "eoi")}
_GEMMA_IDS |= {"image_token_index": "<image_soft_token>"}
_TWO_LAYERS = {"text_config": {"layer_types": ["sliding_attention", "full_attention"]}}
_ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
_IDEFICS = {"_fake": "<fake_token_around_image>", "image_token": "<image>", "_end": "<end_of_utterance>"}
_IDEFICS |= {"_video": "<video>", **{f"_{token}": token for token in _ROWS[:2]}, "_global": "<global-img>"}
_IDEFICS |= {f"_{token}": token for token in _ROWS[2:]}
_TILES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
_INTERN = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
_INTERN |= {"video_token": "<video>"}
_PIXTRAL = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}

_MUSE = {"image_token": "<|patch|>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>"}
_MUSE |= {"video_token": "<|video|>", "_c": "<|vid_frame_separator|>", "_d": "<|vid_start|>", "_e": "<|vid_end|>"}
_MUSE |= {"_f": "<|audio|>", "_g": "<|soft_audio_start|>", "_h": "<|soft_audio_end|>"}
_LLAMA_4 = [
    "<|image|>",
    "<|patch|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
]
_MOLMO = [
    "<im_patch>",
    "<im_col>",
    "<im_start>",
    "<low_res_im_start>",
    "<frame_start>",
    "<im_end>",
    "<frame_end>",
    "<im_low>",
]
_MINICPM = {"image_token": "<image_pad>", "video_token": "<video_pad>"}
_MINICPM |= {"image_start_token": "<image>", "image_end_token": "</image>", "slice_start_token": "<slice>"}
_MINICPM |= {"slice_end_token": "</slice>", "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>"}
_SLICES = {"patch_size": 4, "scale_resolution": 16, "downsample_mode": "4x", "slice_mode": True, "use_image_id": True}
_OVIS = ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]

ENTRIES: dict[str, Entry] = {
    "qwen2_vl": _qwen(config=_mrope(4, 2, 2)),
    "qwen2_5_vl": _qwen(config=_mrope(4, 2, 2)),
    "qwen3_vl": _qwen(),
    "qwen3_vl_moe": _qwen(image_class="Qwen2VLImageProcessorPil"),
    "qwen3_5": _qwen(),
    "qwen3_5_moe": _qwen(),
    "qwen4_exp": _qwen(
        config={
            "text_config": {
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 64,
                "indexer_compress_ratio": 4,
                "hc_lowrank": 8,
            }
        }
    ),
    "cosmos3_omni": _qwen(processor_class="Qwen3VLProcessor"),
    "cosmos3_edge": _qwen(call={"return_mm_token_type_ids": True}, config={"vision_config": {"num_patches": 16}}),
    "cohere_compass": _qwen(
        tokens={
            "image_token": "<|IMAGE_PAD|>",
            "video_token": "<|VIDEO_PAD|>",
            "vision_start_token": "<|VISION_START|>",
            "vision_end_token": "<|VISION_END|>",
        },
        image="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>",
        config={
            "text_config": {
                "rope_parameters": {"full_attention": _mrope(4, 2, 2)["text_config"]["rope_parameters"]},
                "layer_types": ["full_attention", "full_attention"],
            }
        },
    ),
    "exaone4_5": _qwen(
        tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "_a": "<vision>", "_b": "</vision>"},
        named=("image_token", "video_token"),
        image="<vision><|image_pad|></vision>",
    ),
    "hyperclovax_vision_v2": _qwen(
        named=("image_token", "video_token"),
        image="<|image_start|><|image_pad|><|image_end|>",
        tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "_a": "<|image_start|>",
            "_b": "<|image_end|>",
        },
    ),
    "lfm3_vl": _qwen(),
    "dots3_note": _qwen(
        tokens={
            "image_token": "<|imgpad|>",
            "video_token": "<|video_pad|>",
            "_audio": "<|audio_comp_pad|>",
            "_a": "<|img|>",
            "_b": "<|endofimg|>",
        },
        named=("image_token",),
        image="<|img|><|imgpad|><|endofimg|>",
        config={
            "text_config": {"num_key_value_heads": 2},
            "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
            "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 16},
        },
    ),
    "qwen2_5_omni_thinker": _omni(_OMNI, processor_class="Qwen2_5OmniProcessor", config=_mrope(4, 2, 2)),
    "qwen3_omni_moe_thinker": _omni(
        _OMNI_3,
        processor_class="Qwen3OmniMoeProcessor",
        config={"audio_config": {"downsample_hidden_size": 16}},
    ),
    "glm4v": _glm(config=_mrope(4, 2, 2)),
    "glm4v_moe": _glm(config=_mrope(2, 1, 1), image_class="Glm4vImageProcessorPil"),
    "glm46v": _glm(config=_mrope(4, 2, 2)),
    "glmga": _glm(config=_mrope(4, 2, 2), processor_class="Glm46VProcessor"),
    "glm_ocr": _glm(config=_mrope(4, 2, 2), processor_class="Glm46VProcessor", image_class="Glm46VImageProcessorPil"),
    "glm5_next": _glm(
        config={
            "text_config": {
                "num_key_value_heads": 2,
                "qk_rope_head_dim": 0,
                "head_dim": 0,
                "indexer_types": ["full"] * 2,
            }
        }
    ),
    "ernie4_5_vl_moe": _qwen(
        tokens={
            "image_token": "<|IMAGE_PLACEHOLDER|>",
            "image_start_token": "<|IMAGE_START|>",
            "image_end_token": "<|IMAGE_END|>",
            "video_token": "<|VIDEO_PLACEHOLDER|>",
            "video_start_token": "<|VIDEO_START|>",
            "video_end_token": "<|VIDEO_END|>",
        },
        named=(
            "image_token",
            "image_start_token",
            "image_end_token",
            "video_token",
            "video_start_token",
            "video_end_token",
        ),
        image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        config=_mrope(3, 3, 2, moe_intermediate_size=[16, 16]),
    ),
    "paddleocr_vl": _qwen(
        tokens={"image_token": "<|IMAGE_PLACEHOLDER|>", "_a": "<|IMAGE_START|>", "_b": "<|IMAGE_END|>"},
        named=("image_token",),
        image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        config=_mrope(4, 2, 2),
    ),
    "video_llama_3": _qwen(named=("image_token", "video_token"), image="<|image_pad|>", after="\n"),
    "llava": _llava(),
    "llava/pixtral": Entry(
        tokens=_PIXTRAL,
        image="[IMG]",
        ids={"image_token_id": "[IMG]"},
        start={"vision_config": {"model_type": "pixtral"}},
        config={"vision_feature_select_strategy": "full"},
        pixels={"patch_size": 4, "size": {"longest_edge": 24}},
        processor={"patch_size": 4},
        processor_class="PixtralProcessor",
        image_class="PixtralImageProcessorPil",
        sizes=((16, 16), (16, 24)),
    ),
    "vipllava": _llava(config={"vision_feature_layers": [-1, -1]}),
    "llava_next": _llava(
        pixels={"size": {"shortest_edge": 16}, "crop_size": 16, "image_grid_pinpoints": _PINPOINTS},
        config={"image_grid_pinpoints": _PINPOINTS},
        sizes=((16, 16), (32, 16)),
    ),
    "llava_next_video": _llava(
        pixels={"size": {"shortest_edge": 16}, "crop_size": 16, "image_grid_pinpoints": _PINPOINTS},
        config={"image_grid_pinpoints": _PINPOINTS},
        ids={"image_token_id": "<image>", "video_token_id": "<video>"},
        sizes=((16, 16), (32, 16)),
    ),
    "llava_onevision": _llava(
        pixels={"size": {"height": 16, "width": 16}, "image_grid_pinpoints": _PINPOINTS},
        config={"image_grid_pinpoints": _PINPOINTS, "vision_feature_select_strategy": "full"},
        processor={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        ids={"image_token_id": "<image>", "video_token_id": "<video>"},
        sizes=((16, 16), (32, 16)),
    ),
    "granite4_vision": _llava(
        pixels={"size": {"shortest_edge": 16}, "crop_size": 16, "image_grid_pinpoints": _PINPOINTS},
        config={
            "image_grid_pinpoints": _PINPOINTS,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [1],
            "qformer_config": {"num_hidden_layers": 1, "max_position_embeddings": 64},
            "vision_config": {"hidden_size": 64},  # one head for 64
        },
        processor={
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "downsample_rate": "1/2",
        },
        sizes=((16, 16), (32, 16)),
    ),
    "video_llava": _llava(
        ids={"image_token_index": "<image>", "video_token_index": "<video>"},
    ),
    "gemma3": Entry(
        tokens=_GEMMA,
        image="<start_of_image>",
        ids=_GEMMA_IDS,
        config=_TWO_LAYERS,
        pixels={"size": {"height": 16, "width": 16}},
        processor={"image_seq_length": 4},
        newlines=True,
    ),
    "shieldgemma2": Entry(
        tokens=_GEMMA,
        image="<start_of_image>",
        ids=_GEMMA_IDS,
        config=_TWO_LAYERS,
        pixels={"size": {"height": 16, "width": 16}},
        processor={"image_seq_length": 4},
        processor_class="Gemma3Processor",
        newlines=True,
    ),
    "gemma3n": Entry(
        tokens=_GEMMA | _AUDIO,
        image="<image_soft_token>",
        ids={f"{name}_id": token for name, token in (_GEMMA | _AUDIO).items()},
        config={
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"],
                "intermediate_size": 48,
                "activation_sparsity_pattern": None,
                "num_kv_shared_layers": 0,
            }
        },
        pixels={"size": {"height": 16, "width": 16}},
        processor={"image_seq_length": 4},
        newlines=True,
    ),
    "gemma4": Entry(
        tokens=_GEMMA_4,
        image="<|image|>",
        ids=_GEMMA_4_IDS,
        start={"vision_config": {}},
        config={
            **_TWO_LAYERS,
            "vision_config": {"pooling_kernel_size": 2, "position_embedding_size": 64, "default_output_length": 4},
        },
        pixels={"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70, "do_resize": False},
        sizes=((16, 16), (16, 24)),
    ),
    "paligemma": Entry(
        tokens={"image_token": "<image>"},
        ids={"image_token_index": "<image>"},
        pixels={"size": {"height": 16, "width": 16}, "image_seq_length": 16},
        alone=False,
        images=(1, 2),
        front=True,
        frame="<bos>{}\n",
    ),
    "idefics2": Entry(
        tokens={
            "image_token": "<image>",
            "image_boundary_token": "<fake_token_around_image>",
            "_e": "<end_of_utterance>",
        },
        ids={"image_token_id": "<image>"},
        pixels={"size": {"shortest_edge": 16, "longest_edge": 16}, "do_image_splitting": False},
        processor={"image_seq_len": 4},
        kept=(" ",),
    ),
    "idefics3": Entry(
        tokens=_IDEFICS,
        ids={"image_token_id": "<image>"},
        config={"scale_factor": 2},
        pixels=_TILES,
        processor={"image_seq_len": 4},
        sizes=((16, 32), (16, 16)),
    ),
    "smolvlm": Entry(
        tokens=_IDEFICS,
        ids={"image_token_id": "<image>"},
        config={"scale_factor": 2},
        pixels=_TILES,
        processor={"image_seq_len": 4},
        sizes=((16, 32), (16, 16)),
    ),
    "granite_docling": Entry(
        tokens=_IDEFICS,
        ids={"image_token_id": "<image>"},
        config={"vision_config": {"scale_factor": 2, "use_fine_route": False}},
        pixels={"size": {"height": 16, "width": 16}, "min_patches": 1, "max_patches": 2},
        processor={"image_seq_len": 4},
        sizes=((16, 32), (16, 16)),
        kept=("\n\n", "\n"),
        newlines=True,
    ),
    "internvl": Entry(
        tokens=_INTERN,
        image="<IMG_CONTEXT>",
        after="\n",
        ids={"image_token_id": "<IMG_CONTEXT>"},
        config={"vision_config": {"patch_size": [4, 4], "image_size": [16, 16]}},
        pixels={"size": {"height": 16, "width": 16}, "min_patches": 1, "max_patches": 2},
        processor={"image_seq_length": 4},
        sizes=((16, 16), (16, 32)),
        nested=False,
    ),
    "qianfan_ocr": Entry(
        tokens=_INTERN,
        image="<IMG_CONTEXT>",
        after="\n",
        ids={"image_token_id": "<IMG_CONTEXT>"},
        config={"vision_config": {"patch_size": [4, 4], "image_size": [16, 16]}},
        pixels={"size": {"height": 16, "width": 16}, "min_patches": 1, "max_patches": 2},
        processor={"image_seq_length": 4, "image_placeholder_token": "<IMG_CONTEXT>"},
        sizes=((16, 16), (16, 32)),
        nested=False,
    ),
    "got_ocr2": Entry(
        tokens={"image_token": "<imgpad>", "_a": "<img>", "_b": "</img>"},
        image="<img><imgpad></img>",
        after="\n",
        ids={"image_token_id": "<imgpad>"},
        pixels={"size": {"height": 16, "width": 16}},
        call={"num_image_tokens": 1},
        nested=False,
        alone=False,
        images=(1, 2),
    ),
    "mistral3": Entry(
        tokens=_PIXTRAL,
        image="[IMG]",
        ids={"image_token_index": "[IMG]"},
        pixels={"patch_size": 4, "size": {"longest_edge": 24}},
        processor={"patch_size": 4, "spatial_merge_size": 2},
        sizes=((16, 16), (16, 24)),
    ),
    "lighton_ocr": Entry(
        tokens=_PIXTRAL,
        image="[IMG]",
        ids={"image_token_id": "[IMG]"},
        pixels={"patch_size": 4, "size": {"longest_edge": 24}},
        processor={"patch_size": 4, "spatial_merge_size": 2},
        sizes=((16, 16), (16, 24)),
    ),
    "aya_vision": Entry(
        tokens={
            "_i": "<image>",
            "_a": "<|START_OF_IMG|>",
            "_b": "<|END_OF_IMG|>",
            "_p": "<|IMG_PATCH|>",
            "_l": "<|IMG_LINE_BREAK|>",
            "_g": "TILE_GLOBAL",
            **{f"_{i}": f"TILE_{i}" for i in range(1, 4)},
            "_t": "TILE",
        },
        ids={"image_token_index": "<|IMG_PATCH|>"},
        pixels={"size": {"height": 16, "width": 16}, "min_patches": 1, "max_patches": 2},
        processor={"patch_size": 4, "img_size": 16, "downsample_factor": 2},
        sizes=((16, 16), (16, 32)),
        nested=False,
    ),
    "cohere2_vision": Entry(
        tokens={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        image="<|IMG_PATCH|>",
        ids={"image_token_id": "<|IMG_PATCH|>"},
        pixels=Noise(tiles(), patch_size=2),
        sizes=((16, 16), (16, 32)),
        nested=False,
    ),
    "deepseek_vl": Entry(
        tokens={"image_token": "<image_placeholder>"},
        image="<image_placeholder>",
        ids={"image_token_id": "<image_placeholder>"},
        pixels={"size": {"height": 16, "width": 16}, "min_size": 4},
        processor={"num_image_tokens": 16},
    ),
    "deepseek_vl_hybrid": Entry(
        tokens={"image_token": "<image_placeholder>"},
        image="<image_placeholder>",
        ids={"image_token_id": "<image_placeholder>"},
        pixels={"size": {"height": 16, "width": 16}, "high_res_size": {"height": 32, "width": 32}, "min_size": 4},
        config={
            "high_res_vision_config": {
                "image_size": 32,
                "window_size": 4,
                "global_attn_indexes": [0],
                "num_pos_feats": 16,
            }
        },
        processor={"num_image_tokens": 16},
    ),
    "janus": Entry(
        tokens={"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
        image="<image_placeholder>",
        after="\n",
        ids={"image_token_id": "<image_placeholder>"},
        config={"vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_patches": 4}},
        pixels={"size": {"height": 16, "width": 16}, "min_size": 4},
        processor={"num_image_tokens": 16},
    ),
    "aria": Entry(
        tokens={"image_token": "<|img|>", "_a": "<fim_prefix>", "_b": "<fim_suffix>"},
        image="<fim_prefix><|img|><fim_suffix>",
        ids={"image_token_index": "<|img|>"},
        config={"projector_patch_to_query_dict": {49: 4}, "vision_config": {"image_size": 490, "patch_size": 70}},
        pixels={"max_image_size": 490, "min_image_size": 70},
        processor={"size_conversion": {490: 4}},
        call={"max_image_size": 490},
    ),
    "ovis2": Entry(
        tokens={"image_token": "<image>", **{f"_{i}": t for i, t in enumerate(_OVIS)}},
        ids={"image_token_id": "<IMG_ATOM>", "visual_indicator_token_ids": _OVIS[1:]},
        config={"vision_config": {"hidden_stride": 2, "vocab_size": 40}},
        pixels={"size": {"height": 16, "width": 16}},
        processor={"image_seq_length": 4},
        sizes=((16, 16), (16, 32)),
        nested=False,
    ),
    "chameleon": Entry(
        tokens={"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>", "sep_token": "<sep>"},
        ids={"image_token_id": "<image>"},
        config={
            "vocabulary_map": {"<image>": 3, **{f"IMGIMG{chr(65 + i)}Z": 160 + i for i in range(10)}},
            "vq_config": {"num_embeddings": 10, "base_channels": 32, "channel_multiplier": [1, 1, 1], "resolution": 16},
        },
        pixels={"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
        processor={"image_seq_length": 16},
    ),
    "mllama": Entry(
        tokens={"image_token": "<|image|>", "_p": "<|python_tag|>"},
        image="<|image|>",
        ids={"image_token_index": "<|image|>"},
        config={
            "vision_config": {
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
                "max_num_tiles": 2,
            },
            "text_config": {"cross_attention_layers": [1]},
        },
        pixels={"size": {"height": 16, "width": 16}, "max_image_tiles": 2},
        sizes=((16, 16), (16, 32)),
    ),
    "mistral_large4": Entry(
        tokens=_PIXTRAL,
        image="[IMG]",
        ids={"image_token_index": "[IMG]"},
        config={
            "text_config": {
                "num_key_value_heads": 2,
                "indexer_types": ["full", "full"],
                "no_rope_layers": [1, 0],
                "kv_source_layers": [0, 1],
                "layer_types": ["indexed_attention", "indexed_attention"],
            }
        },
        pixels={"patch_size": 4, "size": {"longest_edge": 24}},
        processor={"patch_size": 4, "spatial_merge_size": 2},
        sizes=((16, 16), (16, 24)),
    ),
    "lfm2_vl": Entry(
        tokens={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
            "_a": "<|img_row_1_col_1|>",
            "_b": "<|img_row_1_col_2|>",
        },
        ids={"image_token_id": "<image>"},
        config={"vision_config": {"num_patches": 16}, "text_config": {"layer_types": ["conv", "full_attention"]}},
        pixels=Noise(lfm2, tile_size=16, downsample_factor=2, encoder_patch_size=4, use_thumbnail=True),
        sizes=((16, 16), (16, 32)),
    ),
    "kimi_k25": _qwen(
        tokens={
            "image_token": "<|media_pad|>",
            "video_token": "<|kimi_k25_video_placeholder|>",
            "vision_start_token": "<|media_begin|>",
            "vision_end_token": "<|media_end|>",
            "_c": "<|media_content|>",
        },
        named=("image_token", "video_token", "vision_start_token", "vision_end_token"),
        image="<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        after="\n",
        config={
            "text_config": {"num_key_value_heads": 2, "n_group": 1, "head_dim": 8},
            "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8},
        },
        pixels=grids("image_grid_thw", 3, 4, 4),
    ),
    "minimax_m3_vl": _qwen(
        tokens={
            "image_token": "]<]image[>[",
            "video_token": "]<]video[>[",
            "_a": "]<]start of image[>[",
            "_b": "]<]end of image[>[",
        },
        named=(),
        image="]<]image[>[",
        config={"text_config": {"rotary_dim": 16}, "image_token_index": 3, "video_token_index": 4},
        pixels=grids(),
    ),
    "muse_glimmer": _qwen(
        tokens=_MUSE,
        named=("image_token", "video_token"),
        image="<|patch|>",
        config={
            "out_hidden_size": 128,
            "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8, "patch_temporal": 1},
        },
        pixels=grids(),
    ),
    "muse_spark": _qwen(
        tokens=_MUSE,
        named=("image_token", "video_token"),
        image="<|patch|>",
        config={
            "out_hidden_size": 128,
            "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8, "patch_temporal": 1},
            "audio_config": {"patch_sizes": [4], "hidden_sizes": [16], "depths": [1], "num_hidden_layers": 1},
        },
        pixels=grids(),
    ),
    "nemotron_h_omni": Entry(
        tokens={
            "image_token": "<image>",
            "video_token": "<video>",
            "_a": "<img>",
            "_b": "</img>",
            "_c": "<so_embedding>",
        },
        ids={"image_token_id": "<image>"},
        config={
            "vision_hidden_size": 32,
            "vision_config": {
                "max_img_size": 32,
                "patch_dim": 48,
                "video_patch_dim": 96,
                "num_cls_tokens": 1,
                "num_registers": 1,
            },
            "text_config": {
                "layers_block_type": ["linear_attention", "full_attention", "moe"],
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "n_groups": 1,
                "ssm_state_size": 8,
                "chunk_size": 8,
            },
        },
        pixels=grids("image_grid_hw", downsample_ratio=0.5),
        loose=True,
        sizes=((16, 16), (16, 24)),
    ),
    "llama4": Entry(
        tokens={f"_{i}": token for i, token in enumerate(_LLAMA_4)},
        image="<|image|>",
        ids={
            "image_token_index": "<|patch|>",
            "boi_token_index": "<|image_start|>",
            "eoi_token_index": "<|image_end|>",
        },
        config={
            "text_config": {"moe_layers": [1], "no_rope_layers": [1, 0], "attention_chunk_size": 64},
            "vision_config": {
                "intermediate_size": 128,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
        pixels=Noise(tiles(whole=True, name="aspect_ratios", ratios=True)),
        processor={"patch_size": 4},
        sizes=((16, 16), (16, 32)),
        nested=False,
    ),
    "molmo2": Entry(
        tokens={"image_token": "<|image|>", "video_token": "<|video|>", **{f"_{i}": t for i, t in enumerate(_MOLMO)}},
        image="<|image|>",
        ids={
            "image_patch_id": "<im_patch>",
            "image_start_token_id": "<im_start>",
            "low_res_image_start_token_id": "<low_res_im_start>",
            "image_end_token_id": "<im_end>",
            "frame_start_token_id": "<frame_start>",
            "frame_end_token_id": "<frame_end>",
        },
        config={
            "vision_config": {"image_size": [16, 16]},
            "adapter_config": {"vision_feature_layer": [-1, -1], "num_key_value_heads": 2},
        },
        pixels=Noise(molmo2),
        nested=False,
    ),
    "minicpm_ocr": Entry(
        tokens=_MINICPM,
        image="<image_pad>",
        ids={"image_token_id": "<image_pad>", "video_token_id": "<video_pad>"},
        config={"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
        pixels=Noise(minicpm, slice_mode=True, use_image_id=True, downsample_mode="4x"),
        sizes=((16, 16), (16, 32)),
        kept=("", "\n"),
    ),
    "minicpmv4_6": Entry(
        tokens=_MINICPM,
        image="<image_pad>",
        ids={"image_token_id": "<image_pad>", "video_token_id": "<video_pad>"},
        config={"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}, "downsample_mode": "4x"},
        pixels=_SLICES,
        sizes=((16, 16), (48, 16)),
        kept=("", "\n\n"),
    ),
    "minicpmv4_7": Entry(
        tokens=_MINICPM,
        image="<image_pad>",
        ids={"image_token_id": "<image_pad>", "video_token_id": "<video_pad>"},
        config={"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}, "downsample_mode": "4x"},
        pixels=_SLICES,
        sizes=((16, 16), (48, 16)),
        kept=("", "\n\n"),
    ),
    "step3p7": Entry(
        tokens={
            "image_token": "<im_patch>",
            "_a": "<im_start>",
            "_b": "<im_end>",
            "_c": "<patch_start>",
            "_d": "<patch_end>",
            "_e": "<patch_newline>",
        },
        image="<im_patch>",
        ids={"image_token_id": "<im_patch>"},
        config={"text_config": {"sliding_window": 8}},
        pixels=Noise(
            views(16, tiles=True), vision_patch_size=4, downsampler_stride=4, size={"height": 16}, patch_size=16
        ),
        sizes=((16, 16), (16, 32)),
    ),
    "deepseek_ocr2": Entry(
        tokens={"image_token": "<image>"},
        after="\n",
        ids={"image_token_id": "<image>"},
        config={
            "vision_config": {
                "sam_config": {"downsample_channels": [16, 32], "window_size": 4, "image_size": 192, "scale": 32}
            },
            "text_config": {
                "mlp_layer_types": ["dense", "sparse"],
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "num_key_value_heads": 2,
            },
        },
        pixels={"size": {"height": 192, "width": 192}, "tile_size": 192},
        processor={"patch_size": 4},
    ),
    "unlimited_ocr": Entry(
        tokens={"image_token": "<image>"},
        after="\n",
        ids={"image_token_id": "<image>"},
        config={"vision_config": {"sam_config": {"downsample_channels": [16, 32], "window_size": 4}}},
        pixels=Noise(views(64, grid=True), size={"height": 64, "width": 64}, tile_size=64),
        processor={"patch_size": 4},
    ),
    "inkling_mm_model": Entry(
        tokens={
            "image_token": "<|unused_200054|>",
            "audio_token": "<|unused_200053|>",
            "_a": "<|content_image|>",
            "_b": "<|content_audio_input|>",
        },
        image="<|content_image|><|unused_200054|>",
        ids={
            "image_token_id": "<|unused_200054|>",
            "audio_token_id": "<|unused_200053|>",
            "image_bos_token_id": "<|content_image|>",
        },
        config={"vision_config": {"patch_size": 8, "temporal_patch_size": 2, "n_layers": 2, "num_hidden_layers": 2}},
        pixels=Noise(inkling),
        nested=False,
    ),
    "inkling2": Entry(
        tokens={"image_token": "<|unused_200054|>", "_a": "<|content_image|>"},
        image="<|content_image|><|unused_200054|>",
        ids={"image_token_id": "<|unused_200054|>"},
        pixels=Noise(inkling2),
        nested=False,
    ),
    "gemma4_unified": Entry(
        tokens=_GEMMA_4,
        image="<|image|>",
        ids=_GEMMA_4_IDS,
        start={"vision_config": {}},
        config=_TWO_LAYERS,
        pixels=Noise(gemma4_unified),
        sizes=((48, 48),),
    ),
    "pp_chart2table": Entry(
        tokens={"image_token": "<imgpad>", "_a": "<img>", "_b": "</img>"},
        image="<img><imgpad></img>",
        after="\n",
        ids={"image_token_id": "<imgpad>"},
        pixels={"size": {"height": 16, "width": 16}},
        nested=False,
        alone=False,
        images=(1, 2),
    ),
    "emu3": Entry(
        tokens={
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
        },
        ids={"image_token_id": "<image>"},
        config={
            "vocabulary_map": {
                "<image>": 3,
                "<|extra_200|>": 160,
                **{f"<|visual token {i:06d}|>": 161 + i for i in range(64)},
            },
            "vq_config": {
                "codebook_size": 64,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
                "hidden_size": 32,
            },
        },
        pixels={"do_resize": False},
        sizes=((32, 32),),
        nested=False,
    ),
    "fast_vlm": _llava(
        ids={"image_token_id": "<image>"},
        config={"vision_feature_select_strategy": "full"},
        processor_class="LlavaProcessor",
        image_class="CLIPImageProcessorPil",
    ),
    "perception_lm": Entry(
        tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
        image="<|image|>",
        ids={"image_token_id": "<|image|>", "video_token_id": "<|video|>"},
        pixels=Noise(lambda images: {"pixel_values": torch.stack(images)[:, None]}),
        processor={"patch_size": 4},
    ),
}

# Other ways in which processors of the same families write an image.
ENTRIES |= {
    "idefics2/split": replace(
        ENTRIES["idefics2"],
        pixels={"size": {"shortest_edge": 16, "longest_edge": 16}, "do_image_splitting": True},
    ),
    "idefics3/whole": replace(ENTRIES["idefics3"], pixels={**_TILES, "do_image_splitting": False}),
    "smolvlm/whole": replace(ENTRIES["smolvlm"], pixels={**_TILES, "do_image_splitting": False}),
    "gemma3/crops": replace(
        ENTRIES["gemma3"],
        sizes=((32, 64),),
        call={
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 16,
            "pan_and_scan_max_num_crops": 2,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
        kept=("Here is the original image  and here are some crops to help you see better  ",),
    ),
}


NOT_BUILT = {
    "fast_vlm": "its vision tower needs timm",
    "gemma3n": "its vision tower needs timm",
    "mistral4": "a text model without images",
    "perception_lm": "its vision tower needs timm",
}
