"""Files and options damaged at random.

Claim: each is accepted, or refused with one clear line. An input fails if it raises anything but
`UserError` or an OSError that names its file; if the message has more than one line; if it takes
`MOST_SECONDS`; if it writes a file outside its folder; or if it requests more than `MOST_MEMORY`,
used or not. A resume state, a journal or a table of certificates fails too if it is accepted with
values that were not written, or that no certificates have. At scale 1 there are 257,000 inputs, on
the CPU.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import click
import numpy as np
import safetensors.torch
import torch
from PIL import Image

from benchmarks.reliability.command import run_ibp
from benchmarks.reliability.mutation import (
    STRANGE,
    TEXTS,
    damaged_bytes,
    damaged_json,
    damaged_text,
    damaged_value,
)
from benchmarks.reliability.rows import Row
from ibpcore import cnn7, load_model, save_model
from ibpcore.certification.certificates import read_certificates, recorded
from ibpcore.data.downloads import unpack
from ibpcore.data.folders import read_images
from ibpcore.data.images import Dataset
from ibpcore.data.sources import DATASETS, Request, load_dataset
from ibpcore.errors import UserError, first_line
from ibpcore.experiments.comparison import read_all
from ibpcore.experiments.reports import pooled_radii, report
from ibpcore.experiments.results import by_setting, read_result
from ibpcore.experiments.run_folder import config_from, saved_config
from ibpcore.experiments.searches.objectives import Budget, objectives_of
from ibpcore.experiments.searches.search import (
    JOURNAL,
    SEARCH,
    SPACE,
    Search,
    read_search,
    write_search,
)
from ibpcore.experiments.searches.space import Problem, space_of
from ibpcore.experiments.searches.tables import write_tables
from ibpcore.experiments.searches.trials import COMPLETE, Ended, TrialStore, next_point
from ibpcore.experiments.sweeps import Sweep, grid, read_sweep, results_of, write_sweep
from ibpcore.interop.importing.models import Description, import_model
from ibpcore.io.journal import Journal
from ibpcore.nn.architectures import ARCHITECTURES, new_network
from ibpcore.nn.checkpoint import read_facts
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.methods import METHODS
from ibpcore.training.state import load_state, save_state, start_state
from ibpcore_cli.commands import load_all
from ibpcore_cli.value_types import Epochs, Epsilon, Kappas, Seeds, Values

MOST_SECONDS, MOST_MEMORY = 120, 4 * 2**30
Feed = Callable[[random.Random], None]
"""Makes one input and passes it to the code under test; raises what that raises."""


class Fuzzer(NamedTuple):
    """One kind of input.

    Attributes:
        what: name in the report.
        inputs: their number at scale 1.
        prepare: writes the valid input into a folder; returns a function that damages it.
    """

    what: str
    inputs: int
    prepare: Callable[[Path], Feed]


class TooSlow(BaseException):
    """A BaseException, so that no error handler of the code under test catches it."""


def run(scale: float, seed: int, work: Path) -> list[Row]:
    """A row for each fuzzer.

    Args:
        scale: share of the inputs; there is at least one of each kind.
        seed: of the damage.
        work: existing folder, in which each fuzzer gets a folder.
    """
    return [
        fuzzed(fuzzer, max(1, round(scale * fuzzer.inputs)), seed, work / str(number))
        for number, fuzzer in enumerate(FUZZERS)
    ]


def fuzzed(fuzzer: Fuzzer, inputs: int, seed: int, work: Path) -> Row:
    """The row of a fuzzer, for this number of inputs; `work` is a new folder."""
    target = work / "target"
    target.mkdir(parents=True)
    feed, failures = fuzzer.prepare(target), []
    began = time.process_time()
    with limits():
        for number in range(inputs):
            name = f"{seed}-{fuzzer.what}-{number}"
            reason = _outcome(feed, random.Random(name))
            if os.listdir(work) != ["target"]:
                reason = f"it wrote {sorted(os.listdir(work))}"
                for path in set(work.iterdir()) - {target}:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if reason:
                failures.append(f"{name}: {reason}")
    note = f"{inputs / (time.process_time() - began):.0f} a CPU second"
    return Row(f"fuzzed: {fuzzer.what}", inputs, len(failures), "; ".join([note, *failures[:5]]))


def _outcome(feed: Feed, rng: random.Random) -> str:
    """The reason why an input fails, or ""."""
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        feed(rng)
    except UserError as error:
        return "" if str(error).isprintable() else f"not one line: {str(error)!r}"
    except OSError as error:
        return "" if error.errno and error.filename else f"OSError without a file: {error}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {first_line(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Limits time and memory of this process; restores both in the end."""

    def stop(*_: Any) -> None:
        raise TooSlow

    old, before = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (allowed, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, old)


