"""What `ibp doctor` does.

torch and ibpcore are imported only where they are needed, since the command must also work
for installations in which they cannot be imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import click

from ibpcore.wording import counted
from ibpcore_cli.versions import device_line

REQUIREMENT = re.compile(r"([\w.-]+)(?:[^;]*;.*\bextra\s*==\s*['\"]([\w-]+)['\"])?")
Check = tuple[str, Callable[[], str]]
"""A name, and a function that returns a remark or raises an exception."""


def carry_out(data_dir: Path, device: str) -> None:
    click.echo(f"Python {sys.version.split()[0]}, {sys.executable}")
    for line in packages():
        click.echo(f"  {line}")
    click.echo("\ndevice")
    _print_checks(device_checks(), "-")
    click.echo(f"\ndata sets in {data_dir}")
    _print_checks(data_checks(data_dir), "-")
    click.echo("\nself-test")
    if failed := _print_checks(self_test(device), "FAILED:", "ok:"):
        raise click.ClickException(f"the self-test failed: {', '.join(failed)}")


def _print_checks(checks: Iterable[Check], bad: str, good: str = "") -> list[str]:
    """Prints a line for each; returns the names of those that failed."""
    failed = []
    for name, check in checks:
        try:
            words = [good, check()]
        except Exception as error:  # a broken package may raise anything
            words = [bad, *(str(error) or type(error).__name__).split()]
            failed.append(name)
        click.echo(f"  {name:<13} {' '.join(word for word in words if word)}")
    return failed


def packages() -> Iterator[str]:
    """A line for each package that ibpcore requires, and for each of its extras."""
    extras: dict[str, list[str]] = {}
    for requirement in requires("ibpcore") or []:
        found = REQUIREMENT.match(requirement)
        if found and found[1] != "ibpcore":
            extras.setdefault(found[2] or "", []).append(found[1])
    for name in ["ibpcore", *extras.pop("", [])]:
        yield f"{name:<13} {_version(name) or f'missing: pip install {name}'}"
    for extra, names in extras.items():
        words = [f"{name} {_version(name) or 'missing'}" for name in names]
        remedy = f": pip install 'ibpcore[{extra}]'" if not all(map(_version, names)) else ""
        yield f"{f'[{extra}]':<13} {', '.join(words)}{remedy}"


def _version(name: str) -> str:
    """The version of a package; empty if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def device_checks() -> Iterator[Check]:
    """The device, and whether `--compile` works on it."""

    def compiler() -> str:
        import torch

        from ibpcore.bounds.compilation import check_compiler

        check_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return "found"

    yield "device", device_line
    yield "--compile", compiler


def data_checks(data_dir: Path) -> Iterator[Check]:
    """Each data set; one image of it is read."""

    def read(name: str) -> str:
        from ibpcore.data.sources import Request, load_dataset

        found = load_dataset(name, Request(data_dir, limit_train=1, limit_test=1))
        text = f"{found.title}, images {found.in_shape}, {counted(len(found.classes), 'class')}"
        return "; ".join([text, *found.remarks])

    for name in ("digits", "mnist", "cifar10", "tinyimagenet", "imagefolder"):
        yield name, partial(read, name)


def self_test(device: str) -> Iterator[Check]:
    """The checks of `ibpcore.selftest`; each fails if that cannot be imported."""

    def check(name: str) -> str:
        from ibpcore.distributed import current_device
        from ibpcore.selftest import CHECKS
        from ibpcore.threads import computing_with, suitable_threads

        with computing_with(suitable_threads()):
            return CHECKS[name](current_device(device))

    for name in ("training", "bounds", "certificates", "files"):
        yield name, partial(check, name)
