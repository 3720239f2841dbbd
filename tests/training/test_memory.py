"""The memory of a step is foreseen, and batches are bounded in parts where it is short."""

import json
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers import run_ibp

from ibpcore import cnn7
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments import opening
from ibpcore.experiments.sweeps import read_sweep
from ibpcore.training import memory
from ibpcore.training.config import make_config
from ibpcore.training.cost import all_correct
from ibpcore.training.loop import epoch_batches, train_step
from ibpcore.training.memory import TensorMemory, available_memory, step_memory, suitable_parts
from ibpcore.training.state import start_state

CPU = torch.device("cpu")
SMALL = {"width": 4, "hidden": 16, "batch_size": 64}
TINY = ("--width", 2, "--hidden", 8, "--epochs", 1, "--limit-train", 64, "--limit-test", 8)
DIGITS = load_dataset("digits", Request(limit_train=64, limit_test=8))


def network(config):
    return cnn7((1, 8, 8), 10, config.width, config.hidden)


# --- a step -------------------------------------------------------------------------------


def test_bytes_are_counted_from_allocation_to_release():
    with TensorMemory() as found:
        x = torch.ones(256)
        view = x.view(16, 16)[1:]
        assert found.alive == 1024
        del x
        assert found.alive == 1024  # the view holds it
        del view
        torch.ones(10).add_(1)
    assert (found.alive, found.peak) == (0, 1024)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    "method", ["standard", "fastibp", "acert", "random-ibp", "crown-ibp", "sabr", "mtl-ibp"]
)
def test_a_step_takes_what_was_foreseen(method, parts):
    """A real one, with every image correct, within a quarter."""
    config = make_config("digits", method, **SMALL, accumulate=parts, solver="brentq")
    state = start_state(config, DIGITS, CPU)
    state.model.train()
    batch = next(epoch_batches(state, DIGITS.train, config))
    easy = all_correct(state, batch)
    with TensorMemory() as found:
        train_step(state, easy, 0.5, config)
    weights = sum(p.nbytes for p in state.model.parameters())
    measured = found.peak + weights
    assert measured / 1.25 < step_memory(config, network(config)) < 1.25 * measured


def test_averaged_weights_take_memory():
    config = make_config("digits", "fastibp", **SMALL)
    net = network(config)
    weights = sum(p.nbytes for p in net.parameters())
    averaging = step_memory(replace(config, average_last=0.1), net)
    assert averaging - step_memory(config, net) == weights


