"""Options of `ibp search`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ibpcore.choices import METHODS
from ibpcore_cli.decorators import GroupedCommand, GroupedOption
from ibpcore_cli.options import shared
from ibpcore_cli.options.sweep import SINGLE
from ibpcore_cli.options.train import train_command
from ibpcore_cli.value_types import BudgetType, ObjectivesType, Values
from ibpcore_cli.work import call

search_option = partial(GroupedOption, group="Search")

SEARCH_OPTIONS = [
    search_option(
        ["--methods"],
        type=Values(click.Choice(METHODS), "list"),
        help="Training methods, of which each trial uses one. Default: acert.",
    ),
    search_option(
        ["--objectives"],
        type=ObjectivesType(),
        help="Two measures of held-out images to maximise: accuracy, acr, art, or certified@RADIUS"
        " for the certified accuracy at a radius. Default: accuracy,acr.",
    ),
    search_option(
        ["--space"],
        type=click.Path(path_type=Path, dir_okay=False),
        help="TOML or JSON file with the settings to search, beside or in place of the default"
        " ones. An option that fixes a setting, such as --kappa 0.5, takes it out of the search.",
        metavar="FILE",
    ),
    search_option(
        ["--budget"],
        type=BudgetType(),
        help="Number of trials, or a time such as 2h or 30m, over all resumptions, after which"
        " none begins. Default: 50.",
    ),
    search_option(
        ["--prune/--no-prune"],
        type=bool,
        default=None,
        help="End a trial early that is near chance, or behind the median of the complete trials in"
        " both objectives. Default: on.",
    ),
    search_option(
        ["--certify"],
        type=click.IntRange(min=0),
        default=5,
        help="Largest number of models, spread along the front, to certify on the test images at"
        " the end.",
    ),
    search_option(
        ["--jobs"], type=shared.at_least_one, default=1, help="Number of trials at the same time."
    ),
]
REPLACED = ("method", "out", "resume")
SHARED = [option for option in train_command.params if option.name not in REPLACED + SINGLE]


@click.command("search", cls=GroupedCommand, params=[*SEARCH_OPTIONS, *SHARED])
@shared.run_option(
    "--out",
    click.Path(path_type=Path, file_okay=False),
    "Folder of the search to make. Default: searches/DATASET, numbered if that exists.",
)
@shared.run_option(
    "--resume",
    shared.PATH,
    "Resume the search in this folder, with its own settings. With --budget it ends after that.",
    metavar="SEARCH",
)
def search_command(**given: Any) -> None:
    """Search for the settings with the best trade-offs between two measures.

    Trials are trained with settings that Optuna suggests, and measured on held-out training
    images. The result is the front: the trials that no other one beats in both measures. All
    other options are those of `ibp train`, and apply to every trial. A search that was
    interrupted at any moment goes on with --resume. This needs the extra search.
    """
    call("search", given)
