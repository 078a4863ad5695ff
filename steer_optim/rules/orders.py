"""Random numbers for rules: visiting orders for those that project on one component after the other, and seeds.

They are a hash of a counter. Drawing them changes only that counter, needs no host, and gives the same orders on
every device and replica. The hash is splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_seed(seed: int) -> int:
    """Return the seed; raise TypeError if it is not an int."""
    if not isinstance(seed, int):
        raise TypeError(f"seed must be an int; got {seed!r}")
    return seed


def draw_orders(draws: Tensor, names: Sequence[str], *, seed: int) -> Tensor:
    """Return the order in which each component meets all components, itself included.

    Orders depend on the names: listing the components differently gives the same visits.

    Args:
        draws: ``(S,)``, int64, how often each scope has drawn before.
        names: the ``k`` components.
        seed: which sequence of draws, any integer.

    Returns:
        ``(S, k, k)``, int64: row ``i`` is a permutation of the components, uniform over draws.

    Example:
        >>> import torch
        >>> orders = draw_orders(torch.zeros(1, dtype=torch.int64), ["a", "b", "c"], seed=0)
        >>> orders.sort(-1).values[0].tolist()
        [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    ranks = sorted(names)
    # Filled one by one: torch.tensor(list, device=...) copies from the host, which synchronizes.
    keys = torch.stack([draws.new_full((), ranks.index(name)) for name in names])
    per_row = _mix(draw_words(draws, seed=seed)[:, None] + keys)
    return _mix(per_row[:, :, None] + keys).argsort(dim=-1, stable=True)


def draw_words(draws: Tensor, *, seed: int) -> Tensor:
    """Return one random int64 per scope, ``(S,)``; the arguments are those of :func:`draw_orders`."""
    scopes = torch.arange(len(draws), device=draws.device)
    return _mix(_mix(_mix(torch.full_like(draws, _signed(seed))) + draws) + scopes)


def _signed(word: int) -> int:
    """Return the int64 with the bits of a 64-bit word."""
    return (word + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """Apply one step of splitmix64. Products wrap; masks make the arithmetic shifts of int64 logical."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & (2**33 - 1))
