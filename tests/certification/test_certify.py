"""From certificates to files: metrics by hand, sound digits in the table, the curve."""

import copy
import csv
import json
import math
from fractions import Fraction

import pytest
import torch

from ibpcore import UserError, certified_radii, cnn7, load_model, save_model
from ibpcore.bounds.epsilons import as_number, rounded_up
from ibpcore.certification.certificates import Certificates, write_certificates
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.metrics import acr, art, certified_accuracy
from ibpcore.certification.radii import RadiusStatus, RootOptions
from ibpcore.certification.summary import summarize, write_summary
from ibpcore.data.sources import Request, load_dataset
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_model
from ibpcore.visualization.plots.curves import write_curve

DIGITS = load_dataset("digits", Request(limit_train=640, limit_test=150))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Trained just enough that some samples are wrong, some certified, some in between."""
    config = make_config("digits", "acert", width=4, hidden=16, epochs=4, warmup=(1, 2))
    return train_model(config, DIGITS, tmp_path_factory.mktemp("run")).eval()


@pytest.fixture(scope="module")
def certificates(model):
    return certify(model, DIGITS.test, CertificationOptions(0.05))


def by_hand():
    """Five samples: one wrong, one certified to the limit 0.2, three in between."""
    radius = torch.tensor([0.0, 0.2, 0.1, 0.05, 0.0])
    return Certificates(
        label=torch.tensor([0, 1, 2, 3, 4]),
        prediction=torch.tensor([0, 1, 2, 3, 0]),
        radius=radius,
        upper=radius + 0.01,
        status=torch.tensor([3, 1, 2, 2, 0]),
        unchecked=radius * 1.25,
        evaluations=torch.tensor([3, 1, 4, 5, 0]),
        rung=torch.tensor([-1, 0, 2, 0, -1]),
    )


def test_what_a_proof_costs_is_told():
    summary = summarize(by_hand(), 0.2, ["0.1"])
    assert summary["shrunk_by_proof"] == pytest.approx(0.6)
    assert summary["lost_by_proof"] == pytest.approx(0.2)


def test_metrics_by_hand():
    assert acr(torch.tensor([0.0, 0.1, 0.2]), 0.2) == pytest.approx(0.5)
    assert art(0.81, 0.25) == pytest.approx(0.45)
    assert certified_accuracy(torch.tensor([0.0, 0.1, 0.2]), 0.15) == pytest.approx(1 / 3)


def test_a_limit_that_float32_rounds_up_gives_no_more_than_all():
    limit = 8.8 / 255
    just_above = torch.nextafter(torch.tensor([limit]), torch.tensor([1.0]))
    assert acr(just_above, limit) <= 1


def test_certified_accuracy_never_rounds_a_radius_up():
    """0.1 in float32 is above 0.1, the float before it below: it does not reach 0.1."""
    below = torch.nextafter(torch.tensor([0.1]), torch.tensor([0.0]))
    assert float(below) < 0.1 < float(torch.tensor(0.1))
    assert certified_accuracy(below, 0.1) == 0
    assert certified_accuracy(torch.tensor([0.1]), 0.1) == 1


@pytest.mark.parametrize("text", ["8/255", "0.3", "0.1", "8.8/255", "1/3", "3/10", "1e-3/2", "1"])
def test_a_quoted_radius_is_not_below_its_text(text):
    exact = Fraction(text.partition("/")[0]) / Fraction(text.partition("/")[2] or 1)
    number = rounded_up(text)
    assert exact <= Fraction(number) < exact * (1 + Fraction(2) ** -51)
    below = math.nextafter(number, 0)
    assert Fraction(below) < exact
    radii = torch.tensor([below, number], dtype=torch.float64)
    table = by_hand()._replace(**{n: c[:2] for n, c in by_hand()._asdict().items()})
    summary = summarize(table._replace(radius=radii), 1.0, [text])
    assert summary["certified_accuracy"][text] == 0.5


@pytest.mark.parametrize("text", ["1e-999999999", "1e999999999", "1/1e999999999", "nan", "-1", "0"])
def test_what_is_no_radius_is_quoted_as_it_is_read(text):
    assert rounded_up(text) == pytest.approx(as_number(text), abs=0, nan_ok=True)


def test_summary_by_hand():
    summary = summarize(by_hand(), 0.2, ["0.05", "1/10", "0.2", "0.3"])
    assert summary["samples"] == 5
    assert summary["accuracy"] == pytest.approx(0.8)
    assert summary["acr"] == pytest.approx(0.35)
    assert summary["art"] == pytest.approx((0.8 * 0.35) ** 0.5)
    assert summary["certified_accuracy"] == pytest.approx({"0.05": 0.6, "1/10": 0.4, "0.2": 0.2})
    # epsilon_max itself is always quoted
    assert list(summarize(by_hand(), 0.15, ["0.05"])["certified_accuracy"]) == ["0.05", "0.15"]
    assert summary["bound_passes_per_sample"] == pytest.approx(13 / 5)


def test_a_data_set_gets_the_radii_of_its_images(model, certificates):
    images, labels = DIGITS.test.images.float() / 255, DIGITS.test.labels
    expected = certified_radii(model, images, labels, 0.05)
    assert (certificates.status == RadiusStatus.CONVERGED).any()
    torch.testing.assert_close(certificates.radius, expected.radius.double(), atol=2e-6, rtol=2e-4)
    assert torch.equal(certificates.label, labels)
    assert torch.equal(certificates.prediction, model(images).argmax(1))
    wrong = certificates.prediction != labels
    assert wrong.any()
    assert (certificates.radius[wrong] == 0).all()


def test_options_reach_the_solver(model, certificates):
    one = certify(
        model, DIGITS.test, CertificationOptions(0.05, roots=RootOptions(max_iterations=1))
    )
    assert one.evaluations.max() == 2
    assert (one.radius <= certificates.radius + 1e-6).all()


def test_more_labels_than_classes_is_an_error():
    two_classes = cnn7((1, 8, 8), 2, width=2, hidden=4).eval()
    with pytest.raises(UserError, match="below 2"):
        certify(two_classes, DIGITS.test, CertificationOptions(0.1))


@pytest.mark.parametrize("epsilon_max", [0.0, -0.1, float("nan"), float("inf")])
def test_a_bad_epsilon_max_is_named(model, epsilon_max):
    """A negative one would otherwise turn intervals inside out."""
    with pytest.raises(UserError, match="epsilon_max"):
        certify(model, DIGITS.test, CertificationOptions(epsilon_max))


def test_progress_counts_all_images(model):
    seen = []
    certify(model, DIGITS.test, CertificationOptions(0.05), advance=lambda *done: seen.append(done))
    assert [done for done, _ in seen] == [0, 128, 150]
    radii = certify(model, DIGITS.test, CertificationOptions(0.05))
    whole = int((radii.radius >= 0.05).sum())
    right = int((radii.prediction == radii.label).sum())
    assert seen[-1][1] == [f"{whole} certified", f"{right - whole} open"]


def test_table_keeps_every_digit(tmp_path, certificates):
    write_certificates(tmp_path / "certificates.csv", certificates, "real")
    with open(tmp_path / "certificates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["index", "label", "prediction", "radius", "upper", "status", "unchecked", "claim"]
    assert list(rows[0]) == [*columns, "bound"]
    assert all(row["bound"] == ("ibp" if float(row["radius"]) > 0 else "") for row in rows)
    assert [int(row["index"]) for row in rows] == list(range(150))
    for name in ("radius", "upper", "unchecked"):
        assert [float(row[name]) for row in rows] == getattr(certificates, name).tolist()
    assert {row["claim"] for row in rows} == {"real"}
    assert {row["status"] for row in rows} <= {status.name.lower() for status in RadiusStatus}


def test_claims_differ_by_what_their_proofs_cost(model, certificates):
    unchecked = certify(model, DIGITS.test, CertificationOptions(0.05, claim="unchecked"))
    float32 = certify(model, DIGITS.test, CertificationOptions(0.05, claim="float32"))
    assert torch.equal(unchecked.radius, unchecked.unchecked)
    assert torch.equal(unchecked.radius, certificates.unchecked)
    assert (certificates.radius <= unchecked.radius).all()
    assert (float32.radius <= certificates.radius).all()
    assert (float32.radius < certificates.radius).any()
    with pytest.raises(UserError, match="'proved' is not one of real, float32"):
        certify(model, DIGITS.test, CertificationOptions(0.05, claim="proved"))


def test_summary_file_is_json(tmp_path):
    summary = summarize(by_hand(), 0.2, ["0.1"])
    write_summary(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_the_area_under_the_curve_is_the_acr(tmp_path, monkeypatch):
    """The drawn steps, integrated, give the mean radius."""
    from matplotlib.axes import Axes

    drawn = []
    before = Axes.step

    def step(self, x, y, *args, **kwargs):
        drawn.append((x, y, kwargs["where"]))
        return before(self, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "step", step)
    write_curve(tmp_path / "curve.png", by_hand(), 0.2, "by hand")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    ((x, y, where),) = drawn
    assert where == "pre"  # y[i] holds on (x[i-1], x[i]]
    area = x[0] * y[0] + sum((b - a) * h for a, b, h in zip(x, x[1:], y[1:], strict=False))
    assert area / 100 == pytest.approx(0.07)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"ibpcore\[plot\]"):
        write_curve(tmp_path / "curve.png", by_hand(), 0.2, "none")


def test_a_float64_model_is_certified_in_float64(tmp_path, model, certificates):
    save_model(copy.deepcopy(model).double(), tmp_path / "model.safetensors")
    double = load_model(tmp_path / "model.safetensors")
    exact = certify(double, DIGITS.test, CertificationOptions(0.05))
    # All digits were searched for, not those of float32.
    assert (exact.unchecked != exact.unchecked.float().double()).any()
    torch.testing.assert_close(exact.radius, certificates.radius, atol=2e-6, rtol=2e-4)
