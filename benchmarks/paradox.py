"""Does a tighter bound train worse (Jovanović et al. 2022, "On the Paradox of Certified Training")?

    python -m benchmarks.paradox --out paradox

The same small network is trained on MNIST with the same number of steps by IBP, by CROWN-IBP with
its ramp to IBP, and by CROWN, three seeds each; only the bound in the loss differs. Networks of
one seed start from the same weights. Measured of each training's own bound, at initialisation and
at the end, with epsilon_max:

- tightness: mean over the images of the rise of the margin that PGD finds / that of the bound;
- continuity: the largest discontinuity of the robust loss along a line in weight space down its
  gradient, of 1 % of the norm of the weights, as a share of the loss's range there;
- sensitivity: how much the slope of the loss changes along this line, relative to its mean.

The table adds the area under the curve of certified accuracy (CR-AUC, the tightness of the paper)
and the certified accuracy at epsilon_max, by the own bound and by the tightest bound of the
registry, of the first test images; bounds are those of float32, without a proof. The same command
continues after an interruption. `--quick` is a small case on the digits.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks.harness import data_dir_option, hardware, versions
from ibpcore import UserError
from ibpcore.attacks.pgd import pgd_attacker
from ibpcore.bounds.registry import BOUNDS
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import Dataset, ImageSet
from ibpcore.experiments.run import dataset_of
from ibpcore.inspection.lines import weight_lines
from ibpcore.inspection.subject import Subject, make_subject
from ibpcore.inspection.tightness import measure_tightness
from ibpcore.io.files import read_json, write_atomic
from ibpcore.precision import full_precision
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.loop import train_model
from ibpcore.training.model import fresh_network
from ibpcore.training.run_files import METRICS

TRAININGS: dict[str, tuple[str, dict[str, str]]] = {
    "ibp": ("fastibp", {}),
    "crown-ibp": ("crown-ibp", {}),
    "crown": ("fastibp", {"train_bound": "crown"}),
}
"""Method and settings of each training, by the bound that it is about."""
COMMON = {"regularizer": 0.0, "initialization": "kaiming", "batch_size": 32}
"""Without what was made for IBP: its regularisers and its initialisation."""
MEASURES, START, END = "measures.json", "start", "end"
TIGHTEST = [*BOUNDS][-1]
TITLES = (
    *("tightness at the start (%)", "at the end", "discontinuity at the start (%)", "at the end"),
    *("sensitivity at the start", "at the end", "CR-AUC at the end (%)", "accuracy (%)"),
    *("certified by the own bound (%)", "by the tightest (%)", "seconds"),
)


@dataclass(frozen=True)
class Size:
    """The size of the benchmark.

    Attributes:
        dataset, settings: of the trainings.
        images: number of test images that are certified.
        attacked: number of these whose tightness is measured.
        line_images: number of these whose loss is followed along a line.
        points: number of points of this line.
    """

    dataset: str
    settings: Mapping[str, Any]
    images: int
    attacked: int
    line_images: int
    points: int


MNIST = Size(
    "mnist",
    {
        "architecture": "conv 8 4x4 s4, relu, linear 50, relu, linear 50, relu, linear",
        "epsilon_max": 0.1,
        "limit_train": 2500,
        "epochs": 8,
        "warmup": (1, 5),
        "learning_rate": 5e-3,
    },
    images=1000,
    attacked=100,
    line_images=16,
    points=33,
)
"""5e-3 is the best of three learning rates (1e-3, 2e-3, 5e-3) for IBP's training of seed 0."""
QUICK = Size(
    "digits",
    {
        "architecture": "linear 8, relu, linear 8, relu, linear",
        "epsilon_max": 0.05,
        "limit_train": 320,
        "epochs": 3,
        "learning_rate": 1e-2,
    },
    images=20,
    attacked=10,
    line_images=4,
    points=5,
)


def configured(name: str, seed: int, size: Size) -> TrainConfig:
    """The configuration of a training, a name in `TRAININGS`."""
    method, own = TRAININGS[name]
    settings = {**COMMON, **size.settings, "limit_test": size.images, "seed": seed, **own}
    return make_config(size.dataset, method, **settings)


def measured(name: str, config: TrainConfig, folder: Path, size: Size, data: Dataset) -> Any:
    """The measures of a training, which is carried out unless its folder has them.

    Raises:
        UserError: the folder is that of other settings.
    """
    path = folder / MEASURES
    if path.exists():
        found = read_json(path)
        if found["config"] != json.loads(json.dumps(config.to_dict())):
            raise UserError(f"{path} is of other settings: choose another folder")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    start = fresh_network(config, data)
    end = train_model(config, data, folder, resume=True)
    lines = (folder / METRICS).read_text().splitlines()
    found = {
        "bound": name,
        "seed": config.seed,
        START: measures(name, start, config, size, data.test),
        END: measures(name, end, config, size, data.test),
        "reached": certified(end, config, data.test),
        "seconds": sum(json.loads(line)["seconds"] for line in lines),
        "config": config.to_dict(),
    }
    write_atomic(path, json.dumps(found, indent=2).encode() + b"\n")
    return found


def subject(model: nn.Module, config: TrainConfig, images: ImageSet) -> Subject:
    """A network and images to inspect it on."""
    return make_subject(model, as_pixels(images.images), images.labels, config.bound_options)


