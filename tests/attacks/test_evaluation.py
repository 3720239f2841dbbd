"""Certificates attacked: of every method none falls, a wrong one does, and the command says so."""

import csv
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

import pytest
import torch
from helpers import run_ibp, snapshot
from safetensors.torch import load_file
from test_search import Adversary
from torch import Tensor

from benchmarks.reliability import attacks as reliability
from ibpcore import UserError, load_model, save_model
from ibpcore.attacks.evaluation import AttackOptions, attack_certificates, summarize_attacks
from ibpcore.bounds.ibp import clean_margins
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certificates import CertificateTable, read_certificates
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.data.images import ImageSet
from ibpcore.data.sources import Request, load_dataset
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalReLU, IntervalSequential
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_model
from ibpcore.training.methods import METHODS

DIGITS = load_dataset("digits", Request(limit_train=320, limit_test=20))
QUICK = AttackOptions(steps=4, restarts=1, autoattack=False)
PGD = ("--steps", 4, "--restarts", 1, "--no-autoattack", "--device", "cpu")


def table_of(label, prediction, radius, epsilon_max=1.0, clip=True, float32=False):
    """What a table of these columns would say; `float32` of all or of each."""
    count = len(label)
    return CertificateTable(
        Path("certificates.csv"),
        [{"index": str(i)} for i in range(count)],
        torch.arange(count),
        label,
        prediction,
        radius.double(),
        torch.as_tensor(float32).expand(count),
        "some images",
        epsilon_max,
        clip,
        {"0.02": 0.02, "0.05": 0.05},
        None,
    )


@pytest.fixture(scope="module", params=METHODS)
def model(request, tmp_path_factory):
    """Trained a little by one method."""
    settings = {"width": 3, "hidden": 16, "epochs": 5, "warmup": (1, 3)}
    quick = {"epsilon_max": 0.03, "learning_rate": 5e-3}
    config = make_config("digits", request.param, **settings, **quick)
    return train_model(config, DIGITS, tmp_path_factory.mktemp(request.param)).eval()


@pytest.mark.parametrize(("bound", "clip"), [("ibp", True), ("crown-ibp", False)])
def test_no_certificate_of_any_method_falls(model, bound, clip):
    """By each bound, with clipping and without.

    Every second one as if it claimed to hold in float32, where more counts as a success.
    """
    made = certify(
        model,
        DIGITS.test,
        CertificationOptions(
            0.1, bounds=BoundOptions(bound=bound, clip=(0.0, 1.0) if clip else None)
        ),
    )
    every_second = torch.arange(len(made.label)) % 2 == 0
    given = table_of(made.label, made.prediction, made.radius, 0.1, clip, every_second)
    found = attack_certificates(model, DIGITS.test, given, QUICK)
    assert found.alarms == []
    right, certified = made.prediction == made.label, made.radius > 0
    assert certified.sum() > 1
    assert right[certified].all()
    assert (found.distance[~right] == 0).all()
    assert (found.distance[right] > made.radius[right]).all()
    # The attacks are no duds: far enough away they succeed, by a single start not always.
    assert found.distance[right].isfinite().double().mean() > 0.4
    assert not found.by_autoattack.any()


def test_a_summary_by_hand():
    """Wrong; certified 0.02, found at 0.03; certified 0.04, at 0.1; certified 0.1, never; 0."""
    label, prediction = torch.tensor([0, 1, 1, 1, 1]), torch.ones(5).long()
    radius = torch.tensor([0, 0.02, 0.04, 0.1, 0], dtype=torch.float64)
    distance = torch.tensor([0, 0.03, 0.1, torch.inf, 0.01], dtype=torch.float64)
    attacked = SimpleNamespace(distance=distance, by_autoattack=distance == 0.03, alarms=[])
    given = table_of(label, prediction, radius)
    summary = summarize_attacks(given, attacked, QUICK)
    assert (summary["samples"], summary["correct"], summary["certified"]) == (5, 4, 3)
    assert summary["succeeded"] == pytest.approx(3 / 4)
    assert summary["gap"] == pytest.approx({"mean": 0.035, "median": 0.035})
    assert summary["ratio"] == pytest.approx({"mean": 2, "median": 2})
    assert summary["accuracy"] == pytest.approx(0.8)
    assert summary["certified_accuracy"] == pytest.approx({"0.02": 0.6, "0.05": 0.2})
    assert summary["empirical_accuracy"] == pytest.approx({"0.02": 0.6, "0.05": 0.4})
    assert (summary["alarms"], summary["broken"]) == (0, 3)
    assert summary["autoattack"] == "not run: --no-autoattack"
    assert summary["compared"] == 2
    cut_off = table_of(label, prediction, radius, epsilon_max=0.040001)
    assert summarize_attacks(cut_off, attacked, QUICK)["gap"]["mean"] == pytest.approx(0.01)
    nothing = summarize_attacks(given.at([0]), attacked_at(attacked, [0]), QUICK)
    assert nothing["gap"] == nothing["ratio"] == {"mean": None, "median": None}
    assert nothing["succeeded"] is None


