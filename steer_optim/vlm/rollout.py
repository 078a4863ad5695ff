"""On-policy responses: samples of the student for a prompt with its image.

Samples follow the model's distribution. Penalties, cut-offs and temperatures from a checkpoint's generation config are
ignored, because a loss on these responses is an expectation under the policy.

Dimensions: ``B`` prompts, ``T`` response tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from steer_optim.vlm.families import flat, image_ids, refuse
from steer_optim.vlm.forward import in_evaluation, overridden
from steer_optim.vlm.prompts import Prompts, Rollout, left_padded


def rollout(
    model: Any,
    prompts: Prompts | Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    suppress_ids: int | Collection[int] = (),
    eos_ids: int | Collection[int] | None = None,
    pad_id: int | None = None,
) -> Rollout:
    """Sample one response to each prompt, in evaluation mode and without gradients.

    A model sharded by ``fully_shard`` works as it is, if all of its processes sample at the same time.

    Ids for images and videos are never sampled, nor is padding: a response with a placeholder could not be fed back.
    The samples therefore follow the policy renormalised over the other ids, which the losses do not account for; the
    excluded mass is negligible for a trained model. The same holds for ``suppress_ids``. With ``temperature`` or
    ``top_p`` other than 1 the samples are no longer on-policy.

    Args:
        model: a transformers model with ``generate``.
        prompts: both views (the one with images is answered); or a batch, padded on either side, with or without
            images.
        max_new_tokens: the longest response; ``T`` is smaller if all responses end earlier.
        temperature: divides the logits; 0 takes the most likely token, for evaluation.
        top_p: samples from the smallest set of tokens with this probability; 1 is all of them.
        suppress_ids: further ids that are never sampled: the ``drop_ids`` of ``text_only``, ids without a token.
        eos_ids: ids that end a response. Default: those of the model's generation config.
        pad_id: fills the columns after a response. Default: that of the generation config, else an end id.

    Returns:
        The responses, ``T`` ≤ ``max_new_tokens`` columns. A truncated response has no end-of-sequence token.

    Raises:
        ValueError: a number is out of range; the model's family is refused; as in ``left_padded``.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
        >>> responses = rollout(model, batch, max_new_tokens=4, suppress_ids=[2])  # 2 ends a response
        >>> responses.response_BT.shape, responses.mask_BT.all()
        (torch.Size([2, 4]), tensor(True))

    References:
        The method samples responses with temperature 1 and top-p 1 (arXiv 2606.00564, Sec. 3).
    """
    if max_new_tokens < 1 or not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(
            "a rollout needs max_new_tokens >= 1, temperature >= 0 and 0 < top_p <= 1; got "
            f"{max_new_tokens}, {temperature} and {top_p}"
        )
    if not isinstance(prompts, Prompts | Mapping):
        raise TypeError(f"prompts must be those of render, or a processor's batch; got {type(prompts).__name__}")
    batch, blank = (prompts.image, prompts.blank) if isinstance(prompts, Prompts) else (prompts, 0)
    refuse(model.config, batch)
    defaults = model.generation_config
    eos = sorted({*flat(defaults.eos_token_id if eos_ids is None else eos_ids)})
    pad = next((x for x in (pad_id, defaults.pad_token_id, *eos) if x is not None), None)
    suppress = image_ids(model.config) | {*flat(suppress_ids)} | ({*flat(pad)} - {*eos})
    # top_k=0 disables the default of 50.
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    batch = left_padded(batch)
    with evaluating(model):
        sequences = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            eos_token_id=eos or None,
            pad_token_id=pad,
            suppress_tokens=sorted(suppress) or None,
            use_cache=True,
            **sampling,
        )
    response_BT = sequences[:, batch["input_ids"].shape[1] :]
    ends_BT = torch.isin(response_BT, torch.tensor(eos, dtype=torch.int64, device=response_BT.device)).long()
    return Rollout(response_BT, mask_BT=ends_BT.cumsum(dim=1) - ends_BT == 0).with_empty(-blank)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Set evaluation mode, an empty generation config and no rotary offsets, gather shards; restore all afterwards."""
    # `generate` takes every missing option from the model's config.
    empty = type(model.generation_config)()
    own = "generate" in vars(model)
    with in_evaluation(model), overridden(model, "generation_config", empty), overridden(model, "rope_deltas", None):
        try:
            if not own:
                # `generate` calls towers before `forward` gathers their shards. No-op if nothing is sharded.
                register_fsdp_forward_method(model, "generate")
            yield
        finally:
            if not own:
                vars(model).pop("generate", None)
