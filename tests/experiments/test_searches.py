"""Whole searches: what they leave, and that any kill leaves the trials of an undisturbed one."""

import csv
import errno
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import run_ibp, snapshot
from optuna.storages.journal import JournalFileBackend

from ibpcore.errors import UserError
from ibpcore.experiments.results import read_result
from ibpcore.experiments.run import dataset_of
from ibpcore.experiments.run_folder import is_begun
from ibpcore.experiments.searches import search as module
from ibpcore.experiments.searches.objectives import Budget
from ibpcore.experiments.searches.search import read_search
from ibpcore.experiments.searches.trials import TrialStore
from ibpcore.io.locks import held
from ibpcore.training.demands import Demands
from ibpcore.training.loggers import UNMONITORED
from ibpcore.training.loop import train_model
from ibpcore.training.run_files import saved_history
from ibpcore_cli.options.search import search_command
from ibpcore_cli.options.train import train_command

SIZE = ("--limit-train", 160, "--limit-test", 20, "--validation", 40, "--epsilon-max", 0.01)
TINY = (*SIZE, "--architecture", "linear 16, relu, linear", "--batch-size", 8, "--device", "cpu")
SHORT = (*TINY, "--epochs", 3, "--warmup", "1:1", "--measure-every", 1)
METHODS = ("--methods", "acert,fastibp")
SPACE = {
    **{"defaults": False, "learning_rate": [0.002, 0.02, 0.03, 0.05, 1e30]},
    **{"kappa": {"low": 0.5, "high": 1.0}},
}
"""With a learning rate for which every run diverges, and one for which it stays near chance."""


@pytest.fixture(autouse=True)
def fast(monkeypatch, no_figures):
    """Runs without the seconds that a new process takes, in the folders that a process holds."""

    def run_all(jobs, at_once, *, ended, advance):
        for name, job in jobs:
            with held(job.run):
                data = dataset_of(job.config, job.data_dir)
                given = {"device": job.device, "resume": is_begun(job.run)}
                try:
                    job.work(job.config, data, job.run, monitor=UNMONITORED, **given)
                    reason = ""
                except UserError as error:
                    reason = str(error)
            ended(name, reason)

    monkeypatch.setattr(module, "run_all", run_all)


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    path = tmp_path_factory.mktemp("space") / "space.json"
    path.write_text(json.dumps(SPACE))
    return path


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def opened(folder):
    return TrialStore(folder / "optuna.journal", read_search(folder).problem).trials


def trials_in(folder):
    """Without the seconds."""
    found = []
    for trial in opened(folder):
        end = trial.ended
        facts = (end.status, end.place, end.epochs, end.measures, end.values, end.curve)
        found.append((trial.number, trial.point, trial.after, facts))
    return found


def test_every_option_of_a_run_is_one_of_a_search():
    single = {"from_model", "config_file", "dry_run", "tensorboard", "wandb"}
    names = {option.name for option in search_command.params}
    assert {option.name for option in train_command.params} - {"method"} - single <= names
    assert names.isdisjoint(single)
    assert len(names) == len(search_command.params), "none is there twice"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, space, no_figures):
    """An undisturbed search with every kind of end."""
    folder = tmp_path_factory.mktemp("whole") / "search"
    with pytest.MonkeyPatch.context() as patch:
        fast.__wrapped__(patch, None)
        code, out, err = run_ibp("search", *command(space), "--out", folder)
    assert (code, err) == (0, "")
    return folder, out


def command(space):
    objectives = ("--objectives", "accuracy,certified@0.005")
    length = ("--budget", 16, "--seed", 1, "--certify", 2)
    return (*SHORT, *METHODS, "--space", space, *objectives, *length)


