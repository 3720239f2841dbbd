"""Networks to measure on, trained on real data: an untrained one is not representative.

Each is trained once, with ACERT, and kept in a folder. What is kept besides the weights (the
optimiser state, the slopes of R of every image) is what training had at that moment.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from benchmarks import harness
from ibpcore import UserError
from ibpcore.data.images import Dataset
from ibpcore.data.sources import Request, load_dataset
from ibpcore.distributed import chosen_device
from ibpcore.threads import computing_with
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.loop import run_epoch
from ibpcore.training.schedules import epsilon_share
from ibpcore.training.state import TrainState, start_state
from ibpcore_cli.decorators import options

DEFAULTS = {"digits": (1438, 30), "mnist": (30_000, 8), "cifar10": (30_000, 12)}
"""Training images and epochs where the options give none."""
STAGES = ("start", "middle", "end")
"""After the first epoch, after half of them, and after the last one."""

network_options = options(
    click.option(
        "--dataset",
        "datasets",
        multiple=True,
        help="digits, mnist or cifar10; may be repeated. Default: mnist and cifar10.",
    ),
    harness.data_dir_option,
    click.option("--width", default=16, show_default=True, help="Width of the CNN7."),
    click.option("--hidden", default=128, show_default=True, help="Neurons of its hidden layer."),
    click.option("--batch-size", type=int, help="Images of a step. Default: the preset's."),
    click.option("--threads", type=int, help="Threads of torch on the CPU. Default: all."),
    click.option("--train-images", type=int, help="Number of training images."),
    click.option("--train-epochs", type=int, help="Number of training epochs."),
    click.option(
        "--cache",
        type=click.Path(path_type=Path),
        default=Path(".bench"),
        show_default=True,
        help="Folder that keeps the trained networks.",
    ),
)


@dataclass(frozen=True)
class Choice:
    """The values of `network_options`, and the number of test images."""

    datasets: tuple[str, ...]
    data_dir: str
    width: int
    hidden: int
    batch_size: int | None
    threads: int | None
    train_images: int | None
    train_epochs: int | None
    cache: Path
    test_images: int = 1000

    def quick(self) -> Choice:
        """A network of seconds, on the digits, and few images to measure it on."""
        return replace(
            self,
            datasets=("digits",),
            width=4,
            hidden=16,
            train_images=self.train_images or 256,
            train_epochs=self.train_epochs or 4,
            test_images=64,
        )

    def subjects(self, device: torch.device) -> list[Subject]:
        """One for each data set."""
        return [self._subject(name, device) for name in self.datasets or ("mnist", "cifar10")]

    def _subject(self, name: str, device: torch.device) -> Subject:
        images, epochs = DEFAULTS[name]
        limit = self.train_images or images
        try:
            data = load_dataset(name, Request(Path(self.data_dir), False, limit, self.test_images))
        except UserError as error:
            raise click.ClickException(str(error)) from None
        given = {} if self.batch_size is None else {"batch_size": self.batch_size}
        config = make_config(
            name,
            "acert",
            width=self.width,
            hidden=self.hidden,
            epochs=self.train_epochs or epochs,
            limit_train=len(data.train),
            solver="tracked",
            max_iterations=2,
            **given,
        )
        return Subject(data, config, self.cache, device)


@dataclass(frozen=True)
class Subject:
    """A data set and how its network is trained."""

    data: Dataset
    config: TrainConfig
    cache: Path
    device: torch.device

    def stages(self, names: tuple[str, ...]) -> Iterator[Stage]:
        """The network at these stages; trains it unless all stages are kept already."""
        epochs = self.config.epochs
        kept = dict(zip(STAGES, (1, epochs // 2, epochs), strict=True))
        if not all(self._file(epoch).exists() for epoch in kept.values()):
            self._train(set(kept.values()))
        steps = -(-len(self.data.train) // self.config.batch_size)
        for name, epoch in kept.items():
            if name in names:
                step = min(epoch, epochs - 1) * steps + steps // 2
                share = epsilon_share(self.config.schedule, step, steps, self.config.warmup)
                yield Stage(self, name, share, self._load(epoch))

    def state_of(self, saved: dict[str, Any]) -> TrainState:
        """One with these values, of its own, and with a learning rate of 0."""
        state = start_state(self.config, self.data, self.device)
        state.model.load_state_dict(saved["model"])
        state.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        state.slopes.copy_(saved["slopes"])
        state.trend.copy_(saved["trend"])
        for group in state.optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
        return state

    def _load(self, epoch: int) -> TrainState:
        saved = torch.load(self._file(epoch), map_location=self.device, weights_only=True)
        return self.state_of(saved)

    def _file(self, epoch: int) -> Path:
        c = self.config
        network = f"{c.dataset}-w{c.width}-h{c.hidden}-b{c.batch_size}"
        return self.cache / f"{network}-{len(self.data.train)}x{c.epochs}-{epoch}.pt"

    def _train(self, keep: set[int]) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        state = start_state(self.config, self.data, self.device)
        images = self.data.train.to(self.device)
        while state.epoch < self.config.epochs:
            click.echo(f"training {self.config.dataset}: epoch {state.epoch + 1}", err=True)
            state.history.append(run_epoch(state, images, self.config, None))
            state.epoch += 1
            if state.epoch in keep:
                torch.save(values(state), self._file(state.epoch))


def values(state: TrainState) -> dict[str, Any]:
    """Those that `Subject.state_of` takes."""
    return {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "slopes": state.slopes,
        "trend": state.trend,
    }


class Stage(NamedTuple):
    """A network at a moment of its training.

    Attributes:
        subject: its data set and settings.
        name: one of `STAGES`.
        share: the scheduled share of epsilon_max in the epoch that follows.
        state: model, optimiser and slopes; the learning rate is 0, so that a step takes its
            usual time and changes nothing.
    """

    subject: Subject
    name: str
    share: float
    state: TrainState

    @property
    def epsilon(self) -> float:
        """The scheduled epsilon_max, in pixel units."""
        return self.share * self.subject.config.epsilon_max

    def another_state(self) -> TrainState:
        """A copy of `state`, in training mode."""
        copied = self.subject.state_of(values(self.state))
        copied.model.train()
        return copied

    @property
    def facts(self) -> dict[str, Any]:
        """Columns of every row that is measured here."""
        subject = self.subject
        return {
            "dataset": subject.data.title,
            "stage": self.name,
            "width": subject.config.width,
        }


def stages(choice: Choice, device: torch.device, names: tuple[str, ...]) -> Iterator[Stage]:
    """Every chosen network at every one of these stages."""
    for subject in choice.subjects(device):
        yield from subject.stages(names)


def measure_all(
    benchmark: str,
    measure: Callable[[Stage, int], list[harness.Row]],
    names: tuple[str, ...] = STAGES,
    *,
    json_file: Path | None,
    quick: bool,
    device: str,
    repeats: int,
    **networks: Any,
) -> None:
    """The body of a benchmark's command: measures the chosen networks and reports the rows.

    Args:
        benchmark: its module's name.
        measure: returns the rows of a network, given the number of turns.
        names: of the stages to measure; the last one of them if `quick`.
        json_file, quick, device, repeats: see `harness.common_options`.
        networks: the values of `network_options`.
    """
    choice, on = Choice(**networks), chosen_device(device)
    with computing_with(choice.threads):
        found = stages(choice.quick(), on, names[-1:]) if quick else stages(choice, on, names)
        table = [row for stage in found for row in measure(stage, 2 if quick else repeats)]
        harness.report(benchmark, table, on, json_file)
