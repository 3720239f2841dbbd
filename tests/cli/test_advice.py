"""What is said of runs that are too short, before them, and of those that learnt nothing."""

from pathlib import Path

import pytest
from helpers import run_ibp

from ibpcore.training.config import make_config
from ibpcore_cli.advice import advice, doubts


def summary(accuracy, acr):
    return {"accuracy": accuracy, "acr": acr}


@pytest.mark.parametrize("method", ["acert", "fastibp", "sabr", "standard", "ibp"])
def test_presets_raise_no_doubt(method):
    for dataset, images in (("digits", 1347), ("mnist", 60_000), ("cifar10", 50_000)):
        assert [*doubts(make_config(dataset, method), images)] == []


def test_a_short_warm_up_is_doubted():
    (line,) = doubts(make_config("digits", "fastibp", epochs=6), 1347)
    assert line == (
        "note: epsilon grows to epsilon_max within 2 epochs (86 steps): expect a low"
        " accuracy, or few certificates; the preset of the paper has 30 epochs, with the warm-up"
        " 1:12"
    )
    assert [*doubts(make_config("digits", "acert", epochs=6), 1347)] == []
    assert [*doubts(make_config("digits", "fastibp", epochs=6, schedule="none"), 1347)] == []
    (line,) = doubts(make_config("digits", "acert", epochs=3), 1347)
    assert "within 1 epoch (43 steps)" in line


def test_a_warm_up_that_leaves_no_time_is_doubted():
    (line,) = doubts(make_config("mnist", "acert", epochs=6, warmup=(1, 5)), 60_000)
    assert line == (
        "note: 6 epochs leave 1 epoch after the warm-up, at the full epsilon: expect a low"
        " accuracy; the preset of the paper has 100 epochs, with the warm-up 1:20"
    )
    assert [*doubts(make_config("mnist", "acert", epochs=8, warmup=(1, 5)), 60_000)] == []


def test_advice_near_chance():
    (line,) = advice(make_config("digits", "fastibp"), summary(0.13, 0.0), 10)
    assert line == (
        "hint: the accuracy is near that of chance, 10 %; try more --epochs than 30, a longer"
        " --warmup than 1:12, a smaller --epsilon-max, a larger --learning-rate than 0.0005, a"
        " larger --kappa than 0, or --adaptive"
    )
    (line,) = advice(make_config("digits", "standard"), summary(0.1, 0.0), 10)
    assert line.endswith("try more --epochs than 30, or a smaller --learning-rate than 0.002")
    (line,) = advice(make_config("digits", "random-ibp", kappa=0.25), summary(0.1, 0.0), 10)
    assert line.endswith("a smaller --epsilon-max, or a larger --kappa than 0.25"), "2e-3 is high"
    config = make_config("digits", "acert")
    assert [*advice(config, summary(0.3, 0.2), 10)] == []
    # Of 200 classes 2 % are more than chance; of two classes 60 % are.
    assert [*advice(config, summary(0.02, 0.02), 200)] == []
    assert [*advice(config, summary(0.6, 0.3), 2)] == []
    assert len([*advice(config, summary(0.5, 0.5), 2)]) == 1


def test_advice_where_nothing_is_certified():
    (line,) = advice(make_config("digits", "acert", kappa=0.5), summary(0.9, 0.01), 10)
    assert line.startswith("hint: almost nothing is certified; try more --epochs than 30")
    assert line.endswith("or a smaller --kappa than 0.5")
    assert [*advice(make_config("digits", "standard"), summary(0.9, 0.0), 10)] == []


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("exp-ibp", "a larger --ibp-weight than 0.5"),
        ("staps", "a larger --box-size than 0.4"),
        ("taps", "a smaller --taps-weight than 4"),
    ],
)
def test_advice_where_a_run_has_forgotten_its_bounds(method, setting):
    config = make_config("own", method)
    (line,) = advice(config, summary(0.99, 0.31), 10)
    assert line == (
        "hint: the bounds are loose, with an ACR of 31.0 % at an accuracy of 99.0 %; try"
        f" {setting}, or certify with a tighter --bound"
    )
    (line,) = advice(config, summary(0.99, 0.01), 10)
    assert line.startswith("hint: almost nothing is certified")
    assert line.endswith(f", or {setting}")
    assert [*advice(config, summary(0.9, 0.6), 10)] == []
    assert [*advice(make_config("own", "acert"), summary(0.9, 0.3), 10)] == []


def test_a_run_says_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--width", 2, "--hidden", 4, "--limit-train", 64, "--limit-test", 30)
    code, out, err = run_ibp("train", "--method", "fastibp", "--epochs", 1, *small, "--out", "run")
    assert (code, err) == (0, "")
    assert "\nnote: epsilon grows to epsilon_max within 1 epoch (2 steps):" in out
    assert "\nhint: " in out
    assert Path("run/summary.json").exists()
