"""Options that several commands share, and what they stand for."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch

from ibpcore import UserError
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.certificates import UNCHECKED
from ibpcore.certification.certify import BATCH_SIZE
from ibpcore.certification.soundness.network import CLAIMS
from ibpcore.data.sources import DATASETS
from ibpcore.distributed import SINGLE_PROCESS, Ranks, run_on_rank_zero
from ibpcore.io.locks import LOCK, held
from ibpcore.nn.networks import Classifier
from ibpcore.nn.work import multiplications
from ibpcore.roots import SOLVERS
from ibpcore.threads import MOST_THREADS, computing_with, suitable_threads
from ibpcore_cli.decorators import Decorator, in_group, options
from ibpcore_cli.value_types import Epsilon, Ladder

data_option = in_group("Data")
radii_option = in_group("Radii and solver")
attack_option = in_group("Attack")
run_option = in_group("Run")

at_least_one = click.IntRange(min=1)
PATH = click.Path(path_type=Path)

dataset_options = options(
    data_option("--dataset", click.Choice(list(DATASETS)), "Name of the data set."),
    data_option(
        "--data-dir",
        click.Path(path_type=Path, file_okay=False),
        "Folder with the data sets; for imagefolder, the folder with train/ and test/. Default: the"
        " one of the run, if there is a run, else data.",
        envvar="IBP_DATA_DIR",
        show_envvar=True,
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
    data_option("--limit-test", at_least_one, "Use only this many test images."),
)

epsilon_max_option = radii_option(
    "--epsilon-max", Epsilon(), "Largest radius, in pixel units of [0, 1], such as 0.1 or 8.8/255."
)

solver_options = options(
    radii_option(
        "--solver",
        click.Choice(list(SOLVERS)),
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
    click.Choice([UNCHECKED, *CLAIMS]),
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
    click.Choice(["auto", "cpu", "cuda"]),
    "Device to compute on; auto takes CUDA if it is available.",
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


@dataclass(frozen=True)
class DataSource:
    """Where data sets are, and whether missing ones are downloaded.

    Without a folder it is the one that the run or sweep remembers, or else `data`.
    """

    download: bool
    data_dir: Path | None = None


@dataclass(frozen=True)
class CertificateOptions:
    """How radii are bounded, and what is proved of them."""

    bound: str
    claim: str
    slope_steps: int
    inner_slopes: bool


def typed(name: str) -> bool:
    """Whether the parameter of that name stands in the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def chosen_device(name: str, ranks: Ranks = SINGLE_PROCESS) -> torch.device:
    """The device for the value of `--device`; each rank on a machine gets one of its own.

    Raises:
        UserError: CUDA is requested but not available, or has fewer devices than ranks.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("there is no CUDA device: use --device cpu")
    if name == "auto":
        name = "cuda" if available else "cpu"
    if name != "cuda" or ranks.size == 1:
        return torch.device(name)
    if ranks.local >= (count := torch.cuda.device_count()):
        raise UserError(
            f"more processes than CUDA devices ({count}): start fewer, or use --device cpu"
        )
    return torch.device("cuda", ranks.local)


def compute_with(
    threads: int | None, network: Classifier, images: int, ranks: Ranks = SINGLE_PROCESS
) -> int:
    """Computes with so many threads until the command ends, and returns their number.

    None stands for `suitable_threads`, the same on all ranks, for passes of so many `images`,
    or of a batch if that has fewer.
    """
    if threads is None:
        work = min(images, BATCH_SIZE) * multiplications(network)
        threads = run_on_rank_zero(ranks, lambda: suitable_threads(work))
    click.get_current_context().with_resource(computing_with(threads))
    return threads


def hold(folder: Path) -> Path:
    """Holds the lock of `folder` until the command ends; see `ibpcore.io.locks.held`."""
    return click.get_current_context().with_resource(held(folder))


def new_folder(asked: Path | None, default: Path, begun: Container[str] = ()) -> Path:
    """Makes and locks the folder `asked`; if None, `default`, numbered where that exists.

    It may hold files of names in `begun`, which a killed process wrote before it could be resumed.

    Raises:
        UserError: the folder exists and is not empty, is in use, or cannot be made.
    """
    folder, number = asked or default, 2
    while asked is None and folder.exists():
        folder, number = default.with_name(f"{default.name}-{number}"), number + 1
    if any(path.name != LOCK and path.name not in begun for path in hold(folder).iterdir()):
        raise UserError(f"the output folder {folder} already exists and is not empty")
    return folder


def check_new(file: Path | None) -> None:
    """Raises UserError if `file` exists or its folder does not; None is fine."""
    if file is None:
        return
    if file.exists():
        raise UserError(f"the output file {file} already exists")
    if not file.parent.is_dir():
        raise UserError(f"cannot make {file}: there is no folder {file.parent}")
