"""Trees of images: found as by torchvision's `ImageFolder`, and nothing left out unsaid."""

import os
import random
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torchvision
from helpers import WNIDS, grey, run_ibp, write_image, write_tinyimagenet, write_tree
from PIL import Image

from ibpcore import UserError
from ibpcore.data.folders import class_folders, list_images, read_tree
from ibpcore.data.images import listed
from ibpcore.data.sources import Request, load_dataset

NAMES = [
    *("a.png", "A.PNG", "b.Jpeg", "c.jpg.txt", ".d.png", "e.gif", "f", "g.tiff", ".png", "h.webp"),
    *("i.png.", "k.ppm", "l.pgm", "m.bmp", "n.tif", "o.jfif", "p é.png", ".DS_Store", "z-1.png"),
]
FOLDERS = ["x", "x/y", "x-1", "x.png", ".hidden", "X", "x/a.png"]


def torchvisions(root):
    """(path, label) of each image that `ImageFolder` reads if it is told of these suffixes."""
    known = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif", ".jfif")
    found = torchvision.datasets.ImageFolder(
        root, is_valid_file=lambda p: p.lower().endswith(known)
    )
    return [(Path(path), label) for path, label in found.samples]


@pytest.mark.parametrize("seed", range(20))
def test_any_tree_is_read_as_by_torchvision(tmp_path, seed):
    """Names, cases, hidden files, subfolders and links; every other file is counted."""
    rng = random.Random(seed)
    outside = tmp_path / "outside"
    write_image(outside / "far.png", 0)
    (outside / "near.txt").write_text("")
    root, classes = tmp_path / "train", ["b", "a", "B", "a-1", "ä", "10", "9"]
    total = 0
    for name in classes:
        places = [root / name, *(root / name / place for place in rng.sample(FOLDERS, 3))]
        write_image(root / name / "sure.png", 0)
        total += 1
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
        for place in places:
            for file in rng.sample(NAMES, 4):
                if not (place / file).exists():
                    (place / file).write_text("")
                    total += 1
        (root / name / "link").symlink_to(outside)
        (root / name / "broken.png").symlink_to(tmp_path / "nothing")
        total += 3
    tree = read_tree(root, sorted(classes))
    assert [folder.name for folder in class_folders(root)] == sorted(classes)
    assert tree.samples == torchvisions(root)
    assert len(tree.samples) + sum(map(len, tree.passed_over.values())) == total


def test_what_lies_beside_is_told(tmp_path):
    write_tree(tmp_path, ("cat", "dog"))
    write_image(tmp_path / "train" / "lost.png", 0)
    write_image(tmp_path / "val" / "cat" / "1.png", 0)
    write_image(tmp_path / "stray.JPG", 0)
    (tmp_path / "notes.txt").write_text("")
    write_image(tmp_path / "train" / "cat" / "more" / "2.png", grey(0))
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"\x00\x05\x16\x07\x00\x02")
    (tmp_path / "train" / "dog" / "notes").write_text("")
    (tmp_path / "train" / "dog" / f"a.{'x' * 99}").write_text("")
    data = load_dataset("imagefolder", Request(tmp_path))
    assert len(data.train) == 5
    long = f"1 .{'x' * 11}... (dog/a.{'x' * 99})"
    others = (
        "1 outside the class folders (lost.png), 1 metadata of macOS (cat/._0.png),"
        f" {long}, 1 without a suffix (dog/notes)"
    )
    assert data.remarks == (
        f"{tmp_path}/train: 5 images, 4 other files passed over: {others}",
        f"{tmp_path}/test: 4 images",
        f"{tmp_path}: only train and test are read, not stray.JPG, val",
    )


def test_why_images_are_passed_over_is_told(tmp_path):
    write_tree(tmp_path, ("cat", "dog"))
    for name in ("a.HEIC", "b.heic", "c.fits", "d.txt", "more/e.svg"):
        path = tmp_path / "train" / "dog" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    told, _ = load_dataset("imagefolder", Request(tmp_path)).remarks
    foreign = "Pillow cannot read them: convert them to PNG or JPEG"
    assert told == (
        f"{tmp_path}/train: 4 images, 5 other files passed over:"
        f" 2 .heic (such as dog/a.HEIC; {foreign}),"
        " 1 .fits (dog/c.fits; the depth of FITS is not known: convert them to PNG),"
        f" 1 .txt (dog/d.txt), 1 .svg (dog/more/e.svg; {foreign})"
    )


