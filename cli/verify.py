"""`ibp verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch

from ibpcore import UserError
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certificates import UNCHECKED
from ibpcore.certification.soundness.network import CLAIMS
from ibpcore.experiments.instances import ERROR, tally, verify_instances
from ibpcore.experiments.verification import RESULTS, VerificationOptions, verify
from ibpcore.io.compressed import plain_or_packed
from ibpcore.io.files import write_atomic
from ibpcore.threads import computing_with
from ibpcore_cli import options as shared
from ibpcore_cli.decorators import GroupedCommand, bundle, in_group
from ibpcore_cli.progress import progress

EXIT_CODES = dict(zip(RESULTS, (0, 10, 11, 12), strict=True))
"""10 for sat as SAT solvers have it; their 20 for unsat has no meaning. 1 and 2 are errors."""
RESULTS_FILE = Path("results.csv")

question_option = in_group("Question")


@dataclass(frozen=True)
class VerifyFiles:
    """The table of a benchmark, and what to write; None for what is not."""

    instances: Path | None = None
    counterexample: Path | None = None
    out: Path | None = None


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
    click.Choice(list(BOUNDS)),
    "The last bound to try, after all looser ones.",
    default=VerificationOptions.bound,
)
@question_option(
    "--inner-slopes/--no-inner-slopes",
    bool,
    "After alpha-crown, search for slopes of the inner layers, too. Default: on.",
    default=None,
)
@question_option(
    "--claim",
    click.Choice([UNCHECKED, *CLAIMS]),
    "What unsat proves: that the property holds for the real-valued network, or for every float32"
    " execution of it. With unchecked, float32 bounds decide, without a proof.",
    default=VerificationOptions.claim,
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
@bundle(VerifyFiles, "files")
@bundle(VerificationOptions, "options")
def verify_command(
    onnx: Path | None,
    vnnlib: Path | None,
    files: VerifyFiles,
    options: VerificationOptions,
    device: str,
    threads: int | None,
) -> None:
    """Verify a VNN-LIB property of a network in an ONNX file, as VNN-COMP asks for it.

    Both files may be compressed by gzip. The first line printed is unsat (no input does what the
    property describes), sat (an input does; it follows), unknown or timeout; the exit code is
    0, 10, 11 or 12. The last line says what decided.

    --instances verifies a whole benchmark into a table. The same command resumes it.
    """
    if threads is not None:
        click.get_current_context().with_resource(computing_with(threads))
    chosen = shared.chosen_device(device)
    if files.instances is not None:
        if onnx or files.counterexample:
            raise click.UsageError("--instances takes neither ONNX and VNNLIB nor --counterexample")
        _verify_benchmark(files.instances, files.out or RESULTS_FILE, options, chosen)
        return
    if onnx is None or vnnlib is None or files.out is not None:
        raise click.UsageError("give ONNX and VNNLIB, or --instances FILE and --out FILE")
    shared.check_new(files.counterexample)
    onnx, vnnlib = plain_or_packed(onnx), plain_or_packed(vnnlib)
    verdict = verify(onnx, vnnlib, options, chosen)
    text = verdict.text()
    if files.counterexample is not None and verdict.counterexample is not None:
        write_atomic(files.counterexample, text.encode())
    click.echo(f"{text}; {verdict.reason}, {verdict.seconds:.1f} s")
    click.get_current_context().exit(EXIT_CODES[verdict.result])


def _verify_benchmark(
    instances: Path, out: Path, options: VerificationOptions, device: torch.device
) -> None:
    shared.hold(out.parent)
    rows = verify_instances(instances, out, options, device, progress)
    click.echo(f"{len(rows)} instances: {', '.join(tally(rows))}")
    seconds = sum(float(row["seconds"]) for row in rows)
    click.echo(f"{seconds:.0f} s together; the table is in {out}")
    failed = [row for row in rows if row["result"] == ERROR]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(rows)} instances failed, the first with:"
            f" {failed[0]['reason']}; the same command tries them again"
        )
