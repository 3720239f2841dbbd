"""Runs that are resumed: what they say, more epochs, fewer epochs, and nothing left to do."""

import dataclasses
import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import run_ibp, snapshot, write_tree

import ibpcore
from benchmarks.reliability.faults import differing
from ibpcore import UserError, load_model
from ibpcore.certification import certify as certification
from ibpcore.data.images import hold_out
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments.comparison import sections
from ibpcore.experiments.extension import extend, with_epochs
from ibpcore.experiments.results import read_result
from ibpcore.experiments.run_folder import saved_config
from ibpcore.training import loop as training
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_model
from ibpcore.training.run_files import saved_history
from ibpcore.training.statistics import set_precise_statistics
from ibpcore_cli import resources

import_module("ibpcore_cli.train")  # before any function that it imports is replaced
TINY = ("--epochs", 3, "--warmup", "1:2", "--limit-train", 64, "--limit-test", 16)
TINY += ("--width", 2, "--hidden", 8, "--device", "cpu")
DATA = load_dataset("digits", Request(limit_train=96, limit_test=16))


pytestmark = pytest.mark.usefixtures("no_figures", "elsewhere")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A complete run of three epochs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_ibp("train", *TINY, "--out", folder).code == 0
    return folder


@pytest.fixture
def run(whole):
    """A copy of it in the current folder."""
    return Path(shutil.copytree(whole, "run"))


def stopped(monkeypatch, *command, epoch):
    """`ibp COMMAND`, stopped by Ctrl-C after so many epochs; None for while it certifies."""
    with monkeypatch.context() as patch:
        place, name = (certification, "find_radii") if epoch is None else (training, "run_epoch")
        before = getattr(place, name)

        def stops(first, *rest, **more):
            if epoch is None or first.epoch == epoch:
                raise KeyboardInterrupt
            return before(first, *rest, **more)

        patch.setattr(place, name, stops)
        code, _, err = run_ibp(*command)
    assert (code, err) == (130, "Error: stopped; resume with: ibp train --resume run\n")


def refused(*command, says):
    """One line, and nothing on disk has changed."""
    before = snapshot(Path())
    code, _, err = run_ibp(*command)
    assert code in (1, 2)
    assert len(err.splitlines()) == 1, err
    assert says in err
    assert snapshot(Path()) == before


