"""Networks whose last layer is not linear: nothing is merged into their margins."""

import oracle
import pytest
import torch

from ibpcore import Interval, certified_margins, certified_radii, verified_radii
from ibpcore.bounds import crown_ibp, ibp
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.soundness.arithmetic import FLOAT32
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import sound_network
from ibpcore.data.batches import Batch
from ibpcore.inspection.heatmap import margin_sensitivity
from ibpcore.inspection.report import inspect_assumptions
from ibpcore.nn import (
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalConv2d,
    IntervalFlatten,
    IntervalLinear,
    IntervalMaxPool2d,
    IntervalReLU,
    IntervalReshape,
)
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import Network
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_step
from ibpcore.training.methods import METHODS
from ibpcore.training.schedules import LEARNING_RATES
from ibpcore.training.state import TrainState

ENDINGS = {
    "activation": lambda: [IntervalFlatten(), IntervalLinear(64, 3), IntervalReLU()],
    "batch norm": lambda: [IntervalConv2d(4, 3, 4), IntervalFlatten(), IntervalBatchNorm(3)],
    "convolution": lambda: [IntervalConv2d(4, 3, 4), IntervalFlatten()],
    "average": lambda: [IntervalConv2d(4, 3, 1), IntervalAvgPool2d(4), IntervalReshape((3,))],
    "maximum": lambda: [IntervalConv2d(4, 3, 1), IntervalMaxPool2d(4), IntervalFlatten()],
    "linear, flatten": lambda: [IntervalFlatten(), IntervalLinear(64, 3), IntervalFlatten()],
}


def network(ending: str) -> Network:
    """Images (1, 4, 4) to 3 logits."""
    torch.manual_seed(0)
    return Network(
        [IntervalConv2d(1, 4, 3, padding=1), IntervalReLU(), *ENDINGS[ending]()], (1, 4, 4)
    )


def problem(ending):
    model = network(ending).eval()
    images = torch.rand(6, 1, 4, 4)
    return model, images, model(images).argmax(1)


RADII = torch.linspace(0, 0.05, 6)


@torch.no_grad()
@pytest.mark.parametrize("ending", ENDINGS)
def test_margins_of_ibp_are_those_without_elision(ending):
    model, images, labels = problem(ending)
    given, folded = (images, labels, RADII), fold(model)
    box = Interval.ball(images, RADII)
    found, apart = (
        [
            certified_margins(model, *given, elide=elide),
            ibp.robust_logits(folded, *given, BoundOptions(elide=elide)),
            ibp.box_logits(folded, box, labels, BoundOptions(elide=elide)),
            *crown_ibp.fused_cross_entropy(folded, *given, BoundOptions(elide=elide)),
        ]
        for elide in (True, False)
    )
    assert all(map(torch.equal, found, apart))
    expected = oracle.margins(model, images, labels, RADII, False, (0.0, 1.0))
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("ending", ENDINGS)
def test_linear_bounds_are_of_differences_all_the_same(ending):
    """As if a last layer of weights 1 and 0 followed, which is merged."""
    model, images, labels = problem(ending)
    last = IntervalLinear(3, 3, bias=False)
    last.weight.copy_(torch.eye(3))
    longer = Network([*model, last], (1, 4, 4)).eval()
    given = {"epsilons": RADII, "bound": "crown-ibp"}
    found = certified_margins(model, images, labels, **given)
    torch.testing.assert_close(found, certified_margins(longer, images, labels, **given))
    assert bool((found <= certified_margins(model, images, labels, elide=False, **given)).all())


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_radii_are_found_and_proved(ending, bound):
    model, images, labels = problem(ending)
    radii = certified_radii(model, images, labels, 1.0, bound=bound)
    proved = verified_radii(model, images, labels, radii, claim="float32", bound=bound)
    assert bool((radii.radius > 0).any())
    torch.testing.assert_close(proved.radius.float(), radii.radius, rtol=1e-2, atol=1e-3)
    margins = sound_margins(
        sound_network(model, "real"), images, labels, RADII, BoundOptions(bound)
    )
    for part in model.modules():
        if isinstance(part, IntervalBatchNorm):
            part.eps = FLOAT32.stored(part.eps)  # as in the proof
    plain = certified_margins(model.double(), images.double(), labels, RADII.double(), bound=bound)
    assert bool((margins >= plain).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_method_trains_them(ending, method):
    model, images, labels = problem(ending)
    config = make_config("digits", method, epochs=1, batch_size=6)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = LEARNING_RATES[config.learning_rate_schedule](optimizer, 1e-3, (), 1, 2)
    state = TrainState(model.train(), optimizer, scheduler, torch.full((6,), torch.nan))
    before = model[0].weight.clone()
    result = train_step(state, Batch(images, labels, torch.arange(6)), 0.5, config)
    assert bool(torch.stack([*result.sums]).isfinite().all())
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("ending", ENDINGS)
def test_they_are_inspected_and_their_certificates_explained(ending):
    model, images, labels = problem(ending)
    found = inspect_assumptions(model, images, labels, 0.05, points=5).curves.summary()
    assert (found["samples"], found["not_finite"], found["decreasing"]) == (6, 0, 0)
    slopes = margin_sensitivity(fold(model), images, labels, RADII, BoundOptions())
    assert slopes.shape == (6, 4, 4)
