"""A short run of the random networks of users, and what it notices."""

import random
import re
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks.reliability import modules
from benchmarks.reliability.user_modules import user_module
from ibpcore.experiments import opening
from ibpcore.training import model

CASES = 60


def test_a_short_run_finds_nothing(tmp_path):
    (row,) = modules.run(CASES / modules.NETWORKS, 0, tmp_path)
    assert (row.cases, row.failures) == (CASES, 0), row.note
    refused = int(row.note.split(" refused")[0])
    assert CASES / 10 < refused < 9 / 10 * CASES


@pytest.mark.filterwarnings("ignore")
def test_the_networks_are_a_function_of_the_seed():
    """And many kinds of layers occur."""
    first, second = ([made(seed) for seed in range(40)] for _ in range(2))
    assert [repr(network) for network in first] == [repr(network) for network in second]
    kinds = {type(part) for network in first for part in network.modules()}
    assert len(kinds) > 20
    assert {nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU} <= kinds


def made(seed):
    torch.manual_seed(0)
    return user_module(random.Random(seed), (1, 8, 8), 10)


def test_a_short_run_notices_networks_that_are_not_rehearsed(tmp_path):
    """They fail during training, or leave a folder behind."""
    with (
        mock.patch.object(opening, "rehearse", model.fresh_network),
        mock.patch.object(model, "check_layers"),
    ):
        (row,) = modules.run(CASES / 3 / modules.NETWORKS, 0, tmp_path)
    assert row.failures > 0
    assert "left" in row.note or "Error" in row.note


@pytest.mark.parametrize(
    ("ends", "failure"),
    [
        (["Error: no"], ""),
        (["Error: no", "runs"], "refused, but left"),
        (["Error: the loss is not finite at step 2", "runs"], ""),
        ([RuntimeError("a\nb")], "RuntimeError: a"),
        ([""], "FileNotFoundError|there is no run"),
    ],
)
def test_what_counts_as_a_failure(tmp_path, ends, failure):
    """A refusal that leaves files, an exception, and a run without its files."""

    def run_ibp(argv):
        end, *folders = ends
        for name in folders:
            (tmp_path / name).mkdir()
        if isinstance(end, Exception):
            raise end
        return end

    with mock.patch.object(modules, "run_ibp", run_ibp):
        found = modules.outcome("0-0", tmp_path)
    assert re.search(failure, found.failure) if failure else found.failure == ""
