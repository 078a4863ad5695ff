"""Token gates and weights: which tokens depend on the image.

The paper's ``VDS_t > Q`` is implemented as a number of tokens rather than a threshold, because with tied scores a
threshold selects too many or too few. The selection depends on all tokens that compete: pass those of the entire
optimizer step, and the process group that holds the rest of them. The result then does not depend on the split into
micro-batches and processes.

Dimensions: ``B`` prompts, ``T`` response tokens, ``N`` tokens that the mask keeps here, ``R`` processes.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from steer_optim.vlm.divergences import TERMS, View, check_temperature, refuse_non_finite
from steer_optim.vlm.engine import weighted_sums
from steer_optim.vlm.heads import HiddenStates
from steer_optim.vlm.rows import Rows, chunks, default_size
from steer_optim.vlm.topk import check_mask


def visual_dependency(
    teacher_BTV: View, teacher_text_BTV: View, mask_BT: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return the visual dependency score of each token, ``VDS = KL(q || q_tx)`` (Eq. 12).

    It needs only the teacher, so that a training loop can score all micro-batches of an optimizer step, gate over all
    of them, and then compute their losses one by one. It reads the teacher's full vocabulary.

    Args:
        teacher_BTV: ``(B, T, V)``, floating, the teacher's logits with the image, or its hidden states.
        teacher_text_BTV: the same without the image.
        mask_BT: ``(B, T)``, bool, True at response tokens.
        temperature: all logits are divided by it.

    Returns:
        ``vds_BT``, float32 or float64, without gradient; 0 where the mask is False.

    Raises:
        TypeError: the mask is not bool, or logits are not floating.
        ValueError: shapes or devices differ; logits that the mask keeps are not finite; ``temperature`` is not
            positive.

    Example:
        >>> import torch
        >>> teacher_BTV, mask_BT = torch.randn(2, 3, 7), torch.tensor([[True, True, False], [True, False, False]])
        >>> vds_BT = visual_dependency(teacher_BTV, torch.zeros(2, 3, 7), mask_BT)
        >>> (vds_BT > 0).equal(mask_BT)
        True
    """
    rows = select_rows(mask_BT, teacher=teacher_BTV.detach(), teacher_text=teacher_text_BTV.detach())
    _, losses = weighted_sums(rows, {"vds": TERMS["vds"]}, {}, temperature=temperature)
    return losses["vds"].new_zeros(mask_BT.shape).masked_scatter(mask_BT, losses["vds"])


