"""Data sets on small trees in the official layouts, batches, and, where it is, real data."""

import gzip
import os
import pickle
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import WNIDS, grey, idx_bytes, write_image, write_mnist, write_tinyimagenet, write_tree
from PIL import Image

from ibpcore import UserError
from ibpcore.data import idx
from ibpcore.data.batches import Batch, batches_per_epoch, ordered_batches, shuffled_batches
from ibpcore.data.images import ImageSet, channel_statistics, subset_indices
from ibpcore.data.sources import CIFAR10_CLASSES, Request, load_dataset

real_data = pytest.mark.skipif(
    "IBP_DATA_DIR" not in os.environ,
    reason="real data: set IBP_DATA_DIR to the folder that holds MNIST, cifar10-jpeg, ...",
)


def load(name, folder, **options):
    return load_dataset(name, Request(folder, **options))


def assert_grey_tells_the_label(part, tolerance=0):
    """Each image has the one level that `helpers` gives to the class of its label."""
    expected = torch.tensor([grey(int(label)) for label in part.labels]).view(-1, 1, 1, 1)
    assert (part.images.int() - expected).abs().max() <= tolerance


def assert_same(a, b):
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)


# Data sets by name


def test_digits_are_always_there(tmp_path):
    data = load("digits", tmp_path)
    assert (len(data.train), len(data.test)) == (1347, 450)
    assert data.in_shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert int(data.train.images.max()) == 255
    assert set(data.test.labels.tolist()) == set(range(10))


def test_mnist_reads_the_official_files(tmp_path):
    data = load("mnist", write_mnist(tmp_path))
    raw = (tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()
    assert data.title == "MNIST"
    assert data.in_shape == (1, 28, 28)
    assert (len(data.train), len(data.test)) == (40, 20)
    assert data.test.images.numpy().tobytes() == raw[16:]
    assert data.test.labels.tolist() == 2 * list(range(10))


def renamed(raw, file):
    """With a dot, as in archives that a browser unpacked."""
    file.rename(raw / file.name.replace("-idx", ".idx"))


def packed(raw, file):
    (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    file.unlink()


def renamed_and_packed(raw, file):
    packed(raw, file)
    renamed(raw, raw / f"{file.name}.gz")


def in_a_folder_of_its_name(raw, file):
    content = file.read_bytes()
    file.unlink()
    file.mkdir()
    (file / file.name).write_bytes(content)


def in_a_folder_with_a_dot(raw, file):
    in_a_folder_of_its_name(raw, file)
    renamed(file, file / file.name)
    renamed(raw, file)


def packed_without_a_suffix(raw, file):
    file.write_bytes(gzip.compress(file.read_bytes()))


def unpacked_with_a_suffix(raw, file):
    file.rename(raw / f"{file.name}.gz")


def both(raw, file):
    """Unpacked in part: the packed files are still there, and cut ones beside other names."""
    (raw / f"{file.name}.gz").write_bytes(b"cut")


@pytest.mark.parametrize(
    "change",
    [
        *(renamed, packed, renamed_and_packed, in_a_folder_of_its_name, in_a_folder_with_a_dot),
        *(packed_without_a_suffix, unpacked_with_a_suffix, both),
    ],
)
def test_names_of_mnist_files(tmp_path, change):
    raw = write_mnist(tmp_path) / "MNIST" / "raw"
    expected = load("mnist", tmp_path)
    for file in sorted(raw.iterdir())[1:]:  # not of all, as after an interruption
        change(raw, file)
    found = load("mnist", tmp_path)
    assert found.fingerprint() == expected.fingerprint()
    assert found.test.fingerprint() == expected.test.fingerprint()


@pytest.mark.parametrize("place", [".", "mnist", "mnist/raw", "MNIST"])
def test_where_mnist_may_lie(tmp_path, place):
    expected = load("mnist", write_mnist(tmp_path / "source"))
    target = tmp_path / "data" / place
    shutil.copytree(tmp_path / "source" / "MNIST" / "raw", target)
    assert load("mnist", tmp_path / "data").fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            gzip.compress(bytes(999), mtime=0)[:-12],
            "is a gzip file that was cut, or unpacks to too much",
        ),
        (b"\x1f\x8b" + bytes(99), "is a damaged gzip file"),
        (gzip.compress(b"<html>", mtime=0), "is not an idx file of 1 dimensions"),
        (
            gzip.compress(bytes(2**20), mtime=0),
            "is a gzip file that was cut, or unpacks to too much",
        ),
    ],
)
def test_packed_files_that_are_damaged(tmp_path, content, says):
    """The file is named, not the folder, and nothing whole is to be deleted."""
    labels = write_mnist(tmp_path) / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.unlink()
    labels.with_name(f"{labels.name}.gz").write_bytes(content)
    says = rf"t10k-labels-idx1-ubyte\.gz cannot be read: .* {says}"
    with (
        mock.patch.object(idx, "MAX_BYTES", 2**19),
        pytest.raises(UserError, match=says) as caught,
    ):
        load("mnist", tmp_path)
    assert "delete" not in str(caught.value)


