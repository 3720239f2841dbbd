"""Option types and options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from click.shell_completion import CompletionItem

from ibpcore import UserError
from ibpcore.certification.formatting import as_number
from ibpcore.data.sources import DATASETS
from ibpcore.distributed import SINGLE_PROCESS, Ranks
from ibpcore.io.locks import LOCK, held
from ibpcore.roots import SOLVERS

MOST_VALUES = 1000
"""Of a swept setting: more are a slip of the keyboard."""


class Epsilon(click.ParamType):
    """A radius in pixel units, above 0 and at most 1, typed as 0.1 or 8/255."""

    name = "epsilon"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            number = as_number(str(value))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is not a number such as 0.1 or 8/255", param, ctx)
        if not (math.isfinite(number) and 0 < number <= 1):
            self.fail(f"{value} is not above 0 and at most 1", param, ctx)
        return number


class Epochs(click.ParamType):
    """First and last epoch, typed as 1:20."""

    name = "first:last"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        try:
            first, last = (int(part) for part in str(value).split(":"))
        except ValueError:
            self.fail(f"{value!r} is not FIRST:LAST, such as 1:20", param, ctx)
        return first, last


class Values(click.ParamType):
    """A comma list of values of one type, each once; a range if the type has them."""

    def __init__(self, item: click.ParamType, name: str) -> None:
        self.item, self.name = item, name

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        texts = [text.strip() for text in str(value).split(",") if text.strip()]
        if not texts:
            self.fail("no value", param, ctx)
        return tuple(dict.fromkeys(self.item.convert(text, param, ctx) for text in texts))

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        items = self.item.shell_complete(ctx, param, last)
        return [CompletionItem(before + comma + item.value, item.type) for item in items]


class Kappas(click.ParamType):
    """Numbers: one, a comma list, or START:STOP:STEP, STOP included."""

    name = "start:stop:step"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        kappas: dict[float, None] = {}
        for text in str(value).split(","):
            kappas |= dict.fromkeys(self._range(text, param, ctx))
            if len(kappas) > MOST_VALUES:
                self.fail(f"more than {MOST_VALUES} values", param, ctx)
        return tuple(kappas)

    def _range(self, text: str, param: Any, ctx: Any) -> list[float]:
        try:
            numbers = [float(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
            self.fail(f"{text!r} is neither a number nor START:STOP:STEP", param, ctx)
        start, stop, step = numbers if len(numbers) == 3 else (numbers[0], numbers[0], 1.0)
        if not (start <= stop and step > 0):
            self.fail(f"{text!r} does not go up from START to STOP", param, ctx)
        steps = (stop - start) / step
        if steps > MOST_VALUES:
            self.fail(f"{text!r} has more than {MOST_VALUES} values", param, ctx)
        # Rounded: 3 * 0.1 is 0.3 to whoever types it.
        return [round(start + i * step, 10) for i in range(int(steps + 1e-6) + 1)]


class Seeds(click.ParamType):
    """How many seeds, from 0, or a comma list of them."""

    name = "count|list"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if "," in str(value):
            return Values(click.IntRange(min=0), self.name).convert(value, param, ctx)
        count = click.IntRange(min=1, max=MOST_VALUES).convert(value, param, ctx)
        return tuple(range(count))


def options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    """Several `click.option`s as one decorator, in the order of the help text."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


at_least_one = click.IntRange(min=1)

dataset_options = options(
    click.option("--dataset", type=click.Choice(list(DATASETS)), help="Data set."),
    click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("data"),
        envvar="IBP_DATA_DIR",
        show_default=True,
        show_envvar=True,
        help="Folder that holds the data sets; for imagefolder the tree itself.",
    ),
    click.option("--download", is_flag=True, help="Fetch the data set if it is not there."),
    click.option("--image-size", type=at_least_one, help="Side of the images of an imagefolder."),
)

data_options = options(
    dataset_options,
    click.option("--limit-test", type=at_least_one, help="Use this many test images."),
)

solver_options = options(
    click.option(
        "--solver",
        type=click.Choice(list(SOLVERS)),
        help="Root finder. Preset: tracked in training, brentq for certificates.",
    ),
    click.option(
        "--max-iterations",
        type=click.IntRange(min=0),
        help="Bound passes of the root finder.",
    ),
    click.option(
        "--candidates",
        type=click.IntRange(min=1),
        help="Radii of an image in each pass of the solver fused. Preset: 8.",
    ),
    click.option("--xtol", type=float, help="Absolute tolerance of a radius. Preset: 1e-6."),
    click.option("--rtol", type=float, help="Relative tolerance of a radius. Preset: 1e-4."),
)

bound_options = options(
    click.option(
        "--elide/--no-elide",
        default=None,
        help="Merge the last layer into the margin. Preset: on.",
    ),
    click.option(
        "--clip/--no-clip",
        default=None,
        help="Keep perturbed pixels in [0, 1]. Preset: on.",
    ),
)

device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto takes CUDA if there is one.",
)


def chosen_device(name: str, ranks: Ranks = SINGLE_PROCESS) -> torch.device:
    """The device that `--device` means; of several ranks on a machine each has its own.

    Raises:
        UserError: CUDA is asked for and not there, or not for that many ranks.
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


def hold(folder: Path) -> Path:
    """`ibpcore.io.locks.held`, until the command ends."""
    return click.get_current_context().with_resource(held(folder))


def new_folder(asked: Path | None, default: Path) -> Path:
    """Makes and holds the folder `asked` for, or `default` with the next free number behind it.

    Raises:
        UserError: the folder is there already and not empty, is in use, or cannot be made.
    """
    folder, number = asked or default, 2
    while asked is None and folder.exists():
        folder, number = default.with_name(f"{default.name}-{number}"), number + 1
    if any(path.name != LOCK for path in hold(folder).iterdir()):
        raise UserError(f"the output folder {folder} is there already and not empty")
    return folder


def check_new(file: Path | None) -> None:
    """Raises UserError unless `file` is None, or can be made where nothing is."""
    if file is None:
        return
    if file.exists():
        raise UserError(f"the output file {file} is there already")
    if not file.parent.is_dir():
        raise UserError(f"cannot make {file}: there is no folder {file.parent}")
