"""Bad input: one clear line on stderr, an exit code, and nothing lost or half-written."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from helpers import (
    idx_bytes,
    run_ibp,
    snapshot,
    write_image,
    write_mnist,
    write_tinyimagenet,
    write_tree,
)

from ibpcore import load_model
from ibpcore.data.sources import CIFAR10_CLASSES
from ibpcore.nn.checkpoint import read_facts
from ibpcore.training.state import load_state

TINY = ("--epochs", 1, "--limit-train", 64, "--limit-test", 16, "--width", 2, "--hidden", 8)
MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    """A finished run on the digits: `ibp` works, so what follows fails for its own reason."""
    folder = tmp_path_factory.mktemp("good") / "run"
    outcome = run_ibp("train", *TINY, "--device", "cpu", "--out", folder)
    assert (outcome.code, outcome.err) == (0, "")
    return folder


@pytest.fixture
def run(good_run, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(good_run, tmp_path / "run"))


@pytest.fixture
def cut_run(run):
    """The same, killed before the summary was written: to resume it, its state is read."""
    (run / "summary.json").unlink()
    return run


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IBP_DATA_DIR", raising=False)


def refused(folder, *args, says):
    """Asserts that `ibp ARGS` fails in one line that has all of `says`, and writes nothing."""
    before = snapshot(folder)
    outcome = run_ibp(*args)
    assert outcome.code not in (0, None), outcome
    assert_one_line(outcome.err, says)
    assert snapshot(folder) == before
    return outcome


def assert_one_line(err, says):
    assert len(err.splitlines()) == 1, err
    assert err.startswith("Error: ")
    assert err.endswith("\n")
    for text in [says] if isinstance(says, str) else says:
        assert text in err


# Options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        *(
            (("--epsilon-max", text), ("--epsilon-max", text, "not above 0 and at most 1"))
            for text in ("0", "0/255", "1.5", "256/255", "-0.1", "nan", "inf", "1/inf", "1e-400")
        ),
        *(
            (("--epsilon-max", text), ("--epsilon-max", "is not a number such as 0.1 or 8/255"))
            for text in ("abc", "1/0", "", "/", "8/255/2", "0,1")
        ),
        (("--kappa", 2), "kappa must be in [0, 1], but is 2"),
        (("--kappa", -1), "kappa must be in [0, 1]"),
        (("--kappa", "nan"), "kappa"),
        (("--kappa", "x"), ("--kappa", "'x' is not a valid float")),
        (("--epochs", 0), "epochs must be at least 1, but is 0"),
        (("--epochs", 1.5), "--epochs"),
        (("--batch-size", 1), ("--batch-size must be at least 2", "but is 1")),
        (("--width", 0), "width must be at least 1"),
        (("--hidden", 0), "hidden must be at least 1"),
        (("--learning-rate", 0), "--learning-rate must be above 0"),
        (("--learning-rate", "inf"), "--learning-rate"),
        (("--gradient-clip", 0), "--gradient-clip must be above 0"),
        (("--padding", -1), "padding must be from 0"),
        (("--seed", -1), "seed must be from 0"),
        (("--seed", 2**70), "seed must be from 0"),
        (("--xtol", 0), "--xtol and --rtol must be above 0"),
        (("--max-iterations", -1), "--max-iterations"),
        (("--solver", "newton"), ("--solver", "brentq")),
        (("--method", "trades"), ("--method", "'trades'", "acert")),
        (("--dataset", "cifar100"), ("--dataset", "'cifar100'", "cifar10")),
        (("--schedule", "cosine"), ("--schedule", "smoothed")),
        (("--initialization", "xavier"), ("--initialization", "kaiming")),
        (("--no-adaptive",), "adaptive must be on for acert"),
        (("--method", "standard", "--adaptive"), "adaptive must be off for standard"),
        (("--method", "acert", "--random-radii"), "--random-radii must be off for acert"),
        (("--method", "standard", "--initial-kappa", 0.5), "staps, not for standard"),
        (("--method", "standard", "--train-epsilon-factor", 1.1), "staps, not for standard"),
        (("--initial-kappa", 2), "--initial-kappa must be in [0, 1], or left out"),
        (("--box-size", 0.3), "--box-size is for sabr, staps, not for acert"),
        (("--classifier-size", 2), "--classifier-size is for taps, staps, not for acert"),
        (("--method", "taps", "--box-size", 0.3), "--box-size is for sabr, staps, not for taps"),
        (("--method", "sabr", "--loss-fusion"), "--loss-fusion is for crown-ibp, not for sabr"),
        (("--method", "sabr", "--attack-scale", 2), "for mtl-ibp, cc-ibp, exp-ibp, not for sabr"),
        (("--box-size", 0), "--box-size must be above 0 and at most 1"),
        (("--relu-shrinkage", 1), "--relu-shrinkage must be from 0 to below 1"),
        (("--ibp-weight", 1.5), "--ibp-weight must be in [0, 1]"),
        (("--attack-steps", 0), "--attack-steps must be at least 1"),
        (("--attack-steps", 0.5), "--attack-steps"),
        (("--attack-step-size", 0), "--attack-step-size must be above 0"),
        (("--attack-scale", "inf"), "--attack-scale must be a finite number"),
        (("--warmup", "5:2"), ("warmup must be FIRST:LAST", "(5, 2)")),
        (("--warmup", "0:2"), "warmup must be FIRST:LAST"),
        *((("--warmup", text), "is not FIRST:LAST") for text in ("x", "1", "1:2:3", "1:x", "")),
        (("--limit-train", 0), "--limit-train"),
        (("--limit-test", 0), "--limit-test"),
        (("--image-size", 8), "--image-size must be left out, except for the data set imagefolder"),
        (("--dataset", "imagefolder", "--image-size", 0), "--image-size"),
        (("--device", "tpu"), ("--device", "'tpu' is not auto, cpu, cuda, or cuda:1")),
        (("--device", "cuda:x"), ("--device", "'cuda:x' is not auto, cpu")),
        (("--epsilonmax", 1), "No such option"),
        (("--epochs",), "--epochs"),
        (("stray",), "stray"),
    ],
)
def test_train_refuses_options(tmp_path, options, says):
    refused(tmp_path, "train", *TINY, "--out", tmp_path / "run", *options, says=says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--epsilon-max", 0), "not above 0 and at most 1"),
        (("--xtol", -1), "--xtol and --rtol must be above 0"),
        (("--rtol", "nan"), "--xtol and --rtol must be above 0"),
        (("--solver", "x"), "--solver"),
        (("--dataset", "x"), "--dataset"),
        (("--image-size", 8), "--image-size must be left out, except for the data set imagefolder"),
        (("--epochs", 1), "No such option"),
    ],
)
def test_certify_refuses_options(tmp_path, run, options, says):
    refused(tmp_path, "certify", run, *options, says=says)


WITH_DEVICE = {
    "train": TINY,
    "sweep": TINY,
    "search": TINY,
    "verify": ("net.onnx", "property.vnnlib"),
    "predict": ("image.png", "--model", "run"),
    **dict.fromkeys(("certify", "attack", "inspect"), ("run",)),
}


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("command", WITH_DEVICE)
def test_cuda_where_there_is_none(tmp_path, run, monkeypatch, command, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_ibp("certify", run, "--out", run / "certificates")
    given = (command, *WITH_DEVICE[command], "--device", device)
    refused(tmp_path, *given, says="there is no CUDA device")


def test_an_unknown_command(tmp_path):
    refused(tmp_path, "defend", says="No such command 'defend'")


def test_the_command_that_is_named_takes_a_folder_with_a_space(tmp_path):
    run = tmp_path / "one two"
    _, out, _ = run_ibp("train", *TINY, "--out", run)
    assert f"certify again with: ibp certify '{run}/model.safetensors'" in out


def test_no_command_shows_the_help():
    outcome = run_ibp()
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) > 5
    assert outcome.err == ""


def test_a_network_beyond_memory(tmp_path):
    outcome = run_ibp("train", *TINY, "--width", 3_000_000, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert_one_line(outcome.err, ("out of memory", "--width"))


def test_too_few_images(tmp_path):
    outcome = run_ibp("train", *TINY, "--limit-train", 1, "--out", tmp_path / "run")
    assert outcome.code == 1
    assert_one_line(outcome.err, "1 training image cannot be trained on")
    assert snapshot(tmp_path / "run") == {}


def test_one_image_is_no_plural(run):
    out = run_ibp("certify", run, "--limit-test", 1, "--out", "one").out
    assert "UCI optical digits, 1 test image, epsilon_max" in out
    out = run_ibp("train", *TINY, "--limit-train", 2, "--batch-size", 2, "--dry-run").out
    assert "# 1 step an epoch, 1 in all" in out


def test_a_summary_is_no_table_of_certificates(tmp_path, run):
    says = ("summary.json is not a table of certificates", "certificates.csv, with its")
    refused(tmp_path, "attack", run, "--certificates", run / "summary.json", says=says)


# Output folders


def test_out_is_not_empty(tmp_path, run):
    says = ("run already exists and is not empty",)
    refused(tmp_path, "train", *TINY, "--out", run, says=says)
    refused(tmp_path, "certify", run, "--out", run, says=says)


def test_out_is_a_file(tmp_path, run):
    (tmp_path / "file").write_text("mine")
    says = ("cannot make the folder", "file")
    refused(tmp_path, "train", *TINY, "--out", tmp_path / "file", says=says)
    refused(tmp_path, "certify", run, "--out", tmp_path / "file", says=says)


def test_out_lies_below_a_file(tmp_path, run):
    (tmp_path / "file").write_text("mine")
    says = ("cannot make the folder", "Not a directory")
    refused(tmp_path, "train", *TINY, "--out", tmp_path / "file" / "run", says=says)
    refused(tmp_path, "certify", run, "--out", tmp_path / "file" / "run", says=says)


def test_default_folders_are_never_reused(tmp_path, run):
    """Without --out a second run gets a folder of its own."""
    for number in ("", "-2"):
        assert run_ibp("train", *TINY).code == 0
        assert (tmp_path / "runs" / f"digits-acert{number}" / MODEL).is_file()
        assert run_ibp("certify", run, "--limit-test", 4).code == 0
        assert (run / f"certificates{number}" / "summary.json").is_file()


# Data sets


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mnist", ("MNIST/raw is not there", "--data-dir", "--download")),
        ("cifar10", ("cifar-10-batches-py is not there", "--data-dir", "--download")),
        ("tinyimagenet", ("tiny-imagenet-200 is not there", "--data-dir", "--download")),
        ("imagefolder", ("no folder", "train", "--data-dir")),
    ],
)
def test_missing_data_sets(tmp_path, run, name, says):
    """Both when the data folder is missing and when it is empty."""
    for folder in (tmp_path / "none", tmp_path / "empty"):
        options = ("--dataset", name, "--data-dir", folder)
        refused(tmp_path, "train", *TINY, *options, says=says)
        refused(tmp_path, "certify", run, *options, says=says)
        (tmp_path / "empty").mkdir(exist_ok=True)


def test_the_data_folder_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    says = ("--data-dir", "is a file")
    refused(tmp_path, "train", "--dataset", "mnist", "--data-dir", tmp_path / "file", says=says)


def no_raw_file(name):
    return lambda root: (root / "MNIST" / "raw" / name).unlink()


def raw_file(name, change):
    def damage(root):
        file = root / "MNIST" / "raw" / name
        file.write_bytes(change(file.read_bytes()))

    return damage


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
MNIST_DAMAGE = {
    "images cut": (
        raw_file(IMAGES, lambda b: b[:5000]),
        ("cannot be read", "should hold (40, 28, 28) bytes, but has 4984"),
    ),
    "images cut in the head": (raw_file(IMAGES, lambda b: b[:9]), "cannot be read"),
    "images empty": (raw_file(IMAGES, lambda b: b""), "cannot be read"),
    "images are a web page": (raw_file(IMAGES, lambda b: b"<html>404</html>" * 99), "--download"),
    "images too long": (raw_file(IMAGES, lambda b: b + b"x"), "cannot be read"),
    "images gone": (no_raw_file(IMAGES), f"raw lacks {IMAGES}, packed or not: --download"),
    "labels cut": (raw_file(LABELS, lambda b: b[:-1]), "cannot be read"),
    "labels gone": (no_raw_file(LABELS), f"raw lacks {LABELS}, packed or not: --download"),
    "labels fewer": (
        raw_file(LABELS, lambda b: idx_bytes(np.zeros(5, np.uint8))),
        "not as many labels as images of t10k: 5 and 20",
    ),
    "labels are images": (
        raw_file(LABELS, lambda b: idx_bytes(np.zeros((20, 28, 28), np.uint8))),
        "cannot be read",
    ),
    "labels of other classes": (
        raw_file(LABELS, lambda b: idx_bytes(np.full(20, 99, np.uint8))),
        "a label 99, but 10 classes",
    ),
}


@pytest.mark.parametrize("case", MNIST_DAMAGE)
def test_damaged_mnist(tmp_path, case):
    damage, says = MNIST_DAMAGE[case]
    damage(write_mnist(tmp_path))
    refused(tmp_path, "train", *TINY, "--dataset", "mnist", "--data-dir", tmp_path, says=says)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-40])


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


CIFAR_DAMAGE = {
    "no class": (lambda t: shutil.rmtree(t / "train" / "cat"), ("match", "cat is missing")),
    "a class too many": (lambda t: (t / "test" / "cow").mkdir(), ("match", "cow is extra")),
    "no test": (lambda t: shutil.rmtree(t / "test"), ("no folder", "test")),
    "empty class": (lambda t: empty(t / "test" / "dog"), "test/dog: no images"),
    "truncated image": (
        lambda t: truncate(t / "train" / "cat" / "1.jpg"),
        ("cannot read", "cat/1.jpg"),
    ),
}


@pytest.mark.parametrize("case", CIFAR_DAMAGE)
def test_damaged_cifar10_tree(tmp_path, case):
    damage, says = CIFAR_DAMAGE[case]
    damage(write_tree(tmp_path / "cifar10-jpeg", CIFAR10_CLASSES, suffix=".jpg"))
    refused(tmp_path, "train", *TINY, "--dataset", "cifar10", "--data-dir", tmp_path, says=says)


def test_damaged_official_cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(b"not the official file")
    says = ("cifar-10-batches-py cannot be read", "corrupted", "--download")
    refused(tmp_path, "train", *TINY, "--dataset", "cifar10", "--data-dir", tmp_path, says=says)


def rewrite(name, text):
    return lambda top: (top / name).write_text(text)


def delete(name):
    return lambda top: (top / name).unlink()


def delete_folder(name):
    return lambda top: shutil.rmtree(top / name)


ANNOTATIONS = "val/val_annotations.txt"
TINY_DAMAGE = {
    "no wnids": (delete("wnids.txt"), ("wrong layout", "wnids.txt is missing")),
    "empty wnids": (rewrite("wnids.txt", "\n"), ("wrong layout", "wnids.txt is empty")),
    "a wnid without images": (rewrite("wnids.txt", "n01\nn02\nn03\nn04\n"), "n04 is missing"),
    "images of no wnid": (rewrite("wnids.txt", "n01\nn02\n"), "n03 is extra"),
    "no annotations": (delete(ANNOTATIONS), ("wrong layout", "val_annotations.txt is missing")),
    "empty annotations": (rewrite(ANNOTATIONS, ""), "val_annotations.txt is empty"),
    "an unknown wnid": (
        rewrite(ANNOTATIONS, "val_0.JPEG\tn01\t0\t0\t7\t7\nval_1.JPEG\tn99\t0\t0\t7\t7\n"),
        ("val_annotations.txt, line 2", "'n99' is not a class"),
    ),
    "annotations without tabs": (rewrite(ANNOTATIONS, "val_0.JPEG n01\n"), ("line 1", "class")),
    "annotations of others": (
        rewrite(ANNOTATIONS, "x.JPEG\tn01\t0\t0\t7\t7\n"),
        ("val_0.JPEG is not in", "val_annotations.txt, so that its class is unknown"),
    ),
    "no validation images": (delete_folder("val/images"), "val: no images, 1 other file"),
    "empty validation images": (lambda top: empty(top / "val/images"), "val: no images"),
    "no validation": (delete_folder("val"), ("wrong layout", "val_annotations.txt")),
    "no training": (delete_folder("train"), ("no folder", "train")),
    "no training images": (
        delete_folder("train/n02/images"),
        "n02: no images, 1 other file passed over: 1 .txt (n02_boxes.txt)",
    ),
    "truncated image": (
        lambda top: truncate(top / "val" / "images" / "val_3.JPEG"),
        ("cannot read the image", "val_3.JPEG"),
    ),
}


@pytest.mark.parametrize("case", TINY_DAMAGE)
def test_damaged_tinyimagenet(tmp_path, case):
    damage, says = TINY_DAMAGE[case]
    damage(write_tinyimagenet(tmp_path) / "tiny-imagenet-200")
    options = ("--dataset", "tinyimagenet", "--data-dir", tmp_path)
    refused(tmp_path, "train", *TINY, *options, says=says)


FOLDER_DAMAGE = {
    "no test": (delete_folder("test"), ("no folder", "test")),
    "no classes": (
        lambda t: (shutil.rmtree(t / "train"), (t / "train").mkdir()),
        "no class folders in",
    ),
    "one class": (delete_folder("train/b"), ("one class folder", "two are needed")),
    "other test classes": (
        lambda t: (t / "test" / "b").rename(t / "test" / "c"),
        ("do not match", "b is missing", "c is extra"),
    ),
    "empty class": (lambda t: empty(t / "train" / "b"), "train/b: no images"),
    "truncated image": (lambda t: truncate(t / "train" / "b" / "1.png"), ("b/1.png", "trunc")),
    "empty image": (rewrite("train/b/1.png", ""), ("cannot read the image", "b/1.png")),
    "text as image": (rewrite("test/a/0.png", "hello"), ("cannot read the image", "a/0.png")),
    "a link to nothing": (
        lambda t: (t / "test/a/x.png").symlink_to(t / "gone.png"),
        ("cannot read the image", "x.png: it is not a file"),
    ),
    "a link to a folder above": (
        lambda t: (t / "train/a/again").symlink_to(t),
        ("train/a/again", "leads back to a folder above it"),
    ),
    "a hidden class": (
        lambda t: write_image(t / "train/.cache/x.png", 0),
        ("train/.cache/x.png", "which torchvision would take for a class"),
    ),
    "only images of another kind": (
        lambda t: [f.rename(f.with_suffix(".heic")) for f in (t / "train/b").iterdir()],
        "train/b: no images, 2 other files passed over: 2 .heic (such as 0.heic; Pillow cannot",
    ),
    "sizes differ": (
        lambda t: write_image(t / "train" / "b" / "0.png", 0, (6, 9)),
        ("b/0.png has 6x9 pixels", "8x8", "--image-size"),
    ),
    "test has another size": (
        lambda t: [write_image(file, 0, (6, 9)) for file in (t / "test").rglob("*.png")],
        ("(3, 8, 8)", "(3, 9, 6)", "--image-size"),
    ),
}


@pytest.mark.parametrize("case", FOLDER_DAMAGE)
def test_damaged_imagefolder(tmp_path, case):
    damage, says = FOLDER_DAMAGE[case]
    damage(write_tree(tmp_path, "ab"))
    options = ("--dataset", "imagefolder", "--data-dir", tmp_path)
    refused(tmp_path, "train", *TINY, *options, says=says)


def test_a_decompression_bomb(tmp_path, monkeypatch):
    """PIL refuses images of hundreds of millions of pixels; here its limit is lowered."""
    write_tree(tmp_path, "ab")
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    options = ("--dataset", "imagefolder", "--data-dir", tmp_path)
    refused(tmp_path, "train", *TINY, *options, says=("cannot read the image", "exceeds limit"))


# Models


def test_missing_models(tmp_path):
    (tmp_path / "folder").mkdir()
    refused(tmp_path, "certify", "none.safetensors", says="no model file none.safetensors")
    refused(tmp_path, "certify", "folder", says=f"no model file folder/{MODEL}")
    refused(tmp_path, "certify", says="Missing argument 'MODEL'")


def test_a_folder_where_the_model_should_be(tmp_path, run):
    (run / MODEL).unlink()
    (run / MODEL).mkdir()
    refused(tmp_path, "certify", run, says="no model file")


def whole(change):
    """Damages the whole content of the file."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def parts(change):
    """Damages the tensors and the metadata, then makes a valid safetensors file of them."""

    def damage(path):
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = safetensors.torch.load_file(path)
        change(tensors, metadata)
        path.write_bytes(safetensors.torch.save(tensors, metadata))

    return damage