def test_mnist_wants_a_label_for_each_image(tmp_path):
    labels = write_mnist(tmp_path) / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(41, np.uint8)))
    with pytest.raises(UserError, match="not as many labels as images"):
        load("mnist", tmp_path)


def test_a_label_beyond_the_classes_is_refused(tmp_path):
    labels = write_mnist(tmp_path) / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.full(20, 10, np.uint8)))
    with pytest.raises(UserError, match="MNIST has a label 10, but 10 classes"):
        load("mnist", tmp_path)


def write_official_cifar10(root):
    """`cifar-10-batches-py` with two images a batch; the training images, (10, 3072)."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = rng.integers(0, 256, (2, 3072), dtype=np.uint8)
        content = {"data": data, "labels": [number, 9 - number]}
        (folder / name).write_bytes(pickle.dumps(content))
        rows.append(data)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}))
    return np.concatenate(rows[:5])


@pytest.fixture
def any_checksum(monkeypatch):
    """torchvision wants the official MD5 sums, which a small file cannot have."""
    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).is_file()
    )


@pytest.mark.usefixtures("any_checksum")
def test_cifar10_reads_the_official_files(tmp_path):
    rows = write_official_cifar10(tmp_path)
    data = load("cifar10", tmp_path)
    assert data.title == "CIFAR-10"
    assert data.in_shape == (3, 32, 32)
    assert len(data.mean) == len(data.std) == 3
    assert (len(data.train), len(data.test)) == (10, 2)
    assert torch.equal(data.train.images, torch.from_numpy(rows.reshape(10, 3, 32, 32)))
    assert data.train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]


@pytest.mark.usefixtures("any_checksum")
def test_cifar10_prefers_the_official_files(tmp_path):
    write_official_cifar10(tmp_path)
    write_tree(tmp_path / "cifar10-jpeg", CIFAR10_CLASSES, suffix=".jpg")
    assert load("cifar10", tmp_path).title == "CIFAR-10"


@pytest.mark.usefixtures("any_checksum")
@pytest.mark.parametrize("place", [".", "cifar10", "CIFAR10", "cifar-10-batches-py"])
def test_where_cifar10_may_lie(tmp_path, place):
    """The last is what --data-dir names: the folder itself."""
    data = tmp_path / "data"
    inside = place == "cifar-10-batches-py"
    (data if inside else data / place).mkdir(parents=True)
    write_official_cifar10(data if inside else data / place)
    assert load("cifar10", data / place if inside else data).title == "CIFAR-10"


def test_cifar10_unpacked_in_part(tmp_path):
    """The files are named, and nobody is told to delete them."""
    write_official_cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    advice = "move this folder away, and --download makes it anew"
    (folder / "data_batch_3").unlink()
    (folder / "batches.meta").unlink()
    says = f"cifar-10-batches-py cannot be read: data_batch_3, batches.meta missing; {advice}"
    with pytest.raises(UserError, match=says):
        load("cifar10", tmp_path)
    write_official_cifar10(tmp_path / "other")
    says = "batches.meta corrupted, or not official; move this folder away"
    with pytest.raises(UserError, match=says):
        load("cifar10", tmp_path / "other")


def test_a_missing_folder_named_like_the_official_one(tmp_path):
    with pytest.raises(UserError, match="cifar-10-batches-py is not there"):
        load("cifar10", tmp_path / "cifar-10-batches-py")


@pytest.mark.parametrize("folder", ["cifar10-jpeg", "cifar10", "."])
@pytest.mark.parametrize(
    ("suffix", "title"), [(".jpg", "CIFAR-10 (JPEG)"), (".png", "CIFAR-10 (image folder)")]
)
def test_cifar10_tree_says_what_it_is(tmp_path, folder, suffix, title):
    write_tree(tmp_path / folder, CIFAR10_CLASSES, size=(32, 32), suffix=suffix)
    data = load("cifar10", tmp_path)
    assert data.title == title
    assert data.in_shape == (3, 32, 32)
    assert data.classes[:2] == ("airplane", "automobile")
    for part in (data.train, data.test):
        assert len(part) == 20
        assert_grey_tells_the_label(part, tolerance=2)


def test_tinyimagenet_takes_labels_from_its_annotations(tmp_path):
    data = load("tinyimagenet", write_tinyimagenet(tmp_path, images=3))
    assert data.title == "TinyImageNet (subset: 9 + 9 images)"
    assert len(data.mean) == len(data.std) == 3
    for part in (data.train, data.test):
        assert sorted(part.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert_grey_tells_the_label(part, tolerance=2)
    # The annotations are shuffled over the classes: the order of files would not do.
    assert data.test.labels.tolist() != sorted(data.test.labels.tolist())


def test_tinyimagenet_has_the_class_order_of_an_image_folder(tmp_path):
    data = load("tinyimagenet", write_tinyimagenet(tmp_path))
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "tiny-imagenet-200" / "train"))
    assert list(data.classes) == theirs.classes == sorted(WNIDS)
    assert data.train.labels.tolist() == theirs.targets


def test_tinyimagenet_may_lack_annotated_images(tmp_path):
    """A subset may keep the full list of annotations."""
    write_tinyimagenet(tmp_path)
    (tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG").unlink()
    data = load("tinyimagenet", tmp_path)
    assert len(data.test) == 5
    assert_grey_tells_the_label(data.test, tolerance=2)


def test_imagefolder_of_one_size(tmp_path):
    data = load("imagefolder", write_tree(tmp_path / "pets", ("cat", "dog"), size=(12, 9)))
    assert data.title == "image folder pets"
    assert data.classes == ("cat", "dog")
    assert data.in_shape == (3, 9, 12)
    for part in (data.train, data.test):
        assert part.labels.tolist() == [0, 0, 1, 1]
        assert_grey_tells_the_label(part)


def test_imagefolder_is_normalised_by_its_training_images(tmp_path):
    data = load("imagefolder", write_tree(tmp_path, ("cat", "dog")))
    levels = np.array([grey(0), grey(1)]) / 255
    assert data.mean == pytest.approx([levels.mean()] * 3, abs=1e-4)
    assert data.std == pytest.approx([levels.std()] * 3, abs=1e-4)


def test_imagefolder_crops_the_centre(tmp_path):
    """40 x 20 pixels, white from column 10 to 29: a crop of 20 x 20 is white all over."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 255
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / part / name / "wide.png")
    data = load("imagefolder", tmp_path, image_size=20)
    assert data.in_shape == (3, 20, 20)
    assert bool((data.train.images == 255).all())
    assert load("imagefolder", tmp_path, image_size=5).in_shape == (3, 5, 5)


