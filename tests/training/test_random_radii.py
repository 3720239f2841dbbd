"""Random radii: uniform for samples that are classified correctly, without a search."""

import json

import pytest
import torch
import torch.nn.functional as F

from ibpcore import UserError
from ibpcore.bounds.ibp import robust_logits
from ibpcore.data.sources import Request, load_dataset
from ibpcore.nn.cnn7 import cnn7
from ibpcore.nn.folding import clean_pass
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_model
from ibpcore.training.methods import METHODS, CleanBatch
from ibpcore.training.methods.adaptive_radii import step_radii

DIGITS = load_dataset("digits", Request(limit_train=96, limit_test=32))
EPSILON = 0.05


def batch_of(count: int, wrong: int = 0) -> CleanBatch:
    """Of a network in training mode that gets the first `wrong` samples wrong."""
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), 4, width=2, hidden=4).double().train()
    images = torch.rand(count, 1, 8, 8, dtype=torch.float64)
    logits, network = clean_pass(model, images)
    labels = logits.argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % 4
    return CleanBatch(network, logits, images, labels, torch.full((count,), torch.nan))


def settings(method="random-ibp", **given):
    return make_config("digits", method, **{"regularizer": 0.0, **given})


def test_radii_are_uniform_up_to_epsilon():
    radii = step_radii(batch_of(2000), EPSILON, settings()).radii
    assert float(radii.min()) >= 0
    assert float(radii.max()) <= EPSILON
    # Each tenth of the interval has 200 expected, with a deviation of 13.4.
    counts = torch.histc(radii, 10, 0, EPSILON)
    assert float((counts - 200).abs().max()) < 5 * 13.4


def test_each_step_draws_anew_and_the_seed_repeats_it():
    batch = batch_of(16)
    torch.manual_seed(7)
    first, second = (step_radii(batch, EPSILON, settings()).radii for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(step_radii(batch, EPSILON, settings()).radii, first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("wrong", [0, 3, 8])
def test_the_loss_is_that_of_the_bounds_at_these_radii(wrong):
    """And of the clean logits where the sample is misclassified (eq. 9 with other radii)."""
    batch = batch_of(8, wrong)
    result = METHODS["random-ibp"](batch, EPSILON, settings())
    assert torch.equal(result.radii == 0, torch.arange(8) < wrong)
    network, images, labels = batch.network, batch.images, batch.labels
    options = settings().bound_options
    expected = F.cross_entropy(
        robust_logits(network, images, labels, result.radii, options), labels
    )
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=0)
    assert result.slopes.isnan().all()  # nothing is learnt for a search


def test_without_epsilon_the_loss_is_the_clean_one():
    batch = batch_of(8, 3)
    result = METHODS["random-ibp"](batch, 0.0, settings())
    torch.testing.assert_close(result.loss, F.cross_entropy(batch.logits, batch.labels))
    assert not result.radii.any()


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("random-ibp", {}),
        ("random-ibp", {"accumulate": 2}),
        ("random-ibp", {"train_bound": "crown"}),
        ("fastibp", {"random_radii": True}),
        ("sabr", {"random_radii": True}),
        ("exp-ibp", {"random_radii": True}),
    ],
    ids=str,
)
def test_any_method_trains_at_them(tmp_path, method, given):
    sizes = {"width": 2, "hidden": 8, "epochs": 2, "batch_size": 32, "warmup": (1, 1)}
    train_model(make_config("digits", method, **sizes, **given), DIGITS, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 < rows[-1]["mean_radius"] < 0.07  # of 0.1, at most half on average


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("standard", {"random_radii": True}, "random_radii must be off for standard"),
        ("acert", {"random_radii": True}, "random_radii must be off for acert, but"),
        ("sabr", {"random_radii": True, "adaptive": True}, "must be off with adaptive radii"),
        ("random-ibp", {"random_radii": False}, "random_radii must be on for random-ibp"),
    ],
)
def test_what_contradicts_them_is_refused(method, given, message):
    with pytest.raises(UserError, match=message):
        make_config("digits", method, **given)
