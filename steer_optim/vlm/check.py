"""Check that the two views of a prompt and their responses are correct for a model and its processor, of any family.

Dimensions: ``B`` prompts, ``T`` response tokens, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer_optim.vlm.families import family_of, image_ids
from steer_optim.vlm.forward import response_logits
from steer_optim.vlm.prompts import Prompts, Rollout, append_response, render, text_only, unpadded
from steer_optim.vlm.rollout import evaluating

_TOKENS = 8


@dataclass(frozen=True)
class ViewReport:
    """The result of :func:`check_views`; ``str`` gives it in words.

    Attributes:
        text_view: how the text view that ``text_only`` makes from ids differs from the correct, rendered one; empty if
            they are equal.
        future: the largest change of a logit when a later token of the response changes.
        generation: the largest difference between the logits of the appended response and those of ``generate``.
        scale: the largest logit.
    """

    text_view: str
    future: float
    generation: float
    scale: float

    def __str__(self) -> str:
        ids = self.text_view or "the text view from ids equals the one from messages"
        return (
            f"{ids}\na later token moves logits by at most {self.future:.1e}, and generate's logits differ by at most "
            f"{self.generation:.1e}; the largest logit is {self.scale:.1e}"
        )


@torch.no_grad()
def check_views(
    model: Any, processor: Any, messages: Sequence[Sequence[Mapping[str, Any]]] | None = None, **template_kwargs: Any
) -> ViewReport:
    """Check that views and responses are correct for a model and its processor. Run it once before training.

    A few prompts are rendered and the model answers them greedily. In both views

    1. a response token must not see its own future: changing a token must not change the logits before it;
    2. the logits of the appended response must equal those of ``generate``.

    The report also says where ``text_only``, which sees only ids, makes a different text view than the processor.

    Args:
        model: a transformers model with ``generate``. The checks are more sensitive in float32 than in half precision.
        processor: its processor, with a chat template.
        messages: conversations as in ``render``; by default two with an image and one without.
        template_kwargs: as in ``render``.

    Returns:
        The differences found, which are within the model's precision.

    Raises:
        ValueError: the processor cannot render the prompts, or the model's family is refused.
        RuntimeError: a check failed; the message names the check, the view and the difference.

    Example:
        >>> print(check_views(model, processor))  # doctest: +SKIP
        the text view from ids equals the one from messages
        a later token moves logits by at most 0.0e+00, and generate's logits differ by at most 3.8e-06; ...
    """
    from transformers.feature_extraction_utils import BatchFeature

    config, half = model.config, _TOKENS // 2
    views = render(processor, messages or _examples(mixed=family_of(config).mixed), **template_kwargs)
    never = torch.tensor(sorted(image_ids(config)), device=model.device)
    future = generation = scale = 0.0
    for name, view in (("image", views.image), ("text", views.text)):
        batch = dict(BatchFeature(view).to(model.device, model.dtype))
        with evaluating(model):
            said = model.generate(
                **batch,
                max_new_tokens=_TOKENS,
                do_sample=False,
                suppress_tokens=never.tolist() or None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            said_BTV, response_BT = torch.stack(said.logits, dim=1).float(), said.sequences[:, -_TOKENS:]
            changed_BT = response_BT.clone()
            changed_BT[:, half] = said_BTV[:, half].index_fill(-1, never, -torch.inf).topk(2).indices[:, 1]
            logits_BTV, changed_BTV = (
                response_logits(model, append_response(batch, Rollout(ids, ids >= 0), config), _TOKENS).float()
                for ids in (response_BT, changed_BT)
            )
        scale = max(scale, float(logits_BTV.abs().amax()))
        # A pass with a cache and one without may differ in half of the digits. Two passes without a cache are equal,
        # unless the model sorts tokens by expert.
        limit = float(torch.finfo(model.dtype).eps) ** 0.5 * scale
        moved = _largest(logits_BTV[:, : half + 1], changed_BTV[:, : half + 1])
        if not moved <= limit / 16:
            raise RuntimeError(
                f"the response sees its own future in the {name} view: logits of up to {scale:.3g} move by {moved:.2g} "
                "when a later token changes. The model reads a key of the batch that needs another value at response "
                "tokens: name it in per_token of the model's entry in families.FAMILIES"
            )
        differ = _largest(logits_BTV, said_BTV)
        if not differ <= limit:
            raise RuntimeError(
                f"logits of the appended response differ by {differ:.2g} from those of generate in the {name} view, at "
                f"logits of up to {scale:.3g}: the losses would be those of another policy, unless decoding "
                "steps of this model differ from its full pass by as much, as those of nemotron_h_omni do"
            )
        future, generation = max(future, moved), max(generation, differ)
    return ViewReport(_difference(views, config, processor), future, generation, scale)


def _examples(*, mixed: bool) -> list[list[dict[str, Any]]]:
    from PIL import Image

    image = {"type": "image", "image": Image.effect_noise((64, 48), 80).convert("RGB")}
    text, more = {"type": "text", "text": "What is this?"}, {"type": "text", "text": "What is in the middle, and why?"}
    contents = [[image, text], [more, image], [text]] if mixed else [[image, text], [more, image]]
    return [[{"role": "user", "content": content}] for content in contents]


def _largest(left: Tensor, right: Tensor) -> float:
    """Return the largest difference; infinities of the same sign are equal."""
    return float((left - right).where(left != right, 0.0).abs().max())


def _difference(views: Prompts, config: Any, processor: Any) -> str:
    """Describe the first difference between the text view from ids and the rendered one; empty if there is none."""
    try:
        from_ids = text_only(views.image, config, tokenizer=processor)
    except ValueError as error:
        return f"text_only makes no text view from ids ({error}); render does"
    rows = [unpadded(view["input_ids"], view["attention_mask"]) for view in (from_ids, views.text)]
    for number, (made, rendered) in enumerate(zip(*rows, strict=True)):
        if made != rendered:
            at = next((i for i, pair in enumerate(zip(made, rendered, strict=False)) if len(set(pair)) > 1), 0)
            texts = [processor.decode(ids[max(at - 4, 0) : at + 8]) for ids in (made, rendered)]
            return (
                f"prompt {number} without its images has {texts[0]!r} from ids and {texts[1]!r} from messages; the "
                "second is right"
            )
    return ""