# Models and states


def _model_file(folder: Path) -> bytes:
    path = folder / "whole"
    config = make_config("digits", "acert", epochs=2)
    save_model(cnn7((1, 4, 4), 2, 1, 1, (0.5,), (0.5,)), path, training=config.to_dict())
    content = path.read_bytes()
    path.unlink()
    return content


def _read_model(path: Path) -> None:
    with contextlib.suppress(UserError):
        load_model(path)
    config_from(read_facts(path).get("training"), path)


def model_bytes(folder: Path) -> Feed:
    whole, path = _model_file(folder), folder / "model.safetensors"

    def feed(rng: random.Random) -> None:
        path.write_bytes(damaged_bytes(rng, whole))
        _read_model(path)

    return feed


def model_metadata(folder: Path) -> Feed:
    """Valid safetensors with other metadata, or with a forged table of tensors."""
    whole, path = _model_file(folder), folder / "model.safetensors"
    (length,) = struct.unpack("<Q", whole[:8])
    header, weights = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    entry = json.loads(header["__metadata__"]["ibpcore"])

    def feed(rng: random.Random) -> None:
        if rng.random() < 0.7:
            inner = damaged_json(rng, entry).decode(errors="replace")
            text = json.dumps({**header, "__metadata__": {"ibpcore": inner}}).encode()
        else:
            text = damaged_json(rng, header)
        path.write_bytes(struct.pack("<Q", len(text)) + text + weights)
        _read_model(path)

    return feed


def _state(folder: Path) -> tuple[dict[str, Any], TrainConfig, Dataset]:
    config = make_config("digits", "acert", epochs=2, width=1, hidden=1, limit_train=8)
    data = load_dataset("digits", Request(limit_train=8, limit_test=2))
    return start_state(config, data, "cpu").to_dict(config, "data"), config, data


def state_bytes(folder: Path) -> Feed:
    path = folder / "resume.pt"
    save_state(path, _state(folder)[0])
    whole = path.read_bytes()

    weights = load_state(path)["model"]

    def feed(rng: random.Random) -> None:
        path.write_bytes(damaged_bytes(rng, whole))
        found = load_state(path)["model"]
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())

    return feed


