"""The benchmark of the paradox: its numbers by hand, and that it continues where it stopped."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from benchmarks import paradox
from ibpcore.bounds.registry import BOUNDS
from ibpcore.data.images import ImageSet
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalReLU, IntervalSequential
from ibpcore.training.config import make_config


def invoked(out):
    return CliRunner().invoke(paradox.main, ["--quick", "--seeds", "1", "--out", str(out)])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paradox")
    result = invoked(folder)
    assert result.exit_code == 0, result.output
    return folder


def test_the_trainings_differ_in_their_bound_only():
    configs = {name: paradox.configured(name, 0, paradox.MNIST) for name in paradox.TRAININGS}
    assert {name: config.train_bound for name, config in configs.items()} == {
        "ibp": "ibp",
        "crown-ibp": "ibp",
        "crown": "crown",
    }
    same = [replace(c, method="fastibp", train_bound="ibp") for c in configs.values()]
    assert same[0] == same[1] == same[2]


def test_all_runs_start_from_the_same_weights_and_are_in_the_table(out):
    found = json.loads((out / "paradox.json").read_text())
    assert [run["bound"] for run in found["runs"]] == [*paradox.TRAININGS]
    for run in found["runs"]:
        reached = list(run["reached"].values())
        assert list(run["reached"]) == ["accuracy", *BOUNDS]
        assert reached[1:] == sorted(reached[1:])
        assert reached[-1] <= reached[0]
    tightness = [run["start"]["tightness"] for run in found["runs"]]
    assert tightness[0] < tightness[1] <= tightness[2]
    assert found["runs"][0]["start"]["jump"] == 0
    page = (out / "README.md").read_text()
    assert all(f"| {BOUNDS[name].title} |" in page for name in paradox.TRAININGS)
    assert "cores" in page


def test_what_is_there_is_not_repeated(out, monkeypatch):
    monkeypatch.setattr(paradox, "train_model", None)
    before = (out / "paradox.json").read_bytes()
    assert invoked(out).exit_code == 0
    assert (out / "paradox.json").read_bytes() == before


def test_a_folder_of_other_settings_is_refused(out, monkeypatch):
    monkeypatch.setitem(paradox.COMMON, "batch_size", 16)
    result = invoked(out)
    assert result.exit_code == 1
    assert result.output.endswith("is of other settings: choose another folder\n")


def test_certified_by_hand():
    """f_1 - f_0 = relu(relu(x) - relu(x - 0.46) - 0.5) - 0.1 for x within 0.1 of a half: IBP's
    bound is positive, CROWN-IBP's is not; one of two images has the other label."""
    model = IntervalSequential(
        *(IntervalFlatten(), IntervalLinear(1, 2), IntervalReLU()),
        *(IntervalLinear(2, 1), IntervalReLU(), IntervalLinear(1, 2)),
    )
    values = ([[1.0], [1.0]], [0.0, -0.46], [[1.0, -1.0]], [-0.5], [[0.0], [1.0]], [0.0, -0.1])
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(torch.tensor(value))
    images = ImageSet(torch.full((2, 1, 1, 1), 128, dtype=torch.uint8), torch.tensor([0, 1]))
    found = paradox.certified(model, make_config("digits", "fastibp"), images)
    rest = dict.fromkeys(("crown-ibp", "crown", "alpha-crown"), 0.5)
    assert found == {"accuracy": 0.5, "ibp": 0.0, **rest}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 3.0], "2 ± 1.4"),
        ([12.345], "12.3"),
        ([1.0, float("nan")], "-"),
        ([0.0, 0.0], "0 ± 0"),
    ],
)
def test_means_and_deviations(values, text):
    assert paradox.spread(values) == text
