"""Decomposed distillation as one object: its hyperparameters, its loss components, and the rule that steers them.

:mod:`steer_optim.vlm.losses` says what a token contributes; here the tokens are gated, weighted and averaged into the
scalars that ``backward_components`` takes. Given the count and the gate of the whole optimizer step, the sum over
its micro-batches does not depend on how it was split.

Dimensions: ``B`` prompts, ``T`` response tokens, ``V`` vocabulary entries, ``N`` tokens that the mask keeps.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal, TypedDict, get_args

import torch
from torch import Tensor

from steer_optim.rules import VGS, Rule, Steer, Sum
from steer_optim.vlm.chunked import ChunkedLosses, check_chunk_size
from steer_optim.vlm.gate import adaptive_strength, check_quantile, visual_tokens
from steer_optim.vlm.heads import HiddenStates
from steer_optim.vlm.losses import EagerLosses, check_floor, check_temperature, select_rows

Decomposition = Literal["vgs", "standard", "exact", "language"]
Reduction = Literal["token", "sequence"]


class _Options(TypedDict):
    temperature: float
    detach_prior: bool
    floor: float | None


@dataclass(frozen=True)
class DecomposedDistillation:
    """On-policy distillation of a vision-language model, decomposed into components that a rule can steer.

    =============  ==========================================  ==========================================
    decomposition  components                                  rule
    =============  ==========================================  ==========================================
    ``vgs``        ``std``, ``vis``, ``lp`` (Eqs. 13-18)       ``VGS(gamma)``
    ``standard``   ``std`` (Eq. 3)                             ``Sum()``
    ``exact``      ``lang`` = ``std - vis``, ``vis``           ``Steer(toward="vis", gain=gamma, ...)``
    ``language``   ``std``, ``lang``, ``vp`` (Eqs. 19-21)      ``VGS(gamma, toward="lang")``
    =============  ==========================================  ==========================================

    ``lp`` (language preservation) is ``lam * KL(p_tx || q_tx)`` and ``vp`` (vision preservation)
    ``lam * KL(p_tx || q*)``, both on the most visual tokens only; they are absent where ``lam`` is 0.
    Unsteered, the sum of the exact decomposition is standard distillation.

    Attributes:
        decomposition: which components, as above.
        gamma: how much further the rule steers, at least 0.
        lam: the weight of ``lp`` or ``vp``, at least 0.
        quantile: of visual dependency, above which a token counts as visual; inside [0, 1), 0 for all of them.
        adaptive: whether a token's visual dependency decides how strongly ``vis`` steers it (Eqs. 24-25). What the
            strength takes from ``vis`` stays in ``lang`` in the exact decomposition.
        temperature: all logits are divided by it.
        reduction: the mean over all tokens (``token``), or over the tokens of a response and then over
            responses (``sequence``, the paper). A response without any token does not count as one.
        detach_prior: whether ``p_tx`` is a constant in ``q*``; see :func:`~steer_optim.vlm.losses.token_losses`.
        floor: on the teacher's probabilities before its visual gain is taken; None for the paper's equation.
        chunk_size: of hidden states, how many rows meet a head at once; by default 128 on a CPU, 1024 elsewhere.
        compile: whether ``torch.compile`` fuses what happens to the logits of a chunk; of hidden states only.

    Raises:
        ValueError: a hyperparameter is out of range, or ``adaptive`` with a decomposition that has no ``vis``.

    Example:
        Two micro-batches of one optimizer step, as if they were one batch.

        >>> import torch
        >>> from steer_optim.vlm import visual_dependency, visual_tokens
        >>> method = DecomposedDistillation(gamma=2.0)
        >>> logits_BTV = torch.randn(4, 2, 3, 7, requires_grad=True)
        >>> mask_BT = torch.tensor([[True, True, True], [True, False, False]])
        >>> count = method.count(mask_BT)
        >>> vds_BT = visual_dependency(logits_BTV[2], logits_BTV[3], mask_BT)
        >>> gate_BT = visual_tokens(vds_BT, mask_BT, quantile=method.quantile)
        >>> whole = method(*logits_BTV, mask_BT, count=count, gate_BT=gate_BT)
        >>> first = method(*logits_BTV[:, :1], mask_BT[:1], count=count, gate_BT=gate_BT[:1])
        >>> second = method(*logits_BTV[:, 1:], mask_BT[1:], count=count, gate_BT=gate_BT[1:])
        >>> {name: torch.allclose(whole[name], first[name] + second[name]) for name in whole}
        {'std': True, 'vis': True, 'lp': True}
        >>> method.rule()
        VGS(gamma=2.0, toward='vis')

    References:
        arXiv 2606.00564. The exact decomposition is not in the paper: ``std - vis`` is
        ``E_p[log p_tx - log q_tx] - log Z*``, with ``Z*`` the normaliser of ``q*``.
    """

    decomposition: Decomposition = "vgs"
    _: KW_ONLY
    gamma: float = 2.0
    lam: float = 0.01
    quantile: float = 0.7
    adaptive: bool = False
    temperature: float = 1.0
    reduction: Reduction = "token"
    detach_prior: bool = True
    floor: float | None = None
    chunk_size: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("decomposition", get_args(Decomposition)), ("reduction", get_args(Reduction))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0; got {getattr(self, name)}")
        check_quantile(self.quantile)
        check_temperature(self.temperature)
        check_floor(self.floor)
        check_chunk_size(self.chunk_size)
        if self.adaptive and self.decomposition not in ("vgs", "exact"):
            raise ValueError(
                "adaptive scales the component vis, which the decompositions vgs and exact have; got "
                f"{self.decomposition!r}"
            )

    def __call__(
        self,
        student_BTV: Tensor | HiddenStates,
        student_text_BTV: Tensor | HiddenStates | None,
        teacher_BTV: Tensor | HiddenStates,
        teacher_text_BTV: Tensor | HiddenStates | None,
        mask_BT: Tensor,
        *,
        count: float | Tensor | None = None,
        gate_BT: Tensor | None = None,
        strength_BT: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss components of a micro-batch.

        Rows that the mask drops are never computed with, and may hold anything. Without a single token every
        component is a zero with zero gradients, so that all replicas can run the same backward passes. Selecting
        rows waits for the device.

        Args:
            student_BTV: ``(B, T, V)``, floating, the student's logits that predict the response, with the image; or
                the hidden states that they would be computed from, for all four: then no ``(B, T, V)`` tensor is held
                (:mod:`steer_optim.vlm.chunked`). The teacher's two may be logits beside the student's states.
            student_text_BTV: ``(B, T, V)``, those without the image: the student's, or those of a frozen copy of the
                student as it was, whose language is then what ``vis`` keeps; ``lam`` must be 0 with such a copy,
                which ``lp`` could not train. The decomposition ``standard`` does not read the text-only views; they
                may be None there.
            teacher_BTV: ``(B, T, V')``, floating, the teacher's logits with the image.
            teacher_text_BTV: ``(B, T, V')``, those without the image.
            mask_BT: ``(B, T)``, bool, True at response tokens.
            count: what the sums over tokens or responses are divided by: :meth:`count` of all micro-batches of the
                optimizer step, and of all replicas. Where gradients are averaged over ``R`` replicas and not
                summed, as by DDP, FSDP and ``SteeredOptimizer``, pass that total divided by ``R``. By default that
                of this micro-batch.
            gate_BT: ``(B, T)``, bool, the tokens that ``lp`` or ``vp`` keep: the part for this micro-batch of
                :func:`~steer_optim.vlm.gate.visual_tokens` over the optimizer step. By default the tokens given
                here are gated among themselves.
            strength_BT: ``(B, T)``, floating, likewise of :func:`~steer_optim.vlm.gate.adaptive_strength`, for
                ``adaptive`` only.

        Returns:
            Scalars by component, in the order of the table above, float32 or float64.

        Raises:
            TypeError: the mask or the gate is not bool, or logits are not floating.
            ValueError: shapes or devices do not fit each other; logits that the mask keeps are not finite; a
                text-only view is missing, or requires no grad where it is trained; the count is not positive; a
                strength is given to a method that is not adaptive.
        """
        if strength_BT is not None and not self.adaptive:
            raise ValueError("strength_BT is read by an adaptive method only: set adaptive=True or do not pass it")
        views = {"student": student_BTV, "teacher": teacher_BTV}
        if self.decomposition != "standard":
            if student_text_BTV is None or teacher_text_BTV is None:
                raise ValueError(
                    f"the decomposition {self.decomposition} needs student_text_BTV and teacher_text_BTV, the logits "
                    "without the image; got None. Only the decomposition standard does without"
                )
            views |= {"student_text": student_text_BTV, "teacher_text": teacher_text_BTV}
            if self.trains_text and student_BTV.requires_grad and not student_text_BTV.requires_grad:
                raise ValueError(
                    f"decomposition={self.decomposition!r} with lam={self.lam} and detach_prior={self.detach_prior} "
                    "trains the student without the image, but student_text_BTV requires no grad: compute it outside "
                    "torch.no_grad(); or, where it is a frozen copy's, take 'vgs' or 'exact' with lam=0 and "
                    "detach_prior=True"
                )
        rows = select_rows(mask_BT, **views)
        gate_N = None if gate_BT is None else _select_tokens(mask_BT, "gate_BT", gate_BT)
        strength_N = None if strength_BT is None else _select_tokens(mask_BT, "strength_BT", strength_BT)
        if gate_N is not None and gate_N.dtype != torch.bool:
            raise TypeError(f"gate_BT must be bool; got {gate_N.dtype}: select tokens with visual_tokens")

        components = self._components(self._losses(rows), mask_BT, gate_N, strength_N)
        denominator = self._denominator(mask_BT, count)
        return {name: total / denominator for name, total in components.items()}

    def count(self, mask_BT: Tensor) -> Tensor:
        """What the losses of ``mask_BT`` are averaged over: its tokens, or its responses that have a token.

        Returns:
            An int64 scalar, to be summed over the micro-batches and replicas of an optimizer step.

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
    def trains_text(self) -> bool:
        """Whether a component reaches the student's view without the image: where not, it needs no graph.

        Example:
            >>> DecomposedDistillation(lam=0.01).trains_text, DecomposedDistillation(lam=0.0).trains_text
            (True, False)
        """
        preserved = {"vgs": self.lam > 0, "language": True, "standard": False, "exact": False}
        return preserved[self.decomposition] or (not self.detach_prior and self.decomposition != "standard")

    def rule(self) -> Rule:
        """The rule that steers these components as the paper does, with this method's ``gamma``.

        Example:
            >>> DecomposedDistillation("standard").rule()
            Sum()
        """
        if self.decomposition == "standard":
            return Sum()
        if self.decomposition == "exact":
            return Steer(toward="vis", gain=self.gamma, project="never")
        return VGS(self.gamma, toward="vis" if self.decomposition == "vgs" else "lang")

    def _losses(self, rows: dict[str, Tensor | HiddenStates]) -> EagerLosses | ChunkedLosses:
        logits = {name: row for name, row in rows.items() if isinstance(row, Tensor)}
        options = _Options(temperature=self.temperature, detach_prior=self.detach_prior, floor=self.floor)
        if len(logits) == len(rows):
            return EagerLosses(logits, **options)
        return ChunkedLosses(rows, **options, chunk_size=self.chunk_size, compile=self.compile)

    def _components(
        self, losses: EagerLosses | ChunkedLosses, mask_BT: Tensor, gate_N: Tensor | None, strength_N: Tensor | None
    ) -> dict[str, Tensor]:
        """The components as sums over tokens, which the count turns into means."""
        every = mask_BT[mask_BT]
        weight_N = torch.ones_like(every, dtype=losses.dtype)
        if self.reduction == "sequence":
            weight_N = weight_N / mask_BT.sum(dim=-1, keepdim=True).expand_as(mask_BT)[mask_BT]
        steered_N = weight_N
        if self.adaptive:
            strength = adaptive_strength(losses.vds_N, every) if strength_N is None else strength_N
            steered_N = weight_N * strength.to(weight_N.dtype)

        if self.decomposition == "standard":
            return losses.weighted({"std": weight_N})
        if self.decomposition == "exact":
            total = losses.weighted({"std": weight_N, "vis": steered_N})
            return {"lang": total["std"] - total["vis"], "vis": total["vis"]}
        if self.decomposition == "vgs":
            components, preserving, preserved = {"std": weight_N, "vis": steered_N}, "lp", "lang"
        else:
            components, preserving, preserved = {"std": weight_N, "lang": weight_N}, "vp", "vp"
        total = losses.weighted(components)
        if self.lam > 0:
            gate = visual_tokens(losses.vds_N, every, quantile=self.quantile) if gate_N is None else gate_N
            total[preserving] = losses.weighted({preserved: self.lam * weight_N}, where=gate)[preserved]
        return total

    def _denominator(self, mask_BT: Tensor, count: float | Tensor | None) -> float:
        here = float(self.count(mask_BT))
        total = here if count is None else float(count)
        if not (0 < total < math.inf or here == total == 0):
            raise ValueError(
                f"count must be the positive number of {self.reduction}s of the optimizer step; got {total}, and "
                f"this micro-batch alone has {here:g}"
            )
        # Without a token in the whole step every sum is zero, and so is its mean.
        return total or 1.0


def _select_tokens(mask_BT: Tensor, name: str, x_BT: Tensor) -> Tensor:
    if x_BT.shape != mask_BT.shape or x_BT.device != mask_BT.device:
        raise ValueError(
            f"{name} must be {tuple(mask_BT.shape)} on {mask_BT.device}, as mask_BT is; got {tuple(x_BT.shape)} on "
            f"{x_BT.device}: pass the part of the step's tokens that this micro-batch holds"
        )
    return x_BT[mask_BT]
