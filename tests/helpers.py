"""What several test files need: the command line in this process, ranks, and small data sets."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

from ibpcore_cli.main import main

TESTS = Path(__file__).parent
WNIDS = ("n03", "n01", "n02")
"""As they stand in a `wnids.txt`, which need not be sorted."""


class Outcome(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def run_ibp(*args: object) -> Outcome:
    """`ibp ARGS` without the seconds that a new process spends on importing torch.

    What `ibp` does not turn into an exit code, such as a stray exception, goes through.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["ibp", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
        else:
            code = 0
    return Outcome(code, out.getvalue(), err.getvalue())


def started(size: int, arguments: list[object], folder: Path) -> list[subprocess.Popen[bytes]]:
    """`size` processes of `python ARGUMENTS`, that are ranks of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": 1}
    processes = []
    for rank in range(size):
        own = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        with (folder / f"errors of {rank}").open("wb") as errors:
            command = [sys.executable, *map(str, arguments)]
            processes.append(subprocess.Popen(command, env=environment, stderr=errors, cwd=TESTS))
    return processes


def ended(
    processes: list[subprocess.Popen[bytes]], folder: Path, patience: float = 300.0
) -> list[tuple[int, str]]:
    """Exit code and errors of each, within so many seconds."""
    try:
        codes = [process.wait(timeout=patience) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(code, (folder / f"errors of {rank}").read_text()) for rank, code in enumerate(codes)]


def leave() -> None:
    """Ends a rank as `python -m ibpcore_cli` does, without the shutdown that gloo may abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` with its content; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def grey(label: int) -> int:
    """The level that the images of a class have in the trees made here."""
    return 10 + 24 * label


def write_image(path: Path, color: object, size: tuple[int, int] = (8, 8), mode="RGB") -> None:
    """One colour all over; `size` is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def write_tree(
    root: Path,
    classes: Sequence[str],
    images: int = 2,
    size: tuple[int, int] = (8, 8),
    suffix: str = ".png",
) -> Path:
    """`root/{train,test}/<class>/<number><suffix>`; `grey(label)` all over."""
    for part in ("train", "test"):
        for label, name in enumerate(classes):
            for number in range(images):
                write_image(root / part / name / f"{number}{suffix}", (grey(label),) * 3, size)
    return root


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of bytes in the format of the MNIST files."""
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(root: Path, train: int = 40, test: int = 20) -> Path:
    """`root/MNIST/raw/*`, labels 0, 1, ..., 9, 0, ... and random pixels."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return root


def write_tinyimagenet(root: Path, images: int = 2, size: tuple[int, int] = (8, 8)) -> Path:
    """`root/tiny-imagenet-200` in the official layout; validation images in no order of class."""
    top = root / "tiny-imagenet-200"
    labels = {wnid: label for label, wnid in enumerate(sorted(WNIDS))}
    annotations = []
    for number in range(images):
        for place, wnid in enumerate(WNIDS):
            color = (grey(labels[wnid]),) * 3
            write_image(top / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", color, size)
            name = f"val_{number * len(WNIDS) + place}.JPEG"
            write_image(top / "val" / "images" / name, color, size)
            annotations.append(f"{name}\t{wnid}\t0\t0\t7\t7\n")
    for wnid in WNIDS:
        (top / "train" / wnid / f"{wnid}_boxes.txt").write_text("no images\n")
    (top / "val" / "val_annotations.txt").write_text("".join(reversed(annotations)))
    (top / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (top / "words.txt").write_text("n01\tgoldfish\n")
    return root
