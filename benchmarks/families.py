"""Check that every family of vision-language models in transformers is right, or refused by name.

    python -m benchmarks.families        # writes a result and docs/families.md; a minute
    python -m benchmarks.families llava gemma3        # prints these and writes nothing

`make families` runs tests/vlm/test_families.py, where the same is checked, and writes the page.
"""

from __future__ import annotations

import json
import re
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from steer_optim.vlm.families import family_of, placeholder_ids, roles
from steer_optim.vlm.forward import response_logits, response_states
from steer_optim.vlm.prompts import Rollout, append_response, render, text_only
from steer_optim.vlm.rollout import rollout
from tests.vlm.zoo import BOS, CONFIG_MAPPING, EOS, IMAGE, MODELS, VOCABULARY, Zoo
from tests.vlm.zoo_entries import ENTRIES, NOT_BUILT
from tests.vlm.zoo_pixels import transformers

PAGE = common.ROOT / "docs" / "families.md"
COLUMNS = {"messages": "from messages", "ids": "from ids"}
COLUMNS |= {key: key for key in ("padding", "future", "gradients")} | {"states": "hidden states", "rollout": "rollout"}
RIGHT, REFUSED, WRONG = "right", "refused", "WRONG"
# Ids of letters, and of a newline; one image, none, two, and rows of different lengths.
PROMPTS = {
    1: [[BOS, 20, IMAGE, 21, 22], [BOS, 23, 107, IMAGE, 25]],
    0: [[BOS, 30, 31], [BOS, 32, 33, 34, 35]],
    2: [[40, IMAGE, 41, 42, IMAGE, 43, 44, 107, 45]],
}
TOKENS = 4
# Rotations, norms and routers run in float32 whatever the dtype, and padding moves the positions that are rotated: some
# dozens of roundings of 6e-8, relative to the largest logit; MiniCPM's are 6e-6 apart.
TOLERANCE = 2e-5


def check(name: str) -> dict[str, str]:
    """Check one family; each value begins with right, refused or WRONG, followed by the reason."""
    if name not in ENTRIES:
        config = CONFIG_MAPPING[name]()
        try:
            append_response({"input_ids": torch.tensor([[3, 4]])}, Rollout.of([[5]], config=config), config)
        except ValueError as refusal:
            return {"refused": str(refusal)}
        return {"absent": NOT_BUILT[name]}
    zoo = Zoo(name)
    prompts = [prompt for number in zoo.entry.images for prompt in PROMPTS[number]]
    alike = prompts if family_of(zoo.config).mixed else [prompt for prompt in prompts if IMAGE in prompt]
    checks: dict[str, Callable[[Zoo, list[list[int]]], str]] = {
        "image": written,
        "ids": ids,
        "messages": messages,
        "padding": padding,
        "future": future,
        "gradients": gradients,
        "states": states,
        "rollout": sampled,
    }
    found = {}
    for key, function in checks.items():
        if name in NOT_BUILT and key not in ("image", "ids", "messages"):
            found[key] = f"no model: {NOT_BUILT[name]}"
            continue
        try:
            with torch.no_grad():
                found[key] = function(zoo, prompts if key in ("ids", "messages", "padding") else alike)
        except Exception as error:
            ours = traceback.extract_tb(error.__traceback__)[-1].filename
            verdict = REFUSED if "steer_optim/vlm" in ours else f"{WRONG}: {type(error).__name__}"
            found[key] = f"{verdict}: {error}"
    return found


def written(zoo: Zoo, _: list[list[int]]) -> str:
    """Return the tokens of an image in a prompt, with runs of the same token merged."""
    row = next(prompt for number in zoo.entry.images if number for prompt in PROMPTS[number])
    ids = zoo.batch([row])["input_ids"][0].tolist()
    tokens = [zoo.tokenizer.convert_ids_to_tokens(token) for token in ids if token != BOS]
    runs: list[list[Any]] = []
    for token in tokens:
        if runs and runs[-1][0] == token and len(token) > 1:
            runs[-1][1] += 1
        else:
            runs.append([token, 1])
    text = "".join(f"{token} × {times} " if times > 1 else token for token, times in runs)
    return text.replace("\n", "\\n").strip()


