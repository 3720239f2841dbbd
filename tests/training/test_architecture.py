"""Training of layers that are given as text: `--architecture`, its errors, and runs of it."""

import contextlib
import json

import pytest
import torch
from helpers import run_ibp, snapshot
from torch import nn

from ibpcore import UserError, load_model
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments.run import dataset_of
from ibpcore.experiments.run_folder import saved_config
from ibpcore.nn.initialization import ibp_initialization
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.loggers import Monitor
from ibpcore.training.loop import train_model
from ibpcore.training.model import fresh_network

TEXT = "conv 4 3x3 s2 p1, bn, relu, residual(conv 4 3x3 p1, bn), relu, linear"
TINY = ("--limit-train", "96", "--limit-test", "12", "--batch-size", "32", "--warmup", "1:1")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fresh(text=TEXT, **settings):
    config = make_config("digits", "acert", architecture=text, **settings)
    return fresh_network(config, load_dataset("digits", Request()))


def kinds(network):
    return [type(layer).__name__.removeprefix("Interval") for layer in network]


def test_the_network_is_what_the_text_says_and_no_more():
    """No batch norm is added, and normalisation only where the data set has one."""
    network = fresh()
    assert kinds(network) == [
        *("Conv2d", "BatchNorm", "ReLU", "Residual", "ReLU", "Flatten", "Linear")
    ]
    assert (network.in_shape, network.classes) == ((1, 8, 8), 10)
    assert kinds(fresh("conv 4 3x3, relu, linear 10")) == ["Conv2d", "ReLU", "Flatten", "Linear"]


def test_weights_are_drawn_under_the_seed_of_the_run_and_initialised_as_asked():
    own, again, other = (fresh(initialization="own", seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(own[name], again[name]) for name in own)
    assert not torch.equal(own["0.weight"], other["0.weight"])
    torch.manual_seed(1)
    assert torch.equal(nn.Conv2d(1, 4, 3).weight, own["0.weight"])
    drawn, expected = fresh(seed=1), fresh(initialization="own", seed=1)
    ibp_initialization(expected)
    ours, theirs = drawn.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@contextlib.contextmanager
def stopping_in_epoch_2(label, length):
    def advance(done, facts):
        if facts[0] == "epoch 2/2":
            raise KeyboardInterrupt

    yield advance


def test_a_run_of_an_architecture(folder):
    """Trained, certified with proofs; goes on after it was cut off, to the same bits."""
    whole = run_ibp("train", "--architecture", TEXT, *TINY, "--epochs", "2", "--out", "whole")
    assert whole.code == 0, whole.err
    assert json.loads((folder / "whole" / "config.json").read_text())["architecture"] == TEXT
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
    assert kinds(load_model(folder / "whole" / "model.safetensors")) == kinds(fresh())


def test_a_configuration_file_gives_it_back(folder):
    common = ("train", "--architecture", TEXT, "--dry-run", *TINY)
    printed = run_ibp(*common)
    assert printed.code == 0, printed.err
    (folder / "run.toml").write_text(printed.out)
    again = run_ibp("train", "--config", "run.toml", "--dry-run")
    assert again.code == 0, again.err
    assert f'architecture = "{TEXT}"' in again.out
    settings = printed.out.partition("#")[0]
    assert again.out.startswith(settings)


def test_files_of_former_versions_have_none():
    config = make_config("digits", "acert")
    former = {name: v for name, v in config.to_dict().items() if name != "architecture"}
    assert TrainConfig.from_dict(former) == config
    assert config.architecture is None


ERRORS = {
    ("--architecture", "conv 4"): "'conv 4': a convolution needs the size of its kernel",
    ("--architecture", "linear 9"): "the architecture gives 9 values for 10 classes",
    ("--architecture", "cnn5"): "'conv 3x3 p1': in a new network it needs its width",
    ("--architecture", "conv 4 9x9, linear"): "its kernel is larger than its input of 8 x 8",
    ("--architecture", ""): "the architecture is empty",
    ("--architecture", "linear", "--width", "8"): "width can be chosen for a new cnn7 only",
    ("--architecture", "linear", "--model", "a:b"): "model must be left out with an architecture",
}


@pytest.mark.parametrize("options", ERRORS, ids=range(len(ERRORS)))
def test_an_error_is_one_line_and_nothing_is_written(options, folder):
    outcome = run_ibp("train", *options, *TINY)
    assert outcome.code in (1, 2)
    assert outcome.err.count("\n") == 1
    assert ERRORS[options] in outcome.err
    assert snapshot(folder) == {}
    sweep = run_ibp("sweep", *options, *TINY, "--out", "sweep")
    assert sweep.code == outcome.code
    assert ERRORS[options] in sweep.err
    assert snapshot(folder) == {}


def test_other_types_are_refused():
    with pytest.raises(UserError, match="architecture must be a string, or left out"):
        make_config("digits", "acert", architecture=3)
