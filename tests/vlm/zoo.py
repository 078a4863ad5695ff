"""A tiny random model of every family of vision-language models, and the processor that writes its prompts.

A family is one entry of ``ENTRIES``: how its default configuration shrinks, the tokens that its tokenizer has, and how
its chat template writes an image. The tokenizer is made here, one character a token, and the processor is the family's
own: so is every id around an image. Pixels are those of the family's image processor where it runs without torchvision,
and noise of the same shape (``Noise``) where it does not.

A prompt is a list of ids in which ``IMAGE`` stands for one image.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import itertools
import string
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

# Earlier versions name their image processors otherwise.
transformers = pytest.importorskip("transformers", minversion="5.23")
Image = pytest.importorskip("PIL.Image")
tokenizers = pytest.importorskip("tokenizers")

from transformers.image_processing_utils import BaseImageProcessor  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODELS  # noqa: E402
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # noqa: E402
from transformers.processing_utils import ImagesKwargs, ProcessorMixin  # noqa: E402

IMAGE = -1
PAD, EOS, BOS = 0, 1, 2
FIRST, NEWLINE = 20, 107  # the first id of text; the ids of one and of more newlines: 107, 108, ...
MORE = 150  # the first id of special tokens beyond the first 17
VOCABULARY = 260
UNUSED = VOCABULARY - 2
TEXT = string.ascii_letters + string.digits + " .,:;!?*<>|/_-[](){}#@&"

# What each size shrinks to, wherever its name stands in a configuration; a list where the default is one.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "out_hidden_size", "embed_dim", "d_model", "projection_dim", "text_hidden_size"), 32
    ),
    **dict.fromkeys(
        ("encoder_hidden_size", "word_embed_proj_dim", "projector_hidden_size", "projection_hidden_size"), 32
    ),
    **dict.fromkeys(("image_text_hidden_size", "alignment_intermediate_size", "patch_embed_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "mlp_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("projection_intermediate_size", "projection_hidden_dim", "merged_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "share_expert_dim"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "moe_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("depth", "encoder_layers", "num_key_value_heads", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "temporal_patch_size", "resampler_depth", "num_global_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "attention_heads"), 2),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "index_n_heads", "resampler_n_heads"), 2),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_query_tokens", "mm_tokens_per_image", "latent_query_num", "resampler_n_latents"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "d_kv", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_head_dim", "index_head_dim", "resampler_head_dim", "output_channels"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "sliding_window"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "d_rel"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("image_size", "num_position_embeddings", "window_size"), 16),
    "patch_size": 4,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "vision_feature_layer": -1,
}


class _AnyOption(ImagesKwargs, total=False):
    return_row_col_info: bool
    crop_to_patches: bool
    min_patches: int
    max_patches: int


class Noise(BaseImageProcessor):
    """Stands in for an image processor that needs torchvision: noise in the shapes that it gives."""

    valid_kwargs = _AnyOption

    def __init__(self, make: Callable[[list[Tensor]], dict[str, Any]], **attributes: Any) -> None:
        super().__init__()
        self.make = make
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, images: Any, **_: Any) -> dict[str, Any]:
        flat = [image for row in images for image in (row if isinstance(row, (list, tuple)) else [row])]
        return self.make([torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 128 - 1 for image in flat])

    def fetch_images(self, images: Any) -> Any:
        return images


@dataclass(frozen=True)
class Entry:
    """What distinguishes a family.

    Attributes:
        tokens: special tokens by the name under which the tokenizer knows them; a list for those without a name.
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


