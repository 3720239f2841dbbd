"""A bound is one entry of the registry: what it says is what radii, proofs and checks do."""

from dataclasses import replace

import pytest
import torch

from ibpcore import UserError, certified_margins, certified_radii, nn, verified_radii
from ibpcore.bounds import ladder
from ibpcore.bounds.registry import BOUNDS, Proof
from ibpcore.certification.soundness.margins import IS_LINEAR
from ibpcore.inspection.report import InspectionOptions, inspect_model
from ibpcore.visualization.plots.inspection import BOUND_STYLES

QUICK = InspectionOptions(grid=5, line_points=5, bisections=1, attack_steps=1, restarts=1)


def problem():
    torch.manual_seed(0)
    layers = [nn.IntervalFlatten(), nn.IntervalLinear(64, 32), nn.IntervalReLU()]
    layers += [nn.IntervalLinear(32, 32), nn.IntervalReLU(), nn.IntervalLinear(32, 4)]
    model = nn.Network(layers, (1, 8, 8)).eval()
    images = torch.rand(4, 1, 8, 8)
    return model, images, model(images).argmax(1)


@pytest.fixture
def third(monkeypatch):
    """CROWN-IBP by another name."""
    monkeypatch.setitem(BOUNDS, "third", replace(BOUNDS["crown-ibp"], title="Third"))
    monkeypatch.setattr(ladder, "BOUNDS", tuple(BOUNDS))
    return "third"


def test_a_new_bound_gives_radii_and_is_proved_as_it_says(third):
    model, images, labels = problem()
    ours, theirs = (
        certified_radii(model, images, labels, 0.3, bound=bound)
        for bound in (f"ibp,{third}", "ibp,crown-ibp")
    )
    assert (theirs.radius > certified_radii(model, images, labels, 0.3).radius).any()
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        assert torch.equal(a, b)
    assert {*ours.rung.tolist()} == {[*BOUNDS].index(third)}
    proved = [
        verified_radii(model, images, labels, ours, bound=bound)
        for bound in (f"ibp,{third}", "ibp,crown-ibp")
    ]
    assert torch.equal(proved[0].radius, proved[1].radius)
    # By interval arithmetic alone these radii could not be proved.
    assert (verified_radii(model, images, labels, ours).radius < proved[0].radius).any()


def test_a_new_bound_is_inspected(third):
    model, images, labels = problem()
    options = replace(QUICK, bound=third)
    report = inspect_model(model, images, labels, 0.1, options).report(0.1)
    assert third in BOUNDS
    assert set(report["lines"]) == set(report["samples"]["radius"]) == set(BOUNDS)


def test_every_way_to_prove_a_bound_is_known():
    assert IS_LINEAR.keys() == set(Proof)
    assert BOUND_STYLES.keys() == BOUNDS.keys()


def test_an_unknown_bound_is_refused():
    model, images, labels = problem()
    with pytest.raises(UserError, match="bound 'fourth' is not one of ibp, crown-ibp"):
        certified_margins(model, images, labels, 0.1, bound="fourth")
