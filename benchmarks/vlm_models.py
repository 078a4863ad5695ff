"""Untrained Qwen3-VLs to distil in benchmarks: as small as the evidence's, and large enough that arithmetic decides.

What a step costs depends on shapes and lengths only, so nothing is trained here. Needs the extra ``examples``.

Dimensions: B prompts, L prompt tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from studies.vgs.digits import ANSWER_LENGTH, DigitProblems, make_model, make_tokenizer

PAD, EOS, IMAGE, VISION_START, VISION_END, VIDEO, SPECIAL = 0, 1, 2, 3, 4, 5, 6
VOCABULARY = 32_768
PROMPTS, TEXT_TOKENS, GRID, PATCH = 4, 24, 32, 8
LONGEST, USUAL = 64, 20  # tokens of a response: at most, and expected if it had no end


@dataclass(frozen=True)
class Setting:
    """A teacher, a student, prompts for both, and how long the responses may be."""

    teacher: Qwen3VLForConditionalGeneration
    student: Qwen3VLForConditionalGeneration
    draw: Callable[[], dict[str, Tensor]]
    max_new_tokens: int

    def describe(self) -> dict[str, int]:
        prompt = self.draw()
        count = {name: sum(p.numel() for p in getattr(self, name).parameters()) for name in ("teacher", "student")}
        return {
            **{f"{name} parameters": number for name, number in count.items()},
            "vocabulary": self.student.config.text_config.vocab_size,
            "prompts": len(prompt["input_ids"]),
            "prompt tokens": prompt["input_ids"].shape[1],
            "visual tokens": int(prompt["mm_token_type_ids"].sum(dim=1).max()),
            "response tokens at most": self.max_new_tokens,
        }


def digits() -> Setting:
    """The evidence's on digits: what is cheap to compute, so that the overhead of operations decides."""
    tokenizer = make_tokenizer()
    task = DigitProblems(tokenizer, held_out=False)
    teacher, student = (make_model(tokenizer, hidden_size=size) for size in (64, 32))
    return Setting(teacher, student, lambda: task.draw(64).prompt, ANSWER_LENGTH)


def larger() -> Setting:
    """Nearer to real use: arithmetic decides, and lengths are as a thousand visual tokens to a hundred of text."""
    return Setting(_model(512, layers=8), _model(256, layers=4), _prompts, LONGEST)


SETTINGS: dict[str, Callable[[], Setting]] = {"digits": digits, "larger": larger}


def make(name: str) -> Setting:
    torch.manual_seed(0)
    setting = SETTINGS[name]()
    setting.teacher.eval()
    setting.student.train()
    return setting


def _model(hidden_size: int, *, layers: int) -> Qwen3VLForConditionalGeneration:
    head = 64
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "vocab_size": VOCABULARY,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // head,
            "num_key_value_heads": hidden_size // head // 2,
            "head_dim": head,
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [16, 8, 8],
                "mrope_interleaved": True,
            },
            "pad_token_id": PAD,
            "eos_token_id": EOS,
        },
        vision_config={
            "hidden_size": hidden_size // 2,
            "intermediate_size": hidden_size,
            "out_hidden_size": hidden_size,
            "depth": 4,
            "num_heads": 4,
            "patch_size": PATCH,
            "temporal_patch_size": 1,
            "num_position_embeddings": GRID**2,
            "deepstack_visual_indexes": [1, 3],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    model = Qwen3VLForConditionalGeneration(config)
    # An untrained model ends a response about never: this one does after USUAL tokens, more or less.
    model.lm_head = nn.Linear(hidden_size, VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=config.text_config.initializer_range)
        model.lm_head.bias.zero_()
        model.lm_head.bias[EOS] = math.log(VOCABULARY / USUAL)
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    return model


def _prompts() -> dict[str, Tensor]:
    image = [VISION_START, *[IMAGE] * (GRID // 2) ** 2, VISION_END]
    text_BL = torch.randint(SPECIAL, VOCABULARY, (PROMPTS, TEXT_TOKENS))
    input_ids = torch.cat([torch.tensor(image).expand(PROMPTS, -1), text_BL], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).long(),
        "pixel_values": torch.randn(PROMPTS * GRID**2, 3 * PATCH**2),
        "image_grid_thw": torch.tensor([[1, GRID, GRID]]).repeat(PROMPTS, 1),
    }
