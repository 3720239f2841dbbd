"""`--dry-run`: the settings as a file, what a run costs, and nothing on disk."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import run_ibp, snapshot

from ibpcore.data.sources import Request, load_dataset
from ibpcore.training import cost as costs
from ibpcore.training.config import make_config
from ibpcore.training.cost import estimate_cost
from ibpcore_cli.configuration import configured
from ibpcore_cli.dry_run import in_words

CPU = torch.device("cpu")
TINY = ("--width", 2, "--hidden", 8, "--batch-size", 20, "--epochs", 5, "--limit-train", 50)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no TOML")
def test_a_dry_run_prints_what_config_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = (*TINY, "--method", "sabr", "--epsilon-max", "8/255", "--no-clip", "--seed", 7)
    done = run_ibp("train", *given, "--dry-run", "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    assert snapshot(tmp_path) == {}
    assert "\n# 3 steps an epoch, 15 in all\n" in done.out
    file = tmp_path / "run.toml"
    file.write_text(done.out)
    asked = {"width": 2, "hidden": 8, "batch_size": 20, "epochs": 5, "limit_train": 50}
    config = make_config("digits", "sabr", **asked, epsilon_max=8 / 255, clip=False, seed=7)
    assert configured(file, None, None, {}) == config
    again = run_ibp("train", "--config", file, "--dry-run", "--device", "cpu").out
    settings, remarks = done.out.split("\n\n")
    assert again.startswith(settings)
    assert all(line.startswith("#") for line in remarks.splitlines())


def test_what_is_counted(monkeypatch):
    """Parameters by hand; the time is that of the warm-up and of the rest."""
    seconds = {0.5: [1.0, 2.0, 9.0], 1.0: [4.0]}
    monkeypatch.setattr(costs, "_timed", lambda state, batch, share, config: seconds[share])
    data = load_dataset("digits", Request(limit_train=41, limit_test=1))
    config = make_config("digits", "acert", width=2, hidden=8, batch_size=20, epochs=10)
    assert config.warmup == (1, 4)
    found = estimate_cost(config, data, CPU)
    kernels = 9 * (1 * 2 + 2 * 2 + 2 * 4 + 4 * 4 + 4 * 4) + (2 + 2 + 4 + 4 + 4)
    norms = 2 * (2 + 2 + 4 + 4 + 4 + 8)
    linear = 4 * 4 * 4 * 8 + 8 + 8 * 10 + 10
    assert found.parameters == kernels + norms + linear
    # 41 images are two batches and one image, which is left out.
    assert (found.steps_per_epoch, found.steps) == (2, 20)
    assert found.seconds == 2 * (4 * 2.0 + 6 * 4.0)
    assert found.timed == 4


@pytest.mark.parametrize("method", ["standard", "acert", "crown-ibp", "mtl-ibp"])
def test_the_steps_are_real_and_all_images_correct(monkeypatch, method):
    """A schedule of two steps is not overrun by those that are timed."""
    seen = []
    step = costs.train_step

    def observed(state, batch, share, config):
        result = step(state, batch, share, config)
        finite = bool(torch.stack([*result.sums]).isfinite().all())
        seen.append((share, int(result.sums[1]), len(batch.labels), finite))
        return result

    monkeypatch.setattr(costs, "train_step", observed)
    data = load_dataset("digits", Request(limit_train=16, limit_test=1))
    config = make_config("digits", method, width=2, hidden=8, batch_size=8, epochs=1)
    found = estimate_cost(config, data, CPU)
    assert found.seconds > 0
    assert {share for share, *_ in seen} == {0.5, 1.0}
    assert all(correct == samples == 8 and finite for _, correct, samples, finite in seen)


def test_slow_steps_are_few(monkeypatch):
    """After five seconds in a phase no further step is begun."""
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(costs.time, "perf_counter", lambda: next(clock))
    data = load_dataset("digits", Request(limit_train=16, limit_test=1))
    config = make_config("digits", "standard", width=2, hidden=8, batch_size=8, epochs=1)
    found = estimate_cost(config, data, CPU)
    assert (found.timed, found.seconds) == (2, 2 * 4.0)


MEMORY = """
import re, sys, tempfile
from pathlib import Path
from ibpcore.training.config import make_config
from ibpcore.training.cost import estimate_cost
from ibpcore.experiments.run import dataset_of, train_and_certify
import torch

def most():
    return 1024 * int(re.search("VmHWM:.*?([0-9]+)", Path("/proc/self/status").read_text())[1])

config = make_config("digits", "fastibp", batch_size=1347, epochs=2, limit_test=20)
data = dataset_of(config, Path("none"))
before = most()
estimate = estimate_cost(config, data, torch.device("cpu")).memory
Path("/proc/self/clear_refs").write_text("5")
with tempfile.TemporaryDirectory() as run:
    train_and_certify(config, data, Path(run))
print(before, estimate, most())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the most memory taken")
def test_the_memory_is_that_of_a_run():
    """A batch of all digits takes far more than what was imported before."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    before, estimate, measured = map(int, done.stdout.split())
    assert estimate > before + 100 * 2**20
    assert measured / 1.25 < estimate < 1.25 * measured


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.123, "0.12 s"),
        (59, "59 s"),
        (61, "1 min 1 s"),
        (3599.7, "1 h 0 min"),
        (9000, "2 h 30 min"),
    ],
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words


def test_a_dry_run_fetches_nothing(tmp_path):
    done = run_ibp(
        *("train", "--dataset", "mnist", "--download", "--dry-run", "--data-dir", tmp_path / "d")
    )
    assert (done.code, done.err) == (2, "Error: --dry-run writes nothing: leave out --download\n")
    assert snapshot(tmp_path) == {}
