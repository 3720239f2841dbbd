"""All that is to be measured on a machine with a GPU, in one call and within a given time.

    python -m benchmarks.gpu --minutes 25 --out gpu

In order: the tests that need CUDA; the step table of the full CNN7 on CIFAR-10, of the digits and
of a narrow CNN7, each eager and compiled; fused passes against sequential ones; root finders; and
in the time that is left the preset of CIFAR-10 with fewer epochs. Each part is a process of its
own with its own limit of time, so that none depends on another, and is left out if too little
time is left. What a part prints is in OUT/PART.txt while it runs; after each part OUT/README.md is
written anew, with all tables, and with what failed and how. Networks to measure on are kept in
`.bench`: another call trains none again. `--only` selects parts.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks import harness
from benchmarks.training_step import COMPILED
from ibpcore.distributed import chosen_device
from ibpcore_cli.value_types import DeviceType

ROOT = Path(__file__).parents[1]
PRESET, PRESET_SHARE = "preset", 0.4
"""The last part, and the share of the time that the others leave to it."""
SECONDS = "SECONDS"
TESTS = ["pytest", "-q", "-p", "no:cacheprovider", "-k"]
REDUCED = ["benchmarks.reduced", "--seconds", SECONDS, "--out"]
LINES = 20
"""Of a part's output, where there is no table."""


class Part(NamedTuple):
    """A process `python -m WORDS`.

    Attributes:
        name: names its files.
        words: module and arguments; `SECONDS` among them stands for the part's limit.
        least, most: seconds without which it is not begun, and after which it is stopped.
        table: whether it takes `--json FILE`, for its table.
    """

    name: str
    words: list[str]
    least: float
    most: float
    table: bool = True

    def command(self, seconds: float, out: Path) -> list[str]:
        """For a process that writes its table into this folder."""
        words = [str(int(seconds)) if word == SECONDS else word for word in self.words]
        to = ["--json", str(self.table_in(out))] if self.table else []
        return [sys.executable, "-m", *words, *to]

    def table_in(self, out: Path) -> Path:
        return out / f"{self.name}.json"

    def output_in(self, out: Path) -> Path:
        return out / f"{self.name}.txt"


class Outcome(NamedTuple):
    """How a part ended: in words, after so many seconds; its command, empty if it was left out."""

    part: Part
    ended: str
    seconds: float = 0.0
    command: tuple[str, ...] = ()


def steps(name: str, least: float, most: float, *network: str) -> Iterator[Part]:
    """The step table of a network, eager and compiled."""
    table = ["benchmarks.training_step", "--stage", "end", *network]
    names = [name for plain in COMPILED for name in (plain, f"{plain}, compiled")]
    only = [word for name in names for word in ("--only", name)]
    yield Part(f"step-{name}", table, least, most)
    yield Part(f"step-{name}-compiled", [*table, "--compile", *only], 1.5 * least, 1.5 * most)


def parts(device: str, data_dir: Path, out: Path) -> list[Part]:
    """All of them, in order."""
    given = ["--device", device, "--data-dir", str(data_dir)]
    size = ["--width", "64", "--hidden", "512"]
    cifar10 = ["--dataset", "cifar10", "--train-images", "10000", "--train-epochs", "6"]
    passes = ["benchmarks.bound_passes", "--device", device, *size]
    roots = ["benchmarks.root_finders", *given, *cifar10, *size]
    return [
        Part("tests", [*TESTS, "cuda", "tests"], 40, 180, table=False),
        *steps("64", 60, 200, *given, *cifar10, *size),
        *steps("digits", 45, 120, *given, "--dataset", "digits", "--train-epochs", "9"),
        *steps("16", 60, 150, *given, *cifar10),
        Part("bound_passes", [*passes, "--input", "32x32x3", "--repeats", "5"], 30, 90),
        Part("root_finders", [*roots, "--samples", "128", "--repeats", "3"], 40, 120),
        Part(PRESET, [*REDUCED, str(out / "run"), *given], 90, float("inf")),
    ]


