"""Trains and certifies the models of a table of the paper, and writes the table.

    python -m benchmarks.paper table1 --dataset cifar10 --out results

The runs of all tables of a data set are one sweep, in `OUT/DATASET-SIZE`, so that tables share
them. Those of Table 6, which reports time, are in `OUT/DATASET-SIZE-timed` and always run one
at a time, whatever `--jobs` says. The same command continues after an interruption.
`ibp report OUT/DATASET-SIZE` draws Figures 1 and 3, and Figure 2 from the timed runs.

Each configuration is trained once, except in Table 5 (three seeds). The size `full` is the
paper's: width 64 and 100 or 200 epochs, for a GPU. A run of size `small` takes a few minutes on
two CPU cores. Kappa is chosen on held-out training images, 1,000 in `small` and 5,000 in
`full`; the paper chooses it on the test set.

Tables 1 and 7 also give the share of all test images that CROWN certifies at the customary
radius, for the methods whose networks IBP does not bound tightly. It enters no other column.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from benchmarks.harness import hardware, versions
from benchmarks.paper.certified import with_tighter
from benchmarks.paper.plan import SIZES, TABLES, Row, named_runs
from benchmarks.paper.tables import CERTIFYING, HEADS, chosen, table
from ibpcore.errors import UserError
from ibpcore.experiments.results import Result, Setting
from ibpcore.experiments.run import dataset_of
from ibpcore.experiments.sweeps import SWEEP, Sweep, read_sweep, results_of, run_sweep
from ibpcore.experiments.workers import Workers
from ibpcore.io.files import write_atomic
from ibpcore.io.locks import held
from ibpcore.training.config import TrainConfig
from ibpcore_cli.options.shared import device_option
from ibpcore_cli.resources import chosen_device

TIMED = ("table6",)


def runs_of(names: tuple[str, ...], dataset: str, size: str) -> dict[str, TrainConfig]:
    """The runs that these tables need, by name."""
    return {
        run: config
        for name in names
        for row in TABLES[name].get(dataset, ())
        for run, config in named_runs(row, dataset, size).items()
    }


def carried_out(
    runs: dict[str, TrainConfig], folder: Path, data_dir: Path, device: str, jobs: int
) -> tuple[dict[str, Result], int]:
    """Trains and certifies `runs`, except those that are complete.

    Returns:
        the results of all runs in the folder, and how many runs failed.
    """
    old = read_sweep(folder).runs if (folder / SWEEP).exists() else {}
    whole = Sweep({**old, **runs}, "validation")

    def ended(name: str, result: Result | None, reason: str) -> None:
        art = "" if result is None else f": ART {100 * result.measures['art']:.2f} %"
        click.echo(f"{name}{art}{' failed: ' * bool(reason)}{reason}")

    failed = run_sweep(whole, folder, Workers(data_dir, device, jobs), ended=ended)
    return results_of(folder, whole), len(failed)


def rows_of(
    name: str, dataset: str, size: str, results: dict[str, Result], data_dir: Path, device: str
) -> dict[Row, Setting | None]:
    """The result of each row of a table; in `CERTIFYING` ones with that of the tighter bound."""
    rows = {row: chosen(row, dataset, size, results) for row in TABLES[name][dataset]}
    for row, setting in rows.items():
        if name in CERTIFYING and row.is_loose and setting is not None:
            each = (with_tighter(result, data_dir, device) for result in setting.results)
            rows[row] = replace(setting, results=tuple(each))
    return rows


def page(name: str, dataset: str, size: str, device: str, rows: dict[Row, Setting | None]) -> str:
    """A table, with its title, settings, command and hardware."""
    found = (setting for setting in rows.values() if setting is not None)
    title = next((setting.results[0].title for setting in found), dataset)
    settings = ", ".join(f"{k} {v}" for k, v in SIZES[size][dataset].items()) or "the paper's"
    facts = {**hardware(chosen_device(device)), **versions()}
    made_on = ", ".join(f"{k} {v}" for k, v in facts.items())
    head = [
        f"## {name.replace('table', 'Table ')}: {HEADS[name]}, {title}",
        f"Settings: {settings}. Percent of all test images. ACR and ART are those of IBP's radii;"
        " (chosen) κ by the ART of held-out training images.",
        f"`python -m benchmarks.paper {name} --dataset {dataset} --size {size}`; {made_on}.",
    ]
    return "\n\n".join([*head, "\n".join(table(name, rows))]) + "\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, required=True, type=click.Choice([*TABLES]))
@click.option(
    "--dataset",
    type=click.Choice([*SIZES["small"]]),
    default="cifar10",
    show_default=True,
    help="Data set of the table.",
)
@click.option(
    "--size",
    type=click.Choice([*SIZES]),
    default="small",
    show_default=True,
    help="small takes two CPU cores less than an hour for a table; full is the paper's size.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("paper"),
    show_default=True,
    help="Folder of the tables and their runs; complete runs are not repeated.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, help="Runs at a time. Default: 1.")
@device_option
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data"),
    envvar="IBP_DATA_DIR",
    help="Folder of the data sets. Default: $IBP_DATA_DIR or data.",
)
def main(
    names: tuple[str, ...],
    dataset: str,
    size: str,
    out: Path,
    jobs: int,
    device: str,
    data_dir: Path,
) -> None:
    """Train and certify the models of tables of the paper, and write the tables.

    table1: all methods. table2: without an epsilon schedule. table5: several seeds. table6:
    cost against iterations of the root finder. table7: certified accuracies.
    """
    where = str(chosen_device(device))
    if missing := [name for name in names if dataset not in TABLES[name]]:
        raise click.UsageError(f"the paper has no {', '.join(missing)} for {dataset}")
    # Fails before anything is trained if the data set is missing.
    dataset_of(next(iter(runs_of(names, dataset, size).values())), data_dir)
    for timed in (False, True):
        group = tuple(name for name in names if (name in TIMED) == timed)
        if not group:
            continue
        folder = out / f"{dataset}-{size}{'-timed' * timed}"
        runs = runs_of(group, dataset, size)
        with held(folder):
            results, failed = carried_out(runs, folder, data_dir, where, 1 if timed else jobs)
            found = {name: rows_of(name, dataset, size, results, data_dir, where) for name in group}
        for name, rows in found.items():
            text = page(name, dataset, size, where, rows)
            write_atomic(out / f"{name}-{dataset}-{size}.md", text.encode())
            click.echo(text)
        if failed:
            raise UserError(f"{failed} runs failed; the same command tries them again")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        raise SystemExit(f"Error: {error}") from None
