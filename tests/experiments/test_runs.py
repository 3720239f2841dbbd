"""Whole runs of the command line on the built-in digits: train, certify, kill, resume."""

import csv
import json
import os
import pty
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from helpers import run_ibp

from ibpcore import certified_margins, load_model, save_model
from ibpcore.data.sources import Request, load_dataset

SMALL = ("--epochs", "4", "--width", "8", "--hidden", "32")
LONG = ("--epochs", "10", *SMALL[2:], "--limit-train", "400")
"""So that there is time to stop it."""


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def certificates(folder):
    with open(folder / "certificates.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The two methods, each as the preset trains it."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("acert", "fastibp"):
        code, out, err = run_ibp("train", "--method", method, "--out", str(root / method))
        assert (code, err) == (0, "")
        assert "ART" in out
    return root


def test_acert_learns_the_digits(runs):
    assert summary(runs / "acert")["accuracy"] >= 0.9


def test_acert_beats_fastibp(runs):
    """Both with the same epochs, batches, network and epsilon."""
    assert summary(runs / "acert")["art"] > summary(runs / "fastibp")["art"] > 0.5


def test_the_run_folder_is_complete(runs):
    names = {path.name for path in (runs / "acert").iterdir()}
    assert names >= {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "resume.pt",
        "summary.json",
        "certificates.csv",
        "certified_accuracy.png",
    }


def test_certify_repeats_the_numbers(runs):
    """From the file alone: the same certificates, to the last digit."""
    out = runs / "again"
    code, _, err = run_ibp("certify", str(runs / "acert" / "model.safetensors"), "--out", str(out))
    assert (code, err) == (0, "")
    assert certificates(out) == certificates(runs / "acert")
    at_end, again = summary(runs / "acert"), summary(out)
    for name in ("samples", "accuracy", "acr", "art", "epsilon_max", "certified_accuracy"):
        assert again[name] == at_end[name]


BY_CROWN = ("--architecture", "linear 8, relu, linear 8, relu, linear", "--train-bound", "crown")
FEW = ("--limit-train", "200", "--limit-test", "20")


def test_a_run_by_crown_is_certified_by_crown(tmp_path):
    whole = tmp_path / "whole"
    given = ("--method", "fastibp", *BY_CROWN, *FEW, "--epochs", "3", "--warmup", "1:2")
    code, out, err = run_ibp("train", *given, "--out", whole)
    assert (code, err) == (0, "")
    assert "certified by crown, claim: real" in out
    assert f"certify again with: ibp certify {whole}/model.safetensors --bound crown\n" in out
    assert summary(whole)["bound"] == "crown"
    again = run_ibp("certify", whole, "--bound", "crown", "--out", tmp_path / "again")
    assert again.code == 0
    assert certificates(tmp_path / "again") == certificates(whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--method", "sabr", *BY_CROWN), "--train-bound must be ibp for sabr, but is 'crown'"),
        (("--method", "crown-ibp", *BY_CROWN), "--train-bound must be ibp for crown-ibp"),
        (("--train-bound", "deeppoly"), "'deeppoly' is not one of"),
    ],
)
def test_a_train_bound_that_cannot_be(tmp_path, given, message):
    code, _, err = run_ibp("train", *given, *FEW, "--out", tmp_path / "run")
    assert code != 0
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["taps", "staps"])
def test_a_classifier_that_is_larger_than_the_network(tmp_path, method):
    """A CNN7 has six ReLUs, and these layers one."""
    layers = ("--architecture", "linear 8, relu, linear")
    for most, given in ((6, ("--classifier-size", 7)), (1, (*layers, "--classifier-size", 2))):
        given = ("--method", method, *given)
        code, _, err = run_ibp("train", *given, *FEW, "--out", tmp_path / "run")
        assert code == 2
        assert f"--classifier-size must be at most {most}, the number of nonlinear layers" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["taps", "staps"])
def test_taps_from_training_to_a_certificate(tmp_path, method):
    """Two epochs after the warm-up; certificates by CROWN contain those by IBP."""
    run = tmp_path / "run"
    given = ("--method", method, "--epochs", 3, "--warmup", "1:1", "--limit-train", 64)
    small = ("--width", 2, "--hidden", 8, "--limit-test", 8, "--epsilon-max", 0.01)
    done = run_ibp("train", *given, *small, "--out", run)
    assert done.code == 0, done.err
    out = tmp_path / "crown"
    assert run_ibp("certify", run, "--bound", "crown", "--out", out).code == 0
    assert summary(out)["accuracy"] == summary(run)["accuracy"]
    assert summary(out)["acr"] >= summary(run)["acr"]


def test_a_model_saved_by_hand_is_certified_too(runs, tmp_path):
    """It does not say how it was trained, so that has to be given."""
    path = tmp_path / "bare.safetensors"
    save_model(load_model(runs / "acert" / "model.safetensors"), path)
    code, _, err = run_ibp("certify", path)
    assert code == 1
    assert "give --dataset and --epsilon-max" in err
    given = ("--dataset", "digits", "--epsilon-max", "0.1", "--out", tmp_path / "out")
    assert run_ibp("certify", path, *given).code == 0
    assert certificates(tmp_path / "out") == certificates(runs / "acert")


