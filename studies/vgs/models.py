"""How the harness runs a model: the tower once, then the decoder on embeddings; for losses, rollouts and scores.

`steer_optim.vlm.prompts` and `rollout` work for any batch. Here all prompts have one length and one layout, a step is
made of a few dozen tiny kernels, and half of its time would go into finding out what is the same in every step; the
tests hold the two ways equal.

Dimensions: B problems, L tokens of a prompt, T of a response, d hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from studies.vgs.digits import HEADS, make_model, make_tokenizer
from studies.vgs.questions import Prompt, Questions


def qwen(questions: Questions, hidden_size: int) -> nn.Module:
    """A tiny Qwen3-VL."""
    model: nn.Module = make_model(make_tokenizer(), hidden_size=hidden_size)
    return model


def llava(questions: Any, hidden_size: int) -> nn.Module:
    """A tiny LLaVA, a CLIP tower before a Llama: two layers each, one visual token for each cell of the image."""
    cell, side = questions.cells.shape[-1], questions.side
    sizes = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_attention_heads": HEADS}
    word = questions.ids
    # The usual initializer range of 0.02 is for layers a hundred times as wide: here nothing is learned for long.
    text = LlamaConfig(
        **sizes,
        vocab_size=len(questions.words),
        num_hidden_layers=2,
        initializer_range=0.1,
        max_position_embeddings=64,
        pad_token_id=word["<pad>"],
        eos_token_id=word["<eos>"],
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        **sizes,
        num_hidden_layers=2,
        num_channels=1,
        image_size=side * cell,
        patch_size=cell,
        projection_dim=hidden_size,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            image_token_index=word["<image_pad>"],
            image_seq_length=side**2,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )


def eye(model: Any) -> list[nn.Module]:
    """The modules that see: the tower and what joins it to the language model."""
    if hasattr(model.model, "visual"):
        return [model.model.visual]
    return [model.model.vision_tower, model.model.multi_modal_projector]


@dataclass(frozen=True)
class Prefix:
    """Prompts as the decoder takes them.

    Attributes:
        embeds_BLd: their embeddings, with or without the image.
        positions: where these and ``T`` more tokens are, ``(3, 1, L + T)`` for Qwen; None where they are counted.
    """

    embeds_BLd: Tensor
    positions: Tensor | None

    def detach(self) -> Prefix:
        return Prefix(self.embeds_BLd.detach(), self.positions)


def with_image(model: Any, prompt: Prompt) -> Prefix:
    """The prompts with their images, which pass through the tower here."""
    config, ids_BL = model.config, prompt["input_ids"]
    embeds_BLd = model.get_input_embeddings()(ids_BL)
    columns = (ids_BL[0] == _placeholder(config)).nonzero()[:, 0]
    if hasattr(model.model, "visual"):
        seen = model.model.visual(prompt["pixel_values"], grid_thw=prompt["image_grid_thw"]).pooler_output
        one = {name: prompt[name][:1] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
        head, _ = model.model.get_rope_index(**one)
        positions = torch.cat([head, head.max() + 1 + torch.arange(64, device=head.device).expand(3, 1, -1)], dim=2)
    else:
        tower = model.model.vision_tower(prompt["pixel_values"])
        seen, positions = model.model.multi_modal_projector(tower.last_hidden_state[:, 1:]), None  # without CLS
    seen_Bnd = seen.view(len(ids_BL), len(columns), -1)
    return Prefix(embeds_BLd.index_copy(1, columns, seen_Bnd), positions)


def without_image(model: Any, prompt: Prompt) -> Prefix:
    """The prompts without their images and the tokens around them, as ``steer_optim.vlm.text_only`` leaves them."""
    config, ids_BL = model.config, prompt["input_ids"]
    around = [getattr(config, name, -1) for name in ("vision_start_token_id", "vision_end_token_id")]
    drop = torch.tensor([_placeholder(config), *around], device=ids_BL.device)
    return Prefix(model.get_input_embeddings()(ids_BL[:, ~torch.isin(ids_BL[0], drop)]), None)


def response_logits(model: Any, prefix: Prefix, response_BT: Tensor) -> Tensor:
    """``(B, T, V)``: what predicts each token of the response."""
    T = response_BT.shape[1]
    embeds = torch.cat([prefix.embeds_BLd, model.get_input_embeddings()(response_BT[:, :-1])], dim=1)
    positions = None if prefix.positions is None else prefix.positions[:, :, : embeds.shape[1]]
    hidden = model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    logits: Tensor = model.lm_head(hidden.last_hidden_state[:, -T:])
    return logits


@torch.no_grad()
def sample(model: Any, prefix: Prefix, questions: Questions, *, greedy: bool = False) -> Tensor:
    """``(B, T)``: responses, sampled from the model or the most likely ones; what follows ``<eos>`` means nothing."""
    decoder, never = model.model.language_model, questions.never_sampled
    cache, embeds, start = DynamicCache(config=model.config.text_config), prefix.embeds_BLd, 0
    tokens: list[Tensor] = []
    while True:
        stop = start + embeds.shape[1]
        positions = None if prefix.positions is None else prefix.positions[:, :, start:stop]
        hidden = decoder(inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True)
        logits_BV = model.lm_head(hidden.last_hidden_state[:, -1])
        logits_BV[:, never] = -torch.inf
        token_B1 = logits_BV.argmax(1, keepdim=True) if greedy else torch.multinomial(logits_BV.softmax(1), 1)
        tokens.append(token_B1)
        if len(tokens) == questions.length:
            return torch.cat(tokens, dim=1)
        embeds, start = model.get_input_embeddings()(token_B1), stop


def _placeholder(config: Any) -> int:
    """The id of the placeholder of an image; LLaVA's config has another name for it."""
    return int(getattr(config, "image_token_id", None) or config.image_token_index)
