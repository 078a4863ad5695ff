"""A LLaVA of a few thousand random weights with its processor, and questions about plain images: no download."""

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

COLOURS = ("black", "red", "green", "blue", "white")
WORDS = ("<pad>", "<eos>", "<unk>", "<image>", *COLOURS, "what", "colour", "is", "it", "name", "the", "dark", "bright")
PATCH, SIDE = 4, 8

TEMPLATE = """{% for message in messages %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}
{%- endfor %}{% endfor %}"""


def make_processor(colours=COLOURS):
    vocabulary = {word: i for i, word in enumerate((*WORDS[:4], *colours, *WORDS[4 + len(COLOURS) :]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",  # four patches, without the class token that CLIP adds
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(*, seed, hidden_size=16):
    """Weights large enough that the image changes what is said."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config={
            **sizes,
            "model_type": "llama",
            "vocab_size": len(WORDS),
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
        },
        vision_config={
            **sizes,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 1,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        image_token_id=WORDS.index("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)
    return model


def make_dataset():
    """Twelve conversational prompts, each with an image, as TRL takes them."""
    questions = ("what colour is it", "name the colour", "is it dark")
    return [
        {"prompt": [{"role": "user", "content": question}], "image": Image.new("RGB", (SIDE, SIDE), colour)}
        for question in questions
        for colour in COLOURS[1:]
    ]