def test_what_a_search_leaves(whole):
    folder, out = whole
    table, front = rows(folder / "trials.csv"), rows(folder / "front.csv")
    assert [int(row["trial"]) for row in table] == [*range(16)]
    assert {row["status"] for row in table} == {"complete", "pruned", "diverged"}
    for row in table:
        history = saved_history(folder / "runs" / row["run"])
        assert len(history) == int(row["epochs_trained"])
        assert (len(history) == 3) == (row["status"] == "complete")
        assert (float(row["learning_rate"]) == 1e30) == (row["status"] == "diverged")
        if row["status"] != "diverged":
            measures = history[-1]["validation"]
            assert float(row["validation_accuracy"]) == measures["accuracy"]
            certified = measures["certified_accuracy"]["0.005"]
            assert float(row["validation_certified@0.005"]) == certified
            assert measures["acr"] <= measures["accuracy"] + 1e-9
            assert certified <= measures["accuracy"]
            assert measures["images"] == 40
    # By hand: what no other complete trial beats in both.
    points = {
        row["trial"]: (float(row["validation_accuracy"]), float(row["validation_certified@0.005"]))
        for row in table
        if row["status"] == "complete"
    }
    best = {
        trial
        for trial, (a, b) in points.items()
        if not any((x, y) != (a, b) and x >= a and y >= b for x, y in points.values())
    }
    assert {row["trial"] for row in front} == best
    assert {row["trial"] for row in table if row["front"] == "yes"} == best
    certified = [row for row in front if row["test_art"]]
    assert 1 <= len(certified) <= 2
    for row in certified:
        result = read_result(folder / "runs" / row["run"])
        assert float(row["test_acr"]) == result.measures["acr"]
    assert (folder / "front.png").exists() == (folder / "front.svg").exists() is True
    assert f"ibp predict IMAGES --model {folder}/runs/trial-" in out
    assert "[16/16] trial-0015" in out
    assert "hypervolume 0." in out
    kinds = [facts[0] for *_, facts in trials_in(folder)]
    assert kinds == [row["status"] for row in table]


def test_a_median_ends_trials_too(whole):
    """Not all that were pruned were near chance."""
    pruned = [facts for *_, facts in trials_in(whole[0]) if facts[0] == "pruned"]
    assert any(facts[3]["accuracy"] > 0.15 for facts in pruned)
    assert any(facts[3]["accuracy"] <= 0.15 for facts in pruned)


def test_without_pruning_every_trial_is_trained(tmp_path, space):
    folder = tmp_path / "search"
    given = (*SHORT, *METHODS, "--space", space, "--budget", 5, "--certify", 0, "--no-prune")
    assert run_ibp("search", *given, "--out", folder).code == 0
    assert {facts[0] for *_, facts in trials_in(folder)} <= {"complete", "diverged"}
    assert not list(folder.glob("runs/*/summary.json"))


def test_the_space_in_use_can_be_given_again(tmp_path, whole):
    code, out, _ = run_ibp(
        *("search", *SHORT, *METHODS, "--space", whole[0] / "space.json", "--seed", 1),
        *("--objectives", "accuracy,certified@0.005", "--no-prune", "--certify", 0),
        *("--budget", 2, "--out", tmp_path / "search"),
    )
    assert code == 0
    assert "learning_rate  0.002, 0.02, 0.03, 0.05, 1e+30" in out
    points = [point for _, point, *_ in trials_in(tmp_path / "search")]
    assert points == [point for _, point, *_ in trials_in(whole[0])][:2]


def test_a_report_of_a_search(whole, tmp_path):
    code, out, err = run_ibp("report", whole[0], "--out", tmp_path / "report")
    assert (code, err) == (0, "")
    assert "certified trial" in out
    assert len(rows(tmp_path / "report" / "table.csv")) == len(
        list(whole[0].glob("runs/*/summary.json"))
    )


# Interruptions


class Killed(BaseException):
    """In the place of SIGKILL: no handler of errors stops it."""


