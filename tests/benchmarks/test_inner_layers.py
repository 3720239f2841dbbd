"""What inner layers read, in rational numbers and in executions, against proved intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.reliability import exact, inner_layers
from benchmarks.reliability.execution import Unit
from benchmarks.reliability.inner_layers import NONLINEAR, cases, judged
from ibpcore.bounds.alpha_crown import MARGINS
from ibpcore.certification.soundness import linear, narrowing, rules
from ibpcore.certification.soundness.network import sound_network
from ibpcore.certification.soundness.visits import count
from ibpcore.nn import IntervalLinear, IntervalReLU, IntervalSequential


def test_nothing_that_layers_read_is_outside_of_its_interval():
    verdicts = [judged(case, 1) for case in cases(3, seed=1)]
    for verdict in verdicts:
        assert verdict.numbers > 100
        assert verdict.bounds > 0
        assert (verdict.outside, verdict.exceeded) == (0, 0)
    assert sum(verdict.narrowed for verdict in verdicts) >= 2


def test_every_layer_that_reads_a_numbered_interval_is_recorded():
    for case in cases(12, seed=4):
        layers = [part for part in case.model.modules() if isinstance(part, NONLINEAR)]
        found = sum(count(rule) for rule in sound_network(case.model, "real").rules)
        assert len(layers) == found
        assert set(case.slopes) in (set(), {MARGINS, *range(found)})


def test_readings_are_what_layers_read():
    first, last = IntervalLinear(1, 1), IntervalLinear(1, 2)
    with torch.no_grad():
        for layer, numbers in ((first, [3.0]), (last, [1.0, -2.0])):
            layer.weight.copy_(torch.tensor(numbers)[:, None])
            layer.bias.fill_(0.5)
    model, image = IntervalSequential(first, IntervalReLU(), last), np.array([-1.0])
    reading = inner_layers.exactly(model, exact.fractions(torch.from_numpy(image)))
    assert [x.tolist() for x in reading.inputs] == [[-2.5]]
    assert reading.output.tolist() == [0.5, 0.5]
    found = inner_layers.adversarially(
        model.double(), image.astype(np.float32), lambda y: y.sum(), Unit(flushes=False)
    )
    assert [x.tolist() for x in found.inputs] == [[-2.5]]
    assert found.output.tolist() == [0.5, 0.5]


def without_gaps(lines, bounds):
    none = torch.zeros_like(lines.upper_gap)
    return along(lines._replace(upper_gap=none, lower_gap=none), bounds)


def exchanged(lines, bounds):
    """The lower line where a coefficient is positive."""
    lower, above, *gaps = lines
    return along(rules.RuleLines(above, lower, *gaps), bounds)


def too_low(bounds, box):
    return highest(bounds, box) - 0.01


along, highest = linear._along, linear.largest
WRONG = {
    "slopes exchanged": (linear, "_along", exchanged),
    "no gaps": (linear, "_along", without_gaps),
    "bounds too low": (narrowing, "largest", too_low),
}


@pytest.mark.parametrize("mutant", WRONG)
def test_wrong_rules_are_noticed(mutant, monkeypatch):
    monkeypatch.setattr(*WRONG[mutant])
    found = (judged(case, 1) for case in cases(12, seed=1))
    assert any(verdict.outside or verdict.exceeded for verdict in found)


def test_counts_become_rows(tmp_path):
    read, bounds = inner_layers.run(0.001, 0, tmp_path)
    assert read.what == "numbers read in 2 networks"
    assert read.cases > 200
    assert read.failures == bounds.failures == 0