class Zoo:
    """One family: its model, tokenizer and processor, each made when it is asked for."""

    def __init__(self, name: str) -> None:
        self.name, self.entry = name.partition("/")[0], ENTRIES[name]

    @cached_property
    def tokenizer(self) -> Any:
        specials = list(dict.fromkeys(self.entry.tokens.values()))
        vocabulary = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS}
        free = [*range(3, FIRST), *range(MORE, VOCABULARY)]
        vocabulary |= dict(zip(specials, free, strict=False))
        vocabulary |= {character: FIRST + i for i, character in enumerate(TEXT)}
        vocabulary |= {"\n" * (i + 1): NEWLINE + i for i in range(31 if self.entry.newlines else 1)}
        vocabulary["<unk>"] = VOCABULARY - 1
        # Every id has a token: a model samples any of them.
        vocabulary |= {chr(0xE000 + i): i for i in {*range(VOCABULARY)} - {*vocabulary.values()}}
        model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>")
        raw = tokenizers.Tokenizer(model)
        runs = [token for token, i in vocabulary.items() if NEWLINE <= i < NEWLINE + 31]
        raw.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in runs])
        raw.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in specials])
        raw.decoder = tokenizers.decoders.Fuse()
        named = {name: token for name, token in self.entry.tokens.items() if not name.startswith("_")}
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw,
            pad_token="<pad>",
            eos_token="<eos>",
            bos_token="<bos>",
            unk_token="<unk>",
            extra_special_tokens=named,
        )

    @cached_property
    def config(self) -> Any:
        entry, tokenizer = self.entry, self.tokenizer
        default = CONFIG_MAPPING[self.name](**entry.start).to_dict()
        values = _merged(_shrunk(default), entry.config)
        for name, token in entry.ids.items():
            values[name] = tokenizer.convert_tokens_to_ids(token)
        config = CONFIG_MAPPING[self.name](**{k: v for k, v in values.items() if k not in _NOT_ARGUMENTS})
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            part.pad_token_id, part.eos_token_id, part.bos_token_id = PAD, EOS, BOS
        return config

    @cached_property
    def model(self) -> nn.Module:
        return build(getattr(transformers, MODELS[self.name])(self.config))

    @cached_property
    def processor(self) -> Any:
        entry = self.entry
        cls = getattr(transformers, entry.processor_class or PROCESSOR_MAPPING_NAMES[self.name])
        if not _has("torchvision"):
            pil = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
            sys.modules.setdefault("transformers.models.pixtral.image_processing_pixtral", pil)
        # Without torchvision transformers shows a placeholder for some classes that run without it.
        module = importlib.import_module(cls.__module__)
        cls = getattr(module, cls.__name__)
        if "num2words" in vars(module):
            vars(module)["num2words"] = str  # for videos only, and it is not a dependency
        images = entry.pixels
        if not isinstance(images, Noise):
            known = entry.image_class or IMAGE_PROCESSOR_MAPPING_NAMES[self.name]["pil"]
            images = getattr(transformers, known)(**entry.pixels)
        arguments = {"image_processor": images, "tokenizer": self.tokenizer, **entry.processor}
        parameters = inspect.signature(cls.__init__).parameters
        if "qformer_tokenizer" in parameters:
            arguments["qformer_tokenizer"] = self.tokenizer
        if "chat_template" in parameters:
            arguments["chat_template"] = _TEMPLATE.replace("IMAGE", repr(entry.image + entry.after))
        for name in ("video_processor", "feature_extractor"):
            if name in parameters:
                arguments[name] = Noise(lambda _: {}, slice_mode=False, downsample_mode="4x", num_frames=1, fps=1)
        # A stand-in is not of the class that is asked for.
        check, ProcessorMixin.check_argument_for_proper_class = (
            ProcessorMixin.check_argument_for_proper_class,
            _any_class,
        )
        try:
            return cls(**arguments)
        finally:
            ProcessorMixin.check_argument_for_proper_class = check

    def text(self, prompt: Sequence[int]) -> str:
        """The prompt before the processor expands its images."""
        if self.entry.front:
            prompt = sorted((token for token in prompt if token != BOS), key=lambda token: token != IMAGE)
        pieces = [self.entry.image if i == IMAGE else self.tokenizer.convert_ids_to_tokens(i) for i in prompt]
        return "".join(pieces)

    def images(self, prompt: Sequence[int], salt: int = 0) -> list[Any]:
        """The images of a prompt: noise, seeded by the id that follows each of them."""
        return [
            noise(1000 * salt + seed, size) for seed, size in zip(self._seeds(prompt), self._sizes(prompt), strict=True)
        ]

    def _seeds(self, prompt: Sequence[int]) -> list[int]:
        return [abs(after) for token, after in itertools.pairwise([*prompt, 0]) if token == IMAGE]

    def _sizes(self, prompt: Sequence[int]) -> list[tuple[int, int]]:
        return [self.entry.sizes[seed % len(self.entry.sizes)] for seed in self._seeds(prompt)]

    def batch(self, prompts: Sequence[Sequence[int]], side: str = "left", *, salt: int = 0) -> dict[str, Any]:
        """The prompts as the processor gives them, padded on ``side``; with another ``salt``, other images."""
        images = [self.images(prompt, salt) for prompt in prompts]
        flat = [image for row in images for image in row]
        given = None if not flat else images if self.entry.nested else flat
        texts = [self.text(prompt) for prompt in prompts]
        return self._call(texts, given, side)

    def _call(self, texts: list[str], images: Any, side: str) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = self.processor(
                text=texts,
                images=images,
                padding=True,
                padding_side=side,
                return_tensors="pt",
                add_special_tokens=False,
                **self.entry.call,
            )
        return {key: value for key, value in batch.items() if value is not None}

    def without(self, prompt: Sequence[int], *, kept: bool = False) -> list[int]:
        """The ids of the prompt as the processor writes it without its images; ``kept``: what stays of each, too."""
        text = self.text([token for token in prompt if token != IMAGE])
        if kept and self.entry.kept:
            sizes = iter(self._sizes(prompt))
            which = (
                self.entry.kept[self.entry.sizes.index(next(sizes))] if i == IMAGE else self.text([i]) for i in prompt
            )
            text = "".join(which)
        if not self.entry.alone:
            return list(self.tokenizer(self.entry.frame.format(text), add_special_tokens=False)["input_ids"])
        return list(self._call([text], None, "left")["input_ids"][0].tolist())

    def conversation(self, prompt: Sequence[int]) -> list[dict[str, Any]]:
        """The prompt as a message, its text in pieces around its images."""
        content: list[dict[str, Any]] = []
        images = iter(self.images(prompt))
        for token in prompt:
            if token == IMAGE:
                content.append({"type": "image", "image": next(images)})
            elif token != BOS:
                content.append({"type": "text", "text": self.tokenizer.convert_ids_to_tokens(token)})
        return [{"role": "user", "content": content}]

    @property
    def template_options(self) -> dict[str, Any]:
        """What `apply_chat_template` needs beyond its defaults."""
        return {"return_tensors": "pt", **({"processor_kwargs": dict(self.entry.call)} if self.entry.call else {})}

    def bare_keys(self, side: str) -> set[str]:
        """The keys of a batch without images."""
        if not self.entry.alone:
            return {"input_ids", "attention_mask", "token_type_ids"}
        return set(self.batch([[BOS, FIRST]], side))


