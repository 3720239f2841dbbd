"""Options of `ibp verify`."""

from __future__ import annotations

from typing import Any

import click

from ibpcore.choices import BOUNDS, CLAIMS
from ibpcore_cli.decorators import GroupedCommand, in_group
from ibpcore_cli.options import shared
from ibpcore_cli.work import call

question_option = in_group("Question")


@click.command("verify", cls=GroupedCommand)
@click.argument("onnx", type=shared.PATH, required=False)
@click.argument("vnnlib", type=shared.PATH, required=False)
@question_option(
    "--instances",
    shared.PATH,
    "Verify all rows of this instances.csv of a benchmark, instead of ONNX and VNNLIB.",
    metavar="FILE",
)
@question_option(
    "--bound",
    click.Choice(BOUNDS),
    "The last bound to try, after all looser ones.",
    default=BOUNDS[-1],
)
@question_option(
    "--inner-slopes/--no-inner-slopes",
    bool,
    "After alpha-crown, search for slopes of the inner layers, too. Default: on.",
    default=None,
)
@question_option(
    "--claim",
    click.Choice(CLAIMS),
    "What unsat proves: that the property holds for the real-valued network, or for every float32"
    " execution of it. With unchecked, float32 bounds decide, without a proof.",
    default="real",
)
@question_option(
    "--timeout",
    click.FloatRange(min=0, min_open=True),
    "Seconds for a property, looked at between the steps of bounds and attacks. Default: no"
    " limit, or that of each instance.",
)
@shared.attack_option(
    "--starts", int, "Random starts of the last attack on each open case. Default: 40."
)
@shared.attack_option("--seed", int, "Random seed of the attacks. Default: 0.")
@shared.device_option
@shared.threads_option
@shared.run_option(
    "--counterexample",
    shared.PATH,
    "Also write the result to this file if it is sat, in VNN-COMP's form.",
    metavar="FILE",
)
@shared.run_option(
    "--out",
    shared.PATH,
    "Table of the results of --instances, which is extended if it exists. Default: results.csv.",
    metavar="FILE",
)
def verify_command(**given: Any) -> None:
    """Verify a VNN-LIB property of a network in an ONNX file, as VNN-COMP asks for it.

    Both files may be compressed by gzip. The first line printed is unsat (no input does what the
    property describes), sat (an input does; it follows), unknown or timeout; the exit code is
    0, 10, 11 or 12. The last line says what decided.

    --instances verifies a whole benchmark into a table. The same command resumes it.
    """
    call("verify", given)
