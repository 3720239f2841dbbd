"""Journals that are torn, damaged, of other work, of another format, or replaced while in use."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from helpers import run_ibp, snapshot

from benchmarks.reliability.faults import differing
from ibpcore import UserError, load_model, save_model
from ibpcore.certification import certify as certification
from ibpcore.certification.certificates import KINDS, recorded
from ibpcore.distributed import Ranks
from ibpcore.experiments import test_set
from ibpcore.io import journal as journals
from ibpcore.io.files import write_atomic
from ibpcore.io.journal import Journal
from ibpcore.io.locks import LOCK, held
from ibpcore.nn.checkpoint import read_facts
from ibpcore.training import loop as training

SETTINGS = {"weights": "c0ffee", "epsilon_max": 0.1}
OTHERS = {"weights": "decaf", "epsilon_max": 0.1}
PARTS = [[0.1], {"radius": [0.2, float("inf")]}, "three"]
TINY = ("--epochs", 2, "--limit-train", 64, "--limit-test", 300, "--width", 2, "--hidden", 8)
TINY = (*TINY, "--device", "cpu")


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(test_set, "figures_possible", lambda: False)


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "run"
    assert run_ibp("train", *TINY, "--out", folder)[::2] == (0, "")
    return folder


@pytest.fixture
def path(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "x.journal"


def write(path, parts=PARTS, settings=SETTINGS):
    """Makes a journal of these parts, and returns its lines."""
    with Journal(path, settings) as journal:
        for part in parts:
            journal.append(part)
    return path.read_bytes().splitlines(keepends=True)


def read(path, settings=SETTINGS):
    with Journal(path, settings) as journal:
        return journal.parts


def refused(path, says, settings=SETTINGS):
    """In one line, and no file has changed."""
    before = snapshot(path.parent)
    with pytest.raises(UserError, match=says):
        read(path, settings)
    assert snapshot(path.parent) == before


def refused_once(path, intact, settings=SETTINGS):
    """In one line; the damaged file is kept, and the next time the intact parts are read."""
    before = snapshot(path.parent)
    with pytest.raises(UserError, match=f"go on from the intact parts, {len(intact)}") as refusal:
        read(path, settings)
    (new,) = snapshot(path.parent).keys() - before.keys()
    assert (path.parent / new).read_bytes() == before[path.name]
    assert str(refusal.value).startswith(f"{path} was damaged, and is kept as {path.parent / new}")
    assert read(path, settings) == intact


# Damage


def test_a_torn_line_is_left_out(path):
    lines = write(path)
    whole = b"".join(lines)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        done = max(0, whole[:length].count(b"\n") - 1)
        assert read(path) == PARTS[:done]
        write(path, PARTS[done:])
        assert path.read_bytes() == whole
    assert [file.name for file in path.parent.iterdir()] == ["x.journal"]


def test_every_flipped_bit_is_noticed(path):
    """Each costs at most the lines that it lies in and joins, and no other part is taken."""
    whole = b"".join(write(path))
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError, match="was damaged, and is kept as"):
            read(path)
        kept = path.with_name("x.journal.damaged")
        assert kept.read_bytes() == content
        kept.unlink()
        parts = read(path)
        assert all(part in PARTS for part in parts)
        assert len(parts) >= len(PARTS) - 2


@pytest.mark.parametrize(
    ("number", "intact"), [(0, PARTS), (1, PARTS[1:]), (2, PARTS[::2]), (3, PARTS[:2])]
)
def test_damage_costs_its_own_line(path, number, intact):
    lines = write(path)
    lines[number] = lines[number].replace(b'"', b"'").replace(b"[", b"(")
    path.write_bytes(b"".join(lines))
    refused_once(path, intact)


def test_damaged_journals_do_not_replace_each_other(path):
    for kept in ("x.journal.damaged", "x.journal.damaged-2", "x.journal.damaged-3"):
        path.write_bytes(b"no journal " + kept.encode() + b"\n")
        refused_once(path, [])
        assert (path.parent / kept).read_bytes() == b"no journal " + kept.encode() + b"\n"


@pytest.mark.parametrize("ending", [b"\x0b", b"\n\n", b"\n[]\n", b"\0\0"])
def test_what_no_kill_leaves_is_damage(path, ending):
    """The line break changed, or followed by what is no line."""
    whole = b"".join(write(path))
    path.write_bytes(whole[:-1] + ending)
    intact = PARTS if ending[:1] == b"\n" else PARTS[:-1]
    refused_once(path, intact)


# Other work


def test_a_journal_of_other_settings_is_refused(path):
    write(path, settings={"a": 1, "b": 0.1})
    for settings, names in (
        ({"a": 2, "b": 0.1}, "a"),
        ({"a": 1}, "b"),
        ({"a": 1, "b": 0.1, "c": 1}, "c"),
    ):
        refused(path, f"^{names} changed since .*journal was written: delete it", settings)
    assert read(path, {"b": 0.1, "a": 1}) == PARTS


def test_lines_of_other_work_are_never_read(path):
    """Appended by another process, or below settings that are damaged."""
    lines, foreign = write(path), path.with_name("y.journal")
    others = write(foreign, ["of another model"], OTHERS)
    path.write_bytes(b"".join([*lines, others[1]]))
    refused_once(path, PARTS)
    path.write_bytes(b"".join([lines[0].replace(b"0.1", b"0.2"), others[1]]))
    refused_once(path, [])


def test_a_journal_of_the_former_format_is_refused(path):
    """Whose checksums are of the line alone."""
    values = [json.dumps(value).encode() + b"\n" for value in (SETTINGS, [1])]
    path.write_bytes(b"".join(b"%08x " % zlib.crc32(text) + text for text in values))
    refused(path, r"^.*x\.journal was written by an earlier version of ibpcore.*: delete it")


# Names


COPIES = ("x.backup.journal", "x.1a.journal", "x.01.journal", "x.-1.journal", "x.1.journal.old")
COPIES = (*COPIES, "x.²3.journal", "x..journal", "xx.1.journal")


def test_only_files_of_ranks_are_read_and_removed(path):
    """And of those, none that appears later."""
    for name in COPIES:
        (path.parent / name).write_text("mine")
    write(path.with_name("x.12.journal"), ["twelve"])
    with Journal(path, SETTINGS, Ranks(0, 1)) as journal:
        assert journal.parts == ["twelve"]
        (path.parent / "x.7.journal").write_text("later")
        journal.remove()
    left = {name: content.decode() for name, content in snapshot(path.parent).items()}
    assert left == {**dict.fromkeys(COPIES, "mine"), "x.7.journal": "later"}


def test_a_copy_of_a_journal_outlives_the_work(good_run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(certification, "find_radii", stopping(3))
        assert run_ibp("certify", good_run, "--out", "out").code == 130
    copy = shutil.copy("out/certificates.journal", "out/certificates.backup.journal")
    content = Path(copy).read_bytes()
    assert run_ibp("certify", "--resume", "out").code == 0
    assert Path(copy).read_bytes() == content
    assert not Path("out/certificates.journal").exists()


def stopping(number, before=certification.find_radii):
    """`find_radii`, interrupted in that batch."""
    batches = []

    def find_radii(*given, **more):
        batches.append(1)
        if len(batches) == number:
            raise KeyboardInterrupt
        return before(*given, **more)

    return find_radii


def test_journals_of_other_ranks_are_read(path):
    """Torn ones are repaired, those of other settings refused, all removed in the end."""
    second = path.with_name("x.1.journal")
    write(second, ["one", "two"])
    second.write_bytes(second.read_bytes()[:-1])
    write(path, ["zero"])
    assert read(path) == ["zero", "one"]
    write(path, ["three"])
    assert read(path) == ["zero", "three", "one"]
    assert read(second) == ["one"]
    refused(path, r"weights changed since .*x\.journal was written", OTHERS)
    path.unlink()
    with pytest.raises(UserError, match=r"weights changed since .*x\.1\.journal was written"):
        read(path, OTHERS)
    path.unlink()
    with Journal(path, SETTINGS) as journal:
        journal.remove()
    assert list(path.parent.iterdir()) == []


def test_damage_in_the_journal_of_another_rank(path):
    write(path, ["zero"])
    second = path.with_name("x.1.journal")
    lines = write(second, ["one", "two"])
    second.write_bytes(b"".join([lines[0], lines[1].replace(b"one", b"own"), lines[2]]))
    with pytest.raises(
        UserError, match=rf"^{second} was damaged, and is kept as {second}\.damaged"
    ):
        read(path)
    assert read(path) == ["zero", "two"]


def test_ranks_of_other_settings_are_refused(path, monkeypatch):
    monkeypatch.setattr(journals, "broadcast_object", lambda ranks, value: OTHERS)
    with pytest.raises(UserError, match="rank 1 has other weights, images or settings than rank 0"):
        Journal(path, SETTINGS, Ranks(1, 2))
    assert list(path.parent.iterdir()) == []


# Files and folders that are replaced while they are in use


REPLACED = {
    "removed": Path.unlink,
    "a new file": lambda path: (path.unlink(), write(path, ["of B"], OTHERS)),
    "the same bytes in a new file": lambda path: write_atomic(path, path.read_bytes()),
    "appended to": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "cut": lambda path: os.truncate(path, 5),
    "no folder": lambda path: shutil.rmtree(path.parent),
    "a file for a folder": lambda path: (shutil.rmtree(path.parent), path.parent.write_text("")),
}


@pytest.mark.parametrize("case", REPLACED)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_journal_that_is_replaced_is_not_written(path, monkeypatch, case, rank):
    """Neither appended to, nor made again, nor removed."""
    monkeypatch.setattr(journals, "broadcast_object", lambda ranks, value: value)
    monkeypatch.setattr(journals, "run_on_rank_zero", lambda ranks, work: work())
    own = path.with_name("x.1.journal") if rank else path
    with Journal(path, SETTINGS, Ranks(rank, 2)) as journal:
        journal.append("one")
        REPLACED[case](own)
        before = snapshot(path.parent.parent)
        for use in (lambda: journal.append("two"), journal.remove):
            with pytest.raises(UserError, match=rf"^{own} was removed, replaced or changed"):
                use()
            assert snapshot(path.parent.parent) == before
        assert journal.parts == ["one"]


def test_a_failed_append_is_not_followed_by_another(path, monkeypatch):
    """The next line would continue the torn one."""
    with Journal(path, SETTINGS) as journal:
        journal.append("one")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda handle: tear(path))
            with pytest.raises(OSError, match="no room"):
                journal.append("two")
        with pytest.raises(UserError, match="was removed, replaced or changed"):
            journal.append("three")
    assert read(path) == ["one"]


def tear(path):
    os.truncate(path, path.stat().st_size - 3)
    raise OSError(28, "no room")


@contextlib.contextmanager
def taken_over(folder):
    """Another process has made the folder anew, holds it, and has written a file in it."""
    pytest.importorskip("fcntl")
    shutil.rmtree(folder)
    folder.mkdir()
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX);"
        " print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, str(folder / LOCK)], **pipes) as process:
        process.stdout.readline()
        (folder / "of B").write_text("B")
        try:
            yield
        finally:
            process.kill()


def test_a_lock_that_is_lost(tmp_path):
    """Nothing more is written, and the lock of the other process is left alone."""
    folder = tmp_path / "a" / "folder"
    with contextlib.ExitStack() as stack:
        with held(folder):
            write_atomic(folder / "file", b"A")
            stack.enter_context(taken_over(folder))
            before = snapshot(tmp_path)
            (folder / "inner").mkdir()
            for path in (folder / "file", folder / "inner" / "file", Path("a/folder/file")):
                with pytest.raises(UserError, match=f"^{path} was not written: its folder or"):
                    write_atomic(path, b"A")
            (folder / "inner").rmdir()
            write_atomic(tmp_path / "file", b"elsewhere")
        assert snapshot(tmp_path) == {**before, "file": b"elsewhere"}
        with pytest.raises(UserError, match="another process is at work"), held(folder):
            pass


def test_a_lock_file_that_is_removed_alone(path):
    """Another process may have the same journal open."""
    pytest.importorskip("fcntl")
    with held(path.parent), Journal(path, SETTINGS) as journal:
        journal.append("one")
        (path.parent / LOCK).unlink()
        with pytest.raises(UserError, match=rf"^{path} was not written: its folder or the lock"):
            journal.append("two")
    assert read(path) == ["one"]


def another_model(run, out):
    """The run with a model that classifies otherwise."""
    shutil.copytree(run, out)
    model, facts = load_model(run / "model.safetensors"), read_facts(run / "model.safetensors")
    with torch.no_grad():
        model[-1].weight.neg_()
    save_model(model, out / "model.safetensors", **facts)
    return out


DIES_IN_BATCH_2 = """
import os, sys
from unittest import mock
from ibpcore.certification import certify
from ibpcore_cli.main import main