def measures(
    name: str, model: nn.Module, config: TrainConfig, size: Size, images: ImageSet
) -> dict[str, float | None]:
    """Tightness (None where no bound rises), continuity and sensitivity of a bound."""
    epsilon = config.epsilon_max
    with full_precision():
        some = subject(model, config, images[torch.arange(size.attacked)])
        generator = torch.Generator().manual_seed(config.seed)
        attack = pgd_attacker(some.network, 20, 3, generator)
        tight = measure_tightness(some, list(dict.fromkeys(["ibp", name])), epsilon, 1, attack)
        if alarms := tight.alarms():
            raise UserError("; ".join(alarms))
        line = weight_lines(
            subject(model, config, images[torch.arange(size.line_images)]).exact(),
            [name],
            epsilon,
            direction="gradient",
            length=0.01,
            points=size.points,
            generator=generator,
        )[name]
    summary = tight.summary(epsilon)
    return {
        "tightness": summary["local_tightness"]["epsilon_max"][name],
        "area": summary["area"][name],
        "jump": line.jump,
        "sensitivity": line.sensitivity,
        "turns": line.turns,
    }


def certified(model: nn.Module, config: TrainConfig, images: ImageSet) -> dict[str, float]:
    """Accuracy, and certified accuracy at epsilon_max by each bound and by any (`tightest`).

    Only images that no looser bound certifies are given to the next one.
    """
    found = subject(model, config, images)
    with torch.no_grad(), full_precision():
        proved = torch.zeros(len(images), dtype=torch.float64)
        rows = (found.at_zero() < 0).nonzero()[:, 0]
        shares = {"accuracy": len(rows) / len(images)}
        for name in BOUNDS:
            some = found.at(rows)
            radii = torch.full((len(rows),), config.epsilon_max)
            certain = BOUNDS[name].margins(*some.problem, radii, some.bounds) < 0
            proved[rows[certain]] = 1
            rows = rows[~certain]
            shares[name] = float(proved.mean())
    return shares


def table(found: list[dict[str, Any]]) -> list[str]:
    """A line for each training bound, in Markdown: means ± standard deviations over the seeds."""
    lines = ["| training bound | " + " | ".join(TITLES) + " |", "|---" * (1 + len(TITLES)) + "|"]
    for name in TRAININGS:
        columns = zip(*[cells(run) for run in found if run["bound"] == name], strict=True)
        lines.append(f"| {BOUNDS[name].title} | " + " | ".join(map(spread, columns)) + " |")
    return lines


def cells(run: dict[str, Any]) -> list[float]:
    """The numbers of a training, in the order of `TITLES`; NaN where there is none."""
    start, end, reached = run[START], run[END], run["reached"]
    pairs = [
        math.nan if stage[key] is None else factor * stage[key]
        for key, factor in (("tightness", 100), ("jump", 100), ("sensitivity", 1))
        for stage in (start, end)
    ]
    shares = [end["area"], *(reached[key] for key in ("accuracy", run["bound"], TIGHTEST))]
    return [*pairs, *(100 * share for share in shares), run["seconds"]]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation; the mean alone of a single value; "-" if one is missing."""
    if any(map(math.isnan, values)):
        return "-"
    mean = f"{statistics.mean(values):.3g}"
    return f"{mean} ± {statistics.stdev(values):.2g}" if len(values) > 1 else mean


def page(found: list[dict[str, Any]], size: Size, seeds: int) -> str:
    """The table, with its settings, command and hardware."""
    facts = {**hardware(torch.device("cpu")), **versions()}
    settings = ", ".join(f"{key} {value}" for key, value in {**COMMON, **size.settings}.items())
    head = [
        "# Does a tighter bound train worse?",
        f"{size.dataset}, {settings}; {seeds} seeds. Certified accuracy at epsilon_max of the first"
        f" {size.images} test images; tightness and CR-AUC of {size.attacked}, the line of"
        f" {size.line_images} of them. Seconds are those of training, beside other work.",
        f"`python -m benchmarks.paradox {' '.join(sys.argv[1:])}`; "
        + ", ".join(f"{key} {value}" for key, value in facts.items())
        + ".",
    ]
    return "\n\n".join([*head, "\n".join(table(found))]) + "\n"


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of table and runs."
)
@click.option("--quick", is_flag=True, help="Run a small case, to check that it works.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Number.")
@data_dir_option
def main(out: Path, quick: bool, seeds: int, data_dir: str) -> None:
    """Train with bounds of different tightness, and compare what they reach."""
    size = QUICK if quick else MNIST
    found = []
    try:
        for seed in range(seeds):
            for name in TRAININGS:
                config = configured(name, seed, size)
                data = dataset_of(config, Path(data_dir))
                click.echo(f"{name}, seed {seed}")
                found.append(measured(name, config, out / "runs" / f"{name}-{seed}", size, data))
    except UserError as error:
        raise click.ClickException(str(error)) from None
    facts = {"hardware": hardware(torch.device("cpu")), "versions": versions(), "runs": found}
    write_atomic(out / "paradox.json", json.dumps(facts, indent=2).encode() + b"\n")
    write_atomic(out / "README.md", page(found, size, seeds).encode())
    click.echo("\n".join(table(found)))


if __name__ == "__main__":
    main()
