"""The task: questions about four real handwritten digits, answered with a short chain of thought.

Four 8x8 digits of scikit-learn's set stand in a 2x2 grid, one image of 16x16 pixels. A question asks for the sum or the
maximum of a row or a column, and the answer names what was seen before it concludes::

    <image> what is the sum of the top row ?
    <reason> 3 + 8 = 11 </reason> 11

The two operands need the eye, the rest is language: without the image the best guess is right about one time in seven,
and names both operands one time in a hundred. All questions are equally long and so are all answers. Training and
held-out problems share no handwritten digit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL.Image import fromarray
from sklearn.datasets import load_digits
from torch import Generator

LINES = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}
OPERATIONS = {"sum": "+", "maximum": "max"}
NUMBERS = tuple(str(n) for n in range(19))
QUESTION = ("what", "is", "the", "of", "row", "column", "top", "bottom", "left", "right", *OPERATIONS, "?")
WORDS = (*NUMBERS, *QUESTION, "<reason>", "</reason>", "=", *OPERATIONS.values())
ANSWER_LENGTH = 9  # tokens, with the one that ends it

FEATURES = Features(
    messages=List({"role": Value("string"), "content": Value("string")}),
    images=List(Image()),
    answer=Value("string"),
)


def digits_of(*, held_out: bool) -> tuple[Any, Any]:
    """Pictures ``(n, 8, 8)`` with values from 0 to 16, and what they show: a fifth of all, or the rest."""
    data = load_digits()
    # The split does not depend on the run's seed: no run may train on what another one was tested on.
    order = torch.randperm(len(data.target), generator=Generator().manual_seed(0)).numpy()
    fifth = len(order) // 5
    chosen = order[:fifth] if held_out else order[fifth:]
    return data.images[chosen], data.target[chosen]


def make_dataset(count: int, *, held_out: bool, seed: int) -> Dataset:
    """``count`` problems, uniform over digits, operations and lines."""
    pictures, labels = digits_of(held_out=held_out)
    generator = Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (count, 4), generator=generator).numpy()
    kinds = torch.randint(len(OPERATIONS) * len(LINES), (count,), generator=generator).tolist()
    operations, lines, rows = list(OPERATIONS), list(LINES), []
    for four, kind in zip(chosen, kinds, strict=True):
        operation, line = operations[kind % len(operations)], lines[kind // len(operations)]
        first, second = (int(labels[four[cell]]) for cell in LINES[line])
        result = first + second if operation == "sum" else max(first, second)
        grid = pictures[four].reshape(2, 2, 8, 8).swapaxes(1, 2).reshape(16, 16) * 255 / 16
        rows.append(
            {
                "messages": [{"role": "user", "content": f"what is the {operation} of the {line} ?"}],
                "images": [fromarray(grid.round().astype("uint8")).convert("RGB")],
                "answer": f"<reason> {first} {OPERATIONS[operation]} {second} = {result} </reason> {result}",
            }
        )
    return Dataset.from_list(rows, features=FEATURES)


def write_data(path: Path, *, train: int, test: int, seed: int) -> None:
    """The data set as ``datasets.load_dataset(path)`` reads it."""
    path.mkdir(parents=True, exist_ok=True)
    make_dataset(train, held_out=False, seed=seed).to_parquet(path / "train-00000-of-00001.parquet")
    make_dataset(test, held_out=True, seed=0).to_parquet(path / "test-00000-of-00001.parquet")


def grade(responses: list[str], answers: list[str]) -> tuple[float, float]:
    """Answer accuracy and perception accuracy, both in [0, 1].

    Args:
        responses: what a model wrote, without special tokens.
        answers: the right answers.

    Returns:
        The share of responses that close the chain of thought with the right answer and end there, and the share whose
        chain of thought opens with the two digits of the image and the operation that was asked for.
    """
    pairs = [(r.split(), answer.split()) for r, answer in zip(responses, answers, strict=True)]
    right = [response[-2:] == answer[-2:] and response.count("</reason>") == 1 for response, answer in pairs]
    seen = [response[:4] == answer[:4] for response, answer in pairs]
    return sum(right) / len(pairs), sum(seen) / len(pairs)
