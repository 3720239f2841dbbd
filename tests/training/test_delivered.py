"""What a run delivers besides its last weights: means over steps, and precise batch statistics."""

import json

import pytest
import torch

from ibpcore import load_model
from ibpcore.data.batches import as_pixels
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments.extension import with_epochs
from ibpcore.nn import IntervalBatchNorm
from ibpcore.nn.checkpoint import MODEL, fingerprint
from ibpcore.training import loop
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_model
from ibpcore.training.methods.base import kappa_at
from ibpcore.training.run_files import BEST, STATE
from ibpcore.training.state import load_state
from ibpcore.training.statistics import set_precise_statistics

DIGITS = load_dataset("digits", Request(limit_train=98, limit_test=32))
HELD_OUT = load_dataset("digits", Request(limit_train=98, limit_test=32, validation=33))


def small(method="acert", **given):
    sizes = {"width": 2, "hidden": 8, "epochs": 3, "batch_size": 32}
    return make_config("digits", method, **{**sizes, **given})


def parameters(model):
    return torch.cat([parameter.detach().flatten().double() for parameter in model.parameters()])


@pytest.fixture
def steps(monkeypatch):
    """The parameters after each step of a run, (n,) each."""
    seen = []

    def recorded(state, *given):
        result = before(state, *given)
        seen.append(parameters(state.model))
        return result

    before = loop.train_step
    monkeypatch.setattr(loop, "train_step", recorded)
    return seen


def statistics_by_hand(model, images, batch_size):
    """Means of the first batch norm's input and of its unbiased variance, batch by batch."""
    layers = [*model]
    place = next(i for i, layer in enumerate(layers) if isinstance(layer, IntervalBatchNorm))
    means, variances = [], []
    for batch in as_pixels(images).split(batch_size):
        if len(batch) == 1:
            continue
        x = batch.double()
        for layer in layers[:place]:
            x = layer.double()(x)
        means.append(x.mean((0, 2, 3)))
        variances.append(x.transpose(0, 1).flatten(1).var(1))
    model.float()
    found = layers[place]
    return found, torch.stack(means).mean(0), torch.stack(variances).mean(0)


# Averaged weights


@pytest.mark.parametrize(("share", "averaged"), [(0.25, 3), (0.5, 6), (1.0, 12), (0.01, 1)])
def test_the_mean_of_the_last_steps_is_delivered(tmp_path, steps, share, averaged):
    config = small(average_last=share, learning_rate_schedule="multistep")
    model = train_model(config, DIGITS, tmp_path)
    assert len(steps) == 12  # of 4 in each epoch
    mean = torch.stack(steps[-averaged:]).mean(0)
    assert torch.allclose(parameters(model), mean, atol=1e-6)
    assert averaged == 1 or not torch.allclose(parameters(model), steps[-1], atol=1e-6)
    assert fingerprint(load_model(tmp_path / MODEL)) == fingerprint(model)


def test_until_the_average_begins_the_weights_themselves_are_delivered(tmp_path, steps):
    seen = []
    config = small(average_last=0.42)

    def keep(run, *given):
        before(run, *given)
        seen.append(parameters(load_model(run / MODEL)))

    before = loop.write_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "write_epoch", keep)
        train_model(config, DIGITS, tmp_path)
    assert torch.equal(seen[0], steps[3])
    assert torch.allclose(seen[1], steps[7], atol=1e-6)  # the average has one step
    assert torch.allclose(seen[2], torch.stack(steps[-5:]).mean(0), atol=1e-6)


def test_training_itself_does_not_depend_on_the_average(tmp_path, steps):
    train_model(small(), DIGITS, tmp_path)
    plain = [*steps]
    steps.clear()
    train_model(small(average_last=0.5, precise_batch_norm=True), DIGITS, tmp_path)
    assert torch.equal(torch.stack(plain), torch.stack(steps))


def test_an_average_has_the_statistics_of_its_own_weights(tmp_path):
    model = train_model(small(average_last=0.5), DIGITS, tmp_path)
    layer, mean, variance = statistics_by_hand(model, DIGITS.train.images, 32)
    assert torch.allclose(layer.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.running_var.double(), variance, rtol=1e-4)


# Precise statistics


