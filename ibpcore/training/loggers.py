"""Where a run is logged beside its own files: TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ibpcore.errors import UserError, first_line
from ibpcore.training.config import TrainConfig

Row = dict[str, Any]
MEASURES = ("accuracy", "acr", "art", "certified_accuracy")
"""Of a summary, what is logged."""
PROJECT = "ibpcore"


class Log(NamedTuple):
    """What is told how a run goes.

    Attributes:
        row: takes each row of `metrics.jsonl`; when a run is resumed, those before it again.
        summary: takes what `summary.json` gets.
        close: is called last, with whether the run came to its end.
    """

    row: Callable[[Row], None]
    summary: Callable[[Row], None]
    close: Callable[[bool], None]


UNLOGGED = Log(lambda row: None, lambda summary: None, lambda complete: None)


def open_tensorboard(run: Path, config: TrainConfig) -> Log:
    """Event files in `run/tensorboard`; when a run is resumed, a new one with all rows."""
    from torch.utils.tensorboard import SummaryWriter

    # From step 0 on readers forget, with it, what files before this one said.
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=0)
    settings = json.dumps(config.to_dict(), indent=4)
    writer.add_text("config", "\n".join(f"    {line}" for line in settings.splitlines()))

    def write(part: str, numbers: Row, epoch: int) -> None:
        for name, value in flat(numbers).items():
            writer.add_scalar(f"{part}/{name}", value, epoch)
        writer.flush()

    return Log(
        lambda row: write("train", _without_epoch(row), row["epoch"]),
        lambda summary: write("test", _measures(summary), config.epochs),
        lambda complete: writer.close(),
    )


def open_wandb(run: Path, config: TrainConfig) -> Log:
    """A run of the project `ibpcore`, named as its folder; its own files are in `run/wandb`.

    One that was cut off is gone on with under the same id. The environment decides the
    rest, such as WANDB_MODE=offline.
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

    def log(row: Row) -> None:
        if row["epoch"] >= logged.step:  # the others it has already
            numbers = flat({"train": _without_epoch(row)})
            logged.log(numbers, step=row["epoch"])

    return Log(
        log,
        lambda summary: logged.summary.update(flat({"test": _measures(summary)})),
        # A run that failed is one to go on with.
        lambda complete: logged.finish(0 if complete else 1),
    )


LOGGERS: dict[str, Callable[[Path, TrainConfig], Log]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
}
"""By the name of the package that each needs, which is that of its extra, too."""


def require_loggers(names: Sequence[str]) -> None:
    """Raises UserError unless the packages of these loggers are installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"{name} is needed: pip install 'ibpcore[{name}]'")


@contextmanager
def logged(
    names: Sequence[str], run: Path, config: TrainConfig, tell: Callable[[str], None]
) -> Iterator[Log]:
    """Opens loggers, and closes them at the end.

    The files of the run come first: a logger that fails later than here is left out from
    then on.

    Args:
        names: in `LOGGERS`.
        run: folder of the run.
        config: of the run.
        tell: is told in one line of each logger that failed.

    Raises:
        UserError: one cannot be opened; no folder of any is left that was not there.
    """
    logs = _open(names, run, config)

    def act(name: str, action: Callable[[Log], None]) -> None:
        try:
            action(logs[name])
        except Exception as error:  # a library, and what it needs, may raise anything
            del logs[name]
            tell(f"{name} failed, and the run goes on without it: {first_line(error)}")

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
    """All of them, or none and no folder that was not there."""
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


def flat(values: Row) -> dict[str, float]:
    """The numbers in it, those within it as `outer/inner`."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{inner}": number for inner, number in flat(value).items()}
        elif type(value) in (int, float):
            numbers[name] = value
    return numbers


def _without_epoch(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "epoch"}


def _measures(summary: Row) -> Row:
    return {name: summary[name] for name in MEASURES}
