"""Options of `ibp inspect`."""

from __future__ import annotations

from typing import Any

import click

from ibpcore.choices import DIRECTIONS
from ibpcore_cli.decorators import GroupedCommand, in_group
from ibpcore_cli.options import shared
from ibpcore_cli.value_types import Ladder
from ibpcore_cli.work import call

line_option = in_group("Line in weight space")


@click.command("inspect", cls=GroupedCommand)
@click.argument("model", type=shared.PATH)
@shared.dataset_options
@shared.data_option(
    "--samples", shared.at_least_one, "Number of test images to inspect.", "limit_test", default=200
)
@shared.epsilon_max_option
@shared.radii_option(
    "--bound",
    Ladder(),
    "Tightest bound to inspect, of ibp, crown-ibp, crown and alpha-crown; all looser ones are"
    " inspected, too, unless a list names them one by one. The last two take far longer, so use"
    " few --samples. Default: crown-ibp.",
)
@shared.radii_option("--grid", int, "Number of radii at which to evaluate the margin. Default: 65.")
@shared.ball_options
@line_option("--direction", click.Choice(DIRECTIONS), "Direction of the line. Default: gradient.")
@line_option(
    "--line-length",
    float,
    "Length of the line, as a share of the norm of the weights. Default: 0.01.",
)
@line_option("--line-points", int, "Number of points on the line. Default: 33.")
@shared.attack_option("--attack-steps", int, "Steps of PGD from each start. Default: 10.")
@shared.attack_option("--restarts", int, "Random starts of PGD. Default: 3.")
@shared.attack_option("--bisections", int, "Bisections of the radius that is attacked. Default: 8.")
@shared.attack_option("--seed", int, "Random seed of attacks and random directions. Default: 0.")
@shared.device_option
@shared.threads_option
@shared.out_option("Folder to make for the results. Default: inspection, beside MODEL.")
def inspect_command(**given: Any) -> None:
    """Check whether the assumptions of the theory hold for a model.

    Is the certified margin monotone and continuous in epsilon, with a slope at the radius?
    How many ReLUs are stable, how far are certified radii from those that an attack
    reaches, and how does the loss behave along a line in weight space, with IBP and with
    tighter bounds up to --bound? MODEL is a file written by `ibp train`, or its run folder;
    data set, epsilon_max, --elide and --clip default to those of the training.

    If an attack succeeds within a certified radius, the exit code is 3.
    """
    call("inspect", given)
