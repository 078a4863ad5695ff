"""Runs programs in processes that are forked from one that has imported what they need and has done nothing with it.

So several runs of an example pay for its imports once, and each is still a process of its own.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

TIMEOUT = 300


class Server:
    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def run(self, code: str, arguments: Sequence[object] = (), *, each: Sequence[Mapping[str, str]] = ({},)) -> Any:
        """Run the code as a main program, at once with each of some environments: one result each."""
        self.connection.send((code, [str(a) for a in arguments], each))
        assert self.connection.poll(TIMEOUT), f"no answer in {TIMEOUT} seconds"
        return [CompletedProcess(code, *found) for found in self.connection.recv()]


@contextlib.contextmanager
def preloaded(folder: Path, *modules: str, **environment: str) -> Iterator[Server]:
    """A server for programs that run in ``folder`` and need some modules; nothing of it is left at the end."""
    here, there = multiprocessing.Pipe()
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", **environment}
    arguments = (there, str(folder), modules, environment)
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=arguments)
    process.start()
    there.close()
    try:
        yield Server(here)
    finally:
        here.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def two_processes() -> list[dict[str, str]]:
    """The environments that torchrun gives to two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def _serve(jobs: Any, folder: str, modules: Sequence[str], environment: Mapping[str, str]) -> None:
    os.setsid()  # so that what it forks can be ended with it
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, folder)
    for name in modules:
        importlib.import_module(name)
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    while True:
        try:
            code, arguments, each = jobs.recv()
        except EOFError:
            return
        runs = []
        for environment in each:
            outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
            process = fork.Process(target=_run, args=(code, arguments, environment, outputs), daemon=True)
            process.start()
            runs.append((process, outputs))
        found = []
        for process, outputs in runs:
            process.join()
            found.append((process.exitcode, *(Path(f"/proc/self/fd/{output}").read_text() for output in outputs)))
        jobs.send(found)


def _run(code: str, arguments: Sequence[str], environment: Mapping[str, str], outputs: Sequence[int]) -> None:
    for stream, output in enumerate(outputs, start=1):
        os.dup2(output, stream)
    os.environ.update(environment)
    sys.argv = ["", *arguments]
    exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