def attacked_at(attacked, rows):
    return SimpleNamespace(
        distance=attacked.distance[rows], by_autoattack=attacked.by_autoattack[rows], alarms=[]
    )


class Spy(IntervalFlatten):
    """A layer that records how float32 executions of it convolve."""

    seen: ClassVar[list[tuple[bool, bool]]] = []

    def forward(self, x):
        if isinstance(x, Tensor) and x.dtype == torch.float32:
            (nnpack,) = torch.backends.nnpack.set_flags(False)
            torch.backends.nnpack.set_flags(nnpack)
            self.seen.append((torch.backends.cudnn.enabled, nnpack))
        return super().forward(x)


def test_executions_that_refute_a_claim_of_float32_are_covered_by_it():
    """Neither cuDNN nor NNPACK chooses Winograd in them; the second layer gives an alarm."""
    torch.manual_seed(0)
    model = IntervalSequential(Spy(), IntervalLinear(4, 2)).eval()
    images = ImageSet(torch.full((2, 1, 2, 2), 128, dtype=torch.uint8), torch.zeros(2).long())
    given = table_of(images.labels, images.labels, torch.full((2,), 0.9), float32=True)
    with mock.patch.object(Spy, "seen", []):
        assert attack_certificates(model, images, given, QUICK).alarms
        assert {*Spy.seen} == {(False, False)}


