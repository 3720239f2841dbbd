"""Pictures from files: read as data sets are, certified as they are, told without rounding up."""

import csv
import io
import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_ibp, snapshot, write_image
from PIL import Image

from ibpcore import UserError, certified_margins, cnn7, load_model, save_model
from ibpcore.bounds.epsilons import as_number
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.image_files import certify_pictures
from ibpcore.certification.radii import RadiusStatus
from ibpcore.data.batches import as_pixels
from ibpcore.data.image_files import picture_files, read_pictures
from ibpcore.data.sources import Request, load_dataset
from ibpcore.nn import IntervalLinear, Network
from ibpcore.nn.checkpoint import read_facts
from ibpcore.visualization.heatmaps import COLORS

DIGITS = load_dataset("digits", Request(limit_train=640, limit_test=40))
CLASSES = DIGITS.classes
TINY = ("--epochs", 4, "--warmup", "1:2", "--limit-train", 640, "--limit-test", 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trained just enough that some images are wrong, and some certified in part."""
    folder = tmp_path_factory.mktemp("good") / "run"
    small = ("--width", 4, "--hidden", 16, "--epsilon-max", 0.05, "--device", "cpu")
    assert run_ibp("train", *TINY, *small, "--out", folder)[::2] == (0, "")
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load_model(run / "model.safetensors")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The test images as PNG files: `<class>/<index>.png`."""
    root = tmp_path_factory.mktemp("tree")
    for index, (image, label) in enumerate(zip(*parts(), strict=True)):
        (root / CLASSES[label]).mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(root / CLASSES[label] / f"{index:02d}.png")
    return root


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def parts():
    return DIGITS.test.images, DIGITS.test.labels.tolist()


def refused(*args, says):
    """One line, and nothing on disk has changed."""
    before = snapshot(Path())
    code, out, err = run_ibp(*args)
    assert code in (1, 2)
    assert len(err.splitlines()) == 1, err
    assert err.startswith("Error: ")
    for text in [says] if isinstance(says, str) else says:
        assert text in err
    assert out == ""
    assert snapshot(Path()) == before


def in_order(pictures):
    """Their places in the data set, off their names."""
    return torch.tensor([int(path.stem) for path in pictures.paths])


# Reading


def test_files_are_read_byte_by_byte(tree):
    pictures = read_pictures([tree], CLASSES, (1, 8, 8))
    order = in_order(pictures)
    assert sorted(order.tolist()) == list(range(40))
    assert torch.equal(pictures.images, DIGITS.test.images[order])
    assert pictures.labels == DIGITS.test.labels[order].tolist()
    assert pictures.changes == [()] * 40
    assert pictures.remarks == [f"{tree}: 40 images"]
    again = read_pictures([tree], CLASSES, (3, 8, 8)).images
    assert torch.equal(again, pictures.images.expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "rgb", "grey"),
    [
        ("RGB", (200, 100, 50), ".png", (200, 100, 50), 124),
        ("RGB", (7, 7, 7), ".bmp", (7, 7, 7), 7),
        ("L", 130, ".tiff", (130, 130, 130), 130),
        ("1", 1, ".png", (255, 255, 255), 255),
        ("RGBA", (1, 2, 3, 0), ".png", (1, 2, 3), 2),
        ("P", 0, ".png", (0, 0, 0), 0),
        ("RGB", (40, 90, 200), ".webp", (40, 90, 200), 88),
    ],
)
def test_any_format_as_rgb_or_grey(mode, color, suffix, rgb, grey):
    """Grey is (19595 R + 38470 G + 7471 B) / 2^16, rounded: what is grey stays what it is."""
    Image.new(mode, (6, 5), color).save(f"a{suffix}", lossless=True)
    for channels, expected in ((3, rgb), (1, (grey,))):
        (image,) = read_pictures([Path(f"a{suffix}")], "ab", (channels, 5, 6)).images
        assert image.shape == (channels, 5, 6)
        assert image.flatten(1).T.unique(dim=0).tolist() == [list(expected)]


