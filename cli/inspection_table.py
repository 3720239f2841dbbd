"""What `ibp inspect` prints: its report as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ibpcore.certification.formatting import as_text, in_unit_of
from ibpcore.wording import counted
from ibpcore_cli.output import percentage, print_table


def print_inspection(report: dict[str, Any]) -> None:
    """The content of `inspection.json`, shares in percent."""
    click.echo(
        f"\n{report['method']} on {report['dataset']},"
        f" {counted(report['margins']['samples'], 'test image')},"
        f" epsilon_max {as_text(report['epsilon_max'])}"
    )
    _print_margins(report["margins"], report["epsilon_max"])
    _print_slopes(report["slopes"])
    _print_relus(report["relus"])
    _print_tightness(report["tightness"], report["epsilon_max"])
    _print_lines(report)


def _print_section(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A title and a table, whose first column is aligned left and the others right."""
    click.echo(f"\n{title}")
    print_table(rows, "<" + ">" * (len(rows[0]) - 1))


def _significant(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _print_margins(found: dict[str, Any], epsilon_max: float) -> None:
    total = found["samples"]
    rows = [("images where it", "", "")]
    for name, key in (("decreases", "decreasing"), ("jumps", "jumps")):
        rows.append((f"  {name}, beyond rounding", str(found[key]), f"of {total}"))
    rows.append(("  is not finite", str(found["not_finite"]), f"of {total}"))
    if "largest_step" in found:
        place = f"at {in_unit_of(epsilon_max, found['largest_step_at'])}"
        rows += [
            ("shares of its range", "", ""),
            ("  largest decrease", percentage(found["largest_decrease"], 4), ""),
            ("  largest step", percentage(found["largest_step"]), place),
            ("  the same with every second radius", percentage(found["largest_step_coarse"]), ""),
            ("ratio of these two, at most", _significant(found["step_to_coarse_step_largest"]), ""),
            (
                f"left of a step after {counted(found['halvings'], 'halving')}",
                percentage(found["remainder_of_step_largest"]),
                "at most",
            ),
        ]
    title = f"margin R(epsilon) at {found['points']} radii (Theorems 3.2, A.1, A.2)"
    _print_section(title, rows)


def _print_slopes(found: dict[str, Any]) -> None:
    rows = [("images", str(found["samples"])), ("  with slope 0", str(found["zero"]))]
    if "smallest" in found:
        rows += [
            ("  with a kink there", str(found["kinks"])),
            ("smallest slope", _significant(found["smallest"])),
            ("  5 %, 50 %, 95 % quantile", _three_quantiles(found["quantiles"])),
            ("chord from 0 to the radius / slope", _three_quantiles(found["secant_to_slope"])),
        ]
    _print_section("slope of R at radii between 0 and epsilon_max (Theorem 3.4)", rows)


def _three_quantiles(quantiles: dict[str, float]) -> str:
    return "  ".join(_significant(quantiles[q]) for q in ("0.05", "0.5", "0.95"))


def _print_relus(found: dict[str, Any]) -> None:
    names = ("active", "inactive", "unstable")
    rows: list[tuple[str, ...]] = [("layer", *names, *names)]
    at_limit = found["at_epsilon_max"]
    at_radius: list[dict[str, Any]] = found["at_radius"] or [dict.fromkeys(names)] * len(at_limit)
    for number, layers in enumerate(zip(at_radius, at_limit, strict=True), 1):
        rows.append((str(number), *[percentage(layer[n], 1) for layer in layers for n in names]))
    title = "ReLUs that are always active, always inactive, unstable"
    above = " " * 9 + f"{'at the radius':^30}  {'at epsilon_max':^30}".rstrip()
    _print_section(f"{title}\n{above}", rows)


def _print_tightness(found: dict[str, Any], epsilon_max: float) -> None:
    def radius_text(radius: float | None) -> str:
        return "-" if radius is None else in_unit_of(epsilon_max, radius)

    rows = [("", "mean radius", "area", "gap", "at radius", "at epsilon_max")]
    local = found["local_tightness"]
    for name, radius in found["mean_radius"].items():
        shares = (percentage(local[place][name], 1) for place in ("radius", "epsilon_max"))
        area, gap = percentage(found["area"][name]), radius_text(found["mean_gap"][name])
        rows.append((name, radius_text(radius), area, gap, *shares))
    rows.append(("attackable", radius_text(found["mean_attackable_radius"]), "", "", "", ""))
    _print_section(
        "radii, area under the curve of certified accuracy,\n"
        "and local tightness: rise of R found by PGD / rise of the bound",
        rows,
    )
    click.echo(
        "  attackable up to epsilon_max, the misclassified included:"
        f" {counted(found['attackable'], 'image')}"
    )


def _print_lines(report: dict[str, Any]) -> None:
    title = (
        f"robust loss along a line in weight space: {report['direction']},"
        f" {percentage(report['line_length'], 1)} of the weights, {report['line_points']} places"
    )
    halvings = {line["halvings"] for line in report["lines"].values()}
    left = f"left of a step after {', '.join(map(str, halvings))} halvings"
    rows = [("", "loss", "change", left, "jump / range", "sensitivity", "turns")]
    for name, line in report["lines"].items():
        rows.append(
            (
                name,
                _significant(line["loss"]),
                _significant(line["loss_change"]),
                percentage(line["remainder_of_step"]),
                percentage(line["jump"]) if line["jumps"] else "none",
                _significant(line["sensitivity"]),
                str(line["turns"]),
            )
        )
    _print_section(title, rows)