@pytest.mark.parametrize("float32", [False, True])
def test_a_claim_of_float32_falls_by_its_execution_alone(float32):
    """h = relu(2**24 x + 1) and f = (0.5, h - 2**24) at x = 1: f_1 is 1, but 0 in float32."""
    model = IntervalSequential(
        IntervalFlatten(), IntervalLinear(1, 1), IntervalReLU(), IntervalLinear(1, 2)
    ).eval()
    with torch.no_grad():
        model[1].weight.fill_(2.0**24)
        model[1].bias.fill_(1.0)
        model[3].weight.copy_(torch.tensor([[0.0], [1.0]]))
        model[3].bias.copy_(torch.tensor([0.5, -(2.0**24)]))
    images = ImageSet(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), torch.tensor([1]))
    one = torch.ones(1).long()
    given = table_of(one, one, torch.tensor([1e-9]), float32=float32)
    found = attack_certificates(model, images, given, QUICK)
    assert len(found.alarms) == float32
    assert (found.distance.item() == 0) is float32
    for alarm in found.alarms:
        assert alarm.logits.tolist() == [0.5, 1]
        assert alarm.executed.tolist() == [0.5, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps must be at least 1, but is 0"),
        ({"restarts": 0}, "restarts"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(UserError, match=says):
        AttackOptions(**options)


# The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and certificates of it up to 1, so that no radius is cut off."""
    folder = tmp_path_factory.mktemp("run") / "digits"
    tiny = ("--epochs", 4, "--width", 4, "--hidden", 16, "--limit-train", 640)
    outcome = run_ibp("train", *tiny, "--limit-test", 40, "--device", "cpu", "--out", folder)
    assert (outcome.code, outcome.err) == (0, "")
    outcome = run_ibp("certify", folder, "--epsilon-max", 1, "--device", "cpu")
    assert (outcome.code, outcome.err) == (0, "")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rewrite(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_attack_adds_a_column_and_a_summary(run):
    before = table(run / "certificates.csv")
    code, out, err = run_ibp("attack", run, *PGD)
    assert (code, err) == (0, "")
    assert f"all files are in {run / 'attacks'}" in out
    assert {path.name for path in (run / "attacks").iterdir()} == {
        "certificates.csv",
        "summary.json",
    }
    rows = table(run / "attacks" / "certificates.csv")
    attacked = [row.pop("attacked_radius") for row in rows]
    assert rows == before
    for row, text in zip(rows, attacked, strict=True):
        if row["label"] != row["prediction"]:
            assert text == "0.0"
        elif text:
            assert float(text) > float(row["radius"])
    assert sum(map(bool, attacked)) > 30
    summary = json.loads((run / "attacks" / "summary.json").read_text())
    assert (summary["samples"], summary["alarms"]) == (40, 0)
    assert summary["method"] == "acert"
    assert summary["certificates"] == str(run / "certificates.csv")
    given = json.loads((run / "summary.json").read_text())
    assert summary["accuracy"] == given["accuracy"]
    assert summary["certified_accuracy"] == given["certified_accuracy"]
    for radius, share in summary["empirical_accuracy"].items():
        assert summary["certified_accuracy"][radius] <= share <= summary["accuracy"]
    assert summary["autoattack"] == "not run: --no-autoattack"
    assert "alarm" not in out
    assert "\n\nNo attack changed a prediction within its certified radius.\n" in out
    correct = f"of {summary['correct']} correctly classified images"
    assert f"broken at some radius above the certificate  {summary['broken']} {correct}" in out
    assert summary["broken"] == sum(t not in ("", "0.0") for t in attacked)
    assert summary["gap"]["mean"] > 0
    assert summary["ratio"]["median"] > 1


def test_certificates_are_found_where_certify_makes_them(run):
    """Those in the run's folder first, then those in `certificates` beside the model."""
    (run / "certificates.csv").unlink()
    code, _, err = run_ibp("attack", run / "model.safetensors", *PGD)
    assert (code, err) == (0, "")
    summary = json.loads((run / "attacks" / "summary.json").read_text())
    assert summary["certificates"] == str(run / "certificates" / "certificates.csv")


def test_some_certificates_of_another_table(run, tmp_path):
    """A table that has a column of attacks already, by its folder; nine of its certificates."""
    folder = run / "certificates"
    rows = table(folder / "certificates.csv")
    rewrite(folder / "certificates.csv", [row | {"attacked_radius": "7"} for row in rows])
    given = ("--certificates", folder, "--limit-test", 9, "--out", tmp_path / "a")
    assert run_ibp("attack", run / "model.safetensors", *given, *PGD).code == 0
    some = table(tmp_path / "a" / "certificates.csv")
    assert len({row["index"] for row in some}) == 9
    for row in some:
        assert row.pop("attacked_radius") != "7"
        assert row == rows[int(row["index"])]


def test_a_seed_decides_all(run, tmp_path):
    for name in "ab":
        given = ("--limit-test", 5, "--seed", 3, "--out", tmp_path / name)
        assert run_ibp("attack", run, *given, *PGD).code == 0
    first, second = ((tmp_path / n / "certificates.csv").read_bytes() for n in "ab")
    assert first == second


def test_a_wrong_certificate_is_an_alarm(run, tmp_path):
    """The one that attacks came closest to, relatively, doubled until it claims too much."""
    path = run / "certificates" / "certificates.csv"
    assert run_ibp("attack", run, "--certificates", path, *PGD, "--out", tmp_path / "a").code == 0
    honest = [row for row in table(tmp_path / "a" / "certificates.csv") if row["attacked_radius"]]
    honest = [row for row in honest if float(row["radius"]) > 0]
    closest = min(honest, key=lambda row: float(row["attacked_radius"]) / float(row["radius"]))
    index, radius = int(closest["index"]), float(closest["radius"])
    while radius < 2 * float(closest["attacked_radius"]):  # few steps may miss the one found
        radius *= 2
    assert radius < 1
    rows = table(path)
    rows[index] |= dict.fromkeys(("radius", "upper", "unchecked"), repr(radius))
    rewrite(path, rows)

    code, out, err = run_ibp("attack", run, "--certificates", path, *PGD, "--out", tmp_path / "b")
    assert code == 3
    line, last = err.splitlines()
    assert line.startswith(f"ALARM: image {index} of label {closest['label']} is certified up to")
    assert last.startswith("Error: ALARM: 1 of 40 certificates wrong; see ")
    assert (
        " certified predictions within the certified radius: these certificates are wrong." in out
    )
    assert "Attacks changed 1 of " in out
    names = {"certificates.csv", "summary.json", f"alarm-{index}.safetensors"}
    assert {file.name for file in (tmp_path / "b").iterdir()} == names
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["alarms"] == 1
    reached = table(tmp_path / "b" / "certificates.csv")[index]["attacked_radius"]

    alarm = load_file(tmp_path / "b" / f"alarm-{index}.safetensors")
    assert (alarm["index"].item(), alarm["radius"].item()) == (index, radius)
    data = load_dataset("digits", Request(limit_test=40)).test
    assert torch.equal(alarm["image"], data.images[index].float() / 255)
    assert alarm["label"].item() == data.labels[index]
    distance = (alarm["attacked"].double() - alarm["image"].double()).abs().max()
    assert distance == alarm["distance"] == float(reached)
    assert distance <= radius
    assert alarm["attacked"].min() >= 0
    assert alarm["attacked"].max() <= 1
    logits = load_model(run / "model.safetensors").double()(alarm["attacked"][None].double())
    torch.testing.assert_close(logits[0], alarm["logits"])
    assert clean_margins(logits, data.labels[index : index + 1]).item() >= 0


def test_autoattack_joins_where_it_is_installed(run, tmp_path, monkeypatch):
    """A stand-in, of one step; "found nothing" is a number, "not run" a reason."""
    given = ("--limit-test", 12, *PGD[:4], *PGD[5:])
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    code, out, err = run_ibp("attack", run, *given, "--out", tmp_path / "without")
    assert (code, err) == (0, "")
    reason = "not run: pip install 'ibpcore[attack]'"
    assert reason in out
    assert json.loads((tmp_path / "without" / "summary.json").read_text())["autoattack"] == reason
    code, _, err = run_ibp("attack", run, *given, "--autoattack", "--out", tmp_path / "asked")
    assert code != 0
    assert err == "Error: AutoAttack is not installed: pip install 'ibpcore[attack]'\n"
    assert not (tmp_path / "asked").exists()

    module = SimpleNamespace(AutoAttack=Adversary, __version__="9.9")
    monkeypatch.setitem(sys.modules, "pyautoattack", module)
    monkeypatch.setattr(Adversary, "made", [])
    code, out, err = run_ibp("attack", run, *given, "--out", tmp_path / "with")
    assert (code, err) == (0, "")
    assert "nearer than PGD at" in out
    found = json.loads((tmp_path / "with" / "summary.json").read_text())["autoattack"]
    assert found["version"] == "9.9"
    assert 0 <= found["nearer"] <= 12
    assert 1 <= len(Adversary.made) <= 3
    before, after = (table(tmp_path / n / "certificates.csv") for n in ("without", "with"))
    changed = [row["index"] for row, old in zip(after, before, strict=True) if row != old]
    assert len(changed) == found["nearer"]


def damaged(run, change):
    rows = table(run / "certificates.csv")
    change(rows)
    rewrite(run / "certificates.csv", rows)


def relabelled(rows):
    """As if of another data set."""
    rows[0].update(label="11", prediction="11")


def mispredicted(rows):
    """A radius above 0, of a wrong prediction."""
    row = next(row for row in rows if float(row["radius"]) > 0)
    row.update(prediction=str(9 - int(row["label"])))


def above_upper(rows):
    """A radius at which a pass failed."""
    row = next(row for row in rows if row["status"] == "converged")
    row.update(radius=repr(float(row["upper"]) * 1.001), unchecked="0.09")


def unproved(rows):
    """A radius that was not certified."""
    next(row for row in rows if row["status"] == "converged").update(status="unproved")


def summarized(run, **changes):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | changes))


def changed_model(run, factor):
    model = load_model(run / "model.safetensors")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    save_model(
        model, run / "model.safetensors", training=json.loads((run / "config.json").read_text())
    )


def another_model(run):
    """Whose certificates are of a version that did not name the weights."""
    changed_model(run, -1)
    summarized(run, weights=None)


def without_certificates(run):
    (run / "certificates.csv").unlink()
    shutil.rmtree(run / "certificates")


REFUSALS = [
    (without_certificates, "run ibp certify first"),
    (lambda run: (run / "summary.json").unlink(), "summary.json is missing"),
    (lambda run: (run / "summary.json").write_text("{}"), "not a summary of certificates"),
    (lambda run: (run / "summary.json").write_text("[1]"), "not a summary of certificates"),
    (lambda run: summarized(run, clip="no"), "not a summary of certificates"),
    (lambda run: summarized(run, epsilon_max=0), "not a summary of certificates"),
    (lambda run: summarized(run, epsilon_max="1"), "not a summary of certificates"),
    (lambda run: summarized(run, certified_accuracy={"1/0": 1}), "not a summary of certificates"),
    (lambda run: summarized(run, epsilon_max=1e-4), "no certificates up to 0.0001"),
    (
        lambda run: summarized(run, samples=41),
        "is of 41 certificates, but the table beside it has 40",
    ),
    (lambda run: summarized(run, dataset="MNIST"), "is of MNIST, not of UCI optical digits"),
    (lambda run: (run / "certificates.csv").write_bytes(b"\xff\x00"), "not a table"),
    (
        lambda run: (run / "certificates.csv").write_text(""),
        "is of 40 certificates, but the table beside it has 0",
    ),
    (lambda run: (run / "certificates.csv").write_text("a,b\n1,2\n"), "holds no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(radius="x")), "no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(radius="nan")), "no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(radius="-1")), "no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(upper="inf")), "no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(upper="-0.1")), "no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(unchecked="-1")), "no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(status="77")), "no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(claim="rael")), "no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(prediction="-1")), "no certificates"),
    (lambda run: damaged(run, above_upper), "no certificates"),
    (lambda run: damaged(run, unproved), "no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(index="4")), "no certificates"),
    (lambda run: damaged(run, lambda rows: rows[3].update(label="1" * 30)), "no certificates"),
    (lambda run: damaged(run, relabelled), "has other labels"),
    (lambda run: damaged(run, mispredicted), "no certificates"),
    (another_model, "differ; choose its own certificates with --certificates"),
    (lambda run: changed_model(run, 1.0001), "is of other weights than the model: run ibp certify"),
    (lambda run: summarized(run, weights=1), "not a summary of certificates"),
]


