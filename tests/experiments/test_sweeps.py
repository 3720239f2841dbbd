"""Sweeps: the grid by hand, and what becomes of runs that fail, are killed or stopped."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from helpers import run_ibp, snapshot

from ibpcore import UserError
from ibpcore.experiments import sweeps
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.experiments.run_folder import is_begun, saved_config
from ibpcore.experiments.sweeps import Sweep, extended, grid, read_sweep, write_sweep
from ibpcore.training.methods import METHODS
from ibpcore_cli.options.sweep import sweep_command
from ibpcore_cli.options.train import train_command
from ibpcore_cli.value_types import Kappas, Seeds, Values

SMALL = ("--width", 2, "--hidden", 8, "--limit-train", 64, "--limit-test", 16, "--device", "cpu")
SHORT = ("--epochs", 1, *SMALL)
LONG = ("--epochs", 60, *SMALL)
WHOLE = {"config.json", "metrics.jsonl", "model.safetensors", "resume.pt", "certificates.csv"}
WHOLE |= {"summary.json", "validation.json", "best.safetensors", "certified_accuracy.png"}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs without the seconds that a new process takes; the names of those that were done."""
    done = []

    def run_all(jobs, at_once, *, ended, advance):
        for name, job in jobs:
            job.run.mkdir(parents=True, exist_ok=True)
            data = dataset_of(job.config, job.data_dir)
            train_and_certify(job.config, data, job.run, resume=is_begun(job.run))
            done.append(name)
            ended(name, "")

    monkeypatch.setattr(sweeps, "run_all", run_all)
    return done


# What is typed


@pytest.mark.parametrize(
    ("text", "kappas"),
    [
        ("0:1:0.25", (0, 0.25, 0.5, 0.75, 1)),
        ("0:1:0.1", (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)),
        ("0:0.3:0.1", (0, 0.1, 0.2, 0.3)),  # 0.3 / 0.1 is just below 3
        ("0:1:0.4", (0, 0.4, 0.8)),
        ("0.5:0.5:1", (0.5,)),
        ("0.8", (0.8,)),
        ("0,0.25,1", (0, 0.25, 1)),
        ("0:0.2:0.1,0.2,0.9", (0, 0.1, 0.2, 0.9)),
    ],
)
def test_kappas(text, kappas):
    assert Kappas().convert(text, None, None) == kappas


@pytest.mark.parametrize(
    "text",
    ["", "x", "0:1", "0:1:0", "1:0:0.1", "0:1:-1", "0:1:0.1:2", "nan", "0:inf:1", "0:1:1e-9", "0,"],
)
def test_bad_kappas(text):
    with pytest.raises(click.BadParameter):
        Kappas().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (0, 1, 2)), ("1", (0,)), ("3,5", (3, 5)), ("7,", (7,)), ("2,2", (2,))]
)
def test_seeds(text, seeds):
    assert Seeds().convert(text, None, None) == seeds


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", ",", "1,-2"])
def test_bad_seeds(text):
    with pytest.raises(click.BadParameter):
        Seeds().convert(text, None, None)


def test_lists():
    assert Values(click.IntRange(min=0), "list").convert("0, 2,100", None, None) == (0, 2, 100)
    with pytest.raises(click.BadParameter, match="'z' is not one of"):
        Values(click.Choice("ab"), "list").convert("a,z", None, None)


def test_every_option_of_a_run_is_one_of_a_sweep():
    replaced = {"method", "kappa", "seed", "schedule"}
    single = {"from_model", "config_file", "dry_run", "tensorboard", "wandb"}
    names = {option.name for option in sweep_command.params}
    assert {option.name for option in train_command.params} - replaced - single <= names
    assert names.isdisjoint(single)
    assert len(names) == len(sweep_command.params), "none is there twice"


# The grid


def test_the_grid_is_a_product():
    runs = grid("digits", ["acert", "fastibp"], kappas=(0.0, 0.5), seeds=(0, 3), epochs=2)
    assert list(runs) == [
        *("acert-kappa0-seed0", "acert-kappa0.5-seed0"),
        *("fastibp-kappa0-seed0", "fastibp-kappa0.5-seed0"),
        *("acert-kappa0-seed3", "acert-kappa0.5-seed3"),
        *("fastibp-kappa0-seed3", "fastibp-kappa0.5-seed3"),
    ]
    config = runs["fastibp-kappa0.5-seed3"]
    assert (config.method, config.kappa, config.seed, config.epochs) == ("fastibp", 0.5, 3, 2)
    assert config.learning_rate == 5e-4


