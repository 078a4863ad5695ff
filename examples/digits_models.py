"""The models of the example, teacher and student: tiny Qwen3-VLs, how they are taught and how they are examined.

Both learn from right answers first, with the image and, in every fourth step, without it too, so that each has a
text-only view that means something. The student is then given an untrained vision tower, and a few steps in which
nothing but the tower learns: its language is that of a trained model, its perception that of a beginner. On-policy
distillation has to teach it to see.

Dimensions: B problems, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from digits import ANSWER_LENGTH, DIGITS, MERGE, PATCH, DigitProblems, Problems, grade
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from steer_optim.vlm import Rollout, append_response, response_logits, rollout, text_only

HEADS = 4


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


def with_untrained_eye(model: Qwen3VLForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """Puts a fresh vision tower in place of the model's own, and freezes the rest."""
    fresh = Qwen3VLForConditionalGeneration(model.config)
    model.model.visual.load_state_dict(fresh.model.visual.state_dict())
    model.requires_grad_(False)
    model.model.visual.requires_grad_(True)
    return model


def teach(
    model: Qwen3VLForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    task: DigitProblems,
    *,
    step: int,
    batch_size: int,
) -> None:
    """One supervised step on right answers."""
    problems = task.draw(batch_size)
    loss = answer_loss(model, problems.prompt, problems.answer_BT)
    if step % 4 == 0:
        loss = loss + answer_loss(model, text_only(problems.prompt, model.config), problems.answer_BT)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def answer_loss(model: Qwen3VLForConditionalGeneration, prompt: dict[str, Tensor], answer_BT: Tensor) -> Tensor:
    """Cross-entropy of the answers, in nats per token."""
    answers = Rollout(answer_BT, torch.ones_like(answer_BT, dtype=torch.bool))
    batch = append_response(prompt, answers, model.config)
    logits_BTV = response_logits(model, batch, answer_BT.shape[1])
    return cross_entropy(logits_BTV.flatten(0, 1), answer_BT.flatten())


def warm_up_and_decay(step: int, steps: int) -> float:
    """The factor on the learning rate: up over 50 steps, down to zero over the last two fifths."""
    return min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))


@torch.no_grad()
def examine(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, batches: Iterable[Problems]
) -> dict[str, float]:
    """How well a model does on problems, with greedy decoding.

    Returns:
        ``answer`` and ``perception`` accuracy in [0, 1], see :func:`digits.grade`, and ``text_loss``, the cross-entropy
        of the right answers without the image, in nats per token.
    """
    responses, answers, text_losses = [], [], []
    for problems in batches:
        greedy = rollout(model, problems.prompt, max_new_tokens=ANSWER_LENGTH, temperature=0)
        responses += tokenizer.batch_decode(greedy.response_BT)
        answers += problems.answers
        text_losses.append(answer_loss(model, text_only(problems.prompt, model.config), problems.answer_BT))
    answer, perception = grade(responses, answers)
    return {"answer": answer, "perception": perception, "text_loss": float(torch.stack(text_losses).mean())}