def find_radii(*given, before=certify.find_radii, batches=[], **more):
    batches.append(1)
    if len(batches) == 2:
        os._exit(9)
    return before(*given, **more)

mock.patch.object(certify, "find_radii", find_radii).start()
main()
"""


def test_two_models_in_one_folder(good_run, tmp_path, monkeypatch):
    """A is at work in `out` when that is removed and B begins there; B is killed and resumed."""
    model = another_model(good_run, tmp_path / "b")
    assert run_ibp("certify", model, "--out", "whole").code == 0
    command = [sys.executable, "-c", DIES_IN_BATCH_2, "certify", str(model), "--out", "out"]
    batches, before, made_by_b = [], certification.find_radii, {}

    def find_radii(*given, **more):
        batches.append(1)
        if len(batches) == 2:
            shutil.rmtree("out")
            assert subprocess.run(command, check=False).returncode == 9
            made_by_b.update(snapshot(Path("out")))
        return before(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(certification, "find_radii", find_radii)
        code, _, err = run_ibp("certify", good_run, "--out", "out")
    assert code == 1
    assert err.startswith("Error: out/certificates.journal was not written: its folder")
    assert err.count("\n") == 1
    assert made_by_b.keys() == {".lock", "certify.json", "certificates.journal"}
    assert snapshot(Path("out")) == made_by_b
    assert run_ibp("certify", "--resume", "out").code == 0
    assert differing(Path("whole"), Path("out")) == []


@pytest.mark.parametrize(
    ("command", "module", "name", "file"),
    [
        ("certify", test_set, "summarize", "certificates.csv"),
        ("train", training, "run_epoch", "resume.pt"),
        ("train", test_set, "summarize", "certificates.csv"),
    ],
)
def test_a_folder_that_is_taken_over(good_run, monkeypatch, command, module, name, file):
    """While it is written to: the files of the other process stay as they are."""
    before = getattr(module, name)
    with contextlib.ExitStack() as stack:

        def takes(*given, **more):
            if not Path("out/of B").exists():
                stack.enter_context(taken_over(Path("out")))
            return before(*given, **more)

        monkeypatch.setattr(module, name, takes)
        given = (good_run,) if command == "certify" else TINY
        code, _, err = run_ibp(command, *given, "--out", "out")
        assert code == 1
        assert err.startswith(f"Error: out/{file} was not written: its folder or the lock in it")
        assert err.count("\n") == 1
        assert snapshot(Path("out")) == {LOCK: b"", "of B": b"B"}


# Values


GOOD = {
    **{"batch": 1, "label": [1, 2], "prediction": [1, 0], "radius": [0.02, 0.0]},
    **{"upper": [0.04, 0.0], "status": [2, 0], "unchecked": [0.03, 0.0], "evaluations": [7, 0]},
    "rung": [0, -1],
}
"""Certificates of two images: one is certified, the other is misclassified."""
ENDS = ("radius", "upper", "unchecked")


def recorded_by(path, part, dtype=torch.float32):
    """What a journal with this part holds, of labels and settings that fit `GOOD`."""
    labels = {0: torch.tensor([0, 0, 0]), 1: torch.tensor([1, 2])}
    write(path, [part])
    with Journal(path, SETTINGS) as journal:
        return recorded(journal, labels, 3, 0.1, dtype)


def changed(row, names, value):
    """`GOOD` with another value in some columns of a row."""
    names = (names,) if isinstance(names, str) else names
    return GOOD | {name: [*GOOD[name][:row], value, *GOOD[name][row + 1 :]] for name in names}


inf, nan = float("inf"), float("nan")
IMPOSSIBLE = {
    **{f"{name} {x}": changed(0, name, x) for name in ENDS for x in (-1.0, inf, -inf, nan, 0.11)},
    **{f"{x} for a number": changed(0, "radius", x) for x in ("0.02", 0, True, None, [0.02])},
    **{f"all ends {x}": changed(0, ENDS, x) for x in (0.1001, 0.10000001, inf, nan)},
    "radius above upper": changed(0, "radius", 0.05) | {"unchecked": [0.05, 0.0]},
    "radius above unchecked": changed(0, "radius", 0.035),
    "radius of a misclassified image": changed(1, "radius", 0.02),
    "radii of a misclassified image": changed(1, ENDS, 0.02),
    "certified but misclassified": changed(1, ENDS, 0.02) | {"status": [2, 2]},
    "zero, certified but misclassified": changed(1, "status", 2),
    "certified as another class": changed(0, "prediction", 0),
    "unchecked though misclassified": changed(1, "unchecked", 0.02),
    **{f"status {x}": changed(0, "status", x) for x in (0, 1, 4, 5, 6, 77, -1, 2.0, True, "2")},
    **{f"prediction {x}": changed(1, "prediction", x) for x in (3, -1, 2**70, 0.0, False, None)},
    **{f"label {x}": changed(1, "label", x) for x in (0, 3, -1, 2.0)},
    **{f"evaluations {x}": changed(0, "evaluations", x) for x in (-1, 1.5, True, 2**63)},
    **{f"rung {x}": changed(0, "rung", x) for x in (-1, -2, 99, 0.0, True, "ibp")},
    **{f"batch {x!r}": GOOD | {"batch": x} for x in (0, 2, -1, True, 1.0, "1", None, [1], {})},
    **{f"a row less of {name}": GOOD | {name: [GOOD[name][0]]} for name in KINDS},
    **{f"no {name}": {n: x for n, x in GOOD.items() if n != name} for name in GOOD},
    **{f"{name} in a table": GOOD | {name: [GOOD[name]]} for name in KINDS},
    **{f"{x} for a column": GOOD | {"radius": x} for x in (0.02, None, "ab", {}, [])},
    **{f"{x!r} for a part": x for x in (5, None, "x", [], {}, [[1]])},
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_values_are_refused(path, case):
    """Though their line has the right digest."""
    with pytest.raises(UserError, match=r"^.*x\.journal is damaged, .*: delete it, .* start over$"):
        recorded_by(path, IMPOSSIBLE[case])


UNPROVED = {"status": [5, 0], "radius": [0.0, 0.0], "upper": [0.0, 0.0]}
FULL = {name: [0.10000000149011612, 0.0] for name in ENDS} | {"status": [1, 0]}
"""epsilon_max itself is no float32, and the next one above it is certified."""


@pytest.mark.parametrize(
    "values",
    [
        *({}, UNPROVED, FULL, {"status": [3, 4]}, {"radius": [0.0, 0.0]}),
        {"prediction": [1, 2]},  # a tie is misclassified
    ],
)
def test_possible_values_are_taken(path, values):
    found = recorded_by(path, GOOD | values)[1]
    for name, column in found._asdict().items():
        assert column.tolist() == (GOOD | values)[name]
        assert column.dtype == (torch.float64 if name in ENDS else torch.int64)


def test_the_ceiling_depends_on_the_type_of_the_images(path):
    with pytest.raises(UserError, match="is damaged, it holds no certificates"):
        recorded_by(path, GOOD | FULL, torch.float64)


@pytest.mark.parametrize("change", [{"status": 77}, {"radius": -1.0}, {"prediction": 10}])
def test_impossible_values_end_the_command(good_run, monkeypatch, change):
    with monkeypatch.context() as patch:
        patch.setattr(certification, "find_radii", stopping(2))
        assert run_ibp("certify", good_run, "--out", "out").code == 130
    summary = json.loads((good_run / "summary.json").read_text())
    path, settings = Path("out/certificates.journal"), journal_settings(good_run, summary)
    (part,) = read(path, settings)
    path.unlink()
    for name, value in change.items():
        part[name][0] = value
    write(path, [part], settings)
    before = snapshot(Path("out"))
    code, _, err = run_ibp("certify", "--resume", "out")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("Error: out/certificates.journal is damaged, it holds no certificates")
    assert snapshot(Path("out")) == before


def journal_settings(run, summary):
    facts = ("samples", "accuracy", "acr", "art", "certified_accuracy", "dataset", "method")
    facts += (
        "weights_of_epoch",
        "certified_by",
        "open",
        "bound_passes_per_sample",
        "shrunk_by_proof",
        "lost_by_proof",
        "epochs",
        "model",
    )
    return {n: x for n, x in summary.items() if n not in (*facts, "training_seconds")}


# Complete certificates


def in_summary(**values):
    def change(folder):
        path = folder / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def in_table(old, new):
    def change(folder):
        path = folder / "certificates.csv"
        before = path.read_text()
        path.write_text(before.replace(old, new, 1))
        assert path.read_text() != before

    return change


NO_SUMMARY = "summary.json is damaged: it is not a summary"
NO_TABLE = "certificates.csv is damaged: it holds no certificates"
DAMAGED = {
    **{
        f"{name} {x}": (in_summary(**{name: x}), NO_SUMMARY)
        for name in ("accuracy", "acr", "art")
        for x in ("0.5", None, True, -0.1, 1.1, nan, inf, [0.5])
    },
    **{
        f"certified {x}": (in_summary(certified_accuracy=x), NO_SUMMARY)
        for x in (None, [0.5], 0.5, {"0.1": "x"}, {"0.1": 2}, {"0.1": nan})
    },
    "another ACR": (in_summary(acr=0.9), "its radii are not those of the summary"),
    "another method": (in_summary(method=None), "method changed since"),
    "another data set": (in_summary(dataset="MNIST"), "dataset changed since"),
    "another count": (in_summary(samples=299), "samples changed since"),
    "another claim": (in_summary(claim="float32"), "claim changed since"),
    "an unknown status": (in_table("misclassified", "misclassifjed"), NO_TABLE),
    "an unknown claim": (in_table("real", "reel"), NO_TABLE),
    "a radius of a misclassified image": (in_table(",0.0,0.0,", ",0.01,0.01,"), NO_TABLE),
    "another index": (in_table("\n5,", "\n6,"), NO_TABLE),
    "no columns": (in_table("radius", "radios"), NO_TABLE),
    "a row less": (
        lambda folder: os.truncate(folder / "certificates.csv", 300),
        "certificates.csv is damaged",
    ),
}


@pytest.fixture(scope="module")
def complete(good_run):
    out = good_run.parent / "complete"
    assert run_ibp("certify", good_run, "--out", out, "--device", "cpu").code == 0
    return out


@pytest.mark.parametrize("case", DAMAGED)
def test_complete_certificates_are_not_believed(complete, case):
    damage, says = DAMAGED[case]
    shutil.copytree(complete, "out")
    damage(Path("out"))
    before = snapshot(Path("out"))
    code, out, err = run_ibp("certify", "--resume", "out", "--html", "page.html")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert says in err
    assert snapshot(Path("out")) == before
    assert not Path("page.html").exists()


def test_a_table_of_other_images_or_classes(complete):
    """Labels that are not those of the images, and predictions that name no class."""
    lines = (complete / "certificates.csv").read_text().splitlines(keepends=True)
    wrong = next(i for i, line in enumerate(lines) if "misclassified" in line)
    index, label, _, *rest = lines[wrong].split(",")
    shutil.copytree(complete, "out")
    for cells, says in (
        ((index, str((int(label) + 1) % 10), label), "its labels are not those of the images"),
        ((index, label, "10"), NO_TABLE),
        ((index, label, "-1"), NO_TABLE),
    ):
        other = [*lines[:wrong], ",".join([*cells, *rest]), *lines[wrong + 1 :]]
        Path("out/certificates.csv").write_text("".join(other))
        code, _, err = run_ibp("certify", "--resume", "out")
        assert (code, err.count("\n")) == (1, 1)
        assert says in err
