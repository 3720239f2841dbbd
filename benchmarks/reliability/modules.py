"""Random networks of users, trained by `ibp train --model`.

Claim: each is accepted or refused. If accepted, an epoch of training ends well, and the model
that it writes loads and is certified: by every bound, and with every claim unless it was trained
with `--claim unchecked`. If refused, this is one line, and no folder was made or changed. At
scale 1 there are 3,000 networks, on the CPU.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

from benchmarks.reliability.command import run_ibp
from benchmarks.reliability.rows import Row
from benchmarks.reliability.user_modules import user_module
from ibpcore import load_model
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certificates import UNCHECKED
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.soundness.network import CLAIMS
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import Dataset, ImageSet
from ibpcore.data.sources import DATASETS, Request, load_dataset
from ibpcore.errors import first_line
from ibpcore.experiments.run_folder import saved_config
from ibpcore.nn.initialization import INITIALIZATIONS
from ibpcore.training.methods import METHODS
from ibpcore.training.presets import NOT_MEANS

NETWORKS = 3_000
MODULE = "random_network"
DIVERGED = "the loss is not finite"
"""The only reason to stop after the first step, as with any network."""
SMALL = ("--epochs", "1", "--warmup", "1:1", "--batch-size", "4")


class Outcome(NamedTuple):
    """How the training of a network ended: accepted, or refused with a message; and what failed."""

    refused: str = ""
    failure: str = ""


def run(scale: float, seed: int, work: Path) -> list[Row]:
    """A row of the networks and how many of them were refused."""
    count, began = max(1, round(scale * NETWORKS)), time.process_time()
    ends = {f"{seed}-{n}": outcome(f"{seed}-{n}", work) for n in range(count)}
    refused = sum(bool(end.refused) for end in ends.values())
    failures = [f"{name}: {end.failure}" for name, end in ends.items() if end.failure]
    rate = count / (time.process_time() - began)
    note = f"{refused:,} refused; {rate:.1f} a CPU second"
    return [Row("random networks of users", count, len(failures), "; ".join([note, *failures[:5]]))]


def outcome(name: str, work: Path) -> Outcome:
    """Trains the network of that name in an existing folder."""
    rng = random.Random(f"settings of {name}")
    data, out = load_dataset("digits", Request(limit_train=9, limit_test=5)), work / "run"
    before = _prepared(rng, work)
    argv = ["train", "--model", f"{MODULE}:build", *SMALL, *_settings(rng), "--out", str(out)]
    with _network(name, data), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about unusual layers
        try:
            refused = run_ibp(argv)
            if not refused:
                _use(out, data)
            elif _tree(work) != before and DIVERGED not in refused:
                return Outcome(refused, f"refused, but left {_tree(work)}: {refused}")
        except Exception as error:
            return Outcome("", f"{type(error).__name__}: {first_line(error)[:300]}")
    return Outcome(refused)


def _prepared(rng: random.Random, work: Path) -> dict[str, bytes]:
    """Empties the folder, and sometimes makes that of the run before; returns its `_tree`."""
    for path in work.iterdir():
        shutil.rmtree(path)
    if rng.random() < 0.3:
        (work / "run").mkdir()
        if rng.random() < 0.1:
            (work / "run" / "notes").write_text("mine")
    return _tree(work)


def _tree(folder: Path) -> dict[str, bytes]:
    """The paths in a folder, with their contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


def _settings(rng: random.Random) -> list[str]:
    """Options of `ibp train` that change what a network is used for."""
    options = ["--method", method := rng.choice([*METHODS])]
    options += ["--initialization", rng.choice([*INITIALIZATIONS])]
    options += ["--claim", rng.choice([UNCHECKED, *CLAIMS])]
    if method not in NOT_MEANS and rng.random() < 0.2:
        options += ["--accumulate", "2"]
    if method == "crown-ibp" and rng.random() < 0.5:
        options += ["--loss-fusion"]
    for option in ("--no-elide", "--no-clip"):
        if rng.random() < 0.3:
            options.append(option)
    for option, value in (("--inspect-every", "1"), ("--l1", "0.001"), ("--validation", "2")):
        if rng.random() < 0.1:
            options += [option, value]
    return options


@contextlib.contextmanager
def _network(name: str, data: Dataset) -> Iterator[None]:
    """Inside, the function `MODULE`:build makes the network of that name, for these digits."""
    module = ModuleType(MODULE)
    vars(module)["build"] = lambda in_shape, classes: user_module(
        random.Random(name), in_shape, classes
    )
    sys.modules[MODULE] = module
    try:
        with mock.patch.dict(DATASETS, digits=lambda request: data):
            yield
    finally:
        del sys.modules[MODULE]


def _use(run: Path, data: Dataset) -> None:
    """Loads the model of a run, and certifies with it; raises whatever fails."""
    config, model = saved_config(run), load_model(run)
    # A misclassified image needs no bounds.
    images = ImageSet(data.test.images, model(as_pixels(data.test.images)).argmax(1))
    for claim in (UNCHECKED, *(CLAIMS if config.claim != UNCHECKED else ())):
        for bound in BOUNDS:
            bounds = BoundOptions(bound, config.elide, config.bound_options.clip)
            options = CertificationOptions(config.epsilon_max, claim, bounds)
            found = certify(model, images, options)
            assert bool(found.radius.isfinite().all()), "a radius is not finite"
