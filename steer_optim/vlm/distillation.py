"""Decomposed distillation: its hyperparameters, its loss components, and the rule that steers them.

:mod:`steer_optim.vlm.divergences` defines the loss of a token; here tokens are gated, weighted and averaged into the
scalars that ``backward_components`` takes. If ``count`` and gate are those of the optimizer step, the sum over its
micro-batches does not depend on the split.

A new decomposition is one entry of ``DECOMPOSITIONS``, or a :class:`Decomposition` of your own.

Dimensions: ``B`` prompts, ``T`` response tokens, ``V`` vocabulary, ``N`` tokens that the mask keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from steer_optim.rules import VGS, Rule, Steer, Sum
from steer_optim.vlm.divergences import TERMS, Term, View, check_floor, check_temperature
from steer_optim.vlm.engine import weighted_sums
from steer_optim.vlm.gate import adaptive_strength, check_quantile, select_rows, visual_tokens

Prior = Literal["live", "frozen"]
Tokens = Literal["all", "visual", "rest", "graded"]
Reduction = Literal["token", "sequence"]


@dataclass(frozen=True)
class Component:
    """Define one component of a decomposition: a term over some of the tokens.

    Attributes:
        term: the divergence of each token.
        tokens: ``all``; the most ``visual`` ones, above the quantile of visual dependency; the ``rest``; or ``graded``:
            all, weighted by their visual dependency if the method is adaptive.
        factor: a number that multiplies the component, or the hyperparameter that does; if that is 0, the component is
            left out.
        less: another component that is subtracted.

    Raises:
        TypeError, ValueError: an attribute is of another kind.

    Example: see :class:`Decomposition`.
    """

    term: Term
    tokens: Tokens = "all"
    factor: Literal["gamma", "lam"] | float = 1.0
    less: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.term, Term):
            raise TypeError(f"term must be a Term; got {type(self.term).__name__}")
        if self.tokens not in get_args(Tokens):
            raise ValueError(f"tokens must be one of {', '.join(get_args(Tokens))}; got {self.tokens!r}")
        named = self.factor in ("gamma", "lam")
        if not named and not (isinstance(self.factor, (int, float)) and math.isfinite(self.factor)):
            raise ValueError(f"factor must be a finite number, 'gamma' or 'lam'; got {self.factor!r}")


@dataclass(frozen=True)
class Decomposition:
    """Define components, the rule that steers them given ``gamma``, and the defaults of their hyperparameters.

    Attributes:
        components: by name, in the order of the losses.
        rule: a function of ``gamma`` that makes the rule.
        prior: whose text-only view is the prior, where a term reads it.
        lam: the default of ``lam``.
        floor: the default of ``floor``.

    Raises:
        TypeError, ValueError: a component is not a :class:`Component`; ``less`` names no other component; ``rule`` is a
            rule itself.

    Example:
        PAPO's second term pushes the student away from its answer to a masked image, the view ``masked``.

        >>> from steer_optim import Sum
        >>> away = Term("student", {"masked": 1.0}, divergence="forward")
        >>> papo = Decomposition(
        ...     {"std": Component(TERMS["std"]), "away": Component(away, factor=-0.02)}, lambda gamma: Sum()
        ... )
        >>> DecomposedDistillation(papo).views
        ('student', 'teacher', 'masked')
    """

    components: Mapping[str, Component]
    rule: Callable[[float], Rule]
    _: KW_ONLY
    prior: Prior = "live"
    lam: float = 0.0
    floor: float | None = None

    def __post_init__(self) -> None:
        for name, part in self.components.items():
            if not isinstance(part, Component):
                raise TypeError(f"component {name!r} must be a Component; got {type(part).__name__}")
            if part.less is not None and part.less not in {n for n, p in self.components.items() if p.less is None}:
                raise ValueError(
                    f"component {name!r} subtracts {part.less!r}, which must be a component whose less is None"
                )
        if isinstance(self.rule, Rule) or not callable(self.rule):
            raise TypeError(f"rule must be a function of gamma, as lambda gamma: Sum(); got {self.rule!r}")


# The name of the visual dependency among losses; no component has it.
_SCORE = "visual dependency"
_STD, _VIS = Component(TERMS["std"]), Component(TERMS["vis"], "graded")
_LP = Component(TERMS["lang"], "visual", factor="lam")
_VGS = {"std": _STD, "vis": _VIS, "lp": _LP}
_LANGUAGE = {"std": _STD, "lang": Component(TERMS["lang"])}
_to_language = partial(VGS, toward="lang")


def _to_vision(gamma: float) -> Rule:
    return Steer("vis", gain=gamma, project="never")


def _sum(gamma: float) -> Rule:
    return Sum()


DECOMPOSITIONS: dict[str, Decomposition] = {
    "vgs-frozen": Decomposition({"std": _STD, "vis": _VIS}, VGS, prior="frozen", floor=1e-3),
    "vgs": Decomposition(_VGS, VGS, lam=0.01),
    "vgs-unscaled": Decomposition({**_VGS, "vis": replace(_VIS, factor="gamma")}, _sum, lam=0.01),
    "exact": Decomposition({"lang": replace(_STD, less="vis"), "vis": _VIS}, _to_vision),
    "tokens": Decomposition({"lang": replace(_STD, tokens="rest"), "vis": replace(_STD, tokens="visual")}, _to_vision),
    "language": Decomposition({**_LANGUAGE, "vp": replace(_LP, term=TERMS["vp"])}, _to_language, lam=0.01),
    "language-image": Decomposition({**_LANGUAGE, "vp": replace(_LP, term=TERMS["vis"])}, _to_language, lam=0.01),
    "standard": Decomposition({"std": _STD}, _sum),
    "both-views": Decomposition(_LANGUAGE, _sum),
    "forward": Decomposition({"std": Component(TERMS["forward"])}, _sum),
    "jsd": Decomposition({"std": Component(TERMS["jsd"])}, _sum),
    "vision-opd": Decomposition({"std": Component(TERMS["jsd-top100"])}, _sum),
}


@dataclass(frozen=True)
class DecomposedDistillation:
    """Distil a vision-language model on-policy, with a loss decomposed into components that a rule can steer.

    ==================  =====================================================  =======================================
    decomposition       components                                             rule
    ==================  =====================================================  =======================================
    ``vgs-frozen``      ``std``, ``vis`` with a frozen prior and a floor       ``VGS(gamma)``
    ``vgs``             ``std``, ``vis``, ``lp`` (Eqs. 13-18): the paper's     ``VGS(gamma)``
    ``vgs-unscaled``    ``std``, ``gamma * vis``, ``lp``: Eq. 17 without eta   ``Sum()``
    ``exact``           ``lang`` = ``std - vis``, ``vis``                      ``Steer("vis", gain=gamma, ...)``
    ``tokens``          ``vis``: ``std`` of the most visual tokens,            ``Steer("vis", gain=gamma, ...)``
                        ``lang``: that of the rest
    ``language``        ``std``, ``lang``, ``vp`` as printed (Eqs. 19-21)      ``VGS(gamma, toward="lang")``
    ``language-image``  the same, ``vp`` on the view with the image            ``VGS(gamma, toward="lang")``
    ``standard``        ``std`` (Eq. 3)                                        ``Sum()``
    ``both-views``      ``std``, ``lang``: distillation of both views          ``Sum()``
    ``forward``         ``std`` = ``KL(q || p)``                               ``Sum()``
    ``jsd``             ``std`` = ``JSD(1/2)``                                 ``Sum()``
    ``vision-opd``      ``std`` = ``JSD(1/2)`` on the student's top 100 ids    ``Sum()``
    ==================  =====================================================  =======================================

    The default, ``vgs-frozen``, is the variant that this project recommends (docs/evidence.md): the prior in ``q*`` is
    the initial student, so that steering keeps the student's language. ``vgs`` is the paper's method.

    ``lp`` (language preservation) is ``lam * KL(p_tx || q_tx)``, and ``vp`` (vision preservation) is ``lam * KL(p_tx ||
    q*)`` as Eq. 21 is printed, which trains the view without the image to guess it, or ``lam * KL(p || q*)``, another
    reading of the text around the equation. Both are on the most visual tokens only.

    Unsteered, ``exact`` and ``tokens`` each sum to standard distillation. ``tokens`` needs no text-only pass of the
    student and no ``q*``. With its rule it is plain reweighting, ``1 + gamma`` times the weight on the most visual
    tokens, which helped students that are too small for their teacher's language (docs/evidence.md).

    To add a policy loss (Eq. 22), pass it to the rule beside these components::

        losses = DecomposedDistillation("vgs-unscaled")(views, mask_BT)
        components = {"policy": (1 - alpha) * policy} | {name: alpha * loss for name, loss in losses.items()}

    Defaults are resolved when the object is made, so ``dataclasses.replace`` with another decomposition keeps them.

    Attributes:
        decomposition: a name of the table, or a :class:`Decomposition`.
        gamma: the strength of steering, at least 0.
        lam: the weight of ``lp`` or ``vp``, at least 0. Default: 0.01; 0 for ``vgs-frozen``.
        prior: whose text-only view is the prior in ``q*``: ``live``, the student's current one; ``frozen``, that of the
            student before training, the view ``prior``. Default: as in the table.
        quantile: a token above this quantile of visual dependency is visual; inside [0, 1), 0 for all tokens that the
            image changes.
        adaptive: whether a token's visual dependency decides how strongly ``vis`` steers it (Eqs. 24-25). In ``exact``,
            the part of ``vis`` that this removes stays in ``lang``.
        temperature: all logits are divided by it.
        reduction: ``token``, the mean over all tokens; or ``sequence``, the mean over the tokens of a response, then
            over responses (the paper). A response without tokens does not count.
        detach_prior: whether the prior is a constant in ``q*``. If False, ``vis`` also pulls the student's text-only
            view, by ``q* - p``; not possible with a frozen prior.
        floor: the smallest probability of the teacher when its visual gain is computed. Default: 1e-3 for
            ``vgs-frozen``, else none, the paper's equation. Pass 0 for none.
        chunk_size: for hidden states, how many rows of each view pass a head at once. Default: 384 on a CPU and 3072 on
            an accelerator, divided by the number of views.
        compile: for hidden states, whether ``torch.compile`` fuses the operations on the logits of a chunk.

    Raises:
        ValueError: a hyperparameter is out of range, or does not fit the decomposition.

    Example:
        Two micro-batches of one optimizer step equal one batch.

        >>> import torch
        >>> from steer_optim.vlm import visual_dependency, visual_tokens
        >>> method = DecomposedDistillation("vgs", gamma=2.0)
        >>> logits_BTV = torch.randn(4, 2, 3, 7, requires_grad=True)
        >>> views = dict(zip(("student", "student_text", "teacher", "teacher_text"), logits_BTV))
        >>> mask_BT = torch.tensor([[True, True, True], [True, False, False]])
        >>> count = method.count(mask_BT)
        >>> vds_BT = visual_dependency(views["teacher"], views["teacher_text"], mask_BT)
        >>> gate_BT = visual_tokens(vds_BT, mask_BT, quantile=method.quantile)
        >>> total = method(views, mask_BT, count=count, gate_BT=gate_BT)
        >>> def part(i):
        ...     mine = {name: view[i : i + 1] for name, view in views.items()}
        ...     return method(mine, mask_BT[i : i + 1], count=count, gate_BT=gate_BT[i : i + 1])
        >>> first, second = part(0), part(1)
        >>> {name: torch.allclose(total[name], first[name] + second[name]) for name in total}
        {'std': True, 'vis': True, 'lp': True}
        >>> method.rule()
        VGS(gamma=2.0, toward='vis')

    References:
        arXiv 2606.00564. ``exact`` and ``tokens`` are not in the paper: ``std - vis`` is ``E_p[log p_tx - log q_tx] -
        log Z*``, with ``Z*`` the normaliser of ``q*``. Vision-OPD: arXiv 2605.18740.
    """

    decomposition: str | Decomposition = "vgs-frozen"
    _: KW_ONLY
    gamma: float = 2.0
    lam: float | None = None
    prior: Prior | None = None
    quantile: float = 0.7
    adaptive: bool = False
    temperature: float = 1.0
    reduction: Reduction = "token"
    detach_prior: bool = True
    floor: float | None = None
    chunk_size: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.decomposition, str) and self.decomposition not in DECOMPOSITIONS:
            raise ValueError(f"decomposition must be one of {', '.join(DECOMPOSITIONS)}; got {self.decomposition!r}")
        for name in ("lam", "prior", "floor"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self._entry, name))
        for name, choices in (("prior", get_args(Prior)), ("reduction", get_args(Reduction))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0; got {getattr(self, name)}")
        check_quantile(self.quantile)
        check_temperature(self.temperature)
        check_floor(self.floor or None)
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, or None for the default; got {self.chunk_size}")
        parts = self._entry.components.values()
        reads = {
            "lam": (bool(self.lam), any(part.factor == "lam" for part in parts)),
            "floor": (bool(self.floor), any(part.term.floored for part in parts)),
            "prior": (self.prior == "frozen", any("prior" in part.term.views for part in parts)),
        }
        for name, (given, read) in reads.items():
            if given and not read:
                raise ValueError(
                    f"no component of {self.decomposition!r} reads {name}={getattr(self, name)!r}: leave it out, or "
                    "take another decomposition"
                )
        if self.adaptive and not any(part.tokens == "graded" for part in parts):
            raise ValueError(
                "adaptive=True needs a component with graded tokens, as vgs-frozen, vgs, vgs-unscaled and exact have; "
                f"got {self.decomposition!r}"
            )
        if self.prior == "frozen" and not self.detach_prior:
            raise ValueError("a frozen prior receives no gradient: detach_prior=False needs prior='live'")

    def __call__(
        self,
        views: Mapping[str, View],
        mask_BT: Tensor,
        *,
        count: float | Tensor | None = None,
        gate_BT: Tensor | None = None,
        strength_BT: Tensor | None = None,
        weight_BT: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss components of a micro-batch.

        Rows outside the mask are dropped before anything is computed, and may hold anything. If the mask keeps no
        token, every component is a zero with zero gradients, so that all processes can run the same backward passes.
        Selecting rows synchronizes with the device.

        Args:
            views: :attr:`views` by name, as from :func:`~steer_optim.vlm.forward.score`: logits ``(B, T, V)``,
                floating, that predict the response; or the hidden states before the head, and then no ``(B, T, V)``
                tensor is held (:mod:`steer_optim.vlm.engine`). The teacher's and the prior's may be logits beside the
                student's hidden states, and the teacher's :class:`~steer_optim.vlm.topk.TopLogProbs`.
            mask_BT: ``(B, T)``, bool, True at the response tokens that are scored.
            count: the divisor of the sums over tokens or responses: the total of :meth:`count` over all micro-batches
                of the optimizer step and all processes. If gradients are averaged over ``R`` processes rather than
                summed, as in DDP, FSDP and ``SteeredOptimizer``, pass that total divided by ``R``. Default: that of
                this micro-batch.
            gate_BT: ``(B, T)``, bool, the most visual tokens: this micro-batch's part of
                :func:`~steer_optim.vlm.gate.visual_tokens` over the optimizer step. Default: computed from this
                micro-batch.
            strength_BT: ``(B, T)``, floating, its part of :func:`~steer_optim.vlm.gate.adaptive_strength`, for
                ``adaptive`` only.
            weight_BT: ``(B, T)``, floating, a constant weight of each token in all components; see
                :func:`~steer_optim.vlm.gate.top_share`.

        Returns:
            Scalars by component, in the order of the table above, float32 or float64.

        Raises:
            TypeError: the mask or the gate is not bool, or logits are not floating.
            ValueError: shapes or devices differ; logits that the mask keeps are not finite; a view is missing, or
                requires no grad where it is trained; the count is not positive; ``strength_BT`` is given but the method
                is not adaptive; weights or strengths that the mask keeps are not finite.
        """
        if strength_BT is not None and not self.adaptive:
            raise ValueError("strength_BT is not used without adaptive=True: set it, or do not pass strength_BT")
        if missing := [name for name in self.views if name not in views]:
            raise ValueError(
                f"the decomposition {self.decomposition} reads the views {', '.join(self.views)}; missing "
                f"{', '.join(missing)}" + ("" if "prior" not in missing else ": pass a frozen copy as prior to score")
            )
        trained = {name: views[name].requires_grad for name in self._trained}
        if any(trained.values()) and not all(trained.values()):
            without = ", ".join(name for name, trains in trained.items() if not trains)
            raise ValueError(
                f"these components train the views {', '.join(trained)} (lam={self.lam}, detach_prior="
                f"{self.detach_prior}), but {without} requires no grad: its weights are frozen, or it was "
                "computed under torch.no_grad()"
            )
        if not isinstance(mask_BT, Tensor):
            raise TypeError(f"mask_BT must be a tensor, such as rollout.scored_BT; got {type(mask_BT).__name__}")
        rows = select_rows(mask_BT, **{name: views[name] for name in self.views})
        tokens = {"gate_BT": gate_BT, "strength_BT": strength_BT, "weight_BT": weight_BT}
        given = {name: _select_tokens(mask_BT, name, x.detach()) for name, x in tokens.items() if x is not None}
        if gate_BT is not None and gate_BT.dtype != torch.bool:
            raise TypeError(f"gate_BT must be bool; got {gate_BT.dtype}: select tokens with visual_tokens")
        components = self._components(rows, mask_BT, given)
        denominator = self._denominator(mask_BT, count)
        return {name: total / denominator for name, total in components.items()}

    def count(self, mask_BT: Tensor) -> Tensor:
        """Return the number that losses are averaged over: tokens, or responses with at least one token.

        Args:
            mask_BT: ``(B, T)``, bool, True at response tokens.

        Returns:
            An int64 scalar, to be summed over the micro-batches and processes of an optimizer step.

        Example:
            >>> import torch
            >>> mask_BT = torch.tensor([[True, True], [True, False], [False, False]])
            >>> int(DecomposedDistillation().count(mask_BT))
            3
            >>> int(DecomposedDistillation(reduction="sequence").count(mask_BT))
            2
        """
        return mask_BT.sum() if self.reduction == "token" else mask_BT.any(dim=-1).sum()

    @property
    def views(self) -> tuple[str, ...]:
        """The views that the components read.

        Example:
            >>> DecomposedDistillation("standard").views
            ('student', 'teacher')
            >>> DecomposedDistillation("tokens").views
            ('student', 'teacher', 'teacher_text')
        """
        parts = self._parts.values()
        names = [name for part in parts for name in part.term.views]
        if self.adaptive or self.gated:
            names += ["teacher", "teacher_text"]
        order = ("student", "student_text", "prior", "teacher", "teacher_text")
        return tuple(name for name in dict.fromkeys((*order, *names)) if name in names)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the components.

        Example:
            >>> DecomposedDistillation("vgs").components
            ('std', 'vis', 'lp')
        """
        return tuple(self._parts)

    @property
    def gated(self) -> bool:
        """Whether a component reads the most visual tokens only, or the others: ``gate_BT``.

        Example:
            >>> DecomposedDistillation("vgs").gated, DecomposedDistillation("vgs-frozen").gated
            (True, False)
        """
        return any(part.tokens in ("visual", "rest") for part in self._parts.values())

    @property
    def trains_text(self) -> bool:
        """Whether a component trains the student's view without the image; if not, that view needs no graph.

        Example:
            >>> DecomposedDistillation("vgs").trains_text, DecomposedDistillation("vgs-frozen").trains_text
            (True, False)
        """
        return "student_text" in self._trained

    @property
    def _trained(self) -> list[str]:
        parts = self._parts.values()
        return list(dict.fromkeys(name for part in parts for name in (part.term.left, *part.term.attached)))

    def rule(self) -> Rule:
        """Return the rule that steers these components, with this method's ``gamma``.

        Example:
            >>> DecomposedDistillation("standard").rule()
            Sum()
        """
        return self._entry.rule(self.gamma)

    @property
    def _entry(self) -> Decomposition:
        return DECOMPOSITIONS[self.decomposition] if isinstance(self.decomposition, str) else self.decomposition

    @property
    def _parts(self) -> dict[str, Component]:
        """The components that are not left out, with the hyperparameters applied."""
        parts = {}
        for name, part in self._entry.components.items():
            if isinstance(part.factor, str):
                part = replace(part, factor=getattr(self, part.factor))
                if part.factor == 0:
                    continue
            if "prior" in part.term.target and not self.detach_prior:
                part = replace(part, term=replace(part.term, attached=(*part.term.attached, "prior")))
            if self.prior == "live":
                part = replace(part, term=part.term.live())
            if part.tokens == "graded" and not self.adaptive:
                part = replace(part, tokens="all")
            parts[name] = part
        return parts

    def _components(self, rows: Mapping[str, View], mask_BT: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the components as sums over tokens."""
        parts, every, score = self._parts, mask_BT[mask_BT], {_SCORE: TERMS["vds"]}
        weight_N = given.get("weight_BT", torch.ones_like(every)).double()
        if self.reduction == "sequence":
            weight_N = weight_N / mask_BT.sum(dim=-1, keepdim=True).expand_as(mask_BT)[mask_BT]
        losses_of = partial(
            weighted_sums, temperature=self.temperature, chunk_size=self.chunk_size, compile=self.compile
        )
        gate_N, strength_N = given.get("gate_BT"), given.get("strength_BT")
        totals: dict[str, Tensor] = {}
        vds_N = None
        if self.adaptive and strength_N is None:
            vds_N = losses_of(rows, score, {})[1][_SCORE]
            strength_N = adaptive_strength(vds_N, every)
        graded_N = weight_N if strength_N is None else weight_N * strength_N
        # The heads are not applied to tokens that are not selected.
        for tokens in ("all", "visual", "rest"):
            mine = {n: p for n, p in parts.items() if p.tokens == tokens or (tokens == "all" and p.tokens == "graded")}
            if not mine:
                continue
            where: slice | Tensor = slice(None)
            if tokens != "all":
                if gate_N is None:
                    vds_N = losses_of(rows, score, {})[1][_SCORE] if vds_N is None else vds_N
                    gate_N = visual_tokens(vds_N, every, quantile=self.quantile)
                where = (gate_N if tokens == "visual" else ~gate_N).nonzero().squeeze(1)
            terms = {name: part.term for name, part in mine.items()}
            weights = {
                n: float(p.factor) * (graded_N if p.tokens == "graded" else weight_N)[where] for n, p in mine.items()
            }
            if tokens == "all" and self.gated and gate_N is None and not any(term.top for term in terms.values()):
                terms |= score  # from the same logits
            kept = {name: x if tokens == "all" else x[where] for name, x in rows.items()}
            sums, losses = losses_of(kept, terms, weights, floor=self.floor or None)
            totals |= sums
            vds_N = losses.get(_SCORE, vds_N)
        return {n: totals[n] - totals[p.less] if p.less in totals else totals[n] for n, p in parts.items()}

    def _denominator(self, mask_BT: Tensor, count: float | Tensor | None) -> float:
        here = float(self.count(mask_BT))
        total = here if count is None else float(count)
        if not (0 < total < math.inf or here == total == 0):
            raise ValueError(
                f"count must be the positive number of {self.reduction}s of the optimizer step; got {total}, and "
                f"this micro-batch alone has {here:g}: pass count(mask_BT), summed over the step"
            )
        # A step without any token has zero sums, and their mean is zero.
        return total or 1.0


def _select_tokens(mask_BT: Tensor, name: str, x_BT: Tensor) -> Tensor:
    if x_BT.shape != mask_BT.shape or x_BT.device != mask_BT.device:
        raise ValueError(
            f"{name} must be {tuple(mask_BT.shape)} on {mask_BT.device}, like mask_BT; got {tuple(x_BT.shape)} on "
            f"{x_BT.device}: pass its part for the tokens of this micro-batch"
        )
    x_N = x_BT[mask_BT]
    if not x_N.isfinite().all():
        raise ValueError(f"{name} must be finite at every token that mask_BT keeps; found NaN or infinity")
    return x_N