def test_labels_are_those_of_the_innermost_class():
    for name in ("cat/a.png", "cat/dog/b.png", "cat/x/c.png", "x/d.png", "e.PNG", "Cat/f.jpeg"):
        write_image(Path("cat") / name, 0)
    for name in (".hidden/a.png", "x/.b.png", "notes.txt", "x/more.heic"):
        path = Path("cat") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("no image")
    found, remarks = picture_files([Path("cat"), Path("cat/notes.txt")], ("cat", "dog"))
    assert [(str(path.relative_to("cat")), label) for path, label in found] == [
        ("e.PNG", None),
        (".hidden/a.png", None),
        ("Cat/f.jpeg", None),
        ("cat/a.png", 0),
        ("cat/dog/b.png", 1),
        ("cat/x/c.png", 0),
        ("x/.b.png", None),
        ("x/d.png", None),
        ("notes.txt", None),  # asked for by name
    ]
    heic = "1 .heic (x/more.heic; Pillow cannot read them: convert them to PNG or JPEG)"
    told = f"cat: 8 images, 2 other files passed over: 1 .txt (notes.txt), {heic}"
    assert remarks == [told]


def test_links_to_folders_are_followed_but_not_round():
    write_image(Path("a/b.png"), 0)
    write_image(Path("elsewhere/c.png"), 0)
    Path("a/cat").symlink_to(Path("elsewhere").resolve())
    assert picture_files([Path("a")], ["cat"])[0] == [
        (Path("a/b.png"), None),
        (Path("a/cat/c.png"), 0),
    ]
    Path("elsewhere/again").symlink_to(Path("a").resolve())
    with pytest.raises(UserError, match=r"the link a/cat/again leads back to a folder above it"):
        picture_files([Path("a")], ["cat"])


def test_another_size_is_resized_if_asked():
    """40 x 20 pixels, white but for its sides: its centre, 10 x 10, is white all over."""
    pixels = np.zeros((20, 40), np.uint8)
    pixels[:, 6:34] = 255
    Image.fromarray(pixels).save("wide.png")
    write_image(Path("fits.png"), (9, 9, 9), (10, 10))
    pictures = read_pictures([Path("wide.png"), Path("fits.png")], "ab", (1, 10, 10), 10)
    assert pictures.changes == [("resized",), ()]
    assert pictures.images[0].unique().tolist() == [255]
    assert pictures.images[1].unique().tolist() == [9]
    with pytest.raises(UserError, match=r"wide.png has 40x20 pixels.* 10x10: --image-size 10"):
        read_pictures([Path("fits.png"), Path("wide.png")], "ab", (1, 10, 10))
    with pytest.raises(UserError, match="takes 10x10 pixels, not 9x9"):
        read_pictures([Path("fits.png")], "ab", (1, 10, 10), 9)
    with pytest.raises(UserError, match=r"takes 10x8$"):
        read_pictures([Path("fits.png")], "ab", (1, 8, 10))
    with pytest.raises(UserError, match="2 channels, neither grey nor RGB"):
        read_pictures([Path("fits.png")], "ab", (2, 10, 10))


# Certifying


def test_certificates_are_those_of_a_data_set(model, tree):
    pictures = read_pictures([tree], CLASSES, (1, 8, 8))
    found = certify_pictures(model, pictures, CertificationOptions(0.05))
    expected = certify(model, DIGITS.test[in_order(pictures)], CertificationOptions(0.05))
    for name, part, other in zip(found._fields, found, expected, strict=True):
        assert torch.equal(part, other), name
    assert (found.status == RadiusStatus.CONVERGED).any()
    assert (found.prediction != found.label).any()


def test_without_a_label_the_prediction_is_certified(model, tree):
    """Also where it is wrong; the labels that are known stay."""
    files = sorted(tree.rglob("*.png"))
    pictures = read_pictures([*files[:30], tree], CLASSES, (1, 8, 8))
    assert pictures.labels[:30] == [None] * 30
    found = certify_pictures(model, pictures, CertificationOptions(0.05))
    right = DIGITS.test.labels[in_order(pictures)]
    assert torch.equal(found.label[:30], found.prediction[:30])
    assert torch.equal(found.label[30:], right[30:])
    wrong = found.prediction[:30] != right[:30]
    assert (found.radius[:30][wrong] > 0).any()
    changed = DIGITS.test[in_order(pictures)[:30]]
    changed.labels.copy_(found.prediction[:30])
    torch.testing.assert_close(
        found.radius[:30], certify(model, changed, CertificationOptions(0.05)).radius
    )


