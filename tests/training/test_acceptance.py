"""Custom networks are accepted and end well, or are refused before anything is written."""

import sys

import pytest
import torch
from helpers import run_ibp, snapshot

from ibpcore import UserError, load_model
from ibpcore.data.sources import Request, load_dataset
from ibpcore.training.config import make_config
from ibpcore.training.rehearsal import rehearse

SOURCE = """
import sys
import torch
from torch import nn

def sequence(*layers, classes=10):
    return nn.Sequential(nn.Conv2d(1, 2, 3, 2), *layers, nn.Flatten(), nn.Linear(18, classes))

def of(*layers):
    return lambda in_shape, classes: sequence(*layers, classes=classes)

def changed(change):
    def build(in_shape, classes):
        net = nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, classes))
        change(net)
        return net
    return build

plain = changed(lambda net: None)
frozen_part = changed(lambda net: net[0].requires_grad_(False))
no_batch = of(nn.BatchNorm2d(2, track_running_stats=False))
no_batch_rows = changed(lambda net: net.insert(3, nn.BatchNorm1d(18, track_running_stats=False)))
epsilon_0 = of(nn.BatchNorm2d(2, eps=0.0))
sigmoid = of(nn.Sigmoid())
divided = of(nn.AvgPool2d(1, divisor_override=-2))
steep = of(nn.LeakyReLU(1e38))
frozen = changed(lambda net: net.requires_grad_(False))
half = changed(lambda net: net.half())
bfloat16 = changed(lambda net: net.bfloat16())
double = changed(lambda net: net.double())
mixed = changed(lambda net: net[3].double())
meta = changed(lambda net: net.to("meta"))
last_on_meta = changed(lambda net: net[3].to("meta"))
not_a_number = changed(lambda net: net[0].bias.data.fill_(float("nan")))
infinite = changed(lambda net: net[3].weight.data[:1].fill_(float("inf")))

def integers(in_shape, classes):
    net = plain(in_shape, classes)
    net[0].weight = nn.Parameter(net[0].weight.to(torch.int8), requires_grad=False)
    return net

def complex(in_shape, classes):
    net = plain(in_shape, classes)
    net[3].weight = nn.Parameter(net[3].weight.to(torch.complex64))
    return net

class Parameterless(nn.Module):
    def forward(self, x):
        return torch.relu(x).flatten(1)[:, :10]

def parameterless(in_shape, classes):
    return Parameterless()

def computed(in_shape, classes):
    net = plain(in_shape, classes)
    weight = net[3]._parameters.pop("weight")
    net[3].weight = weight * 1.0
    return net

def expanded(in_shape, classes):
    net = plain(in_shape, classes)
    net[3].weight = nn.Parameter(torch.rand(1, 18).expand(classes, 18))
    return net

def sparse(in_shape, classes):
    net = plain(in_shape, classes)
    net[3].weight = nn.Parameter(net[3].weight.detach().to_sparse())
    return net

def inference(in_shape, classes):
    with torch.inference_mode():
        return plain(in_shape, classes)

def failing_gradient(in_shape, classes):
    def fails(gradient):
        raise KeyError("no\\ngradient")
    net = plain(in_shape, classes)
    net[0].weight.register_hook(fails)
    return net

def bad_gradient(in_shape, classes):
    net = plain(in_shape, classes)
    net[0].weight.register_hook(lambda gradient: gradient * float("nan"))
    return net

def script(in_shape, classes):
    return torch.jit.freeze(torch.jit.script(plain(in_shape, classes).eval()))

def leaves(in_shape, classes):
    sys.exit(0)

class Bare(nn.Module):
    def __init__(self, kind=torch.float32):
        super().__init__()
        self.own = nn.Parameter(torch.rand(10, 64, dtype=kind) / 64)

    def forward(self, x):
        return nn.functional.linear(x.flatten(1), self.own)

def bare(in_shape, classes):
    return Bare()

def bare_double(in_shape, classes):
    return Bare(torch.float64)

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 1, 3, 1, 1), nn.Conv2d(1, 1, 3, 1, 1)
        self.second.weight, self.last = self.first.weight, nn.Linear(64, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(torch.relu(self.first(x)).flatten(1))

def shared(in_shape, classes):
    return Shared()

ONE = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))

def one(in_shape, classes):
    return ONE
"""
CLAIMED = ("--claim", "unchecked")
REFUSED = {
    "no_batch": r"layer '1' \(BatchNorm2d\): certificates need running statistics",
    "no_batch_rows": r"layer '3' \(BatchNorm1d\): certificates need running statistics",
    "epsilon_0": r"layer '1' \(BatchNorm2d\): training needs an eps above 0 in float32",
    "sigmoid": r"layer '1' \(Sigmoid\): no proof covers .*--claim unchecked",
    "divided": r"layer '1' \(AvgPool2d\): IntervalAvgPool2d needs divisor_override > 0",
    "steep": r"layer '1' \(LeakyReLU\): no proof covers .* slope 1e\+38",
    "frozen": "there is nothing to train: no parameter requires a gradient",
    "parameterless": "there is nothing to train",
    "half": r"layer '0' \(Conv2d\): its weight is torch.float16, but training computes in float32",
    "bfloat16": r"layer '0' \(Conv2d\): its weight is torch.bfloat16",
    "double": r"layer '0' \(Conv2d\): its weight is torch.float64",
    "mixed": r"do not fit the module at '3' \(Linear\)",
    "complex": r"do not fit the module at '3' \(Linear\)",
    "integers": r"do not fit the module at '0' \(Conv2d\)",
    "meta": "'0.weight' is on the device meta, where it has no values",
    "last_on_meta": "'3.weight' is on the device meta",
    "not_a_number": r"layer '0' \(Conv2d\): its bias holds values that are not finite",
    "infinite": r"layer '3' \(Linear\): its weight holds values that are not finite",
    "computed": r"layer '3' \(Linear\): its weight is neither a parameter nor a buffer",
    "expanded": r"layer '3' \(Linear\): its weight is expanded",
    "sparse": "'3.weight' is sparse",
    "inference": "'0.weight' was made in inference mode",
    "failing_gradient": r"the network cannot be trained: KeyError: 'no\\ngradient'",
    "bad_gradient": "the loss is not finite at step 1",
    "script": "TorchScript cannot be traced",
    "leaves": r"tooth:leaves failed: SystemExit: 0 \(tooth.py, line \d+\)",
    "bare_double": "a layer of type Linear with 'own': its weight is torch.float64",
}
SMALL = ("--limit-train", "9", "--limit-test", "5", "--batch-size", "4", "--epochs", "1")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "tooth.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("tooth", None)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("command", "name"),
    [*(("train", name) for name in REFUSED), ("sweep", "sigmoid"), ("sweep", "failing_gradient")],
)
def test_what_would_end_badly_is_refused_before_anything_is_written(command, name, folder):
    """With the layer and the reason; the run folder that existed keeps what it held."""
    (folder / "runs").mkdir()
    before = snapshot(folder)
    outcome = run_ibp(command, "--model", f"tooth:{name}", *SMALL, "--out", "runs/new")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1
    with pytest.raises(UserError, match=REFUSED[name]):
        raise UserError(outcome.err.removeprefix("Error: ").strip())
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["plain", "frozen_part", "bare", "shared", "one", "sigmoid"])
def test_what_is_accepted_ends_well(name, folder):
    claim = CLAIMED if name == "sigmoid" else ()
    outcome = run_ibp("train", "--model", f"tooth:{name}", *SMALL, *claim, "--out", "run")
    assert outcome.code == 0, outcome.err
    for proved in ("real", "float32") if name != "sigmoid" else ("unchecked",):
        asked = ("certify", "run", "--claim", proved, "--out", f"certificates {proved}")
        again = run_ibp(*asked)
        assert again.code == 0, again.err
    assert load_model(folder / "run" / "model.safetensors").classes == 10


