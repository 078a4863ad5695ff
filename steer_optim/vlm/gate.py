"""Which tokens depend on the image: the most visual ones of an optimizer step, selected exactly.

The paper's ``VDS_t > Q`` is read as a number of tokens rather than a threshold: scores tie, and then a threshold
selects more or fewer than were meant. Which tokens are selected depends on the tokens they are compared with, so pass
those of the whole optimizer step, and name the group of processes that hold the rest: the result is then the same for
every split into micro-batches and replicas.

Dimensions: ``B`` prompts, ``T`` response tokens, ``N`` tokens that the mask keeps here, ``R`` processes.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from steer_optim.vlm.chunked import ChunkedLosses
from steer_optim.vlm.heads import HiddenStates
from steer_optim.vlm.losses import kl, log_probs, select_rows


def visual_dependency(
    teacher_BTV: Tensor | HiddenStates,
    teacher_text_BTV: Tensor | HiddenStates,
    mask_BT: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """The visual dependency score of each token, ``VDS = KL(q || q_tx)`` (Eq. 12).

    It needs the teacher only, so that a training loop can score all micro-batches of an optimizer step, gate over
    all of them, and then compute the losses of one after another. It reads the teacher's whole vocabulary.

    Args:
        teacher_BTV: ``(B, T, V)``, floating, the teacher's logits with the image, or its hidden states.
        teacher_text_BTV: ``(B, T, V)``, likewise without the image.
        mask_BT: ``(B, T)``, bool, True at response tokens.
        temperature: all logits are divided by it.

    Returns:
        ``vds_BT``, float32 or float64, without gradient; 0 where the mask is False.

    Raises:
        TypeError: the mask is not bool, or logits are not floating.
        ValueError: shapes or devices do not fit each other; logits that the mask keeps are not finite;
            ``temperature`` is not positive.

    Example:
        >>> import torch
        >>> teacher_BTV, mask_BT = torch.randn(2, 3, 7), torch.tensor([[True, True, False], [True, False, False]])
        >>> vds_BT = visual_dependency(teacher_BTV, torch.zeros(2, 3, 7), mask_BT)
        >>> (vds_BT > 0).equal(mask_BT)
        True
    """
    rows = select_rows(mask_BT, teacher=teacher_BTV.detach(), teacher_text=teacher_text_BTV.detach())
    logits = {name: row for name, row in rows.items() if isinstance(row, Tensor)}
    if len(logits) == len(rows):
        vds_N = kl(*log_probs(temperature, **logits))
    else:
        vds_N = ChunkedLosses(rows, temperature=temperature).vds_N
    return vds_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, vds_N)


def visual_tokens(
    vds_BT: Tensor, mask_BT: Tensor, *, quantile: float = 0.7, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The tokens above a quantile of visual dependency, ``VDS_t > Q_quantile`` (Eq. 16).

    Exactly the ``ceil((1 - quantile) * N)`` highest of the ``N`` tokens that the mask keeps, the earlier of equal
    ones first; fewer where fewer have a positive score, because a token that the image does not change is not visual.

    Args:
        vds_BT: floating, the visual dependency scores of all tokens of an optimizer step, of any shape.
        mask_BT: bool, of the same shape, True at response tokens. Scores elsewhere are not read.
        quantile: inside [0, 1); 0 for every token that the image changes.
        group: the processes that hold a share of the step each, whose tokens are selected as if they were
            concatenated by rank; all of them must call, those without a token too. None for this process alone.

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

        On ``R`` processes that average their gradients (DDP, FSDP), the gate and the count are those of all of them::

            gate_BT = visual_tokens(vds_BT, mask_BT, quantile=method.quantile, group=dist.group.WORLD)
            count = method.count(mask_BT)
            dist.all_reduce(count)
            losses = method(..., mask_BT, count=count / dist.get_world_size(), gate_BT=gate_BT)

    References:
        arXiv 2606.00564, Eqs. 12, 16. The paper does not say over which tokens the quantile is taken.
    """
    check_quantile(quantile)
    if mask_BT.dtype != torch.bool:
        raise TypeError(f"mask_BT must be bool, True at response tokens; got {mask_BT.dtype}: pass mask.bool()")
    if vds_BT.shape != mask_BT.shape:
        raise ValueError(
            f"vds_BT and mask_BT must have one shape; got {tuple(vds_BT.shape)} and {tuple(mask_BT.shape)}"
        )
    vds_N = vds_BT[mask_BT]
    # A NaN is made known to all, or the processes without one would wait for the one that has given up.
    counts, nans = _gather(torch.stack([mask_BT.sum(), vds_N.isnan().sum()]), group).tolist()
    if any(nans):
        raise ValueError("vds_BT must be a number at every token that mask_BT keeps; found NaN")
    # The decimal that was written: in binary 1 - 0.7 is more than 0.3, and the ceiling of 10 times it is 4.
    budget = math.ceil((1 - Fraction(str(float(quantile)))) * sum(counts))
    if group is None:
        top = vds_N.sort(descending=True, stable=True).indices[:budget]
        gate_N = torch.zeros_like(vds_N, dtype=torch.bool).index_fill(0, top, True)
    else:
        gate_N = _highest(vds_N, budget, group)
    return torch.zeros_like(mask_BT).masked_scatter(mask_BT, gate_N & (vds_N > 0))


