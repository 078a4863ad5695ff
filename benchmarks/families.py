"""Every family of vision-language models that transformers builds from a configuration: is it right, or refused by name?

    python -m benchmarks.families        # writes a result and docs/families.md; two minutes
    python -m benchmarks.families llava gemma3        # prints these and writes nothing

`make families` runs tests/vlm/test_families.py, where the same is checked, and writes the page.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from steer_optim.vlm.families import family_of, placeholder_ids, refuse, roles
from steer_optim.vlm.forward import response_logits, response_states
from steer_optim.vlm.prompts import Rollout, append_response, render, text_only
from steer_optim.vlm.rollout import rollout
from tests.vlm.zoo import BOS, EOS, ENTRIES, IMAGE, NOT_BUILT, VOCABULARY, Zoo, transformers

PAGE = common.ROOT / "docs" / "families.md"
RIGHT, REFUSED, WRONG = "right", "refused", "WRONG"
# Ids of letters; a newline beside an image; one image, none, two, and rows of different lengths.
PROMPTS = {
    1: [[BOS, 20, IMAGE, 21, 22], [BOS, 23, 24, IMAGE, 25]],
    0: [[BOS, 30, 31], [BOS, 32, 33, 34, 35]],
    2: [[40, IMAGE, 41, 42, IMAGE, 43, 44, 107, 45]],
}
TOKENS = 4
# Rotations, norms and routers run in float32 whatever the dtype, and padding moves the positions that are rotated: some
# dozens of roundings of 6e-8, relative to the largest logit.
TOLERANCE = 2e-5


def check(name: str) -> dict[str, str]:
    """What holds for one family; each value begins with right, refused or WRONG, and goes on with why."""
    zoo = Zoo(name)
    try:
        refuse(zoo.config)
    except ValueError as refusal:
        return {"refused": str(refusal)}
    prompts = [prompt for number in zoo.entry.images for prompt in PROMPTS[number]]
    checks: dict[str, Callable[[Zoo, list[list[int]]], str]] = {
        "image": written,
        "ids": ids,
        "messages": messages,
        "padding": padding,
        "future": future,
        "states": states,
        "rollout": sampled,
    }
    found = {}
    for key, function in checks.items():
        try:
            with torch.no_grad():
                found[key] = function(zoo, prompts)
        except Exception as error:
            ours = traceback.extract_tb(error.__traceback__)[-1].filename
            verdict = REFUSED if "steer_optim/vlm" in ours else f"{WRONG}: {type(error).__name__}"
            found[key] = f"{verdict}: {error}"
    return found


def written(zoo: Zoo, _: list[list[int]]) -> str:
    """How an image stands in a prompt: the tokens of one, a run of the same as one."""
    row = next(prompt for number in zoo.entry.images if number for prompt in PROMPTS[number])
    ids = zoo.batch([row])["input_ids"][0].tolist()
    tokens = [zoo.tokenizer.convert_ids_to_tokens(token) for token in ids]
    runs: list[list[Any]] = []
    for token in tokens:
        if runs and runs[-1][0] == token:
            runs[-1][1] += 1
        else:
            runs.append([token, 1])
    text = "".join(f"{token} × {times} " if times > 1 else token for token, times in runs)
    return text.replace("\n", "\\n").replace("<bos>", "").strip()


def ids(zoo: Zoo, prompts: list[list[int]]) -> str:
    """The text view from ids against the prompt as the processor writes it without an image."""
    expected = [zoo.without(prompt) for prompt in prompts]
    needs = "the config says it all"
    try:
        text_only(zoo.batch(prompts), zoo.config)
    except ValueError as error:
        needs = "tokenizer= needed" if "pass tokenizer=" in str(error) else str(error)
    for side in ("left", "right"):
        view = text_only(zoo.batch(prompts, side), zoo.config, tokenizer=zoo.processor)
        for row, mask, wanted in zip(view["input_ids"], view["attention_mask"], expected, strict=True):
            if (got := row[mask.bool()].tolist()) != wanted:
                a, b = (repr(zoo.tokenizer.decode(value)) for value in (got, wanted))
                return f"{WRONG}: {a} where the processor writes {b}"
        if keys := view.keys() - zoo.bare_keys(side):
            return f"{WRONG}: keys {sorted(keys)} of images are left"
    return f"{RIGHT}: {needs}"


def messages(zoo: Zoo, prompts: list[list[int]]) -> str:
    """Both views that the processor renders, the text view against the one from ids."""
    views = render(zoo.processor, [zoo.conversation(prompt) for prompt in prompts], **zoo.template_options)
    left = views.text.keys() - {"input_ids", "attention_mask"} - set(family_of(zoo.config).per_token)
    left -= {"token_type_ids", "mm_token_type_ids"}
    if left:
        return f"{WRONG}: keys {sorted(left)} of images are left"
    if torch.isin(views.text["input_ids"], torch.tensor(sorted(placeholder_ids(zoo.config)))).any():
        return f"{WRONG}: placeholders are left"
    from_ids = text_only(views.image, zoo.config, tokenizer=zoo.processor)
    rows = [
        [zoo.tokenizer.decode(row[mask.bool()]) for row, mask in zip(v["input_ids"], v["attention_mask"], strict=True)]
        for v in (views.text, from_ids)
    ]
    for a, b in zip(*rows, strict=True):
        if a != b:
            return f"{RIGHT}: from ids {_difference(a, b)!r} stays for each image"
    return f"{RIGHT}: the same from ids"


def padding(zoo: Zoo, prompts: list[list[int]]) -> str:
    """The response's logits in batches against those that `generate` gives for each row by itself."""
    worst, spread = 0.0, 0.0
    batches = {side: zoo.batch(prompts, side) for side in ("left", "right")}
    alone = [zoo.batch([prompt]) for prompt in prompts]
    bare = [text_only(row, zoo.config, tokenizer=zoo.processor) for row in alone]
    moved: list[Tensor] = []
    for view, rows in (("image", alone), ("text", bare)):
        generated = [greedy(zoo, row) for row in rows]
        responses, logits = responses_of(generated, zoo)
        for batch in batches.values():
            whole = batch if view == "image" else text_only(batch, zoo.config, tokenizer=zoo.processor)
            got = response_logits(zoo.model, append_response(whole, responses, zoo.config), TOKENS)
            for row, (wanted, mask) in enumerate(zip(logits, responses.mask_BT, strict=True)):
                worst = max(worst, _apart(got[row, mask], wanted[mask]))
        moved.append(got[:, 0])
    spread = float((moved[0] - moved[1]).abs().amax(dim=1)[[IMAGE in prompt for prompt in prompts]].min())
    if worst > TOLERANCE:
        return f"{WRONG}: logits differ by {worst:.1e} of the largest"
    return RIGHT if spread > 1e-3 else f"{WRONG}: the image changes the logits by {spread:.1e} only"


