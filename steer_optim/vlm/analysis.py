"""The geometry of the components among tokens of similar visual dependency.

Dimensions: ``B`` prompts, ``T`` response tokens, ``N`` tokens that the mask keeps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from steer_optim.gramian import Geometry, measure
from steer_optim.vlm.topk import check_mask


def angles_by_decile(
    token_losses: Mapping[str, Tensor], vds_BT: Tensor, mask_BT: Tensor, parameters: Iterable[Tensor], *, bins: int = 10
) -> Geometry:
    """Return the geometry of the components in each decile of visual dependency (Fig. 3).

    The tokens that the mask keeps are sorted by visual dependency score (ties keep the order of the batch) and split
    into ``bins`` groups whose sizes differ by at most one. Within a group, a component is the mean of its token losses.
    This takes ``bins`` backward passes per component, retains the graph and touches no ``.grad``.

    Args:
        token_losses: ``(B, T)`` per component, differentiable, for example from ``token_losses``, whose constant
            ``vds`` is left out.
        vds_BT: visual dependency scores, ``KL(q || q_tx)``. Scores outside the mask are not read.
        mask_BT: bool, True at response tokens.
        parameters: whose gradients are compared.
        bins: the number of groups; 10 for deciles.

    Returns:
        A geometry with a leading dimension of bins, from the least visual to the most: ``angle("lang", "vis")`` is
            ``(bins,)``, in degrees. Losses are None.

    Raises:
        TypeError: the mask is not bool.
        ValueError: shapes differ; a score is not finite; there are fewer tokens than bins; or
            :func:`steer_optim.measure` refuses the losses.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> lang_BT = torch.stack([x[0], x[0], x[0], x[0]])[None]
        >>> vis_BT = torch.stack([x[0], x[1], x[0] + x[1], -x[0]])[None]
        >>> vds_BT, mask_BT = torch.tensor([[0.1, 0.5, 0.2, 0.9]]), torch.ones(1, 4, dtype=torch.bool)
        >>> geometry = angles_by_decile({"lang": lang_BT, "vis": vis_BT}, vds_BT, mask_BT, [x], bins=4)
        >>> geometry.angle("lang", "vis").round()
        tensor([  0.,  45.,  90., 180.], dtype=torch.float64)

    References:
        arXiv 2606.00564, Fig. 3 and Eq. 12.
    """
    check_mask(mask_BT)
    for name, value in {**token_losses, "vds_BT": vds_BT}.items():
        if value.shape != mask_BT.shape:
            raise ValueError(
                f"{name!r} must have the shape of mask_BT, {tuple(mask_BT.shape)}; got {tuple(value.shape)}"
            )
    vds_N = vds_BT[mask_BT]
    if not vds_N.isfinite().all():
        raise ValueError("vds_BT must be finite at every token that mask_BT keeps; found inf or NaN")
    if not 1 <= bins <= len(vds_N):
        raise ValueError(
            f"{bins} bins need at least one token each; mask_BT keeps {len(vds_N)}: pass fewer bins or more tokens"
        )
    parameters = list(parameters)
    losses_N = {name: value[mask_BT] for name, value in token_losses.items() if name != "vds"}
    groups = torch.tensor_split(vds_N.argsort(stable=True), bins)
    steps = [measure({name: loss_N[group].mean() for name, loss_N in losses_N.items()}, parameters) for group in groups]
    G, weights = (torch.stack(each) for each in zip(*((step.G, step.weights) for step in steps), strict=True))
    return Geometry(tuple(losses_N), G, weights)