def test_the_refusal_of_a_proof_says_how_to_train_without_one(folder):
    refused = run_ibp("train", "--model", "tooth:sigmoid", *SMALL, "--out", "run")
    assert "--claim unchecked" in refused.err
    outcome = run_ibp("train", "--model", "tooth:sigmoid", *SMALL, *CLAIMED, "--out", "run")
    assert outcome.code == 0
    assert "claim: unchecked" in outcome.out
    assert "certify again with: ibp certify run/model.safetensors" in outcome.out
    assert outcome.out.endswith(" --claim unchecked\n")


def test_certificates_that_are_refused_leave_no_folder(folder):
    run_ibp("train", "--model", "tooth:sigmoid", *SMALL, *CLAIMED, "--out", "run")
    before = snapshot(folder)
    outcome = run_ibp("certify", "run")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "no proof covers rounding in Sigmoid" in outcome.err
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["divided", "no_batch", "double"])
def test_without_a_proof_the_message_names_the_layer_too(name, folder):
    outcome = run_ibp("train", "--model", f"tooth:{name}", *SMALL, *CLAIMED)
    assert outcome.code == 1
    with pytest.raises(UserError, match=REFUSED[name]):
        raise UserError(outcome.err)


@pytest.mark.parametrize("name", ["failing_gradient", "meta"])
def test_a_dry_run_refuses_the_same(name, folder):
    outcome = run_ibp("train", "--model", f"tooth:{name}", *SMALL, "--dry-run")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1


def test_a_folder_that_existed_is_as_before(folder):
    """Empty, or with files of the user."""
    for number, files in enumerate(([], ["notes"])):
        run = folder / f"run{number}"
        run.mkdir()
        for file in files:
            (run / file).write_text("mine")
        before = snapshot(folder)
        outcome = run_ibp("train", "--model", "tooth:sigmoid", *SMALL, "--out", run)
        assert outcome.code == 1
        assert snapshot(folder) == before


def config(name, **settings):
    return make_config("digits", "acert", model=f"tooth:{name}", **settings)


def test_a_rehearsal_leaves_no_trace_in_a_module_that_is_returned_again(folder):
    """Its weights, statistics, gradients and the order of random numbers are as without it."""
    data = load_dataset("digits", Request(limit_train=20, limit_test=9))
    rehearse(config("one", initialization="own"), data)
    one = sys.modules["tooth"].ONE
    before = {name: value.clone() for name, value in one.state_dict().items()}
    rehearse(config("one", initialization="own"), data)
    assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())
    assert int(before["1.num_batches_tracked"]) == 0
    assert all(weight.grad is None for weight in one.parameters())


@pytest.mark.parametrize("method", ["standard", "acert"])
def test_a_rehearsal_bounds_every_image(method, folder):
    """Also where the network is wrong about all of them, and `standard` bounds none in training."""
    source = (folder / "tooth.py").read_text()
    ends_in_convolution = "nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten(), nn.Upsample(2))"
    (folder / "tooth.py").write_text(source + f"\ndef odd(*_): return {ends_in_convolution}\n")
    with pytest.raises(UserError):
        rehearse(config("odd"), load_dataset("digits", Request(limit_train=8, limit_test=1)))


def test_a_data_set_smaller_than_the_rehearsal(folder):
    data = load_dataset("digits", Request(limit_train=2, limit_test=1))
    rehearse(config("plain", inspect_every=1, epochs=1), data)
