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
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from tests.vlm.zoo_entries import ENTRIES
from tests.vlm.zoo_pixels import Noise, transformers

Image = pytest.importorskip("PIL.Image")
tokenizers = pytest.importorskip("tokenizers")

from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MODELS  # noqa: E402
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # noqa: E402
from transformers.processing_utils import ProcessorMixin  # noqa: E402

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
        elif not parameter.any():  # or what it scales would not matter
            parameter.data.normal_(std=0.1, generator=generator)
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
