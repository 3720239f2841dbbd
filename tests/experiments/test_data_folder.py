"""The folder of the images is remembered; runs, sweeps and certificates can be moved."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from helpers import run_ibp, snapshot, write_tree

from ibpcore.experiments import sweeps, test_set
from ibpcore.experiments.data_folder import DATA, data_dir_for
from ibpcore.training import loop as training

import_module("ibpcore_cli.train")  # before any function that it imports is replaced
TINY = ("--dataset", "imagefolder", "--epochs", 2, "--warmup", "1:1", "--batch-size", 4)
TINY += ("--architecture", "conv 2 3x3 s2 p1, relu, linear", "--device", "cpu")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IBP_DATA_DIR", raising=False)
    monkeypatch.setattr(test_set, "figures_possible", lambda: False)
    write_tree(tmp_path / "images", ["cat", "dog"], images=4)


@pytest.fixture
def run():
    """Trained on images of a relative folder."""
    assert run_ibp("train", *TINY, "--data-dir", "images", "--out", "run").code == 0
    return Path("run")


def stopped(monkeypatch, *command, place, name):
    """`ibp COMMAND`, stopped by Ctrl-C where it calls a function; its message."""

    def stops(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, name, stops)
        code, _, err = run_ibp(*command)
    assert code == 130
    return err


def moved_on(monkeypatch, folder):
    """A new current folder, in which nothing relative to the old one is found."""
    folder.mkdir()
    monkeypatch.chdir(folder)


def test_a_run_is_resumed_without_its_data_folder(monkeypatch, tmp_path):
    begin = ("train", *TINY, "--data-dir", "images", "--out", "run")
    stopped(monkeypatch, *begin, place=training, name="run_epoch")
    assert json.loads(Path("run", DATA).read_text()) == {"data_dir": str(tmp_path / "images")}
    moved_on(monkeypatch, tmp_path / "x")
    code, out, err = run_ibp("train", "--resume", "../run", "--device", "cpu")
    assert (code, err) == (0, "")
    assert out.endswith("ibp certify ../run/model.safetensors\n")
    assert run_ibp("train", "--resume", "../run", "--epochs", 3, "--device", "cpu").code == 0


def test_what_uses_the_model_finds_the_data(run, monkeypatch, tmp_path):
    moved_on(monkeypatch, tmp_path / "x")
    quick = ("--restarts", 1, "--steps", 1, "--no-autoattack")
    for command in (
        ("certify", "../run"),
        ("certify", "../run/model.safetensors", "--out", "more"),
        ("attack", "../run", *quick),
        ("inspect", "../run", "--samples", 2, "--grid", 9, "--line-points", 5, "--bisections", 1),
    ):
        code, _, err = run_ibp(*command, "--device", "cpu")
        assert (code, err) == (0, ""), command


def test_certificates_are_resumed_without_their_data_folder(run, monkeypatch, tmp_path):
    """Of a model that does not remember one, and of one that does; both may have been moved."""
    shutil.copy("run/model.safetensors", "alone.safetensors")
    begin = ("certify", "alone.safetensors", "--data-dir", "images", "--out", "some/alone")
    stopped(monkeypatch, *begin, place=test_set, name="certify")
    stopped(monkeypatch, "certify", "run", place=test_set, name="certify")
    shutil.move("run", "other")
    moved_on(monkeypatch, tmp_path / "x")
    for folder in ("../some/alone", "../other/certificates"):
        code, _, err = run_ibp("certify", "--resume", folder, "--device", "cpu")
        assert (code, err) == (0, "")
        assert Path(folder, "certificates.csv").exists()


def test_a_sweep_is_resumed_without_its_data_folder(monkeypatch, tmp_path):
    options = ("--methods", "fastibp", "--data-dir", "images", "--select", "test")
    begin = ("sweep", *TINY, *options, "--out", "sweep")
    err = stopped(monkeypatch, *begin, place=sweeps, name="run_all")
    assert err == "Error: stopped; resume with: ibp sweep --resume sweep\n"
    name = "fastibp-kappa0-seed0"
    shutil.move("sweep", "moved")
    moved_on(monkeypatch, tmp_path / "x")
    code, out, err = run_ibp("sweep", "--resume", "../moved", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "ibp report ../moved" in out
    assert run_ibp("certify", f"../moved/runs/{name}", "--device", "cpu").code == 0


def test_the_environment_does_not_hide_what_a_run_remembers(run, monkeypatch):
    monkeypatch.setenv("IBP_DATA_DIR", "elsewhere")
    assert run_ibp("certify", "run", "--device", "cpu").code == 0


def test_where_a_remembered_folder_is_gone_options_and_environment_count(
    run, monkeypatch, tmp_path
):
    shutil.move("images", "pictures")
    code, _, err = run_ibp("certify", "run", "--device", "cpu")
    assert code == 1
    assert err == (
        f"Error: the images were read from {tmp_path / 'images'}, as run/data.json says, which is"
        " gone: give --data-dir\n"
    )
    assert run_ibp("certify", "run", "--data-dir", "pictures", "--device", "cpu").code == 0
    monkeypatch.setenv("IBP_DATA_DIR", "pictures")
    assert run_ibp("certify", "run", "--device", "cpu", "--out", "again").code == 0
    assert json.loads(Path("again", DATA).read_text()) == {"data_dir": str(tmp_path / "pictures")}


def test_a_moved_run_is_resumed_and_names_its_new_place(monkeypatch):
    begin = ("train", *TINY, "--data-dir", "images", "--out", "run")
    err = stopped(monkeypatch, *begin, place=test_set, name="certify")
    assert err == "Error: stopped; resume with: ibp train --resume run\n"
    shutil.move("run", "a moved one")
    err = stopped(monkeypatch, "train", "--resume", "a moved one", place=test_set, name="certify")
    assert err == "Error: stopped; resume with: ibp train --resume 'a moved one'\n"
    out = run_ibp("train", "--resume", "a moved one", "--device", "cpu").out
    assert out.endswith("ibp certify 'a moved one/model.safetensors'\n")
    held = {name: text for name, text in snapshot(Path("a moved one")).items() if text}
    assert not [name for name, text in held.items() if b"a moved one" in text or b'"run' in text]


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"data_dir": 5}', b'{"data_dir": "\\u0000"}']
)
def test_a_damaged_memory(run, content):
    (run / DATA).write_bytes(content)
    code, _, err = run_ibp("certify", "run")
    assert code == 1
    assert err.count("\n") == 1
    assert "run/data.json is damaged" in err


def test_the_first_folder_that_remembers_one_counts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / DATA).write_text(json.dumps({"data_dir": str(tmp_path / name)}))
    assert data_dir_for(None) == Path("data")
    assert data_dir_for(None, tmp_path) == Path("data")
    assert data_dir_for(None, tmp_path, tmp_path / "b", tmp_path / "a") == tmp_path / "b"
    assert data_dir_for(Path("x"), tmp_path / "b") == Path("x")
