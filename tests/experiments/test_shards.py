"""Certificates and sweeps by several ranks: what one process makes, and nothing lost by a kill."""

import csv
import json
import shutil
import signal
import socket
from pathlib import Path

import click
import pytest
import torch
from helpers import Outcome, ended, run_ibp, snapshot, started
from sharded import run_all_here

from benchmarks.reliability.faults import differing
from ibpcore import UserError, load_model
from ibpcore.certification import certify as certification
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.data.sources import Request, load_dataset
from ibpcore.distributed import Ranks, chosen_device, current_device
from ibpcore.experiments import sweeps, test_set
from ibpcore_cli import sweep
from ibpcore_cli.distributed import working_ranks

TINY = ("--epochs", 1, "--limit-train", 64, "--width", 2, "--hidden", 8, "--device", "cpu")
BATCHES = (128, 128, 128, 66)
"""Sizes of the batches in which the test images are certified."""
IMAGES = sum(BATCHES)
SWEEP = ("sweep", *TINY, "--limit-test", 16, "--methods", "acert")


@pytest.fixture(scope="module", autouse=True)
def _as_the_ranks_do():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_set, "figures_possible", lambda: False)
        patch.setattr(sweeps, "run_all", run_all_here)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run, and in it what one process certifies in four batches, into `whole`."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert run_ibp("train", *TINY, "--limit-test", IMAGES, "--out", folder).code == 0
    assert run_ibp("certify", folder, "--out", folder / "whole").code == 0
    return folder


def by_ranks(size: int, folder: Path, *commands: dict) -> list[list[Outcome]]:
    """How every command ended on each rank; the last may have killed one."""
    folder.mkdir()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    for command, free in zip(commands, sockets, strict=True):
        command["port"] = free.getsockname()[1]
        command["arguments"] = [str(argument) for argument in command["arguments"]]
        free.close()
    arguments = ["-W", "error", "sharded.py", folder, json.dumps(commands)]
    ends = ended(started(size, arguments, folder), folder, patience=200)
    lost = commands[-1].get("killed")
    assert [code for code, _ in ends] == [-signal.SIGKILL * (rank == lost) for rank in range(size)]
    return [
        [Outcome(*one) for one in json.loads((folder / f"{rank}.json").read_text())]
        for rank in range(size)
    ]


