"""Logs beside the files of a run: what they are told, when they fail, and after a resume."""

import json
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from helpers import run_ibp, snapshot

from ibpcore.training import loop as training
from ibpcore.training.config import make_config
from ibpcore.training.loggers import (
    LOGGERS,
    MEASURES,
    Log,
    flat,
    open_tensorboard,
    open_wandb,
)

TINY = ("--epochs", 3, "--limit-train", 32, "--limit-test", 8, "--width", 2, "--hidden", 8)
LOGGED = (*TINY, "--device", "cpu", "--tensorboard")


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def told(monkeypatch):
    """A logger in the place of TensorBoard's; all that it is told, in order."""
    told = []
    log = Log(
        lambda row: told.append(("row", dict(row))),
        lambda summary: told.append(("summary", summary["acr"])),
        lambda complete: told.append(("close", complete)),
    )
    monkeypatch.setitem(LOGGERS, "tensorboard", lambda run, config: log)
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace(__spec__="there"))
    return told


@pytest.fixture
def stopped_after():
    """Ctrl-C in the epoch after so many."""
    whole = training.run_epoch

    def stopping(epochs):
        def run_epoch(state, *rest):
            if state.epoch == epochs:
                raise KeyboardInterrupt
            return whole(state, *rest)

        return mock.patch.object(training, "run_epoch", run_epoch)

    return stopping


def test_a_logger_is_told_every_row_and_the_summary(tmp_path, told):
    run = tmp_path / "run"
    assert run_ibp("train", *LOGGED, "--out", run).code == 0
    acr = json.loads((run / "summary.json").read_text())["acr"]
    assert told == [*(("row", row) for row in rows(run)), ("summary", acr), ("close", True)]


def test_a_resumed_run_tells_what_was_before(tmp_path, told, stopped_after):
    run = tmp_path / "run"
    with stopped_after(2):
        assert run_ibp("train", *LOGGED, "--out", run).code == 130
    assert [name for name, _ in told] == ["row", "row", "close"]
    assert told[-1] == ("close", False)
    told.clear()
    assert run_ibp("train", "--resume", run, "--device", "cpu", "--tensorboard").code == 0
    assert told[:3] == [("row", row) for row in rows(run)]
    assert [name for name, _ in told[3:]] == ["summary", "close"]


@pytest.mark.parametrize("where", ["row", "summary", "close"])
def test_a_failing_logger_costs_no_file(tmp_path, told, where):
    def fail(*_):
        raise OSError("no space\nleft on device")

    good, bad = tmp_path / "good", tmp_path / "bad"
    assert run_ibp("train", *LOGGED, "--out", good).code == 0
    failing = LOGGERS["tensorboard"](None, None)._replace(**{where: fail})
    told.clear()
    with mock.patch.dict(LOGGERS, tensorboard=lambda run, config: failing):
        done = run_ibp("train", *LOGGED, "--out", bad)
    assert done.code == 0
    assert done.err == "Warning: tensorboard failed, and the run goes on without it: no space\n"
    assert {"row": [], "summary": ["row"] * 3, "close": ["row"] * 3 + ["summary"]}[where] == [
        name for name, _ in told
    ]
    assert set(snapshot(bad)) == set(snapshot(good))
    name = "model.safetensors"
    assert (bad / name).read_bytes() == (good / name).read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_said_first(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    done = run_ibp("train", *TINY, f"--{name}")
    assert (done.code, done.out) == (1, "")
    assert done.err == f"Error: {name} is needed: pip install 'ibpcore[{name}]'\n"
    assert snapshot(tmp_path) == {}


def test_one_that_cannot_be_opened_leaves_nothing(tmp_path, told, monkeypatch):
    def fail(run, config):
        (run / "wandb").mkdir()
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(__spec__="there"))
    with mock.patch.dict(LOGGERS, wandb=fail):
        done = run_ibp("train", *LOGGED, "--wandb", "--out", tmp_path / "run")
    assert (done.code, done.err) == (1, "Error: cannot log to wandb: not logged in\n")
    assert told == [("close", False)]
    assert snapshot(tmp_path) == {}


def test_flat():
    row = {"loss": 0.5, "n": 3, "inspection": {"relu": {"a": 1.0}, "b": 2}, "x": True, "y": "z"}
    assert flat(row) == {"loss": 0.5, "n": 3, "inspection/relu/a": 1.0, "inspection/b": 2}


# TensorBoard itself


