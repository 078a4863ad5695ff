"""The two views of a prompt, with its image and without, followed by one response.

A batch is the dict of tensors that a transformers processor gives and its model takes. The text view is made from the
ids: what stands for an image goes, the text keeps its tokens, and so the view is the prompt as it would have been
written without an image. The response follows either view in the same columns, the last ``T``, however it was padded.

Dimensions: ``B`` prompts, ``L`` prompt tokens, ``T`` response tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_BEFORE = ("vision_start_token_id", "boi_token_id", "boi_token_index")
_AFTER = ("vision_end_token_id", "eoi_token_id", "eoi_token_index")
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_POSITIONS = ("position_ids", "rope_deltas", "cache_position")
# Every Gemma 3 tokenizer has one token for each run of 1 to 31 newlines.
_GEMMA3_NEWLINES = range(107, 138)


def image_ids(config: Any) -> set[int]:
    """The ids that ``config`` names as standing for images and videos: placeholders, and the tokens around them.

    Example:
        >>> from types import SimpleNamespace
        >>> from steer_optim.vlm.prompts import image_ids
        >>> sorted(image_ids(SimpleNamespace(image_token_id=7, vision_start_token_id=6, vision_end_token_id=8)))
        [6, 7, 8]
    """
    return _named(config, *_PLACEHOLDERS, *_BEFORE, *_AFTER)


def text_only(
    batch: Mapping[str, Tensor], config: Any, *, drop_ids: Collection[int] | None = None
) -> dict[str, Tensor]:
    """The same prompts without their images and videos.

    Placeholders go, and with them the tokens around an image and whatever stands between the two (the newlines
    between the tiles of Idefics3). Gemma 3's processor puts two newlines before and two after an image, which its
    tokenizer merges with those of the text: two are taken back on either side, the text's own stay. Rows are then
    compacted, on the side on which the batch was padded. Only ids, mask and token types are left.

    Text that a processor or a chat template writes about an image stays: the timestamps of a video, the
    sentence that introduces Gemma 3's crops, the newline after LLaVA's ``<image>``.

    Args:
        batch: ``input_ids`` (B, L) int64; ``attention_mask`` (B, L), all ones where it is missing; token types (B, L);
            anything else is left out. Prompts only: ``append_response`` comes after.
        config: the model's configuration, read for the ids of placeholders and of the tokens around them.
        drop_ids: further ids that only ever belong to an image. Needed where they are known to the
            tokenizer only, as with Idefics3, SmolVLM, and a LLaVA with a Pixtral tower; empty where there are none.

    Returns:
        A batch (B, L') of int64 ids, mask and token types. What is masked holds the id 0.

    Raises:
        ValueError: the config does not name the tokens of an image, or not those around it, and ``drop_ids`` is None;
            an image is not closed by any known token; nothing is left of a row.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from steer_optim.vlm.prompts import text_only
        >>> config = SimpleNamespace(image_token_id=7, vision_start_token_id=6, vision_end_token_id=8)
        >>> batch = {"input_ids": torch.tensor([[0, 0, 20, 21, 22], [20, 6, 7, 8, 21]])}
        >>> batch["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        >>> text_only(batch, config)["input_ids"]
        tensor([[20, 21, 22],
                [ 0, 20, 21]])
    """
    placeholders = _named(config, *_PLACEHOLDERS)
    around = _named(config, *_BEFORE, *_AFTER) | set(drop_ids or ())
    model_type = getattr(config, "model_type", type(config).__name__)
    if not placeholders | around or (drop_ids is None and not around and not _bare_images(config)):
        missing = "around an image" if placeholders else "of an image"
        raise ValueError(
            f"the config of {model_type!r} does not name the tokens {missing}: pass their ids, for instance "
            "drop_ids=tokenizer.convert_tokens_to_ids(['<fake_token_around_image>', '<global-img>', '<row_1_col_1>', "
            "...]), or drop_ids=() where placeholders are all there is"
        )
    ids_BL, real_BL = batch["input_ids"], _real(batch)
    image_BL, drop_BL = _isin(ids_BL, placeholders) & real_BL, _isin(ids_BL, placeholders | around) & real_BL
    if around:
        open_BL = _opened(image_BL, drop_BL)
        if (unclosed := open_BL[:, -1]).any():
            raise ValueError(
                f"the last image of row {_first(unclosed)} is not closed by any of the ids {sorted(around)}: the "
                "prompt was cut off, or drop_ids lacks the token after an image"
            )
        drop_BL = drop_BL | open_BL
    if model_type == "gemma3":
        ids_BL, drop_BL = _without_gemma3_newlines(ids_BL, drop_BL)
    keep_BL = real_BL & ~drop_BL
    if (empty := ~keep_BL.any(dim=1)).any():
        raise ValueError(f"nothing but images in row {_first(empty)}: a prompt needs some text to be a text-only view")
    left = bool(real_BL[:, -1].all())
    return _compact({**batch, "input_ids": ids_BL}, keep_BL, left=left)


def left_padded(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same prompts padded on the left, without position ids, which the model computes anew.

    Args:
        batch: prompts padded on either side; pixels and grids are passed on as they are.

    Returns:
        The batch, its rows ending in the last column. What is masked holds the id 0.

    Example:
        >>> import torch
        >>> from steer_optim.vlm.prompts import left_padded
        >>> batch = {"input_ids": torch.tensor([[5, 6], [7, 9]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
        >>> left_padded(batch)["input_ids"]
        tensor([[5, 6],
                [0, 7]])
    """
    kept = {name: value for name, value in batch.items() if name not in (*_PER_TOKEN, *_POSITIONS)}
    return {**_compact(batch, _real(batch), left=True), **kept}


def append_response(batch: Mapping[str, Tensor], response_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """The prompts of ``batch``, either view, each followed by its response in the last ``T`` columns.

    Right-padded prompts are padded on the left first, so that no padding stands between a prompt and its response.

    Args:
        batch: prompts, padded on either side.
        response_BT: (B, T) int64 response ids; those outside the mask are not read and become 0.
        mask_BT: (B, T) bool, True for the tokens of the response.

    Returns:
        A batch of L + T columns: ids, mask and token types extended, pixels as they were, no position ids.

    Raises:
        ValueError: the shapes do not fit each other.

    Example:
        >>> import torch
        >>> from steer_optim.vlm.prompts import append_response
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 0, 0]])}
        >>> batch["attention_mask"] = torch.tensor([[1, 1, 1], [1, 0, 0]])
        >>> response_BT, mask_BT = torch.tensor([[3, 4], [9, 1]]), torch.ones(2, 2, dtype=torch.bool)
        >>> append_response(batch, response_BT, mask_BT)["input_ids"]
        tensor([[5, 6, 7, 3, 4],
                [0, 0, 8, 9, 1]])
    """
    if response_BT.ndim != 2 or response_BT.shape != mask_BT.shape or len(response_BT) != len(batch["input_ids"]):
        raise ValueError(
            f"responses and their mask are (B, T) with B = {len(batch['input_ids'])} prompts; got "
            f"{tuple(response_BT.shape)} and {tuple(mask_BT.shape)}"
        )
    view = left_padded(batch)
    tail = {"input_ids": response_BT.masked_fill(~mask_BT, 0), "attention_mask": mask_BT}
    for name in view.keys() & _PER_TOKEN:
        tail_BT = tail.get(name, torch.zeros_like(response_BT))
        view[name] = torch.cat([view[name], tail_BT.to(view[name])], dim=1)
    return view


def check_responses(views: Mapping[str, Mapping[str, Tensor]], response_BT: Tensor, mask_BT: Tensor) -> None:
    """Checks that the last ``T`` columns of every view hold the same response; reads from the device.

    Args:
        views: batches by name, as ``append_response`` gives them.
        response_BT: (B, T) int64, the response that all of them should end in.
        mask_BT: (B, T) bool, its tokens.

    Raises:
        ValueError: a view, named in the message, ends in other labels or in another mask.

    Example:
        >>> import torch
        >>> from steer_optim.vlm.prompts import append_response, check_responses
        >>> response_BT, mask_BT = torch.tensor([[3, 4]]), torch.tensor([[True, True]])
        >>> view = append_response({"input_ids": torch.tensor([[5, 6]])}, response_BT, mask_BT)
        >>> check_responses({"student": view, "student_text": view}, response_BT, mask_BT)
    """
    B, T = response_BT.shape
    for name, view in views.items():
        shape = tuple(view["input_ids"].shape)
        if shape[0] != B or shape[1] <= T:
            raise ValueError(f"view {name!r} is {shape}: no {B} prompts with a response of {T} tokens each")
        start = shape[1] - T
        wrong = (view["input_ids"][:, start:] != response_BT) & mask_BT
        wrong |= _real(view)[:, start:] != mask_BT
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"view {name!r} does not end in the response: row {row} differs at token {column} of {T}; append "
                "the same response and mask to every view, after its images were taken out"
            )


def _named(config: Any, *names: str) -> set[int]:
    return {value for name in names if (value := getattr(config, name, None)) is not None}


def _bare_images(config: Any) -> bool:
    """Whether the processor writes placeholders and nothing around them: LLaVA, but for its Pixtral variant."""
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    return getattr(config, "model_type", None) == "llava" and tower != "pixtral"


def _real(batch: Mapping[str, Tensor]) -> Tensor:
    mask_BL = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask_BL is None else mask_BL.bool()


def _isin(ids_BL: Tensor, ids: set[int]) -> Tensor:
    return torch.isin(ids_BL, torch.tensor(sorted(ids), device=ids_BL.device))


def _first(rows_B: Tensor) -> int:
    return int(rows_B.nonzero()[0])


def _opened(image_BL: Tensor, drop_BL: Tensor) -> Tensor:
    """Where the last token of an image, up to here, is a placeholder: the token that closes it is still to come."""
    columns_BL = torch.arange(drop_BL.shape[1], device=drop_BL.device).expand_as(drop_BL)
    last_BL = columns_BL.where(drop_BL, -1).cummax(dim=1).values
    return (last_BL >= 0) & image_BL.gather(1, last_BL.clamp(min=0))


def _without_gemma3_newlines(ids_BL: Tensor, drop_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Takes two newlines from the token before an image and two from the one after it."""
    before_BL = nn.functional.pad(drop_BL[:, 1:], (0, 1))
    after_BL = nn.functional.pad(drop_BL[:, :-1], (1, 0))
    first = _GEMMA3_NEWLINES.start
    newlines_BL = (ids_BL - first + 1).where((ids_BL >= first) & (ids_BL < _GEMMA3_NEWLINES.stop) & ~drop_BL, 0)
    left_BL = (newlines_BL - 2 * before_BL.long() - 2 * after_BL.long()).clamp(min=0)
    return ids_BL.where(newlines_BL == 0, left_BL + first - 1), drop_BL | ((newlines_BL > 0) & (left_BL == 0))


def _compact(batch: Mapping[str, Tensor], keep_BL: Tensor, *, left: bool) -> dict[str, Tensor]:
    """The kept tokens of every row moved to one side, in their order; zeros, on the left or the right, elsewhere."""
    width = int(keep_BL.sum(dim=1).max())
    order_BL = keep_BL.long().argsort(dim=1, stable=True, descending=not left)
    order_BL = order_BL[:, order_BL.shape[1] - width :] if left else order_BL[:, :width]
    real_BL = keep_BL.gather(1, order_BL)
    compact = {name: batch[name].gather(1, order_BL) * real_BL for name in _PER_TOKEN if name in batch}
    return {**compact, "attention_mask": real_BL.to(batch.get("attention_mask", order_BL).dtype)}
