"""Tests the promises in docs/reliability.md and counts the failures.

    python -m benchmarks.reliability --out results

Claim: there are none. The parts are `soundness` (proofs against rational arithmetic),
`worst_cases` (certificates of networks whose worst image is known, and float32 executions of
it), `inner_layers` (what layers read, and the intervals that were proved), `attacks` (PGD within
certified radii), `faults` (killed processes), `fuzz` (damaged files and command lines) and
`modules` (random custom networks). All run on the CPU, once for each case; all cases
(`--scale 1`) take a few hours on two cores. The same seed gives the same cases, except for kills,
which come at random moments.
"""

from __future__ import annotations

import json
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.harness import hardware, versions
from benchmarks.reliability.rows import Row
from ibpcore.io.files import write_atomic

PARTS = ("soundness", "worst_cases", "inner_layers", "attacks", "faults", "fuzz", "modules")


def page(rows: dict[str, list[Row]], facts: dict[str, Any]) -> str:
    """The counts as Markdown, with hardware and versions."""
    lines = ["| part | what | cases | failures | |", "|---|---|---|---|---|"]
    lines += [
        f"| {part} | {row.what} | {row.cases:,} | {row.failures:,} | {row.note} |"
        for part, counted in rows.items()
        for row in counted
    ]
    made_on = ", ".join(f"{name} {value}" for name, value in facts.items())
    return "\n".join(["# Reliability", "", *lines, "", f"{made_on}.", ""])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("parts", nargs=-1, type=click.Choice(PARTS))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--scale",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the full number of cases.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the cases.")
def main(parts: tuple[str, ...], out: Path, scale: float, seed: int) -> None:
    """Run some PARTS, or all, and count the failures."""
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {}
    facts = {"scale": scale, "seed": seed, **hardware(torch.device("cpu")), **versions()}
    for part in parts or PARTS:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as work:
            rows[part] = import_module(f"benchmarks.reliability.{part}").run(
                scale, seed, Path(work)
            )
        click.echo(f"{part}: {time.perf_counter() - start:.0f} s", err=True)
        table = {name: [row._asdict() for row in counted] for name, counted in rows.items()}
        write_atomic(
            out / "reliability.json", json.dumps({**facts, "rows": table}, indent=2).encode()
        )
        write_atomic(out / "reliability.md", page(rows, facts).encode())
    click.echo(page(rows, facts))
    failures = sum(row.failures for counted in rows.values() for row in counted)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
