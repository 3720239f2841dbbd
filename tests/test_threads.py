"""Threads of torch: as many as machine and step allow, the same in each part of a run."""

import json
import os
from unittest import mock

import pytest
import torch
from helpers import run_ibp, write_image

from ibpcore import UserError, certified_margins, certified_radii, cnn7, threads
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments import sweeps
from ibpcore.experiments.results import Result, by_setting
from ibpcore.experiments.run import train_and_certify
from ibpcore.nn import IntervalConv2d, IntervalFlatten, IntervalLinear, IntervalResidual
from ibpcore.nn.networks import Network
from ibpcore.nn.work import multiplications
from ibpcore.threads import available_processors, computing_with, suitable_threads
from ibpcore.training import loop
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_model
from ibpcore_cli import certify, export, sweep, train

TINY = ("--width", 2, "--hidden", 8, "--epochs", 1, "--limit-train", 64, "--limit-test", 8)
TINY_SETTINGS = {"width": 2, "hidden": 8, "epochs": 1, "limit_train": 64, "limit_test": 8}
DIGITS = load_dataset("digits", Request(limit_train=64, limit_test=8))


@pytest.fixture(autouse=True)
def three_threads():
    """As a user may have set them."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def machine(processors):
    """A machine with so many processors to use."""
    return mock.patch.object(threads, "available_processors", return_value=processors)


def affinity(mask):
    """A process that is bound to these processors."""
    return mock.patch.object(os, "sched_getaffinity", create=True, return_value=mask)


# --- the machine --------------------------------------------------------------------------

V1 = "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/\n"
MACHINES = {
    "no cgroups": ({}, 8),
    "version 2, no limit": ({"": "0::/a/b\n", "a/b/cpu.max": "max 100000\n"}, 8),
    "version 2": ({"": "0::/a/b\n", "a/b/cpu.max": "250000 100000\n"}, 2),
    "version 2, a fraction": ({"": "0::/a\n", "a/cpu.max": "50000 100000\n"}, 1),
    "version 2, above": ({"": "0::/a/b\n", "a/cpu.max": "300000 100000\n"}, 3),
    "version 2, below": ({"": "0::/a\n", "a/b/cpu.max": "300000 100000\n"}, 8),
    "version 2, tighter above": (
        {"": "0::/a/b\n", "a/b/cpu.max": "600000 100000", "a/cpu.max": "400000 100000"},
        4,
    ),
    "version 2 in a container": ({"": "0::/docker/1\n", "cpu.max": "200000 100000\n"}, 2),
    "version 2, more than there are": ({"": "0::/\n", "cpu.max": "9900000 100000\n"}, 8),
    "version 2 beside 1": ({"": "1:name=systemd:/\n0::/a\n", "unified/a/cpu.max": "200 100"}, 2),
    "version 1": (
        {"": V1, "cpu/docker/1/cpu.cfs_quota_us": "300000\n"}
        | {"cpu/docker/1/cpu.cfs_period_us": "100000\n"},
        3,
    ),
    "version 1, no limit": (
        {"": V1, "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        8,
    ),
    "version 1 in a container": (
        {"": V1, "cpu,cpuacct/cpu.cfs_quota_us": "200000\n"}
        | {"cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
        2,
    ),
    "version 1 of another group": (
        {"": "4:memory:/docker/1\n", "cpu/docker/1/cpu.cfs_quota_us": "300000\n"}
        | {"cpu/docker/1/cpu.cfs_period_us": "100000\n"},
        8,
    ),
    "damaged": ({"": "0::/\n", "cpu.max": "much"}, 8),
    "no period": ({"": "0::/\n", "cpu.max": "100 0"}, 8),
}


@pytest.mark.parametrize("name", MACHINES)
def test_processors_of_a_quota(tmp_path, name):
    files, expected = MACHINES[name]
    for place, content in files.items():
        path = tmp_path / ("sys/fs/cgroup/" + place if place else "proc/self/cgroup")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    with (
        affinity(range(8)),
        mock.patch.object(os, "cpu_count", return_value=64),
    ):
        assert available_processors(tmp_path) == expected


def test_processors_of_an_affinity_mask(tmp_path):
    with affinity({3, 5}):
        assert available_processors(tmp_path) == 2


def test_processors_where_there_are_no_affinity_masks(tmp_path):
    with (
        mock.patch.object(os, "sched_getaffinity", None, create=True),
        mock.patch.object(os, "cpu_count", return_value=6),
    ):
        assert available_processors(tmp_path) == 6


# --- the step -----------------------------------------------------------------------------


def test_work_by_hand():
    """Convolutions: outputs times inputs of each; both branches; a batch counts once."""
    branch, shortcut = IntervalConv2d(4, 6, 1), IntervalConv2d(4, 6, 3, padding=1)
    layers = [IntervalConv2d(2, 4, 3, stride=2, padding=1), IntervalResidual(branch, shortcut)]
    network = Network([*layers, IntervalFlatten(), IntervalLinear(96, 5)], (2, 8, 8))
    by_hand = 4 * 16 * 18 + 6 * 16 * 4 + 6 * 16 * 36 + 96 * 5
    assert multiplications(network) == by_hand


def test_counting_leaves_a_network_as_it_was():
    network = cnn7((1, 8, 8), 10, 2, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    assert multiplications(network) > 0
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_each_thread_has_its_share_of_work():
    share = threads.WORK_PER_THREAD
    with machine(8):
        found = [suitable_threads(work) for work in (0, 1.9 * share, 2 * share, 2.9 * share, 1e12)]
    assert found == [1, 1, 2, 2, 3]
    with machine(2):
        assert suitable_threads() == suitable_threads(1e12) == 2


def test_a_context_restores_the_number():
    with computing_with(1):
        assert torch.get_num_threads() == 1
        with computing_with(None), computing_with(2):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 1
    with pytest.raises(ZeroDivisionError), computing_with(2):
        raise ZeroDivisionError
    assert torch.get_num_threads() == 3


# --- from Python --------------------------------------------------------------------------


def spying(function, seen):
    def spy(*args, **kwargs):
        seen.append(torch.get_num_threads())
        return function(*args, **kwargs)

    return spy


@pytest.mark.parametrize("asked", [None, 2])
def test_a_library_call_computes_with_what_it_is_asked_for(tmp_path, asked):
    """The fixture sees that the number is as before, however the call ends."""
    config, seen = make_config("digits", "acert", **TINY_SETTINGS, threads=asked), []
    with machine(1), mock.patch.object(loop, "train_step", spying(loop.train_step, seen)):
        train_and_certify(config, DIGITS, tmp_path)
    assert {*seen} == {asked or 3}
    with pytest.raises(UserError, match="held out"):
        train_model(make_config("digits", "acert", validation=5, threads=2), DIGITS, tmp_path)


def test_bounds_from_python_use_the_threads_of_the_process():
    network, images = cnn7((1, 8, 8), 10, 2, 8).eval(), torch.rand(2, 1, 8, 8)
    labels = network(images).argmax(1)
    with machine(1), mock.patch.object(torch, "set_num_threads") as changed:
        certified_radii(network, images, labels, 0.1)
        certified_margins(network, images, labels, 0.1)
    changed.assert_not_called()


@pytest.mark.parametrize("number", [0, -1, 1025, 2.0, True])
def test_what_is_no_number_of_threads(number):
    with pytest.raises(UserError, match="threads must be"):
        make_config("digits", "acert", threads=number)


def test_seeds_that_ran_with_other_threads_are_of_one_setting(tmp_path):
    measures = {"accuracy": 0.5}
    results = [
        Result(tmp_path, make_config("digits", "acert", seed=n, threads=n + 1), "digits", measures)
        for n in range(2)
    ]
    assert len(by_setting(results)) == 1


# --- commands -----------------------------------------------------------------------------


def config_of(run):
    return json.loads((run / "config.json").read_text())


def test_a_small_step_has_one_thread_and_the_run_says_so(tmp_path):
    run, seen = tmp_path / "run", []
    with (
        machine(3),
        mock.patch.object(train, "train_and_certify", spying(train.train_and_certify, seen)),
        mock.patch.object(loop, "train_step", spying(loop.train_step, seen)),
    ):
        done = run_ibp("train", *TINY, "--out", run)
    assert (done.code, done.err) == (0, "")
    assert "threads: 1;" in done.out
    assert config_of(run)["threads"] == 1
    assert seen[0] == 3
    assert {*seen[1:]} == {1}


@pytest.mark.parametrize(("asked", "expected"), [((), 3), (("--threads", 2), 2)])
def test_a_large_step_has_all_threads_unless_others_are_asked_for(tmp_path, asked, expected):
    run = tmp_path / "run"
    with machine(4), mock.patch.object(threads, "WORK_PER_THREAD", 1):
        assert run_ibp("train", *TINY, *asked, "--out", run).code == 0
    assert config_of(run)["threads"] == expected


def test_more_threads_than_processors_are_used_if_asked_for(tmp_path):
    run = tmp_path / "run"
    with machine(1):
        assert run_ibp("train", *TINY, "--threads", 2, "--out", run).code == 0
    assert config_of(run)["threads"] == 2


def test_a_resumed_run_has_the_threads_of_its_beginning(tmp_path):
    """On any machine: so its weights are those of a run that was not cut off."""
    whole, cut, seen = tmp_path / "whole", tmp_path / "cut", []
    common = ("train", *TINY, "--epochs", 2, "--threads", 2)
    assert run_ibp(*common, "--out", whole).code == 0
    real, steps = loop.train_step, iter(range(100))

    def interrupted(*args):
        if next(steps) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with mock.patch.object(loop, "train_step", interrupted):
        assert run_ibp(*common, "--out", cut).code == 130
    with machine(1), mock.patch.object(loop, "train_step", spying(real, seen)):
        assert run_ibp("train", "--resume", cut).code == 0
        refused = run_ibp("train", "--resume", cut, "--threads", 1)
    assert {*seen} == {2}
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    for name in ("config.json", "model.safetensors", "certificates.csv"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_configuration_file_gives_threads_for_steps_of_the_same_size(tmp_path):
    """For others the rule applies again, unless they are given too."""
    first = tmp_path / "first"
    assert run_ibp("train", *TINY, "--threads", 2, "--out", first).code == 0
    file = ("train", "--config", first / "config.json")
    cases = {("--seed", 1): 2, ("--width", 3): 1, ("--width", 3, "--threads", 3): 3}
    for number, (given, expected) in enumerate(cases.items()):
        run = tmp_path / str(number)
        assert run_ibp(*file, *given, "--out", run).code == 0
        assert config_of(run)["threads"] == expected, given


def test_a_dry_run_leaves_the_number_open(tmp_path):
    done = run_ibp("train", *TINY, "--dry-run")
    assert done.code == 0, done.err
    assert 'threads = "none"\n' in done.out
    assert "\n# threads: 1\n" in done.out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads") / "run"
    assert run_ibp("train", *TINY, "--out", folder).code == 0
    return folder


def test_certify_chooses_saves_and_resumes_a_number(tmp_path, run):
    out, seen = tmp_path / "out", []
    spy = mock.patch.object(certify, "certify_test_set", spying(certify.certify_test_set, seen))
    with machine(4), spy, mock.patch.object(threads, "WORK_PER_THREAD", 1):
        assert run_ibp("certify", run, "--out", out).code == 0
    with machine(1), spy:
        assert run_ibp("certify", "--resume", out).code == 0
        assert run_ibp("certify", run, "--out", tmp_path / "one").code == 0
        assert run_ibp("certify", run, "--out", tmp_path / "two", "--threads", 2).code == 0
        refused = run_ibp("certify", "--resume", out, "--threads", 1)
    assert seen == [3, 3, 1, 2]
    assert json.loads((out / "certify.json").read_text())["threads"] == 3
    assert (refused.code, refused.err.count("\n")) == (2, 1)


QUICK = {
    "attack": ("--steps", 1, "--restarts", 1, "--no-autoattack"),
    "inspect": ("--samples", 4, "--grid", 5, "--line-points", 5, "--bisections", 1),
}


@pytest.mark.parametrize("command", ["attack", "inspect", "predict"])
def test_other_commands_take_threads_too(tmp_path, run, command):
    given = (run, *QUICK.get(command, ()))
    if command == "predict":
        write_image(tmp_path / "image.png", 7, mode="L")
        given = (tmp_path / "image.png", "--model", run)
    with mock.patch.object(torch, "set_num_threads", wraps=torch.set_num_threads) as changed:
        done = run_ibp(command, *given, "--out", tmp_path / "out", "--threads", 2)
    assert done.code == 0, done.err
    assert mock.call(2) in changed.mock_calls
    assert run_ibp(command, *given, "--threads", 0).code == 2


def test_a_command_never_has_more_threads_than_processors(tmp_path, run):
    seen = []
    spy = mock.patch.object(export, "open_saved", spying(export.open_saved, seen))
    with machine(2), spy:
        done = run_ibp("export", run, "--onnx", tmp_path / "net.onnx")
    assert done.code == 0, done.err
    assert seen == [2]


def test_runs_of_a_sweep_have_one_number_which_it_keeps(tmp_path):
    """The threads are shared by the jobs with which the sweep began."""
    folder = tmp_path / "sweep"
    given = ("sweep", *TINY, "--methods", "fastibp", "--select", "test", "--out", folder)

    def written(whole, folder, *args, **kwargs):
        sweeps.write_sweep(folder, whole)
        return {}

    with machine(4), mock.patch.object(sweep, "run_sweep", written):
        with mock.patch.object(threads, "WORK_PER_THREAD", 1):
            assert run_ibp(*given, "--jobs", 2, "--kappa", "0,1").code == 0
            assert run_ibp(*given, "--jobs", 1, "--kappa", "0.5").code == 0
        refused = run_ibp(*given, "--threads", 2)
    assert [run.threads for run in sweeps.read_sweep(folder).runs.values()] == [1, 1, 1]
    assert refused.code == 1
    assert "threads changed since the sweep began" in refused.err


def test_doctor_says_how_many_threads_and_processors(tmp_path):
    with machine(2), mock.patch.object(torch.cuda, "is_available", return_value=False):
        done = run_ibp("doctor", "--data-dir", tmp_path, "--device", "cpu")
    assert done.code == 0
    assert f"cpu, threads: 2, processors to use: 2 of {os.cpu_count()}" in done.out
