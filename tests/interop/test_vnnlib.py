"""VNN-LIB files are read exactly, or refused in one line that names the line of the file."""

import contextlib
import gzip
import random
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from ibpcore import UserError
from ibpcore.certification.properties import Box, Case, Constraint, as_type, rows_of
from ibpcore.interop.exporting.vnnlib import outer_box, property_text
from ibpcore.interop.importing.vnnlib import (
    DEEPEST,
    LARGEST_EXPONENT,
    property_of,
    read_property,
)

HEAD = "".join(f"(declare-const {name} Real)" for name in ("X_0", "X_1", "Y_0", "Y_1"))
SQUARE = "(assert (>= X_0 0)) (assert (<= X_0 1)) (assert (<= X_1 2.5)) (assert (>= X_1 -.5))"


def read(body, box=SQUARE):
    return property_of(f"{HEAD}\n{box}\n{body}")


def cases(body, box=SQUARE):
    """Each case as ((ends of X_0), (ends of X_1)) and constraints as ({output: a}, bound)."""
    return [
        (
            [*zip(map(float, case.box.lower), map(float, case.box.upper), strict=True)],
            [(dict(c.coefficients), c.bound) for c in case.constraints],
        )
        for case in read(body, box).cases
    ]


BOTH = [(0.0, 1.0), (-0.5, 2.5)]


@pytest.mark.parametrize(
    ("assertion", "expected"),
    [
        ("(assert (<= Y_0 3))", [[({0: 1}, 3)]]),
        ("(assert (>= Y_0 3))", [[({0: -1}, -3)]]),
        ("(assert (<= 3 Y_0))", [[({0: -1}, -3)]]),
        ("(assert (<= Y_0 Y_1))", [[({0: 1, 1: -1}, 0)]]),
        ("(assert (<= Y_0 Y_1)) (assert (>= Y_0 1))", [[({0: 1, 1: -1}, 0), ({0: -1}, -1)]]),
        ("(assert (and (<= Y_0 1) (<= Y_1 2)))", [[({0: 1}, 1), ({1: 1}, 2)]]),
        ("(assert (or (<= Y_0 1) (and (<= Y_1 2))))", [[({0: 1}, 1)], [({1: 1}, 2)]]),
        (
            "(assert (or (and (<= Y_0 1) (>= Y_1 2)) (and (>= Y_0 Y_1))))",
            [[({0: 1}, 1), ({1: -1}, -2)], [({0: -1, 1: 1}, 0)]],
        ),
        (
            "(assert (or (<= Y_0 1) (<= Y_1 1))) (assert (or (>= Y_0 0) (>= Y_1 0)))",
            [
                [({0: 1}, 1), ({0: -1}, 0)],
                [({0: 1}, 1), ({1: -1}, 0)],
                [({1: 1}, 1), ({0: -1}, 0)],
                [({1: 1}, 1), ({1: -1}, 0)],
            ],
        ),
        # 2 (Y_0 - Y_1) - 1 - Y_0 <= 0.5 + 1 - 3: Y_0 - 2 Y_1 <= -1/2
        (
            "(assert (<= (- (* 2 (- Y_0 Y_1)) 1 Y_0) (+ 0.5 1 (- 3))))",
            [[({0: 1, 1: -2}, Fraction(-1, 2))]],
        ),
        ("(assert (<= (* Y_0 -0.1 2) 1e-1))", [[({0: Fraction(-1, 5)}, Fraction(1, 10))]]),
        ("(assert (<= (+ Y_0 (* 0 Y_1)) 1))", [[({0: 1}, 1)]]),
        ("(assert (<= 0 1))", [[]]),
        ("(assert (<= 1 0))", []),
        ("(assert (or (<= 1 0) (<= Y_0 0)))", [[({0: 1}, 0)]]),
        ("", [[]]),
    ],
)
def test_constraints_by_hand(assertion, expected):
    assert cases(assertion) == [(BOTH, constraints) for constraints in expected]


def test_several_bounds_of_an_input_meet():
    more = "(assert (<= (* 2 X_0) 1.5)) (assert (>= X_0 -7)) (assert (<= (- X_1) 0.25))"
    assert cases(more) == [([(0.0, 0.75), (-0.25, 2.5)], [])]


