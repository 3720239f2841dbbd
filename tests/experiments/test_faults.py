"""Faults: kills, power cuts at every write, full and read-only disks, lost files, busy folders."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from helpers import run_ibp, snapshot

from benchmarks.reliability.faults import differing, run, writing_ends
from ibpcore import UserError, load_model, save_model
from ibpcore.certification import certify as certification
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.data.images import hold_out
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments import sweeps
from ibpcore.experiments.extension import extend
from ibpcore.experiments.run import train_and_certify
from ibpcore.experiments.run_folder import is_begun, is_complete, saved_config
from ibpcore.experiments.sweeps import Sweep, results_of, run_sweep
from ibpcore.experiments.workers import Workers
from ibpcore.io import locks
from ibpcore.io.files import TEMPORARY, write_atomic
from ibpcore.io.journal import Journal
from ibpcore.io.locks import held
from ibpcore.nn import checkpoint
from ibpcore.training import loop as training
from ibpcore.training.config import make_config

BATCHES = (128, 128, 44)
"""Sizes of the batches in which the test images are certified."""
IMAGES = sum(BATCHES)
DATA = hold_out(load_dataset("digits", Request(limit_train=32, limit_test=IMAGES)), 16)
SMALL = {"limit_train": 32, "limit_test": IMAGES, "validation": 16}
CONFIG = make_config(
    *("digits", "acert"), **SMALL, epochs=2, width=1, hidden=2, batch_size=16, select_weights="best"
)
TINY = ("--epochs", 1, "--limit-train", 64, "--limit-test", IMAGES, "--width", 2, "--hidden", 8)
MODEL = "model.safetensors"


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


pytestmark = pytest.mark.usefixtures("no_figures", "elsewhere")


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "run"
    assert run_ibp("train", *TINY, "--device", "cpu", "--out", folder)[::2] == (0, "")
    return folder


@pytest.fixture
def batches(monkeypatch):
    """Grows with every batch of certificates that is kept."""
    seen, before = [], certification.record

    def record(*given):
        seen.append(1)
        before(*given)

    monkeypatch.setattr(certification, "record", record)
    return seen


def refused(*command, says):
    """One line, and nothing on disk has changed."""
    before = snapshot(Path())
    code, _, err = run_ibp(*command)
    assert code in (1, 2)
    assert len(err.splitlines()) == 1, err
    assert says in err
    assert snapshot(Path()) == before


# Power cuts


class PowerCut(BaseException):
    """Nothing is caught of it and nothing cleared away after it."""


@contextlib.contextmanager
def power(monkeypatch, lasts=float("inf")):
    """Writing stops at that place, torn, for good; yields the places that were passed."""
    places = []

    def off():
        return len(places) >= lasts

    def reached():
        places.append(1)
        return off()

    def end():
        raise PowerCut

    def unlink(path, before=os.unlink):
        if off():
            end()
        before(path)

    with monkeypatch.context() as patch, writing_ends(reached, end, 0.6):
        patch.setattr(os, "unlink", unlink)
        with contextlib.suppress(PowerCut):
            yield places
    assert len(places) >= lasts or lasts == float("inf")


@linux
def test_a_power_cut_at_every_write_of_a_run(tmp_path, monkeypatch, batches):
    """Training, and certifying in one and in three batches."""
    whole = tmp_path / "whole"
    whole.mkdir()
    with power(monkeypatch) as places:
        train_and_certify(CONFIG, DATA, whole)
    assert len(batches) == 4
    assert len(places) > 50
    left_over = 0
    for at in range(1, len(places) + 1):
        batches.clear()
        folder = tmp_path / str(at)
        folder.mkdir()
        with power(monkeypatch, at):
            train_and_certify(CONFIG, DATA, folder)
        left_over += any(path.name.endswith(TEMPORARY) for path in folder.iterdir())
        with held(folder):
            train_and_certify(CONFIG, DATA, folder, resume=True)
        assert differing(whole, folder) == [], at
        assert len(batches) <= 4 + 1, "only the batch that was not yet on disk"
        assert is_complete(folder, CONFIG)
    assert left_over > 20


@linux
def test_a_power_cut_at_every_write_of_an_extension(tmp_path, monkeypatch):
    """The run is as it was, or goes on to the end of a run that was extended undisturbed."""
    before, whole = tmp_path / "before", tmp_path / "whole"
    before.mkdir()
    train_and_certify(CONFIG, DATA, before)
    longer = dataclasses.replace(CONFIG, epochs=3)

    def extended(folder):
        extend(folder, longer)
        train_and_certify(longer, DATA, folder, resume=True)

    shutil.copytree(before, whole)
    with power(monkeypatch) as places:
        extend(Path(shutil.copytree(before, tmp_path / "only")), longer)
        beginning = len(places)
        extended(whole)
    assert differing(before, whole / "epoch-2") == []
    assert is_complete(whole, longer)
    seen, draw = set(), random.Random(0).sample
    last = range(beginning - 5, beginning + 6)  # where the run becomes a longer one
    for at in [*draw(range(1, last[0]), 8), *last, *draw(range(last[-1], len(places) // 2), 4)]:
        folder = Path(shutil.copytree(before, tmp_path / str(at)))
        with power(monkeypatch, at):
            extended(folder)
        with held(folder):
            config = saved_config(folder)
            seen.add(config.epochs)
            assert is_complete(folder, CONFIG) == (config == CONFIG)
            extended(folder) if config == CONFIG else train_and_certify(
                config, DATA, folder, resume=True
            )
        assert differing(whole, folder) == [], at
    assert seen == {2, 3}


@linux
def test_a_power_cut_in_a_sweep(tmp_path, monkeypatch, batches):
    """Its own files and those of its runs, all in this process."""

    def run_all(jobs, at_once, *, ended, advance):
        for name, job in jobs:
            with contextlib.nullcontext() if cut else held(job.run):
                job.run.mkdir(parents=True, exist_ok=True)
                train_and_certify(job.config, DATA, job.run, resume=is_begun(job.run))
            ended(name, "")

    monkeypatch.setattr(sweeps, "run_all", run_all)
    configs = {
        name: make_config("digits", name, epochs=1, width=1, hidden=2, batch_size=16, **SMALL)
        for name in ("acert", "fastibp")
    }
    sweep = Sweep(configs, "validation")
    given = {"workers": Workers(tmp_path, "cpu"), "ended": lambda *_: None}
    whole, cut = tmp_path / "whole", False
    whole.mkdir()
    with power(monkeypatch) as places:
        assert run_sweep(sweep, whole, **given) == {}
    assert len(batches) == len(configs) * (1 + len(BATCHES))
    for at in random.Random(0).sample(range(1, len(places) + 1), 12):
        folder = tmp_path / str(at)
        folder.mkdir()
        cut = True
        with power(monkeypatch, at):
            run_sweep(sweep, folder, **given)
        cut = False
        with held(folder):
            assert run_sweep(sweep, folder, **given) == {}
        assert differing(whole, folder) == [], at
        assert results_of(folder, sweep).keys() == configs.keys()


@linux
def test_kills(tmp_path):
    """Real ones, of real processes, whose writes and batches were observed."""
    batches = {"train": 5, "sweep": 10, "certify": 4}
    rows = run(0.02, 0, tmp_path / "work")
    assert len(rows) == 2 * len(batches)
    for row in rows:
        assert row.cases > 0, row
        assert row.failures == 0, row
        writes, certified = re.findall(r"(\d+) places in writing, (\d+) batches", row.note)[0]
        assert int(writes) > 0, row
        assert int(certified) == batches[row.what.split()[0]], row


# Certificates, cut off and gone on with


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_what_is_missing_is_certified(good_run, tmp_path, batches, dtype):
    """After any number of batches, and each number keeps all its digits."""
    model, path = load_model(good_run / MODEL).to(dtype), tmp_path / "journal"
    with Journal(path, {}) as journal:
        expected = certify(model, DATA.test, CertificationOptions(0.05), journal=journal)
    assert (expected.radius > 0).any()
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 3
    for done in range(4):
        batches.clear()
        seen = []
        path.write_bytes(b"".join(lines[: 1 + done]))
        with Journal(path, {}) as journal:
            again = certify(
                model,
                DATA.test,
                CertificationOptions(0.05),
                journal=journal,
                advance=lambda done, facts, seen=seen: seen.append(done),
            )
        assert len(batches) == 3 - done
        assert seen == list(accumulate(BATCHES, initial=0))[done:]
        for column, other in zip(expected, again, strict=True):
            assert column.dtype == other.dtype
            assert column.numpy().tobytes() == other.numpy().tobytes()
        assert path.read_bytes() == b"".join(lines)


def interrupt_in_batch(monkeypatch, number, batches):
    before = certification.find_radii

    def find_radii(*given, **more):
        if len(batches) == number - 1:
            raise KeyboardInterrupt
        return before(*given, **more)

    monkeypatch.setattr(certification, "find_radii", find_radii)


def test_certify_goes_on_where_it_was_stopped(good_run, monkeypatch, batches):
    asked = ("--epsilon-max", "8/255", "--no-clip", "--bound", "crown-ibp", "--device", "cpu")
    assert run_ibp("certify", good_run, *asked, "--out", "whole").code == 0
    batches.clear()
    with monkeypatch.context() as patch:
        interrupt_in_batch(patch, 3, batches)
        code, _, err = run_ibp("certify", good_run, *asked, "--out", "cut")
    assert (code, err) == (130, "Error: stopped; resume with: ibp certify --resume cut\n")
    assert {path.name for path in Path("cut").iterdir()} == {"certify.json", "certificates.journal"}
    code, out, err = run_ibp("certify", "--resume", "cut", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "epsilon_max 8/255 (0.03137), certified by crown-ibp" in out
    assert len(batches) == 3
    assert differing(Path("whole"), Path("cut")) == []
    # And once more: there is nothing left to do.
    before = snapshot(Path("cut"))
    assert run_ibp("certify", "--resume", "cut").code == 0
    assert len(batches) == 3
    assert snapshot(Path("cut")) == before


def test_other_settings_are_refused(good_run, monkeypatch, batches):
    """What is to be certified, or how, is no longer what it was."""
    shutil.copytree(good_run, "run")
    with monkeypatch.context() as patch:
        interrupt_in_batch(patch, 3, batches)
        assert run_ibp("certify", "run", "--out", "cut").code == 130
    for options in (("run",), ("--epsilon-max", 0.1), ("--no-elide",), ("--out", "x")):
        refused("certify", "--resume", "cut", *options, says="give no others")
    refused("certify", "--resume", "run", says="nothing to resume in run: run/certify.json")
    model = load_model(Path("run", MODEL))
    facts = checkpoint.read_facts(Path("run", MODEL))
    with torch.no_grad():
        model[0].weight.view(-1)[0] += 1
    save_model(model, Path("run", MODEL), **facts)
    refused("certify", "--resume", "cut", says="weights changed since cut/certificates.journal")
    # The same of certificates that are complete.
    Path("cut/certificates.journal").unlink()
    for name in ("summary.json", "certificates.csv"):
        shutil.copy(good_run / name, "cut")
    refused("certify", "--resume", "cut", says="weights changed since cut/summary.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is damaged: it is not JSON"),
        (b"[]", "is damaged: it holds no settings"),
        (b'{"model": ["none"]}', "there is no model file ['none']"),
        (b"{}", "Missing argument 'MODEL'"),
        (b'{"model": "none"}', "there is no model file none"),
        (b'{"model": "none", "bound": "x"}', "'x' is not one of"),
        (b'{"model": "none", "epsilon_mbx": 0.1}', "is damaged: unknown settings: epsilon_mbx"),
        (b'{"model": "none", "html": "x", "out": "y"}', "unknown settings: html, out"),
        (b'{"model": "none", "limit_test": "x"}', "limit-test"),
    ],
)
def test_damaged_settings(tmp_path, content, says):
    Path("cut").mkdir()
    Path("cut/certify.json").write_bytes(content)
    refused("certify", "--resume", "cut", says=says)


# Disks


def fails(number):
    def function(*_, **__):
        raise OSError(number, os.strerror(number))

    return function


@pytest.mark.parametrize("stage", ["tempfile.mkstemp", "os.fsync", "os.replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_while_certifying(good_run, monkeypatch, batches, stage, number):
    """One line that names the file; with room again it goes on."""
    assert run_ibp("certify", good_run, "--out", "whole").code == 0
    with monkeypatch.context() as patch:
        interrupt_in_batch(patch, 6, batches)
        assert run_ibp("certify", good_run, "--out", "cut").code == 130
    with monkeypatch.context() as patch:
        patch.setattr(stage.replace("tempfile", "ibpcore.io.files.tempfile"), fails(number))
        code, _, err = run_ibp("certify", "--resume", "cut")
    file = "certificates.journal" if stage == "os.fsync" else "certificates.csv"
    then = "once that is mended, resume with: ibp certify --resume cut"
    assert (code, err) == (1, f"Error: cut/{file}: {os.strerror(number)}; {then}\n")
    assert not [name for name in snapshot(Path("cut")) if name.startswith(".")]
    assert run_ibp("certify", "--resume", "cut").code == 0
    assert differing(Path("whole"), Path("cut")) == []


@linux
@pytest.mark.parametrize("command", ["train", "sweep", "certify"])
def test_a_full_disk_ends_with_the_command_that_goes_on(good_run, monkeypatch, command):
    """With room again it ends with the same files, whichever write failed."""
    small = (*TINY, "--device", "cpu")
    begin = {
        "train": ("train", *small, "--validation", 16),
        "sweep": ("sweep", *small, "--methods", "fastibp"),
        "certify": ("certify", good_run, "--device", "cpu"),
    }[command]
    monkeypatch.setattr(sweeps, "run_all", lambda jobs, *_, **__: None)  # in other processes
    run_ibp(*begin, "--out", "whole")
    for at in (1, 2, 4, 6, 9):
        folder, replace, writes = f"cut {at}", os.replace, []

        def full(source, target, replace=replace, writes=writes, at=at):
            writes.append(target)
            if len(writes) >= at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            code, _, err = run_ibp(*begin, "--out", folder)
        if len(writes) < at:
            break
        assert (code, len(err.splitlines())) == (1, 1), err
        assert err.startswith(f"Error: {folder}/")
        assert "No space left on device" in err
        again = f"resume with: ibp {command} --resume '{folder}'\n"
        if err.endswith(again):
            assert run_ibp(command, "--resume", folder, "--device", "cpu").code == 0
        else:
            assert at == 1
            assert run_ibp(*begin, "--out", folder).code == 0
        assert differing(Path("whole"), Path(folder)) == []
    assert writes


def test_a_full_disk_tears_the_journal(good_run, batches):
    """No file may grow beyond the middle of the second batch: really, not by a patch."""
    resource = pytest.importorskip("resource")
    assert run_ibp("certify", good_run, "--out", "whole").code == 0
    batches.clear()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        code, _, err = run_ibp("certify", good_run, "--out", "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    then = "once that is mended, resume with: ibp certify --resume cut"
    assert (code, err) == (1, f"Error: cut/certificates.journal: File too large; {then}\n")
    assert Path("cut/certificates.journal").stat().st_size == 6000
    assert len(batches) == 2
    assert run_ibp("certify", "--resume", "cut").code == 0
    assert len(batches) == 3 + 1
    assert differing(Path("whole"), Path("cut")) == []


@pytest.mark.parametrize("command", [("train",), ("sweep",), ("certify",)])
def test_a_read_only_folder(good_run, monkeypatch, command):
    """Nothing is begun there."""
    shutil.copytree(good_run, "run")
    given = {
        "train": ("--resume", "run"),
        "sweep": (*TINY, "--out", "run/sweep"),
        "certify": ("run", "--out", "run/new"),
    }[command[0]]
    real = os.open

    def read_only(path, flags, *more, **others):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *more, **others)

    monkeypatch.setattr(os, "open", read_only)
    refused(*command, *given, says="cannot write in the folder run")


def test_files_that_are_removed_under_a_run_come_back(tmp_path, monkeypatch, batches):
    """Those of training at the next epoch, those of certifying when the run is resumed."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    whole.mkdir()
    train_and_certify(CONFIG, DATA, whole)
    folder.mkdir()
    run_epoch = training.run_epoch

    def removes_all(state, *rest):
        for path in folder.iterdir():
            if state.epoch and path.name != "config.json":
                path.unlink()
        return run_epoch(state, *rest)

    def removes_journals(*given, before=certification.find_radii, **more):
        for path in folder.glob("*.journal"):
            path.unlink()
        return before(*given, **more)

    monkeypatch.setattr(training, "run_epoch", removes_all)
    with monkeypatch.context() as patch:
        patch.setattr(certification, "find_radii", removes_journals)
        with pytest.raises(
            UserError, match=r"validation\.journal was removed, replaced or changed"
        ):
            train_and_certify(CONFIG, DATA, folder)
    train_and_certify(CONFIG, DATA, folder, resume=True)
    assert differing(whole, folder) == []
    (folder / "certificates.csv").unlink()
    batches.clear()
    train_and_certify(CONFIG, DATA, folder, resume=True)
    assert differing(whole, folder) == []
    assert len(batches) == 3, "the validation images are done"


