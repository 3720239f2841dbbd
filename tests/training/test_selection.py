"""Held-out images: measured in between, they choose the weights of a run and its end."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from helpers import run_ibp, snapshot

from ibpcore import UserError, load_model
from ibpcore.certification.metrics import art
from ibpcore.data.images import hold_out
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments.extension import with_epochs
from ibpcore.experiments.results import read_result
from ibpcore.experiments.run import train_and_certify
from ibpcore.experiments.run_folder import is_complete
from ibpcore.nn.checkpoint import MODEL, fingerprint, read_facts
from ibpcore.training import loop, observations
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_model
from ibpcore.training.run_files import BEST, STATE
from ibpcore.training.selection import best_epoch, chosen_epoch, is_measured, is_over
from ibpcore.training.state import load_state, save_state

DATA = load_dataset("digits", Request(limit_train=64, limit_test=16, validation=20))
SIZES = {"width": 2, "hidden": 8, "batch_size": 16, "limit_train": 64, "limit_test": 16}


def config(method="acert", *, epochs=5, validation=20, **given):
    return make_config(
        "digits",
        method,
        epochs=epochs,
        validation=validation,
        **{**SIZES, "warmup": (1, 2)} | given,
    )


def history(*arts):
    """An epoch each; None where nothing was measured."""
    rows = [{"epoch": epoch, "seconds": 1.0} for epoch in range(1, len(arts) + 1)]
    for row, value in zip(rows, arts, strict=True):
        if value is not None:
            row["validation"] = {"accuracy": value, "acr": value, "art": value, "images": 20}
    return rows


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary(run, name="summary"):
    return json.loads((run / f"{name}.json").read_text())


@pytest.fixture
def arts(monkeypatch):
    """What the measurements say, in order; and the weights that they were made of."""
    values, seen = [], []

    def measured(model, images, config, ranks, at):
        seen.append(fingerprint(model))
        value = values[len(seen) - 1]
        return {"accuracy": value, "acr": value, "art": value, "images": len(images)}

    monkeypatch.setattr(loop, "measured", measured)
    return values, seen


# What is measured


@pytest.mark.parametrize(
    ("epochs", "every", "expected"),
    [
        (5, None, [1, 2, 3, 4, 5]),
        (25, None, [3, 6, 9, 12, 15, 18, 21, 24, 25]),
        (200, None, [*range(20, 201, 20)]),
        (5, 2, [2, 4, 5]),
        (5, 9, [5]),
    ],
)
def test_when_it_is_measured(epochs, every, expected):
    given = config(epochs=epochs, measure_every=every)
    assert [epoch for epoch in range(1, epochs + 1) if is_measured(epoch, given)] == expected
    unheld = config(epochs=epochs, validation=0)
    assert not any(is_measured(epoch, unheld) for epoch in range(1, epochs + 1))


def test_the_last_row_has_the_measures_of_the_final_certificates(tmp_path):
    train_and_certify(config(measure_every=3), DATA, tmp_path)
    assert [row["epoch"] for row in rows(tmp_path) if "validation" in row] == [3, 5]
    measures, held = rows(tmp_path)[-1]["validation"], summary(tmp_path, "validation")
    assert measures == {**{name: held[name] for name in ("accuracy", "acr", "art")}, "images": 20}
    assert measures["acr"] > 0
    assert measures["art"] == art(measures["accuracy"], measures["acr"])


def test_during_the_warm_up_radii_go_up_to_the_final_epsilon_max(tmp_path):
    """Epochs before it starts train at epsilon 0; their ART is one of the same scale."""
    train_model(config(epochs=2, warmup=(2, 2)), DATA, tmp_path)
    assert rows(tmp_path)[0]["epsilon"] == 0
    model = load_model(tmp_path / MODEL)
    assert observations.measured(model, DATA.validation, config())["acr"] > 0


def test_of_many_images_a_fixed_sample_is_measured(monkeypatch):
    monkeypatch.setattr(observations, "MEASURED", 7)
    few = observations.sample(DATA.validation)
    assert len(few) == 7
    assert few.fingerprint() == observations.sample(DATA.validation).fingerprint()
    known = {image.numpy().tobytes() for image in DATA.validation.images}
    assert {image.numpy().tobytes() for image in few.images} <= known
    monkeypatch.undo()
    assert observations.sample(DATA.validation).fingerprint() == DATA.validation.fingerprint()


LAYERS = "conv 4 3x3, bn, relu, dropout, linear 16, bn, relu, dropout, linear"


@pytest.mark.parametrize("method", ["acert", "sabr"])
def test_the_weights_are_those_of_a_run_that_measures_nothing(tmp_path, method):
    """With batch norm, dropout, augmentation and attacks; to the last bit, and so is every row."""
    sizes = {"batch_size": 16, "limit_train": 64, "limit_test": 16, "flip": True, "padding": 1}
    bare = dataclasses.replace(DATA, validation=None)
    found = []
    for validation, data in ((20, DATA), (0, bare)):
        run = tmp_path / str(validation)
        run.mkdir()
        given = {"validation": validation, "architecture": LAYERS, "epochs": 3, **sizes}
        model = train_model(make_config("digits", method, **given), data, run)
        same = [
            {name: x for name, x in row.items() if name not in ("validation", "seconds")}
            for row in rows(run)
        ]
        state = load_state(run / STATE)
        found.append((fingerprint(model), same, state["slopes"].nan_to_num().tolist()))
    assert ["validation" in row for row in rows(tmp_path / "20")] == [True] * 3
    assert found[0] == found[1]
    assert not (tmp_path / "0" / BEST).exists()


# What is chosen


def test_the_best_epoch_is_the_first_of_equal_ones():
    assert best_epoch([]) is None
    assert best_epoch(history(None, None)) is None
    assert best_epoch(history(None, 0.3, None, 0.5, 0.5, 0.4)) == 4
    assert best_epoch(history(0.0, 0.0)) == 1


def test_the_end_of_a_run():
    """Patience counts epochs from the best one, or from the end of the warm-up if that is later."""
    given = config(epochs=9, warmup=(1, 3), patience=2)
    lengths = {
        (0.9, 0.1, 0.1, 0.1, 0.1, 0.1): 5,  # the best epoch was in the warm-up
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.6): 7,  # the same again is no rise
        (0.1, 0.2, 0.3, 0.4, 0.3, 0.5, 0.3, 0.3): 8,
        (0.1,) * 3 + (0.2, 0.3, 0.4, 0.5, 0.6, 0.7): 9,
    }
    for arts, length in lengths.items():
        over = [is_over(history(*arts[:epochs]), given) for epochs in range(len(arts) + 1)]
        assert over.index(True) == length, arts
    endless = dataclasses.replace(given, patience=None)
    assert not is_over(history(*[0.5] * 8), endless)
    assert is_over(history(*[0.5] * 9), endless)


def test_a_run_ends_after_a_measurement_only():
    given = config(epochs=12, warmup=(1, 2), patience=1, measure_every=4)
    told = [0.5 if is_measured(epoch, given) else None for epoch in range(1, 13)]
    assert [n for n in range(1, 13) if is_over(history(*told[:n]), given)] == [8, 12]


def test_until_a_run_is_over_it_has_its_last_weights():
    given = config(epochs=3, select_weights="best")
    assert [chosen_epoch(history(*[0.5, 0.6, 0.1][:n]), given) for n in (1, 2, 3)] == [1, 2, 2]
    last = dataclasses.replace(given, select_weights="last")
    assert chosen_epoch(history(0.5, 0.6, 0.1), last) == 3


@pytest.mark.parametrize("select", ["last", "best"])
def test_what_a_run_delivers(tmp_path, arts, select):
    """Model, certificates and summary are of one epoch; `best.safetensors` is there either way."""
    values, seen = arts
    values += [0.1, 0.4, 0.2, 0.4, 0.3]
    asked = config(select_weights=select)
    told = train_and_certify(asked, DATA, tmp_path)
    epoch = {"last": 5, "best": 2}[select]
    assert len(set(seen)) == 5
    assert (told["epochs"], told["weights_of_epoch"]) == (5, epoch)
    assert told["weights"] == summary(tmp_path, "validation")["weights"] == seen[epoch - 1]
    for name, its in ((MODEL, epoch), (BEST, 2)):
        assert fingerprint(load_model(tmp_path / name)) == seen[its - 1]
        assert read_facts(tmp_path / name)["epochs_trained"] == its
    # The state is that of the last epoch, from which training could go on.
    state = load_state(tmp_path / STATE)
    assert state["epoch"] == 5
    assert not all(torch.equal(state["model"][name], x) for name, x in state["best"].items())


def test_the_command_says_which_weights_it_delivers(tmp_path, arts):
    arts[0].extend([0.1, 0.2, 0.4, 0.2, 0.3, 0.1])
    run, sizes = tmp_path / "run", []
    for name, value in SIZES.items():
        sizes += [f"--{name.replace('_', '-')}", value]
    given = ("--validation", 20, "--epochs", 9, "--warmup", "1:2", "--select", "best")
    code, out, err = run_ibp("train", *sizes, *given, "--patience", 3, "--out", run)
    assert (code, err) == (0, "")
    notes = (
        "stopped after epoch 6 of 9: held-out ART rose no more (--patience 3)\n"
        "weights of epoch 3, the best of 6 by held-out ART\n"
    )
    assert notes in out
    assert run_ibp("certify", run).code == 0
    again = summary(run / "certificates")
    assert again["weights"] == summary(run)["weights"] == arts[1][2]


# Early stopping


def test_a_run_that_stopped_early_is_complete(tmp_path, arts):
    values, seen = arts
    values += [0.1, 0.4, 0.2, 0.3, 0.5]
    asked = config(epochs=8, patience=2)
    told = train_and_certify(asked, DATA, tmp_path)
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert (told["epochs"], told["weights_of_epoch"]) == (4, 4)
    assert told["training_seconds"] == sum(row["seconds"] for row in rows(tmp_path))
    assert is_complete(tmp_path, asked)
    assert read_result(tmp_path).measures["art"] == told["art"]
    before = snapshot(tmp_path)
    assert train_and_certify(asked, DATA, tmp_path, resume=True) == told
    assert len(seen) == 4
    assert snapshot(tmp_path) == before


def test_a_run_that_stopped_early_takes_no_more_epochs():
    """Whether or not the last one would be measured in a longer run."""
    given, told = config(epochs=8, warmup=(1, 2), patience=2), history(0.1, 0.4, 0.2, 0.3)
    for epochs in (9, 30):
        with pytest.raises(UserError, match="epochs must be at most 8: the patience of the run"):
            with_epochs(given, epochs, told)
    assert with_epochs(given, 8, told) == given
    assert with_epochs(given, 9, told[:3]).epochs == 9


def test_stopping_is_the_start_of_the_whole_run(tmp_path, arts):
    """The learning rates are those of all epochs: the run is cut off, not compressed."""
    arts[0].extend([0.5] * 20)
    for name, given in (("whole", {}), ("stopped", {"patience": 1})):
        (tmp_path / name).mkdir()
        train_model(config(epochs=6, **given), DATA, tmp_path / name)
    whole, stopped = (
        [(row["loss"], row["learning_rate"]) for row in rows(tmp_path / name)]
        for name in ("whole", "stopped")
    )
    assert len(stopped) == 3
    assert whole[:3] == stopped


# Resuming


def test_a_run_cut_off_in_any_epoch_chooses_the_same(tmp_path, arts, monkeypatch):
    """The best weights are those of an epoch before the cut, or after it."""
    values, seen = arts
    values += [0.1, 0.3, 0.2, 0.4, 0.2, 0.3]
    asked = config(epochs=9, select_weights="best", patience=2)
    whole, run_epoch = tmp_path / "whole", loop.run_epoch
    whole.mkdir()
    train_model(asked, DATA, whole)
    assert len(seen) == 6
    for cut in range(6):
        run = tmp_path / str(cut)
        run.mkdir()
        seen.clear()

        def stops(state, *rest, cut=cut):
            if state.epoch == cut:
                raise KeyboardInterrupt
            return run_epoch(state, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "run_epoch", stops)
            with pytest.raises(KeyboardInterrupt):
                train_model(asked, DATA, run)
        assert fingerprint(train_model(asked, DATA, run, resume=True)) == seen[3]
        assert len(seen) == 6
        for name in (MODEL, BEST):
            assert (run / name).read_bytes() == (whole / name).read_bytes()
        assert [row["validation"] for row in rows(run)] == [
            row["validation"] for row in rows(whole)
        ]


def test_a_state_of_before_there_were_measurements(tmp_path):
    """It has no best weights: what is measured from now on counts."""
    asked = config(epochs=2)
    train_model(asked, DATA, tmp_path)
    state = load_state(tmp_path / STATE)
    del state["best"]
    for row in state["history"]:
        del row["validation"]
    save_state(tmp_path / STATE, state)
    (tmp_path / BEST).unlink()
    train_model(asked, DATA, tmp_path, resume=True)
    assert not (tmp_path / BEST).exists()


DAMAGE = {
    "no weights": lambda state: state["best"].clear(),
    "a weight of nan": lambda state: next(iter(state["best"].values())).fill_(float("nan")),
    "other weights": lambda state: state["best"].update({"0.weight": torch.ones(1)}),
    "no mapping": lambda state: state.update(best=5),
    "no measures": lambda state: [row.pop("validation") for row in state["history"]],
    "a measure above 1": lambda state: state["history"][0]["validation"].update(art=1.5),
    "a measure of nan": lambda state: state["history"][0]["validation"].update(acr=float("nan")),
    "a measure too few": lambda state: state["history"][0]["validation"].pop("art"),
    "a text": lambda state: state["history"][0].update(validation="0.5"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("trained")
    train_model(config(epochs=2), DATA, run)
    return run


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_states(trained, tmp_path, case):
    state = load_state(trained / STATE)
    DAMAGE[case](state)
    save_state(tmp_path / STATE, state)
    with pytest.raises(UserError, match="does not fit its configuration"):
        train_model(config(epochs=2), DATA, tmp_path, resume=True)


# What is typed


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--patience", 3), "--patience can be given only with held-out images: --validation"),
        (("--select", "best"), "--select can be given only with held-out images: --validation"),
        (("--measure-every", 2), "--measure-every can be given only with held-out images"),
        (("--validation", 20, "--patience", 0), "--patience must be at least 1, or left out"),
        (("--validation", 20, "--measure-every", 0), "--measure-every must be at least 1"),
        (("--validation", 20, "--select", "first"), "'first' is not one of 'last', 'best'"),
    ],
)
def test_wrong_options(tmp_path, given, says):
    code, _, err = run_ibp("train", *given, "--out", tmp_path / "run")
    assert code != 0
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_settings_of_files_before_there_was_a_choice():
    values = config().to_dict()
    for name in ("measure_every", "select_weights", "patience"):
        del values[name]
    assert type(config()).from_dict(values) == config()


def test_other_splits_have_other_samples():
    """The measured images follow the split, not the seed."""
    held = [hold_out(DATA, count).validation for count in (5, 6)]
    assert all(one.fingerprint() != two.fingerprint() for one, two in pairwise(held))