def future(zoo: Zoo, prompts: list[list[int]]) -> str:
    """A late token of the response changes no earlier row, in either view."""
    batch = zoo.batch(prompts, "right")
    for name, view in (("image", batch), ("text", text_only(batch, zoo.config, tokenizer=zoo.processor))):
        rows = []
        for late in (50, 51):
            responses = Rollout.of([[46, 47, 48, late]] * len(prompts), config=zoo.config)
            rows.append(response_logits(zoo.model, append_response(view, responses, zoo.config), TOKENS))
        if (apart := _apart(*rows)) > TOLERANCE:
            return f"{WRONG}: a late token moves earlier rows of the {name} view by {apart:.1e}"
    return RIGHT


def states(zoo: Zoo, prompts: list[list[int]]) -> str:
    """Logits from hidden states against the model's own."""
    responses = Rollout.of([[46, 47, 48, 49]] * len(prompts), config=zoo.config)
    appended = append_response(zoo.batch(prompts), responses, zoo.config)
    got = response_states(zoo.model, appended, TOKENS).logits()
    apart = _apart(got, response_logits(zoo.model, appended, TOKENS))
    return RIGHT if apart <= TOLERANCE else f"{WRONG}: logits differ by {apart:.1e} of the largest"


def sampled(zoo: Zoo, prompts: list[list[int]]) -> str:
    """A rollout samples no token of an image, however likely the model makes them."""
    banned = sorted(roles(zoo.config, zoo.processor))
    head = zoo.model.get_output_embeddings()

    def favour(_: Any, __: Any, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., [token for token in banned if token < logits.shape[-1]]] += 100
        return logits

    hook = head.register_forward_hook(favour)
    try:
        torch.manual_seed(0)
        found = rollout(zoo.model, zoo.batch(prompts), max_new_tokens=TOKENS, suppress_ids=banned)
    finally:
        hook.remove()
    if torch.isin(found.response_BT[found.mask_BT], torch.tensor(banned)).any():
        return f"{WRONG}: samples a token of an image"
    return RIGHT


def greedy(zoo: Zoo, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids and logits of the most likely response, as `generate` gives them; no token of an image is in it."""
    banned = sorted({*roles(zoo.config, zoo.processor), EOS, *range(150, VOCABULARY)})
    with _reset(zoo.model):
        out = zoo.model.generate(
            **row,
            max_new_tokens=TOKENS,
            do_sample=False,
            suppress_tokens=banned,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, -TOKENS:], torch.stack(out.logits, dim=1)[0]


def responses_of(generated: list[tuple[Tensor, Tensor]], zoo: Zoo) -> tuple[Rollout, list[Tensor]]:
    """Responses of 4, 3, 2, 1, 4, ... tokens."""
    rows = [ids[: TOKENS - number % TOKENS].tolist() for number, (ids, _) in enumerate(generated)]
    return Rollout.of(rows, config=zoo.config), [logits for _, logits in generated]


@contextmanager
def _reset(model: Any) -> Any:
    """What a pass leaves on the model does not reach the next one."""
    yield
    for module in model.modules():
        if "rope_deltas" in vars(module):
            module.rope_deltas = None


def _apart(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def _difference(shorter: str, longer: str) -> str:
    """What ``longer`` has and ``shorter`` lacks, where they first differ."""
    start = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
    return longer[start : start + max(1, len(longer) - len(shorter))]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    names = sys.argv[1:] or sorted(ENTRIES)
    results = {}
    for name in names:
        results[name] = check(name)
        print(name, json.dumps(results[name], ensure_ascii=False))
    if sys.argv[1:]:
        return


if __name__ == "__main__":
    main()
