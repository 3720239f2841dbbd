"""What an interactive session shows of a value is a line or two, without tensors."""

from pathlib import Path

import pytest
import torch

from ibpcore import Interval, certified_radii, cnn7, verified_radii
from ibpcore.certification.certificates import read_certificates, write_certificates
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.radii import in_short
from ibpcore.certification.summary import summarize, write_summary
from ibpcore.data.sources import Request, load_dataset


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    torch.manual_seed(0)
    data = load_dataset("digits", Request(limit_train=30, limit_test=20, validation=5))
    model = cnn7((1, 8, 8), 10, width=2, hidden=8).eval()
    images, labels = data.test.images / 255, data.test.labels
    radii = certified_radii(model, images, labels, 0.1)
    certificates = certify(model, data.test, CertificationOptions(0.1))
    write_certificates(folder / "certificates.csv", certificates, "real")
    summary = {**summarize(certificates, 0.1, ()), "dataset": "digits", "clip": True}
    write_summary(folder / "summary.json", summary)
    return {
        "20 images (1, 8, 8)": data.test,
        "25 training, 5 validation, 20 test images (1, 8, 8), 10 classes": data,
        "(20, 10) in [": model(Interval.ball(images, 0.01)),
        "rad <= 0.01": Interval.ball(images, 0.01),
        "Interval((0, 2), torch.float32": Interval(mid=torch.ones(0, 2), rad=torch.ones(0, 2)),
        "Radii(20 samples, radius 0 to": radii,
        " misclassified": verified_radii(model, images, labels, radii),
        "Radii(0 samples": certified_radii(model, images[:0], labels[:0], 0.1),
        " classified correctly": certificates,
        "20 certificates of digits": read_certificates(folder / "certificates.csv"),
    }


def test_values_are_shown_in_short(shown):
    for part, value in shown.items():
        assert part in repr(value)
        assert len(repr(value).replace(str(Path.cwd()), "")) < 250
        assert "tensor(" not in repr(value)
        assert "\n" not in repr(value)


def test_radii_are_not_rounded_up():
    """Four digits of 0.0883166 to the nearest are 0.08832, which need not be certified."""
    radius = torch.tensor([0.0883166, 0.0883166], dtype=torch.float64)
    shown = in_short(radius, torch.tensor([1, 1]))
    assert "0.08831 to 0.08831, mean 0.08831" in shown
