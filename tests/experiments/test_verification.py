"""Verdicts on networks whose outputs are known exactly, and whole benchmark folders."""

import csv
import gzip
import re
from fractions import Fraction
from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch

from ibpcore import UserError
from ibpcore.attacks.counterexamples import counterexample_by_lines
from ibpcore.bounds.registry import BOUNDS
from ibpcore.experiments import instances as benchmark
from ibpcore.experiments import verification
from ibpcore.experiments.instances import COLUMNS, read_instances, verify_instances
from ibpcore.experiments.verification import VerificationOptions, verify
from ibpcore.interop.exporting.onnx import to_onnx
from ibpcore.nn import IntervalLinear, IntervalReLU, IntervalSigmoid
from ibpcore.nn.networks import Network


def linear(weight, bias):
    layer = IntervalLinear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


def saved(folder, *layers, inputs=1):
    """An ONNX file of these layers."""
    path = folder / "net.onnx"
    path.write_bytes(to_onnx(Network(layers, (inputs,)).eval()))
    return path


@pytest.fixture
def absolute(tmp_path):
    """Y_0 = |x|, Y_1 = x."""
    hidden = linear([[1.0], [-1.0]], [0.0, 0.0])
    return saved(tmp_path, hidden, IntervalReLU(), linear([[1.0, 1.0], [1.0, -1.0]], [0.0, 0.0]))


@pytest.fixture
def largest(tmp_path):
    """Y_0 = max(X_0, X_1) = relu(X_0 - X_1) + relu(X_1) - relu(-X_1), Y_1 = min(X_0, X_1)."""
    hidden = linear([[1.0, -1.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [-1.0, 0.0]], [0.0] * 5)
    top = linear([[1.0, 1.0, -1.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 1.0, -1.0]], [0.0, 0.0])
    return saved(tmp_path, hidden, IntervalReLU(), top, inputs=2)


def question(folder, assertions, inputs=1, outputs=2):
    path = folder / "question.vnnlib"
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{j}" for j in range(outputs)]
    path.write_text("".join(f"(declare-const {n} Real)\n" for n in names) + assertions)
    return path


def box(low, high, name="X_0"):
    return f"(assert (>= {name} {low})) (assert (<= {name} {high}))\n"


def answered(onnx, vnnlib, **options):
    return verify(onnx, vnnlib, VerificationOptions(**{"starts": 2, **options}))


UNIT = box(-1, 1)
TWO_BOXES = """(assert (or
    (and (>= X_0 0) (<= X_0 1) {})
    (and (>= X_0 -2) (<= X_0 -1) {})))
"""
BY_HAND = [
    (UNIT + "(assert (>= Y_0 1.001))", "unsat"),
    (UNIT + "(assert (>= Y_0 1))", "sat"),
    (UNIT + "(assert (>= Y_0 0.999))", "sat"),
    (UNIT + "(assert (<= Y_0 -0.001))", "unsat"),
    (UNIT + "(assert (<= Y_0 0))", "sat"),
    (UNIT + "(assert (<= Y_1 -1))", "sat"),
    (UNIT + "(assert (<= (* 3 Y_1) -3.001))", "unsat"),
    # |x| >= x everywhere, and |x| - x = 2 only at -1.
    (UNIT + "(assert (>= (- Y_0 Y_1) 2))", "sat"),
    (UNIT + "(assert (>= (- Y_0 Y_1) 2.001))", "unsat"),
    # A conjunction is refuted by one of its constraints, a disjunction only as a whole.
    (UNIT + "(assert (>= Y_0 1.001)) (assert (<= Y_1 5))", "unsat"),
    (UNIT + "(assert (or (>= Y_0 1.001) (<= Y_1 -1.001)))", "unsat"),
    (UNIT + "(assert (or (>= Y_0 1.001) (<= Y_1 -1)))", "sat"),
    (box(0.5, 1) + "(assert (and (<= Y_0 0.75) (>= Y_1 0.75)))", "sat"),
    # Boxes: only the second one reaches 2.
    (TWO_BOXES.format("", "") + "(assert (>= Y_0 2))", "sat"),
    (TWO_BOXES.format("", "") + "(assert (>= Y_0 2.01))", "unsat"),
    (TWO_BOXES.format("(>= Y_0 1.1)", "(<= Y_0 0.9)"), "unsat"),
    (TWO_BOXES.format("(>= Y_0 1.1)", "(<= Y_0 1)"), "sat"),
    (box(1, -1) + "(assert (>= Y_0 -5))", "unsat"),
    (box(0.25, 0.25) + "(assert (>= Y_0 0.25))", "sat"),
    (UNIT, "sat"),
]


@pytest.mark.parametrize(("assertions", "expected"), BY_HAND)
def test_verdicts_by_hand(absolute, tmp_path, assertions, expected):
    verdict = answered(absolute, question(tmp_path, assertions))
    assert verdict.result == expected, verdict
    assert (verdict.counterexample is not None) == (expected == "sat")


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [("1", "sat"), ("1.0000001", "unsat"), ("1.0000000000001", "unsat"), ("0.9999999", "sat")],
)
def test_thresholds_near_the_maximum(absolute, tmp_path, threshold, expected):
    """On [0, 1] the bounds are exact up to the rounding of float64."""
    path = question(tmp_path, box(0, 1) + f"(assert (>= Y_0 {threshold}))")
    assert answered(absolute, path).result == expected


