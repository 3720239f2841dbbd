"""Runs in separate processes: one that crashes or is killed does not affect the others."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from ibpcore.data.images import Dataset
from ibpcore.errors import UserError, first_line
from ibpcore.experiments.data_folder import remember_data_dir
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.experiments.run_folder import is_begun
from ibpcore.io.locks import held
from ibpcore.progress import Advance, Watch
from ibpcore.training.config import TrainConfig
from ibpcore.training.loggers import Monitor

SECONDS_TO_END = 10.0
RUN_LENGTH = 1000
"""Amount of work of one run, as reported to an `Advance`."""


class Work(Protocol):
    """What a process does with a run, such as `train_and_certify`; a function it can import."""

    def __call__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        run: Path,
        *,
        device: torch.device | str,
        resume: bool,
        monitor: Monitor,
    ) -> Any: ...


@dataclass(frozen=True)
class Workers:
    """The processes in which runs are executed.

    Attributes:
        data_dir: folder of the data sets.
        device: where everything is computed.
        at_once: number of processes at a time, which share torch's threads.
    """

    data_dir: Path
    device: str
    at_once: int = 1

    def job(self, config: TrainConfig, run: Path, work: Work = train_and_certify) -> Job:
        """The job of one process: `work` on `config` in the folder `run`."""
        threads = max(1, torch.get_num_threads() // self.at_once)
        return Job(config, run, self.data_dir, self.device, threads, work)


@dataclass(frozen=True)
class Job:
    """The work of one process: the run in the folder `run` is created, or resumed if possible."""

    config: TrainConfig
    run: Path
    data_dir: Path
    device: str
    threads: int
    work: Work


def run_all(
    jobs: Iterable[tuple[str, Job]],
    at_once: int,
    *,
    ended: Callable[[str, str], None],
    advance: Advance | None,
) -> None:
    """Executes all jobs, `at_once` at a time, each in its own process.

    All processes have terminated when this returns or raises an exception.

    Args:
        jobs: with their names, taken one by one, each when a process is free; so a job may
            depend on how those before it ended.
        ended: called with the name of each job whose process has terminated and the reason
            why it failed, "" if it did not.
        advance: reports the work done, `RUN_LENGTH` for each job.
    """
    waiting = iter(jobs)
    active: dict[Connection, tuple[str, BaseProcess]] = {}
    reasons: dict[str, str] = {}
    shares: dict[str, float] = {}

    def report(name: str, share: float) -> None:
        shares[name] = share
        if advance is not None:
            advance(int(RUN_LENGTH * sum(shares.values())), [name])

    try:
        while True:
            while len(active) < at_once and (following := next(waiting, None)) is not None:
                name, job = following
                channel, process = _start(job)
                active[channel] = name, process
            if not active:
                return
            ready = wait([*active])
            for channel in [channel for channel in active if channel in ready]:
                name, process = active[channel]
                try:
                    message = channel.recv()
                except (EOFError, OSError):  # it terminated, perhaps while sending
                    process.join()
                    del active[channel]
                    ended(name, reasons.get(name) or _cause(process.exitcode))
                    report(name, 1.0)
                    continue
                if isinstance(message, str):
                    reasons[name] = message
                else:
                    report(name, message)
    finally:
        _terminate([process for _, process in active.values()])


def _start(job: Job) -> tuple[Connection, BaseProcess]:
    context = get_context("spawn")  # a fork would share CUDA and locks with this process
    channel, other_end = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(other_end, job))
    with _sigint_ignored():
        process.start()
    other_end.close()  # so that the channel closes when the process terminates
    return channel, process


@contextmanager
def _sigint_ignored() -> Iterator[None]:
    """Inside, SIGINT is ignored, which child processes inherit: only the parent handles Ctrl-C."""
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
    hint = ", possibly out of memory" if name == "SIGKILL" else ""
    return f"its process was terminated by {name}{hint}"


def _terminate(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(SECONDS_TO_END)
        process.kill()
        process.join()


def _work(channel: Connection, job: Job) -> None:
    """Runs in the child process; sends the share of the training that is done, or an error."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    # An exception, so that temporary files are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(job.threads)
    if torch.device(job.device).index is not None:
        torch.cuda.set_device(job.device)
    try:
        dataset = dataset_of(job.config, job.data_dir)
        # After a sweep was killed, its process may still hold the lock for a moment.
        with held(job.run, SECONDS_TO_END):
            remember_data_dir(job.run, job.data_dir, job.config.dataset)
            monitor, resume = Monitor(_training_watch(channel)), is_begun(job.run)
            job.work(
                job.config, dataset, job.run, device=job.device, resume=resume, monitor=monitor
            )
    except UserError as error:
        channel.send(str(error))
    except OSError as error:
        channel.send(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        channel.send(f"{type(error).__name__}: {first_line(error)}")


def _exit_with_parent() -> None:
    """A killed parent cannot terminate its children; resumed, it would start their runs again."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _training_watch(channel: Connection) -> Watch:
    """Sends the share of the training that is done, and nothing about certification."""

    @contextmanager
    def watch(label: str, length: int) -> Iterator[Advance | None]:
        training = label == "training"
        yield (lambda done, facts: channel.send(done / length)) if training else None

    return watch