def header_text(text):
    """Replaces all the metadata that is ours."""
    return parts(lambda _, metadata: metadata.update(ibpcore=text))


def header(change):
    """Damages the parsed metadata."""

    def damage(_, metadata):
        content = json.loads(metadata["ibpcore"])
        change(content)
        metadata["ibpcore"] = json.dumps(content)

    return parts(damage)


def replaced(content, values):
    """A JSON object with other values; `...` deletes."""
    return {k: v for k, v in {**content, **values}.items() if v is not ...}


def metadata(**values):
    def change(content):
        for name, value in values.items():
            content[name] = value
            if value is ...:
                del content[name]

    return header(change)


def architecture(**values):
    return header(lambda c: c.update(architecture=replaced(c["architecture"], values)))


def training(**values):
    return header(lambda c: c["facts"].update(training=replaced(c["facts"]["training"], values)))


def weight(value):
    return parts(lambda tensors, _: tensors["0.weight"].view(-1)[:1].fill_(value))


FLOAT8 = torch.float8_e4m3fn
INTACT = "is not an intact safetensors file"
BUILT = "describes no network that can be built"
FITS = "the weights do not fit the architecture"
MODEL_DAMAGE = {
    "empty": (whole(lambda b: b""), INTACT),
    "text": (whole(lambda b: b"hello, this is no model"), INTACT),
    "pickle": (whole(lambda b: b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00]."), INTACT),
    "cut in the header": (whole(lambda b: b[:100]), INTACT),
    "cut in the weights": (whole(lambda b: b[:-100]), INTACT),
    "foreign": (
        lambda path: safetensors.torch.save_file({"w": torch.ones(2)}, path),
        "is a safetensors file, but not a model of ibpcore",
    ),
    "no JSON": (header_text("{"), "its architecture cannot be read"),
    "a list": (header_text("[]"), "its architecture cannot be read"),
    "nested": (header_text("[" * 100_000), "cannot be read"),
    "other format": (metadata(format=99), "was written by another version"),
    "no format": (metadata(format=...), "its architecture cannot be read"),
    "no architecture": (metadata(architecture=...), "its architecture cannot be read"),
    "architecture a list": (metadata(architecture=[]), "its architecture cannot be read"),
    "architecture null": (metadata(architecture=None), "its architecture cannot be read"),
    "unknown architecture": (architecture(name="resnet50"), "an architecture unknown"),
    "unnamed architecture": (architecture(name=...), "an architecture unknown"),
    "no classes": (architecture(classes=...), (BUILT, "classes")),
    "one class": (architecture(classes=1), (BUILT, "classes must be at least 2")),
    "classes text": (architecture(classes="10"), BUILT),
    "classes fraction": (architecture(classes=9.5), BUILT),
    "shape a number": (architecture(in_shape=8), BUILT),
    "shape of text": (architecture(in_shape=["1", "8", "8"]), BUILT),
    "shape of fractions": (architecture(in_shape=[1.5, 8, 8]), BUILT),
    "width beyond memory": (architecture(width=3_000_000), FITS),
    "width beyond numbers": (architecture(width=10**30), BUILT),
    "mean text": (architecture(mean=["a"], std=["b"]), BUILT),
    "std zero": (architecture(mean=[0.5], std=[0.0]), BUILT),
    "unknown setting": (architecture(depth=9), (BUILT, "depth")),
    "other width": (architecture(width=4), FITS),
    "other shape": (architecture(in_shape=[1, 28, 28]), FITS),
    "tensor gone": (parts(lambda tensors, _: tensors.pop("0.weight")), FITS),
    "tensor too many": (parts(lambda tensors, _: tensors.update(x=torch.ones(1))), FITS),
    "statistics of another type": (
        parts(lambda tensors, _: tensors.update({"1.running_var": torch.ones(2).int()})),
        "neither all float32 nor all float64",
    ),
    "statistics that torch cannot compare": (
        parts(lambda tensors, _: tensors.update({"1.running_mean": torch.ones(2).to(FLOAT8)})),
        "neither all float32 nor all float64",
    ),
    "NaN weight": (weight(torch.nan), "0.weight holds values that are not finite"),
    "infinite weight": (weight(-torch.inf), "0.weight holds values that are not finite"),
    "no facts": (metadata(facts=...), "its facts cannot be read"),
    "facts a text": (metadata(facts="x"), "its facts cannot be read"),
    "facts a list": (metadata(facts=[1]), "its facts cannot be read"),
    "facts without training": (metadata(facts={}), "does not say how it was trained"),
    "training a list": (metadata(facts={"training": []}), "not a training configuration"),
    "training null": (metadata(facts={"training": None}), "not a training configuration"),
    "training empty": (metadata(facts={"training": {}}), "not a training configuration"),
    "training epsilon": (training(epsilon_max=3), "epsilon_max must be above 0"),
    "training type": (training(epochs="3"), "epochs must be a whole number"),
    "training unknown": (training(foo=1), "unknown setting foo"),
    "training data set": (training(dataset="cifar100"), "cifar100"),
}


@pytest.mark.parametrize("case", MODEL_DAMAGE)
def test_damaged_models(tmp_path, run, case):
    damage, says = MODEL_DAMAGE[case]
    damage(run / MODEL)
    refused(tmp_path, "certify", run / MODEL, says=says)


def test_the_damage_above_is_the_only_reason(tmp_path, run):
    """Taken apart and put together unchanged the model certifies."""
    parts(lambda tensors, entries: None)(run / MODEL)
    assert run_ibp("certify", run / MODEL, "--limit-test", 4).code == 0


def test_a_model_of_other_images(tmp_path, run):
    write_mnist(tmp_path / "data")
    says = ("takes images (1, 8, 8) of 10 classes", "MNIST has (1, 28, 28) of 10")
    refused(tmp_path, "certify", run, "--dataset", "mnist", says=says)


def test_a_model_of_other_classes(tmp_path):
    """The same images, but one class more."""
    write_tree(tmp_path / "data", "ab")
    write_tree(tmp_path / "more", "abc")
    options = ("--dataset", "imagefolder", "--out", tmp_path / "run")
    assert run_ibp("train", *TINY, *options).code == 0
    says = ("of 2 classes", "of 3")
    refused(tmp_path, "certify", "run", "--data-dir", tmp_path / "more", says=says)


# Resuming


def test_resume_takes_no_other_settings(tmp_path, run):
    for options in (
        *(("--from", MODEL), ("--method", "fastibp"), ("--dataset", "digits"), ("--out", "x")),
        *(("--seed", 1), ("--no-clip",), ("--limit-test", 16)),
    ):
        refused(tmp_path, "train", "--resume", run, *options, says="give no others")


def test_resume_of_no_run(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    refused(tmp_path, "train", "--resume", "none", says="there is no run in none: none/config")
    refused(
        tmp_path, "train", "--resume", "folder", says="there is no run in folder: folder/config"
    )
    refused(tmp_path, "train", "--resume", "file", says="file/config.json is missing")


def config(**values):
    def damage(path):
        content = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return damage


CONFIG_DAMAGE = {
    "empty": (whole(lambda b: b""), "is damaged"),
    "cut": (whole(lambda b: b[:50]), "is damaged"),
    "binary": (whole(lambda b: b"\xff\xfe\x00"), "is damaged"),
    "list": (whole(lambda b: b"[]"), "is damaged"),
    "number": (whole(lambda b: b"5"), "is damaged"),
    "nested": (whole(lambda b: b"[" * 100_000), "is damaged"),
    "missing setting": (config(epochs=...), "epochs"),
    "unknown setting": (config(foo=1), "unknown setting foo"),
    "wrong type": (config(width="2"), "width must be a whole number"),
    "warm-up": (config(warmup=[1]), "warmup"),
    "kappa": (config(kappa=2), "kappa must be in [0, 1]"),
    "data set": (config(dataset="cifar100"), ("dataset", "cifar100")),
    "other model": (config(width=3), "does not fit its configuration"),
}


@pytest.mark.parametrize("case", CONFIG_DAMAGE)
def test_damaged_config(tmp_path, cut_run, case):
    damage, says = CONFIG_DAMAGE[case]
    damage(cut_run / "config.json")
    refused(tmp_path, "train", "--resume", cut_run, says=says)


def state(change):
    """Damages what the state of the run holds."""

    def damage(path):
        content = load_state(path)
        change(content)
        torch.save(content, path)

    return damage


def flipped(content):
    """With another bit in the largest record, which torch.load would not notice."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
        place = content.index(archive.read(largest)) + largest.file_size // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


STATE_DAMAGE = {
    "missing": (Path.unlink, "resume.pt is missing"),
    "empty": (whole(lambda b: b""), "resume.pt is damaged"),
    "cut": (whole(lambda b: b[: len(b) // 2]), "resume.pt is damaged"),
    "text": (whole(lambda b: b"hello"), "resume.pt is damaged"),
    "list": (lambda path: torch.save([1], path), "resume.pt is damaged"),
    "a bit of a weight": (
        lambda path: path.write_bytes(flipped(path.read_bytes())),
        "resume.pt is damaged",
    ),
    "bare": (lambda path: torch.save({}, path), "does not fit its configuration"),
    "a weight of nan": (
        state(lambda s: next(iter(s["model"].values())).fill_(float("nan"))),
        "does not fit its configuration: a weight is not finite",
    ),
    "an epoch too many": (
        state(
            lambda s: s.update(epoch=2, history=[*s["history"], {**s["history"][0], "epoch": 2}])
        ),
        "does not fit its configuration: epoch 2 of 1 has",
    ),
    "no optimizer": (state(lambda s: s.pop("optimizer")), "does not fit its configuration"),
    "no weights": (state(lambda s: s["model"].clear()), "does not fit its configuration"),
    "other weights": (
        state(lambda s: s["model"].update({"0.weight": torch.ones(1)})),
        "does not fit its configuration",
    ),
}


@pytest.mark.parametrize("case", STATE_DAMAGE)
def test_damaged_state(tmp_path, cut_run, case):
    damage, says = STATE_DAMAGE[case]
    damage(cut_run / "resume.pt")
    refused(tmp_path, "train", "--resume", cut_run, says=says)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("model", 5), ("optimizer", 5), ("scheduler", 5), ("history", 5)),
        *(("epoch", "x"), ("epoch", float("inf")), ("epoch", -1), ("slopes", 5)),
        *(("history", []), ("history", [{}]), ("history", [{"epoch": 1, "seconds": "x"}])),
        ("history", [{"epoch": 1, "seconds": 1.0, "loss": torch.ones(1)}]),
        *(("history", [{"epoch": 1, "seconds": x}]) for x in (-1.0, float("nan"), "1", True)),
        ("history", [{"epoch": 1, "seconds": 1.0, "loss": float("inf")}]),
    ],
)
def test_state_of_other_types(tmp_path, cut_run, entry, value):
    state(lambda s: s.update({entry: value}))(cut_run / "resume.pt")
    refused(tmp_path, "train", "--resume", cut_run, says="does not fit its configuration")


def test_config_of_an_unknown_method(tmp_path, run):
    config(method="trades", epochs=2)(run / "config.json")
    refused(tmp_path, "train", "--resume", run, says=("method", "trades"))


def test_resume_brings_the_last_model_back(run):
    """The run was killed after the last state was saved, and before its model was."""
    (run / MODEL).unlink()
    assert run_ibp("train", "--resume", run).code == 0
    assert (run / MODEL).is_file()


# A full disk, and the real executable


FULL_DISK = """
import resource
from ibpcore.training import loop as training
from ibpcore_cli.main import main

whole_epoch = training.run_epoch

def run_epoch(state, *rest):
    if state.epoch == 1:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    return whole_epoch(state, *rest)

training.run_epoch = run_epoch
main()
"""


def test_a_full_disk(tmp_path):
    """No file may grow beyond 1000 bytes once the first epoch is whole."""
    pytest.importorskip("resource")
    run = tmp_path / "run"
    options = ["train", *TINY, "--epochs", 3, "--device", "cpu", "--out", run]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, options)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    then = f"once that is mended, resume with: ibp train --resume {run}"
    assert_one_line(done.stderr, f"run/resume.pt: File too large; {then}")
    # The first epoch is whole, and no temporary file is left.
    assert set(snapshot(run)) == {"config.json", "metrics.jsonl", "resume.pt", MODEL}
    assert load_state(run / "resume.pt")["epoch"] == 1
    assert load_model(run / MODEL).architecture.width == 2
    assert read_facts(run / MODEL)["epochs_trained"] == 1
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    # With room again the run goes on.
    assert run_ibp("train", "--resume", run, "--device", "cpu").code == 0
    assert read_facts(run / MODEL)["epochs_trained"] == 3


def test_the_executable(tmp_path):
    """What a shell sees of `ibp`: no output, one line of error, exit code 1."""
    ibp = shutil.which("ibp", path=str(Path(sys.executable).parent)) or shutil.which("ibp")
    if ibp is None:
        pytest.skip("the command ibp is not installed")
    done = subprocess.run(
        [ibp, "certify", "none.safetensors"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: there is no model file none.safetensors\n"