CALLS = (
    *(b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR", b"ctorch\nFloatTensor\n(J\xff\xff\xff\x7ftR"),
    *(b"cos\nmkdir\n(X\x07\x00\x00\x00../evilt\x52", b"cposix\nsystem\n", b"c__builtin__\neval\n"),
    *(
        b"r\xff\xff\xff\x7f",
        b"J\xff\xff\xff\x7f",
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"Q",
    ),
    *(b"ctorch\nSize\n", b"X\xff\xff\xff\xff", b"(" * 2000, b"R", b"b", b"2" * 500, b"\x93"),
)


def state_pickles(folder: Path) -> Feed:
    path = folder / "resume.pt"
    save_state(path, _state(folder)[0])
    return _damaged_pickles(path, lambda: load_state(path))


FOREIGN = Description("cnn7", in_shape=(1, 8, 8), mean=(0.0,), std=(1.0,))


def foreign_checkpoints(folder: Path) -> Feed:
    """A pickled module, not a state_dict."""
    path = folder / "foreign.pt"
    torch.save(cnn7((1, 8, 8), 10, 1, 1), path)
    return _damaged_pickles(path, lambda: import_model(path, FOREIGN))


def old_checkpoints(folder: Path) -> Feed:
    """The format before PyTorch 1.6, of a state dict and of a whole module."""
    path, model = folder / "old.pt", cnn7((1, 8, 8), 10, 1, 1)
    whole = []
    for content in (model.state_dict(), model):
        torch.save(content, path, _use_new_zipfile_serialization=False)
        whole.append(path.read_bytes())

    def feed(rng: random.Random) -> None:
        content = rng.choice(whole)
        if rng.random() < 0.5:
            place = rng.randrange(len(content))
            path.write_bytes(content[:place] + rng.choice(CALLS) + content[place:])
        else:
            path.write_bytes(damaged_bytes(rng, content))
        import_model(path, FOREIGN)

    return feed


def foreign_safetensors(folder: Path) -> Feed:
    """Damaged files, forged tables of tensors, and other names, shapes and orders."""
    path, model = folder / "foreign.safetensors", cnn7((1, 8, 8), 10, 1, 1)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    whole = safetensors.torch.save(state)
    (length,) = struct.unpack("<Q", whole[:8])
    header, weights = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    names = [*state, "mean", "std", "layers.0.weight", "fc2.weight", "²", "1.", ".", "", "\udcff"]

    def feed(rng: random.Random) -> None:
        kind = rng.random()
        if kind < 0.3:
            path.write_bytes(damaged_bytes(rng, whole))
        elif kind < 0.6:
            text = damaged_json(rng, header)
            path.write_bytes(struct.pack("<Q", len(text)) + text + weights)
        else:
            renamed = {rng.choice([k, k, k, *names]): value for k, value in header.items()}
            text = json.dumps(renamed).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + weights)
        import_model(path, FOREIGN)

    return feed


PIECES = (
    *("conv", "linear", "bn", "bn?", "relu", "maxpool", "avgpool", "pad", "flatten", "residual("),
    *(
        "3x3",
        "4x4 s2 p1",
        "32",
        "0",
        "9999999",
        "1x4194304",
        "p4000000",
        "g?",
        "g2",
        "nobias",
        "d3",
    ),
    *(",", ",", ",", "(", ")", ")", "|", "", "cnn7", "mlp9", "mlp99", "²", ".5", "s", "x", "\x00"),
)


def architectures(folder: Path) -> Feed:
    """Texts of the grammar with pieces added, dropped and doubled, for import and training."""
    path = folder / "weights.pt"
    torch.save(cnn7((1, 8, 8), 10, 1, 1).state_dict(), path)
    whole = [text for texts in ARCHITECTURES.values() for text in texts]
    whole += ["conv 3 3x3 p1, bn, relu, residual(conv 3 1x1 | relu), maxpool 2x2, linear 10"] * 20

    def feed(rng: random.Random) -> None:
        words = rng.choice(whole).split(" ")
        for _ in range(rng.randrange(4)):
            place = rng.randrange(len(words))
            words[place : place + rng.randrange(2)] = rng.choices(PIECES, k=rng.randrange(1, 3))
        text = " ".join(words) if rng.random() < 0.9 else damaged_text(rng)
        if rng.random() < 0.5:
            new_network(text, (1, 8, 8), 10)
        else:
            import_model(path, replace(FOREIGN, architecture=text))

    return feed


def _damaged_pickles(path: Path, read: Callable[[], object]) -> Feed:
    """A valid archive whose pickle is damaged, or calls something harmful."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (main_record,) = [name for name in records if name.endswith("/data.pkl")]

    def feed(rng: random.Random) -> None:
        content = records[main_record]
        if rng.random() < 0.6:
            place = rng.randrange(len(content))
            content = content[:place] + rng.choice(CALLS) + content[place:]
        else:
            content = damaged_bytes(rng, content)
        method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, record in {**records, main_record: content}.items():
                archive.writestr(name, record)
        read()

    return feed


def state_values(folder: Path) -> Feed:
    """States in which a part is replaced by another value that a pickle can hold."""
    saved, config, data = _state(folder)
    state = start_state(config, data, "cpu")
    tensors = (torch.zeros(0), torch.ones(3), torch.tensor(2**40), torch.zeros(1, dtype=torch.bool))

    def feed(rng: random.Random) -> None:
        node = other = {**saved}
        while True:
            key = rng.choice(list(node))
            if isinstance(node[key], dict) and node[key] and rng.random() < 0.8:
                node[key] = {**node[key]}
                node = node[key]
            else:
                node[key] = rng.choice((*STRANGE, *tensors))
                break
        state.load(other, config, "data")

    return feed


# Files of runs


def settings(folder: Path) -> Feed:
    valid = make_config("mnist", "acert").to_dict()

    def feed(rng: random.Random) -> None:
        (folder / "config.json").write_bytes(damaged_json(rng, valid))
        saved_config(folder)

    return feed


def _complete_run(folder: Path, **given: Any) -> dict[str, Any]:
    """Writes the folder of a complete run, without training; returns its summary."""
    config = make_config("digits", "acert", validation=4, **given)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    summary = {
        **{"accuracy": 0.5, "acr": 0.25, "art": 0.5**1.5, "training_seconds": 3.5},
        **{"dataset": "UCI optical digits", "certified_accuracy": {"0.05": 0.3, "0.1": 0.2}},
        **{"samples": 2, "epsilon_max": 0.1, "clip": True},
    }
    for name in ("summary.json", "validation.json"):
        (folder / name).write_text(json.dumps(summary))
    rows = [json.dumps({"epoch": epoch, "seconds": 1}) for epoch in range(1, config.epochs + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "model.safetensors").write_text("")
    (folder / "certificates.csv").write_text(
        "index,label,prediction,radius,upper,status,unchecked,claim\n"
        "0,3,1,0.0,0.0,misclassified,0.0,real\n1,2,2,0.05,0.06,converged,0.05,real\n"
    )
    return summary


def summaries(folder: Path) -> Feed:
    summary = _complete_run(folder / "one")
    _complete_run(folder / "other", kappa=0.5)
    _complete_run(folder / "seed", seed=1)

    def feed(rng: random.Random) -> None:
        file = folder / "one" / rng.choice(("summary.json", "validation.json"))
        before = file.read_bytes()
        try:
            file.write_bytes(damaged_json(rng, summary))
            results, notes = read_all([folder / name for name in ("one", "other", "seed")])
            text = report(results, notes)
        finally:
            file.write_bytes(before)
        assert all(line.isprintable() for line in text.splitlines())

    return feed


def sweeps(folder: Path) -> Feed:
    write_sweep(folder, Sweep(grid("digits", ["acert", "sabr"], kappas=(0.0, 0.5)), "test"))
    whole = json.loads((folder / "sweep.json").read_text())

    def feed(rng: random.Random) -> None:
        (folder / "sweep.json").write_bytes(damaged_json(rng, whole))
        sweep = read_sweep(folder)
        assert all((folder / name).parent == folder for name in sweep.runs)
        results_of(folder, sweep)

    return feed


def searches(folder: Path) -> Feed:
    problem = Problem("digits", ("acert", "sabr"), {"epochs": 2, "validation": 9}, space_of({}))
    write_search(folder, Search(problem, objectives_of("accuracy,acr"), Budget(trials=2), True))
    store = TrialStore(folder / JOURNAL, problem)
    for number, values in enumerate(((0.5, 0.25), (0.25, 0.5))):
        store.begin(next_point(problem, store.trials, 0))
        measures = {"accuracy": 0.5, "acr": 0.25, "art": 0.35, "images": 9}
        end = Ended(COMPLETE, number, 2, 1.0, measures, values, [(0.5, values), (1.0, values)])
        store.end(number, end)
    whole = {name: (folder / name).read_bytes() for name in (SEARCH, SPACE, JOURNAL)}

    def feed(rng: random.Random) -> None:
        name = rng.choice([*whole])
        for other, content in whole.items():
            (folder / other).write_bytes(content)
        if name == JOURNAL:
            (folder / name).write_bytes(_damaged_journal(rng, whole[name]))
        else:
            (folder / name).write_bytes(damaged_json(rng, json.loads(whole[name])))
        search = read_search(folder)
        trials = TrialStore(folder / JOURNAL, search.problem).trials
        write_tables(folder, search.problem, trials, {}, [])

    return feed


def _damaged_journal(rng: random.Random, whole: bytes) -> bytes:
    """A line damaged as JSON, or the bytes."""
    lines = whole.splitlines()
    if rng.random() < 0.5:
        return damaged_bytes(rng, whole)
    at = rng.randrange(len(lines))
    lines[at] = damaged_json(rng, json.loads(lines[at])).replace(b"\n", b"")
    return b"\n".join(lines) + b"\n"


def certificates(folder: Path) -> Feed:
    run = folder / "run"
    _complete_run(run)
    file = run / "certificates.csv"
    whole = file.read_bytes()
    (setting,) = by_setting([read_result(run)])

    def feed(rng: random.Random) -> None:
        if rng.random() < 0.5:
            cells = whole.decode().split(",")
            cells[rng.randrange(len(cells))] = damaged_text(rng)
            file.write_bytes(",".join(cells).encode(errors="surrogateescape"))
        else:
            file.write_bytes(damaged_bytes(rng, whole))
        with contextlib.suppress(UserError):
            table = read_certificates(file)
            columns = (table.label, table.prediction, table.radius)
            for label, prediction, radius in zip(*(c.tolist() for c in columns), strict=True):
                assert radius == 0 or (0 < radius < 0.1001 and label == prediction)
        pooled_radii(setting)

    return feed


SETTINGS = {"weights": "c0ffee", "images": "decaf", "epsilon_max": 0.1}
LABELS = {0: torch.tensor([3, 2, 1]), 1: torch.tensor([0, 4])}
BATCHES: list[dict[str, Any]] = [
    {
        **{"batch": 0, "label": [3, 2, 1], "prediction": [3, 2, 0], "radius": [0.05, 0.0, 0.0]},
        **{"upper": [0.06, 0.0, 0.0], "status": [2, 5, 0], "unchecked": [0.055, 0.01, 0.0]},
        "evaluations": [7, 5, 0],
    },
    {
        **{"batch": 1, "label": [0, 4], "prediction": [0, 4], "radius": [0.02, 0.1]},
        **{"upper": [0.03, 0.1], "status": [3, 1], "unchecked": [0.02, 0.1]},
        "evaluations": [9, 1],
    },
]


def journals(folder: Path) -> Feed:
    """Bytes: only lines that were written are read, and no loss but of a torn line is silent."""
    path = folder / "certificates.journal"
    with Journal(path, SETTINGS) as journal:
        for batch in BATCHES:
            journal.append(batch)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)

    def read() -> list[Any]:
        with Journal(path, SETTINGS) as journal:
            return journal.parts

    def feed(rng: random.Random) -> None:
        content = damaged_bytes(rng, whole)
        for file in folder.iterdir():
            file.unlink()
        path.write_bytes(content)
        *complete, _ = content.split(b"\n")
        intact = {line + b"\n" for line in complete} <= {*lines}
        try:
            found = read()
            assert intact, "damage without a word"
        except UserError:
            found = read()  # without the damaged lines
            assert path.with_name(f"{path.name}.damaged").read_bytes() == content
        assert all(batch in BATCHES for batch in found)
        kept = [b for b, line in zip(BATCHES, lines[1:], strict=True) if line[:-1] in complete[1:]]
        assert all(batch in found for batch in kept)

    return feed


def journal_values(folder: Path) -> Feed:
    """Values in lines with the right digest: those accepted can be certificates."""
    path = folder / "certificates.journal"

    def feed(rng: random.Random) -> None:
        path.unlink(missing_ok=True)
        with Journal(path, SETTINGS) as journal:
            journal.append(damaged_value(rng, rng.choice(BATCHES)))
            found = recorded(journal, LABELS, 5, 0.1, torch.float64)
        for number, part in found.items():
            assert part.label.tolist() == LABELS[number].tolist()
            for label, prediction, radius, upper, status, unchecked, evaluations in zip(
                *(column.tolist() for column in part), strict=True
            ):
                assert 0 <= radius <= min(upper, unchecked) <= max(upper, unchecked) <= 0.1
                assert radius == 0 or prediction == label
                assert 0 <= prediction < 5
                assert 0 <= status <= 5
                assert evaluations >= 0

    return feed


# Data sets


def mnist(folder: Path) -> Feed:
    raw, files = folder / "MNIST" / "raw", {}
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">4I", 0x803, 4, 3, 3) + bytes(range(36))
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">2I", 0x801, 4) + bytes(range(4))
    for name, content in files.items():
        (raw / name).write_bytes(content)

    def feed(rng: random.Random) -> None:
        name = rng.choice(list(files))
        packed = rng.random() < 0.3
        content = gzip.compress(files[name], mtime=0) if packed else files[name]
        (raw / name).write_bytes(damaged_bytes(rng, content))
        try:
            load_dataset("mnist", Request(folder))
        finally:
            (raw / name).write_bytes(files[name])

    return feed


def cifar_pickles(folder: Path) -> Feed:
    """Pickles that would make a folder, under the official names."""
    top = folder / "cifar-10-batches-py"
    top.mkdir()
    evil = str(folder.parent / "evil")
    content = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]})
    trap = b"cos\nmkdir\n(X" + struct.pack("<I", len(evil)) + evil.encode() + b"tR."

    def feed(rng: random.Random) -> None:
        names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
        for name in rng.sample(names, 2):
            (top / name).write_bytes(rng.choice((trap, damaged_bytes(rng, content))))
        load_dataset("cifar10", Request(folder))

    return feed


FUZZED_SUFFIXES = (
    *(".png", ".jpg", ".bmp", ".webp", ".ppm", ".tif"),
    *(".gif", ".avif", ".tga", ".qoi", ".pcx"),
)


def images(folder: Path) -> Feed:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    whole = {}
    for suffix in FUZZED_SUFFIXES:
        file = folder / f"image{suffix}"
        Image.fromarray(pixels).save(file)
        whole[file] = file.read_bytes()
    deep = folder / "deep.png"
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(deep)
    whole[deep] = deep.read_bytes()

    def feed(rng: random.Random) -> None:
        file = rng.choice(list(whole))
        file.write_bytes(damaged_bytes(rng, whole[file]))
        try:
            with mock.patch("os.cpu_count", return_value=1):
                read_images([(file, 0)], None, rng.choice((None, 8)))
        finally:
            file.write_bytes(whole[file])

    return feed


def labels(folder: Path) -> Feed:
    top = folder / "tiny-imagenet-200"
    for number, name in enumerate(("n01", "n02")):
        for images_in in (top / "train" / name / "images", top / "val" / "images"):
            images_in.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(images_in / f"{number}.JPEG")
    whole = {
        top / "wnids.txt": b"n01\nn02\n",
        top / "val" / "val_annotations.txt": b"0.JPEG\tn01\t0\t0\t3\t3\n1.JPEG\tn02\t0\t0\t3\t3\n",
    }
    for file, content in whole.items():
        file.write_bytes(content)

    def feed(rng: random.Random) -> None:
        file = rng.choice(list(whole))
        file.write_bytes(damaged_bytes(rng, whole[file]))
        try:
            load_dataset("tinyimagenet", Request(folder))
        finally:
            file.write_bytes(whole[file])

    return feed


def archives(folder: Path) -> Feed:
    """Archives with members that lie outside, are links or devices, repeat, or lie about size."""
    evil = str(folder.parent / "evil")
    names = [
        *("a", "a/b", "../evil", "../../evil", "a/../../evil", evil, "/" + evil, "./a", "", "."),
        *("a\\..\\..\\evil", "C:evil", "a/" * 300 + "b", "x" * 300, "é", "a//b", "..", "\udcff"),
    ]
    kinds = [
        *(tarfile.REGTYPE, tarfile.REGTYPE, tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE),
        *(tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE),
    ]

    def tar(rng: random.Random) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as file:
            for _ in range(rng.randrange(1, 5)):
                member = tarfile.TarInfo(rng.choice(names))
                member.type, member.linkname = rng.choice(kinds), rng.choice((evil, "../..", "a"))
                member.size = rng.choice((0, 3, 3, 600)) if member.type == tarfile.REGTYPE else 0
                file.addfile(member, io.BytesIO(bytes(member.size)))
        return buffer.getvalue()

    def zipped(rng: random.Random) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", rng.choice((0, zipfile.ZIP_DEFLATED))) as file:
            written = set()
            for _ in range(rng.randrange(1, 5)):
                info = zipfile.ZipInfo(rng.choice(names[:-1]))
                info.external_attr = rng.choice((0, 0, 0o100644, 0o120777, 0o010644)) << 16
                if info.filename not in written:
                    file.writestr(info, evil.encode() * rng.choice((0, 1, 9)))
                written.add(info.filename)
        return buffer.getvalue()

    def feed(rng: random.Random) -> None:
        suffix = rng.choice((".tar.gz", ".tar.gz", ".zip", ".zip", ".gz"))
        if suffix == ".zip":
            content = zipped(rng)
        else:
            content = tar(rng) if suffix == ".tar.gz" else gzip.compress(b"idx" * 99)
        if suffix == ".tar.gz" and rng.random() < 0.3:  # behind the checksum of gzip
            content = gzip.compress(damaged_bytes(rng, gzip.decompress(content)), 1)
        elif rng.random() < 0.3:
            content = damaged_bytes(rng, content)
        file, out = folder / f"archive{suffix}", folder / "out"
        file.write_bytes(content)
        try:
            with mock.patch("ibpcore.data.downloads.MAX_BYTES", 2**16):
                unpack(file, out)
            assert not any(path.is_symlink() for path in out.rglob("*"))
        finally:
            shutil.rmtree(out, ignore_errors=True)

    return feed


# Options


def epsilons(folder: Path) -> Feed:
    def feed(rng: random.Random) -> None:
        number = _converted(Epsilon(), damaged_text(rng))
        assert number is None or 0 < number <= 1

    return feed


def _converted(kind: click.ParamType, text: str) -> Any:
    """The value of an option; None if click refuses it."""
    try:
        return kind.convert(text, None, None)
    except click.BadParameter:
        return None


def lists(folder: Path) -> Feed:
    """Ranges and lists of a sweep's options, and the grids that they span."""
    methods = Values(click.Choice(list(METHODS)), "list")
    kinds: dict[str, click.ParamType] = {"kappas": Kappas(), "seeds": Seeds()}
    kinds["max_iterations"] = Values(click.IntRange(min=0), "list")

    def feed(rng: random.Random) -> None:
        given = {}
        for name, kind in kinds.items():
            values = _converted(kind, damaged_text(rng))
            if values is not None:
                assert len(values) <= 10_000
                given[name] = values
        _converted(Epochs(), damaged_text(rng))
        names = _converted(methods, rng.choice(("acert", "acert,sabr", "standard,,acert", ",")))
        few = {name: values[: rng.choice((1, 3, 1000))] for name, values in given.items()}
        if len(few.get("kappas", ())) * len(few.get("seeds", ())) > 30 and rng.random() < 0.95:
            return  # thousands of configurations take long
        grid("digits", names or ("acert",), **few)

    return feed


def overrides(folder: Path) -> Feed:
    """Settings as options or callers pass them."""
    fields = list(make_config("digits", "acert").to_dict())

    def feed(rng: random.Random) -> None:
        given = {rng.choice(fields): _number(rng) for _ in range(rng.randrange(1, 4))}
        given = {k: v for k, v in given.items() if k not in ("dataset", "method")}
        make_config(rng.choice(("digits", "mnist")), rng.choice(list(METHODS)), **given)

    return feed


def _number(rng: random.Random) -> Any:
    return rng.choice([v for v in STRANGE if isinstance(v, float | int | bool)])


@contextlib.contextmanager
def _no_work(digits: Dataset) -> Iterator[None]:
    """Replaces everything that takes long by a refusal, so that only the checks before it run."""

    def begin(*_: Any, **__: Any) -> None:
        raise UserError("it would begin now")

    with contextlib.ExitStack() as stack:
        for name in (
            *("train.train_and_certify", "certify.certify_test_set", "inspect.inspect_model"),
            *("sweep.run_sweep", "report.write_report", "predict.certify_pictures"),
            *("search.run_search", "dry_run.estimate_cost", "train.logged", "doctor.self_test"),
        ):
            stack.enter_context(mock.patch(f"ibpcore_cli.{name}", begin))
        stack.enter_context(mock.patch("ibpcore.data.sources.install", begin))
        stack.enter_context(mock.patch.dict(DATASETS, digits=lambda request: digits))
        yield


def command_lines(folder: Path) -> Feed:
    whole = _model_file(folder)
    config = make_config("digits", "acert", epochs=2)
    digits = load_dataset("digits", Request())
    options = {name: command.params for name, command in load_all().items()}

    def make() -> None:
        shutil.rmtree(folder)
        _complete_run(folder, epochs=2)
        (folder / "model.safetensors").write_bytes(whole)
        (folder / "file").write_text("mine")
        (folder / "config.json").write_text(json.dumps(config.to_dict()))

    def value(rng: random.Random, option: click.Parameter) -> str:
        if isinstance(option.type, click.Path):
            paths = (".", "file", "none", "out", "sub/out", "x" * 300, "é", "\udcff", "a\nb", "")
            return rng.choice(paths)
        if isinstance(option.type, click.Choice) and rng.random() < 0.9:
            return str(rng.choice(list(option.type.choices)))
        return rng.choice(TEXTS) if rng.random() < 0.7 else damaged_text(rng)

    def feed(rng: random.Random) -> None:
        name = rng.choice(list(options))
        argv = [name]
        for option in rng.sample(options[name], min(len(options[name]), rng.randrange(5))):
            if isinstance(option, click.Option):
                argv.append(rng.choice([*option.opts, *option.secondary_opts]))
            if not (isinstance(option, click.Option) and option.is_flag):
                argv.append(value(rng, option))
        if rng.random() < 0.1:
            argv.append(rng.choice(("--help", "--version", "--", "-", "--nothing", "stray")))
        here = os.getcwd()
        make()
        os.chdir(folder)
        try:
            with _no_work(digits):
                run_ibp(argv)
        finally:
            os.chdir(here)

    return feed


FUZZERS = (
    Fuzzer("model files", 15_000, model_bytes),
    Fuzzer("metadata of models", 1_500, model_metadata),
    Fuzzer("resume states", 12_000, state_bytes),
    Fuzzer("pickles of resume states", 6_000, state_pickles),
    Fuzzer("values of resume states", 4_000, state_values),
    Fuzzer("foreign checkpoints", 6_000, foreign_checkpoints),
    Fuzzer("old checkpoints", 6_000, old_checkpoints),
    Fuzzer("foreign safetensors", 6_000, foreign_safetensors),
    Fuzzer("architectures", 12_000, architectures),
    Fuzzer("config.json", 20_000, settings),
    Fuzzer("summaries", 2_500, summaries),
    Fuzzer("sweep.json", 6_000, sweeps),
    Fuzzer("searches", 2_500, searches),
    Fuzzer("certificates.csv", 25_000, certificates),
    Fuzzer("journals", 6_000, journals),
    Fuzzer("values of journals", 6_000, journal_values),
    Fuzzer("MNIST files", 25_000, mnist),
    Fuzzer("CIFAR-10 pickles", 6_000, cifar_pickles),
    Fuzzer("images", 6_000, images),
    Fuzzer("TinyImageNet lists", 3_000, labels),
    Fuzzer("archives", 15_000, archives),
    Fuzzer("epsilons", 50_000, epsilons),
    Fuzzer("lists and grids", 3_000, lists),
    Fuzzer("settings of callers", 10_000, overrides),
    Fuzzer("command lines", 5_000, command_lines),
)
