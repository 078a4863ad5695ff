"""What the losses lose when the teacher is behind a server: bias and gradients over k ids and a tail.

    python -m benchmarks.topk_bias                # about a minute of one core

The logits are synthetic, of the size of a Qwen3-VL head: a Zipf-like bias over the vocabulary plus a hidden state
times a head, so that ids are correlated; some tokens peaked and some flat; a third of them visual, the teacher's hidden
state turned far by taking the image away, and the others turned a little. The student is the teacher with noise on the
hidden states, which both views share in part, and on its head. The result says how peaked that made them.

``bias`` is that of the mean loss, relative. The cosines are between the gradient of the collapsed loss and that of the
full one, over all tokens at once: with respect to the student's logits, and to its hidden states through its head.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from steer_optim.vlm import token_losses
from steer_optim.vlm.divergences import TERMS
from steer_optim.vlm.topk import TopLogProbs, collapse, intersect, top_ids

VOCABULARY, WIDTH = 151_936, 256
CHUNK = 32
GAMMA = 2.0
STEERED = {name: TERMS[name] for name in ("std", "vis", "lang")}
LOSSES = (*STEERED, "vgs")
VIEWS = ("student", "student_text", "teacher", "teacher_text")
PLACES = ("logits", "hidden")
BY_BOTH, BY_IMAGE, BY_TEACHER = CASES = (
    "student's ids, of both views",
    "student's ids, of the view with the image",
    "teacher's own ids, known in both views",
)


class Models:
    """A student and a teacher."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        rank_V = torch.randperm(VOCABULARY, generator=self.random) + 1
        self.unigram_V = -rank_V.float().log()
        self.teacher_head_Vd = self.normal(VOCABULARY, WIDTH) / math.sqrt(WIDTH)
        self.student_head_Vd = self.teacher_head_Vd + 0.07 * self.normal(VOCABULARY, WIDTH) / math.sqrt(WIDTH)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def logits(self, tokens: int) -> dict[str, Tensor]:
        """``(N, V)`` by the name of the view."""
        sharpness_N1 = 4 + 10 * torch.rand(tokens, 1, generator=self.random)
        visual_N1 = torch.rand(tokens, 1, generator=self.random) < 0.3
        angle_N1 = torch.where(visual_N1, 0.6, 0.1) * torch.rand(tokens, 1, generator=self.random)
        image_Nd, other_Nd, shared_Nd = (self.normal(tokens, WIDTH) for _ in range(3))
        text_Nd = angle_N1.cos() * image_Nd + angle_N1.sin() * other_Nd
        logits = []
        for noise, head_Vd in ((0.07, self.student_head_Vd), (0.0, self.teacher_head_Vd)):
            for view_Nd in (image_Nd, text_Nd):
                hidden_Nd = view_Nd + noise * (shared_Nd + self.normal(tokens, WIDTH))
                logits.append(self.unigram_V + sharpness_N1 * hidden_Nd @ head_Vd.T)
        return dict(zip(VIEWS, logits, strict=True))


def served(case: str, k: int, views: dict[str, Tensor]) -> dict[str, Tensor | TopLogProbs]:
    """The views where the teacher's are what a server would send: ``k`` ids and the rest of the mass."""
    student, student_text, *teachers = views.values()
    log_probs = [x.log_softmax(-1) for x in teachers]
    if case == BY_TEACHER:
        top = [x.topk(k) for x in log_probs]
        sent = intersect(*(TopLogProbs(x.indices, x.values) for x in top))
    else:
        every = torch.ones(len(student), dtype=torch.bool)
        ids = top_ids(student, student_text if case == BY_BOTH else None, every, k=k)
        sent = [TopLogProbs(ids, x.gather(-1, ids)) for x in log_probs]
    return {**views, **dict(zip(VIEWS[2:], sent, strict=True))}


def losses_and_gradients(
    views: dict[str, Tensor | TopLogProbs], head_Vd: Tensor
) -> dict[str, tuple[float, Tensor, Tensor]]:
    """The sum over tokens, and its gradient with respect to the student's logits and hidden states.

    Those of the one view that the loss reaches.
    """
    losses, found = token_losses(views, terms=STEERED), {}
    for name, term in STEERED.items():
        loss = losses[name].sum()
        gradient_NV = torch.autograd.grad(loss, views[term.left], retain_graph=True)[0]
        found[name] = loss.item(), gradient_NV, gradient_NV @ head_Vd
    (std, *std_gradients), (vis, *vis_gradients) = found["std"], found["vis"]
    both = (a + GAMMA * b for a, b in zip(std_gradients, vis_gradients, strict=True))
    return {**found, "vgs": (std + GAMMA * vis, *both)}


