"""`ibp verify`: what it prints, its exit codes, and its files."""

import csv
import re

import pytest
import torch
from helpers import run_ibp, snapshot

from ibpcore.interop.exporting.onnx import to_onnx
from ibpcore.nn import IntervalLinear, IntervalReLU
from ibpcore.nn.networks import Network

DECLARED = "(declare-const X_0 Real)(declare-const Y_0 Real)(declare-const Y_1 Real)\n"
QUESTIONS = {
    "unsat": "(assert (>= Y_0 1.5))",
    "sat": "(assert (>= Y_0 1))",
    # Within the rounding of float32, in which nothing is proved here.
    "unknown": "(assert (>= Y_0 1.000000001))",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Y_0 = relu(x) and Y_1 = 0 for x in [0, 1], and a file for each of `QUESTIONS`."""
    hidden, top = IntervalLinear(1, 1), IntervalLinear(1, 2)
    with torch.no_grad():
        for parameter in (*hidden.parameters(), *top.parameters()):
            parameter.zero_()
        hidden.weight[0] = top.weight[0] = 1
    content = to_onnx(Network([hidden, IntervalReLU(), top], (1,)).eval())
    (tmp_path / "net.onnx").write_bytes(content)
    for name, assertion in QUESTIONS.items():
        box = "(assert (<= X_0 1)) (assert (>= X_0 0))\n"
        (tmp_path / f"{name}.vnnlib").write_text(DECLARED + box + assertion)
    rows = "".join(f"net.onnx,{name}.vnnlib,60\n" for name in QUESTIONS)
    (tmp_path / "instances.csv").write_text(rows)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FAST = ("--claim", "unchecked", "--device", "cpu", "--starts", 2)


def asked(name, *options):
    return run_ibp("verify", "net.onnx", f"{name}.vnnlib", *FAST, *options)


@pytest.mark.parametrize(("name", "code"), [("unsat", 0), ("sat", 10), ("unknown", 11)])
def test_results(folder, name, code):
    outcome = asked(name)
    assert (outcome.code, outcome.err) == (code, "")
    first, *between, last = outcome.out.splitlines()
    assert first == name
    assert re.fullmatch(r"; .*, \d+\.\d s", last)
    assert bool(between) == (name == "sat")


def test_timeout(folder):
    outcome = asked("unknown", "--timeout", 1e-9)
    assert outcome.code == 12
    assert outcome.out.startswith("timeout\n; 1 of 1 case open")


def test_a_counterexample_in_a_file(folder):
    outcome = asked("sat", "--counterexample", "found.txt")
    assert outcome.code == 10
    text = "sat\n((X_0 1)\n(Y_0 1)\n(Y_1 0))\n"
    assert (folder / "found.txt").read_text() == text
    assert outcome.out.startswith(text)
    assert asked("unsat", "--counterexample", "other.txt").code == 0
    assert not (folder / "other.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give ONNX and VNNLIB, or --instances FILE"),
        (("net.onnx",), "give ONNX and VNNLIB"),
        (("net.onnx", "sat.vnnlib", "--out", "x.csv"), "give ONNX and VNNLIB"),
        (("net.onnx", "sat.vnnlib", "--instances", "instances.csv"), "--instances takes neither"),
        (("--instances", "instances.csv", "--counterexample", "x"), "--instances takes neither"),
        (("net.onnx", "sat.vnnlib", "more"), "unexpected extra argument"),
        (("none.onnx", "sat.vnnlib"), "none.onnx: it is missing"),
        (("net.onnx", "none.vnnlib"), "none.vnnlib: it is missing"),
        (("sat.vnnlib", "sat.vnnlib"), "sat.vnnlib: it is no ONNX file"),
        (("net.onnx", "net.onnx"), "net.onnx: "),
        (("net.onnx", "instances.csv"), "instances.csv: line 1"),
        (("net.onnx", "sat.vnnlib", "--bound", "none"), "'--bound'"),
        (("net.onnx", "sat.vnnlib", "--claim", "none"), "'--claim'"),
        (("net.onnx", "sat.vnnlib", "--timeout", "0"), "'--timeout'"),
        (("net.onnx", "sat.vnnlib", "--timeout", "nan"), "--timeout"),
        (("net.onnx", "sat.vnnlib", "--timeout", "inf"), "--timeout must be"),
        (("net.onnx", "sat.vnnlib", "--seed", "-1"), "--seed must be"),
        (("net.onnx", "sat.vnnlib", "--starts", "-1"), "--starts must be"),
        (("net.onnx", "sat.vnnlib", "--threads", "0"), "'--threads'"),
        (("net.onnx", "sat.vnnlib", "--counterexample", "sat.vnnlib"), "already exists"),
        (("net.onnx", "sat.vnnlib", "--counterexample", "no/x"), "there is no folder no"),
        (("--instances", "none.csv"), "none.csv is missing"),
        (("--instances", "sat.vnnlib"), "row 1 is not"),
        (("--instances", "instances.csv", "--out", "sat.vnnlib"), "it is not overwritten"),
    ],
)
def test_bad_input(folder, arguments, says):
    before = snapshot(folder)
    outcome = run_ibp("verify", *arguments)
    assert outcome.code in (1, 2), outcome
    assert says in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert outcome.out == ""
    assert snapshot(folder) == before


def test_a_benchmark(folder):
    outcome = run_ibp("verify", "--instances", "instances.csv", *FAST, "--out", "new/table.csv")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("3 instances: 1 unsat, 1 sat, 1 unknown\n")
    assert outcome.out.endswith(" s together; the table is in new/table.csv\n")
    with (folder / "new" / "table.csv").open(newline="") as file:
        assert [row["result"] for row in csv.DictReader(file)] == [*QUESTIONS]
    again = run_ibp("verify", "--instances", "instances.csv", *FAST, "--out", "new/table.csv")
    assert again == outcome


def test_other_settings_of_a_benchmark_are_refused(folder):
    assert run_ibp("verify", "--instances", "instances.csv", *FAST).code == 0
    before = snapshot(folder)
    outcome = run_ibp("verify", "--instances", "instances.csv", *FAST, "--timeout", 30)
    assert outcome.code == 1
    assert "timeout changed since results.csv was written" in outcome.err
    assert snapshot(folder) == before


def test_failures_in_a_benchmark(folder):
    (folder / "sat.vnnlib").unlink()
    outcome = run_ibp("verify", "--instances", "instances.csv", *FAST)
    assert outcome.code == 1
    assert outcome.out.startswith("3 instances: 1 unsat, 1 unknown, 1 error\n")
    assert "1 of 3 instances failed, the first with: sat.vnnlib: it is missing" in outcome.err
    assert len(outcome.err.splitlines()) == 1
