"""Images held out to choose by: the same for all, never trained on, certified on their own."""

import dataclasses
import json

import pytest
import torch
from helpers import run_ibp

from ibpcore import UserError, load_model
from ibpcore.data.images import ImageSet, hold_out
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments.run import train_and_certify
from ibpcore.experiments.run_folder import is_complete, saved_config
from ibpcore.nn.checkpoint import MODEL
from ibpcore.training import loop as training
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_model

TINY = {"width": 2, "hidden": 8, "epochs": 2, "batch_size": 16, "limit_train": 64, "limit_test": 16}
WHOLE = load_dataset("digits", Request(limit_train=64, limit_test=16))
HELD = load_dataset("digits", Request(limit_train=64, limit_test=16, validation=20))


def pictures(images):
    """Each image of (N, C, H, W) as something that can be looked up."""
    return [image.numpy().tobytes() for image in images]


def test_both_parts_together_are_the_training_images():
    assert len(HELD.validation) == 20
    both = pictures(HELD.train.images) + pictures(HELD.validation.images)
    assert sorted(both) == sorted(pictures(WHOLE.train.images))
    assert torch.equal(HELD.test.images, WHOLE.test.images)
    labels = dict(zip(pictures(WHOLE.train.images), WHOLE.train.labels.tolist(), strict=True))
    for part in (HELD.train, HELD.validation):
        assert [labels[p] for p in pictures(part.images)] == part.labels.tolist()


def test_the_choice_is_spread_and_always_the_same():
    """100 of 1000 numbered images: about ten of each hundred."""
    images = torch.zeros(1000, 1, 1, 1, dtype=torch.uint8)
    dataset = dataclasses.replace(WHOLE, train=ImageSet(images, torch.arange(1000)))
    held = hold_out(dataset, 100).validation.labels
    assert torch.equal(held, hold_out(dataset, 100).validation.labels)
    counts = torch.bincount(held // 100, minlength=10)
    assert counts.min() >= 3
    assert counts.max() <= 20


def test_nothing_held_out():
    assert hold_out(WHOLE, 0) is WHOLE
    assert WHOLE.validation is None


def test_two_images_have_to_be_left():
    assert len(hold_out(WHOLE, 62).train) == 2
    with pytest.raises(UserError, match="validation must leave two of 64 images"):
        hold_out(WHOLE, 63)


def test_they_are_never_trained_on(tmp_path, monkeypatch):
    """And are the same whatever the seed."""
    seen, step = [], training.train_step

    def spy(state, batch, *rest):
        seen.extend(pictures((batch.images * 255).round().byte()))
        return step(state, batch, *rest)

    monkeypatch.setattr(training, "train_step", spy)
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        config = make_config("digits", "acert", validation=20, seed=seed, **TINY)
        train_and_certify(config, HELD, tmp_path / str(seed))
    assert set(seen) == set(pictures(HELD.train.images))
    assert not set(seen) & set(pictures(HELD.validation.images))


def test_the_command_line(tmp_path):
    """`validation.json` says what certifying the held-out images says."""
    run, sizes = tmp_path / "run", []
    for name, value in TINY.items():
        sizes += [f"--{name.replace('_', '-')}", value]
    code, out, err = run_ibp("train", *sizes, "--validation", 20, "--out", run, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "44 images" in out
    assert "20 validation images" in out
    assert "16 test images" in out
    held = json.loads((run / "validation.json").read_text())
    test = json.loads((run / "summary.json").read_text())
    assert held.keys() == test.keys()
    assert (held["samples"], test["samples"]) == (20, 16)
    logits = load_model(run / MODEL)(HELD.validation.images.float() / 255)
    right = (logits.argmax(1) == HELD.validation.labels).double().mean()
    assert held["accuracy"] == pytest.approx(float(right))
    assert is_complete(run, saved_config(run))
    (run / "validation.json").unlink()
    assert not is_complete(run, saved_config(run))


def test_a_run_is_resumed_with_its_own_split(tmp_path):
    config = make_config("digits", "acert", validation=20, **TINY)
    train_model(config, HELD, tmp_path)
    other = dataclasses.replace(config, validation=21)
    dataset = hold_out(WHOLE, 21)
    with pytest.raises(UserError, match="validation, the images of the data set changed"):
        train_model(other, dataset, tmp_path, resume=True)
    # The same images to train on, another one to choose by.
    images = HELD.validation.images.clone()
    images[3] ^= 1
    dataset = dataclasses.replace(HELD, validation=ImageSet(images, HELD.validation.labels))
    with pytest.raises(UserError, match="the images of the data set changed"):
        train_model(config, dataset, tmp_path, resume=True)


def test_a_data_set_that_is_not_split_is_refused(tmp_path):
    config = make_config("digits", "acert", validation=20, **TINY)
    with pytest.raises(UserError, match="0 images held out, but validation is 20"):
        train_model(config, WHOLE, tmp_path)


def test_bad_numbers(tmp_path):
    for number, says in ((-1, "not negative"), (64, "must leave two of 64")):
        outcome = run_ibp(
            "train", "--limit-train", 64, "--validation", number, "--out", tmp_path / "x"
        )
        assert outcome.code == 2
        assert says in outcome.err
    assert list(tmp_path.iterdir()) == []
