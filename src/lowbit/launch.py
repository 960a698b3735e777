"""Where a request is carried out: in this process, or in one for every GPU, which this one starts and watches.

Those carry out the request as they would under `torchrun`, and this one computes nothing. What the first of them has to
tell (notices, progress, the result) comes through a pipe. As soon as one fails or dies, the others are ended, and what
happened to it is raised here; those that only lost it have nothing to say.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .prepare import Prepared, hidden_budget, prepare
from .request import Request

if TYPE_CHECKING:
    from .stream.lanes import Lanes
    from .stream.run import RunDirectory

MOURNING = 3.0
"""Seconds in which processes may notice by themselves that another one has died, and say what they know."""
Tell = Callable[..., None]
"""Receives the name of something that happened, and what there is to say of it."""
Result = TypeVar("Result")
TOLD = ("notice", "on_block")
"""Fields of a request that stay in this process: the others call them through the pipe."""


def carry_out(request: Request, lanes: Lanes) -> tuple[RunDirectory, Prepared]:
    """Carry a request out in this process, or its part of it where there are several; the finished directory."""
    from .stream.memory import peak_memory
    from .stream.run import RunDirectory
    from .stream.sweep import Progress, Sweep

    began = time.perf_counter()
    if not lanes.first:
        request = replace(request, notice=lambda _text: None, on_block=lambda *_: None)
    prepared = prepare(request)
    if any(record != prepared.record for record in lanes.gathered(prepared.record)):
        raise ValueError("the processes of this run see different models, texts or versions: start them alike")
    directory = RunDirectory(Path(str(request.output)), len(prepared.plan.anatomy.blocks))
    with directory.opened(prepared.record, restart=request.restart) if lanes.first else nullcontext():
        if lanes.first:
            _write_companions(prepared, directory)
        if not lanes.agreed(directory.complete):
            Sweep(
                prepared.plan,
                prepared.skeleton,
                prepared.checkpoint,
                directory,
                prepared.windows,
                prepared.dtype,
                prepared.device,
                hidden_budget(request.memory, prepared.plan, lanes.world),
                request.gpu_memory,
                prepared.seed,
                Progress(request.on_block),
                lanes,
            ).execute()
            peak = sum(lanes.gathered(peak_memory()))
            if lanes.first:
                directory.log({"total": True, "seconds": time.perf_counter() - began, "peak_memory_bytes": peak})
        lanes.agreed(None)  # what the first process has written is there for all
    return directory, prepared


def _write_companions(prepared: Prepared, directory: RunDirectory) -> None:
    """What stands beside the weights, where a run is not complete."""
    from .formats.base import copy_companions, read_config
    from .formats.native import write_config
    from .stream.rotation import unties
    from .stream.run import ALLOCATION

    if prepared.allocation is not None and not (directory.path / ALLOCATION).exists():
        directory.keep(ALLOCATION, prepared.allocation.to_json())
    if not directory.complete:
        source, untied = prepared.checkpoint.path, unties(prepared.plan.anatomy, prepared.plan.recipe)
        copy_companions(source, directory.path)
        head = {"tie_word_embeddings": False} if untied else {}
        write_config(directory.path, {**read_config(source), **head})


# --- one process for every GPU ----------------------------------------------------------------------------------------


def launch(run: Callable[[Request], Result], request: Request, count: int) -> Result:
    """What `run`, a function of a module, returns of a request in `count` processes. Raises as `together` does."""
    chosen = {each.name: getattr(request, each.name) for each in fields(request) if each.name not in TOLD}
    chosen |= {"gpus": None, "lanes": count if request.lanes is None else request.lanes}
    job = partial(_run, run, chosen)
    result: Result = together(job, count, lambda name, *content: getattr(request, name)(*content))
    return result


def _run(run: Callable[[Request], Result], chosen: Mapping[str, Any], tell: Tell) -> Result:
    """The request in one of the processes."""
    told: dict[str, Any] = {name: partial(tell, name) for name in TOLD}
    return run(Request(**chosen, **told))


def together(job: Callable[[Tell], Any], count: int, hear: Tell) -> Any:
    """Do a job in `count` processes that torch.distributed can join; what the first one's returns.

    `job` is a function of a module, and what it tells is heard here. Raises what one of them raised, or
    ChildProcessError where one was killed; then all have ended.
    """
    from torch.multiprocessing import start_processes

    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(count)]
    arguments = (count, _free_port(), pickle.dumps(job), [sender for _, sender in pipes])
    context = start_processes(_work, arguments, count, join=False, start_method="spawn")
    watched = _Watched(context.processes, [receiver for receiver, _ in pipes], hear)
    try:
        return watched.result()
    finally:
        watched.end()


class _Watched:
    """Processes at work, and what they have told so far."""

    def __init__(self, workers: Sequence[BaseProcess], receivers: Sequence[Connection], hear: Tell) -> None:
        self._workers, self._receivers, self._hear = workers, receivers, hear
        self._done: Any = None
        self._failed: list[BaseException] = []

    def result(self) -> Any:
        """What the first process returns."""
        alive = list(self._workers)
        while alive and not self._fallen():
            wait([*self._receivers, *(worker.sentinel for worker in alive)])
            self._listen()
            alive = [worker for worker in alive if worker.is_alive()]
        if self._fallen():
            deadline = time.monotonic() + MOURNING
            for worker in self._workers:
                worker.join(max(0.0, deadline - time.monotonic()))
        self._listen()
        if self._failed:
            raise self._failed[0]
        for rank, code in self._fallen().items():
            how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"
            raise ChildProcessError(
                f"the process of GPU {rank} {how}: finished blocks are kept, run the same command again to go on"
            )
        return self._done

    def _fallen(self) -> dict[int, int]:
        """Exit status of every process that failed, those killed first."""
        codes = {rank: worker.exitcode for rank, worker in enumerate(self._workers)}
        failed = {rank: code for rank, code in codes.items() if code}
        return dict(sorted(failed.items(), key=lambda item: item[1]))

    def _listen(self) -> None:
        for receiver in self._receivers:
            while receiver.poll():
                name, *content = receiver.recv()
                if name == "result":
                    self._done = content[0]
                elif name == "failed":
                    self._failed += content
                else:
                    self._hear(name, *content)

    def end(self) -> None:
        """End whoever is still there."""
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()
            worker.join()


def _work(rank: int, count: int, port: int, packed: bytes, senders: Sequence[Connection]) -> None:
    """One of the processes."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # also sent when the parent has died, wherever this one is by then
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    from .stream.lanes import Lost, disconnect

    def tell(*what: Any) -> None:
        senders[rank].send(what)

    try:
        result = pickle.loads(packed)(tell)
    except Exception as error:
        if not isinstance(error, Lost):
            tell("failed", _portable(error))
        os._exit(1)  # a process that waits for others would not come to an end by itself
    if rank == 0:
        tell("result", result)
    disconnect()


def _portable(error: Exception) -> Exception:
    """The error as it can be raised in another process, with a note of where it was raised here."""
    note = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # both run code of the error's own class, which may raise anything
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(note)
    return error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
