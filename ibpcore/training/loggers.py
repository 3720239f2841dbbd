"""Logs of a run beside its own files: TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ibpcore.errors import UserError, first_line
from ibpcore.progress import Watch, unwatched
from ibpcore.training.config import TrainConfig
from ibpcore.training.selection import VALIDATION

Metrics = dict[str, Any]
"""An epoch's row of `metrics.jsonl`, or a `summary.json`."""
MEASURES = ("accuracy", "acr", "art", "certified_accuracy")
"""The entries of a summary that are logged."""
PROJECT = "ibpcore"


class Log(NamedTuple):
    """The callbacks that receive the metrics of a run.

    Attributes:
        row: called with each row of `metrics.jsonl`; when a run is resumed, also with the
            rows that were there before.
        summary: called with the content of `summary.json`.
        close: called last, with whether the run was completed.
    """

    row: Callable[[Metrics], None]
    summary: Callable[[Metrics], None]
    close: Callable[[bool], None]


UNLOGGED = Log(lambda row: None, lambda summary: None, lambda complete: None)


class Monitor(NamedTuple):
    """The callbacks of a run: for its progress, and for its metrics once they are on disk."""

    watch: Watch = unwatched
    log: Log = UNLOGGED


UNMONITORED = Monitor()


def open_tensorboard(run: Path, config: TrainConfig) -> Log:
    """Event files in `run/tensorboard`; a resumed run writes a new one with all rows."""
    from torch.utils.tensorboard import SummaryWriter

    # Makes readers discard the rows of earlier files.
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=0)
    settings = json.dumps(config.to_dict(), indent=4)
    writer.add_text("config", "\n".join(f"    {line}" for line in settings.splitlines()))

    def write(numbers: Metrics, epoch: int) -> None:
        for name, value in flat(numbers).items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return Log(
        lambda row: write(_parts(row), row["epoch"]),
        lambda summary: write({"test": _logged_measures(summary)}, summary["epochs"]),
        lambda complete: writer.close(),
    )


def open_wandb(run: Path, config: TrainConfig) -> Log:
    """A run of the project `ibpcore`, named after its folder; wandb's files are in `run/wandb`.

    An interrupted run is resumed under the same id. Environment variables decide the rest,
    such as WANDB_MODE=offline.
    """
    import wandb

    logged = wandb.init(
        project=PROJECT,
        name=run.resolve().name,
        config=config.to_dict(),
        dir=str(run),
        resume="auto",
        settings=wandb.Settings(console="off"),
    )

    def log(row: Metrics) -> None:
        if row["epoch"] >= logged.step:  # it already has the others
            logged.log(flat(_parts(row)), step=row["epoch"])

    return Log(
        log,
        lambda summary: logged.summary.update(flat({"test": _logged_measures(summary)})),
        # A non-zero exit code, so that the run can be resumed.
        lambda complete: logged.finish(0 if complete else 1),
    )


LOGGERS: dict[str, Callable[[Path, TrainConfig], Log]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
}
"""By the name of the package that each needs, which is also the name of the extra."""


def require_loggers(names: Sequence[str]) -> None:
    """Raises UserError unless the packages of these loggers are installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"{name} is needed: pip install 'ibpcore[{name}]'")


@contextmanager
def logged(
    names: Sequence[str], run: Path, config: TrainConfig, warn: Callable[[str], None]
) -> Iterator[Log]:
    """Opens loggers, and closes them at the end.

    A logger that fails once it is open is dropped: the run goes on.

    Args:
        names: keys of `LOGGERS`.
        run: folder of the run.
        warn: called with a one-line message for each logger that failed.

    Raises:
        UserError: one cannot be opened; folders that loggers have made are removed.
    """
    logs = _open(names, run, config)

    def act(name: str, action: Callable[[Log], None]) -> None:
        try:
            action(logs[name])
        except Exception as error:  # libraries may raise any exception
            del logs[name]
            warn(f"{name} failed, and the run goes on without it: {first_line(error)}")

    def each(action: Callable[[Log], None]) -> None:
        for name in [*logs]:
            act(name, action)

    complete = False
    try:
        yield UNLOGGED._replace(
            row=lambda row: each(lambda log: log.row(row)),
            summary=lambda summary: each(lambda log: log.summary(summary)),
        )
        complete = True
    finally:
        each(lambda log: log.close(complete))


def _open(names: Sequence[str], run: Path, config: TrainConfig) -> dict[str, Log]:
    """Opens all of them; if one fails, closes the others and removes the folders they made."""
    logs: dict[str, Log] = {}
    new = [run / name for name in names if not (run / name).exists()]
    try:
        for name in names:
            logs[name] = LOGGERS[name](run, config)
    except Exception as error:
        for log in logs.values():
            log.close(False)
        for folder in new:
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"cannot log to {name}: {first_line(error)}") from None
    return logs


def flat(values: Metrics) -> dict[str, float]:
    """The numbers in `values`; those in nested dictionaries are named `outer/inner`."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{inner}": number for inner, number in flat(value).items()}
        elif type(value) in (int, float):
            numbers[name] = value
    return numbers


def _parts(row: Metrics) -> Metrics:
    """The metrics of an epoch by the images that they are of."""
    apart = ("epoch", VALIDATION)
    train = {name: value for name, value in row.items() if name not in apart}
    return {"train": train, VALIDATION: row.get(VALIDATION, {})}


def _logged_measures(summary: Metrics) -> Metrics:
    return {name: summary[name] for name in MEASURES}