@pytest.mark.parametrize(
    "suffix", [".gif", ".jfif", ".jpe", ".apng", ".pnm", ".tga", ".qoi", ".pcx", ".webp", ".TIF"]
)
def test_images_of_any_format_are_read(tmp_path, suffix):
    write_tree(tmp_path, ("cat", "dog"), suffix=suffix)
    data = load_dataset("imagefolder", Request(tmp_path))
    assert (len(data.train), len(data.test)) == (4, 4)
    assert data.remarks == (f"{tmp_path}/train: 4 images", f"{tmp_path}/test: 4 images")
    exact = suffix not in (".jfif", ".jpe", ".webp")
    levels = [grey(0)] * 2 + [grey(1)] * 2
    assert not exact or data.train.images[:, 0, 0, 0].tolist() == levels


def test_all_images_that_cannot_be_read_are_named(tmp_path):
    """With one of them an error names it alone, see `tests/cli/test_bad_input.py`."""
    write_tree(tmp_path, ("cat", "dog"), images=12)
    for number in range(11):
        (tmp_path / "train" / "dog" / f"{number}.png").write_text("")
    with pytest.raises(UserError) as refused:
        load_dataset("imagefolder", Request(tmp_path))
    message = str(refused.value)
    assert message.startswith("11 of 24 images: cannot read the image ")
    assert message.count("cannot read the image") == 10 or message.endswith("...")
    shutil.rmtree(tmp_path / "train" / "dog")
    for number in range(3):
        write_image(tmp_path / "train" / "dog" / f"{number}.png", 0)
    (tmp_path / "train" / "dog" / "1.png").write_text("")
    (tmp_path / "train" / "cat" / "0.png").write_text("")
    with pytest.raises(UserError, match=r"^2 of 15 images: .*cat/0\.png: .*; .*dog/1\.png: "):
        load_dataset("imagefolder", Request(tmp_path))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_images_in_the_place_of_a_test_part(tmp_path, name):
    write_tree(tmp_path, ("cat", "dog"))
    expected = load_dataset("imagefolder", Request(tmp_path)).test.fingerprint()
    (tmp_path / "test").rename(tmp_path / name)
    data = load_dataset("imagefolder", Request(tmp_path))
    assert data.test.fingerprint() == expected
    said = f"{tmp_path}: there is no folder test, so {name} is the test part"
    assert data.remarks == (f"{tmp_path}/train: 4 images", f"{tmp_path}/{name}: 4 images", said)


def classes_without_parts(root):
    for part in ("train", "test"):
        for folder in (root / part).iterdir():
            folder.rename(root / f"{folder.name}-{part}")
        (root / part).rmdir()
    return root


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (lambda root: root / "none", r"^no folder .*none: --data-dir must be the folder that hold"),
        (lambda root: root / "train", "train is one part only: --data-dir must be the folder abo"),
        (lambda root: root / "test", r"test is one part only: "),
        (lambda root: root / "train" / "cat", r"^no folder .*cat/train: --data-dir must be the"),
        (classes_without_parts, r"/train: if cat-test, cat-train, dog-test, .* are classes, move"),
    ],
)
def test_a_folder_without_parts_is_refused_with_what_to_do(tmp_path, where, says):
    root = where(write_tree(tmp_path / "mine", ("cat", "dog")))
    with pytest.raises(UserError, match=says):
        load_dataset("imagefolder", Request(root))


def test_names_of_classes(tmp_path):
    assert listed("abc") == "a, b, c"
    assert listed([str(n) for n in range(200)]) == "0, 1, 2, 3, 4, 5, 6, 7, ..., 199"
    write_tree(tmp_path, ("cat", "dog", "ship"))
    given = ("--dataset", "imagefolder", "--data-dir", tmp_path, "--epochs", 1, "--width", 1)
    out = run_ibp("train", *given, "--hidden", 2, "--device", "cpu", "--out", tmp_path / "run").out
    assert "\n3 classes: cat, dog, ship\n" in out


