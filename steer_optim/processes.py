"""The meaning of `data_parallel`, and the refusal of parallel setups that cannot be steered.

The optimizer cannot see whether the processes train one model, so `data_parallel` must say so. A guess could be wrong,
and replicas that are not synchronized drift apart without an error.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, Union

import torch
import torch.distributed as dist
from torch import Tensor

from steer_optim.capture import is_dtensor

DataParallel = Union[bool, "dist.ProcessGroup", None]

_WAY_OUT = (
    "which breaks on the second of several backward passes. Shard with FSDP2 (torch.distributed.fsdp.fully_shard) or "
    "replicate with DistributedDataParallel instead"
)


def refuse_deepspeed(optimizer: object) -> None:
    """Raise TypeError, with the remedy, for an optimizer of DeepSpeed, which is not a torch optimizer."""
    if type(optimizer).__module__.partition(".")[0] == "deepspeed":
        raise TypeError(f"{type(optimizer).__name__} is an optimizer of DeepSpeed, {_WAY_OUT}")


def replica_group(data_parallel: DataParallel, parameters: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """Return the group of replicas to average over; None if a process trains by itself or parameters are sharded.

    Raises:
        TypeError: ``data_parallel`` is neither a bool nor a process group of which this process is a member.
        RuntimeError: there are several processes and ``data_parallel`` was not given; or it was given, but
            torch.distributed is not initialized or the parameters are sharded; or only some parameters are sharded;
            or FSDP1, DeepSpeed or tensor parallelism inside DDP is used.
    """
    for p in parameters:
        if getattr(p, "_fsdp_flattened", False):
            raise RuntimeError(f"the parameters are flattened by FullyShardedDataParallel (FSDP1), {_WAY_OUT}")
        if hasattr(p, "ds_id"):
            raise RuntimeError(f"the parameters are partitioned by DeepSpeed ZeRO, {_WAY_OUT}")
        if hasattr(p, "_st_info"):
            raise RuntimeError(
                "the parameters are sharded by tensor parallelism, which DistributedDataParallel hides. Replicate them "
                "with FSDP2 instead: fully_shard over a mesh of two dimensions, the first of which replicates"
            )
    sharded = any(is_dtensor(p) for p in parameters)
    if data_parallel is None or data_parallel is False:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if data_parallel is False or not several or all(is_dtensor(p) for p in parameters):
            return None
        if sharded:
            raise RuntimeError(
                "some parameters are sharded (DTensors) and others are whole, and the optimizer cannot see whether the "
                "whole ones have the same gradients in all processes. If they do (replicated layers of a "
                "tensor-parallel model), pass data_parallel=False; if not (ignored parameters of "
                "fully_shard), shard them too"
            )
        raise RuntimeError(
            f"there are {dist.get_world_size()} processes, and the optimizer cannot see whether they train one "
            "model. Under DDP pass SteeredOptimizer(..., data_parallel=True), or the process group of the "
            "replicas; under FSDP2 create it after fully_shard; if each process trains its own model, pass "
            "data_parallel=False"
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "data_parallel needs torch.distributed: call torch.distributed.init_process_group before the first "
            "backward pass, or leave data_parallel out in one process"
        )
    if sharded:
        raise RuntimeError(
            "data_parallel is for whole parameters, and these are DTensors, whose gradients FSDP2 averages itself "
            "(over the replicas of HSDP, too): leave data_parallel out"
        )
    if data_parallel is True:
        return dist.group.WORLD
    if not isinstance(data_parallel, dist.ProcessGroup):
        raise TypeError(
            f"data_parallel must be a bool or a process group that this process is in; got {data_parallel!r}. For a "
            "device mesh pass mesh.get_group()"
        )
    return data_parallel


def refuse_ddp(parameters: Sequence[Tensor]) -> None:
    """Raise if DDP wraps a parameter: its reducer would average only the first of several backward passes.

    Raises:
        RuntimeError: there are several processes, and such a module exists.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.nn.parallel.DistributedDataParallel)]
    made = [x for x in found if "reducer" in vars(x)]  # or its constructor raised
    averaging = [x for x in made if x.require_backward_grad_sync and x.process_group.size() > 1]  # not in no_sync()
    if not {p for module in averaging for p in module._module_parameters}.isdisjoint(parameters):
        raise RuntimeError("DistributedDataParallel wraps the parameters: pass data_parallel=True instead of False")


def mesh_groups(parameters: Sequence[Any]) -> list[dist.ProcessGroup]:
    """Return the process groups of the meshes that some parameters are sharded or replicated over."""
    meshes = dict.fromkeys(p.device_mesh for p in parameters if is_dtensor(p))
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def guard(data_parallel: DataParallel, parameters: Sequence[Tensor]) -> None:
    """Raise if ``.grad`` is modified after the joined loss has been steered.

    This happens when another loss is backpropagated in the same call: the reducers of DDP and FSDP2 average, overwrite
    or mix gradients at the end of the pass, in an order that autograd decides.

    Raises:
        RuntimeError: from ``backward()``, at its end.
    """
    if not data_parallel and not any(is_dtensor(p) for p in parameters):
        return
    written = [(p, p.grad, _version(p.grad)) for p in parameters]

    def check() -> None:
        if any(p.grad is not gradient or _version(gradient) != version for p, gradient, version in written):
            raise RuntimeError(
                "another loss was backpropagated together with a joined one, and DDP or FSDP2 changed the steered "
                ".grad afterwards, so that it is wrong. Call backward() on the other loss first, in a call of its own"
            )

    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(check))  # behind the reducer, which queues its own


def _version(gradient: Any) -> int | None:
    version: int | None = getattr(getattr(gradient, "_local_tensor", gradient), "_version", None)
    return version
