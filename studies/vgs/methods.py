"""The methods that are compared, as data: loss components, the rule that weighs them, and how often it is asked.

A method is named by a base and changes to it: ``vgs``, ``vgs,lam=0.3``, ``vgs,floor=1e-3,refresh_every=10``. Changes
are fields of :class:`Method` or of the ``DecomposedDistillation`` that it trains on.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import Tensor

from steer_optim import VGS, PCGrad, Steer
from steer_optim.rules import PCD, Rule
from steer_optim.steering import Scope
from steer_optim.vlm import DecomposedDistillation, token_losses
from steer_optim.vlm.distillation import Component, Decomposition
from steer_optim.vlm.divergences import TERMS

FOREVER = 10**9


@dataclass(frozen=True)
class Method:
    """How one student is trained.

    Attributes:
        losses: the components, with their hyperparameters.
        rule: how they are weighed, given ``losses``; by default as the paper does.
        scope: over which parameters one Gramian is taken.
        refresh_every: in how many steps it is taken once; ``FOREVER`` keeps the weights of the first step, which for
            VGS is the paper's fixed eta.
        prior: whose text-only view is the prior in ``q*``: the student's own (``live``), that of the initial student
            (``frozen``), or of an average of the student over about ``1 / (1 - 0.99)`` steps (``ema``).
        trains: the whole student, or its ``eye`` alone, the tower and what joins it to the decoder: then its language
            cannot change.
        text: the weight of a further component ``text``, ``KL(p_tx || q_tx)`` over all tokens; absent where it is 0.
        off_policy: whether the responses are the right answers of the teacher's kind, not samples of the student.
        reward: the share of GRPO on right answers in the loss, ``1 - alpha`` of Eq. 22; 1 is GRPO alone.
        weight: a factor of the distillation in that mixture.
    """

    losses: DecomposedDistillation
    rule: Callable[[DecomposedDistillation], Rule] = DecomposedDistillation.rule
    scope: Scope = "model"
    refresh_every: int = 1
    prior: Literal["live", "frozen", "ema"] = "live"
    trains: Literal["everything", "eye"] = "everything"
    text: float = 0.0
    off_policy: bool = False
    reward: float = 0.0
    weight: float = 1.0

    @property
    def views(self) -> tuple[str, ...]:
        """The views that the components read."""
        text = ("student_text", "teacher_text") if self.text else ()
        return tuple(dict.fromkeys([*self._losses.views, *text]))

    @property
    def trains_text(self) -> bool:
        """Whether the student also learns without the image."""
        return self._losses.trains_text or self.text > 0

    def components(self, views: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, Tensor]:
        """The components of a step, from logits ``(B, T, V)`` by view and the tokens of the responses."""
        components = self._losses(views, mask_BT)
        if self.text:
            text_BT = token_losses(views, terms={"text": TERMS["lang"]})["text"]
            components["text"] = self.text * text_BT[mask_BT].mean()
        return components

    @property
    def _losses(self) -> DecomposedDistillation:
        """With the prior from a view of its own, where it is not live."""
        return self.losses if self.prior == "live" else replace(self.losses, prior="frozen")


# The most visual tokens once more, towards the teacher's gain on the prior of a frozen copy.
_visual_frozen = Decomposition(
    {"std": Component(TERMS["std"]), "vis": Component(TERMS["vis"], "visual")}, VGS, prior="frozen", floor=1e-3
)
_tokens = DecomposedDistillation("tokens")
_exact = DecomposedDistillation("exact", gamma=0.0)
BASES = {
    "standard": Method(DecomposedDistillation("standard")),
    "vgs": Method(DecomposedDistillation("vgs")),
    "vgs-frozen": Method(DecomposedDistillation("vgs-frozen"), prior="frozen"),
    "language": Method(DecomposedDistillation("language")),
    "fixed": Method(DecomposedDistillation("vgs"), refresh_every=FOREVER),
    # std weighted by 1 + gamma on the most visual tokens: neither q* nor a text-only view of the student.
    "reweighting": Method(_tokens, lambda losses: Steer("vis", gain=losses.gamma, project="never")),
    "tokens": Method(_tokens, lambda losses: Steer("vis", gain=losses.gamma)),
    "reweighting-frozen": Method(DecomposedDistillation(_visual_frozen), prior="frozen"),
    # On the exact split std = lang + vis; gamma is the gain here.
    "steer": Method(_exact, lambda losses: Steer("vis", gain=losses.gamma)),
    "pcd": Method(_exact, lambda losses: PCD("vis")),
    "pcgrad": Method(_exact, lambda losses: PCGrad()),
    # The language prior comes first: nothing that vis or the rest want may hurt the text-only view.
    "guard": Method(_exact, lambda losses: Steer("text", preserve_norm=False), text=0.1),
    "grpo": Method(DecomposedDistillation("standard"), reward=1.0),
    "grpo+standard": Method(DecomposedDistillation("standard"), reward=0.7),
    "grpo+vgs": Method(DecomposedDistillation("vgs"), reward=0.7),
}


def parse(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is no such base, or no such field.
    """
    base, *changes = name.split(",")
    if base not in BASES:
        raise ValueError(f"a method begins with one of {', '.join(BASES)}; got {name!r}")
    method = BASES[base]
    own = {field.name for field in fields(Method)} - {"losses", "rule"}
    theirs = {field.name for field in fields(DecomposedDistillation)}
    for change in changes:
        key, _, text = change.partition("=")
        if key not in own | theirs:
            raise ValueError(f"a change is one of {', '.join(sorted(own | theirs))}; got {change!r} in {name!r}")
        if key in own:
            method = replace(method, **{key: _value(text)})
        else:
            method = replace(method, losses=replace(method.losses, **{key: _value(text)}))
    return method


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
