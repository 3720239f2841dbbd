"""The data sets by name. To add one, write a function here and enter it in DATASETS."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from ibpcore.choices import DATA_DIR, DATA_DIR_VARIABLE
from ibpcore.data.arrays import OWN
from ibpcore.data.downloads import Archive, fetch, install
from ibpcore.data.folders import (
    ONE_SIZE,
    Tree,
    class_folders,
    is_image,
    read_images,
    read_tree,
)
from ibpcore.data.idx import find_idx, read_idx
from ibpcore.data.images import (
    Dataset,
    ImageSet,
    channel_statistics,
    hold_out,
    listed,
    subset_indices,
)
from ibpcore.data.tinyimagenet import read_lines, validation_tree
from ibpcore.errors import UserError, first_line, printable
from ibpcore.wording import counted


def usual_folder() -> Path:
    """The folder of the data sets that is not given."""
    return Path(os.environ.get(DATA_DIR_VARIABLE) or DATA_DIR)


@dataclass(frozen=True)
class Request:
    """Which images of a data set to load, and from where.

    Attributes:
        data_dir: folder of the data sets; for `imagefolder` the data set itself. Without one, the
            environment variable IBP_DATA_DIR names it, else it is `data`.
        download: fetch a data set that is missing, if there is an archive of it.
        limit_train, limit_test: use this many images, spread over all; None for all.
        image_size: side in pixels to which `imagefolder` resizes and crops.
        validation: number of training images to hold out, see `hold_out`.
    """

    data_dir: Path = field(default_factory=usual_folder)
    download: bool = False
    limit_train: int | None = None
    limit_test: int | None = None
    image_size: int | None = None
    validation: int = 0


DIGITS = tuple("0123456789")
"""Class names of the data sets of digits."""


def load_dataset(name: str, request: Request | None = None) -> Dataset:
    """Loads a data set by its name, a key of `DATASETS`; None for all of it, see `Request`.

    Raises:
        UserError: the data set is unknown, missing, damaged, or has another layout.
    """
    request = Request() if request is None else request
    if name == OWN:
        raise UserError(
            "the images were given in Python, and are in no file: name another data set, or give"
            " them to ibpcore.evaluate"
        )
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: known are {', '.join(DATASETS)}")
    for limit in (request.limit_train, request.limit_test, request.image_size):
        if limit is not None and limit < 1:
            raise UserError(f"limits and the image size must be at least 1, but one is {limit}")
    if request.image_size is not None and name != "imagefolder":
        raise UserError("image_size must be left out, except for the data set imagefolder")
    dataset = DATASETS[name](request)
    check_parts(dataset)
    return hold_out(dataset, request.validation)


def check_parts(dataset: Dataset) -> None:
    """Raises UserError unless each part has images, all of one shape, with labels of classes."""
    parts = {"test": dataset.test, "training": dataset.train}
    if dataset.validation is not None:
        parts["validation"] = dataset.validation
    classes, shape = len(dataset.classes), tuple(dataset.train.images.shape[1:])
    for name, part in parts.items():
        if len(part) == 0:
            raise UserError(f"{dataset.title} has no {name} images")
        found = tuple(part.images.shape[1:])
        if found != shape:
            raise UserError(
                f"the training images of {dataset.title} are {shape}, the {name} images {found}:"
                f" {ONE_SIZE}"
            )
        for label in (int(part.labels.min()), int(part.labels.max())):
            if not 0 <= label < classes:
                counts = counted(classes, "class")
                raise UserError(f"{dataset.title} has a label {label}, but {counts}")


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
        packed = [a.name for a in archives if (folder.parent / a.name).is_file()]
        unpack = f" (which unpacks {', '.join(packed)} beside it)" if packed else ""
        raise UserError(
            f"{folder} is not there: --data-dir must be the folder that holds {expected}{trees},"
            f" or fetch it with --download{unpack}"
        )
    install(archives, folder.parent, folder, inside)


def _first(folders: Sequence[Path], holds: Callable[[Path], object] = Path.exists) -> Path:
    """The first of the `folders` that exists, or holds what it should; else the first of all."""
    return next((folder for folder in folders if holds(folder)), folders[0])


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
    """Reads the four official files, packed or not, under any of their usual names."""
    top, names = request.data_dir, [name.removesuffix(".gz") for name in MNIST_MD5]
    folders = (top / "MNIST" / "raw", top / "MNIST", top / "mnist" / "raw", top / "mnist", top)
    folder = _first(folders, lambda folder: any(find_idx(folder, name) for name in names))
    if not folder.exists():
        _fetch(request, MNIST_ARCHIVES, folder)
    if request.download:
        for archive in MNIST_ARCHIVES:
            if find_idx(folder, archive.name.removesuffix(".gz")) is None:
                fetch(archive, folder)

    def read(name: str, dimensions: int) -> np.ndarray:
        path = find_idx(folder, name)
        if path is None:
            raise UserError(f"{folder} lacks {name}, packed or not: --download fetches it")
        try:
            return read_idx(path, dimensions)
        except (ValueError, OSError) as error:
            advice = "move this file away, and --download fetches it anew"
            raise UserError(f"{path} cannot be read: {first_line(error)}; {advice}") from None

    def part(name: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = read(f"{name}-images-idx3-ubyte", 3), read(f"{name}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise UserError(
                f"{folder} holds not as many labels as images of {name}:"
                f" {len(labels)} and {len(images)}"
            )
        return images[:, None], labels

    return Dataset("mnist", "MNIST", DIGITS, *_image_sets([part("train"), part("t10k")], request))


CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
CIFAR10_ARCHIVE = Archive(
    "cifar-10-python.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
    "c58f30108f718f92721af3b95e74349a",
)
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def _cifar10(request: Request) -> Dataset:
    """Reads the official files, or an image-folder tree in `cifar10-jpeg` or `cifar10`."""
    top = request.data_dir
    trees = (top / "cifar10-jpeg", top / "cifar10", top / "CIFAR10", top)
    tree = next((tree for tree in trees if (tree / "train").is_dir()), None)
    inside = top.is_dir() and top.resolve().name == CIFAR10_FOLDER
    places = (top.resolve().parent,) if inside else (top, *trees[:-1])
    official = _first([place / CIFAR10_FOLDER for place in places])
    if tree is not None and not official.exists() and not request.download:
        return _cifar10_tree(tree, request)
    if not official.exists():
        _fetch(request, [CIFAR10_ARCHIVE], official, official.name)

    def read(training: bool) -> tuple[np.ndarray, list[int]]:
        from torchvision import datasets as torchvision_datasets

        # The files are pickles; torchvision reads them only if their MD5 sums are official.
        part = torchvision_datasets.CIFAR10(str(official.parent), train=training)
        return part.data.transpose(0, 3, 1, 2), part.targets

    try:
        train, test = _image_sets([read(True), read(False)], request)
    except READ_ERRORS as error:
        fault = _cifar10_fault(official) or first_line(error)
        advice = "move this folder away, and --download makes it anew"
        raise UserError(f"{official} cannot be read: {fault}; {advice}") from None
    return Dataset("cifar10", "CIFAR-10", CIFAR10_CLASSES, train, test, CIFAR10_MEAN, CIFAR10_STD)


def _cifar10_fault(folder: Path) -> str:
    """Names the files that are missing, or have not the official checksums; empty if none."""
    from torchvision.datasets import cifar

    data = cifar.CIFAR10
    files = [*data.train_list, *data.test_list, (data.meta["filename"], data.meta["md5"])]
    missing = [name for name, _ in files if not (folder / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing"
    other = [name for name, md5 in files if not cifar.check_integrity(str(folder / name), md5)]
    return f"{', '.join(other)} corrupted, or not official" if other else ""


def _cifar10_tree(root: Path, request: Request) -> Dataset:
    parts = [read_tree(root / part, CIFAR10_CLASSES) for part in ("train", "test")]
    jpeg = parts[0].samples[0][0].suffix.lower() in (".jpg", ".jpeg")
    title = "CIFAR-10 (JPEG)" if jpeg else "CIFAR-10 (image folder)"
    train, test, remarks = _read_samples(parts, request)
    statistics = (CIFAR10_MEAN, CIFAR10_STD)
    return Dataset("cifar10", title, CIFAR10_CLASSES, train, test, *statistics, remarks=remarks)


def _read_samples(
    parts: Sequence[Tree], request: Request
) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """The training and the test part, from the image files of each, and remarks on both."""
    sets, remarks = [], list[str]()
    for part, limit in zip(parts, (request.limit_train, request.limit_test), strict=True):
        images, changes = read_images(part.samples, limit, request.image_size)
        sets.append(images)
        remarks.append(part.in_words())
        if changes:
            kinds = ", ".join(f"{n:,} {change}" for change, n in changes.most_common())
            remarks.append(
                f"{part.root}: of {counted(len(images), 'image')} read, changed: {kinds}"
            )
    root, names = parts[0].root.parent, [part.root.name for part in parts]
    beside = {path.name for path in root.iterdir() if path.is_dir() or is_image(path)}
    if unread := sorted(beside - set(names)):
        remarks.append(f"{root}: only {' and '.join(names)} are read, not {', '.join(unread)}")
    return sets[0], sets[1], tuple(map(printable, remarks))


TINYIMAGENET_ARCHIVE = Archive(
    "tiny-imagenet-200.zip",
    ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
    "90528d7ca1a48142e341f4ef8d21d0de",
)
TINYIMAGENET_SIZES = 100_000, 10_000
"""Images of the whole training and validation part; the latter serves as the test set."""
TINYIMAGENET_MEAN, TINYIMAGENET_STD = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)


def _tinyimagenet(request: Request) -> Dataset:
    """Reads the official archive's layout, whatever the number of images.

    Images may have been moved out of the folders `images`, and those of validation into folders
    of classes.
    """
    top = request.data_dir
    inside = top / "tiny-imagenet-200"
    roots = (inside, inside / inside.name, top / "tiny-imagenet", top / "tinyimagenet", top)
    root = _first(roots, lambda folder: (folder / "wnids.txt").exists())
    if not root.is_dir():
        _fetch(request, [TINYIMAGENET_ARCHIVE], root, root.name)
    wnids = tuple(sorted(read_lines(root / "wnids.txt")))
    parts = [read_tree(root / "train", wnids), validation_tree(root / "val", wnids)]
    sizes = tuple(len(part.samples) for part in parts)
    whole = sizes == TINYIMAGENET_SIZES
    title = "TinyImageNet" if whole else f"TinyImageNet (subset: {sizes[0]} + {sizes[1]} images)"
    train, test, remarks = _read_samples(parts, request)
    statistics = (TINYIMAGENET_MEAN, TINYIMAGENET_STD)
    return Dataset("tinyimagenet", title, wnids, train, test, *statistics, remarks=remarks)


TEST_FOLDERS = ("test", "val", "valid", "validation")
"""Names of the folder of test images, of which the first that is there is read."""


def _imagefolder(request: Request) -> Dataset:
    """Reads a tree `train/<class>/*`, `test/<class>/*` in the data folder itself."""
    root = request.data_dir
    test_folder = _first([root / name for name in TEST_FOLDERS], Path.is_dir)
    if not ((root / "train").is_dir() and test_folder.is_dir()):
        raise UserError(_how_to_arrange(root))
    classes = tuple(folder.name for folder in class_folders(root / "train"))
    if len(classes) < 2:
        raise UserError(f"{root / 'train'} holds one class folder; two are needed")
    parts = [read_tree(folder, classes) for folder in (root / "train", test_folder)]
    train, test, remarks = _read_samples(parts, request)
    if test_folder.name != "test":
        remarks += (f"{root}: there is no folder test, so {test_folder.name} is the test part",)
    title, statistics = f"image folder {root.resolve().name}", channel_statistics(train.images)
    return Dataset("imagefolder", title, classes, train, test, *statistics, remarks=remarks)


def _how_to_arrange(root: Path) -> str:
    """What to do with a folder that lacks one of the two parts."""
    layout = "train/<class> and test/<class>"
    if not root.is_dir():
        return f"no folder {root}: --data-dir must be the folder that holds {layout}"
    if root.resolve().name in ("train", *TEST_FOLDERS):
        return f"{root} is one part only: --data-dir must be the folder above it, with {layout}"
    if (root / "train").is_dir():
        return (
            f"no folder {root / 'test'}, nor val: move some images of each class from"
            f" {root / 'train'}/<class> to {root / 'test'}/<class>"
        )
    found = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not found:
        return f"no folder {root / 'train'}: --data-dir must be the folder that holds {layout}"
    return (
        f"no folder {root / 'train'}: if {listed(found)} are classes, move most images of each to"
        f" {root / 'train'}/<class>, the others to {root / 'test'}/<class>"
    )


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
    OWN: ("1/255", "2/255", "4/255", "8/255"),
}
"""Radii at which the certified accuracy of a data set is usually reported, as text."""