@pytest.mark.parametrize(("change", "says"), REFUSALS)
def test_what_does_not_fit_is_refused(run, change, says):
    change(run)
    before = snapshot(run)
    code, _, err = run_ibp("attack", run, *PGD)
    assert code == 1
    assert err.startswith("Error: ")
    assert says in err
    assert err.count("\n") == 1
    assert snapshot(run) == before


def test_more_certificates_than_images(run, tmp_path):
    """450 rows are the whole test set: 40 more have no image."""
    rows = table(run / "certificates.csv")
    many = [rows[i % 40] | {"index": str(i)} for i in range(490)]
    rewrite(run / "certificates.csv", many)
    summarized(run, samples=490)
    code, _, err = run_ibp("attack", run, *PGD)
    assert code == 1
    assert "has 490 certificates, but UCI optical digits has 450 test images" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--steps", 0), "steps"), (("--limit-test", 0), "--limit-test"), (("--seed", -1), "seed")],
)
def test_bad_commands(run, options, says):
    code, _, err = run_ibp("attack", run, *options)
    assert code != 0
    assert says in err
    assert err.count("\n") == 1
    assert not (run / "attacks").exists()


def test_a_claim_is_read(run):
    """Of tables that have such a column."""
    damaged(run, lambda rows: [row.update(claim="real") for row in rows])
    assert not read_certificates(run / "certificates.csv").float32.any()
    damaged(run, lambda rows: rows[7].update(claim="float32"))
    assert read_certificates(run / "certificates.csv").float32.nonzero().tolist() == [[7]]


def test_attacks_are_counted(tmp_path, monkeypatch):
    """One method, a tiny share: a row for each bound and ball."""
    monkeypatch.delenv("IBP_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reliability, "METHODS", ["standard"])
    rows = reliability.run(0.01, 0, tmp_path)
    assert len({row.what for row in rows}) == len(rows) == 2 * len(BOUNDS)
    for row in rows:
        assert 0 < row.cases <= 8
        assert row.failures == 0
        assert row.note.startswith("UCI optical digits; attacks succeeded at ")
