"""Trains and certifies what a table of the paper needs, and writes the table.

    python -m benchmarks.paper table1 --dataset cifar10 --out results

The runs of all tables of a data set lie in one sweep, `OUT/DATASET-SIZE`, so that tables
share them; those of Table 6, which is about time, in `OUT/DATASET-SIZE-timed`, one at a
time and by `--jobs 1` whatever is asked. A command that was stopped goes on where it was.
`ibp report OUT/DATASET-SIZE` makes Figures 1 and 3, and of the timed runs Figure 2.

The size `full` is the paper's: width 64, 100 or 200 epochs, for a GPU. `small` takes two
cores some minutes a run. 1,000 training images of `small`, 5,000 of `full`, are held
out, and choose kappa; the paper chooses on the test set.
"""

from __future__ import annotations

from pathlib import Path

import click

from benchmarks.harness import hardware, versions
from benchmarks.paper.plan import SIZES, TABLES, named_runs
from benchmarks.paper.tables import HEADS, chosen, table
from ibpcore.errors import UserError
from ibpcore.experiments.results import Result
from ibpcore.experiments.run import dataset_of
from ibpcore.experiments.sweeps import SWEEP, Sweep, read_sweep, results_of, run_sweep
from ibpcore.experiments.workers import Workers
from ibpcore.io.files import write_atomic
from ibpcore.io.locks import held
from ibpcore.training.config import TrainConfig
from ibpcore_cli.options import chosen_device

TIMED = ("table6",)


def runs_of(names: tuple[str, ...], dataset: str, size: str) -> dict[str, TrainConfig]:
    """All that these tables need, by name."""
    return {
        run: config
        for name in names
        for row in TABLES[name].get(dataset, ())
        for run, config in named_runs(row, dataset, size).items()
    }


def carried_out(
    runs: dict[str, TrainConfig], folder: Path, data_dir: Path, device: str, jobs: int
) -> tuple[dict[str, Result], int]:
    """The results of `runs`, those that are there already being read, and how many failed."""
    old = read_sweep(folder).runs if (folder / SWEEP).exists() else {}
    whole = Sweep({**old, **runs}, "validation")

    def ended(name: str, result: Result | None, reason: str) -> None:
        art = "" if result is None else f": ART {100 * result.measures['art']:.2f} %"
        click.echo(f"{name}{art}{' failed: ' * bool(reason)}{reason}")

    failed = run_sweep(whole, folder, Workers(data_dir, device, jobs), ended=ended)
    return results_of(folder, whole), len(failed)


def page(name: str, dataset: str, size: str, device: str, results: dict[str, Result]) -> str:
    """A table with its head, its data and what it was made on."""
    rows = {row: chosen(row, dataset, size, results) for row in TABLES[name][dataset]}
    title = next((result.title for result in results.values()), dataset)
    settings = ", ".join(f"{k} {v}" for k, v in SIZES[size][dataset].items()) or "the paper's"
    facts = {**hardware(chosen_device(device)), **versions()}
    made_on = ", ".join(f"{k} {v}" for k, v in facts.items())
    head = [
        f"## {name.replace('table', 'Table ')}: {HEADS[name]}, {title}",
        f"Settings: {settings}. Percent of all test images, certified by IBP; (chosen) κ by the"
        " ART of held-out training images.",
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
    help="small for two cores, under an hour a table; full is the paper's, for a GPU.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("paper"),
    show_default=True,
    help="Folder of the tables and their runs; what is there already is not done again.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, help="Runs at a time. Default: 1.")
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data"),
    envvar="IBP_DATA_DIR",
    help="Folder that holds the data sets, or $IBP_DATA_DIR.",
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
    """Train and certify what tables of the paper need, and write them.

    table1: all methods. table2: without a schedule of epsilon. table5: seeds. table6:
    iterations of the root finder against cost. table7: certified accuracies.
    """
    where = str(chosen_device(device))
    if missing := [name for name in names if dataset not in TABLES[name]]:
        raise click.UsageError(f"the paper has no {', '.join(missing)} for {dataset}")
    dataset_of(next(iter(runs_of(names, dataset, size).values())), data_dir)  # is it there?
    for timed in (False, True):
        group = tuple(name for name in names if (name in TIMED) == timed)
        if not group:
            continue
        folder = out / f"{dataset}-{size}{'-timed' * timed}"
        runs = runs_of(group, dataset, size)
        with held(folder):
            results, failed = carried_out(runs, folder, data_dir, where, 1 if timed else jobs)
        for name in group:
            text = page(name, dataset, size, where, results)
            write_atomic(out / f"{name}-{dataset}-{size}.md", text.encode())
            click.echo(text)
        if failed:
            raise UserError(f"{failed} runs failed; the same command tries them again")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        raise SystemExit(f"Error: {error}") from None
