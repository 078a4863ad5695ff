"""Any function from a Gramian to weights as a rule, such as TorchJD's weightings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steer_optim.rules.base import Rule, State
from steer_optim.rules.orders import check_seed

_GLOBAL_GENERATOR = threading.RLock()  # held while its state is that of a rule


class Weighting(Rule):
    """Take the weights from any callable, ``f(G) -> w``, called once per scope.

    ``f`` receives the Gramian on the CPU, so this is the only rule that synchronizes with a GPU. If ``f`` draws from
    torch's global generator, it gets numbers from a generator of this rule, whose state is part of the rule's state:
    the global one is untouched, and a resumed run continues bit for bit. Memory inside ``f`` is neither saved nor
    restored, and is shared by all scopes; a change inside ``f`` has no effect between two refreshes.

    State: ``random`` ``(S, bytes)`` uint8, the state of each scope's CPU generator.

    Args:
        f: a map from a ``(k, k)`` float64 Gramian to ``(k,)`` weights, such as
            ``torchjd.aggregation.UPGradWeighting()``.
        seed: of the generators, 0 or more; that of scope ``s`` starts at ``seed + s``.

    Raises:
        TypeError: ``f`` is not callable, or ``seed`` is not an int.

    Example:
        >>> import torch
        >>> from steer_optim.rules import Weighting
        >>> # Every gradient at unit length; a weight that is not finite would make the update so.
        >>> normalise = Weighting(lambda G: torch.where(G.diagonal() > 0, G.diagonal().rsqrt(), 0.0))
        >>> weights, _ = normalise(torch.diag(torch.tensor([4.0, 16.0], dtype=torch.float64)), ["lang", "vis"])
        >>> weights
        tensor([0.5000, 0.2500], dtype=torch.float64)
    """

    def __init__(self, f: Callable[[Tensor], Tensor], *, seed: int = 0) -> None:
        if not callable(f):
            raise TypeError(f"Weighting needs a callable from a Gramian to weights; got {type(f).__name__}")
        self.f = f
        self.seed = check_seed(seed)

    def init(self, G: Tensor, names: Sequence[str]) -> State:
        """Return the states of freshly seeded generators."""
        states = [torch.Generator().manual_seed(self.seed + s).get_state() for s in range(len(G))]
        return {"random": torch.stack(states).to(G.device)}

    def update(self, G: Tensor, names: Sequence[str], state: State) -> tuple[Tensor, State]:
        """Call ``f`` scope by scope; return its weights and the states of the generators.

        Raises:
            ValueError: ``f`` did not return one finite weight per component.
        """
        weights, randoms = [], []
        with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
            for gramian, random in zip(G.cpu(), state["random"].cpu(), strict=True):
                torch.set_rng_state(random.clone())  # a view into a larger tensor crashes it (torch 2.13)
                w = self.f(gramian)
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
                randoms.append(torch.get_rng_state())
        return torch.stack(weights), {"random": torch.stack(randoms).to(G.device)}