def noise(seed: int, size: tuple[int, int]) -> Any:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=numpy.uint8))


def build(model: nn.Module) -> nn.Module:
    """Float32, evaluation mode, weights large enough that logits spread and images matter."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.normal_(std=1.5 * fan_in**-0.5, generator=generator)
        elif "gate" in name and not parameter.any():  # Mllama's begin closed
            parameter.data.fill_(1.0)
    model.get_input_embeddings().weight.data.normal_(generator=generator)
    return model.eval()


_NOT_ARGUMENTS = ("model_type", "transformers_version", "architectures", "id2label", "label2id")
_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% for c in m.content %}{% if c.type == 'image' %}{{ IMAGE }}"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _any_class(self: Any, *_: Any) -> type:
    return object


def _shrunk(config: Any, vision: bool = False) -> Any:
    """The configuration with every size of ``SIZES``; towers have one layer, and as many key heads as heads."""
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in _NOT_ARGUMENTS and name != "model_type":
            continue
        if name == "per_layer_config":
            small[name] = None
        elif name == "rope_parameters":
            small[name] = copy.deepcopy(value)
            if value and "mrope_section" in value:
                small[name]["mrope_section"] = [4, 2, 2]
        elif isinstance(value, dict):
            small[name] = _shrunk(value, vision or "vision" in name or "sam" in name)
        elif name in ("layer_types", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))
            small[name] = (kinds * 2)[: 1 if vision else 2]
        elif value is not None and name in SIZES and isinstance(value, list) == isinstance(SIZES[name], list):
            small[name] = SIZES[name]
        elif str(name).endswith("_token_id"):
            small[name] = None if value is None else PAD if name == "pad_token_id" else UNUSED
        else:
            small[name] = value
    if vision:
        small |= {name: 1 for name in ("num_hidden_layers", "depth") if name in small}
        small |= {"num_key_value_heads": 2} if "num_key_value_heads" in small else {}
    return small


def _merged(config: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for name, value in more.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if nested else value
    return merged


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


def _patches(image: Tensor, size: int = 4) -> Tensor:
    """The patches of an image, by rows, each flat."""
    return image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)


def _grids(name: str = "image_grid_thw", *shape: int, times: int = 1, **attributes: Any) -> Noise:
    """Flat patches of all images in one tensor, and how many there are in each direction."""

    def make(images: list[Tensor]) -> dict[str, Any]:
        pixels = torch.cat([_patches(image) for image in images]).repeat(1, times)
        grid = torch.tensor([[1, image.shape[1] // 4, image.shape[2] // 4] for image in images])
        grid = grid[:, 1:] if name.endswith("_hw") else grid
        return {"pixel_values": pixels.unflatten(1, shape) if shape else pixels, name: grid}

    return Noise(make, **{"patch_size": 4, "merge_size": 2, "temporal_patch_size": 1, **attributes})


def _tiles(**more: Any) -> Callable[[list[Tensor]], dict[str, Any]]:
    """Square tiles of 16 pixels, one after the other, and their number in each image."""

    def make(images: list[Tensor]) -> dict[str, Any]:
        tiles = [image.unfold(2, 16, 16).permute(2, 0, 1, 3) for image in images]
        number = torch.tensor([len(tile) for tile in tiles])
        ratios = torch.tensor([[1, len(tile)] for tile in tiles])
        # An image of several tiles comes once more as a whole.
        whole = [torch.cat([tile, tile[:1]]) if len(tile) > 1 and more.get("whole") else tile for tile in tiles]
        return {
            "pixel_values": torch.cat(whole),
            more.get("name", "num_patches"): ratios if "ratios" in more else number,
        }

    return make


def _lfm2(images: list[Tensor]) -> dict[str, Any]:
    """A wide image comes in two tiles and once more as a whole."""
    parts = [
        [image[..., :16], image[..., 16:], image[..., :16]] if image.shape[2] > 16 else [image] for image in images
    ]
    pixels = torch.stack([_patches(part) for whole in parts for part in whole])
    keys = {"pixel_values": pixels, "pixel_attention_mask": torch.ones(pixels.shape[:2], dtype=torch.int64)}
    rows_and_columns = {"image_rows": [1] * len(images), "image_cols": [max(1, len(whole) - 1) for whole in parts]}
    shapes = torch.tensor([[4, 4]] * len(pixels))
    return {**keys, "spatial_shapes": shapes, **rows_and_columns, "image_sizes": [[16, 16]] * len(images)}


def _minicpm(images: list[Tensor]) -> dict[str, Any]:
    """An image of two tiles comes as a whole and in two slices, one below the other."""
    parts = [[image[..., :16]] * (3 if image.shape[2] > 16 else 1) for image in images]
    strips = [part.unfold(1, 4, 4).permute(0, 3, 1, 2).flatten(2) for whole in parts for part in whole]
    sizes = torch.tensor([[4, 4]] * len(strips), dtype=torch.int32)
    grids = torch.tensor([[2, 1] if len(whole) > 1 else [0, 0] for whole in parts])
    counts = {"grids": grids, "num_patches_per_image": [len(whole) for whole in parts]}
    return {"pixel_values": torch.cat(strips, dim=-1)[None], "target_sizes": sizes, **counts}


def _molmo2(images: list[Tensor]) -> dict[str, Any]:
    """One crop an image, low and high resolution alike, pooled two by two."""
    crops = torch.stack([_patches(image) for image in images]).repeat_interleave(2, dim=0)
    corner = torch.tensor([[row + column for row in (0, 4) for column in (0, 1)]])
    pool = torch.cat([corner + 8 * row + 2 * column for row in range(2) for column in range(2)])
    pooling = torch.cat([pool + 16 * crop for crop in range(len(crops))])
    grids = torch.tensor([[2, 2, 2, 2]] * len(images))
    number = torch.tensor([2] * len(images))
    return {"pixel_values": crops, "image_token_pooling": pooling, "image_grids": grids, "image_num_crops": number}


def _inkling(images: list[Tensor]) -> dict[str, Any]:
    patches = [image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).flatten(0, 1) for image in images]
    pixels = torch.cat(patches)[:, None].repeat(1, 2, 1, 1, 1)
    return {"pixel_values": pixels, "num_patches": torch.tensor([len(patch) for patch in patches])}


def _inkling2(images: list[Tensor]) -> dict[str, Any]:
    patches = [image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).flatten(0, 1) for image in images]
    grid = torch.tensor([[1, image.shape[1] // 8, image.shape[2] // 8] for image in images])
    return {"pixel_values": torch.cat(patches), "image_grid_thw": grid}


def _gemma4_unified(images: list[Tensor]) -> dict[str, Any]:
    flat = torch.stack([_patches(image, 12) for image in images])
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1).flatten(0, 1)
    number = torch.tensor([flat.shape[1]] * len(images))
    places = place.repeat(len(images), 1, 1)
    return {"pixel_values": flat, "image_position_ids": places, "num_soft_tokens_per_image": number}


def _views(size: int, **more: Any) -> Callable[[list[Tensor]], dict[str, Any]]:
    """Each image as a whole and no tiles beside."""

    def make(images: list[Tensor]) -> dict[str, Any]:
        whole = torch.stack([nn.functional.interpolate(image[None], size)[0] for image in images])
        grid = {"patches_grid": [[1, 1]] * len(images)} if "grid" in more else {}
        if "tiles" not in more:
            return {"pixel_values": whole, "num_local_patches": [0] * len(images), **grid}
        tiles = [[image[..., :16], image[..., 16:]] if image.shape[2] > 16 else [] for image in images]
        local = {"pixel_values_local": torch.stack([tile for row in tiles for tile in row])} if any(tiles) else {}
        breaks = {"patch_newline_masks": [[True] * len(row) for row in tiles]}
        return {"pixel_values": whole, **local, "num_local_patches": [len(row) for row in tiles], **breaks}

    return make


_SQUARE = {"do_resize": False, "do_center_crop": False}
_BLIP = {"do_resize": False}


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
        pixels=Noise(_tiles(), patch_size=2),
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
        pixels=Noise(_lfm2, tile_size=16, downsample_factor=2, encoder_patch_size=4, use_thumbnail=True),
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
        pixels=_grids("image_grid_thw", 3, 4, 4),
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
        pixels=_grids(),
    ),
    "muse_glimmer": _qwen(
        tokens=_MUSE,
        named=("image_token", "video_token"),
        image="<|patch|>",
        config={
            "out_hidden_size": 128,
            "vision_config": {"pos_emb_height": 8, "pos_emb_width": 8, "patch_temporal": 1},
        },
        pixels=_grids(),
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
        pixels=_grids(),
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
        pixels=_grids("image_grid_hw", downsample_ratio=0.5),
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
        pixels=Noise(_tiles(whole=True, name="aspect_ratios", ratios=True)),
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
        pixels=Noise(_molmo2),
        nested=False,
    ),
    "minicpm_ocr": Entry(
        tokens=_MINICPM,
        image="<image_pad>",
        ids={"image_token_id": "<image_pad>", "video_token_id": "<video_pad>"},
        config={"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
        pixels=Noise(_minicpm, slice_mode=True, use_image_id=True, downsample_mode="4x"),
        sizes=((16, 16), (16, 32)),
        kept=("", "\n"),
    ),
    "minicpmv4_6": Entry(
        tokens=_MINICPM,
        image="<image_pad>",
        ids={"image_token_id": "<image_pad>", "video_token_id": "<video_pad>"},
        config={"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}, "downsample_mode": "4x"},
        pixels=Noise(_minicpm, slice_mode=True, use_image_id=True, downsample_mode="4x"),
        sizes=((16, 16), (16, 32)),
        kept=("", "\n"),
    ),
    "minicpmv4_7": Entry(
        tokens=_MINICPM,
        image="<image_pad>",
        ids={"image_token_id": "<image_pad>", "video_token_id": "<video_pad>"},
        config={"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}, "downsample_mode": "4x"},
        pixels=Noise(_minicpm, slice_mode=True, use_image_id=True, downsample_mode="4x"),
        sizes=((16, 16), (16, 32)),
        kept=("", "\n"),
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
            _views(16, tiles=True), vision_patch_size=4, downsampler_stride=4, size={"height": 16}, patch_size=16
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
        pixels=Noise(_views(192), size={"height": 192, "width": 192}, tile_size=192),
        processor={"patch_size": 4},
    ),
    "unlimited_ocr": Entry(
        tokens={"image_token": "<image>"},
        after="\n",
        ids={"image_token_id": "<image>"},
        config={"vision_config": {"sam_config": {"downsample_channels": [16, 32], "window_size": 4}}},
        pixels=Noise(_views(64, grid=True), size={"height": 64, "width": 64}, tile_size=64),
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
        pixels=Noise(_inkling),
        nested=False,
    ),
    "inkling2": Entry(
        tokens={"image_token": "<|unused_200054|>", "_a": "<|content_image|>"},
        image="<|content_image|><|unused_200054|>",
        ids={"image_token_id": "<|unused_200054|>"},
        pixels=Noise(_inkling2),
        nested=False,
    ),
    "gemma4_unified": Entry(
        tokens=_GEMMA_4,
        image="<|image|>",
        ids=_GEMMA_4_IDS,
        start={"vision_config": {}},
        config=_TWO_LAYERS,
        pixels=Noise(_gemma4_unified),
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