def test_boxes_of_a_disjunction():
    boxes = """(assert (or
        (and (>= X_0 0) (<= X_0 1) (>= X_1 0) (<= X_1 1) (<= Y_0 0))
        (and (>= X_0 2) (<= X_0 3) (>= X_1 2) (<= X_1 3) (>= Y_0 1))
        (and (>= X_0 4) (<= X_0 3) (>= X_1 2) (<= X_1 3) (>= Y_0 1))))  ; the last one is empty"""
    unit, other = [(0.0, 1.0)] * 2, [(2.0, 3.0)] * 2
    assert cases(boxes, "") == [(unit, [({0: 1}, 0)]), (other, [({0: -1}, -1)])]


def test_cases_share_boxes():
    """As those of a robustness property do, and of ACAS Xu's property 6."""
    found = read("(assert (or (<= X_0 0.5) (>= X_0 0.75))) (assert (or (<= Y_0 0) (<= Y_1 0)))")
    ends = [(float(c.box.lower[0]), float(c.box.upper[0])) for c in found.cases]
    assert ends == [(0.0, 0.5), (0.0, 0.5), (0.75, 1.0), (0.75, 1.0)]
    assert len({case.box for case in found.cases}) == 2


def test_an_empty_box_satisfies_nothing():
    assert read("(assert (>= X_0 1.0000000000000000001))").cases == ()
    assert len(read("(assert (>= X_0 1))").cases) == 1


def test_decimals_are_exact():
    (case,) = read("(assert (<= Y_0 0.1)) (assert (<= X_0 0.30000000000000000001))").cases
    assert case.constraints[0].bound == Fraction(1, 10)
    assert case.box.upper[0] == Fraction(30000000000000000001, 10**20)


@pytest.mark.parametrize("text", ["1", "+1", "1.", "1.0", "1e0", "10E-1", "0.1e+1", "01"])
def test_forms_of_numbers(text):
    (case,) = read(f"(assert (<= Y_0 {text}))").cases
    assert case.constraints[0].bound == 1


def test_comments_and_lines():
    text = f"; (assert (<= Y_0 0))\r\n{HEAD};)\r{SQUARE}\n\t(assert;\n(<= ; )\nY_0\n1))"
    (case,) = property_of(text).cases
    assert case.constraints == (Constraint(((0, Fraction(1)),), Fraction(1)),)


