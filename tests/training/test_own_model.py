"""Networks that a user's own function builds: `--model`, its errors, and runs of them."""

import contextlib
import json
import sys

import pytest
import torch
from helpers import run_ibp, snapshot

from ibpcore import UserError, load_model
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments.run import dataset_of
from ibpcore.experiments.run_folder import saved_config
from ibpcore.nn.initialization import ibp_initialization
from ibpcore.training.config import is_function, make_config
from ibpcore.training.loggers import Monitor
from ibpcore.training.loop import train_model
from ibpcore.training.model import fresh_network, own_network

SOURCE = """
import torch
import torch.nn.functional as F
from torch import nn
from ibpcore.nn import IntervalNormalize

class Net(nn.Module):
    def __init__(self, in_shape, classes):
        super().__init__()
        self.conv = nn.Conv2d(in_shape[0], 4, 3, 2, 1)
        self.block, self.norm = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.last = nn.Linear(64, classes)

    def forward(self, x):
        x = F.relu(self.conv(x))
        x = F.relu(x + self.norm(self.block(x)))
        return self.last(x.view(x.size(0), -1))

build = Net

def normalized(in_shape, classes):
    return nn.Sequential(IntervalNormalize([0.1], [0.2]), Net(in_shape, classes))

def scaled(in_shape, classes):
    class Scaled(Net):
        def forward(self, x):
            return super().forward((x - 0.5) / 0.25)
    return Scaled(in_shape, classes)

def fails(in_shape, classes):
    return nn.Linear(2, missing)

def number(in_shape, classes):
    return 7

def wrapped(in_shape, classes):
    return torch.compile(nn.DataParallel(Net(in_shape, classes)))

def others(in_shape, classes):
    return Net(in_shape, classes + 1)

def softmax(in_shape, classes):
    return nn.Sequential(nn.Softmax(1), Net(in_shape, classes))

def too_large(in_shape, classes):
    return Net((3, 9, 9), classes)

def no_arguments():
    pass

word = "build"

def clamped(in_shape, classes):
    class Clamped(Net):
        def forward(self, x):
            return super().forward(torch.maximum(x, torch.tensor(0.1)))
    return Clamped(in_shape, classes)
"""
GIVEN = ((1, 8, 8), 10, (0.3,), (0.4,))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, which holds the user's modules."""
    (tmp_path / "mynets.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("import not_installed\n")
    (tmp_path / "typo.py").write_text("def build(:\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "nets.py").write_text("from mynets import build\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("mynets", "broken", "typo", "sub", "sub.nets"):
        sys.modules.pop(name, None)
    assert str(tmp_path) not in sys.path


def kinds(network):
    return [type(layer).__name__.removeprefix("Interval") for layer in network]


def test_a_function_of_the_current_folder_is_found():
    network = own_network("mynets:build", *GIVEN)
    assert kinds(network) == [
        *("Normalize", "Conv2d", "ReLU", "Residual", "ReLU", "Flatten", "Linear")
    ]
    assert (network.in_shape, network.classes) == ((1, 8, 8), 10)
    torch.testing.assert_close(network[0].mean, torch.tensor([0.3]))
    assert kinds(own_network("sub.nets:build", *GIVEN)) == kinds(network)


def test_a_normalisation_of_its_own_stays_the_only_one():
    assert kinds(own_network("mynets:normalized", *GIVEN))[:2] == ["Normalize", "Conv2d"]
    assert kinds(own_network("mynets:scaled", *GIVEN))[:3] == ["Subtract", "Divide", "Conv2d"]
    assert kinds(own_network("mynets:build", *GIVEN[:2]))[0] == "Conv2d"


def test_a_clamp_is_no_normalisation():
    found = kinds(own_network("mynets:clamped", *GIVEN))[:3]
    assert found == ["Normalize", "Maximum", "Conv2d"]


def test_wrappers_are_taken_off():
    assert kinds(own_network("mynets:wrapped", *GIVEN)) == kinds(
        own_network("mynets:build", *GIVEN)
    )


ERRORS = {
    "mynets:nothing": "the module mynets has no function nothing",
    "mynets:word": "the module mynets has no function word",
    "nowhere:build": "there is no module nowhere in",
    "sub.nowhere:build": "there is no module sub.nowhere in",
    "broken:build": r"broken cannot be imported: ModuleNotFoundError: .*\(broken.py, line 1\)",
    "typo:build": r"typo cannot be imported: SyntaxError: .*\(typo.py, line 1\)",
    "mynets:fails": r"mynets:fails failed: NameError: .*missing.* \(mynets.py, line 31\)",
    "mynets:no_arguments": "mynets:no_arguments failed: TypeError",
    "mynets:number": "must return an nn.Module, not int",
    "mynets:others": "returns 11 logits for 10 classes",
    "mynets:softmax": r"unsupported layer '0' \(Softmax\)",
    "mynets:too_large": r"images of shape \(1, 8, 8\) do not fit the module at 'conv' \(Conv2d\)",
    "mynets": "model must be cnn7 or PACKAGE.MODULE:FUNCTION",
    "my nets:build": "model must be cnn7 or",
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_and_nothing_is_written(name, folder):
    before = {path for path in snapshot(folder) if "__pycache__" not in path}
    outcome = run_ibp("train", "--model", name)
    assert outcome.code == (2 if "must be cnn7 or" in ERRORS[name] else 1)
    assert outcome.err.count("\n") == 1
    with pytest.raises(UserError, match=ERRORS[name]):
        raise UserError(outcome.err.removeprefix("Error: ").strip())
    assert {path for path in snapshot(folder) if "__pycache__" not in path} == before


def test_the_size_of_a_cnn7_is_refused_with_another_network():
    outcome = run_ibp("train", "--model", "mynets:build", "--width", "8")
    assert outcome.code == 2
    assert "width can be chosen for a new cnn7 only" in outcome.err


def test_what_is_a_function():
    assert is_function("a.b_1:build")
    for name in ("cnn7", "a", ":b", "a:", "a:b:c", "a.:b", "../a:b", "a-b:c", "a:b()", "1a:b"):
        assert not is_function(name), name


def fresh(**settings):
    config = make_config("digits", "acert", model="mynets:build", **settings)
    return fresh_network(config, load_dataset("digits", Request()))


def test_weights_are_drawn_under_the_seed_of_the_run_and_initialised_as_asked():
    own, again, other = (fresh(initialization="own", seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(own[name], again[name]) for name in own)
    assert not torch.equal(own["0.weight"], other["0.weight"])
    drawn = fresh(seed=1)
    expected = fresh(initialization="own", seed=1)
    ibp_initialization(expected)
    ours, theirs = drawn.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(ours["5.weight"], own["5.weight"])  # the last layer keeps its own


TINY = ("--limit-train", "96", "--limit-test", "12", "--batch-size", "32", "--warmup", "1:1")


@contextlib.contextmanager
def stopping_in_epoch_2(label, length):
    def advance(done, facts):
        if facts[0] == "epoch 2/2":
            raise KeyboardInterrupt

    yield advance


def test_a_run_of_a_network_of_ones_own(folder):
    """Trained, certified with proofs; goes on after it was cut off, to the same bits."""
    common = ("train", "--model", "mynets:build", *TINY, "--epochs", "2")
    whole = run_ibp(*common, "--out", "whole")
    assert whole.code == 0, whole.err
    assert json.loads((folder / "whole" / "config.json").read_text())["model"] == "mynets:build"
    assert json.loads((folder / "whole" / "summary.json").read_text())["claim"] == "real"

    config = saved_config(folder / "whole")
    (folder / "cut").mkdir()
    with pytest.raises(KeyboardInterrupt):
        train_model(
            config, dataset_of(config, folder), folder / "cut", monitor=Monitor(stopping_in_epoch_2)
        )
    assert run_ibp("train", "--resume", "cut").code == 0
    for name in ("model.safetensors", "certificates.csv"):
        assert (folder / "cut" / name).read_bytes() == (folder / "whole" / name).read_bytes()

    (folder / "mynets.py").unlink()  # what is saved needs no code
    assert kinds(load_model(folder / "whole" / "model.safetensors"))[-1] == "Linear"
    again = run_ibp("certify", "whole", "--bound", "crown-ibp", "--out", "again")
    assert again.code == 0, again.err


def test_a_sweep_of_a_network_that_cannot_be_is_refused_at_once(folder):
    outcome = run_ibp("sweep", "--model", "mynets:softmax", "--out", "sweep", *TINY)
    assert outcome.code == 1
    assert "Softmax" in outcome.err