def ids(zoo: Zoo, prompts: list[list[int]]) -> str:
    """Compare the text view from ids with the prompt as the processor writes it without an image."""
    expected = [zoo.without(prompt, kept=True) for prompt in prompts]
    needs = _needs(zoo, prompts)
    for side in ("left", "right"):
        view = text_only(zoo.batch(prompts, side), zoo.config, tokenizer=zoo.processor)
        for row, mask, wanted in zip(view["input_ids"], view["attention_mask"], expected, strict=True):
            got = row[mask.bool()].tolist()
            a, b = (repr(zoo.tokenizer.decode(value)) for value in (got, wanted))
            # A newline that stays and one of the text are two tokens here, and one if written together.
            if a != b or (got != wanted and not zoo.entry.kept):
                return f"{WRONG}: {a} where the processor writes {b}"
        if keys := view.keys() - zoo.bare_keys(side):
            return f"{WRONG}: keys {sorted(keys)} of images are left"
    kept = " or ".join(map(repr, sorted({*zoo.entry.kept} - {""})))
    return f"{RIGHT}: {needs}" + (f"; {kept} of an image stays" if kept else "")


def _needs(zoo: Zoo, prompts: list[list[int]]) -> str:
    """Return what must be passed in addition to the configuration."""
    wanted = text_only(zoo.batch(prompts), zoo.config, tokenizer=zoo.processor)["input_ids"]
    for needs, tokenizer in {"the config says it all": None, "tokenizer= needed": zoo.tokenizer}.items():
        with suppress(ValueError):
            view = text_only(zoo.batch(prompts), zoo.config, tokenizer=tokenizer)["input_ids"]
            return needs if torch.equal(view, wanted) else f"{WRONG} with less than the processor"
    return "tokenizer=processor needed"


def messages(zoo: Zoo, prompts: list[list[int]]) -> str:
    """Render both views, and compare the text view with the one from ids."""
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
    """Check a batch of all prompts, or one with images and one without if they cannot be mixed."""
    if family_of(zoo.config).mixed:
        return _padding(zoo, prompts)
    try:
        append_response(zoo.batch(prompts), Rollout.of([[46]] * len(prompts), config=zoo.config), zoo.config)
    except ValueError as refusal:
        found = [_padding(zoo, [prompt for prompt in prompts if (IMAGE in prompt) is kind]) for kind in (True, False)]
        wrong = [value for value in found if value != RIGHT]
        return wrong[0] if wrong else f"{RIGHT}: {str(refusal).partition(' are')[0]} in one batch are refused"
    return f"{WRONG}: a batch of rows with and without images is not refused"


def _padding(zoo: Zoo, prompts: list[list[int]]) -> str:
    """Compare the response's logits in batches with those that `generate` gives for each row alone."""
    worst, steps = 0.0, 0.0
    batches = [zoo.batch(prompts, side) for side in ("left", "right")]
    alone = [zoo.batch([prompt]) for prompt in prompts]
    without = [text_only(row, zoo.config, tokenizer=zoo.processor) for row in alone]
    for view, rows in (("image", alone), ("text", without)):
        generated = [greedy(zoo, row) for row in rows]
        wanted = [logits for _, logits in generated]
        if zoo.entry.loose:
            wanted = [full_pass(zoo, row, tokens) for row, (tokens, _) in zip(rows, generated, strict=True)]
            steps = max(steps, *(_apart(a, b) for a, (_, b) in zip(wanted, generated, strict=True)))
        # Responses of 4, 3, 2, 1, 4, ... tokens.
        lengths = [TOKENS - number % TOKENS for number in range(len(rows))]
        cut = [tokens[:length].tolist() for (tokens, _), length in zip(generated, lengths, strict=True)]
        responses = Rollout.of(cut, config=zoo.config)
        for batch in batches:
            whole = batch if view == "image" else text_only(batch, zoo.config, tokenizer=zoo.processor)
            got = response_logits(zoo.model, append_response(whole, responses, zoo.config), TOKENS)
            worst = max(worst, *(_apart(got[r, :n], wanted[r][:n]) for r, n in enumerate(lengths)))
        if view == "image":
            other = zoo.batch(prompts, "right", salt=1)
            moved = got - response_logits(zoo.model, append_response(other, responses, zoo.config), TOKENS)
    seen = [moved[row, : lengths[row]].abs().amax(dim=1).min() for row, prompt in enumerate(prompts) if IMAGE in prompt]
    if worst > TOLERANCE:
        return f"{WRONG}: logits differ by {worst:.1e} of the largest"
    if min(seen, default=1) < 1e-3:
        return f"{WRONG}: another image changes a logit of the response by {min(seen):.1e} only"
    return f"{RIGHT}: the steps of generate are {steps:.0e} off the model's full pass" if steps > TOLERANCE else RIGHT


