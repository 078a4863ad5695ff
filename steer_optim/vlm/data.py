"""Rows of a data set as conversations, in the form that :func:`~steer_optim.vlm.prompts.render` takes.

A row has ``messages``, or a ``prompt`` that is a conversation or a string. Its images are in ``images`` (any number),
in ``image`` (one or none) or in the messages themselves, each a PIL image, bytes, a path, a URL, or the dictionary of
bytes and path that Arrow stores. ``answer`` may hold the right answer; by default it is the assistant's last message.
Other columns are ignored.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from string import punctuation
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import torch
from datasets import IterableDataset
from datasets.utils.file_utils import xopen

ROW = "steer_optim_row"
"""The column with the number of a row, which errors name."""

_ROOT = "steer_optim_root"  # the column with the folder that paths are relative to


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Number the rows of a map-style data set, so that an error can name them.

    Args:
        dataset: of the ``datasets`` library or any other kind, or a list of rows.
        root: the folder that paths of images are relative to, if they do not exist as they are.

    Example:
        >>> rows = Rows([{"prompt": "What is it?", "answer": "a cat"}])
        >>> len(rows), rows[0][ROW], conversation(rows[0])
        (1, 0, [{'role': 'user', 'content': [{'type': 'text', 'text': 'What is it?'}]}])
    """

    def __init__(self, dataset: Any, root: str | Path = ".") -> None:
        self.dataset, self.root = dataset, str(root)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return {_ROOT: self.root, **self.dataset[number], ROW: number}  # numbered rows keep their folder
        except IndexError:
            raise
        except Exception as error:  # of an image, which is decoded here
            raise ValueError(f"row {number} of the data set: {error}") from error


def numbered(dataset: Any, root: str | Path = ".") -> Any:
    """Return a data set with numbered rows.

    Args:
        dataset: of any kind that TRL takes, or a dictionary of data sets.
        root: as in :class:`Rows`.

    Raises:
        ValueError: ``dataset`` is None.

    Example:
        >>> [row[ROW] for row in numbered([{"prompt": "What is it?"}, {"prompt": "Why?"}])]
        [0, 1]
    """
    if dataset is None:
        raise ValueError("train_dataset is needed: rows with messages, or prompt, and images")
    if isinstance(dataset, dict):
        return {name: numbered(part, root) for name, part in dataset.items()}
    if isinstance(dataset, Rows) or isinstance(getattr(dataset, "dataset", None), Rows):  # a Subset of them
        return dataset
    if not isinstance(dataset, IterableDataset):
        return Rows(dataset, root)
    # Images are decoded in `picture`, where an error can name the row, but for a mode that the user chose.
    modes = [repr((dataset.features or {}).get(column)) for column in ("image", "images")]
    dataset = dataset.decode(False) if dataset.features and "mode='" not in "".join(modes) else dataset
    return dataset.map(lambda row, number: {_ROOT: str(root), **row, ROW: number}, with_indices=True)


def conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the prompt of a row: its messages up to the assistant's last answer, with its images in their places.

    Images that no message places stand before the text of the first user message.

    Args:
        row: as in the header of this module.

    Raises:
        ValueError: the row has no prompt; the numbers of images and places for them differ; an image cannot be read.
            The error names the row.

    Example: see :class:`Rows`.
    """
    from trl.data_utils import prepare_multimodal_messages

    root = Path(row.get(_ROOT, "."))
    try:
        messages = _messages(row)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError("there is no user message")
        images = _plain(row.get("images"))
        if images is None or (isinstance(images, Sequence) and not images):
            images = _plain(row.get("image"))
        elif row.get("image") is not None:
            raise ValueError("it has images in both columns, images and image: keep one")
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        images = [picture(image, root) for image in images]
        for message in messages:
            content = message.get("content") or ()
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            message["content"] = [_part(part, root) for part in parts]
        parts = [part for message in messages for part in message["content"]]
        if all(part["type"] == "text" for part in parts):
            tag, asked = "<image>", [message for message in messages if message["role"] == "user"]
            texts = [part["text"].strip() for message in asked for part in message["content"]]
            # Without images it may be a word of the text.
            if any(tag in x if images else x.startswith(tag) or x.endswith(tag) for x in texts):
                raise ValueError(
                    f"its text has the tag {tag}: put a part of the type image in its place (the row has {len(images)} "
                    "images, in the columns images or image)"
                )
            first["content"] = [{"type": "image"}] * len(images) + first["content"]
        prepared: list[dict[str, Any]] = prepare_multimodal_messages(messages, images)
        return prepared
    except Exception as error:
        raise ValueError(f"row {row.get(ROW, '?')} of the data set: {error}") from error


def answer(row: Mapping[str, Any]) -> str | None:
    """Return the right answer of a row: its ``answer``, else the assistant's last message; None without either.

    Args:
        row: as in the header of this module.

    Raises:
        ValueError: the answer is neither text nor a number.

    Example:
        >>> answer({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a cat"}]})
        'a cat'
    """
    given = row.get("answer")
    if isinstance(given, float):  # pandas makes floats of a column of numbers with gaps, which are NaN
        given = None if math.isnan(given) else int(given) if given.is_integer() else given
    if given is not None:
        if not isinstance(given, (str, int, float)):
            raise ValueError(
                f"row {row.get(ROW, '?')} of the data set: the answer must be text, but was read as "
                f"{type(given).__name__}: {given!r}. Store it as text (parquet keeps text that looks like a date)"
            )
        return str(given)
    last = _messages(row)[-1]
    if last["role"] != "assistant":
        return None
    content = last.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content) or None


def picture(image: Any, root: Path = Path()) -> Any:
    """Return an image as PIL, RGB.

    Args:
        image: PIL, bytes, a path, a URL, or a dictionary of bytes, path or url.
        root: the folder that a path may be relative to.

    Raises:
        ValueError: there is no such file, the mode of the image has no known range, or it is no image.

    Example:
        >>> from PIL import Image
        >>> picture(Image.new("L", (4, 2))).mode
        'RGB'
    """
    from PIL import Image
    from transformers.image_utils import load_image

    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path") or image.get("url")
    if isinstance(image, str):
        image = image.removeprefix("file://")
    url = str(image) if isinstance(image, (str, Path)) else ""
    if url.startswith(("http://", "https://", "data:")):
        request = Request(quote(url, safe=punctuation), headers={"User-Agent": "steer_optim"})
        with urlopen(request, timeout=60) as file:
            image = file.read()
    elif "://" in url:  # in an archive or a store that is streamed
        with xopen(url, "rb") as file:
            image = file.read()
    elif isinstance(image, (str, Path)):
        found = [path for path in (Path(image), root / image) if os.path.isfile(path)]
        if not found:
            raise ValueError(
                f"there is no image {url:.100}, as it is or in {root.absolute()}. Base64 text needs "
                "data:image/png;base64, before it"
            )
        image = found[0].read_bytes()
    if isinstance(image, bytes):
        image = Image.open(BytesIO(image))
    if not isinstance(image, Image.Image):
        raise ValueError(f"an image must be PIL, bytes, a path or a URL; got {type(image).__name__}")
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.mode in ("I", "F"):
        raise ValueError(f"an image of mode {image.mode} has no known range: convert it to 8 or 16 bits")
    return load_image(image)


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages, prompt = (_plain(row.get(name)) for name in ("messages", "prompt"))
    given = messages or prompt
    if isinstance(messages, str):
        raise ValueError("its messages are text, not a list: decode them, or name the column of texts prompt")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, Sequence) or not all(isinstance(m, Mapping) and m.get("role") for m in given) or not given:
        raise ValueError(
            "it needs a column messages, or prompt, with a list of messages that have role and content; it has the "
            f"columns {', '.join(sorted(row.keys() - {ROW, _ROOT}))}"
        )
    # Arrow stores every key of any message in all of them.
    return [{key: value for key, value in message.items() if value is not None} for message in given]


def _part(part: Any, root: Path) -> dict[str, Any]:
    if not isinstance(part, Mapping) or part.get("type") is None:
        raise ValueError(f"content must be a string, or a list of parts that have a type; got the part {part!r}")
    known: dict[str, Any] = {key: value for key, value in part.items() if value is not None}
    found = [known.pop(key) for key in ("image", "path", "url", "image_url") if key in known]
    found = [image for image in found if not isinstance(image, str) or image]
    if known["type"] not in ("text", "image", "image_url"):
        raise ValueError(f"a part must be of the type text or image; got {part['type']!r}")
    if known["type"] == "text":
        if known.keys() == {"type"}:
            known["text"] = ""
        if found or not isinstance(known.get("text"), str):
            raise ValueError(f"a part of the type text must have text, and no image; got {part!r:.200}")
        return known
    return {"type": "image", "image": picture(found[0], root)} if found else known


def _plain(value: Any) -> Any:
    """Return the lists of Python for arrays, in which pandas and numpy keep messages and images."""
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list) or getattr(getattr(value, "dtype", None), "kind", "") == "O":
        return [_plain(x) for x in value]
    return value
