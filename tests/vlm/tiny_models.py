"""Six families of the zoo that differ most, with names for the ids that stand for their images.

A prompt is a list of ids in which ``IMAGE`` stands for one image. ``Family.batch`` writes it as the family's processor
does: the placeholders, the tokens around them, their newlines, padding, token types and pixels.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor, nn

from tests.vlm.zoo import BOS, EOS, FIRST, IMAGE, MORE, NEWLINE, PAD, VOCABULARY, Zoo
from tests.vlm.zoo_pixels import transformers

__all__ = ["BOS", "EOS", "FAMILIES", "IMAGE", "NEWLINE", "PAD", "VOCABULARY", "Family", "transformers"]

# The tokens around an image, its placeholder and that of a video; what each is depends on the family.
START, PLACEHOLDER, END, VIDEO, ROW_1, ROW_2, GLOBAL = range(3, 10)
SPECIAL_IDS = (PAD, *range(START, FIRST), *range(MORE, VOCABULARY))

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}


class Family:
    """A tiny model and the habits of its processor."""

    def __init__(self, name: str) -> None:
        self.zoo = Zoo(name)
        self.model: nn.Module = self.zoo.model
        # What the config does not name.
        self.drop_ids = None
        if name in ("idefics3", "smolvlm"):
            names = [token for token in self.zoo.entry.tokens.values() if "row" in token or "fake" in token]
            self.drop_ids = (GLOBAL, *self.zoo.tokenizer.convert_tokens_to_ids(names))

    @cached_property
    def image(self) -> tuple[int, ...]:
        """The ids of one image, the tokens around it included."""
        return tuple(self.ids([IMAGE]))

    def ids(self, prompt: Sequence[int]) -> list[int]:
        """The prompt with its images expanded; the tokenizer writes adjacent newlines as one token."""
        return list(self.zoo.batch([prompt])["input_ids"][0].tolist())

    def batch(self, prompts: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
        """The prompts as the processor would give them, padded on ``side``; an image is seeded by what follows it."""
        return self.zoo.batch(prompts, side)


FAMILIES: dict[str, Callable[[], Family]] = {
    name: lambda name=name: Family(name)
    for name in ("qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "idefics3", "smolvlm")
}