@pytest.mark.parametrize("claim", ["float32", "unchecked"])
@pytest.mark.parametrize(("threshold", "expected"), [("1", "sat"), ("1.001", "unsat")])
def test_other_claims(absolute, tmp_path, threshold, expected, claim):
    path = question(tmp_path, UNIT + f"(assert (>= Y_0 {threshold}))")
    assert answered(absolute, path, claim=claim).result == expected


def test_a_float32_bound_that_rounding_spoils_is_not_unsat(absolute, tmp_path):
    """Of 1 + 1e-9 float32 makes 1 + 1.2e-7 upwards, and 1 downwards."""
    path = question(tmp_path, box(0, 1) + "(assert (>= Y_0 1.000000001))")
    assert answered(absolute, path, claim="unchecked").result == "unknown"


SQUARE = box(0, 1) + box(0, 1, "X_1")


@pytest.mark.parametrize(
    ("assertions", "expected"),
    [
        (SQUARE + "(assert (>= Y_0 1.501))", "unsat"),
        (SQUARE + "(assert (>= Y_0 1)) (assert (<= Y_1 0))", "sat"),
        (SQUARE + "(assert (>= Y_1 1)) (assert (<= Y_0 1))", "sat"),
        (SQUARE + "(assert (>= (+ Y_0 Y_1) 2.001))", "unsat"),
        (box(0, 1) + box(2, 3, "X_1") + "(assert (>= Y_1 Y_0))", "unsat"),
        (box(0, 2) + box(2, 3, "X_1") + "(assert (>= Y_1 Y_0))", "sat"),
    ],
)
def test_verdicts_in_two_dimensions(largest, tmp_path, assertions, expected):
    verdict = answered(largest, question(tmp_path, assertions, inputs=2))
    assert verdict.result == expected, verdict


def test_what_bounds_leave_open_and_no_attack_finds_is_unknown(largest, tmp_path):
    """max - min >= 0, but no bound of the registry sees that these are one function's values."""
    path = question(tmp_path, SQUARE + "(assert (<= (- Y_0 Y_1) -0.001))", inputs=2)
    verdict = answered(largest, path, bound="ibp")
    assert (verdict.result, verdict.reason) == ("unknown", "1 of 1 case open")


def test_no_float32_number_in_the_box(absolute, tmp_path):
    """A tenth is no float32 number: what float64 satisfies does not count."""
    path = question(tmp_path, box("0.1", "0.1") + "(assert (>= Y_0 0.1))")
    assert answered(absolute, path).result == "unknown"
    path = question(tmp_path, box("0", "0.1") + "(assert (>= Y_0 0.1))")
    assert answered(absolute, path).result == "unknown"
    path = question(tmp_path, box("0", "0.1") + "(assert (>= Y_0 0.09999999403953552))")
    assert answered(absolute, path).result == "sat"


