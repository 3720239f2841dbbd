"""What `ibp verify` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch

from ibpcore import UserError
from ibpcore.distributed import current_device
from ibpcore.experiments.instances import ERROR, tally, verify_instances
from ibpcore.experiments.verification import RESULTS, VerificationOptions, verify
from ibpcore.io.compressed import plain_or_packed
from ibpcore.io.files import write_atomic
from ibpcore.threads import computing_with
from ibpcore.wording import counted
from ibpcore_cli import resources
from ibpcore_cli.decorators import bundle
from ibpcore_cli.progress import progress

EXIT_CODES = dict(zip(RESULTS, (0, 10, 11, 12), strict=True))
"""10 for sat as SAT solvers have it; their 20 for unsat has no meaning. 1 and 2 are errors."""
RESULTS_FILE = Path("results.csv")


@dataclass(frozen=True)
class VerifyFiles:
    """The table of a benchmark, and what to write; None for what is not."""

    instances: Path | None = None
    counterexample: Path | None = None
    out: Path | None = None


@bundle(VerifyFiles, "files")
@bundle(VerificationOptions, "options")
def carry_out(
    onnx: Path | None,
    vnnlib: Path | None,
    files: VerifyFiles,
    options: VerificationOptions,
    device: str,
    threads: int | None,
) -> None:
    if threads is not None:
        click.get_current_context().with_resource(computing_with(threads))
    chosen = current_device(device)
    if files.instances is not None:
        if onnx or files.counterexample:
            raise click.UsageError("--instances takes neither ONNX and VNNLIB nor --counterexample")
        _verify_benchmark(files.instances, files.out or RESULTS_FILE, options, chosen)
        return
    if onnx is None or vnnlib is None or files.out is not None:
        raise click.UsageError("give ONNX and VNNLIB, or --instances FILE and --out FILE")
    resources.check_new(files.counterexample)
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
    resources.hold(out.parent)
    resources.check_writable(out)
    rows = verify_instances(instances, out, options, device, progress)
    click.echo(f"{counted(len(rows), 'instance')}: {', '.join(tally(rows))}")
    seconds = sum(float(row["seconds"]) for row in rows)
    click.echo(f"{seconds:.0f} s together; the table is in {out}")
    failed = [row for row in rows if row["result"] == ERROR]
    if failed:
        raise UserError(
            f"{len(failed)} of {counted(len(rows), 'instance')} failed, the first with:"
            f" {failed[0]['reason']}; the same command tries them again"
        )
