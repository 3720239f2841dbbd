"""Several processes train as one does: same weights, one writer, a clear end when one dies."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import ranked
import torch
from helpers import ended, run_ibp, started

from ibpcore import UserError
from ibpcore.distributed import (
    SINGLE_PROCESS,
    LostRankError,
    Ranks,
    detecting_lost_rank,
    ranks_of_environment,
)
from ibpcore.nn import batch_norm


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_train_what_one_process_trains(tmp_path, size):
    """The same weights and memories to 1e-10, in float64; the last batch is a small one.

    And the same measures of held-out images, more than ranks and fewer batches: all agree when
    the run is over, and whose weights are the best.
    """
    processes = started(size, ["-W", "error", "ranked.py", tmp_path], tmp_path)
    assert ended(processes, tmp_path) == [(0, "")] * size
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == list(ranked.CONFIGS)
    for name, values in found.items():
        assert values["moved"] > 0.01, name
        assert values["difference"] < 1e-10, name
        assert values["slopes"] < 1e-7, name  # a quotient by the radius
        together, alone = values["measures"]
        assert len(together) == len(alone)
        for one, two in zip(together, alone, strict=True):
            assert one == pytest.approx(two, abs=1e-9), name
    assert 3 <= len(found["stopped"]["measures"][0]) < 9


@pytest.mark.parametrize("lost", [0, 1])
def test_when_a_rank_is_killed_the_other_ends_and_the_run_goes_on(tmp_path, lost):
    run = tmp_path / "run"
    small = ("--epochs", 40, "--width", 1, "--hidden", 2, "--limit-train", 64, "--limit-test", 8)
    command = ["-m", "ibpcore_cli", "train", *small, "--device", "cpu", "--out", run]
    processes = started(2, command, tmp_path)
    wait_for_epochs(run, 2, processes)
    processes[lost].kill()
    ends = ended(processes, tmp_path, patience=60)  # a minute is what is promised
    assert ends[lost] == (-signal.SIGKILL, "")
    code, errors = ends[1 - lost]
    head = "Error: " if lost else "Error: rank 1: "
    rest = f"lost another of the 2 ranks; resume with: ibp train --resume {run}"
    assert (code, errors.splitlines()) == (1, [head + rest])

    done = len((run / "metrics.jsonl").read_text().splitlines())
    assert 2 <= done < 40
    assert run_ibp("train", "--resume", run, "--device", "cpu").code == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 41))
    assert json.loads((run / "summary.json").read_text())["samples"] == 8


def wait_for_epochs(run: Path, epochs: int, processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 200
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < epochs:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def test_the_environment_tells_the_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_of_environment() == SINGLE_PROCESS
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks_of_environment() == Ranks(3, 4, 1)
    assert not ranks_of_environment().first
    for wrong in ("4", "-1", "x", ""):
        monkeypatch.setenv("RANK", wrong)
        with pytest.raises(UserError, match="invalid ranks"):
            ranks_of_environment()


def test_only_a_loss_among_several_is_told_as_one():
    """One process alone has lost nobody, whatever its errors say."""
    for size, error in ((1, "the launch timed out"), (2, "shapes do not match")):
        with pytest.raises(RuntimeError, match=error), detecting_lost_rank(Ranks(0, size)):
            raise RuntimeError(error)
    lost = pytest.raises(LostRankError, match="lost another of the 2")
    with lost, detecting_lost_rank(Ranks(0, 2)):
        raise RuntimeError("Connection closed by peer")


def test_a_batch_is_dealt_whole_and_evenly():
    for size in (1, 2, 3, 4, 7):
        for count in (size, size + 1, 32, 33):
            shares = [range(count)[Ranks(rank, size).share(count)] for rank in range(size)]
            assert [x for share in shares for x in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Ranks(1, 4).sharing(4).size == 4
    assert Ranks(1, 4).sharing(3) == SINGLE_PROCESS


@pytest.mark.parametrize("shape", [(9, 3), (9, 3, 4), (9, 3, 2, 2)])
def test_statistics_of_unequal_shares_are_those_of_the_batch(monkeypatch, shape):
    """Values far from 0, where a difference of large squares would say little."""
    x = 1e4 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    shares = [x[Ranks(rank, 4).share(9)] for rank in range(4)]
    rows = []
    monkeypatch.setattr(batch_norm, "gathered", lambda row, _: rows.append(row) or row[None])
    for share in shares:
        batch_norm.shared_statistics(share, Ranks(0, 4))
    monkeypatch.setattr(batch_norm, "gathered", lambda *_: torch.stack(rows))
    count, mean, variance = batch_norm.shared_statistics(shares[0], Ranks(0, 4))
    others = [dim for dim in range(x.dim()) if dim != 1]
    expected_variance, expected_mean = torch.var_mean(x.double(), others, correction=0)
    assert count == x[:, 0].numel()
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), expected_variance, rtol=1e-3, atol=0)
