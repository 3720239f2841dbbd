"""Networks to measure on: trained on real data, since a fresh one is not representative.

Trained once with ACERT and kept in a folder; what a state holds besides the weights (the
optimiser, what was learnt of each image) is what training held at that moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import click
import torch

from ibpcore import UserError
from ibpcore.data.images import Dataset
from ibpcore.data.sources import Request, load_dataset
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.loop import run_epoch
from ibpcore.training.schedules import epsilon_share
from ibpcore.training.state import TrainState, start_state
from ibpcore_cli.decorators import options

DEFAULTS = {"digits": (1438, 9), "mnist": (30_000, 8), "cifar10": (30_000, 12)}
"""Images and epochs that the networks are trained with, if not told otherwise."""

network_options = options(
    click.option(
        "--dataset",
        "datasets",
        multiple=True,
        help="digits, mnist or cifar10; may be repeated. Default: mnist and cifar10.",
    ),
    click.option("--data-dir", default="data", envvar="IBP_DATA_DIR", show_default=True),
    click.option("--width", default=16, show_default=True),
    click.option("--hidden", default=128, show_default=True),
    click.option("--train-images", type=int, help="Images the networks are trained with."),
    click.option("--train-epochs", type=int, help="Epochs they are trained for."),
    click.option(
        "--cache",
        type=click.Path(path_type=Path),
        default=Path(".bench"),
        show_default=True,
        help="Folder that keeps the trained networks.",
    ),
)


class Stage(NamedTuple):
    """A moment of a training run.

    Attributes:
        name: start, middle or end.
        share: scheduled share of epsilon_max in the epoch after it.
        state: model, optimiser and memory, with a learning rate of 0, so that steps take
            their usual time and change nothing.
    """

    name: str
    share: float
    state: TrainState


@dataclass(frozen=True)
class Subject:
    """A data set and how its networks are trained."""

    dataset: str
    data: Dataset
    config: TrainConfig
    cache: Path
    device: torch.device

    def stages(self) -> list[Stage]:
        """After the first epoch, after half of them, and after the last one."""
        epochs = self.config.epochs
        chosen = {"start": 1, "middle": epochs // 2, "end": epochs}
        if not all(self._file(epoch).exists() for epoch in chosen.values()):
            self._train(set(chosen.values()))
        steps = -(-len(self.data.train) // self.config.batch_size)
        result = []
        for name, epoch in chosen.items():
            state = start_state(self.config, self.data, self.device)
            saved = torch.load(self._file(epoch), map_location=self.device, weights_only=True)
            state.model.load_state_dict(saved["model"])
            state.optimizer.load_state_dict(saved["optimizer"])
            state.slopes.copy_(saved["slopes"])
            for group in state.optimizer.param_groups:
                group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
            step = min(epoch, epochs - 1) * steps + steps // 2
            share = epsilon_share(self.config.schedule, step, steps, self.config.warmup)
            result.append(Stage(name, share, state))
        return result

    def _file(self, epoch: int) -> Path:
        c = self.config
        return self.cache / (
            f"{c.dataset}-w{c.width}-h{c.hidden}-{len(self.data.train)}x{c.epochs}-{epoch}.pt"
        )

    def _train(self, keep: set[int]) -> None:
        self.cache.mkdir(parents=True, exist_ok=True)
        state = start_state(self.config, self.data, self.device)
        images = self.data.train.to(self.device)
        while state.epoch < self.config.epochs:
            click.echo(f"training {self.dataset}: epoch {state.epoch + 1}", err=True)
            state.history.append(run_epoch(state, images, self.config, None))
            state.epoch += 1
            if state.epoch in keep:
                saved = {
                    "model": state.model.state_dict(),
                    "optimizer": state.optimizer.state_dict(),
                    "slopes": state.slopes,
                }
                torch.save(saved, self._file(state.epoch))


def subjects(
    datasets: tuple[str, ...],
    data_dir: str,
    width: int,
    hidden: int,
    train_images: int | None,
    train_epochs: int | None,
    cache: Path,
    device: torch.device,
    quick: bool,
) -> list[Subject]:
    """The data sets asked for, each with what its networks are trained with."""
    found = []
    for name in ("digits",) if quick else datasets or ("mnist", "cifar10"):
        images, epochs = DEFAULTS[name]
        if quick:
            images, epochs, width, hidden = 256, 4, 4, 16
        request = Request(Path(data_dir), limit_train=train_images or images, limit_test=1000)
        try:
            data = load_dataset(name, request)
        except UserError as error:
            raise click.ClickException(str(error)) from None
        config = make_config(
            name,
            "acert",
            width=width,
            hidden=hidden,
            epochs=train_epochs or epochs,
            limit_train=len(data.train),
            solver="tracked",
            max_iterations=2,
        )
        found.append(Subject(name, data, config, cache, device))
    return found