def future(zoo: Zoo, prompts: list[list[int]]) -> str:
    """Check that a late token of the response changes no earlier row, in either view."""
    batch = zoo.batch(prompts, "right")
    for name, view in (("image", batch), ("text", text_only(batch, zoo.config, tokenizer=zoo.processor))):
        rows = []
        for late in (50, 51):
            responses = Rollout.of([[46, 47, 48, late]] * len(prompts), config=zoo.config)
            rows.append(response_logits(zoo.model, append_response(view, responses, zoo.config), TOKENS))
        if (apart := _apart(*rows)) > TOLERANCE:
            return f"{WRONG}: a late token moves earlier rows of the {name} view by {apart:.1e}"
    return RIGHT


@torch.enable_grad()
def gradients(zoo: Zoo, prompts: list[list[int]]) -> str:
    """Check that gradients are finite despite padding, and reach the vision tower."""
    responses = Rollout.of(
        [[46, 47, 48, 49][: 1 + number % TOKENS] for number in range(len(prompts))], config=zoo.config
    )
    appended = append_response(zoo.batch(prompts, "right"), responses, zoo.config)
    logits = response_logits(zoo.model, appended, responses.mask_BT.shape[1])
    zoo.model.zero_grad()
    logits[responses.mask_BT].logsumexp(dim=-1).sum().backward()
    found = {name: p.grad for name, p in zoo.model.named_parameters() if p.grad is not None}
    if broken := [name for name, grad in found.items() if not grad.isfinite().all()]:
        return f"{WRONG}: the gradient of {broken[0]} is not finite"
    if not any(grad.any() for name, grad in found.items() if re.search("vision|visual|image", name)):
        return f"{RIGHT}: none reaches the image"
    return RIGHT


def states(zoo: Zoo, prompts: list[list[int]]) -> str:
    """Compare logits from hidden states with the model's own."""
    responses = Rollout.of([[46, 47, 48, 49]] * len(prompts), config=zoo.config)
    appended = append_response(zoo.batch(prompts), responses, zoo.config)
    got = response_states(zoo.model, appended, TOKENS).logits()
    apart = _apart(got, response_logits(zoo.model, appended, TOKENS))
    return RIGHT if apart <= TOLERANCE else f"{WRONG}: logits differ by {apart:.1e} of the largest"


def sampled(zoo: Zoo, prompts: list[list[int]]) -> str:
    """Check that a rollout samples no placeholder and no suppressed id, even if the model makes them most likely."""
    head = zoo.model.get_output_embeddings() or zoo.model.language_model.get_output_embeddings()
    around = set(roles(zoo.config, zoo.processor))
    for banned, suppress_ids in ((placeholder_ids(zoo.config), ()), (around, around)):
        ids = torch.tensor(sorted(banned))

        def favour(_: Any, __: Any, logits: Tensor, ids: Tensor = ids) -> Tensor:
            return logits.index_fill(-1, ids[ids < logits.shape[-1]], 100.0)

        hook = head.register_forward_hook(favour)
        try:
            torch.manual_seed(0)
            found = rollout(zoo.model, zoo.batch(prompts), max_new_tokens=TOKENS, suppress_ids=suppress_ids)
        finally:
            hook.remove()
        if torch.isin(found.response_BT[found.mask_BT], ids).any():
            return f"{WRONG}: samples a token of an image"
    return RIGHT


