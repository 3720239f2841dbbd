"""Runs in processes of their own: one that crashes or is killed leaves the others alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from ibpcore.errors import UserError, first_line
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.experiments.run_folder import is_begun
from ibpcore.io.locks import held
from ibpcore.progress import Advance, Watch, unwatched
from ibpcore.training.config import TrainConfig

SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Job:
    """What a process is to do.

    Attributes:
        config: of the run; its data set is in `data_dir`.
        run: its folder, made if need be and resumed if it can be.
        device: where everything is computed.
        threads: of torch, on the CPU.
    """

    config: TrainConfig
    run: Path
    data_dir: Path
    device: str
    threads: int


def run_all(
    jobs: Mapping[str, Job],
    at_once: int,
    *,
    ended: Callable[[str, str], None],
    advanced: Callable[[str, float], None],
) -> None:
    """Does all jobs, `at_once` of them at a time, each in a process of its own.

    However this ends, no process is left.

    Args:
        jobs: by name.
        ended: is told each name when its process has ended, and why it failed, "" if it
            did not.
        advanced: is told each name and the share of its training that is done.
    """
    waiting = list(jobs.items())
    active: dict[Connection, tuple[str, BaseProcess]] = {}
    reasons: dict[str, str] = {}
    try:
        while waiting or active:
            while waiting and len(active) < at_once:
                name, job = waiting.pop(0)
                channel, process = _start(job)
                active[channel] = name, process
            ready = wait([*active])
            for channel in [channel for channel in active if channel in ready]:
                name, process = active[channel]
                try:
                    message = channel.recv()
                except (EOFError, OSError):  # it ended, perhaps within a message
                    process.join()
                    del active[channel]
                    ended(name, reasons.get(name) or _cause(process.exitcode))
                    continue
                if isinstance(message, str):
                    reasons[name] = message
                else:
                    advanced(name, message)
    finally:
        _stop([process for _, process in active.values()])


def _start(job: Job) -> tuple[Connection, BaseProcess]:
    context = get_context("spawn")  # a fork would share CUDA and locks with this process
    channel, other_end = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(other_end, job))
    with _ctrl_c_is_for_the_parent():
        process.start()
    other_end.close()  # so that the end of the process ends the channel
    return channel, process


@contextmanager
def _ctrl_c_is_for_the_parent() -> Iterator[None]:
    """A process started here is born deaf to it, and has no traceback to print."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _cause(code: int | None) -> str:
    if not code:
        return ""
    if code > 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(SECONDS_TO_END)
        process.kill()
        process.join()


def _work(channel: Connection, job: Job) -> None:
    """The whole life of a process; sends the share that is done, or why it failed."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    # An exception, so that no file is left half-written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(job.threads)
    if torch.device(job.device).index is not None:
        torch.cuda.set_device(job.device)
    try:
        dataset = dataset_of(job.config, job.data_dir)
        # The process of a sweep that was killed ends a little later than the sweep.
        with held(job.run, SECONDS_TO_END):
            train_and_certify(
                job.config,
                dataset,
                job.run,
                device=job.device,
                resume=is_begun(job.run),
                watch=_watch(channel),
            )
    except UserError as error:
        channel.send(str(error))
    except Exception as error:
        channel.send(f"{type(error).__name__}: {first_line(error)}")


def _end_with_the_parent() -> None:
    """A killed parent cannot stop its children, and would start the same runs anew."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _watch(channel: Connection) -> Watch:
    @contextmanager
    def training(length: int) -> Iterator[Advance | None]:
        yield lambda done, remark: channel.send(done / length)

    return lambda label, length: (
        training(length) if label == "training" else unwatched(label, length)
    )