REFUSED = [
    ("(assert (<= Y_0 1)", "line 3: a parenthesis is opened that is not closed"),
    ("(assert (<= Y_0 1)))", "line 3: a parenthesis is closed that was not opened"),
    ("assert", "line 3: 'assert' stands outside of parentheses"),
    ("(check-sat)", "line 3: neither (declare-const NAME Real) nor (assert ..)"),
    ("()", "line 3: neither"),
    ("((assert (<= Y_0 1)))", "line 3: neither"),
    ("(declare-const X_2 Int)", "line 3: neither"),
    ("(declare-const X_2 Real Real)", "line 3: neither"),
    ("(declare-fun X_2 () Real)", "line 3: neither"),
    ("(vnnlib-version <2.0>)", "VNN-LIB 2 is not read"),
    ("(declare-const X_0 Real)", "X_0 is declared twice"),
    ("(declare-const x_2 Real)", "not 'x_2'"),
    ("(declare-const X_02 Real)", "not 'X_02'"),
    ("(declare-const X_-1 Real)", "not 'X_-1'"),
    ("(declare-const Z Real)", "not 'Z'"),
    ("(declare-const X_3 Real)", "X_2 is not declared, but X_3 is"),
    ("(declare-const X_2 Real)", "X_2 has no lower bound"),
    ("(declare-const X_2 Real)(assert (>= X_2 1))", "X_2 has no upper bound"),
    ("(assert)", "neither"),
    ("(assert (<= Y_0 1) (<= Y_1 1))", "neither"),
    ("(assert Y_0)", "a constraint such as (<= Y_0 Y_1) is missing"),
    ("(assert true)", "a constraint such as"),
    ("(assert ())", "a constraint such as"),
    ("(assert (and))", "'and' is not"),
    ("(assert (or))", "'or' is not"),
    ("(assert (not (<= Y_0 1)))", "'not' is not"),
    ("(assert (=> (<= Y_0 1) (<= Y_1 1)))", "'=>' is not"),
    ("(assert (< Y_0 1))", "'<' is not"),
    ("(assert (= Y_0 1))", "'=' is not"),
    ("(assert (AND (<= Y_0 1)))", "'AND' is not"),
    ("(assert (<= Y_0))", "<= and >= compare two terms"),
    ("(assert (<= 0 Y_0 1))", "<= and >= compare two terms"),
    ("\n\n(assert (<= Y_2 1))", "line 5: Y_2 is not declared before"),
    ("(assert (<= Y_0 eps))", "'eps' is neither a number nor a variable"),
    ("(assert (<= Y_0 nan))", "'nan' is neither"),
    ("(assert (<= Y_0 inf))", "'inf' is neither"),
    ("(assert (<= Y_0 1/2))", "'1/2' is neither"),
    ("(assert (<= Y_0 1_0))", "'1_0' is neither"),
    ("(assert (<= Y_0 0x1))", "'0x1' is neither"),
    ("(assert (<= Y_0 \u0661))", "is neither"),
    ("(assert (<= Y_0\u00a01))", "<= and >= compare two terms"),
    ("(assert (<= Y_0 --1))", "'--1' is neither"),
    ("(assert (<= Y_0 .))", "'.' is neither"),
    ("(assert (<= Y_0 1e))", "'1e' is neither"),
    (f"(assert (<= Y_0 1e{LARGEST_EXPONENT + 1}))", "is too long"),
    ("(assert (<= Y_0 1e-999999999999))", "is too long"),
    (f"(assert (<= Y_0 {'1' * 900}))", "is too long"),
    ("(assert (<= (* Y_0 Y_1) 1))", "a product of variables is not linear"),
    ("(assert (<= (* 2 Y_0 Y_0) 1))", "a product of variables is not linear"),
    ("(assert (<= (/ Y_0 2) 1))", "not a number, a variable"),
    ("(assert (<= (+) 1))", "not a number, a variable"),
    ("(assert (<= (-) 1))", "not a number, a variable"),
    ("(assert (<= () 1))", "not a number, a variable"),
    ("(assert (<= (<= Y_0 1) 1))", "not a number, a variable"),
    ("(assert (<= (+ X_0 X_1) 1))", "a constraint on several inputs is not supported"),
    ("(assert (<= Y_0 X_1))", "a constraint on inputs and outputs is not supported"),
    ("(assert (or (<= Y_0 1) (<= X_0 Y_1)))", "a constraint on inputs and outputs"),
    (f"(assert {'(and ' * DEEPEST}(<= Y_0 1){')' * DEEPEST})", f"more than {DEEPEST} open"),
    ("(assert (or (<= Y_0 1) (<= Y_1 1)))" * 17, "more than 100000 alternatives"),
    (f"(assert (and {'(or (<= Y_0 1) (<= Y_1 1))' * 17}))", "line 3: more than 100000"),
]


@pytest.mark.parametrize(("body", "says"), REFUSED)
def test_what_is_not_understood_is_refused(body, says):
    with pytest.raises(UserError, match=re.escape(says)):
        read(body)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no variable X_0"),
        ("; nothing", "no variable X_0"),
        ("(declare-const X_0 Real)", "no variable Y_0"),
        ("(assert (<= X_0 1))(declare-const X_0 Real)", "X_0 is not declared before"),
        ("(" * 100_000, "open parentheses"),
        (")" * 100_000, "closed that was not opened"),
    ],
)
def test_whole_files_that_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        property_of(text)


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x85", "\u2028"])
def test_only_line_ends_end_a_comment(separator):
    (case,) = read(f"; {separator} (assert (<= Y_0 1))").cases
    assert case.constraints == ()


def test_files(tmp_path):
    text = f"{HEAD}{SQUARE}(assert (<= Y_0 1))".encode()
    plain, packed, hidden = (tmp_path / name for name in ("a.vnnlib", "a.vnnlib.gz", "b.vnnlib"))
    plain.write_bytes(text)
    packed.write_bytes(gzip.compress(text))
    hidden.write_bytes(gzip.compress(text))
    found = [read_property(path) for path in (plain, packed, hidden)]
    assert [f.cases[0].constraints[0].bound for f in found] == [1, 1, 1]
    for content, says in [
        (gzip.compress(text)[:-9], "cannot be unpacked"),
        (b"\x1f\x8b\x00" + text, "cannot be unpacked"),
        (b"\xff\xfe" + text, "a.vnnlib: it is not a text file"),
        (text + b")", "a.vnnlib: line 1: a parenthesis is closed"),
    ]:
        plain.write_bytes(content)
        with pytest.raises(UserError, match=says):
            read_property(plain)
    with pytest.raises(UserError, match="is missing, or not a file"):
        read_property(tmp_path / "c.vnnlib")
    with pytest.raises(UserError, match="is missing, or not a file"):
        read_property(tmp_path)