def test_a_counterexample_is_replayed(largest, tmp_path):
    path = question(tmp_path, SQUARE + "(assert (>= (+ Y_0 Y_1) 1.9))", inputs=2)
    text = answered(largest, path).text()
    first, rest = text.split("\n", 1)
    assert first == "sat"
    assert re.fullmatch(r"\((\([XY]_\d+ -?[\d.]+\)\n?)+\)\n", rest)
    values = dict(re.findall(r"\((\w+) ([^\s)]+)\)", rest))
    assert [*values] == ["X_0", "X_1", "Y_0", "Y_1"]
    inputs = np.array([[values["X_0"], values["X_1"]]], dtype=np.float32)
    # All digits: the decimals are the float32 numbers themselves.
    assert [Fraction(float(x)) for x in inputs[0]] == [Fraction(values[f"X_{i}"]) for i in (0, 1)]
    session = onnxruntime.InferenceSession(largest)
    (outputs,) = session.run(None, {session.get_inputs()[0].name: inputs})
    assert [Fraction(float(y)) for y in outputs[0]] == [Fraction(values[f"Y_{j}"]) for j in (0, 1)]
    assert Fraction(values["Y_0"]) + Fraction(values["Y_1"]) >= Fraction("1.9")


@pytest.mark.parametrize("outputs", [[0.5, 0.0], [float("nan"), 0.0], [float("inf"), 0.0]])
def test_what_onnxruntime_does_not_confirm_is_not_sat(absolute, tmp_path, outputs):
    path = question(tmp_path, UNIT + "(assert (>= Y_0 0.75))")
    assert answered(absolute, path).result == "sat"
    with mock.patch.object(verification, "execution", return_value=lambda inputs: outputs):
        assert answered(absolute, path).result == "unknown"


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_rung_that_decides_is_named(absolute, tmp_path, bound):
    path = question(tmp_path, box(0.5, 1) + "(assert (>= Y_0 1.001))")
    verdict = answered(absolute, path, bound=bound)
    assert (verdict.result, verdict.reason) == ("unsat", "by ibp, claim: real")


def test_each_rung_sees_what_the_others_left_open(absolute, tmp_path):
    """IBP adds relu(x) and relu(-x), and gets 2 as the maximum of |x| on [-1, 1]."""
    path = question(tmp_path, UNIT + "(assert (or (>= Y_0 2.5) (>= Y_0 1.5)))")
    seen = []

    def watched(model, sound, cases, options, deadline):
        seen.append((options.bound, len(cases)))
        return refuted(model, sound, cases, options, deadline)

    refuted = verification.refuted
    with mock.patch.object(verification, "refuted", watched):
        assert answered(absolute, path).reason == "by crown-ibp, claim: real"
    assert seen == [("ibp", 2), ("crown-ibp", 1)]


def test_starts_on_a_plateau(tmp_path):
    """Y_0 = relu(sum of 64 inputs - 63.9): nearly everywhere its gradient is 0, its line is not."""
    hidden = linear([[1.0] * 64], [-63.9])
    onnx = saved(tmp_path, hidden, IntervalReLU(), linear([[1.0], [0.0]], [0.0, 0.0]), inputs=64)
    ends = "".join(box(0, 1, f"X_{i}") for i in range(64))
    path = question(tmp_path, ends + "(assert (>= Y_0 0.05))", inputs=64)
    problem = verification._problem(onnx, path, VerificationOptions(), torch.device("cpu"), 1e18)
    found = counterexample_by_lines(problem.search, problem.property.cases)
    assert found.inputs == [1.0] * 64


def test_many_cases(absolute, tmp_path):
    """More than fit into one group, and each with a box of its own."""
    parts = [f"(and (>= X_0 {i}) (<= X_0 {i + 1}) (>= Y_0 {i + 1.001}))" for i in range(100)]
    path = question(tmp_path, f"(assert (or {' '.join(parts)}))")
    assert answered(absolute, path).result == "unsat"
    parts[77] = "(and (>= X_0 77) (<= X_0 78) (>= Y_0 78))"
    verdict = answered(absolute, question(tmp_path, f"(assert (or {' '.join(parts)}))"))
    assert verdict.result == "sat"
    assert verdict.counterexample.inputs == [78.0]


def test_the_time_is_up(absolute, tmp_path):
    path = question(tmp_path, UNIT + "(assert (>= Y_0 1.001))")
    verdict = answered(absolute, path, timeout=1e-9)
    assert (verdict.result, verdict.reason) == ("timeout", "1 of 1 case open")


def test_packed_files(absolute, tmp_path):
    path = question(tmp_path, UNIT + "(assert (>= Y_0 1))")
    for plain in (absolute, path):
        plain.with_name(plain.name + ".gz").write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    verdict = answered(absolute.with_suffix(".onnx.gz"), path.with_suffix(".vnnlib.gz"))
    assert verdict.result == "sat"


