"""Inspections by hand: linear networks, a few ReLUs, margins that are wrong on purpose."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import run_ibp
from torch import nn

from ibpcore import UserError, cnn7
from ibpcore.attacks.pgd import pgd_attacker
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.radii import certified_radii
from ibpcore.data.sources import Request, load_dataset
from ibpcore.inspection import lines, subject, tightness
from ibpcore.inspection.continuity import measure_continuity
from ibpcore.inspection.curves import margin_curves
from ibpcore.inspection.lines import Line, RobustLoss, along
from ibpcore.inspection.report import InspectionOptions, inspect_assumptions, inspect_model
from ibpcore.inspection.slopes import Slopes, slopes_at_radii
from ibpcore.inspection.stability import stable_shares
from ibpcore.inspection.subject import make_subject
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalReLU, IntervalSequential
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_model
from ibpcore.visualization.plots import inspection
from ibpcore.visualization.plots.inspection import write_inspection

SOME = InspectionOptions(grid=9, line_points=5)


def network(*layers):
    """Linear layers (weight, bias) with ReLUs between, on images of one pixel, in float64."""
    modules: list[nn.Module] = [IntervalFlatten()]
    for weight, bias in layers:
        weight = torch.tensor(weight, dtype=torch.float64)
        linear = IntervalLinear(weight.shape[1], weight.shape[0]).double()
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(torch.tensor(bias))
        modules += [IntervalReLU(), linear] if len(modules) > 1 else [linear]
    return IntervalSequential(*modules)


def pixels(*values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def linear_subject(*values, clip=None, scale=1.0):
    """f_0 - f_1 = scale * x and label 0: unclipped, R(epsilon) = scale * (epsilon - x)."""
    model = network(([[0.5 * scale], [-0.5 * scale]], [0.0, 0.0]))
    images = pixels(*values)
    return make_subject(
        model, images, torch.zeros(len(images), dtype=torch.long), BoundOptions(clip=clip)
    )


# Continuity


def test_steps_by_hand():
    """A jump of 1, a line, a steep ramp, and one that comes down again, on 17 points."""
    grid = torch.linspace(0, 1, 17)

    def functions(x):
        jump = (x[:, 0] > 0.3).float()
        ramp = ((x[:, 2] - 0.3) * 50).clamp(0, 1)
        return torch.stack([jump, 3 * x[:, 1], ramp, -((x[:, 3] - 0.5).abs())], 1)

    found = measure_continuity(functions, grid, functions(grid[:, None].expand(-1, 4)))
    torch.testing.assert_close(found.step, torch.tensor([1, 1 / 16, 0.625, 1 / 8]))
    torch.testing.assert_close(found.coarse_step, torch.tensor([1, 1 / 8, 1, 1 / 4]))
    torch.testing.assert_close(found.decrease, torch.tensor([0, 0, 0, 1 / 8]))
    torch.testing.assert_close(found.place[[0, 2]], torch.tensor([0.25, 0.25]))
    smooth = found.step[[1, 3]] / 1024
    torch.testing.assert_close(found.remainder[[1, 3]], smooth, rtol=1e-2, atol=0)
    assert found.jumps(1e-4).tolist() == [True, False, False, False]


def test_a_constant_has_no_steps():
    grid = torch.linspace(0, 1, 5)
    found = measure_continuity(torch.zeros_like, grid, torch.zeros(5, 2))
    assert all(part.tolist() == [0, 0] for part in found._replace(place=found.step))
    assert not found.jumps(0).any()


# Margins and slopes


def test_margins_of_a_linear_network():
    found = linear_subject(0.5, 0.2, scale=3.0)
    summary = margin_curves(found, found.exact(), 0.8, 9).summary()
    assert summary["largest_step"] == pytest.approx(1 / 8)
    assert summary["largest_step_coarse"] == pytest.approx(1 / 4)
    assert summary["remainder_of_step_largest"] == pytest.approx(2.0**-20, rel=1e-6)
    assert (summary["decreasing"], summary["jumps"], summary["not_finite"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("wrong", "key"),
    [(lambda r: (r > 0.3).to(r) / 10, "jumps"), (lambda r: -1.5 * r, "decreasing")],
)
def test_wrong_margins_are_noticed(monkeypatch, wrong, key):
    """R(epsilon) = epsilon - 0.5 made to jump, or to fall, for both images."""
    right = subject.margins
    patched = lambda n, i, l, radii, o: right(n, i, l, radii, o) + wrong(radii)  # noqa: E731, E741
    monkeypatch.setattr(subject, "margins", patched)
    found = linear_subject(0.5, 0.5)
    summary = margin_curves(found, found.exact(), 0.8, 9).summary()
    assert summary[key] == 2
    assert summary["jumps"] + summary["decreasing"] == 2


def test_a_tiny_decrease_is_rounding():
    """In float32, with weights of 1e4 that almost cancel, R is no line to the last digit."""
    model = network(([[1e4], [1e4 - 1e-2]], [0.0, 0.0])).float()
    labels = torch.zeros(50, dtype=torch.long)
    found = make_subject(
        model, torch.linspace(0.1, 0.9, 50).view(-1, 1, 1, 1), labels, BoundOptions()
    )
    summary = margin_curves(found, found.exact(), 0.01, 33).summary()
    assert summary["largest_decrease"] > 0.1
    assert summary["decreasing"] == summary["jumps"] == 0


def test_overflow_is_counted_and_left_out():
    """In float32 1e38 * (x + epsilon) * 10 overflows, for larger epsilons."""
    model = network(([[1e38], [0.0]], [0.0, 0.0]), ([[-5.0, 0.0], [5.0, 0.0]], [0.0, 0.0])).float()
    images, labels = torch.tensor([0.01, 0.9]).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.long)
    found = make_subject(model, images, labels, BoundOptions())
    summary = margin_curves(found, found.exact(), 0.05, 5).summary()
    assert (summary["samples"], summary["not_finite"]) == (2, 1)


def test_slope_of_a_linear_network():
    """Radii 0.5 and 0.2; that of 0.9 is beyond epsilon_max and left out, as is that of 0."""
    found = slopes_at_radii(linear_subject(0.5, 0.9, 0.2, -1.0, scale=3.0), 0.8)
    torch.testing.assert_close(found.radius, pixels(0.5, 0.2).flatten())
    for part in (found.slope, found.secant):
        torch.testing.assert_close(part, torch.full_like(part, 3.0), rtol=1e-7, atol=0)
    assert found.kink.max() < 1e-6
    assert not found.zero.any()


def test_a_kink_at_the_radius():
    """Clipped at the very root: R rises with slope 1 up to 0 and stays there."""
    found = slopes_at_radii(linear_subject(0.5, clip=(0.0, 1.0)), 0.8)
    torch.testing.assert_close(found.slope, torch.full((1,), 0.5).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.kink, torch.full((1,), 2.0).double(), rtol=1e-4, atol=0)
    assert found.summary()["kinks"] == 1


def test_a_relu_bends_the_margin():
    """f_1 - f_0 = relu(x) + relu(x - 0.5) - 1 at x = 0.4: R = 0.4 + e - 1 up to e = 0.1, then
    twice as steep: root at 0.35, where the chord from R(0) = -0.6 has slope 0.6 / 0.35."""
    model = network(([[1.0], [1.0]], [0.0, -0.5]), ([[0.0, 0.0], [1.0, 1.0]], [0.0, -1.0]))
    found = slopes_at_radii(
        make_subject(model, pixels(0.4), torch.zeros(1).long(), BoundOptions()), 0.5
    )
    expected = Slopes(*torch.tensor([[0.35], [2.0], [0.6 / 0.35], [0.0]]).double())
    for part, value in zip(found, expected, strict=True):
        torch.testing.assert_close(part, value, rtol=1e-6, atol=1e-6)


def test_zero_slopes_are_counted():
    one = torch.ones(3)
    found = Slopes(one, torch.tensor([0.0, 1e-9, 1e-3]), one, one)
    assert found.summary()["zero"] == 2


# Stable ReLUs


def test_stable_relus_by_hand():
    """What x, x - 0.6 and x - 1 read at x = 0.5: [0.3, 0.7], [-0.3, 0.1], [-0.7, -0.3]."""
    model = network(([[1.0]] * 3, [0.0, -0.6, -1.0]), ([[1.0] * 3] * 2, [0.0, 0.0]))
    found = make_subject(model, pixels(0.5, 0.5), torch.zeros(2).long(), BoundOptions())
    third = 1 / 3
    for radii, expected in (
        ([0.2, 0.2], [third, third, third]),
        ([0.05, 0.05], [third, 2 * third, 0]),
        ([0.2, 0.05], [third, 1.5 * third, 0.5 * third]),
    ):
        shares = stable_shares(found, torch.tensor(radii).double())
        torch.testing.assert_close(shares, torch.tensor([expected]).double())


def test_the_last_batch_counts_by_its_size(monkeypatch):
    monkeypatch.setattr("ibpcore.inspection.stability.STABILITY_BATCH", 2)
    model = network(([[1.0]], [-0.5]), ([[1.0], [0.0]], [0.0, 0.0]))
    found = make_subject(model, pixels(0.2, 0.9, 0.5), torch.zeros(3).long(), BoundOptions())
    shares = stable_shares(found, torch.full((3,), 0.1).double())
    torch.testing.assert_close(shares, torch.full((1, 3), 1 / 3).double())


def test_no_relus_and_no_samples():
    found = linear_subject(0.5)
    assert stable_shares(found, torch.ones(1).double()).shape == (0, 3)
    none = found.at(torch.zeros(0, dtype=torch.long))
    assert stable_shares(none, torch.ones(0).double()).shape == (0, 3)


# Tightness


TWO = ("ibp", "crown-ibp")


def tight(found, epsilon_max=0.8, bisections=10, bounds=TWO):
    attack = pgd_attacker(found.network, 10, 1, torch.Generator().manual_seed(0))
    return tightness.measure_tightness(found, bounds, epsilon_max, bisections, attack)


def test_both_sides_meet_on_a_linear_network():
    """Images at 0.5 and 0.2, one beyond reach, one misclassified."""
    found = tight(linear_subject(0.5, 0.2, 0.9, -1.0), bounds=tuple(BOUNDS))
    assert found.radii.keys() == BOUNDS.keys()
    for radius in found.radii.values():
        expected = pixels(0.5, 0.2, 0.8, 0.0).flatten()
        torch.testing.assert_close(radius, expected, rtol=1e-4, atol=1e-6)
    assert found.attackable[2:].tolist() == [torch.inf, 0]
    gap = found.attackable[:2] - pixels(0.5, 0.2).flatten()
    assert (gap >= 0).all()
    assert (gap < 0.8 / 2**10).all()
    for rises in (found.at_radius, found.at_epsilon_max):
        assert [rises.ratio(name) for name in rises.bounds] == pytest.approx([1] * len(BOUNDS))
    summary = found.summary(0.8)
    assert summary["attackable"] == 3
    assert summary["mean_attackable_radius"] == pytest.approx(1.5 / 4, abs=1e-3)
    # All four are certified nowhere, three up to 0.2, two up to 0.5, one up to 0.8.
    area = (3 / 4 * 0.2 + 2 / 4 * 0.3 + 1 / 4 * 0.3) / 0.8
    assert summary["area"] == pytest.approx(dict.fromkeys(BOUNDS, area), rel=1e-3)
    assert found.alarms() == []


def test_a_loose_bound_by_hand():
    """relu(x) - relu(x - 0.5) around 0.75 is constant, which IBP does not know: to it the
    rise is 2e. At x = 0.75 f_1 - f_0 = x - 0.5 - x + 0.2 falls nowhere and rises nowhere."""
    model = network(([[1.0], [1.0]], [0.0, -0.5]), ([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.2]))
    found = tight(
        make_subject(model, pixels(0.75), torch.zeros(1).long(), BoundOptions()),
        epsilon_max=0.2,
        bounds=tuple(BOUNDS),
    )
    torch.testing.assert_close(found.radii["ibp"], torch.tensor([0.15]).double(), rtol=1e-4, atol=0)
    for name in BOUNDS.keys() - {"ibp"}:
        torch.testing.assert_close(found.radii[name], torch.tensor([0.2]).double())
    torch.testing.assert_close(found.at_epsilon_max.bounds["ibp"], torch.tensor([0.4]).double())
    assert found.at_epsilon_max.ratio("ibp") == pytest.approx(0, abs=1e-9)
    assert found.attackable.tolist() == [torch.inf]


def wrong_radii(*args, **options):
    """Certificates that claim a tenth too much."""
    found = certified_radii(*args, **options)
    return found._replace(radius=(found.radius * 1.1).clamp(max=args[3]))


def test_a_wrong_certificate_is_an_alarm(monkeypatch):
    monkeypatch.setattr(tightness, "certified_radii", wrong_radii)
    found = tight(linear_subject(0.5, 0.9))
    assert found.contradictions == {"ibp": 1, "crown-ibp": 1}
    assert len(found.alarms()) == 2


def test_rounding_is_no_alarm():
    """In float32 an exact bound and a perfect attack meet, on either side of 0."""
    torch.manual_seed(0)
    model = IntervalSequential(IntervalFlatten(), IntervalLinear(4, 3))
    images = torch.rand(300, 1, 2, 2)
    labels = model(images).argmax(1)
    found = tight(make_subject(model, images, labels, BoundOptions()), 0.5, bisections=1)
    assert (found.radii["ibp"] > 0).any()
    assert found.alarms() == []


def test_an_attack_above_a_bound_is_an_alarm(monkeypatch):
    low = {
        "ibp": tightness.BOUNDS["ibp"],
        "crown-ibp": replace(tightness.BOUNDS["crown-ibp"], margins=lambda *a: a[3] - 0.6),
    }
    monkeypatch.setattr(tightness, "BOUNDS", low)
    monkeypatch.setattr(
        tightness, "certified_radii", lambda *a, bound, **o: certified_radii(*a, **o)
    )
    found = tight(linear_subject(0.5))
    assert found.at_epsilon_max.above == {"ibp": 0, "crown-ibp": 1}
    assert all("crown-ibp" in line for line in found.alarms())


# Lines in weight space


def line(losses):
    losses = torch.tensor(losses).double()
    return Line(torch.linspace(0, 1, len(losses)).double(), losses, None)


def test_sensitivity_by_hand():
    """t squared: the slope goes from 0 to twice its mean."""
    assert line([0.0, 1, 4, 9, 16]).sensitivity == pytest.approx(2)
    assert line([0.0, 1, 2, 3, 4]).sensitivity == 0
    assert line([3.0, 3, 3, 3, 3]).sensitivity == 0
    assert line([0.0, 1, 0, 0, 2]).turns == 2


@pytest.mark.parametrize(
    ("relaxation", "jumps"),
    [("ibp", False), ("crown-ibp", True), ("crown", True), ("alpha-crown", False)],
)
def test_crown_jumps_where_its_lower_line_turns(relaxation, jumps):
    """relu(z), z in [-1, 1] shifted from a little left of 0 to a little right: the lower line
    becomes z instead of 0, and the lower end of CROWN's bound -1 instead of 0. The best line
    is 0 on both sides."""
    model = network(([[2.0]], [-1.005]), ([[1.0], [0.0]], [0.0, 0.0]))
    found = make_subject(model, pixels(0.5), torch.zeros(1).long(), BoundOptions())
    loss = RobustLoss(relaxation, model, found, torch.tensor([0.5]).double())
    path = [torch.zeros_like(p) for p in model.parameters()]
    path[1] += 0.01
    summary = along(loss, path, 9).summary()
    assert summary["jumps"] is jumps
    # The loss falls by less than 1 % of the jump after it, so the jump is its whole range.
    assert summary["jump"] == (pytest.approx(1, rel=1e-3) if jumps else 0)


def test_the_size_of_a_jump_by_hand():
    """As above, with 1 more for f_1 along the line: at most t, and from t = 1/2 on t + 1 less
    0.005 at the end. The loss is log(1 + exp) of that."""
    model = network(([[2.0]], [-1.005]), ([[1.0], [0.0]], [0.0, 0.0]))
    found = make_subject(model, pixels(0.5), torch.zeros(1).long(), BoundOptions())
    loss = RobustLoss("crown", model, found, torch.tensor([0.5]).double())
    path = [torch.zeros_like(p) for p in model.parameters()]
    path[1] += 0.01
    path[3][1] += 1
    bounds = torch.tensor([0.0, 0.5, 1.5, 1.995]).double()
    start, below, above, end = F.softplus(bounds).tolist()
    summary = along(loss, path, 9).summary()
    assert summary["jump"] == pytest.approx((above - below) / (end - start), rel=1e-4)
    assert summary["loss_change"] == pytest.approx(end - start)


def test_directions_have_the_norms_they_should():
    model = cnn7((1, 8, 8), 3, width=2, hidden=4).double()
    found = make_subject(
        model, torch.rand(2, 1, 8, 8).double(), torch.tensor([0, 1]), BoundOptions()
    )
    loss = RobustLoss("ibp", found.model, found, torch.full((2,), 0.01).double())
    downhill = loss.downhill(0.01)

    def norm(parts):
        return torch.stack([p.norm() for p in parts]).norm()

    torch.testing.assert_close(norm(downhill), 0.01 * norm(list(found.model.parameters())))
    first = downhill[0]
    assert first.dim() == 4
    noise = lines._random_like(first, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noise.flatten(1).norm(dim=1), first.flatten(1).norm(dim=1))
    before = sum(loss.batches()).detach()
    after = along(loss, [1e-4 * part for part in downhill], 5).losses
    assert after[-1] < after[0]
    torch.testing.assert_close(after[0], before)


# All together


@pytest.mark.parametrize("direction", ["gradient", "random"])
def test_the_same_seed_gives_the_same_report(direction):
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), 3, width=2, hidden=4)
    options = InspectionOptions(9, 5, direction=direction, bisections=2, attack_steps=2)
    reports = [inspect_model(model, images, labels, 0.05, options).report(0.05) for _ in range(2)]
    assert reports[0] == reports[1]


def test_an_inspection_leaves_no_trace():
    torch.manual_seed(0)
    model = cnn7((1, 8, 8), 3, width=2, hidden=4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    inspect_assumptions(model, torch.ones(2, 1, 8, 8) / 2, torch.tensor([0, 1]), 0.05, points=5)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "wrong",
    [
        {"grid": 8},
        {"grid": 3},
        {"line_points": 6},
        {"line_length": 0.0},
        {"line_length": float("nan")},
        {"direction": "up"},
        {"bisections": 0},
        {"attack_steps": 0},
        {"restarts": 0},
        {"bound": "deeppoly"},
        {"bound": None},
    ],
)
def test_bad_options(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        InspectionOptions(**wrong)


def test_every_bound_up_to_the_one_asked_for():
    assert InspectionOptions().names == TWO
    assert InspectionOptions(bound="ibp").names == ("ibp",)
    assert InspectionOptions(bound="alpha-crown").names == tuple(BOUNDS)
    assert InspectionOptions(bound="ibp,crown").names == ("ibp", "crown")
    # Radii and stable ReLUs are IBP's in any case.
    assert InspectionOptions(bound="crown,alpha-crown").names == ("ibp", "crown", "alpha-crown")


def test_a_figure_of_almost_nothing(tmp_path):
    """No ReLU, no certified image, no slope."""
    model, images = network(([[1.0], [0.0]], [0.0, 0.0])), pixels(0.5)
    found = inspect_model(model, images, torch.ones(1).long(), 0.1, SOME)
    report = {"epsilon_max": 0.1, "direction": "gradient", "line_length": 0.01}
    write_inspection(tmp_path / "figure", report | found.report(0.1), "nothing")
    assert {path.name for path in tmp_path.iterdir()} == {"figure.png", "figure.svg"}


@pytest.mark.parametrize("flat", [0, 3])
def test_a_figure_says_how_many_images_it_shows(tmp_path, monkeypatch, flat):
    """In words; radii are in 255ths, since the limit is."""
    model = network(([[1.0], [0.0]], [0.0, 0.5]))
    limit = 16 / 255
    found = inspect_model(model, pixels(0.47, 0.48, 0.9), torch.ones(3).long(), limit, SOME)
    report = {"epsilon_max": limit, "direction": "gradient", "line_length": 0.01}
    report |= found.report(limit)
    report["slopes"]["zero"] = flat
    drawn = []
    monkeypatch.setattr(inspection, "write_both", lambda figure, path: drawn.append(figure))
    write_inspection(tmp_path / "figure", report, "acert on $digits$")
    (figure,) = drawn
    title = r"acert on \$digits\$, 3 test images, ε_max 16/255 (0.06274)"
    assert figure.get_suptitle() == title
    margins, slopes, _, radii, _, losses = figure.axes
    assert margins.get_title() == "certified margin R of 3 images"
    assert margins.get_xlabel() == radii.get_ylabel() == "radius (255ths)"
    assert margins.get_xlim() == pytest.approx((0, 16))
    beside = ", of 3 others it is 0" if flat else ""
    assert slopes.get_title() == f"slope of R at the radius of 2 images{beside}"
    assert all(axes.get_xlabel() or axes is figure.axes[4] for axes in figure.axes)
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert "IBP: loss does not jump" in losses.get_legend_handles_labels()[1]


# The commands

TINY = ("--epochs", 4, "--width", 4, "--hidden", 16, "--limit-train", 800, "--limit-test", 40)
QUICK = ("--samples", 12, "--grid", 9, "--line-points", 5, "--bisections", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    code, _, err = run_ibp("train", *TINY, "--out", folder)
    assert (code, err) == (0, "")
    return folder


def strict_json(path: Path):
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_inspect_writes_a_report_and_a_figure(run, tmp_path):
    code, out, err = run_ibp("inspect", run, *QUICK, "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {"inspection.json", "inspection.png", "inspection.svg"}
    report = strict_json(tmp_path / "a" / "inspection.json")
    assert report["margins"]["samples"] == 12
    assert report["margins"]["points"] == 9
    assert report["epsilon_max"] == 0.1
    assert report["margins"]["decreasing"] == report["margins"]["jumps"] == 0
    assert not report["lines"]["ibp"]["jumps"]
    assert report["alarms"] == []
    assert len(report["relus"]["at_epsilon_max"]) == 6
    assert all(len(column) == 12 for column in report["samples"]["radius"].values())
    assert "Theorem 3.4" in out
    assert report["lines"].keys() == report["tightness"]["area"].keys() == set(TWO)


def test_every_bound_is_inspected_on_request(run, tmp_path):
    few = ("--samples", 2, *QUICK[2:], "--bound", "alpha-crown")
    code, out, err = run_ibp("inspect", run, *few, "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    report = strict_json(tmp_path / "a" / "inspection.json")
    tight = report["tightness"]
    for part in (report["lines"], report["samples"]["radius"], tight["area"], tight["mean_gap"]):
        assert list(part) == list(BOUNDS)
    # Each search for a radius starts at IBP's.
    assert all(area >= tight["area"]["ibp"] for area in tight["area"].values())
    assert all(f"\n  {name} " in out for name in BOUNDS)
    assert (tmp_path / "a" / "inspection.png").exists()


def test_a_contradiction_is_loud(run, tmp_path, monkeypatch):
    """Radii of epsilon_max for whatever is classified correctly."""

    def all_certified(*args, **options):
        found = certified_radii(*args, **options)
        return found._replace(radius=torch.where(found.radius > 0, args[3], 0.0))

    monkeypatch.setattr(tightness, "certified_radii", all_certified)
    code, _, err = run_ibp("inspect", run, *QUICK, "--epsilon-max", 0.5, "--out", tmp_path / "a")
    assert code == 3
    assert err.startswith("Error: ALARM: ")
    assert err.count("\n") == 1
    assert strict_json(tmp_path / "a" / "inspection.json")["alarms"]


def test_without_matplotlib_a_line_says_so(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, _ = run_ibp("inspect", run, *QUICK, "--out", tmp_path / "a")
    assert code == 0
    assert "pip install 'ibpcore[plot]'" in out
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["inspection.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", 8], "grid must be an odd number"),
        (["--samples", 0], "--samples"),
        (["--line-length", -1], "--line-length"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_commands(run, tmp_path, options, message):
    code, _, err = run_ibp("inspect", run, *options, "--out", tmp_path / "a")
    assert code != 0
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_training_is_the_same_with_inspections(tmp_path):
    data = load_dataset("digits", Request(limit_train=96, limit_test=8))
    settings = {"epochs": 3, "width": 2, "hidden": 8, "kappa": 0.5}
    models = {}
    for every in (None, 2):
        folder = tmp_path / str(every)
        folder.mkdir()
        config = make_config("digits", "acert", **settings, inspect_every=every)
        models[every] = train_model(config, data, folder).state_dict()
        rows = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        expected = [] if every is None else [2]
        assert [row["epoch"] for row in rows if "inspection" in row] == expected
    assert set(rows[1]["inspection"]) == {"margins", "slopes", "relus"}
    assert rows[1]["inspection"]["margins"]["samples"] == 64
    for name, value in models[None].items():
        assert torch.equal(value, models[2][name]), name


def test_inspect_every_is_checked():
    with pytest.raises(UserError, match="inspect_every must be at least 1"):
        make_config("digits", "acert", inspect_every=0)
