"""Runs all benchmarks, one after the other, and writes a page of their tables and figures."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.harness import as_text
from benchmarks.training_step import COMPILED
from ibpcore_cli.options.shared import device_option

DIGITS = "--dataset digits --threads 1"
OVERHEAD = f"{DIGITS} --width 1 --hidden 8 --batch-size 8"
FULL = "--dataset cifar10 --width 64 --hidden 512 --train-images 2560 --train-epochs 2"
LATE = "--stage middle --stage end"
SHORT = '--only "acert brentq exact" --only "acert tracked exact" --only "acert tracked"'
BOTH = " ".join(f'--only "{name}" --only "{name}, compiled"' for name in COMPILED)
RUNS = {
    "bound_passes": "bound_passes --repeats 3",
    "root_finders": "root_finders --repeats 5",
    "root_finders_overhead": f"root_finders {OVERHEAD} --samples 8",
    "training_step": "training_step --repeats 7",
    "training_step_short": f"training_step {LATE} --repeats 15 {SHORT}",
    "training_step_compiled": f"training_step --stage end --compile {BOTH}",
    "training_step_digits": f"training_step {LATE} --repeats 25 {DIGITS}",
    "training_step_overhead": f"training_step {LATE} --repeats 25 {OVERHEAD}",
    "training_step_64": f"training_step --stage end --repeats 5 {FULL}",
    "certify_throughput": "certify_throughput --repeats 3",
    "certify_throughput_overhead": f"certify_throughput --repeats 3 {OVERHEAD}",
    "proofs": "proofs --repeats 5",
}
"""Benchmark and options of each table."""
QUICK = ("bound_passes", "root_finders", "training_step", "certify_throughput", "proofs")
"""Small cases of the others would be the same again."""
PAPER = {"FastIBP": 1.0, "ACERT, 2 iterations": 3.3, "ACERT, 100 iterations": 11.0}
"""Cost of a step as a multiple of FastIBP's (Table 6)."""
MARKERS = "osD^v<>Ph*Xdp8"


def run(name: str, out: Path, options: list[str]) -> dict[str, Any]:
    """The results of one of `RUNS`, in a process of its own, with further options."""
    target, (benchmark, *own) = out / f"{name}.json", shlex.split(RUNS[name])
    words = [f"benchmarks.{benchmark}", *own, *options, "--json", str(target)]
    command = [sys.executable, "-m", *words]
    subprocess.run(command, check=True)
    return dict(json.loads(target.read_text()))


def cost_figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the cost of a training step against its radius error, for every solver."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise click.ClickException("figures need matplotlib: pip install '.[plot]'") from None
    rows = [r for r in rows if r.get("radius_error") is not None and r["stage"] != "start"]
    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["dataset"], row["width"], row["stage"]), []).append(row)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 4.6), sharey=True, squeeze=False
    )
    names = list(dict.fromkeys(row["contender"] for row in rows))
    colours = plt.get_cmap("tab20")
    looks = {name: (MARKERS[i % len(MARKERS)], colours(i)) for i, name in enumerate(names)}
    for axis, (panel, its_rows) in zip(axes[0], panels.items(), strict=True):
        draw_costs(axis, its_rows, looks)
        axis.set_title("{}, width {}, {} of training".format(*panel), fontsize=10)
    axes[0][0].set_ylabel("cost of a step / FastIBP's")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.16, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_costs(axis: Any, rows: list[dict[str, Any]], looks: dict[str, tuple[str, Any]]) -> None:
    """Draws a panel: a point for each row, a line for each cost in the paper.

    Args:
        looks: marker and colour of each contender.
    """
    for row in rows:
        name = row["contender"]
        marker, colour = looks[name]
        at = max(row["radius_error"], 1e-8), row["ratio"]
        axis.plot(*at, marker, color=colour, markersize=8, label=name.removeprefix("acert "))
    for text, ratio in PAPER.items():
        axis.axhline(ratio, color="0.6", linewidth=1, linestyle=":")
        factor, side = (0.96, "top") if ratio == 1 else (1.03, "bottom")
        at = 1.2e-8, ratio * factor
        axis.text(*at, f"paper: {text}", color="0.4", fontsize=8, va=side)
    axis.axvline(0.01, color="0.85", linewidth=1)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(1e-8, 1)
    axis.set_ylim(0.4, 16)
    axis.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    axis.minorticks_off()
    axis.set_xlabel("mean radius error / epsilon_max")


def page(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown, with command, hardware and versions of each benchmark."""
    parts = ["# Benchmarks", ""]
    for name, result in results.items():
        facts = {**result["hardware"], **result["versions"]}
        parts += [
            f"## {name}",
            "",
            ", ".join(f"{key} {value}" for key, value in facts.items()),
            "",
            f"    {result['command']}",
            "",
        ]
        if name == "training_step":
            parts += ["![cost of a step against radius error](training_step.png)", ""]
        parts += ["```", as_text(result["rows"]), "```", ""]
    return "\n".join(parts)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--quick", is_flag=True, help="Run small cases, to check that all work.")
@device_option
@click.argument("networks", nargs=-1, type=click.UNPROCESSED)
def main(out: Path, quick: bool, device: str, networks: tuple[str, ...]) -> None:
    """Run all benchmarks, which takes two CPU cores about an hour and a half.

    NETWORKS are options of those that measure trained networks, such as --data-dir.
    """
    out.mkdir(parents=True, exist_ok=True)
    common = ["--device", device, *(["--quick"] if quick else [])]
    results = {}
    for name in RUNS:
        if quick and name not in QUICK:
            continue
        click.echo(f"== {name}")
        options = common if name == "bound_passes" else [*common, *networks]
        results[name] = run(name, out, options)
    cost_figure(results["training_step"]["rows"], out / "training_step.png")
    (out / "README.md").write_text(page(results))


if __name__ == "__main__":
    main()