def test_precise_statistics_are_those_of_all_images_without_augmentation(tmp_path):
    config = small(flip=True, padding=2, precise_batch_norm=True)
    model = train_model(config, DIGITS, tmp_path)
    layer, mean, variance = statistics_by_hand(model, DIGITS.train.images, 32)
    assert torch.allclose(layer.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
    assert torch.allclose(layer.running_var.double(), variance, rtol=1e-4)
    running = train_model(small(flip=True, padding=2), DIGITS, tmp_path)
    layer, mean, _ = statistics_by_hand(running, DIGITS.train.images, 32)
    assert not torch.allclose(layer.running_mean.double(), mean, rtol=1e-2)


def test_a_last_batch_of_one_image_is_left_out():
    model = loop.start_state(small(), DIGITS, "cpu").model.eval()
    images = DIGITS.train[torch.arange(33)]
    set_precise_statistics(model, images, 32)
    assert not model.training
    layer, mean, _ = statistics_by_hand(model, images.images, 32)
    assert torch.allclose(layer.running_mean.double(), mean, rtol=1e-4, atol=1e-5)


def test_held_out_images_are_measured_with_the_delivered_weights(tmp_path, monkeypatch):
    seen = {}

    def measured(model, images, config, ranks, at):
        seen[len(seen) + 1] = fingerprint(model)
        art = [0.1, 0.3, 0.2][len(seen) - 1]
        return {"accuracy": art, "acr": art, "art": art, "images": len(images)}

    monkeypatch.setattr(loop, "measured", measured)
    given = {"average_last": 0.9, "validation": 33, "select_weights": "best"}
    model = train_model(small(**given), HELD_OUT, tmp_path)
    assert len(set(seen.values())) == 3
    for found in (model, load_model(tmp_path / BEST), load_model(tmp_path / MODEL)):
        assert fingerprint(found) == seen[2]


# Resuming


@pytest.mark.parametrize("broken_in", [2, 3])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_resumed_run_delivers_the_same_bits(tmp_path, monkeypatch, broken_in, share):
    config = small(average_last=share, precise_batch_norm=True, weight_decay=0.1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for run in (whole, broken):
        run.mkdir()
    expected = train_model(config, DIGITS, whole)
    before, calls = loop.train_step, []

    def breaks(*given):
        calls.append(given)
        if len(calls) == 4 * broken_in - 1:
            raise KeyboardInterrupt
        return before(*given)

    monkeypatch.setattr(loop, "train_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        train_model(config, DIGITS, broken)
    monkeypatch.undo()
    resumed = train_model(config, DIGITS, broken, resume=True)
    assert fingerprint(resumed) == fingerprint(expected)


def test_a_run_that_is_trained_further_averages_anew(tmp_path, steps):
    config = small(average_last=0.5)
    train_model(config, DIGITS, tmp_path)
    longer = with_epochs(config, 5, load_state(tmp_path / STATE)["history"])
    model = train_model(longer, DIGITS, tmp_path, resume=True)
    assert len(steps) == 20
    assert torch.allclose(parameters(model), torch.stack(steps[-8:]).mean(0), atol=1e-6)


# Other settings of the optimiser and of the radii


def test_weight_decay_shrinks_the_weights_by_itself(tmp_path, steps):
    """After a step, weights differ by lr * decay * weights: both runs take the same first step."""
    start = parameters(loop.start_state(small(), DIGITS, "cpu").model)
    train_model(small(), DIGITS, tmp_path)
    (plain, *_), rate = steps, 2e-3 / 25
    steps.clear()
    train_model(small(weight_decay=3.0), DIGITS, tmp_path)
    assert torch.allclose(steps[0] - plain, -rate * 3 * start, atol=1e-7)


@pytest.mark.parametrize("method", ["fastibp", "acert", "crown-ibp", "sabr", "exp-ibp"])
def test_training_goes_up_to_a_multiple_of_the_largest_radius(tmp_path, method):
    config = small(method, epsilon_max=0.01, train_epsilon_factor=1.5, initial_kappa=1.0)
    train_model(config, DIGITS, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epsilon"] == pytest.approx(0.015)
    assert last["mean_radius"] <= 0.0151
    if not config.adaptive:
        assert last["mean_radius"] == pytest.approx(0.015)


def test_kappa_has_its_final_value_at_the_largest_radius_of_training():
    config = small(epsilon_max=0.01, train_epsilon_factor=1.5, initial_kappa=1.0, kappa=0.25)
    assert [kappa_at(x, config) for x in (0.0, 0.0075, 0.015)] == [1.0, 0.625, 0.25]
