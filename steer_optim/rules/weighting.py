"""Any function from a Gramian to weights as a rule, such as TorchJD's weightings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steer_optim.rules.base import Rule, State
from steer_optim.rules.orders import check_seed, draw_words

_GLOBAL_GENERATOR = threading.RLock()  # held while its state is that of a rule


class Weighting(Rule):
    """Take the weights from any callable, ``f(G) -> w``, called once per scope.

    ``f`` receives the Gramian on the CPU, so this is the only rule that synchronizes with a GPU. If ``f`` draws from
    torch's global generator, it gets numbers that depend on the seed, the scope and the number of calls: the global one
    is untouched, and a resumed run continues bit for bit. Where all gradients are zero, the weights are 1 and ``f`` is
    not called. Memory inside ``f`` is neither saved nor restored, and is shared by all scopes; a change inside ``f``
    has no effect between two refreshes.

    State: ``draws`` ``(S,)`` int64, the number of calls so far.

    Args:
        f: a map from a ``(k, k)`` float64 Gramian to ``(k,)`` weights, such as
            ``torchjd.aggregation.UPGradWeighting()``.
        seed: of the random numbers, any integer.

    Raises:
        TypeError: ``f`` is not callable, or ``seed`` is not an int.

    Example:
        >>> import torch
        >>> from steer_optim.rules import Weighting
        >>> def equal_lengths(G):
        ...     norms = G.diagonal().sqrt()  # a zero gradient gets weight 0: every weight must be finite
        ...     return torch.where(norms > 0, norms.mean() / norms, 0.0)
        >>> G = torch.diag(torch.tensor([4.0, 16.0], dtype=torch.float64))
        >>> weights, _ = Weighting(equal_lengths)(G, ["lang", "vis"])
        >>> weights
        tensor([1.5000, 0.7500], dtype=torch.float64)
    """

    def __init__(self, f: Callable[[Tensor], Tensor], *, seed: int = 0) -> None:
        if not callable(f):
            raise TypeError(f"Weighting needs a callable from a Gramian to weights; got {type(f).__name__}")
        self.f = f
        self.seed = check_seed(seed)

    def init(self, G: Tensor, names: Sequence[str]) -> State:
        """Return no calls so far."""
        return {"draws": torch.zeros(len(G), dtype=torch.int64, device=G.device)}

    def update(self, G: Tensor, names: Sequence[str], state: State) -> tuple[Tensor, State]:
        """Call ``f`` scope by scope; return its weights, and count one more call.

        Raises:
            ValueError: ``f`` did not return one finite weight per component.
        """
        weights = []
        seeds = draw_words(state["draws"], seed=self.seed).tolist()
        with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]), torch.enable_grad():
            for gramian, seed in zip(G.cpu(), seeds, strict=True):
                torch.default_generator.manual_seed(seed)  # of the CPU only
                w = self.f(gramian) if gramian.any() else gramian.new_ones(len(names))
                found = tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__
                if found != (len(names),):
                    raise ValueError(
                        f"a weighting of {len(names)} components must return a tensor ({len(names)},); got {found}"
                    )
                if not w.isfinite().all():
                    raise ValueError(
                        f"the weighting of a finite Gramian is not finite: {w.tolist()} of {gramian.tolist()}"
                    )
                weights.append(w.detach().to(G))
        return torch.stack(weights), {"draws": state["draws"] + 1}