def sampled_log_probs(
    view_BTV: Tensor | HiddenStates, response_BT: Tensor, mask_BT: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Return the log-probability that a view gives to each token of the response, without gradient.

    The difference of two views scores a token: VA-OPD uses ``relu`` of the difference between the teacher with the
    image and with a masked one.

    Args:
        view_BTV: ``(B, T, V)``, floating, the logits of a view, or its hidden states.
        response_BT: ``(B, T)``, int64, the tokens. Those outside the mask are not read.
        mask_BT: ``(B, T)``, bool, True at response tokens.
        temperature: the logits are divided by it.

    Returns:
        ``(B, T)``, float32 or float64; 0 where the mask is False.

    Raises:
        TypeError: the mask is not bool.
        ValueError: shapes or devices differ; an id is outside the vocabulary; logits that the mask keeps are not
            finite; ``temperature`` is not positive.

    Example:
        >>> import torch
        >>> mask_BT = torch.tensor([[True, False]])
        >>> sampled_log_probs(torch.zeros(1, 2, 4), torch.tensor([[3, 9]]), mask_BT).exp()
        tensor([[0.2500, 1.0000]])
    """
    check_temperature(temperature)
    select_rows(mask_BT, view=view_BTV)
    if response_BT.shape != mask_BT.shape or response_BT.device != mask_BT.device:
        raise ValueError(
            f"response_BT and mask_BT must have one shape on one device; got {tuple(response_BT.shape)} on "
            f"{response_BT.device} and {tuple(mask_BT.shape)} on {mask_BT.device}"
        )
    rows = Rows(view_BTV.detach()[mask_BT], temperature)
    response_N, found = response_BT[mask_BT], []
    if len(rows) and not (0 <= int(response_N.min()) <= int(response_N.max()) < rows.V):
        raise ValueError(f"response_BT must hold ids of the vocabulary of {rows.V} where mask_BT is True")
    for part in chunks(rows, default_size(1, mask_BT.device)):
        log_p_CV = rows.logits(part).log_softmax(-1)
        found.append(log_p_CV.gather(-1, response_N[part, None])[:, 0])
    log_p_N = torch.cat(found) if found else torch.zeros(0, device=mask_BT.device)
    if not log_p_N.isfinite().all():
        refuse_non_finite(["view_BTV"])
    return log_p_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, log_p_N)


def top_share(score_BT: Tensor, mask_BT: Tensor, *, quantile: float = 0.8, share: float = 0.5) -> Tensor:
    """Return token weights that give the highest-scored tokens of each response a fixed share of its total weight.

    The ``ceil((1 - quantile) * n)`` highest of the ``n`` tokens of a response (the earlier of equal ones first) have
    one weight and the others another, with a mean of 1. If there are no others, all weights are 1.

    Args:
        score_BT: ``(B, T)``, floating. Scores outside the mask are not read.
        mask_BT: ``(B, T)``, bool, True at response tokens.
        quantile: inside [0, 1).
        share: of a response's weight that its highest tokens have, inside [0, 1].

    Returns:
        ``(B, T)``, in the dtype of the scores; 0 where the mask is False. Pass it as ``weight_BT`` to
        :class:`~steer_optim.vlm.distillation.DecomposedDistillation`.

    Raises:
        TypeError: the mask is not bool.
        ValueError: ``quantile`` or ``share`` is out of range; shapes differ; a score that the mask keeps is not finite.

    Example:
        >>> import torch
        >>> score_BT, mask_BT = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.0]]), torch.ones(1, 5, dtype=torch.bool)
        >>> top_share(score_BT, mask_BT)
        tensor([[0.6250, 2.5000, 0.6250, 0.6250, 0.6250]])

    References:
        VA-OPD, arXiv 2605.21924: the score ``relu(log q(y) - log q_masked(y))``, a fifth of the tokens, half of the
        weight.
    """
    check_quantile(quantile)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be inside [0, 1]; got {share}")
    check_mask(mask_BT)
    if score_BT.shape != mask_BT.shape or mask_BT.ndim != 2:
        raise ValueError(f"scores and mask must be (B, T); got {tuple(score_BT.shape)} and {tuple(mask_BT.shape)}")
    if not score_BT[mask_BT].isfinite().all():
        raise ValueError("scores must be finite at every token that mask_BT keeps; found NaN or infinity")
    n_B = mask_BT.sum(dim=1)
    top_B = torch.tensor([_budget(n, quantile) for n in n_B.tolist()], device=mask_BT.device)
    order_BT = score_BT.masked_fill(~mask_BT, -torch.inf).argsort(dim=1, descending=True, stable=True)
    top_BT = order_BT.argsort(dim=1) < top_B[:, None]
    rest_B = n_B - top_B
    high_B, low_B = share * n_B / top_B, (1 - share) * n_B / rest_B
    weight_BT = torch.where(top_BT, high_B[:, None], low_B[:, None]).masked_fill(rest_B[:, None] == 0, 1.0)
    return weight_BT.to(score_BT.dtype).masked_fill(~mask_BT, 0.0)


def select_rows(mask_BT: Tensor, **views: View) -> dict[str, View]:
    """Return the rows of each ``(B, T, V)`` view where the mask is True, ``(N, V)``, by the same names.

    Rows are dropped before anything is computed from them: a NaN in a row of weight zero would stay NaN.
    """
    check_mask(mask_BT)
    for name, x in views.items():
        if mask_BT.ndim != 2 or len(x.shape) != 3 or x.shape[:2] != mask_BT.shape:
            raise ValueError(
                f"mask_BT must be (B, T) and {name} (B, T, V) with the same B and T; got {tuple(mask_BT.shape)} and "
                f"{tuple(x.shape)}"
            )
        if x.device != mask_BT.device:
            raise ValueError(f"mask_BT and {name} must be on one device; got {mask_BT.device} and {x.device}")
    # Indices, because the backward pass of a mask would synchronize with the device.
    where = mask_BT.nonzero(as_tuple=True)
    return {name: x[where] for name, x in views.items()}


def visual_tokens(
    vds_BT: Tensor, mask_BT: Tensor, *, quantile: float = 0.7, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the tokens above a quantile of visual dependency, ``VDS_t > Q_quantile`` (Eq. 16).

    These are exactly the ``ceil((1 - quantile) * N)`` highest of the ``N`` tokens that the mask keeps, the earlier of
    equal ones first. Tokens whose score is not positive are left out: a token that the image does not change is not
    visual.

    Args:
        vds_BT: floating, the visual dependency scores of all tokens of an optimizer step, of any shape.
        mask_BT: bool, of the same shape, True at response tokens. Scores elsewhere are not read.
        quantile: inside [0, 1); 0 for every token that the image changes.
        group: the processes that share the step, whose tokens are selected as if concatenated by rank. All of them must
            call, also those without a token. None for this process alone.

    Returns:
        ``gate_BT``, bool, of the same shape.

    Raises:
        TypeError: the mask is not bool.
        ValueError: shapes differ, a score is NaN (on any process of the group), or the quantile is out of range.

    Example:
        Two micro-batches are gated as one.

        >>> import torch
        >>> vds = torch.tensor([[0.1, 0.9, 0.3]]), torch.tensor([[0.8, 0.7, 0.2]])
        >>> mask = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, True, False]])
        >>> gate = visual_tokens(torch.cat(vds), torch.cat(mask), quantile=0.7)
        >>> gate.split(1)
        (tensor([[False,  True, False]]), tensor([[ True, False, False]]))

        If ``R`` processes average their gradients (DDP, FSDP), compute gate and count over all of them::

            gate_BT = visual_tokens(vds_BT, mask_BT, quantile=method.quantile, group=dist.group.WORLD)
            count = method.count(mask_BT)
            dist.all_reduce(count)
            losses = method(..., mask_BT, count=count / dist.get_world_size(), gate_BT=gate_BT)

    References:
        arXiv 2606.00564, Eqs. 12, 16. The paper does not say over which tokens the quantile is taken.
    """
    check_quantile(quantile)
    check_mask(mask_BT)
    if vds_BT.shape != mask_BT.shape:
        raise ValueError(
            f"vds_BT and mask_BT must have one shape; got {tuple(vds_BT.shape)} and {tuple(mask_BT.shape)}"
        )
    vds_N = vds_BT[mask_BT]
    every_N, start = _everywhere(vds_N, group)
    if every_N.isnan().any():
        raise ValueError("vds_BT must not be NaN where mask_BT is True; found NaN")
    top = every_N.sort(descending=True, stable=True).indices[: _budget(len(every_N), quantile)]
    gate_N = torch.zeros_like(every_N, dtype=torch.bool).index_fill(0, top, True)[start : start + len(vds_N)]
    return torch.zeros_like(mask_BT).masked_scatter(mask_BT, gate_N & (vds_N > 0))