def test_logits_that_are_not_finite_are_not_certified(tree):
    broken = cnn7((1, 8, 8), 10, width=2, hidden=4).eval()
    with torch.no_grad():
        broken[-1].bias[3] = torch.nan
    pictures = read_pictures([tree], CLASSES, (1, 8, 8))
    found = certify_pictures(broken, pictures, CertificationOptions(0.05, claim="unchecked"))
    assert found.radius.eq(0).all()
    assert found.status.eq(RadiusStatus.NOT_FINITE).all()


# The command


def test_the_printed_table(run, model, tree):
    code, out, err = run_ibp("predict", tree, "--model", run, "--out", "t.csv", "--device", "cpu")
    assert (code, err) == (0, "")
    assert "acert, 40 images, epsilon_max 0.05, certified by ibp, claim: real" in out
    with open("t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [line.split() for line in out.splitlines() if ".png" in line]
    assert len(lines) == len(rows) == 40
    accuracy = np.mean([row["label"] == row["prediction"] for row in rows])
    assert f"accuracy {100 * accuracy:.2f} % of 40 labelled images" in out
    images, labels = as_pixels(DIGITS.test.images), DIGITS.test.labels
    for (name, label, prediction, decimal, *status), row in zip(lines, rows, strict=True):
        assert (name, label, prediction) == (row["image"], row["label"], row["prediction"])
        assert "_".join(status) == row["status"]
        assert Fraction(decimal) <= Fraction(float(row["radius"]))
        printed = float(decimal)
        assert 0 <= float(row["radius"]) - printed < 0.000011
        if printed > 0:  # certified in truth, at what is printed
            index = int(Path(name).stem)
            one = slice(index, index + 1)
            assert certified_margins(model, images[one], labels[one], printed) < 0


def test_the_csv_file(run, tree):
    pictures = [tree / "0", next(tree.rglob("*.png"))]
    odd = Path(os.fsdecode(b'a,\xff "b".png'))
    shutil.copy(pictures[1], odd)
    write_image(Path("big.png"), (9, 80, 9), (16, 16))
    code, _, err = run_ibp(
        *("predict", *pictures, odd, "big.png", "--model", run / "model.safetensors"),
        *("--image-size", 8, "--out", "t.csv", "--claim", "float32"),
    )
    assert (code, err) == (0, "")
    content = Path("t.csv").read_bytes().decode(errors="surrogateescape")
    rows = list(csv.DictReader(io.StringIO(content)))
    heads = "image label prediction radius upper status unchecked claim bound changes"
    assert " ".join(rows[0]) == heads
    names = [str(path) for path in (*sorted((tree / "0").iterdir()), pictures[1], odd, "big.png")]
    assert [row["image"] for row in rows] == names
    assert {row["label"] for row in rows} == {""}, "a folder of one class is none of classes"
    assert [row["changes"] for row in rows] == [""] * (len(rows) - 1) + ["resized, colour to grey"]
    assert {row["claim"] for row in rows} == {"float32"}
    assert rows[-3]["radius"] == rows[-2]["radius"], "the same image"


def test_one_image(run, tree):
    image = next(tree.rglob("*.png"))
    code, out, err = run_ibp("predict", image, "--model", run, "--epsilon-max", "2/255")
    assert (code, err) == (0, "")
    assert "1 image, epsilon_max 2/255 (0.007843), certified" in out
    words = next(line.split() for line in out.splitlines() if ".png" in line)
    fraction, decimal = words[2:4]
    assert as_number(fraction) == pytest.approx(float(decimal), abs=2e-6)
    assert "label " not in out
    assert "without a label, the certificate is of the prediction, right or wrong" in out
    assert snapshot(Path()) == {}, "nothing is written unasked"


def test_images_are_resized_as_in_training(run, model, tree):
    """A model of an image folder that was resized takes other images of any size."""
    facts = read_facts(run / "model.safetensors")
    facts["training"] |= {"dataset": "imagefolder", "image_size": 8}
    save_model(model, "model.safetensors", **facts)
    write_image(Path("big.png"), (9, 9, 9), (30, 20))
    code, out, err = run_ibp("predict", "big.png", "--model", "model.safetensors")
    assert (code, err) == (0, "")
    assert ", resized\n" in out
    assert "resized: the certificate is of the image after this change" in out


def test_what_was_found_and_changed_is_told(run, tree):
    """In the table, in the CSV file and on the page: the certificate is not of the file."""
    shutil.copytree(tree / "0", "mine")
    first = sorted(Path("mine").iterdir())[0]
    levels = np.asarray(Image.open(first)).astype(np.uint16)
    deep = levels * 257 + np.where(levels < 255, 100, 0).astype(np.uint16)
    Image.fromarray(deep).save(first)
    Path("mine/notes.txt").write_text("")
    code, out, err = run_ibp(
        *("predict", "mine", tree / "0" / first.name, "--model", run),
        *("--out", "t.csv", "--html", "p.html"),
    )
    assert (code, err) == (0, "")
    count = len(list(Path("mine").glob("*.png")))
    assert f"mine: {count} images, 1 other file passed over: 1 .txt (notes.txt)\n" in out
    assert out.count("16 bits to 8") == 2
    assert f"{first} " in next(line for line in out.splitlines() if "16 bits" in line)
    assert "16 bits to 8: the certificate is of the image after this change" in out
    with open("t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["changes"] for row in rows] == ["16 bits to 8"] + [""] * count
    assert rows[0]["radius"] == rows[-1]["radius"], "100 of 65535 are no level of 8 bits"
    page = Path("p.html").read_text()
    assert page.count(">epsilon max, 16 bits to 8<") + page.count(">converged, 16 bits to 8<") == 1
    assert "Changed when read: 1; the images as shown are certified." in page
    assert f"mine: {count} images, 1 other file passed over: 1 .txt (notes.txt)." in page


def test_a_model_without_names(run, model, tree):
    """Nor a word on its training: epsilon_max has to be given, and classes are numbers."""
    image = next(tree.rglob("*.png"))
    for number, classes in enumerate((None, ["a"], 7, [1] * 10)):
        save_model(model, f"{number}.safetensors", classes=classes)
        given = ("predict", image, "--model", f"{number}.safetensors", "--epsilon-max", 0.01)
        code, out, _ = run_ibp(*given)
        assert code == 0
        assert "unknown method" in out
    names = [f"<{label}>\n" for label in range(10)]
    save_model(model, "named.safetensors", classes=names)
    code, out, _ = run_ibp(*given[:3], "named.safetensors", *given[4:])
    assert code == 0
    assert r">\n  " in out, "on one line"
    refused(
        "predict",
        image,
        "--model",
        "named.safetensors",
        says="how it was trained: give --epsilon-max",
    )


def test_heatmap_files(run, tree):
    code, _, err = run_ibp("predict", tree, "--model", run, "--heatmap", "maps", "--out", "t.csv")
    assert (code, err) == (0, "")
    with open("t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        f"{number:02d}-{Path(row['image']).stem}.png"
        for number, row in enumerate(rows)
        if float(row["radius"]) > 0
    ]
    assert 20 < len(expected) < 40
    assert sorted(path.name for path in Path("maps").glob("*.png")) == expected
    with Image.open(Path("maps") / expected[0]) as drawn:
        assert drawn.width == 17 * 32
        assert drawn.height > 8 * 32, "and a caption"
        caption = np.asarray(drawn)[8 * 32 :]
    assert (caption[0] == 255).all()
    assert (caption < 128).any()
    assert (caption == COLORS[-1]).all(2).any()


def test_a_name_that_is_as_long_as_may_be(run, tree):
    shutil.copy(tree / "0" / os.listdir(tree / "0")[0], f"{'字' * 80}.png")
    code, _, err = run_ibp("predict", ".", "--model", run, "--heatmap", "maps")
    assert (code, err) == (0, "")
    assert [path.name for path in Path("maps").glob("*.png")] == [f"0-{'字' * 50}.png"]


# Refused


def test_what_is_no_image_is_refused_by_name(run, tree):
    """Before anything is certified or written."""
    good = next(tree.rglob("*.png"))
    Path("damaged.png").write_bytes(good.read_bytes()[:60])
    Path("empty.jpg").write_bytes(b"")
    Path("text.txt").write_text("no image")
    os.mkfifo("pipe.png")
    Path("folder").mkdir()
    Path("folder/notes.txt").write_text("no image")
    write_image(Path("big.png"), 0, (9, 8))
    for path, says in (
        ("damaged.png", "cannot read the image damaged.png"),
        ("empty.jpg", "cannot read the image empty.jpg"),
        ("text.txt", "cannot read the image text.txt"),
        ("pipe.png", "cannot read the image pipe.png: it is not a file"),
        ("none.png", "there is no image or folder none.png"),
        ("folder", "folder: no images, 1 other file passed over: 1 .txt (notes.txt)"),
        ("big.png", "big.png has 9x8 pixels, but the model takes 8x8: --image-size 8"),
    ):
        everything = ("--out", "t.csv", "--html", "p.html", "--heatmap", "maps")
        refused("predict", good, path, "--model", run, *everything, says=says)
    several = (good, "damaged.png", "big.png", "empty.jpg")
    says = "3 of 4 images: cannot read the image damaged.png: "
    refused("predict", *several, "--model", run, *everything, says=says)


def test_a_model_of_other_inputs_than_images_is_refused(tree, tmp_path):
    parts = [IntervalLinear(64, 10)]
    save_model(Network(parts, (64,)).eval(), tmp_path / "m.safetensors")
    command = ("--model", tmp_path / "m.safetensors", "--epsilon-max", 0.1)
    outcome = run_ibp("predict", tree, *command)
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "takes inputs of shape (64,), which are no images" in outcome.err
    options = ("--dataset", "digits", "--epsilon-max", 0.1, "--out", tmp_path / "out")
    outcome = run_ibp("certify", tmp_path / "m.safetensors", *options)
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert "takes images (64,) of 10 classes, but" in outcome.err
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_fit(run, tree, monkeypatch):
    image = next(tree.rglob("*.png"))
    Path("mine").write_text("")
    Path("full").mkdir()
    Path("full/mine").write_text("")
    with_model = ("predict", image, "--model", run)
    refused("predict", image, says="Missing option '--model'")
    refused("predict", run, image, says="Missing option '--model'")
    refused("predict", "--model", run, says="Missing argument 'IMAGES...'")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        refused(*with_model, says="ibp predict runs in a single process: start it without torchrun")
    refused("predict", image, "--model", "none", says="there is no model file none")
    for option in ("--dataset=digits", "--data-dir=x", "--download", "--limit-test=3"):
        refused(*with_model, option, says=f"No such option '{option.partition('=')[0]}'")
    refused(*with_model, "--resume", run, says="No such option '--resume'")
    refused(*with_model, "--image-size", 9, says="the model takes 8x8 pixels, not 9x9")
    refused(*with_model, "--epsilon-max", 2, says="at most 1")
    refused(*with_model, "--xtol", 0, says="xtol")
    for option in ("--out", "--html"):
        refused(*with_model, option, "mine", says="the output file mine already exists")
        refused(*with_model, option, "none/t", says="there is no folder none")
    refused(*with_model, "--out", "t", "--html", "t", says="--out and --html both name t")
    refused(*with_model, "--heatmap", "full", says="full already exists and is not empty")
    refused("certify", run, "--html", "mine", says="the output file mine already exists")
    refused("certify", run, "--html", "none/p.html", says="there is no folder none")


def test_certify_takes_no_images(run, tree):
    """It names the command that does."""
    says = "a b.png is an image; certify it with: ibp predict 'a b.png' --model MODEL"
    refused("certify", "a b.png", says=says)
    refused("certify", "a b.png", tree, says=says)
    refused("certify", run, tree, says="unexpected extra argument")
    refused("certify", "a.png", "--model", run, says="No such option '--model'")
    refused("certify", run, "--heatmap", "maps", says="No such option '--heatmap'")
