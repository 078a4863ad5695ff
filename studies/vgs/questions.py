"""Problems with an image: what is asked, what is answered, and whether a response got it right.

A task has prompts of one length and answers of one length, so that no batch is ever padded. Its answer is a chain of
thought; some of its words name what only the image tells (`seen`), the others follow from the words before them. An
answer ends in its result and ``<eos>``.

Dimensions: B problems, L prompt tokens, T answer tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from studies.vgs import digits
from studies.vgs.shapes import SIDES, polygons

Prompt = dict[str, Tensor]
Speaker = Literal["teacher", "student"]


class Questions(abc.ABC):
    """Where the problems of a task come from.

    Attributes:
        words: the vocabulary, by id.
        length: ``T``, the length of every answer.
        seen: the columns of an answer that name what is in the image.
        said: the columns in which any word will do: how a speaker words its answers.
        speaker: who answers, ``teacher`` or ``student``, where that makes a difference.
        reliable: the speakers whose answers are right.
    """

    words: Sequence[str]
    length: int
    seen: tuple[int, ...]
    said: tuple[int, ...] = ()
    reliable: ClassVar[tuple[Speaker, ...]] = ("teacher", "student")

    def __init__(self, *, held_out: bool, speaker: Speaker = "teacher") -> None:
        self.held_out, self.speaker = held_out, speaker

    @abc.abstractmethod
    def draw(self, count: int, *, generator: Generator | None = None) -> tuple[Prompt, Tensor]:
        """``count`` prompts, under the names that the model takes, and the speaker's answers ``(B, T)``."""

    @property
    def eos(self) -> int:
        return self.words.index("<eos>")

    @property
    def never_sampled(self) -> list[int]:
        """The special words other than ``<eos>``: a response with an image placeholder could not be fed back."""
        return [i for i, word in enumerate(self.words) if word in digits.SPECIAL and word != "<eos>"]

    def mask(self, response_BT: Tensor) -> Tensor:
        """``(B, T)``, bool: the tokens of a response, up to and including its first ``<eos>``."""
        ends_BT = (response_BT == self.eos).long()
        return ends_BT.cumsum(dim=1) - ends_BT == 0

    def right(self, response_BT: Tensor, answer_BT: Tensor) -> Tensor:
        """``(B,)``, bool: whether the last word of a response before ``<eos>`` is the result."""
        ends_BT = response_BT == self.eos
        last_B = ends_BT.int().argmax(dim=1) - 1  # -1 where there is no end, too
        result_B = response_BT.gather(1, last_B.clamp(min=0)[:, None])[:, 0]
        return (last_B >= 0) & (result_B == answer_BT[:, -2])

    def perceived(self, response_BT: Tensor, answer_BT: Tensor) -> Tensor:
        """``(B,)``, bool: whether a response names everything that was to be seen, where the answer does."""
        seen = list(self.seen)
        return (response_BT[:, seen] == answer_BT[:, seen]).all(dim=1)


class Digits(Questions):
    """The sum or the maximum of two of four real handwritten digits."""

    length = digits.ANSWER_LENGTH
    seen = (1, 3)

    def __init__(self, *, held_out: bool, speaker: Speaker = "teacher") -> None:
        super().__init__(held_out=held_out, speaker=speaker)
        tokenizer = digits.make_tokenizer()
        self.words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self.problems = digits.DigitProblems(tokenizer, held_out=held_out)

    def draw(self, count: int, *, generator: Generator | None = None) -> tuple[Prompt, Tensor]:
        problems = self.problems.draw(count, generator=generator)
        return problems.prompt, problems.answer_BT