@pytest.mark.parametrize("when", ["run_epoch", "find_radii"])
def test_a_folder_that_is_removed_under_a_run(monkeypatch, when):
    module = {"run_epoch": training, "find_radii": certification}[when]
    before = getattr(module, when)

    def removes(*given, **more):
        shutil.rmtree("run", ignore_errors=True)
        return before(*given, **more)

    monkeypatch.setattr(module, when, removes)
    code, _, err = run_ibp("train", *TINY, "--out", "run")
    says = {
        "run_epoch": "run/resume.pt: No such file or directory",
        "find_radii": "run/certificates.journal was not written: its folder or the lock in it was"
        " removed by someone, and may belong to another process now",
    }[when]
    assert (code, err) == (1, f"Error: {says}\n")
    assert snapshot(Path()) == {}


def test_a_run_cut_off_before_its_state_begins_anew(good_run):
    """Between the two first files."""
    Path("run").mkdir()
    shutil.copy(good_run / "config.json", "run")
    assert run_ibp("train", "--resume", "run", "--device", "cpu").code == 0
    assert differing(good_run, Path("run")) == []


# Locks


@contextlib.contextmanager
def another_process_in(folder):
    """It holds the lock until it is killed."""
    pytest.importorskip("fcntl")
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        " print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(folder / locks.LOCK)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_a_folder_in_use_is_refused(good_run):
    """By every command that writes, whether it begins or goes on."""
    shutil.copytree(good_run, "run")
    for name in ("sweep", "new"):
        Path(name).mkdir()
    says = "another process is at work in the folder"
    with another_process_in(Path("run")):
        refused("train", "--resume", "run", says=f"{says} run")
        refused("certify", "run", "--out", "run", says=f"{says} run")
    with another_process_in(Path("sweep")):
        refused("sweep", *TINY, "--out", "sweep", says=f"{says} sweep")
        refused("sweep", "--resume", "sweep", says=f"{says} sweep")
    with another_process_in(Path("new")):
        refused("train", *TINY, "--out", "new", says=f"{says} new")
        refused("certify", "run", "--out", "new", says=f"{says} new")
        refused("report", "run", "--out", "new", says=f"{says} new")
        refused("inspect", "run", "--out", "new", says=f"{says} new")


