"""The divergence of each loss, and the two distributions it compares.

A *view* is a model's next-token distribution for the response, given the prompt with or without its image: ``student``
and ``teacher`` with the image, ``student_text`` and ``teacher_text`` without it, and ``prior`` for the text-only view
whose language the visual target keeps. A term pulls one view towards the target ``softmax(sum of c * log view)``::

    std   KL(student || teacher)                                            Eq. 3
    vis   KL(student || q*),  log q* = log prior + log teacher - log teacher_text + const.    Eqs. 10, 11
    lang  KL(student_text || teacher_text)                                  Eq. 6
    vp    KL(student_text || q*)                                            Eq. 21 as printed
    vds   KL(teacher || teacher_text), the visual dependency score          Eq. 12

All losses read this table: :func:`token_losses` is the eager oracle, differentiated by autograd;
:mod:`steer_optim.vlm.engine` computes the same values and gradients a chunk of tokens at a time, with the gradients of
:func:`value_and_gradients`.

Dimensions: ``B`` prompts, ``T`` response tokens, ``V`` vocabulary entries.

References: *Decomposed On-Policy Distillation for Vision-Language Reasoning: Steering Gradients for Visual Grounding*,
arXiv 2606.00564; JSD(β): Agarwal et al., *On-Policy Distillation of Language Models* (GKD), arXiv 2306.13649.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from steer_optim.vlm.heads import HiddenStates
from steer_optim.vlm.topk import ABSENT, TopLogProbs, check_ids, collapse, empty_bins, heaviest

View = Tensor | HiddenStates | TopLogProbs
Kind = Literal["reverse", "forward", "jsd"]


@dataclass(frozen=True)
class Term:
    """Define one divergence per token: ``D(left, softmax(sum of c * log view))``.

    Attributes:
        left: the view that is trained.
        target: the coefficient ``c`` of each view in the target, which is normalised and constant.
        divergence: ``reverse`` is ``KL(left || target)``, ``forward`` is ``KL(target || left)``, and ``jsd`` is ``beta
            * KL(target || m) + (1 - beta) * KL(left || m)`` with ``m = beta * target + (1 - beta) * left``.
        beta: for ``jsd``, inside (0, 1).
        attached: views of the target that receive a gradient too.
        floored: views of the target whose probabilities are raised to ``floor``, if one is given.
        top: a view and ``k``: the divergence uses the ``k`` most likely ids of this view and one bin for the rest. None
            for the full vocabulary.

    Raises:
        ValueError: the divergence is unknown; ``beta`` or ``top`` is out of range; the target is empty, or a
            coefficient is not a finite number; an attached or floored view is not in it, or a view is both.

    Example:
        A target that extrapolates the teacher's visual gain.

        >>> Term("student", {"teacher": 2.0, "teacher_text": -1.0}, divergence="forward").views
        ('student', 'teacher', 'teacher_text')
    """

    left: str
    target: Mapping[str, float]
    _: KW_ONLY
    divergence: Kind = "reverse"
    beta: float = 0.5
    attached: tuple[str, ...] = ()
    floored: tuple[str, ...] = ()
    top: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Kind):
            raise ValueError(f"divergence must be one of {', '.join(get_args(Kind))}; got {self.divergence!r}")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must be inside (0, 1): 0 and 1 are 'forward' and 'reverse'; got {self.beta}")
        if not self.target or not all(isinstance(c, int | float) and math.isfinite(c) for c in self.target.values()):
            raise ValueError(f"target must be at least one view with a finite number for each; got {self.target}")
        if self.top is not None and self.top[1] < 1:
            raise ValueError(f"top must be a view and at least one id; got {self.top}")
        if both := {*self.attached} & {*self.floored}:
            raise ValueError(f"a view must be attached or floored, not both; got {', '.join(sorted(both))} in both")
        if unread := {*self.attached, *self.floored} - {*self.target}:
            raise ValueError(f"attached and floored must be views of the target; got {', '.join(sorted(unread))}")

    @property
    def views(self) -> tuple[str, ...]:
        """All views that are read."""
        return tuple(dict.fromkeys([self.left, *self.target, *(self.top or ())[:1]]))

    def live(self) -> Term:
        """Return the same term with the student's own text-only view as the prior."""

        def own(name: str) -> str:
            return "student_text" if name == "prior" else name

        target: dict[str, float] = {}
        for name, coefficient in self.target.items():
            target[own(name)] = target.get(own(name), 0.0) + coefficient
        attached, floored = tuple(dict.fromkeys(map(own, self.attached))), tuple(map(own, self.floored))
        top = None if self.top is None else (own(self.top[0]), self.top[1])
        return replace(self, left=own(self.left), target=target, attached=attached, floored=floored, top=top)