def test_what_does_not_fit_is_refused(absolute, tmp_path):
    fits = question(tmp_path, UNIT + "(assert (>= Y_0 1))")
    for inputs, outputs in ((2, 2), (1, 3)):
        more = "".join(box(0, 1, f"X_{i}") for i in range(inputs))
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        path = question(other, more, inputs, outputs)
        with pytest.raises(
            UserError, match=f"{inputs} inputs? and {outputs} outputs, but .* 1 and 2"
        ):
            answered(absolute, path)
    with pytest.raises(UserError, match="is missing"):
        answered(absolute, tmp_path / "none")
    with pytest.raises(UserError, match="none: it is missing"):
        answered(tmp_path / "none", fits)
    (tmp_path / "bad.onnx").write_bytes(b"bad")
    with pytest.raises(UserError, match=r"bad\.onnx"):
        answered(tmp_path / "bad.onnx", fits)


def test_proofs_that_are_impossible_are_refused(absolute, tmp_path):
    digits = "(assert (<= (+ (* 0.1234567890123456789 Y_0) Y_1) -5))"
    path = question(tmp_path, UNIT + digits)
    with pytest.raises(UserError, match="too many digits for float64"):
        answered(absolute, path)
    assert answered(absolute, path, claim="unchecked").result == "unsat"
    curved = saved(tmp_path, IntervalSigmoid(), linear([[1.0], [2.0]], [0.0, 0.0]))
    path = question(tmp_path, UNIT + "(assert (>= Y_0 1.1))")
    with pytest.raises(UserError, match="no proof covers rounding in Sigmoid"):
        answered(curved, path)
    assert answered(curved, path, claim="unchecked").result == "unsat"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bound": "none"}, "is not one of"),
        ({"timeout": 0}, "timeout must be"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"timeout": float("inf")}, "timeout must be"),
        ({"timeout": "1"}, "timeout must be"),
        ({"seed": -1}, "seed must be"),
        ({"starts": -1}, "starts must be"),
        ({"seed": 0.5}, "seed must be"),
        ({"claim": "none"}, "claim 'none' is not one of"),
    ],
)
def test_options(options, says):
    with pytest.raises(UserError, match=says):
        VerificationOptions(**options)


# Benchmark folders


@pytest.fixture
def folder(absolute, tmp_path):
    """Three instances: unsat, sat and unknown."""
    for name, assertions in {
        "unsat": UNIT + "(assert (>= Y_0 2.5))",
        "sat": UNIT + "(assert (>= Y_0 1))",
        "unknown": UNIT + "(assert (>= Y_0 1.000000001))",
    }.items():
        question(tmp_path, assertions).rename(tmp_path / f"{name}.vnnlib")
    packed = tmp_path / "sat.vnnlib.gz"
    packed.write_bytes(gzip.compress((tmp_path / "sat.vnnlib").read_bytes()))
    (tmp_path / "sat.vnnlib").unlink()
    names = ("unsat", "sat", "unknown")
    rows = "\n".join(f"net.onnx, ./{name}.vnnlib,30.0" for name in names)
    (tmp_path / "instances.csv").write_text(rows + "\n\n")
    return tmp_path


OPTIONS = VerificationOptions(bound="ibp", starts=2)