def test_the_bare_ball_certifies_less(runs, tmp_path):
    """Without the pixel range an attacker may do more."""
    given = ("--no-clip", "--out", tmp_path / "bare")
    assert run_ibp("certify", runs / "acert", *given).code == 0
    assert summary(tmp_path / "bare")["acr"] < summary(runs / "acert")["acr"]
    assert summary(tmp_path / "bare")["clip"] is False


def test_a_run_folder_will_do_for_the_model(runs):
    code, out, _ = run_ibp("certify", str(runs / "acert"), "--limit-test", "20")
    assert code == 0
    assert "20 test images" in out
    assert len(certificates(runs / "acert" / "certificates")) == 20


def test_certified_radii_hold_under_attack(runs):
    """Random corners of the certified ball, and the bound itself, on the model of the file."""
    model = load_model(runs / "acert" / "model.safetensors")
    data = load_dataset("digits", Request()).test
    images, labels = data.images.float() / 255, data.labels
    radii = torch.tensor([float(row["radius"]) for row in certificates(runs / "acert")])
    sure = radii > 0
    assert sure.sum() > 0.8 * len(radii)
    images, labels, radii = images[sure], labels[sure], radii[sure]
    # In float64, and with room for what float32 rounded at the end of a bracket.
    exact = certified_margins(model.double(), images.double(), labels, radii.double())
    assert (exact < 1e-5).all()
    model.float()
    torch.manual_seed(0)
    for _ in range(50):
        corners = torch.randint(0, 2, images.shape) * 2 - 1
        attacked = (images + radii.view(-1, 1, 1, 1) * corners).clamp(0, 1)
        assert (model(attacked).argmax(1) == labels).all()


def start(*arguments):
    """`ibp` in a process of its own, with pipes."""
    command = [sys.executable, "-m", "ibpcore_cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_epochs(run, epochs, process):
    """Until that many epochs are finished; the next one has then just begun."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) >= epochs:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {epochs} epochs: {process.communicate()}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing cut off."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_ibp("train", *LONG, "--out", folder).code == 0
    return folder


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_cut_off_in_an_epoch_ends_the_same(tmp_path, whole, how):
    broken = tmp_path / "broken"
    process = start("train", *LONG, "--out", str(broken))
    wait_for_epochs(broken, 2, process)
    time.sleep(0.1)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert not (broken / "summary.json").exists(), "it was over before it could be stopped"
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines() == [f"Error: stopped; resume with: ibp train --resume {broken}"]
    load_model(broken / "model.safetensors")

    code, _, err = run_ibp("train", "--resume", str(broken))
    assert (code, err) == (0, "")
    for name in ("model.safetensors", "certificates.csv", "config.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert [path.name for path in broken.iterdir() if path.name.startswith(".")] == []


def test_ctrl_c_while_torch_is_imported(monkeypatch):
    """The import of the commands, which brings torch in, is broken off."""

    class Interrupted(types.ModuleType):
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "ibpcore_cli.commands", Interrupted("commands"))
    assert run_ibp("train") == (130, "", "Error: stopped\n")


def test_quiet_in_a_pipe_alive_on_a_terminal(tmp_path):
    piped = start("train", *SMALL, "--out", str(tmp_path / "piped"))
    out, err = piped.communicate(timeout=120)
    assert (piped.returncode, err) == (0, "")
    assert len(out.splitlines()) < 20
    assert out.count("\nepoch ") == 4

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "ibpcore_cli", "train", *SMALL, "--out", str(tmp_path / "tty")]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(ours, 4096):
                seen += chunk
        except OSError:  # Linux says so when the other side is closed
            pass
    assert process.returncode == 0
    for word in (b"training", b"epoch 2/4", b"loss", b"accuracy", b"left", b"certifying"):
        assert word in seen


def test_out_of_the_way_of_earlier_runs(tmp_path, monkeypatch):
    """Without --out every run gets a folder of its own."""
    monkeypatch.chdir(tmp_path)
    short = ("--epochs", "1", "--width", "2", "--hidden", "4", "--limit-train", "64")
    for _ in range(2):
        assert run_ibp("train", *short)[0] == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "digits-acert",
        "digits-acert-2",
    ]


def test_epsilons_are_typed_as_fractions(tmp_path):
    out = tmp_path / "run"
    short = ("--epochs", "1", "--width", "2", "--hidden", "4", "--limit-train", "64")
    assert run_ibp("train", *short, "--epsilon-max", "8.8/255", "--out", str(out))[0] == 0
    assert json.loads((out / "config.json").read_text())["epsilon_max"] == 8.8 / 255


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("certify", "-h")])
def test_help(arguments):
    code, out, err = run_ibp(*arguments)
    assert (code, err) == (0, "")
    assert "Usage" in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_certifies_like_the_cpu(tmp_path):
    short = ("--epochs", "3", "--width", "8", "--hidden", "32")
    assert run_ibp("train", *short, "--device", "cuda", "--out", str(tmp_path / "run"))[0] == 0
    model = str(tmp_path / "run" / "model.safetensors")
    assert run_ibp("certify", model, "--device", "cpu", "--out", str(tmp_path / "cpu"))[0] == 0
    on_gpu, on_cpu = certificates(tmp_path / "run"), certificates(tmp_path / "cpu")
    for a, b in zip(on_gpu, on_cpu, strict=True):
        assert float(a["radius"]) == pytest.approx(float(b["radius"]), rel=1e-3, abs=1e-5)
