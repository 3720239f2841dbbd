"""Seconds until a quality: read off the curve, and written for every contender."""

import json

import pytest
from click.testing import CliRunner

from benchmarks import time_to_art as module
from benchmarks.time_to_art import TARGETS, contenders, main, passed
from ibpcore.training.loop import DivergedError


def test_the_first_epoch_that_passes_counts():
    curve = [{"seconds": s, "art": a} for s, a in ((1.0, 0.2), (2.0, 0.5), (3.0, 0.4), (4.0, 0.9))]
    assert [passed(curve, target) for target in (0.1, 0.5, 0.6, 0.95)] == [1.0, 2.0, 4.0, None]
    assert passed([], 0.5) is None


def test_the_paper_has_its_own_recipe_and_all_have_one_network():
    configs = contenders("mnist", (4, 8), width=8, hidden=64, validation=100)
    paper = [configs[f"{method}, paper"] for method in ("fastibp", "acert")]
    assert [(c.epochs, c.warmup, c.batch_size) for c in paper] == [(100, (1, 20), 128)] * 2
    assert [c.epochs for name, c in configs.items() if "best" in name] == [4, 8]
    assert {(c.width, c.hidden, c.validation) for c in configs.values()} == {(8, 64, 100)}


def test_every_contender_has_a_row(tmp_path):
    file = tmp_path / "times.json"
    result = CliRunner().invoke(main, ["--quick", "--threads", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["contender"] for row in rows] == [
        *("fastibp, paper", "acert, paper"),
        "acert, best, 2 epochs",
    ]
    for row in rows:
        assert 0 <= row["art"] <= row["best_art"] <= 1
        assert row["seconds"] > 0
        assert {f"seconds to {100 * x:.0f}" for x in TARGETS["digits"]} <= set(row)
    assert rows[-1]["epoch"] == 2


def test_rows_of_contenders_that_ended_stay_if_a_later_one_fails(tmp_path, monkeypatch):
    """One that diverges has a row without figures; one that is killed leaves the others."""
    file, begun = tmp_path / "times.json", []

    def train_model(config, *_, monitor, **__):
        begun.append(config)
        if len(begun) == 1:
            raise DivergedError("the loss is not finite")
        if len(begun) == 2:
            monitor.log.row({"epoch": 1, "seconds": 1.0, "validation": {"art": 0.75}})
            return
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train_model", train_model)
    result = CliRunner().invoke(main, ["--quick", "--json", str(file)])
    assert result.exit_code != 0
    diverged, trained = json.loads(file.read_text())["rows"]
    assert diverged == {
        **{"contender": "fastibp, paper", "best_art": None},
        **dict.fromkeys(("seconds to 70", "seconds to 80", "seconds to 90")),
    }
    assert (trained["seconds to 70"], trained["seconds to 80"]) == (1.0, None)


def test_an_unknown_contender_is_one_line():
    result = CliRunner().invoke(main, ["--quick", "--only", "sabr"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: no contender is called sabr: try fastibp, paper")
    assert len(result.output.splitlines()) == 1


def test_a_missing_data_set_is_one_line(tmp_path):
    result = CliRunner().invoke(main, ["--dataset", "mnist", "--data-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("dataset", TARGETS)
def test_all_data_sets_have_contenders(dataset):
    assert len(contenders(dataset, (2,))) == 3
