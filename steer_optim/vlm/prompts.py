"""The two views of a prompt, with its images and without, each followed by one response.

Given messages, the processor renders both views, and the text view is the prompt as written without images. Given only
a batch, the text view is made from its ids. The response follows either view in the last ``T`` columns, for any
padding.

Dimensions: ``B`` prompts, ``L`` prompt tokens, ``T`` response tokens.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steer_optim.vlm.families import family_of, per_token_keys, placeholder_ids, refuse, roles, type_of

_MEDIA = ("image", "image_url", "video", "video_url", "audio", "audio_url", "input_audio")
# The model recomputes position ids; a processor's labels belong to another objective.
_DROPPED = ("position_ids", "rope_deltas", "cache_position", "labels")
# An image in the roles of `families.roles`, with `t` for text: everything between its opening and its closing token,
# a part between two tokens `b`, with up to two newlines at its end, or placeholders up to their closing token.
_IMAGE = r"o[^oc]*c|b[^pobc]*p+[^pobc]{0,2}(?=b)|p+[^pobc]*c|[obc]"


class Prompts(NamedTuple):
    """Hold both views of the same ``B`` prompts, padded on the left.

    Attributes:
        image: the batch with images.
        text: the batch without images.
        blank: how many rows at the end are not prompts; see :func:`render`.

    Example: see :func:`render`.
    """

    image: dict[str, Any]
    text: dict[str, Any]
    blank: int = 0

    def to(self, device: torch.device | str) -> Prompts:
        """Return the same on a device."""
        image, text = (
            {key: x.to(device) if isinstance(x, Tensor) else x for key, x in view.items()}
            for view in (self.image, self.text)
        )
        return Prompts(image, text, self.blank)


class BadConversation(ValueError):
    """A conversation that cannot be rendered.

    Attributes:
        number: its index among those that :func:`render` was given.
    """

    def __init__(self, reason: str, number: int) -> None:
        super().__init__(reason)
        self.number = number


@dataclass(frozen=True)
class Rollout:
    """Hold the responses to ``B`` prompts.

    The model attends to all tokens of a response; tokens that it did not choose, such as a tool's answer, are not
    scored.

    Attributes:
        response_BT: int64 ids, padded on the right.
        mask_BT: bool, True for the tokens of a response, which the model attends to.
        scored_BT: bool, the part of ``mask_BT`` that the losses read; all of it by default.

    Raises:
        ValueError: the shapes differ; ``mask_BT`` of a response has a hole or begins late; a token is scored and not in
            ``mask_BT``.

    Example:
        >>> import torch
        >>> Rollout(torch.tensor([[3, 4, 0]]), torch.tensor([[True, True, False]])).scored_BT
        tensor([[ True,  True, False]])
    """

    response_BT: Tensor
    mask_BT: Tensor
    scored_BT: Tensor = None  # type: ignore[assignment]  # __post_init__ puts a tensor there, and readers rely on it

    def __post_init__(self) -> None:
        scored_BT = self.mask_BT if self.scored_BT is None else self.scored_BT
        for name, mask_BT in (("mask_BT", self.mask_BT), ("scored_BT", scored_BT)):
            object.__setattr__(self, name, mask_BT.bool())  # some samplers return integer masks
        shapes = [tuple(value.shape) for value in (self.response_BT, self.mask_BT, self.scored_BT)]
        if len(shapes[0]) != 2 or len(set(shapes)) > 1:
            raise ValueError(f"response_BT, mask_BT and scored_BT must have one shape (B, T); got {shapes}")
        if (late := ~self.mask_BT[:, :-1] & self.mask_BT[:, 1:]).any():
            raise ValueError(
                f"mask_BT of response {_first(late)} has a hole or begins late: it must hold all tokens of a response, "
                "from the first column on. Pass the tokens that the losses read as scored_BT"
            )
        if (unread := self.scored_BT & ~self.mask_BT).any():
            raise ValueError(f"response {_first(unread)} has scored tokens outside mask_BT: add them to mask_BT")

    def with_empty(self, rows: int) -> Rollout:
        """Return the same with ``rows`` empty responses added at the end, or removed from it if negative."""
        every = (self.response_BT, self.mask_BT, self.scored_BT)
        return Rollout(*(nn.functional.pad(x, (0, 0, 0, rows)) for x in every))

    @classmethod
    def of(
        cls,
        responses: Sequence[Sequence[int]],
        *,
        config: Any,
        scored: Sequence[Sequence[int | bool]] | None = None,
        device: torch.device | str | None = None,
    ) -> Rollout:
        """Return the responses of any sampler, given as lists of ids without padding.

        Args:
            responses: one list of ids, or tensor, for each of ``B`` prompts; end-of-sequence tokens included.
            config: the model's configuration, which names the placeholders of images.
            scored: a flag per token, false for tokens that the model did not choose; all true by default.
            device: of the result.

        Raises:
            ValueError: there are no responses, or they are not lists of integers; an id is outside the vocabulary;
                flags do not match their tokens; a response contains a placeholder, which the model would take for an
                image.

        Example:
            >>> from types import SimpleNamespace
            >>> config = SimpleNamespace(image_token_id=7)
            >>> Rollout.of([[3, 4, 5], [6]], config=config, scored=[[1, 0, 1], [1]]).scored_BT
            tensor([[ True, False,  True],
                    [ True, False, False]])
        """
        try:
            rows = [torch.as_tensor(row, device="cpu") for row in responses]
        except (TypeError, ValueError, RuntimeError):  # of texts, or None
            rows = [torch.zeros(())]
        if any(row.ndim != 1 or (len(row) and row.is_floating_point()) for row in rows):
            raise ValueError("responses must be one list of integer ids for each prompt, empty where it is empty")
        rows = [row.long() for row in rows]
        real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
        flags = real if scored is None else [torch.as_tensor(row, dtype=torch.bool, device="cpu") for row in scored]
        if not rows:
            raise ValueError("there are no responses: pass one list of ids per prompt, [] for an empty response")
        if (lengths := [len(row) for row in rows]) != (found := [len(row) for row in flags]):
            raise ValueError(f"scored must have one flag per token: responses have {lengths} tokens, scored {found}")
        ids_BT, mask_BT, scored_BT = (nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (rows, real, flags))
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if (outside_BT := (ids_BT < 0) | (ids_BT >= getattr(text, "vocab_size", math.inf))).any():
            row, column = outside_BT.nonzero()[0].tolist()
            raise ValueError(f"response {row} has the id {int(ids_BT[row, column])} at token {column}: no such token")
        _refuse_placeholders(ids_BT, mask_BT, config)
        return cls(ids_BT.to(device), mask_BT.to(device), scored_BT.to(device))


def render(
    processor: Any,
    messages: Sequence[Sequence[Mapping[str, Any]]],
    *,
    blank_image: bool = False,
    **template_kwargs: Any,
) -> Prompts:
    """Return both views of conversations, rendered by the processor's chat template.

    The text view is rendered from the messages without their images, videos and audio. This is exactly the prompt that
    the model would read without them, whereas ``text_only`` keeps the text that a template writes for an image.

    Args:
        processor: a transformers processor with a chat template.
        messages: one conversation per prompt, a list of messages such as
            ``{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Why?"}]}``;
            any number of images, of any size, also none.
        blank_image: whether to add a prompt with a blank image if no row has an image. Needed if FSDP2 shards the
            vision tower, which all processes must run to avoid a deadlock. ``rollout`` and ``score`` leave the row out
            of their results.
        template_kwargs: go to ``apply_chat_template``, ``processor_kwargs`` among them; ``add_generation_prompt`` is
            True by default.

    Returns:
        Two batches of ``B`` prompts, padded on the left.

    Raises:
        BadConversation: the processor cannot render a conversation, or it has no text; the error names its index.
        ValueError: there is no conversation; or ``template_kwargs`` ask for truncation, which cuts the two views at
            different words.

    Example:
        >>> prompts = render(processor, [[{"role": "user", "content": content}]])  # doctest: +SKIP
        >>> prompts.image.keys() - prompts.text.keys()  # doctest: +SKIP
        {'pixel_values'}
    """
    if not messages or any(isinstance(row, str | Mapping) for row in messages):
        raise ValueError("messages must be a list of conversations, each a list of messages with role and content")
    if _truncates(template_kwargs):
        raise ValueError(
            "truncation cuts the two views at different words, and the end of the prompt, where the response begins: "
            "leave out conversations that are too long instead"
        )
    parts = [part for row in messages for message in row for part in message.get("content") or ()]
    blank = int(blank_image and not any(map(_is_media, parts)))
    messages = [*messages, _blank()] if blank else messages
    messages = [[{**_known(message), "content": _known(message.get("content"))} for message in row] for row in messages]
    bare = [[{**message, "content": _without_media(message["content"])} for message in row] for row in messages]
    image = _rendered(processor, messages, "", template_kwargs)
    text = _rendered(processor, bare, " without its images; make the text view with text_only", template_kwargs)
    if (empty := ~text.get("attention_mask", torch.ones_like(text["input_ids"])).bool().any(dim=1)).any():
        number = _first(empty)
        raise BadConversation(f"conversation {number} has nothing but images: a text-only view needs some text", number)
    return Prompts(left_padded(image), left_padded(text), blank)


def text_only(
    batch: Mapping[str, Tensor], config: Any, *, tokenizer: Any = None, drop_ids: Collection[int] | None = None
) -> dict[str, Tensor]:
    """Return the same prompts without their images, videos and audio, for loops that have batches but no messages.

    Placeholders are removed, and the tokens around an image with everything between them. For processors like Gemma
    3's, the newlines that they add around an image are removed and those of the text stay. Rows are then compacted on
    the side on which the batch was padded. Only ids, mask and token types are kept.

    Text that a processor or a chat template writes for an image stays: the timestamps of a video, the sentence before
    Gemma 3's crops, the newline after LLaVA's ``<image>``. Tokens on either side of an image that the tokenizer would
    merge, such as two newlines, are merged for Gemma only. ``render`` has an exact text view for these.

    Args:
        batch: prompts only, before ``append_response``: ``input_ids`` (B, L) int64; ``attention_mask`` (B, L), all ones
            if missing; token types (B, L). Other keys are left out.
        config: the model's configuration, read for the ids of placeholders and of the tokens around them.
        tokenizer: the tokenizer or processor, for families whose config does not name the tokens around an image.
        drop_ids: further ids that occur only in images; empty if there are only placeholders.

    Returns:
        A batch (B, L') of int64 ids, mask and token types. Padding has the id 0.

    Raises:
        ValueError: the tokens of an image, or those around it, are unknown; an image is not closed by any known token;
            a row has no text.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(image_token_id=7, vision_start_token_id=6, vision_end_token_id=8)
        >>> batch = {"input_ids": torch.tensor([[0, 0, 20, 21, 22], [20, 6, 7, 8, 21]])}
        >>> batch["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        >>> text_only(batch, config)["input_ids"]
        tensor([[20, 21, 22],
                [ 0, 20, 21]])
    """
    family, role_of = family_of(config), roles(config, tokenizer)
    role_of |= {token: "c" for token in drop_ids or () if token not in role_of}
    known = drop_ids is not None or family.bare or {"b", "c"} & set(role_of.values())
    if not role_of or not known or (family.tokens and tokenizer is None and drop_ids is None):
        missing = "of an image" if not role_of else " ".join(family.tokens) or "around an image"
        raise ValueError(
            f"the config of {type_of(config)!r} does not name the tokens {missing}: pass tokenizer=, or their ids as "
            "drop_ids=tokenizer.convert_tokens_to_ids([...]), or drop_ids=() if there are only placeholders"
        )
    bare = family.bare or (drop_ids is not None and not drop_ids)
    ids_BL, real_BL = batch["input_ids"], _real(batch)
    image = re.compile(f"{_IMAGE}|p" if bare else _IMAGE)
    rows = ["".join(role_of.get(token, "t") for token in row) for row in ids_BL.where(real_BL, -1).tolist()]
    rows = [image.sub(lambda match: "-" * len(match[0]), row) for row in rows]
    if unclosed := [number for number, row in enumerate(rows) if "p" in row]:
        raise ValueError(
            f"an image of row {unclosed[0]} is not closed by any known token: do not truncate prompts inside an image; "
            "if the token after an image is unknown, pass tokenizer= or drop_ids="
        )
    drop_BL = torch.tensor([[letter == "-" for letter in row] for row in rows], device=ids_BL.device)
    if family.newlines:
        ids_BL, drop_BL = _without_newlines(ids_BL, drop_BL, family.newlines)
    keep_BL = real_BL & ~drop_BL
    if (empty := ~keep_BL.any(dim=1)).any():
        raise ValueError(f"row {_first(empty)} holds images only: add text to the prompt, or it has no text view")
    types = {key for key in batch.keys() & per_token_keys() if family.per_token.get(key, 0) is not None}
    view = {key: batch[key] for key in batch.keys() & {"attention_mask", *types}}
    return _compact({**view, "input_ids": ids_BL}, keep_BL, left=bool(real_BL[:, -1].all()))


def left_padded(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same prompts padded on the left, without labels and position ids, which the model recomputes.

    Args:
        batch: prompts padded on either side; pixels and grids are passed on unchanged.

    Returns:
        The batch, with rows that end in the last column. Padding has the id 0.

    Raises:
        ValueError: an unknown key holds one value per token; shapes differ; the mask holds other numbers than 0 and 1;
            a prompt has no tokens.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.tensor([[5, 6], [7, 9]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
        >>> left_padded(batch)["input_ids"]
        tensor([[5, 6],
                [0, 7]])
    """
    shape = batch["input_ids"].shape
    moved = {key: batch[key] for key in batch.keys() & {"input_ids", "attention_mask", *per_token_keys()}}
    kept = {key: value for key, value in batch.items() if key not in moved and key not in _DROPPED}
    for key, value in kept.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            raise ValueError(
                f"{key!r} has the shape {tuple(value.shape)}, a value for each of {tuple(shape)} tokens, but its value "
                "at response tokens is unknown: leave it out of the batch, or name it in per_token of the model's "
                "entry in families.FAMILIES"
            )
    return {**_compact(moved, _real(batch), left=True), **kept}


def append_response(batch: Mapping[str, Tensor], responses: Rollout, config: Any) -> dict[str, Tensor]:
    """Return the prompts of ``batch``, either view, each followed by its response in the last ``T`` columns.

    Right-padded prompts are padded on the left first, so that there is no padding between a prompt and its response.

    Args:
        batch: prompts, padded on either side.
        responses: all of ``mask_BT`` is attended to, scored or not.
        config: the model's configuration: the token types of a response depend on the family.

    Returns:
        A batch of L + T columns: ids, mask and other keys per token are extended, pixels are unchanged, position ids
        are left out. Ids outside ``mask_BT`` are 0.

    Raises:
        ValueError: the numbers of responses and prompts differ; a response contains a placeholder; there are
            placeholders in the prompts but no pixels; the model's family is refused; as in ``left_padded``.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(image_token_id=2)
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]])}
        >>> batch["attention_mask"] = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> append_response(batch, Rollout.of([[3, 4], [9, 1]], config=config), config)["input_ids"]
        tensor([[5, 6, 7, 3, 4],
                [0, 0, 8, 9, 1]])
    """
    refuse(config, batch)
    if (found := len(responses.response_BT)) != (prompts := len(batch["input_ids"])):
        raise ValueError(f"there are {found} responses to {prompts} prompts: pass one response per prompt")
    _refuse_placeholders(responses.response_BT, responses.mask_BT, config)
    view, per_token, T = left_padded(batch), family_of(config).per_token, responses.response_BT.shape[1]
    tail = {"input_ids": responses.response_BT.where(responses.mask_BT, 0), "attention_mask": responses.mask_BT}
    for key in view.keys() & {*tail, *per_token_keys()}:
        last = view[key][:, -1:].expand(-1, T, *view[key].shape[2:])
        fill = per_token.get(key, 0)
        columns = tail.get(key, last if fill is None else torch.full_like(last, fill))
        view[key] = torch.cat([view[key], columns.to(view[key])], dim=1)
    return view


def _refuse_placeholders(ids_BT: Tensor, mask_BT: Tensor, config: Any) -> None:
    placeholders = torch.tensor(sorted(placeholder_ids(config)), dtype=ids_BT.dtype, device=ids_BT.device)
    if (images_BT := torch.isin(ids_BT, placeholders) & mask_BT).any():
        row, column = images_BT.nonzero()[0].tolist()
        raise ValueError(
            f"response {row} has the placeholder {int(ids_BT[row, column])} at token {column}, which the model would "
            "take for an image: suppress families.image_ids(config) in the sampler, or drop the row"
        )


def _blank() -> list[dict[str, Any]]:
    from PIL import Image

    picture = {"type": "image", "image": Image.new("RGB", (64, 64))}
    return [{"role": "user", "content": [picture, {"type": "text", "text": "?"}]}]


def _known(x: Any) -> Any:
    """Return a message or part, or a list of them, without keys of value None, which Arrow stores in all of them."""
    if isinstance(x, Mapping):
        return {key: value for key, value in x.items() if value is not None}
    return [_known(part) for part in x] if isinstance(x, list | tuple) else x


def _without_media(content: Any) -> Any:
    return content if isinstance(content, str | None) else [part for part in content if not _is_media(part)]


def _is_media(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in _MEDIA


def _truncates(options: Mapping[str, Any]) -> bool:
    given = options.get("truncation", False)
    nested = [value for value in options.values() if isinstance(value, Mapping)]
    return given not in (False, None, "do_not_truncate") or any(map(_truncates, nested))


def _rendered(processor: Any, messages: Sequence[Any], hint: str, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    apply, given = processor.apply_chat_template, dict(template_kwargs)
    padded = {"padding": True, **given.pop("processor_kwargs", {})}
    # Older versions of transformers take the processor's options among the template's.
    new = "processor_kwargs" in inspect.signature(apply).parameters
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    options |= {"processor_kwargs": padded} if new else padded
    options |= given
    try:
        return dict(apply(list(messages), **options))
    except Exception:
        for number, row in enumerate(messages):
            try:
                apply([row], **options)
            except Exception as error:  # noqa: PERF203
                reason = f"the processor cannot render conversation {number}{hint}: {error}"
                raise BadConversation(reason, number) from error
        raise


def unpadded(x_BL: Tensor, real_BL: Tensor) -> list[list[int]]:
    """Return the values of each row where the mask is True."""
    return [row[real].tolist() for row, real in zip(x_BL, real_BL.bool(), strict=True)]


def _real(batch: Mapping[str, Tensor]) -> Tensor:
    """Return where the tokens are, after checking that prompts, mask and other keys per token are (B, L)."""
    ids_BL = batch["input_ids"]
    shapes = {k: tuple(batch[k].shape) for k in ("input_ids", "attention_mask", *per_token_keys()) if k in batch}
    if ids_BL.ndim != 2 or any(shape[:2] != ids_BL.shape for shape in shapes.values()):
        raise ValueError(f"input_ids must be (B, L), and the other keys have a value for each token; got {shapes}")
    mask_BL = batch.get("attention_mask", torch.ones_like(ids_BL))
    real_BL = mask_BL.bool()
    if mask_BL.ndim != 2 or (real_BL != mask_BL).any():
        raise ValueError("attention_mask must be (B, L), 1 at the tokens of a prompt and 0 at its padding")
    if (empty := ~real_BL.any(dim=1)).any():
        raise ValueError(f"prompt {_first(empty)} has no tokens: leave it out, with its response")
    return real_BL


def _first(where: Tensor) -> int:
    """Return the first index along the first dimension."""
    return int(where.nonzero()[0, 0])


def _without_newlines(ids_BL: Tensor, drop_BL: Tensor, newlines: range) -> tuple[Tensor, Tensor]:
    """Remove two newlines on either side of an image; those of the text on both sides become one token again."""
    ids, drop = ids_BL.tolist(), drop_BL.tolist()
    for row, dropped in zip(ids, drop, strict=True):
        image, last = [*dropped, False], -1  # the last token that stays
        for i, token in enumerate(row):
            if image[i]:
                continue
            if token in newlines:
                left = token - newlines.start + 1 - 2 * image[i - 1] - 2 * image[i + 1]
                merges = last >= 0 and image[i - 1] and row[last] in newlines and left > 0
                if merges and row[last] + left < newlines.stop:
                    row[last] += left
                    left = 0
                dropped[i] = left <= 0
                if dropped[i]:
                    continue
                row[i] = newlines.start + left - 1
            last = i
    return ids_BL.new_tensor(ids), drop_BL.new_tensor(drop)


def _compact(batch: Mapping[str, Tensor], keep_BL: Tensor, *, left: bool) -> dict[str, Tensor]:
    """Move the kept tokens of every row to one side, in order, and pad with zeros."""
    width = int(keep_BL.sum(dim=1).max())
    order_BL = keep_BL.long().argsort(dim=1, stable=True, descending=not left)
    order_BL = order_BL[:, order_BL.shape[1] - width :] if left else order_BL[:, :width]
    real_BL = keep_BL.gather(1, order_BL)
    rows_B1 = torch.arange(len(keep_BL), device=keep_BL.device)[:, None]
    compact = {key: value[rows_B1, order_BL] for key, value in batch.items()}
    for value in compact.values():
        value[~real_BL] = 0
    return {**compact, "attention_mask": real_BL.to(batch.get("attention_mask", order_BL).dtype)}
