"""Peaks as sums of multiples of what they can consist of, fitted to small models and evaluated at a real size.

:mod:`benchmarks.step_memory` measures; here its rows become multiples, and multiples become the tables of the page.

Dimensions: ``N`` response tokens, ``M`` tokens that pass the student's layers in both views, prompts included, ``V``
vocabulary entries, ``d`` hidden size (``d'`` the teacher's), ``L`` layers, ``w`` parameters of a layer, ``C`` rows of a
chunk, ``c`` rows of a block of it, ``R`` processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import common

GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Of a model, its teacher and a batch. Prompts are of one length in each view, and so are responses."""

    responses: int
    T: int = 128
    image_prompt: int = 16
    text_prompt: int = 4
    V: int = 4096
    d: int = 128
    L: int = 2
    teacher_d: int = 128
    teacher_L: int = 2
    C: int = 64
    R: int = 1
    block: int = 2**18  # logits of a block, on a CPU

    @property
    def N(self) -> int:
        return self.responses * self.T

    @property
    def M(self) -> int:
        return self.responses * (2 * self.T + self.image_prompt + self.text_prompt)

    def units(self) -> dict[str, float]:
        """What peaks can consist of, in bytes."""
        c, w = min(self.C, max(1, self.block // self.V)), layer_parameters(self.d)
        return {
            "N·V·4": self.N * self.V * 4,
            "N·d·4": self.N * self.d * 4,
            "N·d'·4": self.N * self.teacher_d * 4,
            "M·d·4": self.M * self.d * 4,
            "M·L·d·4": self.M * self.L * self.d * 4,
            "C·V·4": self.C * self.V * 4,
            "c·V·4": c * self.V * 4,
            "V·d·4": self.V * self.d * 4,
            "V·d·4/R": self.V * self.d * 4 / self.R,
            "V·d'·4": self.V * self.teacher_d * 4,
            "w·4": w * 4,
            "L·w·4": self.L * w * 4,
            "L·w·4/R": self.L * w * 4 / self.R,
        }

    @property
    def student(self) -> int:
        """The parameters of the student, whose head is the embedding."""
        return self.L * layer_parameters(self.d) + self.d + self.V * self.d

    def teacher(self, key_values: int | None = None) -> int:
        """The parameters of the teacher, whose head is a matrix of its own."""
        d = self.teacher_d
        return self.teacher_L * layer_parameters(d, key_values) + d + 2 * self.V * d


TOKENS = (256, 512, 1024, 2048)
HELD_OUT = Sizes(12, image_prompt=40, V=12288, d=192, L=5, teacher_d=320, C=96)
"""A larger size that no fit reads: what the fits predict for it is compared with what it takes."""


def layer_parameters(d: int, key_values: int | None = None) -> int:
    """Of a layer of Qwen3-VL: keys and values half as wide as queries, as in the 2B, and an MLP three times as wide."""
    key_values = key_values or d // 2
    return 2 * d * d + 2 * d * key_values + 9 * d * d + 2 * d


# What a fit may consist of, by the moment that it is of; the rest of what was measured is not there then.
_LOSSES = ("N·V·4", "N·d·4", "N·d'·4", "C·V·4", "c·V·4", "V·d·4", "V·d'·4", "V·d·4/R")
_KEPT = ("N·V·4", "N·d·4", "M·d·4", "M·L·d·4", "N·d'·4", "V·d·4", "V·d'·4", "L·w·4")
_BACKWARD = ("N·V·4", "N·d·4", "M·d·4", "V·d·4", "V·d·4/R", "w·4", "L·w·4/R")
UNITS = {
    "resident": ("V·d·4", "V·d'·4"),
    "views, kept": _KEPT,
    "losses": _LOSSES,
    "losses, kept": _KEPT,
    "backward": _BACKWARD,
}


def moments(row: Mapping[str, Any]) -> dict[str, float]:
    """Bytes at the moments that are fitted: what is kept, and what losses and backward passes add to it at most.

    Resident is what is there between two steps beyond weights and the state of AdamW, which are known.
    """
    phases, s = row["phases"], Sizes(**row["sizes"])
    losses, backward = phases["losses"], phases["backward"]
    found = {"views, kept": losses["before"], "losses": losses["peak"] - losses["before"]}
    found |= {"losses, kept": backward["before"], "backward": backward["peak"] - backward["before"]}
    if "resident" not in phases:
        return found
    known = 4 * (3 * s.student + s.teacher()) / s.R
    rest = phases["resident"]["peak"] - known
    return {"resident": rest if rest > 0.02 * known else 0.0, **found}


def drifted(row: Mapping[str, Any]) -> bool:
    """Whether the profile has missed frees: at the end there seems to be more than one set of gradients."""
    s = Sizes(**row["sizes"])
    return "resident" in row["phases"] and row["phases"]["end"]["before"] > 1.05 * 4 * s.student / s.R


@dataclass(frozen=True)
class Fit:
    """A sum of multiples of units, none of them negative, and its largest relative error where it was fitted."""

    multiples: Mapping[str, float]
    error: float

    def of(self, s: Sizes, half: Iterable[str] = ()) -> dict[str, float]:
        """Bytes by unit at some sizes; ``half`` are those that are held in two bytes there."""
        units = s.units()
        return {unit: x * units[unit] * (0.5 if unit in half else 1) for unit, x in self.multiples.items()}

    def __str__(self) -> str:
        parts = sorted(self.multiples.items(), key=lambda part: -part[1])
        return " + ".join(f"{x:.{0 if abs(x - round(x)) < 0.005 else 2}f} {unit}" for unit, x in parts) or "0"


def fit(rows: Iterable[Mapping[str, Any]], moment: str) -> Fit:
    """The multiples that explain a moment with the least relative error."""
    rows = list(rows)
    target = torch.tensor([moments(row)[moment] for row in rows], dtype=torch.float64)
    sizes = [Sizes(**row["sizes"]).units() for row in rows]
    columns: dict[str, torch.Tensor] = {}
    for unit in UNITS[moment]:
        column = torch.tensor([units[unit] for units in sizes], dtype=torch.float64)
        if "resident" not in rows[0]["phases"] and not set(unit).isdisjoint("'MLw"):
            continue  # the losses alone: no layers, and the teacher's states are as wide as the student's
        if not any(column.equal(other) for other in columns.values()):  # all are of one process: a shard is the whole
            columns[unit] = column
    scale = target.clamp(min=0.01 * float(target.max()) or 1.0)
    while columns:
        A = torch.stack([column / scale for column in columns.values()], dim=1)
        length = A.norm(dim=0)
        x = torch.linalg.lstsq(A / length, (target / scale)[:, None], driver="gelsd").solution[:, 0]
        least = int(x.argmin())
        # A multiple that is not a twentieth of the largest part anywhere explains rounding.
        small = x[least] * (A[:, least] / length[least]).max() < 0.004
        if x[least] >= 0 and not small:
            break
        del columns[list(columns)[least]]
    if not columns:
        return Fit({}, 0.0)
    error = float(((A / length) @ x - target / scale).abs().max())
    return Fit(dict(zip(columns, (x / length).tolist(), strict=True)), error)


@dataclass(frozen=True)
class Scenario:
    """A column of the table for the real size."""

    name: str
    path: str
    sizes: Sizes


STUDENT_2B = {"V": 151_936, "d": 2048, "L": 28}
TEACHER_8B = {"teacher_d": 4096, "teacher_L": 36}
TEACHER_KEY_VALUES = 1024
REAL = Sizes(8, T=2048, image_prompt=1090, text_prompt=64, C=768, block=2**25, **STUDENT_2B, **TEACHER_8B)
SCENARIOS = (
    Scenario("logits", "step from logits", REAL),
    Scenario("hidden states", "step from states", REAL),
    Scenario("hidden states, checkpointing", "step from states, checkpointing", REAL),
    Scenario("FSDP2", "step from states, FSDP2", replace(REAL, R=8)),
    Scenario("FSDP2, checkpointing", "step from states, FSDP2, checkpointing", replace(REAL, R=8)),
    Scenario(
        "FSDP2, checkpointing, 1 response a GPU",
        "step from states, FSDP2, checkpointing",
        replace(REAL, R=8, responses=1),
    ),
)
_TEACHERS = ("N·d'·4", "V·d'·4")  # whose teacher is in bfloat16


def extrapolated(rows: Mapping[str, Any], scenario: Scenario) -> dict[str, float]:
    """Bytes by what they are, at the real size, and the peaks that they add up to."""
    s, mine = scenario.sizes, fitted(rows[scenario.path])
    resident, views, losses, kept, backward = (
        mine[moment].of(s, half=_TEACHERS)
        for moment in ("resident", "views, kept", "losses", "losses, kept", "backward")
    )
    always = {
        "weights of the student, float32": 4 * s.student / s.R,
        "state of AdamW, float32": 8 * s.student / s.R,
        "weights of the teacher, bfloat16": 2 * s.teacher(TEACHER_KEY_VALUES) / s.R,
        "whole embedding and head of the teacher": sum(resident.values()),
    }
    from_the_views = {
        "activations of the student": _part(views, "N·d·", "M·d·", "M·L·d"),
        "bfloat16 copies of weights, in the graph": _part(views, "L·w"),
        "whole embedding (the head) of the student": _part(views, "V·d·"),
        "hidden states of the teacher, both views, until the losses are known": _part(views, "N·d'", "V·d'"),
        "logits of the four views": _part(views, "N·V"),
    }
    in_losses = {
        "losses: logits of a chunk and a block": _part(losses, "C·V", "c·V"),
        "losses: tensors of the size of all logits": _part(losses, "N·V"),
        "losses: states and their gradients": _part(losses, "N·d"),
        "losses: gradients of the head, by component": _part(losses, "V·d"),
    }
    # A set is as many gradients of the head as of the layers.
    sets = _part(backward, "L·w·4/R") * (1 + s.V * s.d / (s.L * layer_parameters(s.d)))
    of_the_head = sets - _part(backward, "L·w·4/R")
    in_backward = {
        "backward: gradients of the head, by component": max(0.0, _part(kept, "V·d·") - _part(views, "V·d·")),
        "backward: tensors of the size of all logits": _part(kept, "N·V") + _part(backward, "N·V"),
        "backward: sets of gradients": sets,
        "backward: a whole head and layer, and their gradients": max(0.0, _part(backward, "V·d", "w") - of_the_head),
        "backward: activations, recomputed or on the way": _part(backward, "N·d", "M·d"),
    }
    peaks = {
        "**peak of the losses**": sum(always.values()) + sum(views.values()) + sum(losses.values()),
        "**peak of the backward passes**": sum(always.values()) + sum(kept.values()) + sum(backward.values()),
    }
    return {**always, **from_the_views, **in_losses, **in_backward, **peaks}


def _part(of: Mapping[str, float], *starts: str) -> float:
    return sum(x for unit, x in of.items() if unit.startswith(starts))


def fitted(rows: Iterable[Mapping[str, Any]]) -> dict[str, Fit]:
    """The fits of a path, to all rows but the one that is held out.

    That of the backward passes leaves out profiles that have missed frees, where others are left for each ``R``.
    """
    rows = [row for row in rows if not _is(row, HELD_OUT)]
    clean = [row for row in rows if not drifted(row)]
    if {row["sizes"]["R"] for row in clean} != {row["sizes"]["R"] for row in rows}:
        clean = rows
    found = {moment: fit(rows, moment) for moment in UNITS if moment in moments(rows[0])}
    return found | {"backward": fit(clean, "backward")}


def markdown(result: Mapping[str, Any], part: str) -> str:
    """The table of one part: ``losses``, ``step``, ``multiples`` or ``real``."""
    rows = result["rows"]
    if part == "real":
        return _real(rows)
    if part == "multiples":
        return _multiples({path: mine for path, mine in rows.items() if path.startswith("step")})
    lines: list[list[str]] = []
    for path, mine in rows.items():
        if not path.startswith(part):
            continue
        base = [next(row for row in mine if _is(row, Sizes(N // Sizes.T))) for N in TOKENS]
        peaks = [_highest(row) for row in base]
        line = [path.removeprefix(f"{part} from "), *(f"{peak / common.MIB:,.1f}" for peak, _ in peaks)]
        if part == "step":
            lines.append([*line, ", ".join(dict.fromkeys(phase for _, phase in peaks))])
            continue
        for moment in ("losses", "backward"):
            found = fitted(mine)[moment]
            cells = (_number(found.multiples.get(unit, 0.0)) for unit in ("N·V·4", "N·d·4", "C·V·4", "c·V·4"))
            heads = sum(x for unit, x in found.multiples.items() if unit.startswith("V·d"))
            lines.append([*line, moment, *cells, _number(heads), f"{found.error:.1%}"])
            line = [""] * len(line)
    head = ["from", *(f"N = {N}, MiB" for N in TOKENS)]
    if part == "step":
        return common.table([*head, "the peak is in"], lines)
    return common.table([*head, "peak of", "N·V·4", "N·d·4", "C·V·4", "c·V·4", "V·d·4", "error"], lines)


def _multiples(rows: Mapping[str, Any]) -> str:
    lines = []
    for path, mine in rows.items():
        held_out = next(row for row in mine if _is(row, HELD_OUT))
        s = Sizes(**held_out["sizes"])
        for moment, found in fitted(mine).items():
            measured, predicted = moments(held_out)[moment], sum(found.of(s).values())
            if not found.multiples:
                continue
            cells = [moment, str(found), f"{found.error:.1%}", f"{predicted / measured:.3f}"]
            lines.append([path.removeprefix("step from "), *cells])
    return common.table(["from", "moment", "multiples", "error", "predicted ÷ measured, held out"], lines)


def _real(rows: Mapping[str, Any]) -> str:
    columns = [extrapolated(rows, scenario) for scenario in SCENARIOS]
    lines = [[name, *(_gib(column[name]) for column in columns)] for name in columns[0]]
    sizes = REAL.student, REAL.teacher(TEACHER_KEY_VALUES)
    parameters = f"parameters of the language models: student {sizes[0] / 1e9:.2f} B, teacher {sizes[1] / 1e9:.2f} B"
    tokens = f"{REAL.responses} responses of {REAL.T:,} tokens, prompts of {REAL.image_prompt:,} and {REAL.text_prompt}"
    table = common.table(["GiB, on each GPU", *(scenario.name for scenario in SCENARIOS)], lines)
    return f"{table}\n\n{tokens}; {parameters}."


def _gib(x: float) -> str:
    return "–" if x < 0.005 * GIB else f"{x / GIB:.2f}" if x < 9.95 * GIB else f"{x / GIB:,.0f}"


def _is(row: Mapping[str, Any], s: Sizes) -> bool:
    """Whether a row is of these sizes, on one process or, where the path is sharded, on two."""
    return Sizes(**row["sizes"]) in (s, replace(s, R=2))


def _number(x: float) -> str:
    return "–" if x < 0.005 else f"{x:.0f}" if abs(x - round(x)) < 0.005 else f"{x:.2f}"


def _highest(row: Mapping[str, Any]) -> tuple[int, str]:
    """The peak over what is resident, and its phase."""
    return max((marks["peak"], phase) for phase, marks in row["phases"].items() if phase not in ("resident", "end"))
