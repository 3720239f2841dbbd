"""What long computations report of their progress."""

import re
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from test_evaluation import QUICK, table_of

from ibpcore import cnn7
from ibpcore.attacks.evaluation import attack_test_set
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments import sweeps
from ibpcore.experiments.run import train_and_certify
from ibpcore.experiments.sweeps import Sweep, run_sweep
from ibpcore.experiments.workers import RUN_LENGTH, Workers
from ibpcore.inspection.report import PARTS, InspectionOptions, inspect_model
from ibpcore.progress import unwatched
from ibpcore.training import loop
from ibpcore.training.config import make_config
from ibpcore.training.loggers import Monitor
from ibpcore.training.loop import train_model

DIGITS = load_dataset("digits", Request(limit_train=96, limit_test=8))
TINY = {"width": 1, "hidden": 2, "batch_size": 32, "limit_train": 96, "limit_test": 8}


class Recorder:
    """A `Watch` that keeps the labels, the lengths and all reports."""

    def __init__(self):
        self.opened, self.reports = [], []

    @contextmanager
    def __call__(self, label, length):
        self.opened.append((label, length))
        yield lambda *report: self.reports.append(report)


def stopping_after(reports):
    """A `Watch` that interrupts at that report."""

    @contextmanager
    def watch(label, length):
        left = iter(range(reports))

        def advance(done, facts):
            if next(left, None) is None:
                raise KeyboardInterrupt

        yield advance

    return watch


def test_training_reports_steps_of_the_whole_run(tmp_path, monkeypatch):
    """Every step if there is time, and where a resumed run is."""
    monkeypatch.setattr(loop, "REPORT_SECONDS", 0)
    config, whole, rest = make_config("digits", "fastibp", epochs=3, **TINY), Recorder(), Recorder()
    train_model(config, DIGITS, tmp_path, monitor=Monitor(whole))
    assert whole.opened == [("training", 9)]
    assert [done for done, _ in whole.reports] == list(range(1, 10))
    text = r"epoch 2/3, loss \d+\.\d{3}, accuracy \d+\.\d %, epsilon [\d.]+(/255)?"
    assert all(re.fullmatch(text, ", ".join(facts)) for _, facts in whole.reports[3:6])

    with pytest.raises(KeyboardInterrupt):
        train_model(config, DIGITS, tmp_path, monitor=Monitor(stopping_after(4)))
    train_model(config, DIGITS, tmp_path, resume=True, monitor=Monitor(rest))
    assert rest.opened == whole.opened
    assert rest.reports == whole.reports[3:]


def test_nothing_is_computed_for_nobody(tmp_path, monkeypatch):
    """Means are read once an epoch, for its metrics."""
    monkeypatch.setattr(loop, "REPORT_SECONDS", 0)
    config = make_config("digits", "fastibp", epochs=2, **TINY)
    means = loop._Totals.means
    with mock.patch.object(loop._Totals, "means", autospec=True, side_effect=means) as read:
        train_model(config, DIGITS, tmp_path)
    assert read.call_count == 2
    with unwatched("training", 1) as advance:
        assert advance is None


def test_a_run_reports_training_and_each_certification(tmp_path):
    recorder = Recorder()
    data = load_dataset("digits", Request(limit_train=96, limit_test=8, validation=16))
    config = make_config("digits", "fastibp", epochs=1, validation=16, **TINY)
    train_and_certify(config, data, tmp_path, monitor=Monitor(recorder))
    assert recorder.opened == [("training", 3), ("certifying", 16), ("certifying", 8)]
    certifying = recorder.reports[-4:]
    assert [done for done, _ in certifying] == [0, 16, 0, 8]
    assert all(
        re.fullmatch(r"\d+ certified, \d+ open", ", ".join(facts)) for _, facts in certifying
    )


def test_attacks_report_images_and_alarms(tmp_path):
    torch.manual_seed(0)
    model, images = cnn7((1, 8, 8), 10, 2, 4).eval(), DIGITS.test.images.float() / 255
    predicted = model(images).argmax(1)
    for radius, alarms in ((0.0, ""), (1.0, r"\d alarms")):
        recorder = Recorder()
        table = table_of(DIGITS.test.labels, predicted, torch.full((8,), radius))
        attack_test_set(model, DIGITS, table, tmp_path, QUICK, facts={}, watch=recorder)
        assert recorder.opened == [("attacking", 8)]
        (first, (done, said)) = recorder.reports
        assert (first, done) == ((0, []), 8)
        assert re.fullmatch(alarms, "".join(said))


def test_inspection_reports_each_part_before_it_begins():
    recorder, options = Recorder(), InspectionOptions(5, 5, bisections=1, attack_steps=1)
    images, labels = DIGITS.test.images.float() / 255, DIGITS.test.labels
    inspect_model(cnn7((1, 8, 8), 10, 2, 4), images, labels, 0.1, options, watch=recorder)
    assert recorder.opened == [("inspecting", len(PARTS))]
    assert recorder.reports == [(done, [part]) for done, part in enumerate(PARTS)]


def test_a_sweep_reports_the_shares_of_its_runs(tmp_path):
    """Of real processes; the one that fails is done as well, and no certification counts."""
    names, ended, recorder = ("acert", "fastibp"), [], Recorder()
    runs = {name: make_config("digits", name, epochs=2, **TINY) for name in names}
    (tmp_path / sweeps.RUNS).mkdir()
    (tmp_path / sweeps.RUNS / "acert").write_text("in the way")
    run_sweep(
        Sweep(runs, "test"),
        tmp_path,
        Workers(tmp_path, "cpu"),
        ended=lambda name, *_: ended.append((name, len(recorder.reports))),
        watch=recorder,
    )
    assert recorder.opened == [("sweep", 2 * RUN_LENGTH)]
    assert recorder.reports[0] == (RUN_LENGTH, ["acert"])
    positions = [done for done, name in recorder.reports[1:] if name == ["fastibp"]]
    assert positions == sorted(positions)
    assert positions[-3:] == [1.5 * RUN_LENGTH, 2 * RUN_LENGTH, 2 * RUN_LENGTH]
    # A result comes before the report that its run is done.
    assert ended == [("acert", 0), ("fastibp", len(recorder.reports) - 1)]
