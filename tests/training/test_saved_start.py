"""Training that starts from a saved model: its weights, its network, its normalisation."""

import contextlib
import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers import run_ibp, snapshot
from torch import nn

import ibpcore
from benchmarks.reliability.faults import differing
from ibpcore import UserError, load_model, save_model
from ibpcore.data.sources import Request, load_dataset
from ibpcore.nn.checkpoint import fingerprint
from ibpcore.training import loop as training
from ibpcore.training import run_files
from ibpcore.training.config import make_config
from ibpcore.training.model import fresh_network

import_module("ibpcore_cli.train")  # before any function that it imports is replaced
FEW = ("--limit-train", 64, "--limit-test", 16, "--device", "cpu")
SHORT = ("--epochs", 2, "--warmup", "1:1", *FEW)


pytestmark = pytest.mark.usefixtures("no_figures", "elsewhere")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    size = ("--width", 2, "--hidden", 8)
    assert run_ibp("train", *SHORT, *size, "--out", folder).code == 0
    return folder


def stopped(monkeypatch, *command, epoch):
    """`ibp COMMAND`, stopped by Ctrl-C at the beginning of an epoch."""
    before = training.run_epoch

    def stops(state, *rest):
        if state.epoch == epoch:
            raise KeyboardInterrupt
        return before(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_epoch", stops)
        assert run_ibp(*command).code == 130


def equal(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def refused(*command, says):
    """One line, and nothing on disk has changed."""
    before = snapshot(Path())
    code, _, err = run_ibp(*command)
    assert code in (1, 2)
    assert len(err.splitlines()) == 1, err
    assert says in err
    assert snapshot(Path()) == before


def test_the_first_weights_are_those_of_the_model(trained, monkeypatch):
    stopped(monkeypatch, "train", "--from", trained, *SHORT, "--out", "run", epoch=0)
    model = load_model(trained / "model.safetensors")
    state = torch.load("run/resume.pt", weights_only=True)["model"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    config = json.loads(Path("run/config.json").read_text())
    assert config["start"] == fingerprint(model)
    assert (config["initialization"], config["epsilon_max"]) == ("own", 0.1)


@pytest.mark.parametrize("epoch", [0, 1])
def test_it_needs_the_model_no_longer(trained, monkeypatch, epoch):
    """A run that was stopped, at the very start too, ends with the same bits without it."""
    shutil.copytree(trained, "model")
    assert run_ibp("train", "--from", "model", *SHORT, "--out", "whole").code == 0
    stopped(monkeypatch, "train", "--from", "model", *SHORT, "--out", "run", epoch=epoch)
    shutil.rmtree("model")
    assert run_ibp("train", "--resume", "run", "--device", "cpu").code == 0
    assert differing(Path("whole"), Path("run")) == []
    # The run holds all that is needed to repeat it.
    again = ("--config", "run/config.json", "--from", "run/start.safetensors", "--device", "cpu")
    assert run_ibp("train", *again, "--out", "again").code == 0
    assert differing(Path("whole"), Path("again")) == []


def test_a_kill_before_the_settings_are_written(trained, monkeypatch):
    """The folder holds the model to start from alone: the same command begins anew."""
    begin = ("train", "--from", trained, *SHORT, "--out", "run")

    def stops(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_files, "write_config", stops)
        code, _, err = run_ibp(*begin)
    assert (code, err) == (130, "Error: stopped; run the same command again\n")
    assert [path.name for path in Path("run").iterdir()] == ["start.safetensors"]
    assert run_ibp(*begin).code == 0


def test_a_converted_network_keeps_its_normalisation(monkeypatch):
    """A file without any record, as `ibp import` and `save_model` write it."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    torch.manual_seed(0)
    path = Path("net.safetensors")
    network = ibpcore.convert(module, (1, 8, 8))
    save_model(network, path)
    refused("train", "--from", path, *SHORT, says="does not say how it was trained: give --dataset")
    given = ("--dataset", "digits", "--method", "fastibp", "--claim", "float32")
    assert run_ibp("train", "--from", path, *given, *SHORT, "--out", "run").code == 0
    model = load_model("run/model.safetensors")
    assert [type(a) for a in model] == [type(b) for b in network]
    assert not equal(model, network)
    assert equal(load_model("run/start.safetensors"), network)


def test_the_network_of_a_run_by_other_settings_is_replaced(trained):
    """--config of a CNN7 of another size, and threads that are chosen anew."""
    size = ("--width", 4, "--hidden", 16)
    assert run_ibp("train", *SHORT, *size, "--seed", 3, "--out", "other").code == 0
    given = ("--config", "other/config.json", "--from", trained, "--device", "cpu")
    assert run_ibp("train", *given, "--out", "run").code == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["seed"] == 3
    assert load_model("run/model.safetensors").architecture.width == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--width", 4), "--width can be chosen for a new cnn7 only"),
        (("--architecture", "linear"), "--architecture can be chosen for a new network only"),
        (("--model", "a:b"), "--model can be chosen for a new network only"),
        (("--initialization", "ibp"), "--initialization can be chosen for a new network only"),
        (("--resume", "run"), "--resume takes its settings from RUN"),
    ],
)
def test_what_describes_a_new_network_is_refused(trained, given, says):
    Path("run").mkdir()
    refused("train", "--from", trained, *given, *FEW, says=says)


def test_models_that_cannot_be_started_from(trained):
    refused("train", "--from", "none", says="there is no model file none")
    network = ibpcore.cnn7(in_shape=(1, 8, 8), classes=9, width=2, hidden=8)
    save_model(network, "nine.safetensors")
    says = (
        "the model to start from takes images (1, 8, 8) of 9 classes, but UCI optical digits has"
        " (1, 8, 8) of 10"
    )
    refused("train", "--from", "nine.safetensors", "--dataset", "digits", *FEW, says=says)
    save_model(load_model(trained / "model.safetensors").double(), "double.safetensors")
    says = "training computes in float32"
    refused("train", "--from", "double.safetensors", "--dataset", "digits", *FEW, says=says)


def test_a_run_whose_starting_model_is_gone_or_another(trained, monkeypatch):
    stopped(monkeypatch, "train", "--from", trained, *SHORT, "--out", "run", epoch=0)
    again = ("train", "--config", "run/config.json")
    refused(*again, says="the run starts from a saved model: give it with --from")
    Path("run/start.safetensors").unlink()
    refused("train", "--resume", "run", says="there is no model file run/start.safetensors")
    save_model(ibpcore.cnn7((1, 8, 8), 10, width=2, hidden=8), "run/start.safetensors")
    refused("train", "--resume", "run", says="another one than that of the configuration")


def test_the_model_itself_is_left_alone(trained):
    data = load_dataset("digits", Request(limit_train=64, limit_test=16))
    model = load_model(trained / "model.safetensors")
    config = make_config("digits", "acert", start=fingerprint(model), epochs=1)
    network = fresh_network(config, data, model)
    assert equal(network, model)
    with torch.no_grad():
        for weight in network.parameters():
            weight.zero_()
    assert fingerprint(model) == config.start
    for wrong in ({"start": "x"}, {"start": config.start, "width": 4}):
        with pytest.raises(UserError):
            make_config("digits", "acert", **wrong)
    with contextlib.suppress(UserError):
        fresh_network(make_config("digits", "acert"), data, model)
        raise AssertionError("a model that the configuration does not name is taken")
