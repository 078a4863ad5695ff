"""Tests that run in several processes at once: NCCL where there is a device for each of them, else gloo on the CPU.

The processes are forked from a server that has imported what most of them need and done nothing with it, so that a test
costs less than a second, and none can disturb the next. One that hangs in a collective fails.
"""

import functools
import gc
import importlib
import inspect
import itertools
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 60  # seconds for a test that takes one or two, half of it for one collective
NEEDS_FSDP2 = pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6 has FSDP2 on GPUs only")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "pytest",
        "hypothesis",
        "steer_optim.vlm",
        "transformers.models.llama.modeling_llama",
    ]
)


def processes(size: int, **each: Iterable[object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test in ``size`` processes of one group; it fails with the tracebacks of all in which it fails.

    Args:
        size: the number of processes.
        each: values of arguments, of which all combinations are tried one after another in the same processes.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        combinations = [dict(zip(each, values, strict=True)) for values in itertools.product(*each.values())]

        @functools.wraps(check)
        def test(**arguments: object) -> None:
            failures = _launch(check, [{**arguments, **combination} for combination in combinations], size)
            if failures:
                pytest.fail("\n".join(failures), pytrace=False)

        signature = inspect.signature(check)
        given_by_pytest = [p for name, p in signature.parameters.items() if name not in each]
        test.__signature__ = signature.replace(parameters=given_by_pytest)
        return test

    return decorate


def _launch(check: Callable[..., None], calls: list[dict[str, object]], size: int) -> list[str]:
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(size):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            arguments = (sender, check.__module__, check.__name__, calls, f"file://{folder}/store", rank, size)
            worker = CONTEXT.Process(target=_work, args=arguments, daemon=True)
            worker.start()
            sender.close()
            workers.append((worker, receiver))
        end = time.monotonic() + TIMEOUT
        for rank, (worker, receiver) in enumerate(workers):
            try:
                answered = receiver.poll(max(0, end - time.monotonic()))
                error = receiver.recv() if answered else f"no answer in {TIMEOUT} seconds"
            except EOFError:
                error = "ended without an answer"
            if error:
                failures.append(f"process {rank} of {size}, {error}")
            worker.kill()
            worker.join()
            receiver.close()
    return failures


def _work(
    answer: Connection, module: str, name: str, calls: list[dict[str, object]], store: str, rank: int, size: int
) -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "DTensor random operators")  # torch 2.6 says so of every mesh on the CPU
    gc.freeze()  # as in conftest.py
    torch.set_num_threads(1)
    call, error = None, None
    try:
        nccl = torch.cuda.device_count() >= size
        if nccl:
            torch.cuda.set_device(rank)
            torch.set_default_device("cuda")
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            init_method=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=TIMEOUT / 2),
        )
        check = getattr(importlib.import_module(module), name).__wrapped__
        for call in calls:
            torch.manual_seed(0)
            check(**call)
    except BaseException:
        error = f"{call}: {traceback.format_exc()}"
    answer.send(error)
    answer.close()
    os._exit(0)  # the group may be broken, and taking it down could wait for the others
