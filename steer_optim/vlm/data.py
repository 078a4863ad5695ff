"""Rows of a data set as conversations, in the form that :func:`~steer_optim.vlm.prompts.render` takes.

A row has ``messages``, or a ``prompt`` that is a conversation or a string. Its images are in ``images`` (any number),
in ``image`` (one or none) or in the messages themselves, each a PIL image, bytes, a path, a URL, or the dictionary of
bytes and path that Arrow stores. A right answer may stand in ``answer``; without it, what the assistant says last is
the answer. Other columns are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

ROW = "row"
"""The column with the number of a row, which errors name."""


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """A data set whose images are read when a row becomes a conversation, so that an error can name the row.

    Args:
        dataset: a map-style data set, of the ``datasets`` library or any other, or a list of rows.

    Example:
        >>> rows = Rows([{"prompt": "What is it?", "answer": "a cat"}])
        >>> len(rows), rows[0][ROW], conversation(rows[0])
        (1, 0, [{'role': 'user', 'content': [{'type': 'text', 'text': 'What is it?'}]}])
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset.with_format("arrow") if hasattr(dataset, "with_format") else dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.dataset[number]
        row = row.to_pylist()[0] if hasattr(row, "to_pylist") else row
        return {**row, ROW: row.get(ROW, number)}


def numbered(dataset: Any) -> Any:
    """Return a data set whose rows know their number, of any kind that TRL takes.

    Example:
        >>> [row[ROW] for row in numbered([{"prompt": "What is it?"}, {"prompt": "Why?"}])]
        [0, 1]
    """
    if isinstance(dataset, Rows):
        return dataset
    if hasattr(dataset, "__len__"):
        return Rows(dataset)
    if dataset.features is not None:
        dataset = dataset.decode(False)
    return dataset.map(lambda row, number: {**row, ROW: number}, with_indices=True)


def conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the prompt of a row: its messages up to the assistant's last answer, with its images in their places.

    Images that no message places stand before the text of the first user message.

    Raises:
        ValueError: the row has no prompt; the numbers of images and places for them differ; an image cannot be read.
            The message names the row.
    """
    from trl.data_utils import prepare_multimodal_messages

    try:
        messages = _messages(row)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not any(message["role"] == "user" for message in messages):
            raise ValueError("there is no user message")
        images = row.get("images")
        if images is None:
            images = [] if row.get("image") is None else [row["image"]]
        images = [picture(image) for image in images]
        for message in messages:
            if not isinstance(message.get("content"), str):
                message["content"] = [_part(part) for part in message.get("content") or ()]
        prepared: list[dict[str, Any]] = prepare_multimodal_messages(messages, images)
        return prepared
    except Exception as error:
        raise ValueError(f"row {row.get(ROW, '?')} of the data set: {error}") from error


def answer(row: Mapping[str, Any]) -> str | None:
    """Return the right answer of a row: its ``answer``, else what the assistant says last; None without either.

    Example:
        >>> answer({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a cat"}]})
        'a cat'
    """
    if row.get("answer") is not None:
        return str(row["answer"])
    last = _messages(row)[-1]
    if last["role"] != "assistant":
        return None
    content = last["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def picture(image: Any) -> Any:
    """Return an image as PIL, RGB: from PIL, bytes, a path, a URL, or a dictionary of bytes or path."""
    from PIL import Image
    from transformers.image_utils import load_image

    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        image = Image.open(BytesIO(image))
    return load_image(str(image) if isinstance(image, Path) else image)


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = row.get("messages") or row.get("prompt")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, Sequence) or not all(isinstance(m, Mapping) and m.get("role") for m in given) or not given:
        raise ValueError(
            "it needs a column messages, or prompt, with a list of messages that have role and content; it has the "
            f"columns {', '.join(sorted(row.keys() - {ROW}))}"
        )
    # Arrow stores every key of any message in all of them.
    return [{key: value for key, value in message.items() if value is not None} for message in given]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    part = {key: value for key, value in part.items() if value is not None}
    found = [part.pop(key) for key in ("image", "path", "url") if key in part]
    if part["type"] in ("image", "image_url") and found:
        return {"type": "image", "image": picture(found[0])}
    return part