def quick_parts(device: str, data_dir: Path, out: Path) -> list[Part]:
    """Some of them, with small cases."""
    given = ["--quick", "--device", device]
    data = ["--data-dir", str(data_dir)]
    step = ["benchmarks.training_step", *given, *data, "--cache", str(out / "networks")]
    preset = [*REDUCED, str(out / "run"), *given, *data, "--dataset", "digits"]
    file = "tests/benchmarks/test_benchmarks.py"
    return [
        Part("tests", [*TESTS, "operators_are_counted", file], 1, 60, table=False),
        Part("step-digits", [*step, "--only", "acert tracked"], 1, 60),
        Part("bound_passes", ["benchmarks.bound_passes", *given], 1, 60),
        Part(PRESET, preset, 1, 60),
    ]


def limit(part: Part, left: float, kept: float) -> float:
    """Seconds that a part may take, 0 to leave it out.

    Args:
        left: seconds left of the whole time.
        kept: of these, for the preset.
    """
    free = left if part.name == PRESET else left - kept
    return min(part.most, free) if free >= part.least else 0.0


def carried_out(part: Part, seconds: float, out: Path) -> Outcome:
    """Runs a part for so many seconds at most; its output goes into a file of its own."""
    command, started = part.command(seconds, out), time.monotonic()
    part.table_in(out).unlink(missing_ok=True)
    with part.output_in(out).open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            ended = f"failed with exit code {code}" if code else "done"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
        finally:
            end_group(process)
    return Outcome(part, ended, time.monotonic() - started, tuple(command[1:]))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what the process started, too, such as the workers of a compiler."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def page(outcomes: list[Outcome], facts: str, out: Path) -> str:
    """What succeeded and what failed, then the tables, as Markdown."""
    lines = ["# On a GPU", "", facts, "", "| part | | s | command |", "|---|---|---|---|"]
    for part, ended, seconds, command in outcomes:
        text = f"`{shlex.join(['python', *command])}`" if command else ""
        lines.append(f"| {part.name} | {ended} | {seconds:.0f} | {text} |")
    for outcome in outcomes:
        if outcome.command:
            lines += ["", f"## {outcome.part.name}", "", "```", shown(outcome, out), "```"]
    return "\n".join(lines) + "\n"


def shown(outcome: Outcome, out: Path) -> str:
    """The table of a part, or the end of its output where there is none."""
    table = outcome.part.table_in(out)
    if table.exists():
        return harness.as_text(json.loads(table.read_text())["rows"])
    text = outcome.part.output_in(out).read_text(errors="replace")
    return "\n".join(text.splitlines()[-LINES:])


def run_all(chosen: list[Part], seconds: float, facts: str, out: Path) -> list[Outcome]:
    """Runs the parts one after the other; the page is up to date after each."""
    begun, outcomes = time.monotonic(), list[Outcome]()
    kept = PRESET_SHARE * seconds if any(part.name == PRESET for part in chosen) else 0.0
    for part in chosen:
        left = seconds - (time.monotonic() - begun)
        allowed = limit(part, left, kept)
        if allowed:
            click.echo(f"== {part.name}, at most {allowed:.0f} s")
            outcomes.append(carried_out(part, allowed, out))
        else:
            outcomes.append(Outcome(part, f"left out: it needs {part.least:.0f} s"))
        click.echo(f"{part.name}: {outcomes[-1].ended}")
        (out / "README.md").write_text(page(outcomes, facts, out))
    return outcomes


@click.command()
@click.option("--minutes", type=float, default=25, show_default=True, help="Time for everything.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--only", multiple=True, help="Part to run; may be repeated. Default: all.")
@click.option("--quick", is_flag=True, help="Run small cases, to check that all work.")
@harness.data_dir_option
@click.option("--device", type=DeviceType(), default="cuda", show_default=True, help="Device.")
def main(
    minutes: float, out: Path, only: tuple[str, ...], quick: bool, data_dir: str, device: str
) -> None:
    """Run the tests and benchmarks that need a GPU, as many as the time allows."""
    begun = time.monotonic()
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    every = (quick_parts if quick else parts)(device, Path(data_dir).resolve(), out)
    if unknown := {*only} - {part.name for part in every}:
        raise click.BadParameter(f"there is no part {', '.join(unknown)}", param_hint="--only")
    found = {**harness.hardware(chosen_device(device)), **harness.versions()}
    facts = ", ".join(f"{key} {value}" for key, value in found.items())
    chosen = [part for part in every if not only or part.name in only]
    run_all(chosen, 60 * minutes - (time.monotonic() - begun), facts, out)


if __name__ == "__main__":
    main()
