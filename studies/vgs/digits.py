"""The task ``digits`` and its models: questions about four real handwritten digits, put to tiny Qwen3-VLs.

Four 8x8 digits of scikit-learn's set stand in a 2x2 grid, one 16x16 image. A question asks for the sum or the
maximum of a row or a column, and the answer names what was seen before it concludes::

    <vision_start> <image_pad> x 4 <vision_end> what is the sum of the top row ?
    <reason> 3 + 8 = 11 </reason> 11 <eos>

The two operands need the eye, the rest is language: without the image the best guess is right about one time in seven,
and names both operands one time in a hundred. All questions are equally long and so are all answers: no batch is
padded. Train and test problems share no handwritten digit.

Dimensions: B problems of a batch, L prompt tokens, T answer tokens, P patches of a batch of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Generator, Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

SPECIAL = ("<pad>", "<eos>", "<image_pad>", "<vision_start>", "<vision_end>", "<unk>")
NUMBERS = tuple(str(n) for n in range(19))
LINES = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}
OPERATIONS = {"sum": "+", "maximum": "max"}
WORDS = ("what", "is", "the", "of", "row", "column", "top", "bottom", "left", "right", *OPERATIONS, "?")
CHAIN = ("<reason>", "</reason>", "=", *OPERATIONS.values())

PATCH, MERGE, DIGITS = 4, 2, 4  # a patch is 4x4 pixels, and 2x2 merged patches are one digit: one visual token
ANSWER_LENGTH = 9
HEADS = 4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the task's few dozen words."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *NUMBERS, *WORDS, *CHAIN))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=["<image_pad>", "<vision_start>", "<vision_end>"],
        padding_side="left",
    )


@dataclass(frozen=True)
class Problems:
    """A batch of problems.

    Attributes:
        prompt: what the model takes, under the names of Qwen3-VL: ``input_ids``, ``attention_mask`` and
            ``mm_token_type_ids``, each ``(B, L)`` int64; ``pixel_values`` ``(P, 16)`` float32;
            ``image_grid_thw`` ``(B, 3)`` int64.
        answer_BT: the ids of the right answer, up to and including ``<eos>``.
        answers: the right answers, as text without ``<eos>``.
    """

    prompt: dict[str, Tensor]
    answer_BT: Tensor
    answers: list[str]


class DigitProblems:
    """Problems over one half of scikit-learn's handwritten digits.

    Args:
        tokenizer: what :func:`make_tokenizer` returned.
        held_out: draw from the fifth of the digits that training never sees, instead of from the rest.
        device: where the batches are put.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, held_out: bool, device: str = "cpu") -> None:
        data = load_digits()
        # The split does not depend on the run's seed: no run may train on what another one was tested on.
        order = torch.randperm(len(data.target), generator=Generator().manual_seed(0))
        fifth = len(order) // 5
        chosen = order[:fifth] if held_out else order[fifth:]
        self.pixels = torch.tensor(data.images, dtype=torch.float32)[chosen] / 8 - 1  # from [0, 16] to [-1, 1]
        self.digits = torch.tensor(data.target)[chosen]
        self.tokenizer, self.device = tokenizer, device

    def draw(self, count: int, *, generator: Generator | None = None) -> Problems:
        """``count`` problems, uniform over digits, operations and lines; by default from torch's global generator."""
        chosen = torch.randint(len(self.digits), (count, DIGITS), generator=generator)
        kinds = torch.randint(len(OPERATIONS) * len(LINES), (count,), generator=generator).tolist()
        operations, lines = list(OPERATIONS), list(LINES)
        questions, answers = [], []
        for digits, kind in zip(self.digits[chosen].tolist(), kinds, strict=True):
            operation, line = operations[kind % len(operations)], lines[kind // len(operations)]
            first, second = (digits[cell] for cell in LINES[line])
            result = first + second if operation == "sum" else max(first, second)
            image = " ".join(["<vision_start>", *["<image_pad>"] * DIGITS, "<vision_end>"])
            questions.append(f"{image} what is the {operation} of the {line} ?")
            answers.append(f"<reason> {first} {OPERATIONS[operation]} {second} = {result} </reason> {result}")
        input_ids = self._encode(questions)
        prompt = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == self.tokenizer.convert_tokens_to_ids("<image_pad>")).long(),
            "pixel_values": patches(self.pixels[chosen]).to(self.device),
            "image_grid_thw": torch.tensor([[1, 2 * MERGE, 2 * MERGE]], device=self.device).repeat(count, 1),
        }
        return Problems(prompt, self._encode([f"{answer} <eos>" for answer in answers]), answers)

    def _encode(self, texts: list[str]) -> Tensor:
        return self.tokenizer(texts, return_tensors="pt", return_token_type_ids=False)["input_ids"].to(self.device)


def patches(digits: Tensor) -> Tensor:
    """``pixel_values`` as Qwen3-VL wants them: one row per patch, the patches of a merged token together.

    Args:
        digits: ``(B, 4, 8, 8)``, the digits of each grid in reading order. A digit is one merged token, so the
            grid needs no other order than theirs.

    Returns:
        ``(B * 16, 16)``: channels (one), frames (one), rows and columns of each patch, flattened.
    """
    rows = digits.unflatten(-1, (MERGE, PATCH)).unflatten(-3, (MERGE, PATCH))  # (B, 4, h, y, w, x)
    return rows.transpose(-3, -2).reshape(-1, PATCH * PATCH)


def make_model(tokenizer: PreTrainedTokenizerFast, *, hidden_size: int) -> Qwen3VLForConditionalGeneration:
    """An untrained Qwen3-VL for the task: two decoder layers, one vision layer, four visual tokens per image."""
    token = tokenizer.convert_tokens_to_ids
    head = hidden_size // HEADS
    # The usual initializer range of 0.02 is for layers a hundred times as wide: here nothing is learned for long.
    shared = {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "initializer_range": 0.1}
    # Rotary frequencies are shared out among time, height and width.
    sections = [head // 2 - 2 * (head // 8), head // 8, head // 8]
    config = Qwen3VLConfig(
        text_config={
            **shared,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": head,
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": sections,
                "mrope_interleaved": True,
            },
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            **shared,
            "out_hidden_size": hidden_size,
            "depth": 1,
            "num_heads": HEADS,
            "in_channels": 1,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
            "num_position_embeddings": DIGITS * MERGE**2,
            "deepstack_visual_indexes": [],
        },
        image_token_id=token("<image_pad>"),
        vision_start_token_id=token("<vision_start>"),
        vision_end_token_id=token("<vision_end>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, max_new_tokens=ANSWER_LENGTH
    )
    return model
