"""`ibp attack`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ibpcore.attacks.evaluation import AttackOptions, attack_test_set, check_certified
from ibpcore.certification.certificates import CERTIFICATES, read_certificates
from ibpcore_cli.attack_table import print_attacks
from ibpcore_cli.options import at_least_one, dataset_options, device_option, new_folder, options
from ibpcore_cli.output import Contradiction, progress
from ibpcore_cli.saved_model import open_saved

attack_options = options(
    click.option("--restarts", type=int, help="Random starts of PGD. Preset: 3."),
    click.option("--steps", type=int, help="Of PGD from each start. Preset: 10."),
    click.option(
        "--autoattack/--no-autoattack",
        default=None,
        help="Have AutoAttack join, which takes long. Preset: where it is installed.",
    ),
    click.option("--seed", type=int, help="Of the attacks. Preset: 0."),
)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--certificates",
    type=click.Path(path_type=Path),
    help="Table to attack, or its folder. Default: the one beside MODEL, or in certificates there.",
)
@dataset_options
@click.option("--limit-test", type=at_least_one, help="Attack this many of the certificates.")
@attack_options
@device_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to make for the results. Default: attacks, beside MODEL.",
)
def attack(
    model: Path,
    certificates: Path | None,
    dataset: str | None,
    data_dir: Path,
    download: bool,
    image_size: int | None,
    limit_test: int | None,
    device: str,
    out: Path | None,
    **settings: Any,
) -> None:
    """Attack certificates: try to prove them wrong, and bound the true radii from above.

    MODEL is a file written by `ibp train`, or its run folder. Each correctly classified
    image is attacked at its certified radius, just below, and above it until an attack
    succeeds. epsilon_max and --clip are those of the certificates.

    An image misclassified within a certified radius is saved, and ends with exit code 3.
    """
    options = AttackOptions(**{name: v for name, v in settings.items() if v is not None})
    table = read_certificates(_table(certificates, model))
    saved = open_saved(
        model,
        dataset=dataset,
        data_dir=data_dir,
        download=download,
        image_size=image_size,
        limit_test=len(table.rows),
        epsilon_max=table.epsilon_max,
        device=device,
        elide=None,
        clip=table.clip,
    )
    check_certified(saved.model, saved.data, table)
    folder = new_folder(out, saved.path.parent / "attacks")
    summary, alarms = attack_test_set(
        saved.model,
        saved.data,
        table,
        folder,
        options,
        limit=limit_test,
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


def _table(asked: Path | None, model: Path) -> Path:
    """The certificates asked for, else those beside the model, else those of `ibp certify`."""
    if asked is not None:
        return asked / CERTIFICATES if asked.is_dir() else asked
    folder = model if model.is_dir() else model.parent
    made = folder / "certificates" / CERTIFICATES
    beside = folder / CERTIFICATES
    return made if made.exists() and not beside.exists() else beside