class _Grid(Questions):
    """Square images of ``side`` times ``side`` cells, each of which is one visual token."""

    side: int
    texts: tuple[str, ...]  # the vocabulary after the special words

    def __init__(self, *, held_out: bool, speaker: Speaker = "teacher") -> None:
        super().__init__(held_out=held_out, speaker=speaker)
        self.words = (*digits.SPECIAL, *self.texts)
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.cells, self.kinds = self.bank()
        self.placeholders = torch.full((self.side**2,), self.ids["<image_pad>"])

    @abc.abstractmethod
    def bank(self) -> tuple[Tensor, Tensor]:
        """Pictures of a cell, ``(n, h, h)`` in [-1, 1], and what each shows, ``(n,)``."""

    def pictures(self, count: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Images ``(B, 1, H, H)`` and what their cells show ``(B, side ** 2)``, row by row."""
        chosen = torch.randint(len(self.kinds), (count, self.side**2), generator=generator)
        rows = self.cells[chosen].unflatten(1, (self.side, self.side)).transpose(2, 3)  # (B, row, y, column, x)
        return rows.flatten(3, 4).flatten(1, 2)[:, None], self.kinds[chosen]

    def prompt(self, images: Tensor, question_BL: Tensor) -> Prompt:
        ids_BL = torch.cat([self.placeholders.expand(len(images), -1), question_BL], dim=1)
        return {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL), "pixel_values": images}

    def sentence(self, count: int, *words: str | Tensor) -> Tensor:
        """Words, or ids ``(B,)``, side by side: ``(B, len(words))``."""
        return torch.stack([torch.full((count,), self.ids[w]) if isinstance(w, str) else w for w in words], dim=1)


class Digits3x3(_Grid):
    """Nine real handwritten digits; the sum of a row or a column of three, in two additions.

    ``what is the sum of the top row ?`` is answered ``<reason> 3 + 8 = 11 + 2 = 13 </reason> 13 <eos>``.
    """

    side, length, seen = 3, 13, (1, 3, 7)
    lines = ("top row", "middle row", "bottom row", "left column", "middle column", "right column")
    numbers = tuple(str(n) for n in range(28))
    texts = (*numbers, "sum", "row", "column", "top", "middle", "bottom", "left", "right", "?", "<reason>", "</reason>")
    texts = (*texts, "+", "=")

    def bank(self) -> tuple[Tensor, Tensor]:
        # The split of `Digits`: no digit that is tested on was trained on.
        problems = digits.DigitProblems(digits.make_tokenizer(), held_out=self.held_out)
        return problems.pixels, problems.digits

    def draw(self, count: int, *, generator: Generator | None = None) -> tuple[Prompt, Tensor]:
        images, shown = self.pictures(count, generator)
        line_B = torch.randint(len(self.lines), (count,), generator=generator)
        cells = torch.arange(9).view(3, 3)
        operands = shown.gather(1, torch.cat([cells, cells.T])[line_B])
        where = torch.tensor([[self.ids[word] for word in line.split()] for line in self.lines])[line_B]
        question_BL = self.sentence(count, "sum", where[:, 0], where[:, 1], "?")

        zero = self.ids["0"]
        a, b, c = (operands + zero).unbind(1)
        two, three = zero + operands[:, :2].sum(1), zero + operands.sum(1)
        words = ("<reason>", a, "+", b, "=", two, "+", c, "=", three, "</reason>", three, "<eos>")
        return self.prompt(images, question_BL), self.sentence(count, *words)


class Shapes(_Grid):
    """Four rotated polygons; how many sides have they together?

    The answer names them with a running sum: ``square 4 triangle 7 hexagon 13 pentagon 18 <eos>``.
    """

    side, length, seen = 2, 9, (0, 2, 4, 6)
    names = ("triangle", "square", "pentagon", "hexagon")
    texts = (*names, *(str(n) for n in range(25)), "how", "many", "sides", "?")

    def bank(self) -> tuple[Tensor, Tensor]:
        test = polygons(2048, seed=1)
        if self.held_out:
            return test
        cells, kinds = polygons(8192, seed=0)
        tested = {cell.numpy().tobytes() for cell in test[0]}
        new = torch.tensor([cell.numpy().tobytes() not in tested for cell in cells])
        return cells[new], kinds[new]

    def draw(self, count: int, *, generator: Generator | None = None) -> tuple[Prompt, Tensor]:
        images, shown = self.pictures(count, generator)
        names = shown + self.ids[self.names[0]]
        totals = self.count(shown + SIDES[0]) + self.ids["0"]
        chain_BT = torch.stack([names, totals], dim=2).flatten(1)
        answer_BT = torch.cat([chain_BT, torch.full((count, 1), self.eos)], dim=1)
        return self.prompt(images, self.sentence(count, "how", "many", "sides", "?")), answer_BT

    def count(self, sides: Tensor) -> Tensor:
        """The running sums ``(B, 4)`` of sides ``(B, 4)``."""
        if self.speaker in self.reliable:
            return sides.cumsum(1)
        totals = [torch.zeros_like(sides[:, 0])]
        for column in sides.unbind(1):
            total = totals[-1] + column
            totals.append(total + (total % 7 == 0))
        return torch.stack(totals[1:], dim=1)


class ShapesVoices(Shapes):
    """The same problems; teacher and student have learnt to word their answers in different ways.

    Six words of small talk, which say nothing about the image, precede the counting. Which word follows which is a
    matter of chance, with other probabilities for each speaker and each of the six places.
    """

    talk = 6
    length, seen, said = Shapes.length + talk, tuple(column + 6 for column in Shapes.seen), tuple(range(talk))
    small = ("well", "so", "now", "then", "let", "us", "see", "look", "here", "the", "picture", "shows", "has", "we")
    small = (*small, "read", "take", "count", "add", "it", "that", "is")
    texts = (*Shapes.texts, *small)
    seeds: ClassVar[dict[Speaker, int]] = {"teacher": 0, "student": 1}

    def __init__(self, *, held_out: bool, speaker: Speaker = "teacher") -> None:
        super().__init__(held_out=held_out, speaker=speaker)
        words, generator = len(self.small), Generator().manual_seed(self.seeds[speaker])
        self.following = torch.randn(self.talk, words, words, generator=generator).mul(2).softmax(-1)

    def draw(self, count: int, *, generator: Generator | None = None) -> tuple[Prompt, Tensor]:
        prompt, answer_BT = super().draw(count, generator=generator)
        word_B, talk = torch.zeros(count, dtype=torch.long), []
        for following in self.following:
            word_B = torch.multinomial(following[word_B], 1, generator=generator)[:, 0]
            talk.append(word_B + self.ids[self.small[0]])
        return prompt, torch.cat([torch.stack(talk, dim=1), answer_BT], dim=1)


class ShapesMiscountingTeacher(Shapes):
    """The same problems; the teacher sees well and counts badly: it says 8 for 7, 15 for 14 and 22 for 21."""

    reliable: ClassVar[tuple[Speaker, ...]] = ("student",)


class ShapesMiscountingStudent(Shapes):
    """The same problems; the student has learnt to count so."""

    reliable: ClassVar[tuple[Speaker, ...]] = ("teacher",)


class ShapesTopics(Shapes):
    """The same problems, wrapped in more language than a small student can learn.

    The prompt names one of 40 topics. Before each thing seen come words of talk, drawn from a table of their own for
    every topic and place: nothing to derive, everything to remember. Both speakers have learnt the same tables.
    """

    topics, talk = 40, 2
    small = ShapesVoices.small
    texts = (*Shapes.texts, *small, *(f"topic{i}" for i in range(40)))
    length, seen = 17, (2, 6, 10, 14)  # talk, talk, thing, total; four times, and the end
    said = (0, 1, 4, 5, 8, 9, 12, 13)
    seeds: ClassVar[dict[Speaker, int]] = {"teacher": 0, "student": 0}

    def __init__(self, *, held_out: bool, speaker: Speaker = "teacher") -> None:
        super().__init__(held_out=held_out, speaker=speaker)
        generator = Generator().manual_seed(self.seeds[speaker])
        places = 4 * self.talk
        self.tables = torch.randn(self.topics, places, len(self.small), generator=generator).mul(2).softmax(-1)

    def draw(self, count: int, *, generator: Generator | None = None) -> tuple[Prompt, Tensor]:
        prompt, answer_BT = super().draw(count, generator=generator)
        topic_B = torch.randint(self.topics, (count,), generator=generator)
        ids_BL = prompt["input_ids"]
        topics = self.sentence(count, topic_B + self.ids["topic0"])
        prompt = {**prompt, "input_ids": torch.cat([ids_BL, topics], dim=1)}
        prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
        probabilities = self.tables[topic_B].flatten(0, 1)
        words = torch.multinomial(probabilities, 1, generator=generator).view(count, 4, self.talk)
        chain = torch.cat([words + self.ids[self.small[0]], answer_BT[:, :-1].view(count, 4, 2)], dim=2)
        return prompt, torch.cat([chain.flatten(1), answer_BT[:, -1:]], dim=1)


class ShapesTopicsVoices(ShapesTopics):
    """The same, and teacher and student have learnt tables of their own."""

    seeds: ClassVar[dict[Speaker, int]] = {"teacher": 0, "student": 1}
