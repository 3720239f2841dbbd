"""The data sets by name. To add one, write a function here and enter it in DATASETS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from ibpcore.data.downloads import Archive, install
from ibpcore.data.folders import (
    ONE_SIZE,
    Sample,
    class_folders,
    list_images,
    read_images,
    tree_samples,
)
from ibpcore.data.idx import read_idx
from ibpcore.data.images import Dataset, ImageSet, channel_statistics, hold_out, subset_indices
from ibpcore.errors import UserError, first_line


@dataclass(frozen=True)
class Request:
    """Which images of a data set to load, and from where.

    Attributes:
        data_dir: folder of the data sets; for `imagefolder` the data set itself.
        download: fetch a data set that is missing, if there is an archive of it.
        limit_train, limit_test: use this many images, spread over all; None for all.
        image_size: side in pixels to which `imagefolder` resizes and crops.
        validation: number of training images to hold out, see `hold_out`.
    """

    data_dir: Path = Path("data")
    download: bool = False
    limit_train: int | None = None
    limit_test: int | None = None
    image_size: int | None = None
    validation: int = 0


DIGITS = tuple("0123456789")
"""Class names of the data sets of digits."""


def load_dataset(name: str, request: Request) -> Dataset:
    """Loads a data set by its name, a key of `DATASETS`.

    Raises:
        UserError: the data set is unknown, missing, damaged, or has another layout.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: known are {', '.join(DATASETS)}")
    for limit in (request.limit_train, request.limit_test, request.image_size):
        if limit is not None and limit < 1:
            raise UserError(f"limits and the image size must be at least 1, but one is {limit}")
    if request.image_size is not None and name != "imagefolder":
        raise UserError("an image size goes with the data set imagefolder only")
    dataset = DATASETS[name](request)
    _check_parts(dataset)
    return hold_out(dataset, request.validation)


def _check_parts(dataset: Dataset) -> None:
    """Raises UserError unless all images have the same shape and every label is a class."""
    train, test = dataset.train, dataset.test
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UserError(
            f"the training images of {dataset.title} are {tuple(train.images.shape[1:])}, the"
            f" test images {tuple(test.images.shape[1:])}: {ONE_SIZE}"
        )
    largest, classes = int(torch.cat([train.labels, test.labels]).max()), len(dataset.classes)
    if largest >= classes:
        raise UserError(f"{dataset.title} has a label {largest}, but {classes} classes")


def _digits(request: Request) -> Dataset:
    with resources.files("ibpcore.data").joinpath("digits.npz").open("rb") as file:
        arrays = np.load(file)
        images, labels = arrays["images"][:, None], arrays["labels"]
    split = 1347  # see DIGITS.md
    parts = [(images[:split], labels[:split]), (images[split:], labels[split:])]
    return Dataset("digits", "UCI optical digits", DIGITS, *_image_sets(parts, request))


def _image_sets(parts: Sequence[tuple[Any, Any]], request: Request) -> tuple[ImageSet, ImageSet]:
    """The training and the test part, from (N, C, H, W) images and (N,) labels of each."""

    def limited(images: np.ndarray, labels: Any, limit: int | None) -> ImageSet:
        index = subset_indices(len(images), limit)
        return ImageSet(
            torch.from_numpy(np.ascontiguousarray(images[index])),
            torch.from_numpy(np.asarray(labels)[index].astype(np.int64)),
        )

    train, test = parts
    return limited(*train, request.limit_train), limited(*test, request.limit_test)


READ_ERRORS = (RuntimeError, ValueError, OSError, EOFError, UnpicklingError, LookupError, TypeError)
"""Raised by the readers for files that are missing or damaged."""


def _fetch(request: Request, archives: Sequence[Archive], folder: Path, inside: str = ".") -> None:
    """Installs the missing `folder` of a data set, see `install`, if the request allows that."""
    if not request.download:
        expected = folder.relative_to(request.data_dir).as_posix()
        trees = " or a tree cifar10-jpeg/{train,test}/<class>" if "cifar" in expected else ""
        raise UserError(
            f"{folder} is not there: --data-dir must be the folder that holds {expected}{trees},"
            " or fetch it with --download"
        )
    install(archives, folder.parent, folder, inside)