def rows(path):
    """Of a table, without what a clock put there."""
    with open(path, newline="") as file:
        return [
            {name: value for name, value in row.items() if "seconds" not in name}
            for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def by_two(run, tmp_path_factory):
    """A folder of what two ranks made of five commands, and how these ended on each."""
    folder = tmp_path_factory.mktemp("two")
    return folder, by_ranks(
        2,
        folder / "ends",
        {"arguments": ("certify", run, "--out", folder / "whole")},
        {"arguments": ("certify", run, "--out", folder / "whole")},
        {"arguments": (*SWEEP, "--kappa", "0,0.5,1", "--out", folder / "sweep")},
        {"arguments": ("certify", run, "--out", folder / "removed"), "removed by": 1},
        {"arguments": ("certify", run, "--out", folder / "cut"), "killed": 1},
    )


@pytest.fixture(scope="module")
def by_four(by_two, tmp_path_factory):
    """The same of four ranks and two commands; there are fewer batches and runs."""
    folder = tmp_path_factory.mktemp("four")
    shutil.copytree(by_two[0] / "cut", folder / "cut")
    return folder, by_ranks(
        4,
        folder / "ends",
        {"arguments": ("certify", "--resume", folder / "cut")},
        {"arguments": (*SWEEP, "--kappa", "0,0.5", "--out", folder / "sweep"), "killed": 1},
    )


def test_ranks_make_the_certificates_of_one_process(run, by_two):
    folder, ((first, *_), (second, *_)) = by_two
    assert differing(run / "whole", folder / "whole") == []
    assert (first.code, first.err) == (0, "")
    assert first.out.endswith(f"all files are in {folder / 'whole'}\n")
    assert second == (0, "", "")


def test_what_rank_0_cannot_do_is_told_once_and_ends_all(by_two):
    folder, ((_, first, *_), (_, second, *_)) = by_two
    says = f"Error: the output folder {folder / 'whole'} already exists and is not empty\n"
    assert first == (1, "", says)
    assert second == (0, "", "")


def test_ranks_make_the_sweep_of_one_process(by_two, tmp_path):
    folder, ((_, _, first, *_), (_, _, second, *_)) = by_two
    assert run_ibp(*SWEEP, "--kappa", "0,0.5,1", "--out", tmp_path / "alone").code == 0
    for table in ("results.csv", "summary.csv"):
        assert rows(folder / "sweep" / table) == rows(tmp_path / "alone" / table)
    assert len(rows(folder / "sweep" / "results.csv")) == 3
    lines = [line for line in first.out.splitlines() if ": accuracy" in line]
    assert [line[:5] for line in lines] == ["[1/3]", "[2/3]", "[3/3]"]
    assert (first.code, first.err, second) == (0, "", (0, "", ""))


def test_no_rank_writes_in_a_folder_that_was_removed(by_two):
    """Each ends with an error, and the files that are there now stay as they are."""
    folder, ends = by_two
    journals = ("certificates.journal", "certificates.1.journal")
    for _, _, _, (code, out, err), *_ in ends:
        assert (code, out, err.count("\n")) == (1, "", 1)
    assert "certificates.1.journal was removed, replaced or changed" in ends[1][3].err
    expected = dict.fromkeys(journals, b"of another command")
    assert snapshot(folder / "removed") == expected


def test_a_killed_rank_costs_what_it_had_not_finished(run, by_two, tmp_path, monkeypatch):
    """The other does its share and ends, and one process goes on."""
    folder, ((*_, first), _) = by_two
    hint = f"resume with: ibp certify --resume {folder / 'cut'}"
    says = f"Error: lost another of the 2 ranks; {hint}\n"
    assert first == (1, "", says)
    cut = shutil.copytree(folder / "cut", tmp_path / "cut")
    done = {path.name: len(path.read_text().splitlines()) for path in cut.glob("*.journal")}
    assert done == {"certificates.journal": 1 + 2, "certificates.1.journal": 1 + 1}

    certified, before = [], certification.find_radii

    def find_radii(*given, **more):
        certified.append(1)
        return before(*given, **more)

    monkeypatch.setattr(certification, "find_radii", find_radii)
    assert run_ibp("certify", "--resume", cut).code == 0
    assert len(certified) == len(BATCHES) - 3
    assert differing(run / "whole", cut) == []


def test_another_number_of_ranks_goes_on(run, by_four):
    """More than there are batches left."""
    folder, ends = by_four
    assert differing(run / "whole", folder / "cut") == []
    assert [(first.code, first.err) for first, *_ in ends] == [(0, "")] * 4


def test_a_killed_rank_leaves_the_runs_of_others(by_four, tmp_path):
    """Which are real processes here, each training alone."""
    folder, ends = by_four
    hint = f"resume with: ibp sweep --resume {folder / 'sweep'}"
    says = f"lost another of the 4 ranks; {hint}\n"
    errors = {rank: last.err for rank, (_, *after) in enumerate(ends) for last in after}
    assert errors == {0: f"Error: {says}", 2: f"Error: rank 2: {says}", 3: f"Error: rank 3: {says}"}
    table = folder / "sweep" / "results.csv"
    assert [row["status"] for row in rows(table)] == ["complete", "pending"]
    assert run_ibp("sweep", "--resume", folder / "sweep", "--device", "cpu").code == 0
    assert run_ibp(*SWEEP, "--kappa", "0,0.5", "--out", tmp_path / "alone").code == 0
    assert rows(table) == rows(tmp_path / "alone" / "results.csv")


# One process that says it were one of several


@pytest.mark.parametrize("command", [("attack", "run"), ("certify", "run", "--bounds", "x")])
def test_a_mistake_in_the_command_is_told_once(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        code, out, err = run_ibp(*command)
        assert (code, out, len(err.splitlines())) == (2 * lines, "", lines)
    if command[0] == "attack":
        monkeypatch.setenv("RANK", "0")
        assert "ibp attack runs in a single process" in run_ibp(*command).err


def test_every_rank_of_a_machine_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert chosen_device(name) == torch.device("cuda")
        assert chosen_device(name, Ranks(5, 8, 1)) == torch.device("cuda:1")
        with pytest.raises(UserError, match=r"more processes than CUDA devices \(2\)"):
            chosen_device(name, Ranks(6, 8, 2))
    assert chosen_device("cpu", Ranks(6, 8, 2)) == torch.device("cpu")


def test_a_device_can_be_named_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert current_device("cuda:1") == chosen_device("cuda:1") == torch.device("cuda:1")
    assert current_device("cuda:0") == torch.device("cuda:0")
    assert current_device("cuda", Ranks(3, 4, 1)) == torch.device("cuda:1")
    assert taken == [torch.device("cuda:1"), torch.device("cuda:0"), torch.device("cuda:1")]
    with pytest.raises(UserError, match="no device cuda:2: the last one is cuda:1"):
        chosen_device("cuda:2")
    with pytest.raises(UserError, match="device must be auto, cpu, cuda or cuda:1, but is 'gpu'"):
        chosen_device("gpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with (
        pytest.raises(click.UsageError, match="--device cuda, not cuda:1"),
        working_ranks("cuda:1"),
    ):
        pass


def test_runs_of_a_sweep_are_on_the_device_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    seen = []

    def run_sweep(whole, folder, workers, **others):
        seen.append(workers.device)
        return {}

    monkeypatch.setattr(sweep, "run_sweep", run_sweep)
    given = ("--methods", "fastibp", "--select", "test", "--width", 2, "--hidden", 8)
    done = run_ibp("sweep", *given, "--device", "cuda:1", "--out", tmp_path / "sweep")
    assert (done.code, seen) == (0, ["cuda:1"]), done.err


def test_every_batch_is_dealt_once(run, monkeypatch):
    """To three ranks, one after the other, with the bits that one makes of it."""
    model = load_model(run / "model.safetensors")
    data = load_dataset("digits", Request(limit_test=72)).test
    shares, seen = [], []

    def all_gather_object(ranks, mine):
        shares.append(mine)
        return shares[:1]

    monkeypatch.setattr(certification, "all_gather_object", all_gather_object)
    options = CertificationOptions(0.1, batch_size=16)
    whole = certify(model, data, options)
    for rank in range(3):
        again = certify(
            model, data, options, ranks=Ranks(rank, 3), advance=lambda done, _: seen.append(done)
        )
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    everything, *parts = shares
    assert [list(part) for part in parts] == [[0, 3], [1, 4], [2]]
    for number, one in [item for part in parts for item in part.items()]:
        assert all(map(torch.equal, one, everything[number]))
    assert seen == [0, 48, 72, 0, 48, 72, 0, 48]
