"""The validation images of TinyImageNet, as in the archive or sorted into folders of classes."""

from __future__ import annotations

import filecmp
from pathlib import Path

from ibpcore.data.folders import Tree, in_words, list_images, read_tree
from ibpcore.errors import UserError

ANNOTATIONS = "val_annotations.txt"


def validation_tree(val: Path, wnids: tuple[str, ...]) -> Tree:
    """The images in `val`, wherever they lie, labelled by `val_annotations.txt`.

    A script may have moved or copied them into folders of classes, all or some; without the
    annotations these folders are the labels. The order is that of the annotations, so that it
    does not depend on the layout. Of the annotated images some may be missing.

    Raises:
        UserError: an image has no label, or two labels; two images have one name; or see
            `ibpcore.data.folders.read_tree`.
    """
    annotations = val / ANNOTATIONS
    if not annotations.exists() and any((val / wnid).is_dir() for wnid in wnids):
        return read_tree(val, wnids)
    labels = _annotated(annotations, wnids)
    files, passed_over = list_images(val)
    if not files:
        raise UserError(f"{val}: {in_words(0, passed_over, val)}")
    passed_over[annotations.suffix].remove(annotations)
    found = dict[str, Path]()
    for file in files:
        _check_label(file, val, wnids, labels, annotations)
        other = found.setdefault(file.name, file)
        if other != file:
            if not filecmp.cmp(file, other, shallow=False):
                raise UserError(f"{other} and {file} have one name, but are different images")
            passed_over["copies of images in other folders"].append(file)
    samples = [(found[name], label) for name, label in labels.items() if name in found]
    if not samples:
        raise UserError(f"{annotations} names none of the images beside it")
    return Tree(val, samples, passed_over)


def _check_label(
    file: Path, val: Path, wnids: tuple[str, ...], labels: dict[str, int], annotations: Path
) -> None:
    """Raises UserError unless a file is annotated, with the class of its folder if that is one."""
    if file.name not in labels:
        raise UserError(f"{file} is not in {annotations}, so that its class is unknown")
    annotated = wnids[labels[file.name]]
    for folder in file.relative_to(val).parts[:-1]:
        if folder in wnids and folder != annotated:
            raise UserError(f"{file} is of the class {annotated} by {annotations}")


def _annotated(path: Path, wnids: tuple[str, ...]) -> dict[str, int]:
    """The label of each file name: name, class and a box on each line."""
    numbers = {wnid: label for label, wnid in enumerate(wnids)}
    labels = dict[str, int]()
    for number, line in enumerate(read_lines(path), 1):
        name, wnid, *_ = [*line.split("\t"), "", ""]
        if wnid not in numbers:
            raise UserError(f"{path}, line {number}: {wnid!r} is not a class")
        if labels.setdefault(name, numbers[wnid]) != numbers[wnid]:
            raise UserError(f"{path}, line {number}: {name!r} had another class before")
    return labels


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    Raises:
        UserError: it is missing, cannot be read, or has none.
    """
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"wrong layout: {path} is missing or cannot be read") from None
    if not lines:
        raise UserError(f"wrong layout: {path} is empty")
    return lines