def _read_whole(folder: Path, read: Callable[[bool], tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Images and labels of the training and the test part: `read(True)` and `read(False)`."""
    try:
        parts = [read(training) for training in (True, False)]
        if any(len(images) != len(labels) for images, labels in parts):
            raise ValueError("not as many labels as images")
    except READ_ERRORS as error:
        advice = "delete it and fetch it again with --download"
        raise UserError(f"{folder} cannot be read: {first_line(error)}; {advice}") from None
    return parts


MNIST_URLS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
MNIST_ARCHIVES = [
    Archive(name, tuple(url + name for url in MNIST_URLS), md5) for name, md5 in MNIST_MD5.items()
]


def _mnist(request: Request) -> Dataset:
    folder = request.data_dir / "MNIST" / "raw"
    if not folder.exists():
        _fetch(request, MNIST_ARCHIVES, folder)

    def read(training: bool) -> tuple[np.ndarray, np.ndarray]:
        part = "train" if training else "t10k"
        images = read_idx(folder / f"{part}-images-idx3-ubyte", 3)
        return images[:, None], read_idx(folder / f"{part}-labels-idx1-ubyte", 1)

    return Dataset("mnist", "MNIST", DIGITS, *_image_sets(_read_whole(folder, read), request))


CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CIFAR10_ARCHIVE = Archive(
    "cifar-10-python.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
    "c58f30108f718f92721af3b95e74349a",
)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def _cifar10(request: Request) -> Dataset:
    """Reads the official archive, or an image-folder tree in `cifar10-jpeg` or `cifar10`."""
    trees = (request.data_dir / "cifar10-jpeg", request.data_dir / "cifar10", request.data_dir)
    tree = next((tree for tree in trees if (tree / "train").is_dir()), None)
    official = request.data_dir / "cifar-10-batches-py"
    if tree is not None and not official.exists() and not request.download:
        return _cifar10_tree(tree, request)
    if not official.exists():
        _fetch(request, [CIFAR10_ARCHIVE], official, official.name)

    def read(training: bool) -> tuple[np.ndarray, list[int]]:
        from torchvision import datasets as torchvision_datasets

        # The files are pickles; torchvision reads them only if their MD5 sums are official.
        part = torchvision_datasets.CIFAR10(str(request.data_dir), train=training)
        return part.data.transpose(0, 3, 1, 2), part.targets

    train, test = _image_sets(_read_whole(official, read), request)
    return Dataset("cifar10", "CIFAR-10", CIFAR10_CLASSES, train, test, CIFAR10_MEAN, CIFAR10_STD)


def _cifar10_tree(tree: Path, request: Request) -> Dataset:
    parts = [tree_samples(tree / part, CIFAR10_CLASSES) for part in ("train", "test")]
    jpeg = parts[0][0][0].suffix.lower() in (".jpg", ".jpeg")
    title = "CIFAR-10 (JPEG)" if jpeg else "CIFAR-10 (image folder)"
    train, test = _read_samples(parts, request)
    return Dataset("cifar10", title, CIFAR10_CLASSES, train, test, CIFAR10_MEAN, CIFAR10_STD)


def _read_samples(parts: Sequence[list[Sample]], request: Request) -> tuple[ImageSet, ImageSet]:
    """The training and the test part, from the image files of each."""
    train, test = parts
    limited = read_images(train, request.limit_train, request.image_size)
    return limited, read_images(test, request.limit_test, request.image_size)


TINYIMAGENET_ARCHIVE = Archive(
    "tiny-imagenet-200.zip",
    ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
    "90528d7ca1a48142e341f4ef8d21d0de",
)
TINYIMAGENET_SIZES = 100_000, 10_000
"""Images of the whole training and validation part; the latter serves as the test set."""
TINYIMAGENET_MEAN, TINYIMAGENET_STD = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)


def _tinyimagenet(request: Request) -> Dataset:
    """Reads the official archive's layout, whatever the number of images."""
    root = request.data_dir / "tiny-imagenet-200"
    if not root.is_dir():
        _fetch(request, [TINYIMAGENET_ARCHIVE], root, root.name)
    wnids = tuple(sorted(_read_lines(root / "wnids.txt")))
    parts = [tree_samples(root / "train", wnids, "images"), _annotated_samples(root / "val", wnids)]
    sizes = tuple(map(len, parts))
    whole = sizes == TINYIMAGENET_SIZES
    title = "TinyImageNet" if whole else f"TinyImageNet (subset: {sizes[0]} + {sizes[1]} images)"
    train, test = _read_samples(parts, request)
    statistics = (TINYIMAGENET_MEAN, TINYIMAGENET_STD)
    return Dataset("tinyimagenet", title, wnids, train, test, *statistics)


def _annotated_samples(val: Path, wnids: tuple[str, ...]) -> list[Sample]:
    """(file, label) from `val_annotations.txt`: file name, class and a box on each line."""
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    annotations = val / "val_annotations.txt"
    samples = []
    for number, line in enumerate(_read_lines(annotations), 1):
        file, wnid, *_ = [*line.split("\t"), "", ""]
        if wnid not in labels:
            raise UserError(f"{annotations}, line {number}: {wnid!r} is not a class")
        samples.append((val / "images" / file, labels[wnid]))
    present = set(list_images(val / "images"))
    samples = [sample for sample in samples if sample[0] in present]
    if not samples:
        raise UserError(f"{annotations} names none of the images beside it")
    return samples


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"wrong layout: {path} is missing or cannot be read") from None
    if not lines:
        raise UserError(f"wrong layout: {path} is empty")
    return lines


def _imagefolder(request: Request) -> Dataset:
    """Reads a tree `train/<class>/*`, `test/<class>/*` in the data folder itself."""
    classes = tuple(folder.name for folder in class_folders(request.data_dir / "train"))
    if len(classes) < 2:
        raise UserError(f"{request.data_dir / 'train'} holds one class folder; two are needed")
    parts = [tree_samples(request.data_dir / part, classes) for part in ("train", "test")]
    train, test = _read_samples(parts, request)
    title = f"image folder {request.data_dir.resolve().name}"
    return Dataset("imagefolder", title, classes, train, test, *channel_statistics(train.images))


DATASETS: dict[str, Callable[[Request], Dataset]] = {
    "digits": _digits,
    "mnist": _mnist,
    "cifar10": _cifar10,
    "tinyimagenet": _tinyimagenet,
    "imagefolder": _imagefolder,
}
STANDARD_RADII: dict[str, tuple[str, ...]] = {
    "mnist": ("0.1", "0.2", "0.3", "0.4"),
    "cifar10": ("1/255", "2/255", "4/255", "8/255"),
    "tinyimagenet": ("1/255",),
    "digits": ("0.025", "0.05", "0.075", "0.1"),
    "imagefolder": ("1/255", "2/255", "4/255", "8/255"),
}
"""Radii at which the certified accuracy of a data set is usually reported, as text."""