def test_imagefolder_brings_sizes_together(tmp_path):
    for number, size in enumerate([(8, 8), (30, 10), (10, 30), (7, 7)]):
        for part in ("train", "test"):
            for label, name in enumerate("ab"):
                write_image(tmp_path / part / name / f"{number}.png", (grey(label),) * 3, size)
    data = load("imagefolder", tmp_path, image_size=9)
    assert data.train.images.shape == (8, 3, 9, 9)
    assert_grey_tells_the_label(data.train)
    with pytest.raises(UserError, match=r"1\.png has 30x10 pixels.* --image-size"):
        load("imagefolder", tmp_path)


def test_test_images_of_another_size_are_refused(tmp_path):
    """Each part has one size of its own: only together they show it."""
    write_tree(tmp_path, "ab", size=(8, 8))
    for file in (tmp_path / "test").rglob("*.png"):
        write_image(file, 0, (9, 9))
    with pytest.raises(UserError, match=r"\(3, 8, 8\), the test images \(3, 9, 9\).*--image-size"):
        load("imagefolder", tmp_path)
    assert load("imagefolder", tmp_path, image_size=8).in_shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 0), (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, color, expected):
    write_tree(tmp_path, "ab", images=1)
    write_image(tmp_path / "train" / "a" / "0.png", color, mode=mode)
    pixels = load("imagefolder", tmp_path).train.images[0]
    assert pixels.flatten(1).unique(dim=1).tolist() == [[level] for level in expected]


def test_other_files_are_no_images(tmp_path):
    write_tree(tmp_path, "ab")
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    assert len(load("imagefolder", tmp_path).train) == 4


