"""A short run of each fuzzer, and by name what fuzzing and reading the code found."""

import contextlib
import io
import json
import os
import pickle
import random
import signal
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import run_ibp, write_image, write_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reports import made_up

from benchmarks.reliability import command, fuzz
from benchmarks.reliability.mutation import damaged_bytes, damaged_value
from ibpcore import UserError, cnn7, load_model, save_model
from ibpcore.bounds.epsilons import as_number
from ibpcore.certification.certificates import Certificates
from ibpcore.data.folders import read_images
from ibpcore.data.idx import read_idx
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments.comparison import read_all, sections
from ibpcore.experiments.reports import cost_table, report
from ibpcore.experiments.results import by_setting, read_result, setting_row
from ibpcore.experiments.run_folder import saved_config
from ibpcore.experiments.sweeps import Sweep, grid, read_sweep, write_sweep
from ibpcore.io.files import read_json
from ibpcore.nn.checkpoint import ENTRY
from ibpcore.training.config import LARGEST, TrainConfig, make_config
from ibpcore.training.state import load_state, save_state
from ibpcore.visualization.plots.curves import write_curve
from ibpcore_cli.value_types import MOST_VALUES, Epsilon, Kappas

needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")


@needs_limits
@pytest.mark.parametrize("fuzzer", fuzz.FUZZERS, ids=lambda fuzzer: fuzzer.what)
def test_a_short_run_finds_nothing(tmp_path, fuzzer):
    row = fuzz.fuzzed(fuzzer, max(10, fuzzer.inputs // 250), 0, tmp_path / "work")
    assert row.failures == 0, row.note


def outcome_of(tmp_path, feed) -> str:
    row = fuzz.fuzzed(fuzz.Fuzzer("made up", 1, lambda folder: feed), 1, 0, tmp_path / "work")
    assert row.cases == 1
    return row.note if row.failures else ""


@needs_limits
def test_the_fuzzers_notice(tmp_path, monkeypatch):
    """Each kind of failure, and what is none."""

    def refuses(error):
        def feed(rng):
            raise error

        return feed

    def outside(rng):
        (tmp_path / "work" / "evil").write_text("")

    def slow(rng):
        while True:
            pass

    def large(rng):
        bytearray(fuzz.MOST_MEMORY + 2**30)

    feeds = {
        refuses(UserError("no")): "",
        refuses(FileNotFoundError(2, "no", "file")): "",
        refuses(OSError("nothing")): "OSError without a file",
        refuses(KeyError("x")): "KeyError",
        large: "MemoryError",
    }
    for number, (feed, says) in enumerate(feeds.items()):
        found = outcome_of(tmp_path / str(number), feed)
        assert (says in found) if says else found == ""
    assert "it wrote ['evil', 'target']" in outcome_of(tmp_path, outside)
    monkeypatch.setattr(fuzz, "MOST_SECONDS", 0.1)
    assert "TooSlow" in outcome_of(tmp_path / "slow", slow)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_damage_is_a_function_of_the_seed_and_does_damage():
    content, value = bytes(range(200)), {"a": [1, {"b": 2}], "c": "d"}
    for damage, whole in ((damaged_bytes, content), (damaged_value, value)):
        results = [repr(damage(random.Random(seed), whole)) for seed in range(100)]
        assert results == [repr(damage(random.Random(seed), whole)) for seed in range(100)]
        assert len(set(results)) > 50
    assert value == {"a": [1, {"b": 2}], "c": "d"}


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.text(max_size=30)
    | st.from_regex(r"-?[0-9]{0,9}\.?[0-9]{0,9}(e-?[0-9]{1,4})?(/[0-9.]{0,9})?")
)
def test_epsilons_are_numbers_or_refused(text):
    try:
        number = as_number(text)
    except (ValueError, ZeroDivisionError):
        number = float("nan")
    converted = fuzz._converted(Epsilon(), text)
    assert converted == (number if 0 < number <= 1 else None)


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.dictionaries(
        st.sampled_from(list(make_config("digits", "acert").to_dict())),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            st.lists,
            max_leaves=3,
        ),
        max_size=3,
    )
)
def test_settings_are_allowed_or_refused(values):
    config = make_config("digits", "acert").to_dict() | values
    with contextlib.suppress(UserError):
        assert TrainConfig.from_dict(config).epochs >= 1


# Messages


def test_messages_are_one_short_line():
    """A file that is quoted may hold line breaks, commands to a terminal, or megabytes."""
    error = UserError("a\nb\x1b[2J\ud800é" + "x" * 10**6)
    assert str(error).startswith(r"a\nb\x1b[2J\ud800éxxx")
    assert len(str(error)) < 1100
    assert str(pickle.loads(pickle.dumps(UserError("a\nb")))) == r"a\nb"


