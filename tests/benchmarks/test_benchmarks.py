"""The benchmarks run, agree with themselves, and write what they promise; no time is asserted."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import memory, scaling
from benchmarks.all import QUICK, RUNS
from benchmarks.counting import overhead
from benchmarks.harness import milliseconds, rows
from ibpcore import cnn7
from ibpcore.training.config import make_config
from ibpcore.training.memory import step_memory

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
ALWAYS = {"contender", "dataset", "stage", "median_ms", "low_ms", "high_ms", "ratio"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "benchmarks.all", "--quick", "--out", str(folder)]
    given = ["--cache", str(folder / "cache"), "--data-dir", str(folder / "none")]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *given], cwd=folder, env=environment, check=True, timeout=600)
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_results_are_written_in_full(out, name):
    result = json.loads((out / f"{name}.json").read_text())
    assert {"hardware", "versions", "command", "rows"} == set(result)
    assert result["command"].startswith(f"python -m benchmarks.{name} ")
    assert "torch" in result["versions"]
    assert "processor" in result["hardware"]
    assert len(result["rows"]) > 1
    for row in result["rows"]:
        assert set(row) >= ALWAYS
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert name in ("bound_passes", "proofs") or row["operators"] > 0


def test_exact_solvers_have_no_radius_error(out):
    table = json.loads((out / "training_step.json").read_text())["rows"]
    errors = {row["contender"]: row.get("radius_error") for row in table}
    assert errors["fastibp"] is None
    assert errors["acert fast"] > 0.01
    exact = [error for name, error in errors.items() if name.endswith("exact")]
    assert len(exact) == 4
    assert max(exact) < 1e-4


def test_a_page_with_a_figure(out):
    text = (out / "README.md").read_text()
    for name in QUICK:
        assert f"## {name}" in text
    assert (out / "training_step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [*RUNS])
def test_options_of_every_table_exist(name):
    benchmark, *options = shlex.split(RUNS[name])
    with import_module(f"benchmarks.{benchmark}").main.make_context(benchmark, options):
        pass


def test_contenders_take_turns_and_ratios_are_of_medians():
    order = []
    contenders = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = milliseconds(contenders, 3, CPU)
    assert order == ["a", "a", "b", "b"] * 3  # the second of two runs counts
    assert [len(values) for values in times.values()] == [3, 3]
    table = rows({"a": [4.0, 1.0, 2.0], "b": [3.0, 9.0, 1.0]}, "a", dataset="x")
    assert [row["median_ms"] for row in table] == [2.0, 3.0]
    assert [row["ratio"] for row in table] == [1.0, 1.5]
    assert [row["dataset"] for row in table] == ["x", "x"]


def test_efficiency_by_hand():
    """80 bytes of gradient over 10 B/s by 4 ranks: 2 * 3/4 * 8 s, and 5 sums of 1 s: 10 of 27."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3, affine=False))
    model = model.append(torch.nn.Linear(4, 1, bias=False)).append(torch.nn.Linear(1, 1, False))
    assert scaling.gradient_bytes(model) == 4 * (12 + 3 + 4 + 1)
    assert scaling.small_sums(model) == 5
    assert scaling.expected(10.0, model, 4, scaling.Link(10.0, 1.0)) == pytest.approx(10 / 27)


def test_steps_of_ranks_are_measured(tmp_path):
    command = ["--quick", "--device", "cpu", "--json", str(tmp_path / "scaling.json")]
    assert CliRunner().invoke(scaling.main, command, catch_exceptions=False).exit_code == 0
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [row["contender"] for row in rows[:2]] == ["fastibp", "acert"]
    assert all(row["ranks"] == 1 and row["images_a_rank"] == 16 for row in rows[:2])
    assert all(0 < row["efficiency"] < 1 for row in rows[2:])


def test_operators_are_counted_with_nested_ones():
    """A sum is one operator; `reshape` calls another one, `view`. The first run does not count."""
    x, turns = torch.rand(3, 3), iter([1, 1, 0, 0, 1])
    assert overhead(lambda: x + x, CPU, runs=1) == {"operators": 1}
    assert overhead(lambda: x.reshape(9), CPU, runs=1) == {"operators": 2}
    assert overhead(lambda: x + x if next(turns) else None, CPU) == {"operators": 0.5}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_launches_are_counted():
    x = torch.rand(3, 3, device="cuda")
    found = overhead(lambda: (x + x).exp().reshape(9), torch.device("cuda"))
    assert found["launches"] == 2
    assert found["host_ms"] > 0


def test_memory_is_accounted_for_in_full():
    """Each use has its share where it should, and the sum is the peak."""
    config = make_config("digits", "fastibp", width=4, hidden=16, batch_size=64)
    table = memory.rows(config)
    assert [(row["method"], row["accumulate"]) for row in table][:3] == [
        ("standard", 1),
        ("fastibp", 1),
        ("fastibp", 4),
    ]
    network = cnn7((1, 8, 8), 10, 4, 16)
    for row in table:
        bounded, warming = row["method"] == "fastibp", row["stage"] == "warm-up"
        assert (row["interval pass"] > 0) == bounded
        assert (row["regularisers"] > 0) == (bounded and warming)
        assert min(row["clean pass"], row["backward pass"], row["optimiser"]) > 0
        parts = {"accumulate": row["accumulate"]}
        changed = replace(config, method=row["method"], kappa=float(not bounded), **parts)
        changed = replace(changed, regularizer=config.regularizer * (bounded and warming))
        assert row["total"] * 2**30 == pytest.approx(step_memory(changed, network), rel=1e-9)