def results(folder):
    with (folder / "results.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def run(folder, options=OPTIONS, **more):
    return verify_instances(folder / "instances.csv", folder / "results.csv", options, **more)


def test_a_benchmark(folder):
    rows = run(folder)
    assert rows == results(folder)
    assert [*rows[0]] == [*COLUMNS]
    assert [row["result"] for row in rows] == ["unsat", "sat", "unknown"]
    assert [row["onnx"] for row in rows] == ["net.onnx"] * 3
    assert rows[1]["vnnlib"] == "./sat.vnnlib"
    assert {(row["timeout"], row["bound"], row["claim"]) for row in rows} == {
        ("30.0", "ibp", "real")
    }
    assert rows[0]["reason"] == "by ibp, claim: real"
    assert benchmark.tally(rows) == ["1 unsat", "1 sat", "1 unknown"]


def test_a_benchmark_is_resumed(folder):
    before = run(folder)
    lines = (folder / "results.csv").read_text().splitlines(keepends=True)
    (folder / "results.csv").write_text("".join(lines[:2]))
    asked = []

    def watched(onnx, vnnlib, options, device):
        asked.append(vnnlib.name)
        return verify(onnx, vnnlib, options, device)

    with mock.patch.object(benchmark, "verify", watched):
        rows = run(folder)
        run(folder)
    assert asked == ["sat.vnnlib.gz", "unknown.vnnlib"]
    assert [row["result"] for row in rows] == [row["result"] for row in before]
    # Rows of other instances stay.
    (folder / "instances.csv").write_text("net.onnx,./unsat.vnnlib,30\n")
    assert run(folder) == rows[:1]
    (folder / "instances.csv").write_text("net.onnx,unsat.vnnlib,30\n")
    run(folder)
    assert len(results(folder)) == 4


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (VerificationOptions(bound="crown-ibp"), "bound changed"),
        (VerificationOptions(bound="ibp", claim="unchecked"), "claim changed"),
        (VerificationOptions(bound="ibp", timeout=7), "timeout changed"),
    ],
)
def test_other_settings_are_refused(folder, options, says):
    run(folder)
    before = (folder / "results.csv").read_bytes()
    with pytest.raises(UserError, match=says):
        run(folder, options)
    assert (folder / "results.csv").read_bytes() == before


def test_a_failure_does_not_stop_the_others(folder):
    (folder / "sat.vnnlib.gz").write_bytes(b"\x1f\x8bnothing")
    rows = run(folder)
    assert [row["result"] for row in rows] == ["unsat", "error", "unknown"]
    assert "sat.vnnlib.gz: it is damaged" in rows[1]["reason"]
    (folder / "sat.vnnlib.gz").unlink()
    question(folder, UNIT + "(assert (>= Y_0 1))").rename(folder / "sat.vnnlib")
    assert [row["result"] for row in run(folder)] == ["unsat", "sat", "unknown"]
    assert [row["result"] for row in results(folder)] == ["unsat", "sat", "unknown"]


def test_an_interruption_keeps_what_is_done(folder):
    def interrupted(onnx, vnnlib, options, device):
        if "unknown" in vnnlib.name:
            raise KeyboardInterrupt
        return verify(onnx, vnnlib, options, device)

    with mock.patch.object(benchmark, "verify", interrupted), pytest.raises(KeyboardInterrupt):
        run(folder)
    assert [row["result"] for row in results(folder)] == ["unsat", "sat"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no rows"),
        ("\n\n", "has no rows"),
        ("a,b\n", "row 1 is not"),
        ("a,b,c\n", "row 1 is not"),
        ("a,b,1\nonnx,vnnlib,timeout\n", "row 2 is not"),
        ("a,b,1,2\n", "row 1 is not"),
        ("a,b,0\n", "row 1 is not"),
        ("a,b,nan\n", "row 1 is not"),
        ("a,b,inf\n", "row 1 is not"),
        (",b,1\n", "row 1 is not"),
        ("a, ,1\n", "row 1 is not"),
        ("a,b,1\na,b,2\n", "row 2 repeats an instance"),
        ('a,"b,1\n', "not a CSV file"),
    ],
)
def test_damaged_instances(tmp_path, text, says):
    path = tmp_path / "instances.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_instances(path)


def test_repeated_instances_are_verified_once(folder):
    (folder / "instances.csv").write_text("net.onnx,unsat.vnnlib,30\n" * 2)
    assert len(run(folder)) == 1


@pytest.mark.parametrize("text", ["", "notes\n", "onnx,vnnlib\na,b\n"])
def test_another_file_is_not_overwritten(folder, text):
    (folder / "results.csv").write_text(text)
    with pytest.raises(UserError, match="it is not overwritten"):
        run(folder)
    assert (folder / "results.csv").read_text() == text


def test_progress(folder):
    told = []

    class Watch:
        def __init__(self, label, length):
            told.append((label, length))

        def __enter__(self):
            return lambda done, facts: told.append((done, facts))

        def __exit__(self, *_):
            pass

    run(folder, watch=Watch)
    assert told == [
        ("verifying", 3),
        (1, ["1 unsat"]),
        (2, ["1 unsat", "1 sat"]),
        (3, ["1 unsat", "1 sat", "1 unknown"]),
    ]
