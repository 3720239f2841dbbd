"""`ibp attack`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ibpcore.attacks.evaluation import AttackOptions, attack_test_set, check_certified
from ibpcore.certification.certificates import CERTIFICATES, read_certificates
from ibpcore.data.images import subset_indices
from ibpcore_cli import options as shared
from ibpcore_cli.attack_table import print_attacks
from ibpcore_cli.decorators import GroupedCommand, bundle
from ibpcore_cli.output import Contradiction, print_remarks
from ibpcore_cli.progress import progress
from ibpcore_cli.saved_model import SavedModelOptions, open_saved


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
@bundle(SavedModelOptions, "opening")
@bundle(AttackOptions, "options")
def attack_command(
    model: Path,
    certificates: Path | None,
    opening: SavedModelOptions,
    options: AttackOptions,
    out: Path | None,
) -> None:
    """Attack certificates to refute them, and bound the true radii from above.

    MODEL is a file written by `ibp train`, or its run folder. Each correctly classified
    image is attacked at its certified radius, just below it, and above it until an attack
    succeeds. epsilon_max and --clip are those of the certificates.

    An image misclassified within its certified radius is saved, and the exit code is 3.
    """
    table = read_certificates(_certificates_file(certificates, model))
    whole = replace(
        opening, limit_test=len(table.rows), epsilon_max=table.epsilon_max, clip=table.clip
    )
    saved = open_saved(model, whole)
    shared.compute_with(opening.threads, saved.model, len(table.rows))
    check_certified(saved.model, saved.data, table)
    folder = shared.new_folder(out, saved.path.parent / "attacks")
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
        raise Contradiction(f"ALARM: {len(alarms)} of {total} certificates are wrong; see {folder}")


def _certificates_file(asked: Path | None, model: Path) -> Path:
    """The table that is asked for, else the one beside the model, else that of `ibp certify`."""
    if asked is not None:
        return asked / CERTIFICATES if asked.is_dir() else asked
    folder = model if model.is_dir() else model.parent
    made = folder / "certificates" / CERTIFICATES
    beside = folder / CERTIFICATES
    return made if made.exists() and not beside.exists() else beside
