"""Training, sweeps and certification, killed and resumed, compared with undisturbed ones.

Each kill is a SIGKILL to a process and all its children. It comes at a random moment within the
time that the undisturbed work takes, or while a file is written: before the file is
synchronised, which truncates it at a random length as a power failure would, or just before or
after it gets its name. The killed work is resumed, and sometimes killed again. In the end all
files must have the same bits except for measured seconds, no other file may remain, and no
recorded batch may have been certified again.

At scale 1 there are 50 kills of each kind of work at random moments and 25 while it writes, on
the CPU with one thread. The processes are forks of one that has imported torch and computed
nothing, so that they start at once. No figures are drawn.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.reliability.rows import Row
from ibpcore_cli.options.certify import BESIDE, CERTIFY_SETTINGS

TIMED, AIMED = 50, 25
"""Kills of each kind of work at scale 1: at random moments, and while it writes."""
AGAIN = 0.3
"""Share of the resumed work that is killed once more."""
SIZE = ["--width", "2", "--hidden", "8", "--limit-train", "96", "--validation", "32"]
TRAINED = ["--width", "4", "--hidden", "16", "--limit-train", "640", "--warmup", "1:2"]
SECONDS = ("seconds", "training_seconds", "training_seconds_mean", "training_seconds_std")
BUSY, TRIES = "another process is at work", 100


class Work(NamedTuple):
    """A command that is killed and resumed.

    Attributes:
        name: of its rows.
        first, again: arguments of `ibp` that start and resume it, without the folder.
        begun: the file whose existence means that it can be resumed.
        batches: number of batches that it certifies.
    """

    name: str
    first: list[str]
    again: list[str]
    begun: str
    batches: int


class Undisturbed(NamedTuple):
    """Work that ended by itself.

    Attributes:
        folder: its files.
        seconds: its duration.
        writes: places in its writing where it can be killed.
        batches: number of batches that it certified.
    """

    folder: Path
    seconds: float
    writes: int
    batches: int


class Ended(NamedTuple):
    """A process that ended: its exit code, or None if it was killed, and its output."""

    code: int | None
    said: str


def run(scale: float, seed: int, work: Path) -> list[Row]:
    """Kills, resumes and compares, in a separate process, which the killed ones are forks of.

    Args:
        scale: share of the kills; there is at least one of each kind.
        seed: of the moments.
        work: new folder; kept if something failed.
    """
    command = [sys.executable, "-m", __name__, str(scale), str(seed), str(work.resolve())]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env={**os.environ, **threads}, cwd=root, stdout=subprocess.PIPE, check=True
    )
    return [Row(*row) for row in json.loads(done.stdout)]


def rows(scale: float, seed: int, work: Path) -> list[Row]:
    """The rows of `run`, computed in this process."""
    work.mkdir(parents=True, exist_ok=True)
    model = work / "model"
    train = ["train", *TRAINED, "--epochs", "4", "--out", str(model)]
    if (ended := attempt(train, work / "counts")).code != 0:
        raise RuntimeError(f"what is to be certified cannot be trained: {ended.said}")
    certify = ["certify", str(model), "--bound", "crown-ibp"]
    found = []
    for kind in (
        # The 450 test images of the digits are four batches, held-out training images are one.
        Work("train", ["train", *SIZE, "--epochs", "8"], ["train"], "config.json", 1 + 4),
        Work("sweep", ["sweep", *SIZE, "--epochs", "3"], ["sweep"], "sweep.json", 2 * (1 + 4)),
        Work("certify", certify, ["certify"], "certify.json", 4),
    ):
        whole = undisturbed(kind, work / kind.name)
        for aimed, kills in ((False, TIMED), (True, AIMED)):
            # A string gives the same numbers in every process.
            rng = random.Random(f"{seed} {kind.name} {aimed}")
            found.append(row(kind, aimed, max(1, round(scale * kills)), rng, whole))
            print(found[-1], file=sys.stderr, flush=True)
    if not any(row.failures for row in found):
        shutil.rmtree(work)
    return found


def row(kind: Work, aimed: bool, kills: int, rng: random.Random, whole: Undisturbed) -> Row:
    """The row of one kind of work and of kill."""
    how = "while it wrote" if aimed else "at a random moment"
    killed, failures, tries, first, seconds = 0, 0, 0, "", whole.seconds
    while killed < kills and tries < 4 * kills + 8:
        tries += 1
        folder = whole.folder.with_name(f"{kind.name}-{'aimed' if aimed else 'timed'}-{tries}")
        hit, reason = trial(kind, aimed, rng, folder, whole._replace(seconds=seconds))
        killed += hit
        seconds *= 1.05 if hit else 0.7  # the load of the machine changes
        failures += bool(reason)
        first = first or f"{folder}: {reason}" * bool(reason)
    note = (
        f"{tries} runs compared; undisturbed {whole.seconds:.1f} s,"
        f" {whole.writes} places in writing, {whole.batches} batches certified"
    )
    return Row(f"{kind.name} killed {how}", killed, failures, first or note)


def undisturbed(kind: Work, folder: Path) -> Undisturbed:
    """Runs the work once without a kill.

    Raises:
        RuntimeError: it failed, or its writes and batches were not observed.
    """
    counts, started = folder.with_suffix(".counts"), time.monotonic()
    ended = attempt([*kind.first, "--out", str(folder)], counts)
    if ended.code != 0:
        raise RuntimeError(f"what is to be killed does not work: {ended.said}")
    seconds = time.monotonic() - started
    writes, batches = size(counts / "writes"), size(counts / "batches")
    if writes == 0 or batches != kind.batches:
        raise RuntimeError(
            f"{kind.name}: observed {writes} places in writing and {batches} batches, expected"
            f" {kind.batches}"
        )
    return Undisturbed(folder, seconds, writes, batches)


def trial(
    kind: Work, aimed: bool, rng: random.Random, folder: Path, whole: Undisturbed
) -> tuple[int, str]:
    """Kills once or twice and resumes to the end.

    Returns:
        the number of kills that met a running process, and what is wrong in the end, or "".
    """
    counts, kills = folder.with_suffix(".counts"), 0
    wanted = 1 + (rng.random() < AGAIN)
    while True:
        begun = (folder / kind.begun).exists()
        command = [*kind.again, "--resume"] if begun else [*kind.first, "--out"]
        moment: dict[str, Any] = {}
        if kills < wanted and aimed:
            moment = {"write": size(counts / "writes") + rng.randint(1, whole.writes)}
        elif kills < wanted:
            moment = {"seconds": rng.random() * whole.seconds}
        for _ in range(TRIES):  # killed processes may still be ending
            ended = attempt([*command, str(folder)], counts, rng=rng, **moment)
            if BUSY not in ended.said:
                break
        if ended.code is not None:
            break
        kills += 1
    reason = ended.said if ended.code else "; ".join(differing(whole.folder, folder))
    again = size(counts / "batches") - whole.batches
    if not reason and again > kills:  # each kill costs at most the batch that it interrupted
        reason = f"{again} batches certified again after {kills} kills"
    if not reason:
        shutil.rmtree(folder)
        shutil.rmtree(counts)
    return kills, reason


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def attempt(
    arguments: list[str],
    counts: Path,
    *,
    seconds: float | None = None,
    write: int | None = None,
    rng: random.Random | None = None,
) -> Ended:
    """`ibp ARGUMENTS` in a fork.

    Args:
        counts: folder whose files grow by one byte for each place in writing and each batch.
        seconds: kill it after this time.
        write: kill it at this place in writing, counted over all attempts.
        rng: draws the length at which the file being written is truncated.
    """
    counts.mkdir(parents=True, exist_ok=True)
    torn = 0.0 if rng is None else rng.random()
    (counts / "said").write_text("")  # a child may die before it creates the file
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        _live(arguments, counts, write, torn)
    with contextlib.suppress(OSError):  # the child may have ended already
        os.setpgid(child, child)  # in both processes, so that it precedes every kill
    status, deadline = 0, None if seconds is None else time.monotonic() + seconds
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if deadline is not None and time.monotonic() >= deadline:
            os.killpg(child, signal.SIGKILL)
            break
        time.sleep(0.001)
    _, status = os.waitpid(child, 0)
    said = (counts / "said").read_text()
    return Ended(None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), said)


def _live(arguments: list[str], counts: Path, write: int | None, torn: float) -> None:
    """What a fork does; does not return."""
    code = 1
    try:
        for target in (1, 2):
            os.dup2(os.open(counts / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
        from ibpcore_cli.main import main

        argv = ["ibp", *arguments, "--device", "cpu"]
        with mock.patch.object(sys, "argv", argv), _observed(counts, write, torn):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


@contextlib.contextmanager
def _observed(counts: Path, write: int | None, torn: float) -> Iterator[None]:
    """Counts places in writing and batches, and dies at the place asked for.

    Fails if a name that it replaces does not exist.
    """
    import multiprocessing

    from ibpcore.certification import certify as certification
    from ibpcore.experiments import test_set, workers

    handles = {
        name: os.open(counts / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for name in ("writes", "batches")
    }
    fork = multiprocessing.get_context("fork")

    def passed(name: str) -> int:
        """Counts for all processes of the group."""
        os.write(handles[name], b".")
        return os.fstat(handles[name]).st_size

    def record(*given: Any, before: Callable[..., None] = certification.record) -> None:
        passed("batches")
        before(*given)

    with (
        writing_ends(lambda: passed("writes") == write, lambda: os.killpg(0, signal.SIGKILL), torn),
        mock.patch.object(certification, "record", record),
        mock.patch.object(test_set, "figures_possible", return_value=False),
        mock.patch.object(workers, "get_context", return_value=fork),
    ):
        yield


@contextlib.contextmanager
def writing_ends(
    reached: Callable[[], bool], end: Callable[[], None], torn: float
) -> Iterator[None]:
    """Replaces `os.fsync` and `os.replace` by functions that can end the work.

    Args:
        reached: called at each place in writing: before a file is synchronised, before it gets
            its name, and after that. True ends the work there.
        end: does not return.
        torn: share of a file that is left if the work ends before it is synchronised.
    """

    def fsync(handle: int, before: Callable[[int], None] = os.fsync) -> None:
        if reached():
            tear(handle, torn)
            end()
        before(handle)

    def replace(*paths: Any, before: Callable[..., None] = os.replace) -> None:
        if reached():
            end()
        before(*paths)
        if reached():
            end()

    with mock.patch.object(os, "fsync", fsync), mock.patch.object(os, "replace", replace):
        yield


def tear(handle: int, share: float) -> None:
    """Truncates an open file as a power failure can.

    Of a journal only the last line is truncated, because the lines before it are on disk.
    """
    name = os.readlink(f"/proc/self/fd/{handle}")
    if not os.path.isfile(name):
        return
    content = Path(name).read_bytes()
    begun = content[:-1].rfind(b"\n") + 1 if name.endswith(".journal") else 0
    os.truncate(name, begun + int(share * (len(content) - begun)))


def differing(whole: Path, again: Path) -> list[str]:
    """Files that are in one folder only, or that differ in more than measured seconds."""
    names = [
        {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        for root in (whole, again)
    ]
    wrong = [f"only in one: {name}" for name in sorted(names[0] ^ names[1])]
    both = sorted(names[0] & names[1])
    changed = [name for name in both if content(whole / name) != content(again / name)]
    return wrong + [f"not the same: {name}" for name in changed]


def content(path: Path) -> Any:
    """The content of a file without measured seconds; paths do not depend on its folder."""
    if path.suffix == ".pt":
        import torch

        return _timeless(_plain(torch.load(path, weights_only=True)))
    if path.name == CERTIFY_SETTINGS:
        return {n: x for n, x in json.loads(path.read_text()).items() if n != BESIDE}
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            return [_timeless(line) for line in csv.DictReader(file)]
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(x) for name, x in value.items() if name not in SECONDS}
    return [_timeless(x) for x in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Tensors as bytes, and tuples as lists."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value.numpy().tobytes() if hasattr(value, "numpy") else value


if __name__ == "__main__":
    from ibpcore_cli.commands import load_all

    load_all()  # imports torch once, not in each fork

    print(json.dumps(rows(float(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