def test_standard_is_there_once_a_seed():
    runs = grid(
        "digits", ["standard"], kappas=(0, 0.5, 1), seeds=(0, 1), schedules=("linear", "none")
    )
    assert list(runs) == ["standard-kappa1-seed0", "standard-kappa1-seed1"]
    assert all(config.kappa == 1 for config in runs.values())


def test_iterations_are_for_methods_that_seek_radii():
    runs = grid("digits", ["acert", "fastibp"], max_iterations=(0, 2), solver="brentq")
    assert list(runs) == [
        *("acert-kappa0-iterations0-seed0", "acert-kappa0-iterations2-seed0"),
        "fastibp-kappa0-seed0",
    ]


def test_what_is_not_swept_over_is_the_preset():
    """`ibp` has a kappa of its own, and seeks radii where it is adaptive."""
    assert list(grid("digits", ["ibp"])) == ["ibp-kappa0.5-linear-seed0"]
    runs = grid("digits", ["ibp", "acert"], max_iterations=(2,), adaptive=True)
    assert [config.max_iterations for config in runs.values()] == [2, 2]


def test_the_preset_typed_out_is_no_other_run():
    typed = grid("digits", ["acert"], schedules=("smoothed", "none"), kappas=(0.0, 0.0))
    assert list(typed) == ["acert-kappa0-seed0", "acert-kappa0-none-seed0"]
    assert typed["acert-kappa0-seed0"] == grid("digits", ["acert"])["acert-kappa0-seed0"]


def test_a_bad_value_is_refused():
    with pytest.raises(UserError, match=r"kappa must be in \[0, 1\]"):
        grid("digits", ["acert"], kappas=(0.0, 1.5))


def test_a_setting_that_no_method_uses_is_refused():
    assert grid("digits", ["acert", "sabr"], box_size=0.3)["acert-kappa0-seed0"].method == "acert"
    with pytest.raises(UserError, match="box_size is for sabr, staps, not for acert, fastibp"):
        grid("digits", ["acert", "fastibp"], box_size=0.3)
    code, _, err = run_ibp("sweep", "--methods", "acert", "--box-size", "0.3")
    assert (code, err.splitlines()) == (
        2,
        ["Error: --box-size is for sabr, staps, not for acert"],
    )


def test_the_record_comes_back(tmp_path):
    sweep = Sweep(grid("digits", ["acert", "standard"], kappas=(0, 0.1), epochs=3), "test")
    write_sweep(tmp_path, sweep)
    assert read_sweep(tmp_path) == sweep
    content = json.loads((tmp_path / "sweep.json").read_text())
    assert content["common"]["epochs"] == 3
    assert content["runs"]["acert-kappa0.1-seed0"]["kappa"] == 0.1


def test_a_sweep_grows_but_does_not_change():
    old = Sweep(grid("digits", ["acert"], epochs=3), "validation")
    more = Sweep(grid("digits", ["fastibp"], seeds=(1,), epochs=3), "validation")
    assert list(extended(old, more).runs) == ["acert-kappa0-seed0", "fastibp-kappa0-seed1"]
    assert extended(old, old) == old
    # What the presets of two methods have apart is no change.
    for dataset in ("digits", "cifar10"):
        for method in METHODS:
            new = Sweep(grid(dataset, [method], epochs=3), "validation")
            assert len(extended(Sweep(grid(dataset, ["acert"], epochs=3), "validation"), new).runs)
    for method in ("acert", "fastibp"):
        other = Sweep(grid("digits", [method], epochs=4, width=3), "validation")
        with pytest.raises(UserError, match="epochs, warmup, width changed since the sweep began"):
            extended(old, other)
    with pytest.raises(UserError, match="learning_rate changed"):
        extended(old, Sweep(grid("digits", ["acert"], epochs=3, learning_rate=1.0), "validation"))
    with pytest.raises(UserError, match="select changed"):
        extended(old, Sweep(old.runs, "test"))