def rates(run):
    """The learning rate at the end of each epoch."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["learning_rate"] for line in lines]


def test_it_says_where_it_goes_on(whole, monkeypatch):
    stopped(monkeypatch, "train", *TINY, "--out", "run", epoch=1)
    stopped(monkeypatch, "train", "--resume", "run", epoch=2)
    code, out, err = run_ibp("train", "--resume", "run", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "\nresuming after epoch 2 of 3\n" in out
    assert differing(whole, Path("run")) == []


def test_a_run_that_is_ended_early_ends_like_others(monkeypatch):
    """Its last epoch is measured, and its batch norm has statistics of all images."""
    given = ("--validation", 16, "--measure-every", 3, "--precise-batch-norm")
    stopped(monkeypatch, "train", *TINY, *given, "--out", "run", epoch=2)
    assert all("validation" not in row for row in saved_history(Path("run")))
    code, _, err = run_ibp("train", "--resume", "run", "--epochs", 2, "--device", "cpu")
    assert (code, err) == (0, "")
    last = saved_history(Path("run"))[-1]
    assert last["validation"]["images"] == 16
    model, config = load_model("run/model.safetensors"), saved_config(Path("run"))
    before = [x.clone() for x in model.buffers()]
    data = load_dataset("digits", Request(limit_train=64, limit_test=16))
    set_precise_statistics(model, hold_out(data, 16).train, config.batch_size)
    for ours, precise in zip(before, model.buffers(), strict=True):
        assert torch.allclose(ours, precise, atol=1e-6)
    metrics = Path("run/metrics.jsonl").read_bytes()
    assert run_ibp("train", "--resume", "run").code == 0
    assert Path("run/metrics.jsonl").read_bytes() == metrics


def test_it_says_that_certification_goes_on(whole, monkeypatch):
    stopped(monkeypatch, "train", *TINY, "--out", "run", epoch=None)
    out = run_ibp("train", "--resume", "run", "--device", "cpu").out
    assert "\ntraining ended after epoch 3 of 3: resuming the certification\n" in out
    assert differing(whole, Path("run")) == []


def test_a_complete_run_says_so_and_does_nothing(run, monkeypatch):
    """Without its state and its data, which nothing has to read."""
    (run / "resume.pt").unlink()
    monkeypatch.setattr(training, "start_state", None)
    before = snapshot(run)
    code, out, err = run_ibp("train", "--resume", "run")
    assert (code, err) == (0, "")
    assert "16 test images, epsilon_max 0.1" in out
    assert out.endswith(
        "the run in run is complete: training ended after epoch 3 of 3, and the test images are"
        " certified; to train it further: ibp train --resume run --epochs 6\n"
    )
    assert snapshot(run) == before


def test_a_run_whose_patience_ended_names_no_command():
    held_out = ("--validation", 16, "--measure-every", 1, "--patience", 1)
    assert run_ibp("train", *TINY, *held_out, "--out", "run").code == 0
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["validation"]["art"] = 1 / row["epoch"]
    Path("run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run_ibp("train", "--resume", "run").out
    assert out.endswith("; its patience ended, so it cannot be trained further\n")


@pytest.mark.parametrize("change", [{"accuracy": 2}, {"method": ["x"]}, {"claim": ...}])
def test_a_damaged_summary_of_a_complete_run(run, change):
    values = {**json.loads((run / "summary.json").read_text()), **change}
    kept = {name: value for name, value in values.items() if value is not ...}
    (run / "summary.json").write_text(json.dumps(kept))
    refused("train", "--resume", "run", says="run/summary.json is damaged")


def test_a_complete_run_is_trained_further(whole, run):
    code, out, err = run_ibp("train", "--resume", "run", "--epochs", 5, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "\nthe results so far are kept in run/epoch-3\nresuming after epoch 3 of 5\n" in out
    assert differing(whole, run / "epoch-3") == []
    longer = dataclasses.replace(saved_config(whole), epochs=5, extended_at=(3,))
    assert saved_config(run) == longer
    assert json.loads((run / "summary.json").read_text())["epochs"] == 5
    assert len(rates(run)) == 5
    # It is a run like any other, and so is what is kept.
    assert "after epoch 5 of 5" in run_ibp("train", "--resume", "run").out
    assert "after epoch 3 of 3" in run_ibp("train", "--resume", "run/epoch-3").out
    assert run_ibp("report", "run", "run/epoch-3", "--out", "report").code == 0


def test_extended_runs_are_told_apart(whole, run):
    """From those of the same settings that had all epochs from the start: their weights differ."""
    assert run_ibp("train", "--resume", "run", "--epochs", 4, "--device", "cpu").code == 0
    begun = ("--epochs", 4, *TINY[2:], "--out", "fresh")
    assert run_ibp("train", *begun).code == 0
    extended, fresh = read_result(Path("run")), read_result(Path("fresh"))
    assert rates(extended.run) != rates(fresh.run)
    (section,) = sections([extended, fresh])
    titles = [series.look.label for series in section.series]
    assert titles == ["ACERT, extended_at 3", "ACERT"]
    # A configuration that is used for a new run describes one that is not extended.
    again = run_ibp("train", "--config", "run/config.json", "--dry-run")
    assert (again.code, "extended_at" in again.out) == (0, False)
    for trained, marks in ((3, (3,)), (4, (3, 4)), (0, ())):
        history = [{"epoch": epoch} for epoch in range(1, trained + 1)]
        assert with_epochs(extended.config, 9, history).extended_at == marks
    with pytest.raises(UserError, match="extended_at cannot be chosen"):
        make_config("digits", "acert", extended_at=(3,))


def test_a_run_is_read_when_no_other_process_has_it(run, monkeypatch):
    """Another one trains it further between the first look at it and its lock."""
    shutil.copytree(run, "longer")
    assert run_ibp("train", "--resume", "longer", "--epochs", 4, "--device", "cpu").code == 0
    before = resources.hold

    def late(folder):
        shutil.copytree("longer", folder, dirs_exist_ok=True)
        return before(folder)

    monkeypatch.setattr(resources, "hold", late)
    code, out, err = run_ibp("train", "--resume", "run")
    assert (code, err) == (0, "")
    assert "the run in run is complete: training ended after epoch 4 of 4" in out


def test_further_training_ends_the_same_when_it_is_stopped(run, monkeypatch):
    further = ("--epochs", 6, "--device", "cpu")
    shutil.copytree(run, "other")
    assert run_ibp("train", "--resume", "other", *further).code == 0
    stopped(monkeypatch, "train", "--resume", "run", *further, epoch=3)
    stopped(monkeypatch, "train", "--resume", "run", "--device", "cpu", epoch=5)
    stopped(monkeypatch, "train", "--resume", "run", "--device", "cpu", epoch=None)
    assert run_ibp("train", "--resume", "run", "--device", "cpu").code == 0
    assert differing(Path("other"), run) == []


def test_an_unfinished_certification_is_kept_too(whole, monkeypatch):
    stopped(monkeypatch, "train", *TINY, "--out", "run", epoch=None)
    assert run_ibp("train", "--resume", "run", "--epochs", 4, "--device", "cpu").code == 0
    assert run_ibp("train", "--resume", "run/epoch-3", "--device", "cpu").code == 0
    assert differing(whole, Path("run/epoch-3")) == []


@pytest.mark.parametrize("method", ["acert", "fastibp"])
@pytest.mark.parametrize("trained", [1, 3])
def test_the_learning_rate_goes_through_its_schedule_anew(tmp_path, method, trained, monkeypatch):
    """Over the epochs that are left, of a complete run and of one that was stopped."""
    sizes = {"width": 2, "hidden": 8, "batch_size": 32, "warmup": (1, 1), "epochs": 3}
    config, run, fresh = make_config("digits", method, **sizes), tmp_path / "a", tmp_path / "b"
    run.mkdir()
    fresh.mkdir()
    with monkeypatch.context() as patch:
        before = training.run_epoch

        def stops(state, *rest):
            if state.epoch == trained:
                raise KeyboardInterrupt
            return before(state, *rest)

        patch.setattr(training, "run_epoch", stops)
        if trained < config.epochs:
            with pytest.raises(KeyboardInterrupt):
                train_model(config, DATA, run)
        else:
            train_model(config, DATA, run)
    longer = with_epochs(config, 7, saved_history(run))
    kept = extend(run, longer)
    assert kept == (run / "epoch-3" if trained == 3 else None)
    train_model(longer, DATA, run, resume=True)
    train_model(dataclasses.replace(config, epochs=7 - trained), DATA, fresh)
    assert rates(run)[trained:] == rates(fresh)


def test_a_run_ends_earlier(monkeypatch):
    stopped(monkeypatch, "train", *TINY, "--out", "run", epoch=2)
    code, out, err = run_ibp("train", "--resume", "run", "--epochs", 2, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "\ntraining ended after epoch 2 of 2: resuming the certification\n" in out
    assert json.loads(Path("run/summary.json").read_text())["epochs"] == 2
    assert len(saved_history(Path("run"))) == 2
    assert all(torch.isfinite(p).all() for p in load_model("run/model.safetensors").parameters())


def test_epochs_that_cannot_be(run, monkeypatch):
    says = "--epochs must be at least 3, since so many are trained already"
    refused("train", "--resume", "run", "--epochs", 2, says=says)
    shutil.rmtree(run)
    stopped(monkeypatch, "train", *TINY, "--out", "run", epoch=1)
    says = "--epochs must be at least 2, where the warm-up ends"
    refused("train", "--resume", "run", "--epochs", 1, says=says)


def test_other_images_change_nothing(run):
    """They are refused before the results of the run are put aside."""
    write_tree(Path("images"), ["cat", "dog"], images=4)
    write_tree(Path("wrong"), ["cat", "dog"], images=5)
    tiny = ("--dataset", "imagefolder", "--epochs", 1, "--warmup", "1:1", "--batch-size", 4)
    tiny += ("--architecture", "flatten, linear", "--device", "cpu")
    assert run_ibp("train", *tiny, "--data-dir", "images", "--out", "tree").code == 0
    further = ("train", "--resume", "tree", "--epochs", 2, "--data-dir", "wrong")
    refused(*further, says="the images of the data set changed")
    # With a state that is damaged, too.
    (run / "resume.pt").write_bytes(b"")
    refused("train", "--resume", run, "--epochs", 5, says="resume.pt is damaged")


def test_other_images_given_in_python_change_nothing():
    images, labels = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8), torch.arange(20) % 2
    settings = {"architecture": "flatten, linear", "epochs": 1, "warmup": (1, 1), "batch_size": 8}
    ibpcore.train((images, labels), out="own", **settings)
    before = snapshot(Path("own"))
    with pytest.raises(UserError, match="the images of the data set changed"):
        ibpcore.resume("own", (images.flip(0), labels), epochs=2)
    assert snapshot(Path("own")) == before
    # The command line cannot train it further.
    assert run_ibp("train", "--resume", "own").out.endswith(
        "; to train it further, give its images again in Python:"
        " ibpcore.resume('own', (images, labels), epochs=2)\n"
    )


def test_another_normalisation_changes_nothing():
    data = dataclasses.replace(DATA, mean=(0.3,), std=(0.4,))
    settings = {"architecture": "flatten, linear", "epochs": 1, "warmup": (1, 1)}
    ibpcore.train(data, out="run", **settings)
    before = snapshot(Path("run"))
    for other, says in (((0.2,), "mean and std of the data set changed"), ((), "does not fit")):
        with pytest.raises(UserError, match=says):
            ibpcore.resume("run", dataclasses.replace(data, mean=other, std=other), epochs=2)
    assert snapshot(Path("run")) == before
    assert ibpcore.resume("run", data, epochs=2).config.epochs == 2
