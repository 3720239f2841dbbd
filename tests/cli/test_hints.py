"""The bound that is named where the one in use leaves many images open."""

import csv
import json
import re

import pytest
from helpers import run_ibp, write_image

from ibpcore.bounds.ladder import next_tighter
from ibpcore.bounds.registry import BOUNDS

HINT = re.compile(
    r"hint: open at [^:]+: (\d+) of (\d+) (?:accurate|correct or unlabelled) images?;"
    r" (.+) tried on (\d+) of them certified (\d+), in"
)
TINY = ("--width", 4, "--hidden", 16, "--epochs", 4, "--limit-train", 640, "--limit-test", 40)


def test_each_bound_but_the_last_has_a_tighter_one():
    names = list(BOUNDS)
    assert [next_tighter(name) for name in names] == [*names[1:], None]
    assert next_tighter("ibp") == "crown-ibp"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An accurate network, on which IBP fails, and one that is trained for it."""
    folder = tmp_path_factory.mktemp("runs")
    robust = ("--epochs", 20, "--warmup", "1:5", "--epsilon-max", 0.02)
    for method, settings in (("standard", ()), ("fastibp", robust)):
        done = run_ibp("train", "--method", method, *TINY, *settings, "--out", folder / method)
        assert done.code == 0, done.err
    return folder


def test_certify_names_the_tighter_bound(runs, tmp_path):
    network = ("certify", runs / "standard", "--claim", "unchecked")
    found = {}
    tighter = {"ibp": "CROWN-IBP", "ibp,crown-ibp": "CROWN", "crown": "optimised CROWN"}
    for bound, title in tighter.items():
        done = run_ibp(*network, "--bound", bound, "--out", tmp_path / bound)
        assert done.code == 0, done.err
        summary = json.loads((tmp_path / bound / "summary.json").read_text())
        line = HINT.search(done.out)
        accurate = round(40 * summary["accuracy"])
        assert (int(line[1]), int(line[2])) == (summary["open"], accurate)
        assert line[3] == title
        assert int(line[5]) <= int(line[4]) == min(4, summary["open"])
        found[bound] = summary["certified_by"]
    assert found["ibp"].keys() <= {"ibp"}
    assert "crown" in found["crown"]
    few = run_ibp(*network, "--epsilon-max", 1e-6, "--out", tmp_path / "few")
    assert few.code == 0
    assert "hint" not in few.out


def test_what_each_bound_did_is_told(runs, tmp_path):
    network = ("certify", runs / "standard", "--epsilon-max", 0.02)
    done = run_ibp(*network, "--bound", "alpha-crown", "--out", tmp_path / "all")
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    with open(tmp_path / "all" / "certificates.csv") as file:
        bounds = [row["bound"] for row in csv.DictReader(file)]
    tried = []
    for name in BOUNDS:
        (row,) = [line for line in lines if line[:1] == [name]]
        assert int(row[2]) == summary["certified_by"].get(name, 0) == bounds.count(name)
        tried.append(int(row[1]))
    assert tried == sorted(tried, reverse=True)
    assert tried[0] == round(40 * summary["accuracy"])
    assert "hint" not in done.out


def test_a_network_that_is_trained_for_the_bound_needs_no_other(runs, tmp_path):
    done = run_ibp("certify", runs / "fastibp", "--out", tmp_path / "a", "--epsilon-max", 0.001)
    assert done.code == 0
    assert "hint" not in done.out


def test_predict_names_the_tighter_bound(runs, tmp_path):
    write_image(tmp_path / "image.png", 99, mode="L")
    given = ("predict", tmp_path / "image.png", "--model", runs / "standard")
    assert HINT.search(run_ibp(*given).out)
    assert "hint" not in run_ibp(*given, "--bound", "alpha-crown").out
