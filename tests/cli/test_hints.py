"""The bound that is named where the one in use certifies almost nothing."""

import pytest
from helpers import run_ibp, write_image

from ibpcore.bounds.registry import BOUNDS, next_tighter
from ibpcore.certification.metrics import certifies_almost_nothing

HINT = "IBP certifies almost nothing here; CROWN-IBP is tighter, and slower: --bound crown-ibp"
TINY = ("--width", 4, "--hidden", 16, "--epochs", 4, "--limit-train", 640, "--limit-test", 40)


def test_each_bound_but_the_last_has_a_tighter_one():
    names = list(BOUNDS)
    assert [next_tighter(name) for name in names] == [*names[1:], None]
    assert next_tighter("ibp") == "crown-ibp"


def test_what_almost_nothing_is():
    """Per correct image: half of the images at a twentieth of epsilon_max is a tenth."""
    assert certifies_almost_nothing(0.5, 0.049)
    assert not certifies_almost_nothing(0.5, 0.05)
    assert certifies_almost_nothing(1.0, 0.0)
    assert not certifies_almost_nothing(0.1, 0.0)  # as accurate as guessing one of ten classes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An accurate network, on which IBP fails, and one that is trained for it."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("standard", "fastibp"):
        done = run_ibp("train", "--method", method, *TINY, "--out", folder / method)
        assert done.code == 0, done.err
    return folder


def test_certify_names_the_tighter_bound(runs, tmp_path):
    network = ("certify", runs / "standard", "--claim", "unchecked")
    assert HINT in run_ibp(*network, "--out", tmp_path / "ibp").out
    tight = run_ibp(*network, "--bound", "crown-ibp", "--out", tmp_path / "crown")
    few = run_ibp(*network, "--epsilon-max", 1e-6, "--out", tmp_path / "few")
    for done in (tight, few):
        assert done.code == 0, done.err
        assert "hint" not in done.out


def test_a_network_that_is_trained_for_the_bound_needs_no_other(runs, tmp_path):
    done = run_ibp("certify", runs / "fastibp", "--out", tmp_path / "a", "--epsilon-max", 0.01)
    assert done.code == 0
    assert "hint" not in done.out


def test_predict_names_the_tighter_bound(runs, tmp_path):
    write_image(tmp_path / "image.png", 99, mode="L")
    given = ("predict", tmp_path / "image.png", "--model", runs / "standard")
    assert HINT in run_ibp(*given).out
    assert "hint" not in run_ibp(*given, "--bound", "crown-ibp").out