def test_changes_of_the_images_read_are_told(tmp_path):
    write_tree(tmp_path, ("cat", "dog"))
    for name, mode, color in (
        *(("0", "I;16", 4000), ("1", "RGBA", (1, 2, 3, 9)), ("2", "RGBA", (1, 2, 3, 255))),
        *(("3", "LA", (7, 0)), ("4", "L", 7)),
    ):
        Image.new(mode, (8, 8), color).save(tmp_path / "test" / "dog" / f"{name}.png")
    data = load_dataset("imagefolder", Request(tmp_path))
    changed = f"{tmp_path}/test: of 7 images read, changed: 2 transparency dropped, 1 16 bits to 8"
    assert data.remarks == (f"{tmp_path}/train: 4 images", f"{tmp_path}/test: 7 images", changed)


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    """`os.walk` would skip it without a word."""
    write_image(tmp_path / "cat" / "shut" / "1.png", 0)
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    with (
        mock.patch.object(os, "scandir", denied),
        pytest.raises(UserError, match=r"cannot read the folder .*cat/shut: Permission denied"),
    ):
        list_images(tmp_path / "cat")


@pytest.mark.parametrize("target", [".", "..", "../..", "deep"])
def test_a_link_back_is_refused(tmp_path, target):
    """torchvision would read the images up to forty times."""
    write_image(tmp_path / "train" / "cat" / "1.png", 0)
    write_image(tmp_path / "train" / "cat" / "deep" / "2.png", 0)
    place = tmp_path / "train" / "cat" / "deep" if target == "deep" else tmp_path / "train" / "cat"
    (place / "again").symlink_to((tmp_path / "train" / "cat" / target).resolve())
    with pytest.raises(UserError, match=r"train/cat/.*leads back to a folder above it"):
        list_images(tmp_path / "train" / "cat")


def test_every_command_tells_what_it_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tree(Path("data"), ("cat", "dog"))
    Path("data/test/dog/notes.txt").write_text("")
    told = "data/test: 4 images, 1 other file passed over: 1 .txt (dog/notes.txt)\n"
    small = ("--epochs", 1, "--width", 2, "--hidden", 4, "--device", "cpu", "--out", "run")
    data = ("--dataset", "imagefolder", "--data-dir", "data")
    source = ("--data-dir", "data", "--device", "cpu")
    dry = run_ibp("train", *data, *small[:-2], "--dry-run")
    assert f"# {told}" in dry.out
    sweep = ("--methods", "standard", "--kappa", "1", "--select", "test", "--out", "sweep")
    cheap = ("--restarts", 1, "--attack-steps", 1, "--bisections", 1)
    for command in (
        ("train", *data, *small),
        ("certify", "run", *source),
        ("attack", "run", *source),
        ("inspect", "run", *source, "--samples", 2, *cheap, "--line-points", 9),
        ("export", "run", "--onnx", "n.onnx", "--data-dir", "data"),
        ("sweep", *data, *small[:-2], *sweep),
    ):
        code, out, err = run_ibp(*command)
        assert (code, err) == (0, ""), command
        assert out.count(told) == 1, command
    assert told.strip() in run_ibp("doctor", *source).out
    page = ("certify", "run", *source, "--html", "p.html", "--out", "again")
    assert run_ibp(*page).code == 0
    assert told.strip() in Path("p.html").read_text()


# TinyImageNet sorted by scripts


def sort_validation(val, move, inside=""):
    """`val/<class>/<inside>/*`, as `val_annotations.txt` says."""
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        (val / wnid / inside).mkdir(parents=True, exist_ok=True)
        move(val / "images" / name, val / wnid / inside / name)


def moved(val):
    sort_validation(val, shutil.move)


def moved_and_tidied(val):
    sort_validation(val, shutil.move)
    (val / "images").rmdir()


def moved_inside(val):
    sort_validation(val, shutil.move, "images")