def test_a_lock_dies_with_its_process(tmp_path):
    """Its file stays, and is no lock; who waits gets the folder."""
    with another_process_in(tmp_path) as process:
        with pytest.raises(UserError, match="another process is at work"), held(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        with held(tmp_path, patience=60):
            assert process.wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_held_once(tmp_path):
    for _ in range(2):
        with held(tmp_path / "a"):
            with pytest.raises(UserError, match="at work"), held(tmp_path / "a"):
                pass
            with held(tmp_path / "b"):
                pass
            (tmp_path / "a" / "file").write_text("")
    assert snapshot(tmp_path) == {"a": None, "a/file": b""}


def test_a_lock_file_that_its_holder_just_removed_is_no_lock(tmp_path, monkeypatch):
    """Opened before, locked after: a third process could lock the new file."""
    fcntl = pytest.importorskip("fcntl")
    flock, removed = fcntl.flock, []

    def late(handle, how):
        if not removed:
            removed.append(1)
            (tmp_path / locks.LOCK).unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with held(tmp_path), pytest.raises(UserError, match="at work"), held(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Work goes on."""
    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", fails(errno.ENOLCK))
    with held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@linux
def test_what_killed_processes_left_is_cleared_away(tmp_path, monkeypatch):
    for name in ("mine", ".mine-abcdefgh", "mine.ibptmp", ".lock"):
        (tmp_path / name).write_text(name)
    with power(monkeypatch, 2):
        write_atomic(tmp_path / "new", b"new")
    (left,) = [path.name for path in tmp_path.iterdir() if path.name.startswith(".new")]
    assert left.endswith(".ibptmp")
    with held(tmp_path):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {"mine", ".mine-abcdefgh", "mine.ibptmp", ".lock"}


# Folders of commands that are refused


def test_what_is_refused_leaves_no_folder(good_run):
    shutil.copytree(good_run, "run")
    Path("run/certificates.csv").write_text("index,radius\n0,0.5\n")
    refused("report", "run", "--out", "a/b", says="its radii are not those of the summary")
    refused("train", *TINY, "--limit-train", 1, "--out", "a/b", says="cannot be trained on")
    refused("certify", "run", "--xtol", 0, "--out", "a/b", says="xtol")
    refused("inspect", "run", "--grid", 1, "--out", "a/b", says="grid")
    refused("sweep", *TINY, "--kappa", 2, "--out", "a/b", says="kappa")
    refused("sweep", "--resume", "a", says="there is no sweep in a")


def test_a_folder_that_a_kill_left_empty_is_used(good_run):
    """With a lock that is none and a file that was never finished."""
    Path("new").mkdir()
    for file in (".lock", ".config.json-abcdefgh.ibptmp"):
        Path("new", file).write_text("")
    assert run_ibp("certify", good_run, "--limit-test", 4, "--out", "new").code == 0
    names = {path.name for path in Path("new").iterdir()}
    assert names == {"certify.json", "certificates.csv", "summary.json"}
    assert json.loads(Path("new/summary.json").read_text())["samples"] == 4
