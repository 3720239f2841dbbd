"""Whether a run compiles its passes, what is said where it cannot, and what compiled steps do."""

import functools
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import run_ibp

from ibpcore.bounds import ibp
from ibpcore.bounds.compilation import compiled_pass
from ibpcore.data.sources import Request, load_dataset
from ibpcore.errors import UserError
from ibpcore.experiments.opening import settled
from ibpcore.nn.cnn7 import cnn7
from ibpcore.nn.work import nonlinear_inputs
from ibpcore.training import compiling
from ibpcore.training.compiling import compiles, is_long_enough, is_worthwhile, with_compile
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.loop import epoch_batches, train_model, train_step
from ibpcore.training.state import start_state

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = "conv 3 3x3 s2, bn, relu, linear"
DATA = load_dataset("digits", Request(Path("data"), limit_train=64, limit_test=8))


def tiny(**given):
    settings = {"architecture": TINY, "epochs": 1, "warmup": (1, 1), "threads": 1, **given}
    return make_config("digits", "acert", **settings)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


# --- the rule -----------------------------------------------------------------------------


def test_the_border_of_the_rule():
    """60 s of compiling are to be saved three times: by 1 ms a step in 180,000 steps."""
    assert compiling.SECONDS_A_LAYER * 6 * compiling.MARGIN == 180
    assert not is_worthwhile(179_000, 6, 1e-3)
    assert is_worthwhile(181_000, 6, 1e-3)
    assert not is_worthwhile(181_000, 7, 1e-3)


def test_nonlinear_inputs_by_hand():
    """Of six ReLUs: two of width 2 and three of width 4 (the second strided), and 8 hidden."""
    assert nonlinear_inputs(cnn7((1, 8, 8), 10, 2, 8)) == [128, 128, 64, 64, 64, 8]


@pytest.mark.parametrize(
    ("dataset", "method", "given", "images", "expected"),
    [
        ("digits", "acert", {}, 1347, False),
        ("cifar10", "acert", {"epochs": 229}, 50_000, False),  # 89,539 steps
        ("cifar10", "acert", {"epochs": 231}, 50_000, True),  # 90,321 steps
        ("cifar10", "fastibp", {"epochs": 400}, 50_000, True),
        ("cifar10", "standard", {"epochs": 400}, 50_000, False),
        ("cifar10", "fastibp", {"epochs": 400, "train_bound": "crown"}, 50_000, False),
    ],
)
def test_runs_on_both_sides_of_the_rule(dataset, method, given, images, expected, monkeypatch):
    """2 ms are saved in each step on CUDA, and nothing on a CPU."""
    monkeypatch.setattr(compiling, "check_compiler", lambda device: None)
    config = make_config(dataset, method, width=4, hidden=16, **given)
    shape = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}[dataset]
    network = cnn7(shape, 10, config.width, config.hidden)
    assert is_long_enough(config, network, images, CUDA) is expected
    assert with_compile(config, network, images, CUDA).compile == ("on" if expected else "off")
    assert with_compile(config, network, images, CPU).compile == "off"


def test_what_is_asked_for_is_done():
    network = cnn7((1, 8, 8), 10, 2, 8)
    for asked in ("on", "off"):
        config = make_config("digits", "acert", compile=asked)
        assert with_compile(config, network, 10**9, CPU) == config


# --- no compiler --------------------------------------------------------------------------


def test_a_long_run_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    network = cnn7((1, 28, 28), 10, 4, 16)
    config = make_config("mnist", "acert", width=4, hidden=16, epochs=1000)
    with pytest.warns(UserWarning, match="not compiled, though it is long: .*Triton") as found:
        assert with_compile(config, network, 60_000, CUDA).compile == "off"
    assert len(found) == 1


def test_a_short_run_does_not_miss_a_compiler(no_compiler):
    network = start_state(tiny(), DATA, "cpu").model
    assert settled(tiny(), network, DATA, CPU).compile == "off"


def test_compiling_on_demand_needs_a_compiler(tmp_path, no_compiler):
    done = run_ibp("train", "--compile", "on", "--out", tmp_path / "run")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "C++ compiler" in done.err
    assert not (tmp_path / "run").exists()


# --- the setting --------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "expected"), [(True, "on"), (False, "off"), ("auto", "auto")])
def test_older_files_say_true_or_false(saved, expected):
    values = {**tiny().to_dict(), "compile": saved}
    assert TrainConfig.from_dict(values).compile == expected


def test_other_values_are_refused():
    with pytest.raises(UserError, match="compile must be one of auto, on, off"):
        tiny(compile="yes")


def test_the_run_records_what_was_chosen(tmp_path):
    run = tmp_path / "run"
    done = run_ibp("train", "--architecture", TINY, "--limit-test", 8, "--epochs", 1, "--out", run)
    assert done.code == 0, done.err
    assert json.loads((run / "config.json").read_text())["compile"] == "off"
    assert "compile" not in done.out + done.err
    dry = run_ibp("train", "--config", run / "config.json", "--epochs", 2, "--dry-run")
    assert 'compile = "auto"\n' in dry.out
    assert "# compile: off, since it would cost more than it saves\n" in dry.out


# --- the trial ----------------------------------------------------------------------------


def test_a_failing_compiler_loses_nothing(tmp_path, monkeypatch):
    """The weights are those of a run that was never to be compiled."""

    def broken(*_):
        raise RuntimeError("g++ ended with 1\nand more")

    monkeypatch.setattr(ibp, "compiled_pass", broken)
    folders = [tmp_path / name for name in ("on", "off")]
    for folder in folders:
        folder.mkdir()
    with pytest.warns(UserWarning, match=r"goes on without compiling: g\+\+ ended with 1$"):
        found = train_model(tiny(compile="on"), DATA, folders[0]).state_dict()
    expected = train_model(tiny(compile="off"), DATA, folders[1]).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert json.loads((folders[0] / "config.json").read_text())["compile"] == "on"


def test_compiled_steps_train_the_same(monkeypatch):
    """The same losses and gradients to rounding, in the warm-up and after it.

    Each pass is one graph. It is traced but not built, which takes minutes and has its own test.
    """
    results, calls = {}, []
    traced = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    own = functools.cache(compiled_pass.__wrapped__)

    def counted(*args):
        calls.append(args[0].__name__)
        return own(*args)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(ibp, "compiled_pass", counted)
    for compile in ("off", "on"):
        config = tiny(compile=compile)
        state = start_state(config, DATA, "cpu")
        batch = next(epoch_batches(state, DATA.train, config))
        before = {name: value.clone() for name, value in state.model.state_dict().items()}
        if compile == "on":
            assert compiles(state, batch, config)
            after = state.model.state_dict()
            assert all(torch.equal(after[name], value) for name, value in before.items())
        results[compile] = []
        for share in (0.5, 1.0):
            state = start_state(config, DATA, "cpu")
            step = train_step(state, batch, share, config)
            gradient = torch.cat([p.grad.flatten() for p in state.model.parameters()])
            results[compile] += [*step.sums, gradient]
    assert {*calls} == {"_ibp_margins", "_robust_logits"}
    for plain, fast in zip(results["off"], results["on"], strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