# Models


@pytest.fixture
def model_file(tmp_path):
    save_model(cnn7((1, 4, 4), 2, 1, 1), tmp_path / "m")
    return tmp_path / "m"


def forged(path: Path, **architecture) -> None:
    """The same weights beside another architecture."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    entry = json.loads(header["__metadata__"][ENTRY])
    entry["architecture"] |= architecture
    header["__metadata__"][ENTRY] = json.dumps(entry)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


HUGE = {
    "a width of terabytes": {"width": 2**20},
    "a hidden layer of terabytes": {"hidden": 2**40},
    "classes of terabytes": {"classes": 2**40},
    "an image of terabytes": {"in_shape": [1, 2**20, 2**20]},
    "a size beyond 64 bits": {"in_shape": [2**62, 2**62, 2**62]},
    "a number beyond all floats": {"width": 10**400},
    "no number": {"width": float("nan")},
    "infinite": {"classes": float("inf")},
}


def peak_memory(function) -> int:
    """Bytes that Python and NumPy took at most, of a call that refuses."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@needs_limits
@pytest.mark.parametrize("case", HUGE)
def test_an_architecture_that_is_not_that_of_the_weights(model_file, case):
    """Within 4 GiB more than there are, where terabytes are asked for."""
    forged(model_file, **HUGE[case])
    with fuzz.limits():
        assert peak_memory(lambda: load_model(model_file)) < 2**24


@needs_limits
@pytest.mark.parametrize("length", [2**20, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(model_file, length):
    model_file.write_bytes(struct.pack("<Q", length) + model_file.read_bytes()[8:])
    with fuzz.limits():
        assert peak_memory(lambda: load_model(model_file)) < 2**24


# States


def state_of(tmp_path, pickled, method=zipfile.ZIP_STORED):
    save_state(tmp_path / "s", {"epoch": 1, "w": torch.arange(9.0)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "s") as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("/data.pkl") else old.read(name))
    (tmp_path / "s").write_bytes(buffer.getvalue())
    return tmp_path / "s"


CALLED = {
    "bytearray": b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\nJ\x00\x00\x00\x70\x85Rs.",
    "a tensor": b"\x80\x02}X\x01\x00\x00\x00actorch\nFloatTensor\nJ\x00\x00\x00\x70\x85Rs.",
}


@pytest.mark.parametrize("what", CALLED)
def test_a_state_that_asks_for_memory(tmp_path, what, monkeypatch):
    """`weights_only` calls these with any size."""
    path = state_of(tmp_path, CALLED[what])
    monkeypatch.setattr(torch, "load", None)
    assert peak_memory(lambda: load_state(path)) < 2**24


def test_a_packed_state_is_not_unpacked(tmp_path):
    content = pickle.dumps({"a": "x" * 2**25}, protocol=2)
    path = state_of(tmp_path, content, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    assert peak_memory(lambda: load_state(path)) < 2**24


def test_slopes_of_another_number_of_images(tmp_path):
    """One number would have been copied to all."""
    saved, config, data = fuzz._state(tmp_path)
    state = fuzz.start_state(config, data, "cpu")
    state.load(saved, config, "data")
    with pytest.raises(UserError, match="does not fit its configuration"):
        state.load({**saved, "slopes": torch.ones(())}, config, "data")


# Settings, summaries, sweeps


@pytest.mark.parametrize("name", ["epochs", "batch_size", "width", "hidden", "max_iterations"])
@pytest.mark.parametrize("value", [LARGEST + 1, 10**30, 10**400], ids=["1", "30", "400"])
def test_counts_have_a_limit(name, value):
    with pytest.raises(UserError, match=f"{name} must be at most {LARGEST}"):
        make_config("digits", "acert", **{name: value})


@pytest.mark.parametrize("name", ["epsilon_max", "learning_rate", "kappa", "xtol", "initial_kappa"])
def test_whole_numbers_beyond_all_floats(name, tmp_path):
    config = make_config("digits", "acert").to_dict() | {name: 10**400}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{name} must be a finite number"):
        saved_config(tmp_path)


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "/tmp/x", "", "a\nb", "x" * 300, "-x", "\ud800"]
)
def test_a_sweep_has_no_runs_elsewhere(tmp_path, name):
    (config,) = grid("digits", ["acert"]).values()
    write_sweep(tmp_path, Sweep({"acert-kappa0-seed0": config, name: config}, "test"))
    with pytest.raises(UserError, match="does not describe a sweep"):
        read_sweep(tmp_path)


def test_a_grid_has_a_limit():
    with pytest.raises(UserError, match="at most 10000 runs, but this one has 1000000"):
        grid("digits", ["acert"], kappas=[0.5] * 1000, seeds=range(1000))


def test_many_ranges_have_a_limit():
    """Each alone is short enough."""
    with pytest.raises(Exception, match=f"more than {MOST_VALUES} values"):
        Kappas().convert(",".join(f"{i}:{i}.9:0.1" for i in range(200)), None, None)


@pytest.mark.parametrize(
    "values",
    [
        *({"acr": 10**400}, {"acr": float("nan")}, {"acr": "0.3"}, {"accuracy": True}),
        *({"training_seconds": float("nan")}, {"training_seconds": float("inf")}),
    ],
    ids=str,
)
def test_numbers_in_summaries(tmp_path, values):
    run = made_up(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, **values}))
    kind = "a run" if "training_seconds" in values else "certificates"
    with pytest.raises(UserError, match=f"it is not a summary of {kind}"):
        read_result(run)


