"""Options of `ibp attack`."""

from __future__ import annotations

from typing import Any

import click

from ibpcore_cli.decorators import GroupedCommand
from ibpcore_cli.options import shared
from ibpcore_cli.work import call


@click.command("attack", cls=GroupedCommand)
@click.argument("model", type=shared.PATH)
@shared.data_option(
    "--certificates",
    shared.PATH,
    "Table of certificates to attack, or its folder. Default: the one beside MODEL, or in"
    " the folder certificates there.",
)
@shared.dataset_options
@shared.data_option("--limit-test", shared.at_least_one, "Attack only this many certificates.")
@shared.attack_option("--restarts", int, "Random starts of PGD. Default: 3.")
@shared.attack_option("--steps", int, "Steps of PGD from each start. Default: 10.")
@shared.attack_option(
    "--autoattack/--no-autoattack",
    bool,
    "Also attack with AutoAttack, which is slow. Default: on if it is installed.",
    default=None,
)
@shared.attack_option("--seed", int, "Random seed of the attacks. Default: 0.")
@shared.device_option
@shared.threads_option
@shared.out_option("Folder to make for the results. Default: attacks, beside MODEL.")
def attack_command(**given: Any) -> None:
    """Attack certificates to refute them, and bound the true radii from above.

    MODEL is a file written by `ibp train`, or its run folder. Each correctly classified
    image is attacked at its certified radius, just below it, and above it until an attack
    succeeds. epsilon_max and --clip are those of the certificates.

    An image misclassified within its certified radius is saved, and the exit code is 3.
    """
    call("attack", given)