_Q_STAR = {"prior": 1.0, "teacher": 1.0, "teacher_text": -1.0}
_FLOORED = ("teacher", "teacher_text")
TERMS: dict[str, Term] = {
    "std": Term("student", {"teacher": 1.0}),
    "vis": Term("student", _Q_STAR, floored=_FLOORED),
    "lang": Term("student_text", {"teacher_text": 1.0}),
    "vp": Term("student_text", _Q_STAR, floored=_FLOORED),
    "vds": Term("teacher", {"teacher_text": 1.0}),
    "forward": Term("student", {"teacher": 1.0}, divergence="forward"),
    "jsd": Term("student", {"teacher": 1.0}, divergence="jsd"),
    # Vision-OPD (arXiv 2605.18740): the teacher is a frozen or averaged student that sees another image.
    "jsd-top100": Term("student", {"teacher": 1.0}, divergence="jsd", top=("student", 100)),
}


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``KL(p || q)`` over the last dimension, from log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def divergence(term: Term, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the divergence of ``term`` between its left view and its target, ``(...)``, differentiable."""
    if term.divergence == "reverse":
        return kl(log_p, log_q)
    if term.divergence == "forward":
        return kl(log_q, log_p)
    log_m = _mixture(term, log_p, log_q)
    return term.beta * kl(log_q, log_m) + (1 - term.beta) * kl(log_p, log_m)


def value_and_gradients(
    term: Term, log_p: Tensor, log_q: Tensor, *, attached: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the value of :func:`divergence`, and its gradients at the logits of the left view and of the target.

    With ``r = log(p / m)``, the gradient of ``KL(p || m)`` at the logits of ``p`` is ``p (r - E_p r)``, and at those of
    ``m`` it is ``m - p``; both sum to zero over the vocabulary. In JSD the contributions through ``m`` cancel. The
    gradient at the target is None unless views of it are ``attached``.
    """
    if term.divergence == "reverse":
        value, left = _pulled(log_p, log_q)
        return value, left, log_q.exp().sub_(log_p.exp()) if attached else None
    if term.divergence == "forward":
        value, target = _pulled(log_q, log_p)
        return value, log_p.exp().sub_(log_q.exp()), target
    log_m = _mixture(term, log_p, log_q)
    (value_p, left), (value_q, target) = _pulled(log_p, log_m), _pulled(log_q, log_m)
    beta = term.beta
    return beta * value_q + (1 - beta) * value_p, left.mul_(1 - beta), target.mul_(beta)


def _pulled(log_p: Tensor, log_m: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    product = (log_p - log_m).mul_(p)
    value = product.sum(-1, keepdim=True)
    return value.squeeze(-1), product.addcmul_(p, value, value=-1)


def _mixture(term: Term, log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_q + math.log(term.beta), log_p + math.log1p(-term.beta))


def log_target(term: Term, log_probs: Mapping[str, Tensor], floor: float | None, empty: Tensor | None = None) -> Tensor:
    """Return the log-probabilities of the target, from those of the views; ``empty`` bins get no mass."""
    parts = []
    for name, coefficient in term.target.items():
        log_q = log_probs[name] if name in term.attached else log_probs[name].detach()
        if floor is not None and name in term.floored:
            log_q = log_q.clamp(min=math.log(floor))
        parts.append(log_q if coefficient == 1 else coefficient * log_q)
    normalised = list(term.target.values()) == [1] and (floor is None or not term.floored)
    total = reduce(torch.add, parts)
    total = total if empty is None else total.masked_fill(empty, ABSENT)
    return total if normalised else total.log_softmax(-1)


def token_losses(
    views: Mapping[str, Tensor | TopLogProbs],
    *,
    terms: Mapping[str, Term] | None = None,
    temperature: float = 1.0,
    floor: float | None = None,
) -> dict[str, Tensor]:
    """Return the divergences of each token, before any gate, weight or mean. The eager oracle of the fast forms.

    All computations are in float32 or float64, and every ``(..., V)`` intermediate is held. If the vocabularies of
    student and teacher differ in size, as with padded heads, all views are cut to the common ids and renormalised; an
    id must mean the same token in both. The check for finite logits synchronizes with the device once.

    Args:
        views: logits ``(..., V)`` by the name of the view, floating, or :class:`~steer_optim.vlm.topk.TopLogProbs` of a
            teacher. ``prior`` defaults to ``student_text``.
        terms: by the name of the loss. Default: ``std``, ``vis``, ``lang``, ``vp`` and ``vds`` of ``TERMS``, as far as
            their views are given.
        temperature: all logits are divided by it; the losses are not multiplied by its square.
        floor: the smallest probability of the teacher when its visual gain ``log q - log q_tx`` is computed; without
            it, a peaked teacher makes the gain unbounded. None is the paper's equation.

    Returns:
        ``(...)`` each, differentiable. If a floor is given and ``vis`` is computed, also ``floored``: the mass of ``p``
        on entries whose visual gain the floor changed, in [0, 1], a constant.

    Raises:
        TypeError: logits are not floating.
        ValueError: shapes or devices differ; a view is missing; logits are not finite; ``temperature`` or ``floor`` is
            out of range.

    Example:
        >>> import torch
        >>> logits = torch.randn(4, 5, 11).unbind()
        >>> losses = token_losses(dict(zip(("student", "student_text", "teacher", "teacher_text"), logits)))
        >>> list(losses), losses["vis"].shape
        (['std', 'vis', 'lang', 'vp', 'vds'], torch.Size([5]))

    References:
        arXiv 2606.00564, Eqs. 3, 6, 10-12, 16, 21.
    """
    check_temperature(temperature)
    check_floor(floor)
    every = {name: TERMS[name] for name in ("std", "vis", "lang", "vp", "vds")} if terms is None else terms
    if "prior" not in views:
        every = {name: term.live() for name, term in every.items()}
    terms = {name: term for name, term in every.items() if terms or views.keys() >= {*term.views}}
    check_inputs(views, terms, temperature)
    log_probs = _log_probs(views, [name for term in terms.values() for name in term.views], temperature)
    losses: dict[str, Tensor] = {}
    ids = next((x.ids_BTk for x in views.values() if isinstance(x, TopLogProbs)), None)
    for name, term in terms.items():
        seen = log_probs
        if term.top is not None:
            ids = heaviest(log_probs[term.top[0]].detach(), term.top[1])
            seen = {view: collapse(x, ids) for view, x in log_probs.items()}
        empty = None if ids is None else empty_bins(ids, common_vocabulary(views))
        losses[name] = divergence(term, seen[term.left], log_target(term, seen, floor, empty))
    refuse_overflow(losses.values())
    if floor is not None and "vis" in terms and terms["vis"].floored:
        gains = (log_probs["teacher"], log_probs["teacher_text"])
        raised = [x.clamp(min=math.log(floor)) for x in gains]
        changed = raised[0] - raised[1] != gains[0] - gains[1]
        losses["floored"] = (log_probs[terms["vis"].left].detach().exp() * changed).sum(-1)
    return losses


def common_vocabulary(views: Mapping[str, View]) -> int:
    """Return the number of ids that all views share, unread views included; 0 if all are a server's."""
    return min([view.shape[-1] for view in views.values() if not isinstance(view, TopLogProbs)], default=0)


def _log_probs(
    views: Mapping[str, Tensor | TopLogProbs], names: Iterable[str], temperature: float
) -> dict[str, Tensor]:
    """Return float32 or float64 log-probabilities over the common vocabulary, or over the bins of a server's ids."""
    V, scaled = common_vocabulary(views), {}
    for name in dict.fromkeys(names):
        if isinstance(x := views[name], Tensor):
            scaled[name] = x[..., :V].to(torch.promote_types(x.dtype, torch.float32)) / temperature
    # One check for all inputs, because every read synchronizes with the device.
    if scaled:
        finite = torch.stack([x.isfinite().all() for x in scaled.values()]).tolist()
        refuse_non_finite([name for name, ok in zip(scaled, finite, strict=True) if not ok])
    log_probs = {name: x.log_softmax(-1) for name, x in scaled.items()}
    servers = {name: x for name, x in views.items() if isinstance(x, TopLogProbs)}
    if servers:
        ids = next(iter(servers.values())).ids_BTk
        log_probs = {name: collapse(x, ids) for name, x in log_probs.items()}
    return log_probs | {name: x.bins() for name, x in servers.items()}


def check_inputs(views: Mapping[str, View], terms: Mapping[str, Term], temperature: float) -> None:
    """Raise TypeError or ValueError if a view is missing, or the views do not have the same rows.

    ``name`` and ``name_text`` are the two views of one model.
    """
    for loss, term in terms.items():
        if missing := [name for name in term.views if name not in views]:
            raise ValueError(
                f"the loss {loss!r} reads {', '.join(term.views)}; missing {', '.join(missing)}: score computes all "
                "views of a decomposition"
            )
    if len({term.top for term in terms.values()}) > 1:
        raise ValueError("all losses must be over the same ids: give all terms the same top, or none")
    first_name, first = next(iter(views.items()))
    servers = [x for x in views.values() if isinstance(x, TopLogProbs)]
    for name, x in views.items():
        if isinstance(x, Tensor) and not x.is_floating_point():
            raise TypeError(f"{name} must be floating logits; got {x.dtype}")
        if x.device != first.device:
            raise ValueError(
                f"all views must be on one device; {first_name} is on {first.device} and {name} on {x.device}"
            )
        if x.shape[:-1] != first.shape[:-1]:
            raise ValueError(
                f"all views must have the same shape, except for the last dimension; {first_name} is "
                f"{tuple(first.shape)} and {name} {tuple(x.shape)}: score the same response tokens in every view"
            )
        twin_name = name.removesuffix("_text")
        twin = views.get(twin_name, x)
        heads = [view.head for view in (x, twin) if isinstance(view, HiddenStates)]
        if type(x) is not type(twin) or x.shape != twin.shape or (heads and not heads[0].same(heads[1])):
            raise ValueError(
                f"{twin_name} and {name} are two views of one model: both must be logits of one shape, or both hidden "
                "states under one head: pass the head of one to response_states of the other. Name the text-only view "
                "of a frozen copy of the student prior"
            )
        if isinstance(x, TopLogProbs):
            if temperature != 1:
                raise ValueError(f"TopLogProbs are valid at temperature 1 only; got {temperature}: pass temperature=1")
            if name in {term.left for term in terms.values()} - {"teacher"} or not x.ids_BTk.equal(servers[0].ids_BTk):
                raise ValueError(
                    f"{name} must be a view of the teacher over the ids of the teacher's other views, and not trained: "
                    "pass both views through steer_optim.vlm.intersect, or score the same ids in both"
                )
    if servers:
        check_ids(servers[0].ids_BTk, common_vocabulary(views))
        if any(term.top for term in terms.values()):
            raise ValueError("a loss on the student's top ids needs the teacher's logits or hidden states")


def refuse_non_finite(names: Sequence[str]) -> None:
    """Raise ValueError if ``names``, the views with logits that are not finite, is not empty."""
    if names:
        raise ValueError(
            f"logits must be finite in every response row; found NaN or infinity in {', '.join(names)}. If entries of "
            "the vocabulary are masked with -inf, pass the logits from before that mask"
        )


def refuse_overflow(losses: Iterable[Tensor]) -> None:
    """Raise ValueError if a loss of finite logits is NaN."""
    if torch.stack([x.isnan().any() for x in losses]).any():
        raise ValueError(
            "the logits are finite, but their sums overflow in a target: if entries of the vocabulary are masked with "
            "the smallest number of the dtype, mask them with -1e4"
        )


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature}")


def check_floor(floor: float | None) -> None:
    """Raise ValueError unless ``floor`` is None or a probability inside (0, 1)."""
    if floor is not None and not 0 < floor < 1:
        raise ValueError(f"floor must be a probability inside (0, 1), or None for no floor; got {floor}")