def test_a_network_and_its_weights_are_left_as_they_were():
    net = network(make_config("digits", "fastibp", **SMALL)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step_memory(make_config("digits", "fastibp", **SMALL), net)
    assert not net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


# --- the number of parts ------------------------------------------------------------------


def test_parts_are_as_few_as_fit():
    config = make_config("digits", "fastibp", **SMALL)
    net = network(config)
    needs = {n: step_memory(replace(config, accumulate=n), net) for n in (1, 2, 4)}
    assert needs[1] > needs[2] > needs[4]
    for parts, need in needs.items():
        assert suitable_parts(config, net, need / memory.USABLE) == parts
    # What no number of parts lets fit is split as far as that helps.
    assert 4 <= suitable_parts(config, net, 1) <= 16


def test_what_certainly_fits_is_not_estimated():
    config = make_config("digits", "fastibp", **SMALL)
    with mock.patch.object(memory, "step_memory", side_effect=AssertionError):
        assert suitable_parts(config, network(config), float("inf")) == 1
        assert suitable_parts(config, network(config), 2**30) == 1


@pytest.mark.parametrize(
    ("method", "given"), [("exp-ibp", {}), ("taps", {}), ("fastibp", {"train_bound": "crown"})]
)
def test_what_cannot_be_split_or_estimated_stays_whole(method, given):
    config = make_config("digits", method, **SMALL, **given)
    assert suitable_parts(config, network(config), 1) == 1


# --- the machine --------------------------------------------------------------------------

GIB = 2**30
FREE = {"proc/meminfo": f"MemTotal: {16 * 2**20} kB\nMemAvailable:    {8 * 2**20} kB\n"}
V2 = FREE | {
    "proc/self/cgroup": "0::/a/b\n",
    "sys/fs/cgroup/a/memory.max": str(4 * GIB),
    "sys/fs/cgroup/a/memory.current": str(3 * GIB),
    "sys/fs/cgroup/a/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
}
V1 = FREE | {
    "proc/self/cgroup": "4:cpu:/x\n5:memory:/docker/1\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(5 * GIB),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(2 * GIB),
    "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 2\n",
}
MACHINES = {
    "another system": ({}, float("inf")),
    "no cgroups": (FREE, 8 * GIB),
    "version 2": (V2, 2 * GIB),
    "version 2, no limit": (V2 | {"sys/fs/cgroup/a/memory.max": "max\n"}, 8 * GIB),
    "version 2, less is free": (V2 | {"sys/fs/cgroup/a/memory.max": str(32 * GIB)}, 8 * GIB),
    "version 1": (V1, 3 * GIB + 2),
    "version 1, another controller": (V1 | {"proc/self/cgroup": "4:cpu:/docker/1\n"}, 8 * GIB),
    "damaged": (V2 | {"sys/fs/cgroup/a/memory.current": "much"}, 8 * GIB),
}


@pytest.mark.parametrize("name", MACHINES)
def test_memory_of_a_machine_and_its_groups(tmp_path, name):
    files, expected = MACHINES[name]
    for place, content in files.items():
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert available_memory(CPU, tmp_path) == expected


# --- runs ---------------------------------------------------------------------------------


def room(available):
    """A machine on which so many bytes are available."""
    return mock.patch.object(opening, "available_memory", return_value=available)


def test_a_run_says_and_records_its_parts_and_keeps_them(tmp_path):
    """`--resume` on a larger machine, and --config, but for steps of another size."""
    run = tmp_path / "run"
    with room(1):
        done = run_ibp("train", *TINY, "--out", run, "--device", "cpu")
    assert done.code == 0, done.err
    saved = json.loads((run / "config.json").read_text())["accumulate"]
    assert saved > 1
    assert f"each batch is bounded in {saved} parts" in done.out
    assert run_ibp("train", "--resume", run, "--epochs", 2, "--device", "cpu").code == 0
    assert json.loads((run / "config.json").read_text())["accumulate"] == saved
    for given, expected in (((), saved), (("--batch-size", 16), 1)):
        out = tmp_path / f"again-{expected}"
        again = run_ibp(
            *("train", "--config", run / "config.json", "--out", out, "--device", "cpu", *given)
        )
        assert again.code == 0, again.err
        assert json.loads((out / "config.json").read_text())["accumulate"] == expected
        assert ("each batch is bounded" in again.out) == (expected > 1)


def test_a_given_number_is_kept(tmp_path):
    with room(1):
        dry = run_ibp("train", *TINY, "--dry-run", "--accumulate", 1, "--device", "cpu")
        small = run_ibp("train", *TINY, "--dry-run", "--device", "cpu")
    assert "# parts of a batch: 1\n" in dry.out
    assert "# parts of a batch: 1\n" not in small.out
    assert 'accumulate = "none"\n' in small.out


def test_ranks_share_the_memory_of_a_machine_and_the_batch():
    config = make_config("digits", "fastibp", **SMALL)
    net, seen = network(config), []

    def chosen(share, _, available):
        seen.append((share.batch_size, available))
        return 1

    with room(100.0), mock.patch.object(opening, "suitable_parts", chosen):
        for size in (1, 3):
            found = opening.settled(config, net, DIGITS, CPU, mock.Mock(size=size))
            assert found.accumulate == 1
    assert seen == [(64, 100.0), (22, 100 / 3)]


def test_the_runs_of_a_sweep_share_the_memory_and_the_parts_of_the_largest():
    runs = [make_config("digits", name, **SMALL) for name in ("acert", "mtl-ibp")]
    runs.append(replace(runs[0], batch_size=128))
    seen = []

    def chosen(config, _, available):
        seen.append((config.method, config.batch_size, available))
        return {"acert": config.batch_size // 64, "mtl-ibp": 4}[config.method]

    with room(100.0), mock.patch.object(opening, "suitable_parts", chosen):
        found = opening.settled_together(runs[0], runs, DIGITS, CPU, 4)
    assert found == {"threads": 1, "accumulate": 4, "compile": "off"}
    assert seen == [("acert", 64, 25.0), ("mtl-ibp", 64, 25.0), ("acert", 128, 25.0)]


@pytest.mark.parametrize("given", [None, 2])
def test_batches_that_cannot_be_split_are_not(given):
    """Nor are those of other methods in the same sweep, which share the number."""
    methods = ("acert", "taps") if given is None else ("acert", "sabr")
    runs = [make_config("digits", name, **SMALL, accumulate=given) for name in methods]
    with room(1):
        found = opening.settled_together(runs[0], runs, DIGITS, CPU, 1)
    assert found["accumulate"] == (given or 1)


@pytest.mark.parametrize("command", ["sweep", "search"])
def test_sweeps_and_searches_choose_parts_for_their_jobs(tmp_path, command):
    """Batches that would not fit are split in all runs alike; with TAPS they are not."""
    work = f"ibpcore_cli.{command}.run_{command}"
    for methods, split in (("acert,fastibp", True), ("acert,taps", False)):
        given = ("--methods", methods, *TINY, "--device", "cpu", "--out", tmp_path / methods)
        with room(1), mock.patch(work, side_effect=KeyboardInterrupt) as run:
            assert run_ibp(command, *given).code == 130
        whole = run.call_args.args[0]
        if command == "search":
            parts = {whole.problem.common["accumulate"]}
        else:
            parts = {config.accumulate for config in whole.runs.values()}
        assert (parts != {1}) == split
        assert len(parts) == 1


def test_a_sweep_that_is_joined_keeps_its_parts(tmp_path):
    """They are one choice for all its runs, so the memory of a step is not asked for again."""
    given = ("--seeds", 1, *TINY, "--device", "cpu", "--claim", "unchecked", "--out", tmp_path)
    with room(1):
        assert run_ibp("sweep", "--methods", "acert", *given).code == 0
    with mock.patch.object(opening, "suitable_parts", side_effect=AssertionError):
        assert run_ibp("sweep", "--methods", "fastibp", *given).code == 0
    parts = {config.accumulate for config in read_sweep(tmp_path).runs.values()}
    assert len(read_sweep(tmp_path).runs) == 2
    assert parts.isdisjoint({None, 1})
    assert len(parts) == 1
