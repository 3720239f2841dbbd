"""The benchmark of published networks: what it reads, counts and sums; no time is asserted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import write_mnist
from torch import nn

from benchmarks import lirpa
from benchmarks.published import measures
from benchmarks.published.__main__ import main, present
from benchmarks.published.measures import THEIRS, excess, measure, subject, totals
from benchmarks.published.networks import NETWORKS
from ibpcore import UserError, certified_margins
from ibpcore.bounds.epsilons import as_number
from ibpcore.bounds.registry import BOUNDS
from ibpcore.interop.importing.models import Description
from ibpcore.nn.architectures import new_network

ROOT = Path(__file__).parents[2]
SDP = NETWORKS["sdp mnist_cnn_a_adv"]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_described_in_full(name):
    net = NETWORKS[name]
    assert 0 < as_number(net.epsilon) < 0.5
    assert not Path(net.file).is_absolute()
    if net.architecture:
        mean, std = map(tuple, net.scale)
        said = Description(net.architecture, dataset=net.dataset, mean=mean, std=std)
        assert said.normalization == (mean, std)


def test_networks_share_no_file():
    assert len({net.file for net in NETWORKS.values()}) == len(NETWORKS)


@pytest.fixture(scope="module")
def tested():
    """A network of random weights, on random images of which it classifies all but two."""
    torch.manual_seed(0)
    model = new_network("conv 4 3x3 s2, relu, linear 8, relu, linear", (1, 8, 8), 3).eval()
    images = torch.rand(12, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % 3
    return subject("random", model, images, labels, 0.01)


def test_only_images_that_withstand_attacks_are_certified(tested):
    assert (tested.tested, tested.correct) == (12, 10)
    assert 0 < len(tested.images) <= 10
    hopeless = subject("random", tested.model, tested.images, tested.labels, 1.0)
    assert (hopeless.correct, len(hopeless.images)) == (len(tested.images), 0)


def test_one_row_for_each_bound(tested, monkeypatch):
    monkeypatch.setattr(lirpa, "available", lambda: False)
    rows = {row["contender"]: row for row in measure(tested, 1)}
    assert list(rows) == [*BOUNDS]
    images, labels = tested.images, tested.labels
    for name, row in rows.items():
        margins = certified_margins(tested.model, images, labels, 0.01, bound=name)
        assert row["certified"] == int((margins < 0).sum())
        assert row["proved"] <= row["certified"] <= row["robust"] == len(images)
        if row["certified"]:
            assert row["proof_ratio"] == pytest.approx(row["proof_ms"] / row["bound_ms"])
        assert "excess" not in row
    assert rows["ibp"]["ratio"] == 1
    assert 0 < rows["ibp"]["certified"] < rows["crown"]["proved"]


class Contender:
    """In place of auto_LiRPA, whose margins are 0.5 below those of IBP."""

    def __init__(self, model, images):
        self.model = model

    def margins(self, images, labels, epsilons):
        return certified_margins(self.model, images, labels, epsilons) - 0.5


def test_the_contender_is_compared(tested, monkeypatch):
    monkeypatch.setattr(lirpa, "available", lambda: True)
    monkeypatch.setattr(lirpa, "LirpaCrown", Contender)
    rows = {row["contender"]: row for row in measure(tested, 1)}
    assert list(rows) == [*BOUNDS, THEIRS]
    assert 0.1 < rows["ibp"]["excess"] <= 0.5
    assert rows[THEIRS]["ratio"] == 1
    assert not {"excess", "proved"} & rows[THEIRS].keys()
    nothing = replace(tested, images=tested.images[:0], labels=tested.labels[:0])
    assert {row["certified"] for row in measure(nothing, 1)} == {0}


def test_excess_by_hand():
    """0.25 above -0.5 counts as it is, 1 above -10 as a tenth; what is below does not count."""
    theirs = torch.tensor([-0.5, -10.0, 3.0])
    assert excess(theirs + torch.tensor([0.25, 1.0, -1.0]), theirs) == 0.25
    assert excess(theirs + torch.tensor([0.0, 1.0, -1.0]), theirs) == pytest.approx(0.1)
    assert excess(theirs[:0], theirs[:0]) == 0


def test_totals_by_hand():
    first = {"contender": "crown", "network": "a", "robust": 3, "certified": 2, "proved": 2}
    first |= {"median_ms": 10.0, "bound_ms": 8.0, "proof_ms": 30.0, "excess": 1e-6}
    rows = [first, {**first, "network": "b", "proved": 1, "median_ms": 5.0, "excess": -1e-7}]
    for network, ms in ("a", 20.0), ("b", 40.0):
        rows.append({"contender": THEIRS, "network": network, "robust": 3, "median_ms": ms})
    ours, theirs = totals(rows)
    assert ours == {
        **{"contender": "crown", "network": "all", "robust": 6, "certified": 4, "proved": 3},
        **{"median_ms": 15.0, "bound_ms": 16.0, "proof_ms": 60.0, "proof_ratio": 3.75},
        **{"excess": 1e-6, "ratio": 0.25},
    }
    assert theirs == {
        "contender": THEIRS,
        "network": "all",
        "robust": 6,
        "median_ms": 60.0,
        "ratio": 1,
    }


def test_a_folder_of_networks(tmp_path, monkeypatch):
    """The SDP network of random weights, at its place in the clone, on images of random pixels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 4, 2, 1), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(196, 8), nn.ReLU(), nn.Linear(8, 10)]
    path = tmp_path / SDP.file
    path.parent.mkdir(parents=True)
    torch.save(nn.Sequential(*layers).state_dict(), path)
    write_mnist(tmp_path)
    monkeypatch.setattr(lirpa, "available", lambda: False)
    monkeypatch.setattr(measures, "STEPS", 2)
    given = ["--networks", str(tmp_path), "--data-dir", str(tmp_path), "--quick"]
    given += ["--device", "cpu", "--json", str(tmp_path / "out.json")]
    outcome = CliRunner().invoke(main, given, catch_exceptions=False)
    assert outcome.exit_code == 0
    assert "skipped resnet2b" in outcome.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["network"] for row in rows] == [
        network for network in ("sdp mnist_cnn_a_adv", "all") for _ in BOUNDS
    ]
    assert rows[0]["epsilon"] == 0.3
    assert rows[0]["images"] == 4
    assert [row["certified"] for row in rows] == [0] * len(rows)  # at this radius none can be


def test_a_folder_without_networks(tmp_path, capsys):
    with pytest.raises(UserError, match="no published network"):
        present(tmp_path, ())
    command = [sys.executable, "-m", "benchmarks.published", "--networks", str(tmp_path)]
    command += ["--only", "resnet2b"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == f"Error: there is no published network in {tmp_path}"
    assert "Traceback" not in ended.stderr