def greedy(zoo: Zoo, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the ids and logits of the greedy response of `generate`, without tokens of an image."""
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


def full_pass(zoo: Zoo, row: dict[str, Any], tokens: Tensor) -> Tensor:
    """Return the logits of one row with its response, from the model's own full pass."""
    ids = torch.cat([row["input_ids"], tokens[None]], dim=1)
    longer = {**row, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return zoo.model(**longer, use_cache=False).logits[0, -TOKENS - 1 : -1]


@contextmanager
def _reset(model: Any) -> Any:
    """Clear the state that a pass leaves on the model."""
    try:
        yield
    finally:
        _forget(model)


def _forget(model: Any) -> None:
    for module in model.modules():
        if "rope_deltas" in vars(module):
            module.rope_deltas = None


def _apart(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def _difference(shorter: str, longer: str) -> str:
    """Return the text that ``longer`` has and ``shorter`` lacks, where they first differ."""
    start = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
    return longer[start : start + max(1, len(longer) - len(shorter))]


def row(name: str, found: dict[str, str]) -> list[str]:
    """Return a line of the table of families that are not refused."""
    cells = {key: _cell(key, value) for key, value in found.items() if key != "image"}
    image = found["image"].replace("|", "\\|")
    return [name, f"`{image}`", *(cells[key] for key in COLUMNS)]


def _cell(key: str, value: str) -> str:
    verdict, _, note = value.partition(": ")
    if verdict == "no model":
        return "no model"
    if key == "states" and verdict == REFUSED:
        return "`response_logits` only"
    if key == "messages" and verdict == REFUSED:
        note = note.rstrip(".") + ". Use `text_only`."
    note = re.sub(r"the processor cannot render conversation 0[^:]*: ", "", note)
    note = note.replace("the config says it all", "")
    note = re.sub(r"(tokenizer=\w*) needed", r"with `\1`", note)
    note = re.sub(r"\s*('[^' ]*')", lambda match: f" `{match[1][1:-1] or ' '}`", note) if verdict == RIGHT else note
    return f"{verdict}: {note}".removesuffix(": ").replace(": ;", ":").replace("|", "\\|")


def report(result: dict[str, Any]) -> str:
    """Return the page for a result."""
    families = result["families"]
    tried = {name: found for name, found in families.items() if "image" in found}
    head = ["family", "an image in a prompt", *COLUMNS.values()]
    refused = {name: found["refused"].partition(": ")[2] for name, found in families.items() if "refused" in found}
    right = [name for name in tried if name not in NOT_BUILT]
    return TEMPLATE.format(
        transformers=result["transformers"],
        torch=result["machine"]["torch"],
        number=len(MODELS),
        right=len({name for name in right if name in MODELS}),
        refusals=len(refused),
        absent=len(NOT_BUILT),
        table=common.table(head, [row(name, tried[name]) for name in sorted(tried)]),
        refused=common.table(["family", "why"], [[name, why] for name, why in sorted(refused.items())]),
        not_built=common.table(["family", "why"], [[name, why] for name, why in sorted(NOT_BUILT.items())]),
        noise=", ".join(sorted(name for name in tried if ENTRIES[name].noise)),
    )


TEMPLATE = """# Model families

Written by `python -m benchmarks.families` with transformers {transformers} and torch {torch} on a CPU. `make families`
runs the same checks as tests, and writes this page.

The image-text-to-text mapping of transformers has {number} model types: {right} are right, {refusals} are refused by
name, and {absent} have no model here. Each is a tiny random model of the real class, and its own processor writes the
prompts. The test makes a tokenizer with one character per token, and a short chat template with the family's tokens
around an image: transformers has neither without a download. A name after a slash is another way to write an image.

- **an image in a prompt**: the processor's text between the letters `a` and `bc`; `\\n` is a newline.
- **from messages**: `render` returns both views. If the text-only view of `text_only` differs, the rendered one is
  right, and the cell shows the text that stays in the other.
- **from ids**: `text_only` returns the prompt as the processor writes it without an image. *With `tokenizer=`*: the
  configuration does not name the tokens around an image, and `text_only` raises without the tokenizer.
- **padding**: responses of 1 to 4 tokens follow prompts with no, one and two images in one batch, padded on either
  side. Their logits equal those that `generate` gives for each row alone, in both views. Another image changes them.
- **future**: a late token of the response changes no earlier logit, in both views.
- **gradients**: all are finite despite padding, and the response's loss reaches the vision tower.
- **hidden states**: `response_states` gives the model's logits, or it raises and names the alternative.
- **rollout**: no placeholder is sampled, even if the model makes it the most likely token.

{table}

Pixels come from the family's image processor. These families get noise of the same shape, because their image
processors need torchvision: {noise}.

## Refused

`append_response` and `rollout` raise a `ValueError` that names the family and the reason.

{refused}

## No model

If there is a processor, the table above has the checks of its prompts.

{not_built}
"""


def main() -> None:
    options = common.parser(__doc__)
    options.add_argument("names", nargs="*", default=[], help="these families, and no page")
    options = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    results = {}
    for name in options.names or sorted(MODELS.keys() | ENTRIES.keys()):
        results[name] = check(name)
        print(name, json.dumps(results[name], ensure_ascii=False))
    if options.names:
        return
    common.write("families", {"transformers": transformers.__version__, "families": results}, options.results)
    PAGE.write_text(report(common.newest("families")), encoding="utf-8")


if __name__ == "__main__":
    main()