@pytest.mark.parametrize("name", ["mnist", "cifar10", "tinyimagenet", "imagefolder"])
def test_a_missing_data_set_is_named(tmp_path, name):
    with pytest.raises(UserError, match=str(tmp_path)):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar100", {}, "unknown data set 'cifar100'"),
        ("digits", {"limit_train": 0}, "at least 1"),
        ("digits", {"limit_test": -1}, "at least 1"),
        ("imagefolder", {"image_size": 0}, "at least 1"),
        ("digits", {"image_size": 8}, "except for the data set imagefolder"),
    ],
)
def test_requests_are_checked(tmp_path, name, options, message):
    with pytest.raises(UserError, match=message):
        load(name, tmp_path, **options)


# Limits


@pytest.mark.parametrize("limit", [1, 7, 100, 1000, 1001, None])
def test_a_limit_is_a_choice_without_repetition(limit):
    picked = subset_indices(1000, limit)
    assert len(set(picked.tolist())) == len(picked) == min(limit or 1000, 1000)
    assert picked.tolist() == sorted(picked.tolist())
    assert np.array_equal(picked, subset_indices(1000, limit))


def test_a_limit_is_spread_over_all():
    """Images of a tree come class by class: the first ones would be of one class."""
    counts = np.bincount(subset_indices(10_000, 1000) // 1000)
    assert len(counts) == 10
    assert counts.min() > 60


def test_limits_choose_the_same_images_whatever_the_kind_of_data(tmp_path):
    whole = load("digits", tmp_path)
    some = load("digits", tmp_path, limit_train=100, limit_test=20)
    index = torch.from_numpy(subset_indices(1347, 100))
    assert_same(some.train, ImageSet(whole.train.images[index], whole.train.labels[index]))
    assert len(some.test) == 20

    write_tree(tmp_path, [f"c{i}" for i in range(10)])
    whole = load("imagefolder", tmp_path)
    some = load("imagefolder", tmp_path, limit_train=8, limit_test=5)
    index = torch.from_numpy(subset_indices(20, 8))
    assert_same(some.train, ImageSet(whole.train.images[index], whole.train.labels[index]))
    assert len(some.test) == 5


def test_a_limited_load_reads_only_what_it_uses(tmp_path):
    write_tree(tmp_path, "ab", images=5)
    unused = next(i for i in range(10) if i not in subset_indices(10, 3))
    (tmp_path / "train" / "ab"[unused // 5] / f"{unused % 5}.png").write_bytes(b"damaged")
    assert len(load("imagefolder", tmp_path, limit_train=3).train) == 3


def test_statistics_of_channels():
    images = torch.randint(0, 256, (5, 3, 6, 7), dtype=torch.uint8)
    images[:, 2] = 9
    mean, std = channel_statistics(images)
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-4)
    expected = pixels.std((0, 2, 3), correction=0)
    assert std[:2] == pytest.approx(expected[:2].tolist(), abs=1e-4)
    assert std[2] == pytest.approx(1 / 255, abs=1e-4), "a constant channel must not divide by 0"


# Batches


def numbered(count, shape=(2, 6, 5)):
    """Random images, each of which its label names."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count))


def epoch_of(data, batch_size=8, seed=0, epoch=0, flip=False, padding=0):
    return list(
        shuffled_batches(data, batch_size, seed=seed, epoch=epoch, flip=flip, padding=padding)
    )


def joined(batches):
    return Batch(*(torch.cat(column) for column in zip(*batches, strict=True)))


def test_ordered_batches_are_all_in_order():
    data = numbered(21)
    batches = list(ordered_batches(data, 8))
    assert [len(batch.labels) for batch in batches] == [8, 8, 5]
    together = joined(batches)
    assert torch.equal(together.labels, data.labels)
    assert together.images.dtype == torch.float32
    assert torch.equal(together.images, data.images.float() / 255)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(("count", "sizes"), [(16, [8, 8]), (21, [8, 8, 5]), (5, [5]), (2, [2])])
def test_shuffled_batches_cover_every_sample_once(count, sizes, flip, padding):
    batches = epoch_of(numbered(count), flip=flip, padding=padding)
    assert [len(batch.labels) for batch in batches] == sizes
    assert batches_per_epoch(count, 8) == len(sizes)
    assert sorted(joined(batches).labels.tolist()) == list(range(count))
    for batch in batches:
        assert torch.equal(batch.samples, batch.labels), "labels are numbers of samples here"


@pytest.mark.parametrize(("count", "sizes"), [(17, [8, 8]), (1, [])])
def test_a_last_batch_of_one_is_left_out(count, sizes):
    assert [len(batch.labels) for batch in epoch_of(numbered(count))] == sizes
    assert batches_per_epoch(count, 8) == len(sizes)


def test_without_augmentation_images_are_themselves():
    data = numbered(21)
    together = joined(epoch_of(data))
    assert torch.equal(together.images, data.images[together.labels].float() / 255)
    assert together.labels.tolist() != list(range(21))


def test_batches_are_a_function_of_seed_and_epoch():
    data = numbered(32)
    settings = {"flip": True, "padding": 2}
    first = joined(epoch_of(data, seed=1, epoch=3, **settings))
    torch.rand(3)  # the global generator has no part in it
    before = torch.get_rng_state()
    assert_same(joined(epoch_of(data, seed=1, epoch=3, **settings)), first)
    assert torch.equal(torch.get_rng_state(), before)
    for seed, epoch in ((1, 4), (2, 3), (3, 1), (0, 0)):
        other = joined(epoch_of(data, seed=seed, epoch=epoch, **settings))
        assert not torch.equal(other.labels, first.labels)


def variants(image, padding, flip):
    """{(row, column, flipped): image} of all crops after edge padding, by torch itself."""
    height, width = image.shape[1:]
    padded = F.pad(image[None].float(), [padding] * 4, mode="replicate")[0].to(image.dtype)
    found = {}
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            crop = padded[:, row : row + height, column : column + width]
            found[row, column, False] = crop
            if flip:
                found[row, column, True] = crop.flip(2)
    return found


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True), (4, True)])
def test_augmented_images_are_padded_crops(padding, flip):
    """Each is exactly one of the crops that torch's edge padding gives of its own image."""
    data = numbered(96, shape=(2, 11, 10))
    drawn = []
    for images, labels, _ in epoch_of(data, batch_size=32, padding=padding, flip=flip):
        bytes_ = (images * 255).round().to(torch.uint8)
        batch = []
        for image, label in zip(bytes_, labels, strict=True):
            crops = variants(data.images[label], padding, flip)
            matches = [key for key, crop in crops.items() if torch.equal(crop, image)]
            assert len(matches) == 1
            batch += matches
        # One draw a sample, not one a batch: shifts and flips vary inside it.
        assert len({key[0] for key in batch}) > (padding > 0)
        assert len({key[1] for key in batch}) > (padding > 0)
        assert {key[2] for key in batch} == ({False, True} if flip else {False})
        drawn += batch
    every = set(range(2 * padding + 1))
    assert {key[0] for key in drawn} == {key[1] for key in drawn} == every
    if padding:
        assert any(key[0] != key[1] for key in drawn), "rows and columns are drawn apart"


def test_shifts_and_flips_are_even():
    """1000 images: each shift of [-2, 2] in 1/5, a flip in 1/2, within 5 standard errors."""
    image = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6)
    data = ImageSet(image.expand(1000, 1, 6, 6), torch.arange(1000))
    crops = {tuple(c.flatten().tolist()): k for k, c in variants(image[0], 2, True).items()}
    images = joined(epoch_of(data, batch_size=100, padding=2, flip=True)).images
    rows = (images * 255).round().int().flatten(1).tolist()
    keys = torch.tensor([crops[tuple(row)] for row in rows])
    for axis in (0, 1):
        assert (keys[:, axis].bincount(minlength=5) / 1000 - 0.2).abs().max() < 5 * 0.0127
    assert abs(float(keys[:, 2].float().mean()) - 0.5) < 5 * 0.0158


# Real data


@real_data
def test_real_mnist():
    data = load("mnist", Path(os.environ["IBP_DATA_DIR"]))
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.train.labels.bincount().tolist()[:3] == [5923, 6742, 5958]
    assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    mean, std = channel_statistics(data.train.images)
    assert (mean, std) == ((0.1307,), (0.3081,)), "the figures that everybody quotes"


@real_data
def test_real_cifar10():
    data = load("cifar10", Path(os.environ["IBP_DATA_DIR"]), limit_train=500)
    assert data.title in ("CIFAR-10 (JPEG)", "CIFAR-10")
    assert data.in_shape == (3, 32, 32)
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert len(data.train) == 500
    assert data.train.labels.bincount(minlength=10).min() > 20
    mean, _ = channel_statistics(data.test.images)
    assert mean == pytest.approx(data.mean, abs=0.01)


@real_data
def test_real_tinyimagenet():
    folder = Path(os.environ["IBP_DATA_DIR"])
    data = load("tinyimagenet", folder, limit_train=400, limit_test=400)
    assert data.title in ("TinyImageNet", "TinyImageNet (subset: 20000 + 4000 images)")
    assert len(data.classes) == 200
    assert data.in_shape == (3, 64, 64)
    assert (len(data.train), len(data.test)) == (400, 400)
    mean, _ = channel_statistics(data.train.images)
    assert mean == pytest.approx(data.mean, abs=0.03)
