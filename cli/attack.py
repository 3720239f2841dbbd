"""What `ibp attack` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ibpcore.attacks.evaluation import AttackOptions, attack_test_set, check_certified
from ibpcore.certification.certificates import CERTIFICATES, read_certificates
from ibpcore.data.images import subset_indices
from ibpcore.errors import UserError
from ibpcore.wording import counted
from ibpcore_cli import resources
from ibpcore_cli.attack_table import print_attacks
from ibpcore_cli.decorators import bundle
from ibpcore_cli.output import Contradiction, print_remarks
from ibpcore_cli.progress import progress
from ibpcore_cli.saved_model import SavedModelOptions, open_saved


@bundle(SavedModelOptions, "opening")
@bundle(AttackOptions, "options")
def carry_out(
    model: Path,
    certificates: Path | None,
    opening: SavedModelOptions,
    options: AttackOptions,
    out: Path | None,
) -> None:
    table = read_certificates(_certificates_file(certificates, model))
    whole = replace(
        opening, limit_test=len(table.rows), epsilon_max=table.epsilon_max, clip=table.clip
    )
    saved = open_saved(model, whole)
    resources.compute_with(opening.threads, saved.model, len(table.rows))
    check_certified(saved.model, saved.data, table)
    folder = resources.new_folder(out, saved.path.parent / "attacks")
    print_remarks(saved.data)
    summary, alarms = attack_test_set(
        saved.model,
        saved.data,
        table.at(subset_indices(len(table.rows), opening.limit_test).tolist()),
        folder,
        options,
        facts={"method": saved.method, "model": str(saved.path)},
        watch=progress,
    )
    print_attacks(summary)
    click.echo(f"\nall files are in {folder}")
    for alarm in alarms:
        click.echo(str(alarm), err=True)
    if alarms:
        total = summary["samples"]
        raise Contradiction(
            f"ALARM: {len(alarms)} of {counted(total, 'certificate')} wrong; see {folder}"
        )


def _certificates_file(asked: Path | None, model: Path) -> Path:
    """The table that is asked for, else the one beside the model, else that of `ibp certify`."""
    if asked is not None:
        return asked / CERTIFICATES if asked.is_dir() else asked
    if not model.exists():
        raise UserError(f"there is no model file {model}")
    folder = model if model.is_dir() else model.parent
    made = folder / "certificates" / CERTIFICATES
    beside = folder / CERTIFICATES
    return made if made.exists() and not beside.exists() else beside