def test_a_new_method_first_hides_no_change_of_an_old_one():
    """What `ibp` and `fastibp` have apart is no excuse for other runs of `fastibp`."""
    old = Sweep(grid("digits", ["fastibp"]), "validation")
    settings = {"kappas": (0.5,), "regularizer": 0.1}
    for methods in (["ibp", "fastibp"], ["fastibp", "ibp"]):
        with pytest.raises(UserError, match="regularizer changed"):
            extended(old, Sweep(grid("digits", methods, **settings), "validation"))


DAMAGE = {
    "no JSON": lambda text: text[:40],
    "a list": lambda text: "[]",
    "no runs": lambda text: json.dumps({**json.loads(text), "runs": {}}),
    "runs are a list": lambda text: json.dumps({**json.loads(text), "runs": [1]}),
    "another selection": lambda text: text.replace('"select": "test"', '"select": "x"'),
    "a setting too many": lambda text: text.replace('"epochs"', '"epoch"'),
    "a wrong name": lambda text: text.replace("acert-kappa0-", "../acert-"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_record_is_one_line(tmp_path, case):
    write_sweep(tmp_path, Sweep(grid("digits", ["acert"]), "test"))
    path = tmp_path / "sweep.json"
    path.write_text(DAMAGE[case](path.read_text()))
    before = snapshot(tmp_path)
    for command in (("sweep", "--resume"), ("report",)):
        code, out, err = run_ibp(*command, tmp_path)
        assert (code, out) == (1, "")
        assert len(err.splitlines()) == 1
        assert "sweep.json" in err
    assert snapshot(tmp_path) == before


# Whole sweeps


def test_the_same_command_goes_on_and_a_larger_one_adds(tmp_path, in_this_process):
    folder = tmp_path / "sweep"
    command = ("sweep", *SHORT, "--kappa", "0,1", "--out", folder)
    code, out, err = run_ibp(*command)
    assert (code, err) == (0, "")
    names = [f"{method}-kappa{kappa}-seed0" for method in ("acert", "fastibp") for kappa in (0, 1)]
    assert in_this_process == names
    assert "4 runs, 0 complete" in out
    assert "[4/4] fastibp-kappa1-seed0: accuracy" in out
    assert {path.name for path in (folder / "runs" / names[0]).iterdir()} == WHOLE
    assert saved_config(folder / "runs" / names[0]).validation == 6, "a tenth of 64, rounded"

    runs = snapshot(folder / "runs")
    for again in (command, ("sweep", "--resume", folder)):
        code, out, _ = run_ibp(*again)
        assert code == 0
        assert "4 runs, 4 complete" in out
    assert len(in_this_process) == 4
    assert run_ibp(*command, "--seeds", 2, "--methods", "acert")[0] == 0
    assert in_this_process[4:] == ["acert-kappa0-seed1", "acert-kappa1-seed1"]
    after = snapshot(folder / "runs")
    assert {name: after[name] for name in runs} == runs

    table = rows(folder / "results.csv")
    assert [row["run"] for row in table] == in_this_process
    assert {row["status"] for row in table} == {"complete"}
    summary = json.loads((folder / "runs" / names[0] / "summary.json").read_text())
    held_out = json.loads((folder / "runs" / names[0] / "validation.json").read_text())
    assert float(table[0]["acr"]) == summary["acr"]
    assert float(table[0]["certified_0.05"]) == summary["certified_accuracy"]["0.05"]
    assert float(table[0]["validation_art"]) == held_out["art"]
    means = {(row["method"], row["kappa"]): row for row in rows(folder / "summary.csv")}
    arts = [float(row["art"]) for row in table if row["run"].startswith("acert-kappa0-")]
    assert len(arts) == 2
    mean = means["acert", "0.0"]
    assert (mean["seeds"], float(mean["art_mean"])) == ("2", pytest.approx(sum(arts) / 2))
    assert float(mean["art_std"]) == pytest.approx(abs(arts[0] - arts[1]) / 2**0.5)
    assert (means["fastibp", "0.0"]["seeds"], means["fastibp", "0.0"]["art_std"]) == ("1", "")

    before = snapshot(folder)
    code, _, err = run_ibp(*command, "--epochs", 2)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "epochs changed since the sweep began" in err
    assert snapshot(folder) == before


def test_the_test_set_chooses_if_asked(tmp_path, in_this_process):
    """Then no image is held out."""
    folder = tmp_path / "sweep"
    command = ("sweep", *SHORT, "--methods", "fastibp", "--select", "test", "--out", folder)
    assert "kappa is chosen on the test images" in run_ibp(*command).out
    assert saved_config(folder / "runs" / "fastibp-kappa0-seed0").validation == 0
    assert json.loads((folder / "sweep.json").read_text())["select"] == "test"
    assert "validation_art" not in rows(folder / "results.csv")[0]
    code, _, err = run_ibp(*command[:-1], tmp_path / "other", "--validation", 5)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "leave out --validation" in err


def test_runs_of_a_sweep_may_stop_early_and_deliver_their_best_weights(tmp_path, in_this_process):
    """Rows, tables and reports are of what each run delivers, however many epochs it has."""
    folder = tmp_path / "sweep"
    command = ("sweep", *SMALL, "--methods", "fastibp", "--seeds", 2, "--warmup", "1:1")
    held_out = ("--epochs", 30, "--patience", 1, "--measure-every", 1, "--select-weights", "best")
    assert run_ibp(*command, *held_out, "--out", folder).code == 0
    found = rows(folder / "results.csv")
    for row in found:
        run = folder / "runs" / row["run"]
        summary = json.loads((run / "summary.json").read_text())
        epochs = len((run / "metrics.jsonl").read_text().splitlines())
        assert 2 <= summary["weights_of_epoch"] + 1 == summary["epochs"] == epochs < 30
        assert float(row["art"]) == summary["art"]
        assert row["status"] == "complete"
    assert len(in_this_process) == len(found) == 2
    assert run_ibp("sweep", "--resume", folder, "--device", "cpu").code == 0
    assert len(in_this_process) == 2, "nothing was left to do"
    assert run_ibp("report", folder, "--out", tmp_path / "report").code == 0


def test_a_run_changed_by_hand_is_not_touched(tmp_path, in_this_process):
    command = ("sweep", *SHORT, "--methods", "fastibp", "--out", tmp_path / "sweep")
    assert run_ibp(*command).code == 0
    path = tmp_path / "sweep" / "runs" / "fastibp-kappa0-seed0" / "config.json"
    path.write_text(path.read_text().replace('"width": 2', '"width": 3'))
    before = snapshot(tmp_path)
    code, _, err = run_ibp(*command)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "width differ from" in err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--methods", "acert,trades"), "'trades' is not one of"),
        (("--kappa", "0:2:0.5"), "kappa must be in [0, 1]"),
        (("--kappa", "1:0:0.1"), "does not go up"),
        (("--seeds", "0"), "--seeds"),
        (("--jobs", "0"), "--jobs"),
        (("--schedule", "cosine"), "'cosine' is not one of"),
        (("--max-iterations", "2,x"), "--max-iterations"),
        (("--method", "acert"), "No such option"),
        (("--validation", "63"), "must leave two of 64"),
        (("--dataset", "mnist", "--data-dir", "."), "MNIST/raw is not there"),
        (("--resume", "x"), "give no others"),
        (("--select-weights", "first"), "'first' is not one of 'last', 'best'"),
        (
            ("--select", "test", "--select-weights", "best"),
            "--select-weights can be given only with held-out images: --validation",
        ),
    ],
)
def test_bad_options(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_ibp("sweep", *SHORT, *options)
    assert code in (1, 2)
    assert (out, len(err.splitlines())) == ("", 1)
    assert says in err
    assert snapshot(tmp_path) == {}


def test_folders_that_hold_no_sweep(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    before = snapshot(tmp_path)
    for arguments, says in (
        ((*SHORT, "--out", tmp_path / "mine"), "already exists and holds no sweep"),
        ((*SHORT, "--out", tmp_path / "mine" / "file"), "is a file"),
        ((*SHORT, "--out", tmp_path / "mine" / "file" / "x"), "cannot make the folder"),
        (("--resume", tmp_path / "mine"), "there is no sweep in"),
    ):
        code, out, err = run_ibp("sweep", *arguments)
        assert code in (1, 2)
        assert (out, len(err.splitlines())) == ("", 1)
        assert says in err
    assert snapshot(tmp_path) == before


# Processes


def start(*arguments):
    command = [sys.executable, "-m", "ibpcore_cli", "sweep", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(true, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if true():
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


def epochs_of(folder, run):
    path = folder / "runs" / run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def runs_of(pid):
    """Processes of runs that `pid` started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            ours = b"spawn_main" in (path / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if parent == pid and ours:
            found.append(int(path.name))
    return found


def is_gone(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_stopped_goes_on(tmp_path, how):
    """Killed or interrupted, it leaves no process; killed, its run still ends the same."""
    folder, alone, name = tmp_path / "sweep", tmp_path / "alone", "acert-kappa0.5-seed0"
    process = start(*LONG, "--methods", "acert", "--kappa", 0.5, "--out", folder)
    wait_until(lambda: epochs_of(folder, name) >= 2, process)
    (run,) = runs_of(process.pid)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert rows(folder / "results.csv")[0]["status"] == "pending"
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert err == f"Error: stopped; resume with: ibp sweep --resume {folder}\n"
        assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    deadline = time.monotonic() + 30
    while not is_gone(run) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert is_gone(run)
    assert 2 <= epochs_of(folder, name) < 60, "it was over before it could be stopped"

    if how == signal.SIGINT:
        return  # what is left is the same
    assert run_ibp("sweep", "--resume", folder)[0] == 0
    given = ("--kappa", 0.5, "--validation", 6)
    assert run_ibp("train", *LONG, *given, "--out", alone)[0] == 0
    for file in ("model.safetensors", "certificates.csv", "config.json"):
        assert (folder / "runs" / name / file).read_bytes() == (alone / file).read_bytes()


@linux
def test_a_killed_run_leaves_the_others_alone(tmp_path):
    folder = tmp_path / "sweep"
    process = start(*LONG, "--methods", "acert", "--seeds", 2, "--jobs", 2, "--out", folder)
    names = [f"acert-kappa0-seed{seed}" for seed in range(2)]
    wait_until(lambda: all(epochs_of(folder, name) >= 1 for name in names), process)
    os.kill(runs_of(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    failure, end = err.splitlines()
    assert failure.endswith("failed: its process was terminated by SIGKILL, possibly out of memory")
    assert end.startswith("Error: 1 of 2 runs failed; try again with: ibp sweep --resume")
    assert sum("accuracy" in line for line in out.splitlines()) == 1
    table = rows(folder / "results.csv")
    assert sorted(row["status"] for row in table) == ["complete", "failed"]
    assert "SIGKILL" in "".join(row["reason"] for row in table)


def test_a_run_that_fails_is_reported(tmp_path):
    """And does not stop the next one: an unknown reason and a known one, one after the other."""
    folder = tmp_path / "sweep"
    whole = Sweep(grid("digits", ["acert", "fastibp"], epochs=1, width=2, hidden=8), "test")
    folder.mkdir()
    write_sweep(folder, whole)
    (folder / "runs").mkdir()
    (folder / "runs" / "acert-kappa0-seed0").write_text("in the way")
    # A state of no run where the second would be resumed from.
    (folder / "runs" / "fastibp-kappa0-seed0").mkdir()
    (folder / "runs" / "fastibp-kappa0-seed0" / "resume.pt").write_text("nonsense")
    code, out, err = run_ibp("sweep", "--resume", folder, "--device", "cpu")
    assert code == 1
    first, second, end = err.splitlines()
    assert first.startswith("[1/2] acert-kappa0-seed0 failed: cannot make the folder")
    assert second.startswith("[2/2] fastibp-kappa0-seed0 failed: ")
    assert "resume.pt is damaged" in second
    assert end.startswith("Error: 2 of 2 runs failed")
    assert {row["status"] for row in rows(folder / "results.csv")} == {"failed"}
    assert (folder / "runs" / "acert-kappa0-seed0").read_text() == "in the way"
    assert len(out.splitlines()) == 2