def changed_summary(run, **values):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, **values}))
    return run


def test_summaries_of_other_radii(tmp_path):
    """Of several seeds and settings, the radii that all have are compared."""
    one, other = made_up(tmp_path), made_up(tmp_path, kappa=0.5)
    changed_summary(other, certified_accuracy={"0.1": 0.2, "0.07": 0.3})
    (section,) = sections(read_all([one, other])[0])
    assert cost_table(section)[0] == ["Method", "κ", "at 0.1", "training, s"]
    seed = changed_summary(made_up(tmp_path, seed=1), certified_accuracy={"0.1": 0.2})
    (setting,) = by_setting([read_result(one), read_result(seed)])
    assert [name for name in setting.measures if "certified" in name] == ["certified_0.1"]
    assert "certified_0.05_mean" not in setting_row(setting)


def test_a_title_moves_no_cursor(tmp_path):
    run = changed_summary(made_up(tmp_path), dataset="\x1b[2Jdigits\n# Title")
    results, notes = read_all([run])
    text = report(results, notes)
    assert "\x1b" not in text
    assert r"\x1b[2Jdigits\n# Title" in text


# Data sets


@pytest.mark.parametrize("shape", [(2**31, 2**31, 4), (20, 2**30, 2**30), (0, 5, 5), (1, 2, 2)])
def test_an_idx_file_of_another_size(tmp_path, shape):
    """Sizes whose product is 0, or small, modulo 2**64."""
    file = tmp_path / "images"
    file.write_bytes(struct.pack(">4I", 0x803, *shape) + bytes(20))
    with pytest.raises(ValueError, match="images should hold"):
        read_idx(file, 3)


def test_a_line_of_pixels_is_not_resized(tmp_path):
    """60000 x 1 pixels, with the shorter side 500: 15 gigapixels."""
    write_image(tmp_path / "line.png", 0, (60_000, 1))
    with pytest.raises(UserError, match=r"line\.png: 60000x1 pixels are too oblong"):
        read_images([(tmp_path / "line.png", 0)], None, 500)
    images, _ = read_images([(tmp_path / "line.png", 0)], None, None)
    assert images.images.shape == (1, 3, 1, 60_000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_pipes_are_no_files(tmp_path):
    """They would be waited for."""
    write_tree(tmp_path, "ab")
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png: it is not a file"):
        load_dataset("imagefolder", Request(tmp_path))
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json is missing, or not a file"):
        read_json(tmp_path / "config.json")


# The command line


def test_names_that_no_terminal_shows(tmp_path, monkeypatch):
    """A file name need not be UTF-8."""
    monkeypatch.chdir(tmp_path)
    strange = os.fsdecode(b"\xff")
    command.run_ibp(["train", "--out", strange, "--epochs", "0"])
    with fuzz._no_work(load_dataset("digits", Request())):
        command.run_ibp(["train", "--out", strange])


@pytest.mark.parametrize("option", ["--epochs", "--width", "--hidden", "--batch-size"])
def test_numbers_of_hundreds_of_digits(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    outcome = run_ibp("train", option, "9" * 400)
    assert outcome.code == 2
    assert f"must be at most {LARGEST}" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("epsilon_max", [1e-45, 1e-300, 0.1])
def test_figures_of_any_title_and_any_radius(tmp_path, epsilon_max):
    """Between dollars matplotlib looks for mathematics; a folder may be called like this."""
    zeros = torch.zeros(2, dtype=torch.int64)
    radii = torch.tensor([0.0, epsilon_max], dtype=torch.float64)
    certificates = Certificates(zeros, zeros, radii, radii, zeros, radii, zeros, zeros)
    write_curve(tmp_path / "curve.png", certificates, epsilon_max, r"acert on $\nothing_{$ of mine")
    assert (tmp_path / "curve.png").is_file()