def killing(monkeypatch, at):
    """Before, in the middle or after the write number `at`: of Optuna's, or a replaced file."""
    replace, append = os.replace, JournalFileBackend.append_logs
    left = [at]

    def due():
        left[0] -= 1
        return left[0] == 0

    def replacing(source, target):
        if due():
            raise Killed
        replace(source, target)

    def appending(self, logs):
        if due():
            line = json.dumps(logs[0], separators=(",", ":")).encode()
            with open(self._file_path, "ab") as file:
                file.write(line[: random.Random(at).choice((0, 1, len(line) // 2, len(line)))])
            raise Killed
        append(self, logs)
        if due():
            raise Killed

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(JournalFileBackend, "append_logs", appending)
    return left


@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_killed_many_times_ends_with_the_same_trials(
    whole, tmp_path, space, monkeypatch, seed
):
    """Same settings, measures and ends, each once: nothing is lost, and nothing done twice."""
    folder, rng, kills = tmp_path / "search", random.Random(seed), 0
    arguments = (*command(space), "--out", folder)
    while True:
        with monkeypatch.context() as patch:
            killing(patch, rng.randint(1, 40))
            try:
                code, _, err = run_ibp("search", *arguments)
            except Killed:
                kills += 1
                if (folder / "search.json").exists():
                    arguments = ("--resume", folder, "--certify", 2, "--device", "cpu")
                assert kills < 200
                continue
        assert (code, err) == (0, "")
        break
    assert kills >= 10
    assert trials_in(folder) == trials_in(whole[0])
    runs = {path.name for path in (folder / "runs").iterdir()}
    assert runs == {path.name for path in (whole[0] / "runs").iterdir()}
    for table in ("trials.csv", "front.csv"):
        ours, theirs = rows(folder / table), rows(whole[0] / table)
        for row in (*ours, *theirs):
            del row["training_seconds"]
        assert ours == theirs
    for run in runs:
        for name in ("model.safetensors", "certificates.csv"):
            ours, theirs = folder / "runs" / run / name, whole[0] / "runs" / run / name
            assert ours.exists() == theirs.exists()
            assert not ours.exists() or ours.read_bytes() == theirs.read_bytes()


def test_a_resumed_search_may_have_a_larger_budget(tmp_path, space):
    folder = tmp_path / "search"
    given = (*SHORT, "--space", space, "--certify", 0, "--no-prune")
    assert run_ibp("search", *given, "--budget", 2, "--out", folder).code == 0
    before = trials_in(folder)
    assert run_ibp("search", "--resume", folder, "--budget", 4, "--certify", 0).code == 0
    assert len(trials_in(folder)) == 4
    assert trials_in(folder)[:2] == before
    assert read_search(folder).budget.trials == 4
    assert run_ibp("search", "--resume", folder, "--certify", 0).code == 0
    assert len(trials_in(folder)) == 4, "nothing was left to do"


def test_what_is_certified_stays_in_the_table_while_a_search_goes_on(whole, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(whole[0], tmp_path / "search"))
    before = (folder / "front.csv").read_text()
    assert "test_art" in before

    def stops(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_all", stops)
    assert run_ibp("search", "--resume", folder, "--budget", 20).code == 130
    assert (folder / "front.csv").read_text() == before


def test_settings_can_be_trained_longer(whole):
    """The command has twice the epochs of the best trial, and of its warm-up."""
    _, out = whole
    (command,) = re.findall(r"train its settings longer: (ibp train --config .*)", out)
    *_, path, epochs, number, warmup, marks = shlex.split(command)
    config = json.loads(Path(path).read_text())
    assert (epochs, int(number)) == ("--epochs", 2 * config["epochs"])
    first, last = config["warmup"]
    assert (warmup, marks) == ("--warmup", f"{first}:{2 * last}")


def test_a_search_without_a_complete_trial_says_why(tmp_path, space, monkeypatch):
    folder = tmp_path / "search"
    monkeypatch.setattr(Budget, "is_spent", lambda *_: True)
    given = (*SHORT, "--space", space, "--budget", "2m", "--out", folder)
    code, _, err = run_ibp("search", *given)
    assert code == 1
    further = f"ibp search --resume {folder} --budget 240s"
    assert err == f"Error: no trial began in the time of the budget; try more with: {further}\n"


def test_certificates_that_fail_are_not_failed_trials(tmp_path, space, monkeypatch):
    folder, before = tmp_path / "search", module.run_all

    def run_all(jobs, at_once, *, ended, advance):
        if advance is None:  # certificates
            for name, _ in jobs:
                ended(name, "no memory")
        else:
            before(jobs, at_once, ended=ended, advance=advance)

    monkeypatch.setattr(module, "run_all", run_all)
    given = (*SHORT, "--space", space, "--no-prune", "--budget", 1, "--out", folder)
    code, _, err = run_ibp("search", *given)
    assert code == 1
    assert err.splitlines() == [
        "trial-0000 was not certified: no memory",
        f"Error: 1 model could not be certified; try again with: ibp search --resume {folder}",
    ]


def test_a_time_is_counted_over_all_resumptions(tmp_path, space, monkeypatch):
    folder = tmp_path / "search"
    given = (*SHORT, "--space", space, "--certify", 0, "--no-prune", "--budget", "0.001s")
    assert run_ibp("search", *given, "--out", folder).code in (0, 1)
    begun = trials_in(folder)
    spent = json.loads((folder / "seconds.json").read_text())
    assert run_ibp("search", "--resume", folder, "--certify", 0).code in (0, 1)
    assert trials_in(folder) == begun
    assert json.loads((folder / "seconds.json").read_text()) >= spent
    (folder / "seconds.json").write_text("3600\n")
    run_ibp("search", "--resume", folder, "--certify", 0, "--budget", "1h")
    assert trials_in(folder) == begun, "an hour has passed"
    (folder / "seconds.json").write_text("3595\n")
    # Half a second passes at each look at the clock, however fast the machine is.
    looks = itertools.count()
    passing = property(lambda clock: clock._before + 0.5 * next(looks))
    monkeypatch.setattr(module.Clock, "seconds", passing)
    run_ibp("search", "--resume", folder, "--certify", 0, "--budget", "1h")
    assert len(trials_in(folder)) > len(begun), "some seconds are left"


def test_no_time_is_lost_where_a_search_goes_on(tmp_path, monkeypatch):
    """However short the parts are; a rounded time would let a short search begin again for ever."""
    now = 7.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    for _ in range(100):
        clock = module.Clock(tmp_path / "seconds.json")
        now += 0.03125
        clock.record()
    assert module.Clock(tmp_path / "seconds.json").seconds == 3.125


def test_a_trial_with_refused_settings_is_not_recorded(tmp_path, space, monkeypatch):
    """It would begin again at every resumption, and fail each time."""
    folder = tmp_path / "search"
    given = (*SHORT, "--space", space, "--certify", 0, "--no-prune", "--budget", 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "next_point", lambda *_: {"learning_rate": 0.01, "kappa": 2.0})
        code, _, err = run_ibp("search", *given, "--out", folder)
    assert (code, err) == (2, "Error: --kappa must be in [0, 1], but is 2.0\n")
    assert trials_in(folder) == []
    assert run_ibp("search", "--resume", folder, "--certify", 0).code == 0
    assert len(trials_in(folder)) == 1


def test_settings_of_held_out_images_can_be_searched(tmp_path, space):
    folder, file = tmp_path / "search", tmp_path / "own.toml"
    file.write_text('defaults = false\npatience = [1, 2]\nselect_weights = ["last", "best"]\n')
    given = (*SHORT, "--space", file, "--certify", 0, "--no-prune", "--budget", 2)
    assert run_ibp("search", *given, "--out", folder).code == 0
    assert all(trial.point.keys() == {"patience", "select_weights"} for trial in opened(folder))


def test_a_failed_trial_is_tried_again(tmp_path, space, monkeypatch):
    """It stays open; its settings are the same ones."""
    folder, train = tmp_path / "search", module.train_model

    def failing(config, dataset, run, **given):
        if run.name == "trial-0001":
            raise UserError("no memory")
        return train(config, dataset, run, **given)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_model", failing)
        given = (*SHORT, "--space", space, "--budget", 3, "--certify", 0, "--no-prune")
        code, _, err = run_ibp("search", *given, "--out", folder)
    assert code == 1
    assert "trial-0001, acert failed: no memory" in err
    assert f"1 of 3 trials failed; try again with: ibp search --resume {folder}" in err
    table = rows(folder / "trials.csv")
    assert (table[1]["status"], table[1]["reason"]) == ("failed", "no memory")
    assert run_ibp("search", "--resume", folder, "--certify", 0).code == 0
    assert "failed" not in (folder / "trials.csv").read_text()
    assert rows(folder / "trials.csv")[1]["kappa"] == table[1]["kappa"]


def test_trials_that_fail_one_after_another_end_the_search(tmp_path, space, monkeypatch):
    def failing(*_, **__):
        raise UserError("no memory")

    monkeypatch.setattr(module, "train_model", failing)
    folder = tmp_path / "search"
    code, _, err = run_ibp("search", *SHORT, "--space", space, "--out", folder)
    assert code == 1
    assert "Error: 5 trials failed one after another, the last one: no memory" in err
    assert [row["status"] for row in rows(folder / "trials.csv")] == ["failed"] * 5


def test_a_full_disk_names_the_command_that_goes_on(tmp_path, space, monkeypatch):
    def full(self, logs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "search"
    with monkeypatch.context() as patch:
        patch.setattr(JournalFileBackend, "append_logs", full)
        code, _, err = run_ibp("search", *SHORT, "--space", space, "--out", folder)
    assert code == 1
    assert len(err.splitlines()) == 1
    further = f"resume with: ibp search --resume {folder}"
    assert f"optuna.journal: No space left on device; once that is mended, {further}" in err


# Errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--budget", "soon"), "budget must be a number of trials, or a time such as 2h"),
        (("--objectives", "accuracy,speed"), "objectives must be accuracy, acr, art or certified"),
        (("--objectives", "accuracy,certified@0.5"), "is above epsilon_max, 0.01"),
        (("--methods", "acert,trades"), "'trades' is not one of"),
        (("--kappa", "2"), "--kappa must be in [0, 1]"),
        (("--validation", "0"), "hold out some with --validation"),
        (("--validation", "159"), "must leave two of 160"),
        (("--space", "missing.toml"), "missing.toml"),
        (("--certify", "-1"), "--certify"),
        (("--resume", "x"), "give none but --budget, --jobs, --certify, --device and --data-dir"),
        (("--method", "acert"), "No such option"),
        (("--box-size", "0.3"), "--box-size is for sabr, staps, not for acert"),
    ],
)
def test_bad_options(elsewhere, options, says):
    code, out, err = run_ibp("search", *SHORT, *options)
    assert code in (1, 2)
    assert (out, len(err.splitlines())) == ("", 1)
    assert says in err
    assert snapshot(Path()) == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kappa = {low = 0, high = 1.5}", "kappa must be in [0, 1], but is 1.5"),
        ("kapa = 1", "unknown setting kapa; did you mean kappa?"),
        ("kappa = {low = 0", "is not TOML"),
        ("epochs = {low = 1, high = 2, base = 2}", "epochs stands in the command line"),
        ("regularizer = {low = 1, high = 0}", "regularizer: low must be below high"),
        ("taps_weight = 7.0", "taps_weight is not for acert"),
        ("defaults = false", "no setting is searched"),
        ("defaults = false\nkappa = 0.5\nl1 = [1e-6]", "no setting is searched"),
    ],
)
def test_a_bad_file_is_one_line(elsewhere, text, says):
    if sys.version_info < (3, 11):
        pytest.skip("reading TOML takes Python 3.11")
    Path("space.toml").write_text(text)
    code, out, err = run_ibp("search", *SHORT, "--space", "space.toml", "--out", "search")
    assert code in (1, 2)
    assert (out, len(err.splitlines())) == ("", 1)
    assert "space.toml" in err
    assert says in err
    assert not Path("search").exists()


def test_without_optuna(elsewhere, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, out, err = run_ibp("search", *SHORT)
    assert (code, out) == (1, "")
    assert err == "Error: ibp search needs optuna: pip install 'ibpcore[search]'\n"
    assert snapshot(Path()) == {}


DAMAGE = {
    "no JSON": ("search.json", lambda text: text[:40]),
    "a list": ("search.json", lambda text: "[]"),
    "another objective": ("search.json", lambda text: text.replace("accuracy,cert", "loss,cert")),
    "an unknown method": ("search.json", lambda text: text.replace('"acert"', '"aicert"')),
    "no budget": ("search.json", lambda text: text.replace('"trials": 16', '"trials": null')),
    "a text as budget": ("search.json", lambda text: text.replace('"trials": 16', '"trials": "x"')),
    "an unknown setting": ("search.json", lambda text: text.replace("batch_size", "batch")),
    "no space": ("space.json", lambda text: ""),
    "a bad domain": ("space.json", lambda text: text.replace('"low": 0.5', '"low": 5')),
    "no journal": ("optuna.journal", lambda text: text[9:]),
    "another space": ("space.json", lambda text: text.replace("kappa", "regularizer")),
    "no number": ("seconds.json", lambda text: "soon"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_one_line(whole, tmp_path, case):
    name, damage = DAMAGE[case]
    folder = tmp_path / "search"
    folder.mkdir()
    for path in whole[0].iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    text = (folder / name).read_text()
    (folder / name).write_text(damage(text))
    assert (folder / name).read_text() != text
    code, _, err = run_ibp("search", "--resume", folder)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "is damaged" in err or "is missing" in err


def test_folders_that_hold_no_search(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    before = snapshot(tmp_path)
    for arguments, says in (
        ((*SHORT, "--out", tmp_path / "mine"), "already exists and is not empty"),
        (("--resume", tmp_path / "mine"), "there is no search in"),
        (("--resume", tmp_path / "none"), "there is no search in"),
    ):
        code, out, err = run_ibp("search", *arguments)
        assert code == 1
        assert (out, len(err.splitlines())) == ("", 1)
        assert says in err
    assert snapshot(tmp_path) == before


# The hook in the training loop


def test_a_run_ends_where_the_rule_says_and_stays_ended(tmp_path, whole):
    """The rule is asked after every epoch, and again when the run is resumed."""
    search = read_search(whole[0])
    config = search.problem.config({"method": "fastibp", "learning_rate": 0.01, "kappa": 0.5})
    data = dataset_of(config, Path())
    asked = []

    def hopeless(history):
        asked.append(len(history))
        return len(history) == 2

    for resume in (False, True):
        train_model(config, data, tmp_path, resume=resume, demands=Demands(("0.005",), hopeless))
        assert len(saved_history(tmp_path)) == 2
    assert asked == [0, 1, 2, 2]
    train_model(config, data, tmp_path, resume=True)
    history = saved_history(tmp_path)
    assert ["certified_accuracy" in row["validation"] for row in history] == [True, True, False]


# Processes


def test_a_real_process_is_killed(tmp_path, space):
    """With two trials at a time, which both go on."""
    folder = tmp_path / "search"
    given = (*TINY, "--epochs", 100, *METHODS, "--space", space, "--budget", 2, "--jobs", 2)
    ends = ("--certify", 0, "--out", folder)
    program = [sys.executable, "-m", "ibpcore_cli", "search", *map(str, (*given, *ends))]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len([*folder.glob("runs/*/metrics.jsonl")]) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    points = [trial.point for trial in opened(folder)]
    before = [p.read_bytes() for p in sorted(folder.glob("runs/*/metrics.jsonl"))]
    assert len(points) == 2
    assert run_ibp("search", "--resume", folder, "--certify", 0, "--device", "cpu").code in (0, 1)
    assert [trial.point for trial in opened(folder)] == points
    assert all(trial.ended is not None for trial in opened(folder))
    after = [p.read_bytes() for p in sorted(folder.glob("runs/*/metrics.jsonl"))]
    assert all(new.startswith(old) for old, new in zip(before, after, strict=True))
