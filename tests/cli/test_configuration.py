"""Settings in files: what is read, what overrides what, and what is refused in one line."""

import json
import sys
from dataclasses import replace

import pytest
from helpers import run_ibp, snapshot

from ibpcore import UserError
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.presets import METHOD_PRESETS, PRESETS
from ibpcore_cli.configuration import configured, read_settings, to_toml

TOML = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no TOML")
SUFFIX = "toml" if sys.version_info >= (3, 11) else "json"


def written(folder, text, suffix="toml"):
    path = folder / f"run.{suffix}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def settings(folder, over=None, /, **values):
    """`configured` by a JSON file of these values, with those in `over` given."""
    given = dict(over or {})
    path = written(folder, json.dumps(values), "json")
    return configured(path, given.pop("dataset", None), given.pop("method", None), given)


@TOML
@pytest.mark.parametrize("dataset", PRESETS)
def test_every_preset_comes_back_from_toml(tmp_path, dataset):
    for method in METHOD_PRESETS:
        config = make_config(dataset, method, xtol=1e-7, limit_train=100)
        assert configured(written(tmp_path, to_toml(config)), None, None, {}) == config


@TOML
@pytest.mark.parametrize(
    ("epsilon_max", "text"),
    [(16 / 255, '"16/255"'), (0.1, "0.1"), (1 / 7, "0.14285714285714285"), (1, "1")],
)
def test_a_radius_comes_back_as_it_was_typed(tmp_path, epsilon_max, text):
    config = make_config("digits", "acert", epsilon_max=epsilon_max)
    assert f"epsilon_max = {text}\n" in to_toml(config)
    assert configured(written(tmp_path, to_toml(config)), None, None, {}) == config


@TOML
def test_what_is_left_out_comes_back_too(tmp_path):
    """The preset of `ibp` has an initial kappa; this run has none."""
    config = replace(make_config("digits", "ibp", schedule="none"), initial_kappa=None)
    assert configured(written(tmp_path, to_toml(config)), None, None, {}) == config
    assert 'initial_kappa = "none"' in to_toml(config)


def test_a_run_s_own_file_gives_its_configuration(tmp_path):
    config = make_config("cifar10", "sabr", epochs=7, box_size=0.3, warmup=(2, 3))
    assert settings(tmp_path, **config.to_dict()) == config


def test_the_file_of_a_run_with_a_network_of_its_own(tmp_path):
    """It names the sizes of a CNN7 too, which is not in it; others were meant for something."""
    config = make_config("digits", "acert", model="networks:build", epochs=3)
    assert settings(tmp_path, **config.to_dict()) == config
    with pytest.raises(UserError, match="width can be chosen for a new cnn7 only"):
        settings(tmp_path, model="networks:build", width=5)


def test_presets_fill_what_is_missing(tmp_path):
    asked = settings(tmp_path, method="fastibp", width=3)
    assert asked == make_config("digits", "fastibp", width=3)
    assert settings(tmp_path) == make_config("digits", "acert")


def test_options_override(tmp_path):
    over = {"dataset": "mnist", "method": "ibp", "width": 5}
    asked = settings(tmp_path, over, dataset="digits", width=3, hidden=9)
    assert asked == make_config("mnist", "ibp", width=5, hidden=9)


def test_the_warmup_keeps_its_share_of_other_epochs(tmp_path):
    whole = make_config("digits", "acert", epochs=20).to_dict()
    assert whole["warmup"] == (1, 8)
    assert settings(tmp_path, {"epochs": 10}, **whole).warmup == (1, 4)
    # One of the file's own stays, and has to fit.
    whole["warmup"] = (2, 7)
    assert settings(tmp_path, {"epochs": 10}, **whole).warmup == (2, 7)
    with pytest.raises(UserError, match="warmup must be FIRST:LAST"):
        settings(tmp_path, {"epochs": 5}, **whole)


def test_another_method_has_its_own_presets(tmp_path):
    whole = make_config("digits", "acert", width=3).to_dict()
    assert settings(tmp_path, {"method": "fastibp"}, **whole) == make_config(
        "digits", "fastibp", width=3
    )
    whole["learning_rate"] = 1e-3
    assert settings(tmp_path, {"method": "standard"}, **whole).learning_rate == 1e-3


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.1", 0.1)])
def test_epsilons_may_be_typed_as_fractions(tmp_path, text, value):
    assert settings(tmp_path, epsilon_max=text).epsilon_max == value