def adaptive_strength(vds_BT: Tensor, mask_BT: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return how strongly each token is steered, ``gamma_t / gamma`` (Eqs. 24-25).

    The strength is 0 for the 40 % of the tokens with the lowest visual dependency, 1/2 up to the 0.7 quantile, and 1
    above it, each counted as in :func:`visual_tokens`. As a factor on a token's ``vis`` it turns ``gamma * vis`` into
    ``gamma_t * vis``.

    Args:
        vds_BT: as in :func:`visual_tokens`.
        mask_BT: as in :func:`visual_tokens`.
        group: as in :func:`visual_tokens`.

    Returns:
        ``strength_BT`` in {0, 1/2, 1}, of the shape and dtype of ``vds_BT``; 0 where the mask is False.

    Raises:
        TypeError, ValueError: as in :func:`visual_tokens`.

    Example:
        >>> import torch
        >>> vds_BT = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]])
        >>> adaptive_strength(vds_BT, torch.ones(1, 5, dtype=torch.bool))
        tensor([[0.0000, 0.0000, 0.5000, 1.0000, 1.0000]])
    """
    somewhat = visual_tokens(vds_BT, mask_BT, quantile=0.4, group=group)
    strongly = visual_tokens(vds_BT, mask_BT, quantile=0.7, group=group)
    return (somewhat.to(vds_BT.dtype) + strongly.to(vds_BT.dtype)) / 2


def check_quantile(quantile: float) -> None:
    """Raise ValueError unless ``quantile`` is inside [0, 1)."""
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile must be inside [0, 1): 0 keeps every token that the image changes; got {quantile}")


def _budget(n: int, quantile: float) -> int:
    # Exact in the decimal that was passed: in binary 1 - 0.7 is more than 0.3, and the ceiling of 10 times it is 4.
    return math.ceil((1 - Fraction(str(float(quantile)))) * n)


def _everywhere(x_N: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """Return the values of all processes, concatenated by rank, and where those of this process begin."""
    if group is None:
        return x_N, 0
    parts = [x_N] * dist.get_world_size(group)
    dist.all_gather_object(parts, x_N.cpu(), group=group)
    return torch.cat(parts).to(x_N.device), sum(map(len, parts[: dist.get_rank(group)]))
