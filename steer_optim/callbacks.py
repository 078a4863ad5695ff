"""Connect training frameworks: they log what steering does, save its record, and say which micro-batch is the last.

One function for each framework, called once before training:

- :func:`watch_trainer` for ``transformers.Trainer`` and TRL's trainers,
- :func:`watch_lightning` for Lightning,
- :func:`watch_accelerator` for a loop under Accelerate.

Each returns the :class:`~steer_optim.monitor.Monitor` that records every step under its number, from 1 on. Those of the
Trainer and of Accelerate warn at steps before the first steered one, as when the loss is never that of ``join``. The
framework saves it in checkpoints and restores it. The log gets the means over the steps since its last line, under the
names of :mod:`steer_optim.monitor`: with ``refresh_every`` a single step often has no angle. ``join`` and
``backward_components`` without ``accumulate`` then ask the framework whether more micro-batches follow.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from steer_optim.gramian import Geometry
from steer_optim.monitor import Monitor
from steer_optim.optimizer import SteeredOptimizer
from steer_optim.steering import Steering

_KEY = "steer_optim"  # in the checkpoints of Lightning


def watch_trainer(trainer: Any, steering: Steering | None = None) -> Monitor:
    """Watch the steering of a ``transformers.Trainer``, or of a subclass such as TRL's trainers.

    Every log line with a training loss gets the numbers, in ``log_history``, TensorBoard and W&B.

    Args:
        trainer: before ``train()``.
        steering: by default that of the trainer's optimizer.

    Returns:
        The record of every step, kept in ``trainer_state.json`` and restored by ``train(resume_from_checkpoint=...)``.

    Raises:
        TypeError: in ``train()``, if the trainer's optimizer is not steered and no ``steering`` was given.
        ValueError: the trainer is watched already.

    Example::

        trainer = Trainer(model, arguments, ..., optimizers=(optimizer, None), compute_loss_func=steered_loss)
        monitor = watch_trainer(trainer)
        trainer.train()
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState

    _refuse_another(trainer.callback_handler.callbacks)
    watch = _Watch()

    class SteeringCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # read as Any
        def state(self) -> dict[str, Any]:
            record = {name: column.tolist() for name, column in watch.state_dict().items()}
            return {"args": {}, "attributes": {"record": json.dumps(record)}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Before the callbacks of TensorBoard and W&B, which then read the log.
            handler = trainer.callback_handler
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)
            watch.steering = steering or _steering_of([kwargs["optimizer"]])
            watch.steering.accumulating = _accelerate_accumulates
            watch.steering.drop_pending()  # of a step that an exception cut short
            # The checkpoint of an unwatched run has no record, and the trainer saves only entries that exist.
            saved = state.stateful_callbacks.setdefault("SteeringCallback", self.state())
            record = json.loads(saved["attributes"]["record"]) if state.global_step else {"step": []}
            watch.load_state_dict(record)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch.record(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "loss" in logs:  # not an evaluation
                new = {name: mean for name, mean in watch.means().items() if name not in logs}
                logs.update(new)
                state.log_history[-1].update(new)

    trainer.add_callback(SteeringCallback())
    return watch.monitor


def watch_lightning(trainer: Any, steering: Steering | None = None) -> Monitor:
    """Watch the steering of a ``lightning.Trainer``.

    The trainer's loggers get the numbers every ``log_every_n_steps`` steps.

    Args:
        trainer: before ``fit``.
        steering: by default that of the only steered optimizer of ``configure_optimizers``.

    Returns:
        The record of every step, kept in the checkpoints and restored by ``fit(ckpt_path=...)``.

    Raises:
        TypeError: in ``fit``, if not exactly one optimizer is steered and no ``steering`` was given.
        ValueError: the trainer is watched already.

    Under manual optimization your loop accumulates: pass ``accumulate`` there.

    Example::

        trainer = lightning.Trainer(accumulate_grad_batches=2)
        monitor = watch_lightning(trainer)
        trainer.fit(module)
    """
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError:  # its other name
        from pytorch_lightning import Callback

    _refuse_another(trainer.callbacks)
    watch, batch_now = _Watch(), 0
    before: list[Any] = []

    def accumulating() -> bool:
        """Return whether Lightning accumulates: the window is not full, and the epoch is not over."""
        full = (batch_now + 1) % trainer.accumulate_grad_batches == 0
        return bool(trainer.training and not full and not trainer.is_last_batch)

    class SteeringCallback(Callback):  # type: ignore[misc]  # read as Any
        state_key = _KEY

        def state_dict(self) -> dict[str, Any]:
            return watch.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            watch.load_state_dict(state_dict)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            watch.steering = steering or _steering_of(trainer.optimizers)
            watch.steering.accumulating = accumulating

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            nonlocal batch_now, before
            batch_now, before = batch_idx, watch.progress()

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            steered = any(x is not None and x is not y for x, y in zip(watch.progress(), before, strict=True))
            if steered and pl_module.automatic_optimization:
                raise RuntimeError(
                    "training_step steered, and Lightning clears .grad after it: return optimizer.join(...) instead of "
                    "calling backward_components"
                )

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            nonlocal before
            before = watch.progress()  # a closure may run again

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            steering = watch.steering
            pending = None if steering is None else steering._pending
            if steering and pending and trainer.training and pl_module.automatic_optimization:
                # The last batch of the window was skipped.
                steering.backward_components(dict.fromkeys(pending.names), accumulate=False)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            watch.record(trainer.global_step, stepped=False)  # it may accumulate, or step another optimizer
            if 0 < trainer.log_every_n_steps <= watch.unlogged:
                means = watch.means()
                for logger in trainer.loggers:
                    logger.log_metrics(means, step=trainer.global_step - 1)  # Lightning's log counts from 0

    trainer.callbacks.insert(0, SteeringCallback())  # before those that save
    return watch.monitor


def watch_accelerator(
    accelerator: Any, optimizer: Any, steering: Steering | None = None, *, log_every: int = 10
) -> Monitor:
    """Watch a steered optimizer in a loop under Accelerate.

    Args:
        accelerator: before ``load_state``.
        optimizer: the :class:`~steer_optim.SteeredOptimizer`, or what ``prepare`` made of it, which has no ``join``.
        steering: by default that of the optimizer, whose steps are recorded.
        log_every: ``accelerator.log`` gets the numbers once in this many steps; 0 for never.

    Returns:
        The record of every step, kept by ``accelerator.save_state`` and restored by ``load_state``.

    Raises:
        TypeError: the optimizer is not steered.

    Example::

        steered = SteeredOptimizer(AdamW(model.parameters()), Steer(toward="main"))
        model, optimizer, loader = accelerator.prepare(model, steered, loader)
        monitor = watch_accelerator(accelerator, steered)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(steered.join(losses(model, batch)))
                ...
    """
    steering = steering or _steering_of([optimizer])
    steering.accumulating = _accelerate_accumulates
    watch = _Watch(steering)

    def record(*_: Any) -> None:
        watch.record(len(watch.monitor) + 1)
        if 0 < log_every <= watch.unlogged:
            accelerator.log(watch.means(), step=len(watch.monitor))

    _unwrapped(optimizer).register_step_post_hook(record)
    accelerator.register_for_checkpointing(watch)
    return watch.monitor


@dataclass
class _Watch:
    """The state of a watch: the record, and how many of its steps are not in the log yet."""

    steering: Steering | None = None
    monitor: Monitor = field(default_factory=Monitor)
    unlogged: int = 0
    last: Geometry | None = None

    def record(self, step: int, *, stepped: bool = True) -> None:
        """Record the last geometry, unless it is recorded already; warn if the optimizer stepped before the first."""
        geometry = None if self.steering is None else self.steering.geometry
        if geometry is None and stepped:
            warnings.warn(f"step {step} was not steered: let the loop backpropagate optimizer.join(...)", stacklevel=2)
        if geometry is not None and geometry is not self.last:
            self.monitor.record(geometry, step=step)
            self.last, self.unlogged = geometry, self.unlogged + 1

    def progress(self) -> list[Any]:
        """Return objects that a steered micro-batch, or the first accumulated one, replaces."""
        return [] if self.steering is None else [self.steering.geometry, self.steering._pending]

    def state_dict(self) -> dict[str, Any]:
        return self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.monitor.load_state_dict(state_dict)
        self.unlogged = 0  # steps before a rollback

    def means(self) -> dict[str, float]:
        """Return the means over the steps that are not in the log yet."""
        last, self.unlogged = self.unlogged, 0
        return self.monitor.means(last) if last else {}


def _refuse_another(callbacks: Iterable[Any]) -> None:
    if any(type(callback).__name__ == "SteeringCallback" for callback in callbacks):
        raise ValueError(
            "the trainer is watched already, and the numbers of two would have the same names: record another Steering "
            "with a Monitor of your own"
        )


def _unwrapped(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)  # of Accelerate's wrapper


def _steering_of(optimizers: Iterable[Any]) -> Steering:
    found = [optimizer for optimizer in map(_unwrapped, optimizers) if isinstance(optimizer, SteeredOptimizer)]
    if len(found) != 1:
        raise TypeError(
            f"one SteeredOptimizer is needed, and {len(found)} were found: wrap the optimizer, or pass the Steering as "
            "steering="
        )
    return found[0].steering


def _accelerate_accumulates() -> bool:
    from accelerate.state import GradientState

    return not GradientState().sync_gradients
