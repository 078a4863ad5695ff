"""Tokens per second of `rollout`, beside `generate` used naively and a loop that does nothing but sample.

    python -m benchmarks.rollout_speed                      # about two minutes
    python -m benchmarks.rollout_speed --settings digits    # seconds

A token counts if it belongs to a response, its end included; what is generated after that is waste.

Dimensions: B prompts, L prompt tokens, T response tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import parser, quartiles, table, take_turns, use_one_core, write
from benchmarks.vlm_models import SETTINGS, Setting, make
from steer_optim.vlm import rollout
from steer_optim.vlm.families import image_ids

Way = Callable[[dict[str, Tensor]], Tensor]


def ways(setting: Setting) -> dict[str, Way]:
    """Each maps prompts to responses, (B, T) ids; all sample from the model's own distribution."""
    model, T = setting.student, setting.max_new_tokens

    def generate(prompt: dict[str, Tensor], **options: Any) -> Tensor:
        options |= {"do_sample": True, "top_k": 0, "max_new_tokens": T, "suppress_tokens": suppressed(model)}
        return model.generate(**prompt, **options)[:, prompt["input_ids"].shape[1] :]

    def one_by_one(prompt: dict[str, Tensor]) -> Tensor:
        rows = [generate(row)[0] for row in split(prompt)]
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=model.generation_config.pad_token_id
        )

    return {
        "rollout": lambda prompt: rollout(model, prompt, max_new_tokens=T).response_BT,
        "generate, one prompt at a time": one_by_one,
        "generate, no cache": lambda prompt: generate(prompt, use_cache=False),
        "rollout, no early stop": lambda prompt: rollout(model, prompt, max_new_tokens=T, eos_ids=()).response_BT,
        "a lean loop": lambda prompt: lean(setting, prompt, draw),
        "a lean loop, one random number a token": lambda prompt: lean(setting, prompt, draw_by_inversion),
    }


def draw(probabilities_BV: Tensor) -> Tensor:
    return torch.multinomial(probabilities_BV, 1)


def draw_by_inversion(probabilities_BV: Tensor) -> Tensor:
    """The same distribution, to rounding, from one uniform number a row instead of one a token of the vocabulary."""
    cumulative_BV = probabilities_BV.cumsum(dim=1)
    point_B1 = torch.rand(len(cumulative_BV), 1) * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, point_B1, right=True).clamp(max=cumulative_BV.shape[1] - 1)


@torch.no_grad()
def lean(setting: Setting, prompt: dict[str, Tensor], draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Prefill, cached decoding and sampling for a Qwen3-VL whose prompts are equally long: the least there is to do."""
    model = setting.student
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    suppress = suppressed(model)
    training = model.training
    model.eval()
    output = model(**prompt, use_cache=True, logits_to_keep=1)
    position_B = model.model.rope_deltas[:, 0] + prompt["input_ids"].shape[1]
    tokens: list[Tensor] = []
    ended_B1 = torch.zeros(len(position_B), 1, dtype=torch.bool)
    while True:
        scores_BV = output.logits[:, -1].float()
        scores_BV[:, suppress] = -torch.inf
        token_B1 = draw(scores_BV.softmax(dim=-1)).masked_fill(ended_B1, pad)
        tokens.append(token_B1)
        ended_B1 = ended_B1 | (token_B1 == eos)
        if len(tokens) == setting.max_new_tokens or ended_B1.all():
            model.train(training)
            return torch.cat(tokens, dim=1)
        positions_3B1 = (position_B + len(tokens) - 1).view(1, -1, 1).expand(3, -1, 1)
        output = model(
            input_ids=token_B1, position_ids=positions_3B1, past_key_values=output.past_key_values, use_cache=True
        )


def suppressed(model: Any) -> list[int]:
    """The ids that are never sampled, as far as the vocabulary has them."""
    ids = image_ids(model.config) | {model.generation_config.pad_token_id}
    return sorted(id for id in ids if id < model.config.text_config.vocab_size)


def split(prompt: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The prompts one by one."""
    B = len(prompt["input_ids"])
    return [{name: value.chunk(B)[row] for name, value in prompt.items()} for row in range(B)]


def response_tokens(response_BT: Tensor, eos: int) -> int:
    ends_BT = (response_BT == eos).long()
    return int((ends_BT.cumsum(dim=1) - ends_BT == 0).sum())


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """Seconds per response token of each way, the ways taking turns."""
    setting = make(name)
    eos = setting.student.generation_config.eos_token_id
    tokens: dict[str, list[int]] = {}

    def counted(way: str, respond: Way) -> Callable[[], None]:
        counts = tokens.setdefault(way, [])

        def run() -> None:
            torch.manual_seed(len(counts))
            counts.append(response_tokens(respond(setting.draw()), eos))

        return run

    steps = {way: counted(way, respond) for way, respond in ways(setting).items()}
    seconds = take_turns(steps, repeats=repeats)
    per_token = {way: [s / n for s, n in zip(seconds[way], tokens[way][-repeats:], strict=True)] for way in steps}
    return [
        {
            "setting": name,
            "way": way,
            "tokens per second": statistics.median(1 / s for s in values),
            "speed over rollout": quartiles(per_token["rollout"], values),
        }
        for way, values in per_token.items()
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """Tokens per second, and in brackets how many times as fast as rollout."""
    rows: dict[str, list[str]] = {}
    for row in result["rows"]:
        rows.setdefault(row["way"], []).append(f"{row['tokens per second']:.0f} ({row['speed over rollout'][1]:.2f})")
    settings = dict.fromkeys(row["setting"] for row in result["rows"])
    return table(["tokens per second (÷ rollout)", *settings], [[way, *cells] for way, cells in rows.items()])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    use_one_core()
    rows = [row for name in options.settings for row in measure(name, options.repeats)]
    settings = {name: make(name).describe() for name in options.settings}
    result = {"repeats": options.repeats, "settings": settings, "rows": rows}
    write("rollout_speed", result, options.results, partial=options.partial)
    print(markdown(result))


if __name__ == "__main__":
    main()