def copied(val):
    sort_validation(val, shutil.copy)


def sorted_in_part(val):
    count = iter(range(99))
    sort_validation(val, lambda a, b: shutil.move(a, b) if next(count) < 4 else None)


@pytest.mark.parametrize("sort", [moved, moved_and_tidied, moved_inside, copied, sorted_in_part])
def test_sorted_validation_images_are_the_same_data_set(tmp_path, sort):
    """In the same order, so that limits choose the same images."""
    root = write_tinyimagenet(tmp_path, images=3) / "tiny-imagenet-200"
    expected = load_dataset("tinyimagenet", Request(tmp_path))
    sort(root / "val")
    found = load_dataset("tinyimagenet", Request(tmp_path))
    assert found.test.fingerprint() == expected.test.fingerprint()
    assert found.title == expected.title
    told = f"{root}/val: 9 images"
    example = f"such as {WNIDS[1]}/val_1.JPEG"
    copies = f", 9 other files passed over: 9 copies of images in other folders ({example})"
    assert found.remarks[1] == told + copies * (sort is copied)


def test_sorted_images_without_annotations(tmp_path):
    val = write_tinyimagenet(tmp_path, images=3) / "tiny-imagenet-200" / "val"
    moved_and_tidied(val)
    (val / "val_annotations.txt").unlink()
    data = load_dataset("tinyimagenet", Request(tmp_path))
    theirs = torchvision.datasets.ImageFolder(val)
    assert data.test.labels.tolist() == theirs.targets == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    shutil.rmtree(val / WNIDS[0])
    with pytest.raises(UserError, match=f"class folders of .*val do not match: {WNIDS[0]} is miss"):
        load_dataset("tinyimagenet", Request(tmp_path))


def test_training_images_moved_out_of_their_folders(tmp_path):
    root = write_tinyimagenet(tmp_path, images=3) / "tiny-imagenet-200"
    expected = load_dataset("tinyimagenet", Request(tmp_path))
    for wnid in WNIDS:
        folder = root / "train" / wnid
        for file in (folder / "images").iterdir():
            file.rename(folder / file.name)
        (folder / "images").rmdir()
    assert load_dataset("tinyimagenet", Request(tmp_path)).fingerprint() == expected.fingerprint()


@pytest.mark.parametrize("place", ["tiny-imagenet-200/tiny-imagenet-200", "tiny-imagenet", "."])
def test_where_tinyimagenet_may_lie(tmp_path, place):
    """Unpacked one folder too deep, renamed, or named itself by --data-dir."""
    write_tinyimagenet(tmp_path / "source")
    target = tmp_path / "data" / place
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(tmp_path / "source" / "tiny-imagenet-200", target, dirs_exist_ok=True)
    assert len(load_dataset("tinyimagenet", Request(tmp_path / "data")).test) == 6


def in_a_wrong_folder(val):
    moved(val)
    (val / "n01" / "val_1.JPEG").rename(val / "n02" / "val_1.JPEG")


def without_a_label(val):
    write_image(val / "images" / "new.JPEG", 0)


def two_of_one_name(val):
    copied(val)
    write_image(val / "n01" / "val_1.JPEG", 99)


def with_two_labels(val):
    path = val / "val_annotations.txt"
    path.write_text(path.read_text() + "val_1.JPEG\tn02\t0\t0\t1\t1\n")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (in_a_wrong_folder, r"val/n02/val_1.JPEG is of the class n01 by .*val_annotations.txt"),
        (without_a_label, r"images/new.JPEG is not in .*val_annotations.txt, so that its class"),
        (two_of_one_name, r"val/images/val_1.JPEG and .*val/n01/val_1.JPEG have one name, but are"),
        (with_two_labels, r"val_annotations.txt, line 7: 'val_1.JPEG' had another class before"),
    ],
)
def test_validation_images_of_doubtful_labels(tmp_path, change, says):
    change(write_tinyimagenet(tmp_path) / "tiny-imagenet-200" / "val")
    with pytest.raises(UserError, match=says):
        load_dataset("tinyimagenet", Request(tmp_path))