def dot(a: Tensor, b: Tensor) -> float:
    return (a.unsqueeze(-2) @ b.unsqueeze(-1)).double().sum().item()


def measure(seed: int, tokens: int, ks: list[int]) -> list[dict[str, Any]]:
    """A row per case, ``k`` and loss, over the tokens of one seed."""
    models, sums = Models(seed), defaultdict(Counter)
    for start in range(0, tokens, CHUNK):
        views = models.logits(min(CHUNK, tokens - start))
        for name in VIEWS[:2]:
            views[name].requires_grad_()
        full = losses_and_gradients(views, models.student_head_Vd)
        full_squares = {name: [dot(x, x) for x in gradients] for name, (_, *gradients) in full.items()}
        for case in CASES:
            for k in ks:
                sent = served(case, k, views)
                ids = sent["teacher"].ids_BTk
                tail = collapse(views["student"].detach().log_softmax(-1), ids)[:, -1].exp().sum().item()
                few = losses_and_gradients(sent, models.student_head_Vd)
                for name, (loss, *gradients) in few.items():
                    total = sums[case, k, name]
                    total["ids"] += (ids >= 0).sum().item()
                    total["tail"] += tail
                    total["loss"] += loss
                    total["full loss"] += full[name][0]
                    for place, a, b, bb in zip(PLACES, gradients, full[name][1:], full_squares[name], strict=True):
                        total[f"{place}, ab"] += dot(a, b)
                        total[f"{place}, aa"] += dot(a, a)
                        total[f"{place}, bb"] += bb
    return [
        {
            "seed": seed,
            "case": case,
            "k": k,
            "loss": name,
            "ids": total["ids"] / tokens,
            "tail": total["tail"] / tokens,
            "bias": total["loss"] / total["full loss"] - 1,
            **{
                f"cosine, {place}": total[f"{place}, ab"] / math.sqrt(total[f"{place}, aa"] * total[f"{place}, bb"])
                for place in PLACES
            },
        }
        for (case, k, name), total in sums.items()
    ]


def shape(seed: int, tokens: int) -> dict[str, float]:
    """How peaked the student is and how far it is from its teacher: quartiles over tokens, and means."""
    views = Models(seed).logits(tokens)
    log_p = views["student"].log_softmax(-1)
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    losses = token_losses(views)
    return {
        "entropy, quartiles": (-(log_p.exp() * log_p).sum(-1)).quantile(quartiles).tolist(),
        "largest probability, quartiles": log_p.amax(-1).exp().quantile(quartiles).tolist(),
        **{f"mean {name}": losses[name].mean().item() for name in ("std", "vis", "lang", "vds")},
    }


def markdown(result: dict[str, Any]) -> str:
    """Bias and cosines of every loss, a row per case and ``k``: means over the seeds."""

    def mean(case: str, k: int, name: str, field: str) -> float:
        return statistics.mean(
            row[field] for row in result["rows"] if (row["case"], row["k"], row["loss"]) == (case, k, name)
        )

    settings = dict.fromkeys((row["case"], row["k"]) for row in result["rows"])
    head = ["ids", "k", "known", "mass of the tail", *(f"{name}: bias, cosines" for name in LOSSES)]
    rows = [
        [
            case,
            str(k),
            f"{mean(case, k, 'std', 'ids'):.0f}",
            f"{mean(case, k, 'std', 'tail'):.1%}",
            *(
                f"{mean(case, k, name, 'bias'):+.1%}, {mean(case, k, name, 'cosine, logits'):.4f}, "
                f"{mean(case, k, name, 'cosine, hidden'):.4f}"
                for name in LOSSES
            ),
        ]
        for case, k in settings
    ]
    return common.table(head, rows)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=128, help="of each seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--k", nargs="+", type=int, default=[16, 64, 256, 1024])
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = [row for seed in range(options.seeds) for row in measure(seed, options.tokens, options.k)]
    result = {"tokens": options.tokens, "seeds": options.seeds, "gamma": GAMMA, "shape": shape(0, CHUNK), "rows": rows}
    print(f"{markdown(result)}\n{time.perf_counter() - start:.0f} s")
    common.write("topk_bias", result, options.results, partial=options.partial)


if __name__ == "__main__":
    main()
