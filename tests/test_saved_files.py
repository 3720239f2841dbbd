"""Files that earlier versions wrote load, and unfinished work of theirs goes on, but for journals.

`fixtures/0.1.0` was written before the packages of today: a network with a layer of each
kind, a run, the same cut off after its third epoch of six, certificates, the same cut off
after the first of two batches, and a sweep whose second run is missing.
"""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TESTS, run_ibp

from ibpcore import certified_margins, load_model


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, which is the current folder: the paths in them are relative."""
    folder = tmp_path / "saved"
    shutil.copytree(TESTS / "fixtures" / "0.1.0", folder)
    monkeypatch.chdir(folder)
    return folder


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def assert_alike(found: list[dict[str, str]], expected: list[dict[str, str]]) -> None:
    """The same certificates, but for what another processor rounds otherwise."""
    assert len(found) == len(expected) == 200
    for name in ("index", "label", "prediction", "status", "claim"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    for name in ("radius", "upper", "unchecked"):
        pair = [torch.tensor([float(row[name]) for row in rows]) for rows in (found, expected)]
        torch.testing.assert_close(*pair, rtol=2e-3, atol=1e-5)


def test_a_network_with_every_kind_of_layer(saved):
    known = json.loads((saved / "network.json").read_text())
    images, labels = torch.tensor(known["images"]), torch.tensor(known["labels"])
    network = load_model(saved / "network.safetensors")
    torch.testing.assert_close(network(images), torch.tensor(known["logits"]))
    for bound, name in (("ibp", "margins"), ("crown-ibp", "crown")):
        margins = certified_margins(network, images, labels, 0.01, bound=bound)
        torch.testing.assert_close(margins, torch.tensor(known[name]))


def test_the_model_of_a_run_has_the_same_certificates(saved):
    outcome = run_ibp("certify", "run", "--out", "again")
    assert outcome.code == 0, outcome.err
    assert_alike(table(saved / "again/certificates.csv"), table(saved / "run/certificates.csv"))


def test_a_whole_run_is_done(saved):
    before = (saved / "run/summary.json").read_bytes()
    outcome = run_ibp("train", "--resume", "run")
    assert outcome.code == 0, outcome.err
    assert "64.50 %" in outcome.out
    assert (saved / "run/summary.json").read_bytes() == before


def test_the_settings_of_a_run_are_those_of_another(saved):
    """Its config.json names a setting that is gone."""
    assert '"bfloat16": false' in (saved / "run/config.json").read_text()
    outcome = run_ibp("train", "--config", "run/config.json", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "epochs = 6" in outcome.out


def test_a_run_that_was_cut_off_goes_on(saved):
    before = (saved / "cut_run/metrics.jsonl").read_text()
    outcome = run_ibp("train", "--resume", "cut_run")
    assert outcome.code == 0, outcome.err
    metrics = (saved / "cut_run/metrics.jsonl").read_text()
    assert metrics.startswith(before)
    assert [json.loads(line)["epoch"] for line in metrics.splitlines()] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((saved / "cut_run/summary.json").read_text())
    assert (summary["method"], summary["samples"]) == ("fastibp", 200)


def test_certificates_that_were_cut_off_are_refused(saved):
    """Their journal does not say of which model each line is; the settings of the command hold."""
    journal = saved / "cut_certificates/certificates.journal"
    before = journal.read_bytes()
    (_, line) = before.splitlines()
    radii = json.loads(line.partition(b" ")[2])["radius"][1]
    outcome = run_ibp("certify", "--resume", "cut_certificates")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "was written by an earlier version of ibpcore" in outcome.err
    assert outcome.err.endswith(": delete it to start over\n")
    assert journal.read_bytes() == before
    journal.unlink()
    outcome = run_ibp("certify", "--resume", "cut_certificates")
    assert outcome.code == 0, outcome.err
    rows = table(saved / "cut_certificates/certificates.csv")
    assert len(rows) == 200
    found = torch.tensor([float(row["radius"]) for row in rows[:128]])
    torch.testing.assert_close(found, torch.tensor(radii), rtol=2e-3, atol=1e-5)
    assert not journal.exists()


def test_whole_certificates_are_done(saved):
    before = (saved / "certificates/certificates.csv").read_bytes()
    outcome = run_ibp("certify", "--resume", "certificates")
    assert outcome.code == 0, outcome.err
    assert (saved / "certificates/certificates.csv").read_bytes() == before


def test_certificates_are_attacked(saved):
    outcome = run_ibp("attack", "run", "--limit-test", "40", "--restarts", "1", "--out", "attacked")
    assert outcome.code == 0, outcome.err
    attacked = (saved / "attacked/certificates.csv").read_text().splitlines()
    assert len(attacked) == 41


def test_a_sweep_goes_on_with_what_is_missing(saved):
    first = table(saved / "sweep/results.csv")[0]
    done = (saved / "sweep/runs/acert-kappa0.5-seed0/summary.json").read_bytes()
    outcome = run_ibp("sweep", "--resume", "sweep")
    assert outcome.code == 0, outcome.err
    rows = table(saved / "sweep/results.csv")
    assert [row["method"] for row in rows] == ["acert", "fastibp"]
    assert rows[0] == first
    assert (saved / "sweep/runs/acert-kappa0.5-seed0/summary.json").read_bytes() == done
    assert run_ibp("report", "sweep", "--out", "report").code == 0
