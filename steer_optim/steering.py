"""`Steering`: from named losses to the steered ``.grad``, for any optimizers that step on it.

    losses -> capture -> holding -> gramian -> rule -> combine -> .grad

`Steering._steer` calls these stages in order; each is a module. A step between two refreshes takes the same path with
one set, that of the weighted sum.
"""

from __future__ import annotations

import re
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from steer_optim import memory, processes
from steer_optim.agreement import Agreement
from steer_optim.capture import Losses, check_losses, check_parameters, evaluated
from steer_optim.combining import combine, write
from steer_optim.gramian import Geometry, gramian, stack_losses
from steer_optim.holding import GradientSets
from steer_optim.joined import join
from steer_optim.memory import Last, Memory
from steer_optim.rules.base import Rule, carry_over
from steer_optim.rules.weighting import Weighting
from steer_optim.step import Pending, Step

Scope = Literal["model", "group", "tensor"]

BOUND = 3.0
"""The largest norm of an update between two refreshes, relative to that of the last step that took a Gramian."""

# Each leaves the others' parameters alone. The list of its references is made at once, whatever other threads add.
_ALIVE: weakref.WeakValueDictionary[int, Steering] = weakref.WeakValueDictionary()


class _Groups(Optimizer):
    """Hold parameters, groups and names as torch reads them; never step."""


