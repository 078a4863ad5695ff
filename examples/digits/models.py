"""Tiny LLaVAs with a real processor, how they are taught by right answers, and how they are examined.

Dimensions: B problems, T answer tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import trange
from transformers import (
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from digits.task import ANSWER_LENGTH, WORDS
from steer_optim.vlm import Prompts, Rollout, append_response, render, response_logits, rollout
from steer_optim.vlm.data import Rows, conversation

SIDE, PATCH = 16, 8  # a patch is one digit, and one visual token
VOCABULARY = ("<pad>", "<eos>", "<unk>", "<image>", *WORDS)
TEMPLATE = """{% for message in messages %}
{%- if message['content'] is string %}{{ message['content'] }} {% else %}
{%- for part in message['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}
{%- endfor %}{% endif %}{% endfor %}"""


def make_processor() -> LlavaProcessor:
    """LLaVA's, with a token for each word of the task. It needs no torchvision."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    half = [0.5] * 3
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=half, image_std=half
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",  # without the class token that CLIP adds
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def make_model(hidden_size: int) -> LlavaForConditionalGeneration:
    """An untrained LLaVA: two layers of CLIP before two of Llama."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 2}
    # The usual initializer range of 0.02 is for layers a hundred times as wide: here nothing is learned for long.
    text = {"model_type": "llama", "initializer_range": 0.1, "num_attention_heads": 2, "head_dim": 32}
    vision = {"model_type": "clip_vision_model", "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH}
    ends = {"pad_token_id": VOCABULARY.index("<pad>"), "eos_token_id": VOCABULARY.index("<eos>")}
    config = LlavaConfig(
        text_config={
            **sizes,
            **text,
            **ends,
            "bos_token_id": None,
            "vocab_size": len(VOCABULARY),
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
        },
        vision_config={**sizes, **vision, "projection_dim": hidden_size},
        image_token_id=VOCABULARY.index("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**ends, max_new_tokens=ANSWER_LENGTH)
    return model


def eye(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """The modules that see: the tower and what joins it to the language model."""
    return [model.model.vision_tower, model.model.multi_modal_projector]


class Problems:
    """A data set, rendered once: all prompts are equally long and so are all answers."""

    def __init__(self, processor: LlavaProcessor, rows: Dataset) -> None:
        self.answers = rows["answer"][:]
        self.prompts = render(processor, [conversation(row) for row in Rows(rows)])
        ends = [f"{answer} {processor.tokenizer.eos_token}" for answer in self.answers]
        self.answer_BT = processor.tokenizer(ends, return_tensors="pt")["input_ids"]

    def __getitem__(self, chosen: Tensor | slice) -> tuple[Prompts, Rollout]:
        image, text = ({name: value[chosen] for name, value in view.items()} for view in self.prompts[:2])
        answer_BT = self.answer_BT[chosen]
        return Prompts(image, text), Rollout(answer_BT, torch.ones_like(answer_BT, dtype=torch.bool))


def answer_loss(model: LlavaForConditionalGeneration, prompt: dict[str, Tensor], answers: Rollout) -> Tensor:
    """Cross-entropy of the answers, in nats per token."""
    batch = append_response(prompt, answers, model.config)
    logits_BTV = response_logits(model, batch, answers.response_BT.shape[1])
    return cross_entropy(logits_BTV.flatten(0, 1), answers.response_BT.flatten())


def teach(
    model: LlavaForConditionalGeneration, problems: Problems, *, steps: int, batch_size: int, lr: float, name: str
) -> None:
    """Supervised steps on right answers, in every fourth one without the image too, of what requires grad."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01)
    for step in trange(steps, desc=name, disable=None):
        # Up over 50 steps, down to zero over the last two fifths.
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
        prompts, answers = problems[torch.randint(len(problems.answers), (batch_size,))]
        loss = answer_loss(model, prompts.image, answers)
        if step % 4 == 0:
            loss = loss + answer_loss(model, prompts.text, answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()


@torch.no_grad()
def greedy_answers(model: LlavaForConditionalGeneration, processor: LlavaProcessor, problems: Problems) -> list[str]:
    """What a model says to the prompts with the image."""
    response = rollout(model, problems.prompts, max_new_tokens=ANSWER_LENGTH, temperature=0)
    return processor.batch_decode(response.response_BT, skip_special_tokens=True)
