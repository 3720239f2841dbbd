"""Options that several commands share."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from ibpcore.bounds.options import BoundOptions
from ibpcore.choices import CLAIMS, DATA_DIR, DATA_DIR_VARIABLE, DATASETS, MOST_THREADS, SOLVERS
from ibpcore_cli.decorators import Decorator, in_group, options
from ibpcore_cli.value_types import DeviceType, Epsilon, Ladder

data_option = in_group("Data")
radii_option = in_group("Radii and solver")
attack_option = in_group("Attack")
run_option = in_group("Run")

at_least_one = click.IntRange(min=1)
PATH = click.Path(path_type=Path)

dataset_options = options(
    data_option("--dataset", click.Choice(DATASETS), "Name of the data set."),
    data_option(
        "--data-dir",
        click.Path(path_type=Path, file_okay=False),
        "Folder with the data sets; for imagefolder, the folder with train/ and test/. Default: the"
        f" one of the run, if there is a run, else ${DATA_DIR_VARIABLE}, else {DATA_DIR}.",
    ),
    data_option("--download", bool, "Download the data set if it is missing.", is_flag=True),
    data_option(
        "--image-size",
        at_least_one,
        "Side length to which images of an imagefolder are resized and cropped.",
    ),
)

data_options = options(
    dataset_options,
    data_option(
        "--limit-test",
        at_least_one,
        "Use only this many test images, drawn from all of them and numbered anew.",
    ),
)

epsilon_max_option = radii_option(
    "--epsilon-max",
    Epsilon(),
    "Largest radius, in pixel units of [0, 1], such as 0.1 or 8.8/255.",
    "--eps",
)

solver_options = options(
    radii_option(
        "--solver",
        click.Choice(SOLVERS),
        "Root finder. Default: tracked in training, brentq for certificates.",
    ),
    radii_option(
        "--max-iterations",
        click.IntRange(min=0),
        "Largest number of bound passes of the root finder.",
    ),
    radii_option(
        "--candidates",
        at_least_one,
        "Radii of an image that the solver fused tries in each pass. Default: 8.",
    ),
    radii_option("--xtol", float, "Absolute tolerance of a radius. Default: 1e-6."),
    radii_option("--rtol", float, "Relative tolerance of a radius. Default: 1e-4."),
)

ball_options = options(
    radii_option(
        "--elide/--no-elide",
        bool,
        "Merge a linear last layer into the margin, for tighter bounds. Default: on.",
        default=None,
    ),
    radii_option(
        "--clip/--no-clip", bool, "Restrict perturbed pixels to [0, 1]. Default: on.", default=None
    ),
)

claim_option = partial(
    radii_option,
    "--claim",
    click.Choice(CLAIMS),
    "What is proved of each radius: that it holds for the real-valued network, or for every"
    " float32 execution of it. With unchecked, float32 bounds are reported without a proof.",
)

certification_options = options(
    epsilon_max_option,
    radii_option(
        "--bound",
        Ladder(),
        "Bound propagation that certifies: ibp, crown-ibp, crown or alpha-crown, each tighter and"
        " slower than the one before. All bounds up to the named one are tried, each only on the"
        " images that the ones before left open; a list, such as ibp,crown, names them one by one.",
        default="ibp",
    ),
    radii_option(
        "--slope-steps",
        click.IntRange(min=0),
        "Largest number of steps in which alpha-crown searches for slopes. Default: 20.",
        default=BoundOptions.slope_steps,
    ),
    radii_option(
        "--inner-slopes/--no-inner-slopes",
        bool,
        "Let alpha-crown search for the slopes of inner layers, too, which is tighter and much"
        " slower. Default: off.",
        default=BoundOptions.inner_slopes,
    ),
    claim_option(default="real"),
    solver_options,
    ball_options,
)

device_option = run_option(
    "--device",
    DeviceType(),
    "Device to compute on; auto takes CUDA if it is available, cuda:1 the second CUDA device.",
    default="auto",
)

threads_option = run_option(
    "--threads",
    click.IntRange(1, MOST_THREADS),
    "Threads to compute with on the CPU. Default: one for each processor that may be used, but"
    " fewer where a step is too small to share.",
)


def out_option(help: str) -> Decorator:
    """`--out`: the folder to make for the results."""
    return run_option("--out", PATH, help)