class Steering:
    """Steer the gradients of some parameters by a rule, for any optimizers that step on them.

    If several optimizers share the losses, make one ``Steering`` over all parameters and call their ``step`` as usual.
    For one optimizer use :class:`SteeredOptimizer`: it owns a ``Steering`` and saves it with the optimizer's state.
    Parameters of another ``Steering`` get no gradient from this one while the other exists: delete one you replace.

    Args:
        parameters: tensors, ``(name, tensor)`` pairs or parameter groups, as a torch optimizer takes them; or an
            optimizer, whose groups are reread in every call.
        rule: how the components are weighed; ``Weighting(f)`` takes any function of the Gramian. You may set another
            rule object at any time; it starts without memory.
        scope: which parameters share one Gramian and its weights: the whole model, each parameter group, or each
            tensor.
        data_parallel: True under DDP: every process has a replica of the model, and the gradients of the components
            (not their losses) are averaged before the Gramian is taken. A process group if only its members have
            replicas (it cannot be pickled or deep-copied). False if each process trains its own model, or for the
            whole layers of a tensor-parallel model; never under DDP. None, the default, for one process, or if all
            parameters are sharded (FSDP2, tensor parallel).
        refresh_every: take the Gramian once in this many steps; a call without ``accumulate`` is a step. The steps in
            between reuse the last weights, in one backward pass of the weighted sum; ``geometry.age`` says how old they
            are. The norm of such an update is at most three times that of the last step that took a Gramian, times the
            ratio of the factors on the scalar of :meth:`join`: of their sums over micro-batches or of the largest,
            whichever is larger. If in that step a component's gradient was zero, not finite, or small with a large
            weight, or if the components cancelled, the next step takes a Gramian too. Losses scaled by a gradient
            scaler belong in :meth:`join`, which knows the factor: here a larger loss makes a longer update. Needs
            ``scope="model"``. May be changed at any time.

    Raises:
        TypeError: ``rule`` is not a rule, or ``parameters`` holds something other than tensors.
        ValueError: the scope is unknown; or ``refresh_every`` is not a positive integer, or more than 1 with a scope
            other than the whole model: one backward pass has one weight per component.

    Example:
        >>> import torch
        >>> from steer_optim import Steer, Steering
        >>> model = torch.nn.Linear(2, 1)
        >>> steering = Steering(model.parameters(), Steer(toward="main"))
        >>> optimizers = torch.optim.SGD([model.weight], lr=0.1), torch.optim.AdamW([model.bias], lr=1e-3)
        >>> steering.zero_grad()
        >>> out = model(torch.ones(3, 2))
        >>> geometry = steering.backward_components({"main": out.square().mean(), "side": -out.mean()})
        >>> for optimizer in optimizers:
        ...     optimizer.step()
    """

    accumulating: Callable[[], bool] | None = None
    """Called if ``accumulate`` is left out: returns whether more micro-batches of the step follow; see
    :mod:`steer_optim.callbacks`. None: every call is the last of its step."""

    def __init__(
        self,
        parameters: Iterable[Any] | Optimizer,
        rule: Rule,
        *,
        scope: Scope = "model",
        data_parallel: processes.DataParallel = None,
        refresh_every: int = 1,
    ) -> None:
        if scope not in ("model", "group", "tensor"):
            raise ValueError(f"scope must be 'model', 'group' or 'tensor'; got {scope!r}")
        # torch itself reads parameters, groups and names, and raises its errors.
        self._source = parameters if isinstance(parameters, Optimizer) else _Groups(parameters, {})
        self._scope: Scope = scope
        self._memory = Memory()
        self._pending: Pending | None = None
        self.rule = rule
        self.data_parallel = data_parallel
        self.refresh_every = refresh_every
        self._agreement = Agreement()
        _ALIVE[id(self)] = self

    @property
    def geometry(self) -> Geometry | None:
        """The :class:`Geometry` of the last steered backward pass; None before the first."""
        return self._memory.geometry

    @property
    def rule(self) -> Rule:
        """The rule."""
        return self._rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        if not isinstance(rule, Rule):
            remedy = f"Create one: {rule.__name__ if isinstance(rule, type) else 'Steer'}(...)"
            if callable(rule) and not isinstance(rule, type):
                remedy = "Wrap a function of the Gramian in Weighting(...)"
            raise TypeError(f"rule must be a Rule; got {rule!r}. {remedy}")
        if rule is not getattr(self, "_rule", None):
            self._rule, self._memory = rule, replace(self._memory, state={}, last=None, started=None)
            if self._pending is not None and self._pending.last is not None:
                self._pending.last = replace(self._pending.last, rule="")  # used to finish this step only

    @property
    def scope(self) -> Scope:
        """Which parameters share one Gramian; fixed, because the rule's state has a row for each."""
        return self._scope

    @property
    def refresh_every(self) -> int:
        """The number of steps from one Gramian to the next."""
        return self._refresh_every

    @refresh_every.setter
    def refresh_every(self, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"refresh_every must be an int of at least 1; got {steps!r}")
        if steps > 1 and self.scope != "model":
            raise ValueError(
                f"refresh_every={steps} needs scope='model': a step between two refreshes is one backward pass, with "
                f"one weight per component; got scope={self.scope!r}"
            )
        self._refresh_every = steps

    @overload
    def backward_components(
        self, losses: Losses, *, accumulate: Literal[False] | None = None, retain_graph: bool = False
    ) -> Geometry: ...

    @overload
    def backward_components(
        self, losses: Losses, *, accumulate: bool, retain_graph: bool = False
    ) -> Geometry | None: ...

    def backward_components(
        self, losses: Losses, *, accumulate: bool | None = None, retain_graph: bool = False
    ) -> Geometry | None:
        """Backpropagate every component, and add the steered combination of their gradients to ``.grad``.

        Let ``g_i`` be the gradients of the components, ``G[i, j] = <g_i, g_j>`` and ``w = rule(G)``. Every parameter
        gets ``p.grad += sum_i w[i] * g_i``. As after ``loss.backward()``, a parameter that no component reaches keeps
        ``grad is None``.

        Args:
            losses: scalar losses by name, or callables that return one. Callables are evaluated one after another, so
                that one graph is freed before the next is built; if they share a part of the graph, pass
                ``retain_graph=True``. Each callable that runs the model updates the statistics of its BatchNorm layers.
                None, or a known name left out, counts as a zero gradient: a task without samples. The first step
                defines the known names, and their order in ``Geometry``.
            accumulate: True adds this micro-batch to the pending ones and writes nothing; False steers the totals, so
                that N micro-batches equal one batch. None asks :attr:`accumulating`.
            retain_graph: keep the graph of the components, as ``Tensor.backward`` does.

        Returns:
            The geometry of the (accumulated) gradients and the weights used, also kept as ``geometry``; None if
            this micro-batch was only accumulated.

        Raises:
            TypeError, ValueError: there are no components; one is not a scalar, or reaches no parameter; a name is
                unknown, or the rule cannot weigh the names; replicas differ.
            RuntimeError: there are several processes and ``data_parallel`` was not given, or gradients cannot be taken
                one component at a time.

        After an error ``.grad`` is unchanged, but pending micro-batches may be lost: restart from ``zero_grad``.

        Example:
            >>> import torch
            >>> from steer_optim import Sum, SteeredOptimizer
            >>> x = torch.ones(1, requires_grad=True)
            >>> optimizer = SteeredOptimizer(torch.optim.SGD([x], lr=0.1), Sum())
            >>> optimizer.backward_components({"a": 2 * x, "b": 3 * x}, accumulate=True)
            >>> x.grad is None
            True
            >>> geometry = optimizer.backward_components({"a": 2 * x, "b": None})
            >>> x.grad
            tensor([7.])
        """
        return self._steer(losses, scale=None, accumulate=self._accumulates(accumulate), retain_graph=retain_graph)

    def join(self, losses: Losses, *, accumulate: bool | None = None) -> Tensor:
        """Return one scalar, equal to the sum of the components, whose backward pass steers.

        Use it in loops that call ``loss.backward()`` themselves. The backward pass of the scalar is
        ``backward_components(losses, accumulate=accumulate)``. A factor on the scalar, from a gradient scaler or a
        division by the number of micro-batches, multiplies the gradient of every component, and so the norms in
        :attr:`geometry`. ``torch.autograd.grad`` and ``backward(inputs=...)`` find no parameters behind the scalar.

        In one process you may add another loss to the scalar; it is not steered. In several processes, backpropagate
        that loss first, by itself. A second backward pass, or an added loss that shares a part of the graph, needs
        ``retain_graph=True`` as with any loss. Under ``torch.no_grad()`` this is only the plain sum.

        Args:
            losses: as for :meth:`backward_components`; callables are evaluated immediately.
            accumulate: as for :meth:`backward_components`: True for every micro-batch but the last.

        Returns:
            A scalar, on the device of the first component that is present, in the widest dtype; 0 if none is.

        Raises:
            TypeError, ValueError: as for :meth:`backward_components`; names and shapes are checked here.

        Example:
            >>> import torch
            >>> from steer_optim import Sum, SteeredOptimizer
            >>> x = torch.ones(1, requires_grad=True)
            >>> optimizer = SteeredOptimizer(torch.optim.SGD([x], lr=0.1), Sum())
            >>> loss = optimizer.join({"a": x.sum(), "b": 2 * x.sum()})
            >>> loss.item()
            3.0
            >>> (loss / 2).backward()
            >>> x.grad
            tensor([1.5000])
        """
        accumulate = self._accumulates(accumulate)
        grad = torch.is_grad_enabled()
        check_losses(losses, grad=grad)
        if grad:
            self._check_names(losses, accumulate=accumulate)
        values = {name: None if loss is None else evaluated(name, loss, grad=grad) for name, loss in losses.items()}

        def backward(**options: Any) -> None:
            self._steer(values, accumulate=accumulate, **options)
            processes.guard(self.data_parallel, self._parameters())

        return join([loss for loss in values.values() if loss is not None], backward)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` of the parameters, and drop pending micro-batches, with a warning if there are some."""
        dropped = self._pending is not None
        self.drop_pending()
        self._source.zero_grad(set_to_none)
        if dropped:
            warnings.warn(
                "accumulated micro-batches were never steered, and are dropped: call backward_components or join "
                "without accumulate=True for the last micro-batch of a step",
                stacklevel=2,
            )

    def drop_pending(self) -> None:
        """Drop the pending micro-batches."""
        self._pending = None

    def refuse_pending(self) -> None:
        """Raise if micro-batches are pending: a step now would miss them.

        Raises:
            RuntimeError: micro-batches are pending.
        """
        if self._pending is not None:
            raise RuntimeError(
                f"components {sorted(self._pending.losses)} were accumulated and never steered, so that .grad lacks "
                "them: call backward_components or join without accumulate=True for the last micro-batch of a step, or "
                "with accumulate=False if a watched loop has ended"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's memory and the last weights in one string, for a run to resume bit for bit."""
        return {memory.KEY: memory.pack(self._memory, owner=self._owner(), keep_last=self.refresh_every > 1)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the result of :meth:`state_dict`, and drop pending micro-batches; ``{}`` resets the rule.

        Raises:
            ValueError: there is no memory in the state dict, or it is that of another rule or scope, or damaged. Then
                nothing is changed.
        """
        self._adopt(self._read(state_dict))

    def _read(self, state_dict: Mapping[str, Any]) -> Memory:
        """Check and return the memory in a state dict, for `_adopt`."""
        if state_dict == {}:
            return Memory()
        if memory.KEY not in state_dict:
            raise ValueError(
                f"this is not the state dict of a Steering: it has no {memory.KEY!r}, only "
                f"{', '.join(map(repr, state_dict))}. That of a SteeredOptimizer has it in its param_groups[0]"
            )
        text, scopes = state_dict[memory.KEY], len(self._scopes())
        device = next((p.device for p in self._parameters() if p.device.type != "meta"), torch.device("cpu"))
        return memory.unpack(text, owner=self._owner(), rule=self.rule, scopes=scopes, device=device)

    def _adopt(self, memory: Memory) -> None:
        """Continue from a memory that `_read` returned."""
        self._memory = memory
        self._agreement.forget()
        self.drop_pending()

    def __getstate__(self) -> dict[str, Any]:
        # A copy trains in another loop.
        return {key: value for key, value in vars(self).items() if key != "accumulating"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _ALIVE[id(self)] = self

    def __repr__(self) -> str:
        return f"Steering({self.rule!r}, scope={self.scope!r})"

    def _accumulates(self, accumulate: bool | None) -> bool:
        return bool(self.accumulating and self.accumulating()) if accumulate is None else accumulate

    def _steer(self, losses: Losses, *, scale: Tensor | None, accumulate: bool, retain_graph: bool) -> Geometry | None:
        check_losses(losses)
        names = self._check_names(losses, accumulate=accumulate)
        step = self._step(names, scale, retain_graph)

        held = None if accumulate else self._hold(step)
        for name in step.capture({name: losses.get(name) for name in names}, held):
            if held is not None:
                held.take(name, step.pending.sets.pop(name, None))
        if held is None:
            self._pending = step.pending
            return None

        held = step.average(held, self._agreement)
        G = gramian(held)
        weights, new = self._weigh(G, step)
        rows = [row for own in held.rows().values() for row in own]
        update = held.gather(combine(rows, weights))
        before, self._memory = self._memory, new
        try:
            write(update, in_place=not step.peers)  # reducers keep their own memory
        except BaseException:
            self._memory = before
            raise
        return new.geometry

    def _step(self, names: tuple[str, ...], scale: Tensor | None, retain_graph: bool) -> Step:
        """Return this call's `Step`, which continues a pending one. Parameters are reread: groups may be new."""
        scopes = [own for _, own in self._scopes()]
        parameters = [p for own in scopes for p in own if p.requires_grad]
        if not parameters:
            raise ValueError("there is no parameter that requires grad: unfreeze one, or pass others")
        check_parameters(parameters)
        mine = {p for own in scopes for p in own}
        alive = [other for reference in _ALIVE.valuerefs() if (other := reference()) not in (None, self)]
        others = [p for other in alive for p in other._parameters() if p not in mine]
        replicas = processes.replica_group(self.data_parallel, parameters)
        if self.data_parallel is False and not self._memory.names:  # the first step
            processes.refuse_ddp(parameters)
        peers = [replicas] if replicas is not None else processes.mesh_groups(parameters)
        averaged = replicas is not None and self._agreement.averages is not False
        # Removed from `self` now, so that an error from here on drops the pending micro-batches.
        pending, self._pending = self._pending or Pending(self._last_to_reuse()), None
        pending.names = names
        pending.parameters.update(parameters)
        if scale is not None:
            factor, before = scale.detach().abs(), pending.scale
            both = (factor, factor) if before is None else (before[0] + factor, torch.maximum(before[1], factor))
            pending.scale = torch.stack(both)
        return Step(scopes, parameters, others, replicas, peers, averaged, scale, retain_graph, pending)

    def _hold(self, step: Step) -> GradientSets:
        """Return the holder of this step's sets, after checking that the processes agree."""
        sharded = step.replicas is None
        last, new = step.pending.last, not self._agreement.knows(step.parameters)
        # Shards: in the first step, after a change, and if a function of the user gives weights: it synchronizes too.
        read = new or step.isolated or (isinstance(self.rule, Weighting) and last is None)
        if not sharded or read:
            remembered = [*self._memory.state.values(), *([] if last is None else [last.geometry.weights])]
            for group in step.peers:
                self._agreement.check(
                    group,
                    self._facts(step),
                    remembered,
                    step.parameters,
                    read=read,
                    all_read=sharded or step.isolated,
                    values=not sharded,
                )
        return step.hold()

    def _weigh(self, G: Tensor, step: Step) -> tuple[Tensor, Memory]:
        """Return the weights of the held sets, ``(S, k)`` (between refreshes ``(1, 1)``), and the new memory."""
        pending = step.pending
        names, old, last = pending.names, self._memory, pending.last
        scale = G.new_ones(2) if pending.scale is None else pending.scale.to(G)
        for group in step.peers if pending.scale is not None else ():  # the same bound everywhere
            dist.all_reduce(scale, dist.ReduceOp.MAX, group=group)
        losses = stack_losses([pending.losses.get(name) for name in names], G)
        if last is None:
            started = G.isfinite().all()
            fresh = self.rule.init(torch.where(started, G, 1.0), names)  # also of a scope that begins later
            state = carry_over(old.state, fresh)
            if old.started is not None:
                before = old.started.to(G.device)
                state = {key: torch.where(before, value, fresh[key]) for key, value in state.items()}
                started |= before
            weights, state = self.rule(G, names, state)
            if step.peers:
                self._agreement.note_weights(weights)
            if self.scope != "model":
                scopes = tuple(name for name, _ in self._scopes())
                return weights, Memory(names, state, None, Geometry(names, G, weights, losses, scopes), started)
            previous = G.new_zeros(len(names)) if old.last is None else old.last.geometry.norms.to(G.device)
            kept = Geometry(names, G[0].clone(), weights[0].clone())  # the user may write to the other one
            before = previous.nan_to_num(0.0, 0.0)
            now = Last(self._reuse_key(), kept, before, scale, functions=self._functions())
            return weights, Memory(names, state, now, Geometry(names, G[0], weights[0], losses), started)
        last = last.on(G.device)  # the first parameter, whose device a loaded memory has, may be frozen
        exact, length = last.geometry, G[:, 0].clamp(min=0).sqrt()
        most = BOUND * exact.update_norm * (scale / last.scale).max()
        factor = torch.where(length.isfinite() & (length > most), most / length, 1.0)
        now = replace(last, age=last.age + 1)
        norm, weights = (length * factor)[0, 0], exact.weights * factor[0]
        geometry = Geometry(names, exact.G.clone(), weights, losses, age=now.age, _update_norm=norm)
        return factor, Memory(names, old.state, now, geometry, old.started)

    def _last_to_reuse(self) -> Last | None:
        """Return the last Gramian if this step reuses its weights; None if it takes a new one."""
        last = self._memory.last
        if last is None or last.age + 1 >= self.refresh_every or last.rule != self._reuse_key():
            return None
        if last.functions is not None and [*map(id, last.functions)] != [*map(id, self._functions())]:
            return None
        # Synchronizes once per refresh.
        return last if last.age or bool(last.reusable()) else None

    def _facts(self, step: Step) -> dict[str, str]:
        """Return what must be the same on all replicas, and its value here."""
        age = 0 if step.pending.last is None else step.pending.last.age + 1
        return {
            "their components, or the order of these": ", ".join(map(repr, step.pending.names)),
            "the number of their parameters": str(len(step.parameters)),
            "the shapes, strides, dtypes, names or groups of their parameters, or in which are frozen": "; ".join(
                ", ".join(
                    f"{name} {tuple(p.shape)} {p.dtype}"
                    + ("" if p.is_contiguous() else f" with strides {p.stride()}")
                    + " frozen" * (p not in step.pending.parameters)
                    for name, p in zip(_names(group, i), group["params"], strict=True)
                )
                for i, group in enumerate(self._source.param_groups)
            ),
            "their rule or its hyperparameters": self._rule_key(),
            "refresh_every, or in the age of their weights": f"refresh_every={self.refresh_every} and age {age}",
        }

    def _check_names(self, losses: Losses, *, accumulate: bool) -> tuple[str, ...]:
        """Return all components known so far, in order; raise if a name does not fit."""
        known = self._memory.names or (self._pending.names if self._pending else ())
        unknown = [name for name in losses if name not in known]
        if unknown and self._memory.names:
            raise ValueError(
                f"component {unknown[0]!r} is unknown: this steering has {', '.join(map(repr, known))}, the "
                "components of its first step. Name all of them in that step, None for those that are absent; "
                "steering.load_state_dict({}) (optimizer.steering) forgets them, and the rule's memory"
            )
        names = (*known, *unknown)
        if not accumulate:
            self.rule.check(names)
        return names

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._source.param_groups for p in group["params"]]

    def _scopes(self) -> list[tuple[str, list[Tensor]]]:
        """Return the name and the parameters of each scope, reread.

        Frozen ones are included: a scope keeps its row in the rule's state.
        """
        groups = [(i, group) for i, group in enumerate(self._source.param_groups) if group["params"]]
        if self.scope == "model":
            return [("model", self._parameters())]
        if self.scope == "group":
            return [(f"group {i}", group["params"]) for i, group in groups]
        return [(n, [p]) for i, group in groups for n, p in zip(_names(group, i), group["params"], strict=True)]

    def _owner(self) -> str:
        """Return the class of the rule and the scope: a memory saved with others is refused."""
        return f"{type(self.rule).__name__}, scope={self.scope!r}"

    def _reuse_key(self) -> str:
        """Return what weights are made of: the rule, and which parameters are trainable."""
        trainable = bytes(p.requires_grad for p in self._parameters())
        return f"{self._rule_key()}, trainable={zlib.crc32(trainable):08x}"

    def _functions(self) -> tuple[Any, ...]:
        """Return the functions that the rule calls."""
        return tuple(value for value in vars(self.rule).values() if callable(value))

    def _rule_key(self) -> str:
        """Return the rule with its hyperparameters, without addresses: the same in all processes."""
        return f"{re.sub(' at 0x[0-9a-fA-F]+', '', repr(self.rule))}, scope={self.scope!r}"


def _names(group: Mapping[str, Any], number: int) -> list[str]:
    return group.get("param_names") or [f"group {number} tensor {j}" for j in range(len(group["params"]))]