def adaptive_strength(vds_BT: Tensor, mask_BT: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """How strongly each token is steered, ``gamma_t / gamma`` (Eqs. 24-25).

    0 for the 40 % of the tokens with the lowest visual dependency, 1/2 up to the 0.7 quantile, and 1 above it, each
    counted as by :func:`visual_tokens`. As a factor on a token's ``vis`` it turns ``gamma * vis`` into
    ``gamma_t * vis``.

    Args:
        vds_BT: floating, the visual dependency scores of all tokens of an optimizer step, of any shape.
        mask_BT: bool, of the same shape, True at response tokens.
        group: as of :func:`visual_tokens`.

    Returns:
        ``strength_BT`` in {0, 1/2, 1}, of the shape and dtype of ``vds_BT``; 0 where the mask is False.

    Raises:
        TypeError, ValueError: as :func:`visual_tokens`.

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
    """Raises ValueError where ``quantile`` is not inside [0, 1)."""
    if not 0 <= quantile < 1:
        raise ValueError(f"quantile must be inside [0, 1): 0 keeps every token that the image changes; got {quantile}")


def _highest(vds_N: Tensor, budget: int, group: dist.ProcessGroup) -> Tensor:
    """The ``budget`` highest of the scores of all processes, ties by (rank, index); those at most 0 count as 0.

    A radix select: the score at the edge is found byte by byte, each from a histogram over all processes, so that
    no score travels.
    """
    if budget == 0:
        return torch.zeros_like(vds_N, dtype=torch.bool)
    # The bits of floats that are not negative order as the floats do. Every floating dtype is exact in float64.
    bits_N = torch.where(vds_N > 0, vds_N, 0).double().view(torch.int64)
    edge, left, candidates = 0, budget, bits_N
    for shift in range(56, -8, -8):
        bytes_N = candidates >> shift & 255
        histogram = torch.bincount(bytes_N, minlength=256)
        dist.all_reduce(histogram, group=group)
        higher = (histogram.sum() - histogram.cumsum(0)).tolist()  # how many candidates have a higher byte than each
        byte = sum(count >= left for count in higher)
        left -= higher[byte]
        edge |= byte << shift
        candidates = candidates[bytes_N == byte]
    ties_R = _gather(histogram.new_tensor([len(candidates)]), group)[0]
    tied_N = bits_N == edge
    place_N = ties_R[: dist.get_rank(group)].sum() + tied_N.cumsum(0)
    return (bits_N > edge) | (tied_N & (place_N <= left))


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """What each process has in ``x``, ``(n,)``, as ``(n, R)``."""
    if group is None:
        return x[:, None]
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, x, group=group)
    return torch.stack(gathered, dim=1)
