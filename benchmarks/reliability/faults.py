"""Training, sweeps and certifying, killed and resumed, against the same left in peace.

Each kill is a SIGKILL to a process and all its children, at a moment drawn from the time
that the work takes undisturbed, or while it writes: when a file is about to get its name,
just has got it, or was cut off by a power failure at a random length. What is resumed, and
sometimes killed again, must end with the same bits but for seconds, leave no file behind,
and certify no batch again that was recorded.

The processes are forks of one that has imported torch and computed nothing, so that they
need no seconds to start. Certifying is done in small batches, so that there are many, and
no figures are drawn.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reliability.rows import Row

TIMED, AIMED = 50, 25
"""Kills of each kind of work at scale 1: at any moment, and while it writes."""
AGAIN = 0.3
"""Share of the resumed that are killed once more."""
BATCH = 32
SIZE = ["--width", "2", "--hidden", "8", "--limit-train", "96", "--validation", "32"]
TRAINED = ["--width", "4", "--hidden", "16", "--limit-train", "640", "--warmup", "1:2"]
SECONDS = ("seconds", "training_seconds", "training_seconds_mean", "training_seconds_std")
BUSY, TRIES = "another process is at work", 100


class Work(NamedTuple):
    """What is killed.

    Attributes:
        name: of a row.
        first, again: arguments of `ibp`, before the folder.
        begun: the file from which on it can be resumed.
    """

    name: str
    first: list[str]
    again: list[str]
    begun: str


class Undisturbed(NamedTuple):
    """Work that ended by itself.

    Attributes:
        folder: what it wrote.
        seconds, writes, batches: it took, places in its writing where it can be killed, and
            batches that it certified.
    """

    folder: Path
    seconds: float
    writes: int
    batches: int


class Ended(NamedTuple):
    """A process that ended: its exit code, None of one that was killed, and what it printed."""

    code: int | None
    said: str


def run(scale: float, seed: int, work: Path) -> list[Row]:
    """Kills, resumes and compares, in a process of its own, for its forks.

    Args:
        scale: 1 for all kills; at least one of each kind.
        seed: of the moments.
        work: folder that is made; kept where something failed.
    """
    command = [sys.executable, "-m", __name__, str(scale), str(seed), str(work.resolve())]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, env={**os.environ, **threads}, cwd=root, stdout=subprocess.PIPE, check=True
    )
    return [Row(*row) for row in json.loads(done.stdout)]


def rows(scale: float, seed: int, work: Path) -> list[Row]:
    """Those of `run`, in this process."""
    work.mkdir(parents=True, exist_ok=True)
    model = work / "model"
    train = ["train", *TRAINED, "--epochs", "4", "--out", str(model)]
    if (ended := attempt(train, work / "counts")).code != 0:
        raise RuntimeError(f"what is to be certified cannot be trained: {ended.said}")
    found = []
    for kind in (
        Work("train", ["train", *SIZE, "--epochs", "8"], ["train"], "config.json"),
        Work("sweep", ["sweep", *SIZE, "--epochs", "3"], ["sweep"], "sweep.json"),
        Work(
            "certify", ["certify", str(model), "--bound", "crown-ibp"], ["certify"], "certify.json"
        ),
    ):
        whole = undisturbed(kind, work / kind.name)
        for aimed, kills in ((False, TIMED), (True, AIMED)):
            # A text, since only of such is a seed the same in every process.
            rng = random.Random(f"{seed} {kind.name} {aimed}")
            found.append(row(kind, aimed, max(1, round(scale * kills)), rng, whole))
            print(found[-1], file=sys.stderr, flush=True)
    if not any(row.failures for row in found):
        shutil.rmtree(work)
    return found


def row(kind: Work, aimed: bool, kills: int, rng: random.Random, whole: Undisturbed) -> Row:
    """So many kills of one kind."""
    how = "while it wrote" if aimed else "at a random moment"
    killed, failures, tries, first, seconds = 0, 0, 0, "", whole.seconds
    while killed < kills and tries < 4 * kills + 8:
        tries += 1
        folder = whole.folder.with_name(f"{kind.name}-{'aimed' if aimed else 'timed'}-{tries}")
        hit, reason = trial(kind, aimed, rng, folder, whole._replace(seconds=seconds))
        killed += hit
        seconds *= 1.05 if hit else 0.7  # other work on the machine comes and goes
        failures += bool(reason)
        first = first or f"{folder}: {reason}" * bool(reason)
    note = (
        f"{tries} runs compared; undisturbed {whole.seconds:.1f} s,"
        f" {whole.writes} places in writing, {whole.batches} batches certified"
    )
    return Row(f"{kind.name} killed {how}", killed, failures, first or note)


def undisturbed(kind: Work, folder: Path) -> Undisturbed:
    counts, started = folder.with_suffix(".counts"), time.monotonic()
    ended = attempt([*kind.first, "--out", str(folder)], counts)
    if ended.code != 0:
        raise RuntimeError(f"what is to be killed does not work: {ended.said}")
    seconds = time.monotonic() - started
    return Undisturbed(folder, seconds, size(counts / "writes"), size(counts / "batches"))


def trial(
    kind: Work, aimed: bool, rng: random.Random, folder: Path, whole: Undisturbed
) -> tuple[int, str]:
    """Kills once or twice, resumes to the end; the kills that met, and what is wrong after."""
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
        for _ in range(TRIES):  # those who were killed may still be ending
            ended = attempt([*command, str(folder)], counts, rng=rng, **moment)
            if BUSY not in ended.said:
                break
        if ended.code is not None:
            break
        kills += 1
    reason = ended.said if ended.code else "; ".join(differing(whole.folder, folder))
    again = size(counts / "batches") - whole.batches
    if not reason and again > kills:  # each kill costs at most the batch it fell into
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
        counts: folder whose files grow by a byte for each place in writing and each batch.
        seconds, write: when to kill it, or at which place in writing, as counted there.
        rng: for the length of what was being written.
    """
    counts.mkdir(parents=True, exist_ok=True)
    torn = 0.0 if rng is None else rng.random()
    (counts / "said").write_text("")  # a child may die before it has a word
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        _live(arguments, counts, write, torn)
    with contextlib.suppress(OSError):  # where the child is gone already
        os.setpgid(child, child)  # here too: whoever is first, no kill may come before it
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
    """The whole life of a fork."""
    code = 1
    try:
        for target in (1, 2):
            os.dup2(os.open(counts / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), target)
        _observe(counts, write, torn)
        sys.argv = ["ibp", *arguments, "--device", "cpu"]
        from ibpcore_cli.main import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _observe(counts: Path, write: int | None, torn: float) -> None:
    """Counts places in writing and batches, and dies at the place asked for."""
    import multiprocessing

    from ibpcore.certification import certify as certification
    from ibpcore.experiments import test_set
    from ibpcore.experiments import workers as processes

    handles = {
        name: os.open(counts / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for name in ("writes", "batches")
    }

    def passed(name: str) -> int:
        """Counts for all processes of the group at once."""
        os.write(handles[name], b".")
        return os.fstat(handles[name]).st_size

    def place() -> bool:
        return passed("writes") == write

    def die() -> None:
        os.killpg(0, signal.SIGKILL)

    def fsync(handle: int, before: Callable[[int], None] = os.fsync) -> None:
        if place():
            tear(handle, torn)
            die()
        before(handle)

    def replace(*paths: Any, before: Callable[..., None] = os.replace) -> None:
        if place():
            die()
        before(*paths)
        if place():
            die()

    def find_radii(
        *given: Any, before: Callable[..., Any] = certification.find_radii, **more: Any
    ) -> Any:
        passed("batches")
        return before(*given, **more)

    os.fsync, os.replace = fsync, replace  # type: ignore[assignment]
    certification.find_radii = find_radii
    certification.BATCH_SIZE = BATCH
    test_set.figures_possible = lambda: False
    fork = multiprocessing.get_context("fork")
    processes.get_context = lambda kind: fork  # type: ignore[assignment]


def tear(handle: int, share: float) -> None:
    """What a power failure makes of an open file whose last line is not yet on disk."""
    name = os.readlink(f"/proc/self/fd/{handle}")
    if not os.path.isfile(name):
        return
    content = Path(name).read_bytes()
    begun = content[:-1].rfind(b"\n") + 1 if name.endswith(".journal") else 0
    os.truncate(name, begun + int(share * (len(content) - begun)))


def differing(whole: Path, again: Path) -> list[str]:
    """Files that are in one folder only, or not the same but for seconds."""
    names = [
        {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        for root in (whole, again)
    ]
    wrong = [f"only in one: {name}" for name in sorted(names[0] ^ names[1])]
    both = sorted(names[0] & names[1])
    changed = [name for name in both if content(whole / name) != content(again / name)]
    return wrong + [f"not the same: {name}" for name in changed]


def content(path: Path) -> Any:
    """Of a file, without what a clock put there."""
    if path.suffix == ".pt":
        import torch

        return _timeless(_plain(torch.load(path, weights_only=True)))
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

    load_all()  # once, and not in each fork

    print(json.dumps(rows(float(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
