"""What `ibp attack` prints: its summary as tables."""

from __future__ import annotations

from typing import Any

import click

from ibpcore.certification.formatting import as_text
from ibpcore_cli.output import percentage


def print_attacks(summary: dict[str, Any]) -> None:
    """The content of `summary.json`, shares in percent."""
    autoattack = summary["autoattack"]
    if not isinstance(autoattack, str):
        autoattack = f"nearer than PGD at {autoattack['nearer']} images"
    click.echo(
        f"\n{summary['method']} on {summary['dataset']}, {summary['samples']} certificates,"
        f" epsilon_max {as_text(summary['epsilon_max'])}\n"
    )
    rows = [
        ("PGD", f"{summary['restarts']} restarts of {summary['steps']} steps"),
        ("AutoAttack", autoattack),
        ("certified above 0", f"{summary['certified']} of {summary['correct']} correct images"),
        ("attacks succeeded", f"{percentage(summary['succeeded'])} of the correct images"),
        ("alarms", str(summary["alarms"])),
        ("compared below epsilon_max", f"{summary['compared']} images"),
        ("attacked - certified radius", _named_numbers(summary["gap"])),
        ("attacked / certified radius", _named_numbers(summary["ratio"])),
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        click.echo(f"  {name:<{width}}  {text}")
    click.echo(f"\n  {'accuracy within':<{width}}  certified  attacked")
    click.echo(f"  {'0':<{width}}  {'':>9}  {percentage(summary['accuracy']):>8}")
    for radius, share in summary["certified_accuracy"].items():
        attacked = percentage(summary["empirical_accuracy"][radius])
        click.echo(f"  {radius:<{width}}  {percentage(share):>9}  {attacked:>8}")


def _named_numbers(values: dict[str, float | None]) -> str:
    return ", ".join(f"{n} {'-' if v is None else f'{v:.4g}'}" for n, v in values.items())
