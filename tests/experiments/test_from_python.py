"""`ibpcore.train`, `resume`, `load_run` and `evaluate` do what the commands do."""

import builtins
import csv
import json
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import run_ibp, write_mnist, write_tree
from torch import nn

import ibpcore
from ibpcore import UserError
from ibpcore.data.arrays import PIXEL_TYPES, image_set, own_dataset
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.data.sources import Request, load_dataset
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalSequential

SMALL = {"epochs": 2, "warmup": (1, 1), "width": 2, "hidden": 8, "batch_size": 16}
LIMITS = {"limit_train": 64, "limit_test": 20}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on digits, and the rows that its callback received."""
    rows = []
    folder = tmp_path_factory.mktemp("runs") / "run"
    made = ibpcore.train(
        "digits", out=folder, epsilon_max="16/255", on_epoch=rows.append, **SMALL, **LIMITS
    )
    assert made.history == rows
    return made


def options(settings):
    """Settings as options of `ibp train`."""
    texts = {name: ":".join(map(str, v)) if name == "warmup" else v for name, v in settings.items()}
    return [word for name, v in texts.items() for word in (f"--{name.replace('_', '-')}", v)]


def without_seconds(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def test_a_run_is_that_of_the_command(run, tmp_path, capsys):
    given = options({**SMALL, **LIMITS, "epsilon_max": "16/255"})
    assert run_ibp("train", *given, "--out", tmp_path / "run").code == 0
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {path.name for path in run.folder.iterdir()}
    for name in ("config.json", "model.safetensors", "certificates.csv"):
        assert (run.folder / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    rows = without_seconds(tmp_path / "run" / "metrics.jsonl")
    assert rows == without_seconds(run.folder / "metrics.jsonl")


def test_a_run_says_what_it_holds(run):
    assert run.config.epsilon_max == 16 / 255
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert run.summary == json.loads((run.folder / "summary.json").read_text())
    with open(run.folder / "certificates.csv") as file:
        rows = list(csv.DictReader(file))
    assert run.certificates.radius.tolist() == [float(row["radius"]) for row in rows]
    assert run.certificates.upper.tolist() == [float(row["upper"]) for row in rows]
    assert not run.model.training
    again = ibpcore.load_run(str(run.folder))
    for one, other in zip(again.certificates, run.certificates, strict=True):
        assert torch.equal(one, other)
    assert repr(again) == repr(run)
    assert len(repr(run)) < 300
    loaded = ibpcore.load_model(run.folder)
    assert torch.equal(loaded(torch.ones(1, 1, 8, 8)), run.model(torch.ones(1, 1, 8, 8)))


def test_certificates_of_another_model_are_refused(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "run")
    model = ibpcore.load_model(folder)
    with torch.no_grad():
        next(model.parameters()).mul_(1.0001)
    ibpcore.save_model(model, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"summary\.json is not of the model beside it"):
        ibpcore.load_run(folder)


def test_an_interrupted_run_is_resumed(run, tmp_path, monkeypatch):
    def interrupt(row):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt, match=r"ibpcore\.resume\('runs/digits-acert'\)"):
        ibpcore.train("digits", on_epoch=interrupt, epsilon_max="16/255", **SMALL, **LIMITS)
    with pytest.raises(UserError, match="not complete"):
        ibpcore.load_run("runs/digits-acert")
    rows = []
    resumed = ibpcore.resume("runs/digits-acert", on_epoch=rows.append)
    assert [row["epoch"] for row in rows] == [1, 2]
    content = (resumed.folder / "model.safetensors").read_bytes()
    assert content == (run.folder / "model.safetensors").read_bytes()
    # A cell that is run again makes another run, and resuming a complete one changes nothing.
    before = {path: path.read_bytes() for path in resumed.folder.iterdir()}
    assert ibpcore.resume(resumed.folder).summary == resumed.summary
    assert before == {path: path.read_bytes() for path in resumed.folder.iterdir()}
    other = ibpcore.train("digits", **{**SMALL, "epochs": 1}, **LIMITS)
    assert other.folder.name == "digits-acert-2"


def own_images(count=50, classes=3):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 3, 6, 6), dtype=np.uint8), np.arange(count) % classes


def test_images_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = own_images()
    run = ibpcore.train((images, labels), **SMALL)
    assert run.folder.name == "own-acert"
    assert run.summary["samples"] == 10
    floats = torch.from_numpy(images).float() / 255
    split = ibpcore.train(
        (floats[:40], labels[:40].tolist()),
        test=(floats[40:], labels[40:]),
        classes=["cat", "dog", "ship"],
        seed=np.int64(1),
        kappa=np.float64(0.5),
        **SMALL,
    )
    assert split.summary["samples"] == 10
    assert split.certificates.label.tolist() == labels[40:].tolist()
    found = ibpcore.evaluate(split, (images[40:], labels[40:]))
    assert torch.equal(found.certificates.radius, split.certificates.radius)
    # Neither a command nor a run without the images can find them again.
    with pytest.raises(UserError, match="give them again as data"):
        ibpcore.resume(run.folder, epochs=run.config.epochs + 1)
    for again in (ibpcore.resume(run.folder), ibpcore.resume(run.folder, (images, labels))):
        assert again.summary == run.summary
    with pytest.raises(UserError, match="changed since the run began"):
        ibpcore.resume(run.folder, (images[::-1].copy(), labels))
    code, _, err = run_ibp("certify", run.folder)
    assert code == 1
    assert "given in Python" in err


LEVELS = torch.arange(256, dtype=torch.uint8)
FLOATS = {
    "float32": as_pixels(LEVELS),
    "product": LEVELS * (1 / 255),
    "NumPy": LEVELS.numpy() / 255,
    "NumPy, float32": LEVELS.numpy() / np.float32(255),
    **{str(kind): as_pixels(LEVELS).to(kind) for kind in PIXEL_TYPES},
    **{f"{kind} / 255": LEVELS.to(kind) / 255 for kind in PIXEL_TYPES},
}


@pytest.mark.parametrize("name", FLOATS)
def test_floats_that_were_bytes_are_these_bytes(name):
    found = image_set(FLOATS[name].reshape(1, 1, 16, 16), [0])
    assert torch.equal(found.images.flatten(), LEVELS)


@pytest.mark.parametrize("shift", [3.8e-6, -2.5e-7])
def test_floats_beside_a_byte_are_refused(shift):
    """The certificate of the byte would be larger than the radius of the given image."""
    for levels in (as_pixels(LEVELS), LEVELS.double() / 255):
        moved = (levels[100] + shift).expand(1, 1, 2, 2)
        with pytest.raises(UserError, match="multiples of 1/255"):
            image_set(moved, [0])
    half = torch.nextafter(as_pixels(LEVELS[100:101]).half(), torch.ones(1).half())
    with pytest.raises(UserError, match="multiples of 1/255"):
        image_set(half.expand(1, 1, 2, 2), [0])
    eighth = (LEVELS / 255).to(torch.float8_e4m3fn).reshape(1, 1, 16, 16)
    with pytest.raises(UserError, match=r"but are torch\.float8"):
        image_set(eighth, [0])


def test_a_data_set_in_memory(run, tmp_path):
    data = load_dataset("digits", Request())
    made = ibpcore.train(data, out=tmp_path / "run", epsilon_max="16/255", **SMALL, **LIMITS)
    content = (made.folder / "model.safetensors").read_bytes()
    assert content == (run.folder / "model.safetensors").read_bytes()
    assert made.summary["weights"] == run.summary["weights"]
    held = load_dataset("digits", Request(limit_train=80, limit_test=20, validation=16))
    made = ibpcore.train(held, out=tmp_path / "held", **SMALL)
    assert made.config.validation == 16
    assert (made.folder / "validation.json").exists()


def test_the_folder_of_data_sets_is_that_of_the_command_line(tmp_path, monkeypatch):
    write_mnist(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IBP_DATA_DIR", str(tmp_path / "elsewhere"))
    run = ibpcore.train("mnist", **{**SMALL, "epochs": 1})
    monkeypatch.delenv("IBP_DATA_DIR")
    with pytest.raises(UserError, match="data/MNIST"):
        ibpcore.evaluate(run.model, "mnist", epsilon_max=0.4)
    for given in ({}, {"data_dir": "elsewhere"}):  # the run remembers it
        found = ibpcore.evaluate(run, **given)
        assert torch.equal(found.certificates.radius, run.certificates.radius)


def test_a_network_of_ones_own(tmp_path, monkeypatch):
    def build(in_shape, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))

    settings = {"epochs": 1, "batch_size": 16, **LIMITS}
    with pytest.raises(UserError, match="model must be a function at the top of a module"):
        ibpcore.train("digits", model=build, out=tmp_path / "run", **settings)
    notebook = ModuleType("notebook_of_a_test")
    monkeypatch.setitem(sys.modules, notebook.__name__, notebook)
    build.__module__, build.__qualname__ = notebook.__name__, "build"
    notebook.build = build
    run = ibpcore.train("digits", model=build, out=tmp_path / "run", **settings)
    assert run.config.model == "notebook_of_a_test:build"
    assert type(run.model[1]).__name__ == "IntervalLinear"


IMAGES, LABELS = own_images()
DATA = own_dataset(IMAGES, LABELS, None, None)


def with_parts(**parts):
    return replace(DATA, **parts)


def cut(images):
    return ImageSet(images.images[..., :5], images.labels)


def relabelled(images, label):
    return ImageSet(images.images, torch.full_like(images.labels, label))


REFUSED_BY_TRAIN = {
    "unknown setting lerning_rate; did you mean learning_rate": {"lerning_rate": 0.1},
    "epsilon_max must be a number such as 0.1 or 8/255": {"epsilon_max": "8 of 255"},
    "box_size is for sabr, staps, not for acert": {"box_size": 0.3},
    "method must be one of": {"method": "trades"},
    "data must be one of digits, .*, but is 'mnits'": {"data": "mnits"},
    r"data must be \(images, labels\), not Tensor": {"data": torch.rand(2, 1, 8, 8)},
    "test and classes can be given only for": {"data": "digits", "classes": ["a"]},
    r"images must be \(N, C, H, W\)": {"data": (IMAGES[0, 0], LABELS)},
    "as if channels came last": {"data": (IMAGES.transpose(0, 2, 3, 1), LABELS)},
    "must lie in": {"data": (IMAGES * 1.0, LABELS)},
    "multiples of 1/255": {"data": (IMAGES / 300, LABELS)},
    "uint8, or floats": {"data": (IMAGES.astype(np.int64), LABELS)},
    "50 images with 20 labels": {"data": (IMAGES, LABELS[:20])},
    r"labels must be \(N,\) whole numbers": {"data": (IMAGES, LABELS / 2)},
    "must not be negative": {"data": (IMAGES, LABELS - 1)},
    "there are no images": {"data": (IMAGES[:0], LABELS[:0])},
    "need 3 classes, not 2": {"data": (IMAGES, LABELS), "classes": ["a", "b"]},
    "but test images are": {"data": (IMAGES, LABELS), "test": (IMAGES[..., :5], LABELS)},
    "too few to hold some out": {"data": (IMAGES[:4], LABELS[:4])},
    "limit_test must be at least 1": {"data": (IMAGES, LABELS), "limit_test": 0},
    "limit_train must be at least 1": {"data": (IMAGES, LABELS), "limit_train": -3},
    "has no test images": {"data": with_parts(test=DATA.test[:0])},
    "has no training images": {"data": with_parts(train=DATA.train[:0])},
    "has no validation images": {"data": with_parts(validation=DATA.train[:0])},
    "the validation images": {"data": with_parts(validation=cut(DATA.train))},
    "has a label 3, but 3 classes": {"data": with_parts(test=relabelled(DATA.test, 3))},
    "has a label -1, but 3 classes": {"data": with_parts(train=relabelled(DATA.train, -1))},
    "images must be a dense tensor": {"data": (torch.empty(9, 1, 8, 8, device="meta"), LABELS)},
    "labels must be a dense tensor": {"data": (IMAGES, torch.from_numpy(LABELS).to_sparse())},
    "labels must be below 1048576": {"data": (IMAGES, LABELS * 2**19)},
    "classes must be a list of names": {"data": (IMAGES, LABELS), "classes": 3},
    "not 'abc'": {"data": (IMAGES, LABELS), "classes": "abc"},
    "dataset is the first argument": {"dataset": "mnist"},
    "on_epoch must be a function": {"on_epoch": 3},
    "the path of the data sets must be": {"data_dir": 3},
    "image_size can be given only": {"data": (IMAGES, LABELS), "image_size": 8},
    "already exists and is not empty": {"out": "."},
    "there is no CUDA device": {"device": "cuda"},
    "device must be auto, cpu, cuda or cuda:1": {"device": "gpu"},
}


@pytest.mark.parametrize("message", REFUSED_BY_TRAIN)
def test_what_train_refuses(message, tmp_path, monkeypatch):
    if "CUDA" in message and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        ibpcore.train(**{"data": "digits", **SMALL, **REFUSED_BY_TRAIN[message]})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_evaluation_is_that_of_the_command(run, tmp_path):
    found = ibpcore.evaluate(run.model, "digits", "8/255", limit=30, bound="crown-ibp")
    words = ("--epsilon-max", "8/255", "--limit-test", 30, "--bound", "crown-ibp")
    assert run_ibp("certify", run.folder, *words, "--out", tmp_path / "out").code == 0
    written = found.write(tmp_path / "written")
    table = (written / "certificates.csv").read_bytes()
    assert table == (tmp_path / "out" / "certificates.csv").read_bytes()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    same = found.summary.keys() - {"method"}
    assert {name: summary[name] for name in same} == {name: found.summary[name] for name in same}
    assert (found.accuracy, found.acr, found.art) == tuple(
        summary[name] for name in ("accuracy", "acr", "art")
    )
    for text, share in summary["certified_accuracy"].items():
        assert found.certified_accuracy(text) == share
    assert len(repr(found)) < 300
    with pytest.raises(UserError, match="already exists and is not empty"):
        found.write(tmp_path / "written")


def test_an_evaluation_takes_a_run_a_folder_or_a_file(run):
    model = run.folder / "model.safetensors"
    every = [ibpcore.evaluate(m, limit=20) for m in (run, run.folder, str(run.folder), model)]
    assert {found.epsilon_max for found in every} == {16 / 255}
    assert {found.summary["method"] for found in every} == {"acert"}
    model = ibpcore.load_model(run.folder).train()
    found = ibpcore.evaluate(model, "digits", 16 / 255, limit=20)
    assert model.training
    assert torch.equal(found.certificates.radius, every[0].certificates.radius)


def test_what_evaluate_refuses(run):
    parts = IntervalSequential(IntervalFlatten(), IntervalLinear(64, 10)).eval()
    for message, arguments in {
        "give data and epsilon_max": (run.model,),
        r"plain Linear .*: call ibpcore\.convert": (nn.Linear(64, 10), "digits", 0.1),
        r"what images it takes: call ibpcore\.convert": (parts, "digits", 0.1),
        "unknown data set": (run, "mnits"),
        r"takes images \(1, 8, 8\) of 10 classes, but own images has \(3, 6, 6\)": (
            run,
            own_images(),
        ),
        "epsilon_max must be a number": (run, "digits", "a tenth"),
        "there is no model file": ("nowhere", "digits"),
    }.items():
        with pytest.raises(UserError, match=message):
            ibpcore.evaluate(*arguments)
    for name, value in (("clip", "no"), ("clip", (0, 0.5)), ("elide", 0), ("epsilon_max", True)):
        with pytest.raises(UserError, match=f"{name} must be"):
            ibpcore.evaluate(run, **{name: value})
    for message, arguments in {
        r"data must be \(images, labels\), not ndarray": {"data": IMAGES},
        "the path of the data sets must be": {"data_dir": 3},
    }.items():
        with pytest.raises(UserError, match=message):
            ibpcore.evaluate(run, **arguments)
    for part, message in {
        DATA.test[:0]: "has no test images",
        relabelled(DATA.test, 3): "has a label 3, but 3 classes",
    }.items():
        with pytest.raises(UserError, match=message):
            ibpcore.evaluate(run, with_parts(test=part))
    for limit in (0, 1.5):
        with pytest.raises(UserError, match="limit must be a whole number of at least 1"):
            ibpcore.evaluate(run, limit=limit)
    for radius in (0, -0.1, 1, "9/0", "x", None, float("nan")):
        with pytest.raises(UserError, match="radius must be"):
            run.evaluation.certified_accuracy(radius)


def test_other_classes_than_those_of_the_training_are_refused(tmp_path):
    """A label is a position in the list of classes, so it would silently mean another class."""
    trees = {"same": "abc", "fewer": "ac", "others": "xyz"}
    trees = {name: write_tree(tmp_path / name, names) for name, names in trees.items()}
    run = ibpcore.train(
        "imagefolder", data_dir=trees["same"], out=tmp_path / "run", **{**SMALL, "epochs": 1}
    )
    for model in (run, run.folder, run.folder / "model.safetensors"):
        found = ibpcore.evaluate(model, data_dir=trees["same"])
        assert torch.equal(found.certificates.radius, run.certificates.radius)
        for name, message in {
            "fewer": "of 3 classes, but .* of 2",
            "others": "other classes",
        }.items():
            with pytest.raises(UserError, match=message):
                ibpcore.evaluate(model, data_dir=trees[name])
            data = load_dataset("imagefolder", Request(data_dir=trees[name]))
            with pytest.raises(UserError, match=message):
                ibpcore.evaluate(model, data)


def test_a_model_that_takes_any_size_is_not_given_another():
    layers = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)]
    model = ibpcore.convert(nn.Sequential(*layers).eval(), (1, 8, 8))
    with pytest.raises(UserError, match=r"takes images \(1, 8, 8\) of 2 classes, but"):
        ibpcore.evaluate(model, (IMAGES[:, :1], LABELS % 2), 0.1)


def test_the_curve_is_drawn_into_axes(run):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.add_subplot()
    assert run.evaluation.plot(axes) is axes
    assert axes.get_xlabel()
    assert axes.lines
    with pytest.raises(UserError, match="axes must be those of matplotlib"):
        run.evaluation.plot(3)


def test_without_matplotlib_the_extra_is_named(run, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'ibpcore\[plot\]'"):
        run.evaluation.plot()


def test_a_run_is_trained_further(run, tmp_path, monkeypatch):
    """As by `ibp train --resume RUN --epochs`; what it was is kept."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    for epochs in ("2", 2.5, True, 0):
        with pytest.raises(UserError, match="epochs must be a whole number"):
            ibpcore.resume(folder, epochs=epochs)
    with pytest.raises(UserError, match="on_epoch must be a function"):
        ibpcore.resume(folder, epochs=9, on_epoch="print")
    further = ibpcore.resume(folder, epochs=np.int64(run.config.epochs + 1))
    assert further.config.epochs == len(further.history) == run.config.epochs + 1
    kept = ibpcore.load_run(folder / f"epoch-{run.config.epochs}")
    assert kept.summary == run.summary
    with pytest.raises(UserError, match="so many are trained already"):
        ibpcore.resume(folder, epochs=1)


def test_a_run_starts_from_a_saved_model(run, tmp_path):
    made = ibpcore.train("digits", start=run.folder, out=tmp_path / "run", epochs=1, **LIMITS)
    assert made.config.start == run.summary["weights"]
    with pytest.raises(UserError, match="width"):
        ibpcore.train("digits", start=run.folder, out=tmp_path / "wide", width=3, **LIMITS)
    assert not (tmp_path / "wide").exists()