def test_what_is_exported_comes_back():
    image = torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(0))
    lower, upper = outer_box(image, 0.1, (0.0, 1.0))
    found = property_of(property_text(lower, upper, 1, 3, "a comment"))
    assert (found.inputs, found.outputs, len(found.cases)) == (6, 3, 2)
    box = found.cases[0].box
    assert all(case.box is box for case in found.cases)
    for i, (low, high) in enumerate(
        zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True)
    ):
        assert Fraction(low) - Fraction(1, 10**12) < box.lower[i] <= Fraction(low)
        assert Fraction(high) <= box.upper[i] < Fraction(high) + Fraction(1, 10**12)
    constraints = [dict(constraint.coefficients) for (_, (constraint,)) in found.cases]
    assert constraints == [{0: -1, 1: 1}, {2: -1, 1: 1}]


# Rounding


def box_of(*ends):
    lower, upper = zip(*((Fraction(a), Fraction(b)) for a, b in ends), strict=True)
    return Box(lower, upper)


def test_boxes_are_rounded_outwards_and_inwards():
    tenth = box_of(("0.1", "0.1"), ("0", "0.5"), ("-0.1", "0.30000000000000000000001"))
    double, single = np.float64(0.1), np.float32(0.1)  # both are above a tenth
    assert Fraction(float(single)) > Fraction(float(double)) > Fraction(1, 10)
    lower, upper = (end.tolist() for end in tenth.outer)
    assert lower == [np.nextafter(double, 0), 0.0, -double]
    assert upper == [double, 0.5, np.nextafter(0.3, 1)]
    lower, upper = (end.numpy() for end in tenth.inner)
    assert lower.dtype == upper.dtype == np.float32
    third = np.float32(0.3)  # above
    assert lower.tolist() == [single, 0.0, np.nextafter(-single, np.float32(0))]
    assert upper.tolist() == [
        np.nextafter(single, np.float32(0)),
        0.5,
        np.nextafter(third, np.float32(0)),
    ]


@pytest.mark.parametrize("towards", [torch.inf, -torch.inf])
def test_rounding_to_float32_by_an_oracle(towards):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double() / 3
    x = torch.cat(
        [x, x.float().double(), torch.tensor([1e-320, -1e-320, 1e39, -1e39], dtype=torch.float64)]
    )
    found = as_type(x, torch.float32, towards).double()
    beyond = found >= x if towards > 0 else found <= x
    assert beyond.all()
    # The next float32 in the other direction is on the other side.
    other = torch.nextafter(found.float(), torch.tensor(-towards)).double()
    assert (other < x if towards > 0 else other > x).all()


def test_rows_are_exact_and_thresholds_round_up():
    tenths = Constraint(((0, Fraction(1, 10)), (2, Fraction(-3, 10))), Fraction(1, 10))
    single = Constraint(((1, Fraction(-1, 3)),), Fraction(1, 7))
    box = box_of((0, 1))
    rows = rows_of([Case(box, (tenths, single)), Case(box, (single,)), Case(box, ())], 3)
    assert rows.exact
    # Multiplied by 5 and by 3: the largest number is in [1, 2).
    assert rows.weight.tolist() == [[0.5, 0.0, -1.5], [0.0, -1.0, 0.0]]
    assert rows.bound[0] == 0.5
    assert Fraction(rows.bound[1].item()) > Fraction(3, 7)
    assert np.nextafter(rows.bound[1].item(), 0) < Fraction(3, 7)
    assert rows.member.tolist() == [[True, True], [False, True], [False, False]]


def test_rows_with_too_many_digits_are_not_exact():
    long = Constraint(((0, Fraction("0.1234567890123456789")), (1, Fraction(1))), Fraction(0))
    assert not rows_of([Case(box_of((0, 1)), (long,))], 2).exact


def test_numbers_beyond_float64_are_refused():
    huge = Constraint(((0, Fraction(1)),), Fraction(10) ** 400)
    with pytest.raises(UserError, match="beyond the range of float64"):
        rows_of([Case(box_of((0, 1)), (huge,))], 1)


