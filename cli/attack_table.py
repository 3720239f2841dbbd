"""What `ibp attack` prints: its summary in words and as tables."""

from __future__ import annotations

from typing import Any

import click

from ibpcore.certification.formatting import as_text, in_unit_of
from ibpcore.wording import counted
from ibpcore_cli.output import percentage, print_table


def print_attacks(summary: dict[str, Any]) -> None:
    """The content of `summary.json`, shares in percent."""
    click.echo(
        f"\n{summary['method']} on {summary['dataset']},"
        f" {counted(summary['samples'], 'certificate')},"
        f" epsilon_max {as_text(summary['epsilon_max'])}\n\n{_verdict(summary)}\n"
    )
    autoattack = summary["autoattack"]
    if not isinstance(autoattack, str):
        autoattack = f"nearer than PGD at {counted(autoattack['nearer'], 'image')}"
    correct = f"of {counted(summary['correct'], 'correctly classified image')}"
    restarts, steps = counted(summary["restarts"], "restart"), counted(summary["steps"], "step")
    rows = [
        ("PGD", f"{restarts} of {steps} at each radius"),
        ("AutoAttack", autoattack),
        ("certified at some radius", f"{summary['certified']} {correct}"),
        ("broken at some radius above the certificate", f"{summary['broken']} {correct}"),
    ]
    print_table(rows, "<<")
    _print_gap(summary)
    click.echo()
    print_table(_accuracy_rows(summary), "<>>")


def _accuracy_rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The share of images that keep their correct prediction, with heads."""
    rows = [
        ("images still classified correctly", "proved", "under attack"),
        ("without a perturbation", "", percentage(summary["accuracy"])),
    ]
    for radius, share in summary["certified_accuracy"].items():
        attacked = percentage(summary["empirical_accuracy"][radius])
        rows.append((f"perturbed by up to {radius}", percentage(share), attacked))
    return rows


def _verdict(summary: dict[str, Any]) -> str:
    """Whether the certificates stood."""
    alarms, certified = summary["alarms"], summary["certified"]
    if alarms:
        return (
            f"Attacks changed {alarms} of {certified} certified predictions within the certified"
            " radius: these certificates are wrong."
        )
    return "No attack changed a prediction within its certified radius."


def _print_gap(summary: dict[str, Any]) -> None:
    """How far the nearest success lies above the radius, where epsilon_max is not between."""
    if summary["compared"] == 0:
        return
    gap, ratio, limit = summary["gap"], summary["ratio"], summary["epsilon_max"]
    heads = ("mean", "median")
    compared = counted(summary["compared"], "image")
    rows = [
        (f"attacked radius of {compared} certified below epsilon_max", *heads),
        ("  minus the certified radius", *(in_unit_of(limit, gap[name]) for name in heads)),
        ("  divided by the certified radius", *(f"{ratio[name]:.4g}" for name in heads)),
    ]
    click.echo()
    print_table(rows, "<>>")