def accumulator(run):
    module = "tensorboard.backend.event_processing.event_accumulator"
    return pytest.importorskip(module).EventAccumulator(str(run / "tensorboard"))


def steps(events, name):
    return [event.step for event in events.Reload().Scalars(name)]


def test_event_files_have_each_step_once(tmp_path, stopped_after):
    run = tmp_path / "run"
    watching = accumulator(run)
    with stopped_after(2):
        assert run_ibp("train", *LOGGED, "--out", run).code == 130
    assert steps(watching, "train/loss") == [1, 2]
    assert run_ibp("train", "--resume", run, "--device", "cpu", "--tensorboard").code == 0
    # One that reads anew, and one that has read the first half before.
    for events in (accumulator(run), watching):
        assert steps(events, "train/loss") == [1, 2, 3]
        assert steps(events, "test/acr") == [3]
    events = accumulator(run).Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([row["loss"] for row in rows(run)], rel=1e-6)
    share = json.loads((run / "summary.json").read_text())["certified_accuracy"]["0.05"]
    (event,) = events.Scalars("test/certified_accuracy/0.05")
    assert event.value == pytest.approx(share, rel=1e-6)
    assert "config/text_summary" in events.Tags()["tensors"]


def test_event_files_have_the_measures_of_held_out_images(tmp_path):
    """And the results of the test images at the epoch after which the run stopped."""
    config = make_config("digits", "acert", epochs=9, validation=8, patience=1)
    log = open_tensorboard(tmp_path, config)
    log.row({"epoch": 1, "loss": 1.0})
    log.row({"epoch": 2, "loss": 0.5, "validation": {"art": 0.25, "images": 8}})
    log.summary({"epochs": 2, **dict.fromkeys(MEASURES, 0.5)})
    log.close(True)
    events = accumulator(tmp_path)
    assert steps(events, "train/loss") == [1, 2]
    assert [(event.step, event.value) for event in events.Scalars("validation/art")] == [(2, 0.25)]
    assert steps(events, "test/art") == [2]


# Weights & Biases


class FakeRun:
    """Of wandb; `step` is the next one that it takes."""

    def __init__(self, step):
        self.step, self.rows, self.summary, self.ended = step, {}, {}, []
        self.finish = self.ended.append

    def log(self, numbers, step):
        assert step >= self.step
        self.rows[step] = numbers


def fake_wandb(monkeypatch, step):
    run, begun = FakeRun(step), {}

    def init(**given):
        begun.update(given)
        return run

    module = SimpleNamespace(init=init, Settings=dict, __spec__="there")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return run, begun


def test_what_wandb_is_told(tmp_path, monkeypatch):
    fake, begun = fake_wandb(monkeypatch, step=0)
    run = tmp_path / "my-run"
    given = (*TINY, "--validation", 8, "--device", "cpu")
    assert run_ibp("train", *given, "--wandb", "--out", run).code == 0
    assert (begun["project"], begun["name"], begun["dir"]) == ("ibpcore", "my-run", str(run))
    saved = json.loads((run / "config.json").read_text())
    assert json.loads(json.dumps(begun["config"])) == saved
    losses = {step: numbers["train/loss"] for step, numbers in fake.rows.items()}
    assert losses == {row["epoch"]: row["loss"] for row in rows(run)}
    measures = {step: numbers["validation/art"] for step, numbers in fake.rows.items()}
    assert measures == {row["epoch"]: row["validation"]["art"] for row in rows(run)}
    assert fake.summary["test/acr"] == json.loads((run / "summary.json").read_text())["acr"]
    assert fake.ended == [0]


def test_wandb_gets_no_row_twice(tmp_path, monkeypatch):
    """Two epochs are there already; the run is not whole when it is closed."""
    fake, _ = fake_wandb(monkeypatch, step=3)
    log = open_wandb(tmp_path, make_config("digits", "acert"))
    for epoch in (1, 2, 3):
        log.row({"epoch": epoch, "loss": 1.0})
    log.close(False)
    assert fake.rows == {3: {"train/loss": 1.0}}
    assert fake.ended == [1]


def test_wandb_offline(tmp_path, monkeypatch):
    """The real one, where it is installed: the run that was cut off keeps its id."""
    pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for complete in (False, True):
        log = open_wandb(tmp_path, make_config("digits", "acert"))
        log.row({"epoch": 1, "loss": 1.0})
        log.close(complete)
    ids = {path.name[-8:] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert len(ids) == 1