def test_cases_hold_exactly():
    case = Case(box_of(("0", "0.1")), (Constraint(((0, Fraction(1)),), Fraction(1, 10)),))
    below, above = float(np.nextafter(0.1, 0)), 0.1
    assert case.holds([below], [below])
    assert not case.holds([above], [below])
    assert not case.holds([below], [above])
    for broken in (float("nan"), float("inf"), -float("inf")):
        assert not case.holds([below], [broken])
        assert not case.holds([broken], [below])


# Random formulas


def random_term(draw, names, depth):
    """A linear term as text, and as a function of the values of the variables."""
    kind = draw.choice(["number", "name", "name", "+", "-", "*", "minus"] if depth else ["name"])
    if kind == "number":
        text = f"{draw.randint(-4, 4)}.{draw.randint(0, 9)}"
        return text, lambda values, number=Fraction(text): number
    if kind == "name":
        name = draw.choice(names)
        return name, lambda values: values[name]
    if kind == "*":
        text, inner = random_term(draw, names, depth - 1)
        factor = draw.choice(["2", "-0.5", "1e-1", "3"])
        return f"(* {factor} {text})", lambda values: Fraction(factor) * inner(values)
    parts = [random_term(draw, names, depth - 1) for _ in range(draw.randint(2, 3))]
    texts, inners = zip(*parts, strict=True)
    if kind == "minus":
        return f"(- {texts[0]})", lambda values: -inners[0](values)
    if kind == "+":
        return f"(+ {' '.join(texts)})", lambda values: sum(inner(values) for inner in inners)
    first, *others = inners
    return (
        f"(- {' '.join(texts)})",
        lambda values: first(values) - sum(other(values) for other in others),
    )


def random_formula(draw, depth):
    """A formula as text, and as a function of the values of the variables."""
    kind = draw.choice(["and", "or", "atom"]) if depth else "atom"
    if kind == "atom":
        # Of a single input, or of any outputs.
        names = draw.choice([["X_0"], ["X_1"], ["Y_0", "Y_1"], ["Y_0", "Y_1"]])
        (one, left), (other, right) = (random_term(draw, names, 2) for _ in range(2))
        if draw.random() < 0.5:
            return f"(<= {one} {other})", lambda values: left(values) <= right(values)
        return f"(>= {one} {other})", lambda values: left(values) >= right(values)
    parts = [random_formula(draw, depth - 1) for _ in range(draw.randint(1, 3))]
    texts, inners = zip(*parts, strict=True)
    every = all if kind == "and" else any
    return f"({kind} {' '.join(texts)})", lambda values: every(inner(values) for inner in inners)


@pytest.mark.parametrize("seed", range(60))
def test_cases_mean_what_the_formula_says(seed):
    """By an evaluation of the formula itself, at points of a grid on which much is equal."""
    draw = random.Random(seed)
    formulas = [random_formula(draw, draw.randint(0, 3)) for _ in range(draw.randint(1, 3))]
    found = read("\n".join(f"(assert {text})" for text, _ in formulas))
    for _ in range(60):
        x = [Fraction(draw.randint(-1, 3), 2), Fraction(draw.randint(-2, 6), 2)]
        y = [Fraction(draw.randint(-6, 6), 2) for _ in range(2)]
        values = {"X_0": x[0], "X_1": x[1], "Y_0": y[0], "Y_1": y[1]}
        inside = 0 <= x[0] <= 1 and Fraction(-1, 2) <= x[1] <= Fraction(5, 2)
        expected = inside and all(formula(values) for _, formula in formulas)
        numbers = [[*map(float, part)] for part in (x, y)]
        assert any(case.holds(*numbers) for case in found.cases) == expected


@pytest.mark.parametrize("seed", range(100))
def test_damaged_text_is_read_or_refused(seed):
    draw = random.Random(seed)
    body = "(assert (or (and (<= Y_0 1.5) (>= (* 2 Y_1) Y_0)) (<= (+ Y_0 (- Y_1)) 1e-1)))"
    text = f"{HEAD}\n{SQUARE}\n{body}"
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(text))
        end = start + draw.randint(0, 8)
        text = text[:start] + draw.choice(["", "(", ")", "0", " ", ";", "Y_1", text[start:end] * 2])
        text += f"{HEAD}\n{SQUARE}\n{body}"[end:]
    with contextlib.suppress(UserError):
        property_of(text)