BROKEN_TOML = {
    "epochs = = 3": "is not TOML",
    "epochs = 3\nepochs = 4": "is not TOML",
    b"\xff\xfe\x00": "is not TOML",
    "[" * 100_000: "is not TOML",
    "epochs = 3.5": "epochs must be a whole number, but is 3.5",
    "epochs = '3'": "epochs must be a whole number, but is '3'",
    "epochs = true": "epochs must be a whole number, but is True",
    "max_iterations = true": "max_iterations must be a whole number, or left out, but is True",
    "epochs = 1979-05-27": "epochs must be a whole number",
    "epochs = 'none'": "epochs must be a whole number, but is 'none'",
    "kappa = nan": "kappa must be a finite number",
    "width = 99999999999999999999": "width must be at most",
    "epochs = -1": "epochs must be at least 1, but is -1",
    "warmup = [1, 2, 3]": "warmup must be two whole numbers",
    "warmup = '1:2'": "warmup must be two whole numbers",
    "warmup = [5, 100]": "warmup must be FIRST:LAST",
    "flip = 1": "flip must be true or false, but is 1",
    "dataset = 3": "dataset must be one of",
    "dataset = ['digits']": "dataset must be one of",
    "method = 'trades'": "method must be one of",
    "solver = 'newton'": "'newton'",
    "epsilon_max = '8/0'": "epsilon_max must be a number such as 0.1 or 8/255, but is '8/0'",
    "epsilon_max = 'big'": "epsilon_max must be a number such as 0.1 or 8/255, but is 'big'",
    "epsilon_max = '2'": "epsilon_max must be above 0 and at most 1",
    "epsilon_max = {a = 1}": "epsilon_max must be a finite number",
    "epoch = 3": "unknown setting epoch; did you mean epochs?",
    "[train]\nepochs = 3": "unknown setting train; ",
    "'a\\u001bb' = 3": "unknown setting",
    "box_size = 0.2": "box_size is for sabr, staps, not for acert",
    "#" * (2**20 + 1): "is too large",
}


@TOML
@pytest.mark.parametrize("number", range(len(BROKEN_TOML)))
def test_broken_toml(tmp_path, number):
    text, reason = [*BROKEN_TOML.items()][number]
    refused(tmp_path, written(tmp_path, text), reason)


BROKEN_JSON = {
    "": "is not JSON",
    "{": "is not JSON",
    "[1, 2]": "describes no training",
    "null": "describes no training",
    '{"epochs": Infinity}': "epochs must be a whole number",
    '{"kappa": 1e999}': "kappa must be a finite number",
    '{"seed": null}': "seed must be a whole number, but is None",
    "[" * 100_000: "is not JSON",
    '{"seed": ' + "1" * 5000 + "}": "is not JSON",
}


@pytest.mark.parametrize("number", range(len(BROKEN_JSON)))
def test_broken_json(tmp_path, number):
    text, reason = [*BROKEN_JSON.items()][number]
    refused(tmp_path, written(tmp_path, text, "json"), reason)


def refused(folder, path, reason):
    """One line that names the file, and nothing on disk."""
    before = snapshot(folder)
    done = run_ibp("train", "--config", path, "--out", folder / "run")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"Error: {path}"), done.err
    assert reason in done.err
    assert len(done.err.splitlines()) == 1
    assert done.err.strip().isprintable()
    assert snapshot(folder) == before


def test_without_toml_json_is_advised(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(UserError, match=r"TOML takes Python 3.11.*\*\.json"):
        read_settings(written(tmp_path, "epochs = 3"))


def test_files_that_are_none(tmp_path):
    for path, code, says in (
        (tmp_path / "none.toml", 1, "none.toml: No such file"),
        (tmp_path, 2, "'--config': File"),
    ):
        done = run_ibp("train", "--config", path)
        assert (done.code, len(done.err.splitlines())) == (code, 1)
        assert says in done.err


def test_an_option_for_another_method_is_named_as_an_option(tmp_path):
    path = written(tmp_path, '{"method": "fastibp"}', "json")
    done = run_ibp("train", "--config", path, "--box-size", 0.2)
    error = "Error: --box-size is for sabr, staps, not for fastibp\n"
    assert (done.code, done.err) == (2, error)


def test_resume_takes_no_file(tmp_path):
    path = written(tmp_path, "{}", "json")
    done = run_ibp("train", "--config", path, "--resume", tmp_path)
    assert done.code == 2
    assert "--resume takes its settings from RUN" in done.err


def test_a_run_from_a_file_is_the_run_of_the_options(tmp_path):
    """And so is that from the first one's own `config.json`."""
    tiny = {"epochs": 1, "limit_train": 32, "limit_test": 8, "width": 2, "hidden": 8, "seed": 3}
    options = [part for name, v in tiny.items() for part in (f"--{name.replace('_', '-')}", v)]
    text = json.dumps(tiny)
    if SUFFIX == "toml":
        text = "".join(f"{name} = {value}\n" for name, value in tiny.items())
    path = written(tmp_path, text, SUFFIX)
    asked = {
        "options": options,
        "file": ("--config", path),
        "again": ("--config", tmp_path / "options" / "config.json"),
    }
    for name, given in asked.items():
        done = run_ibp("train", *given, "--device", "cpu", "--out", tmp_path / name)
        assert (done.code, done.err) == (0, "")
    for name in ("file", "again"):
        for part in ("config.json", "model.safetensors", "certificates.csv"):
            here, there = ((tmp_path / run / part).read_bytes() for run in (name, "options"))
            assert here == there


def test_the_fields_of_a_file_are_those_of_the_configuration(tmp_path):
    """Nothing is lost on the way through JSON, whatever fields there will be."""
    config = make_config("digits", "acert")
    path = written(tmp_path, json.dumps(config.to_dict()), "json")
    assert TrainConfig.from_dict(read_settings(path)) == config
