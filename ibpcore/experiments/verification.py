"""Verification of a property of a network, as VNN-COMP asks for it: unsat, sat, or not known.

Attacks and bounds take turns, the cheapest first. A rung of the registry sees only the cases that
those below left open.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import torch

from ibpcore.attacks.counterexamples import (
    Counterexample,
    Search,
    counterexample,
    counterexample_by_lines,
)
from ibpcore.bounds.ladder import rungs
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS, bound_named
from ibpcore.certification.certificates import UNCHECKED
from ibpcore.certification.properties import Case, Property
from ibpcore.certification.refutation import refuted
from ibpcore.certification.soundness.network import CLAIMS, SoundNetwork, sound_network
from ibpcore.errors import UserError
from ibpcore.interop.execution import execution
from ibpcore.interop.importing.vnnlib import read_property
from ibpcore.interop.reading.onnx import from_onnx
from ibpcore.nn.networks import Classifier
from ibpcore.precision import full_precision
from ibpcore.wording import counted

RESULTS = UNSAT, SAT, UNKNOWN, TIMEOUT = "unsat", "sat", "unknown", "timeout"
OPTIMISED, INNER_STEPS = "alpha-crown", 40
STARTS_BETWEEN = 4
"""Starts of the attack before each rung."""


@dataclass(frozen=True)
class VerificationOptions:
    """How a property is verified.

    Attributes:
        bound: the last rung to climb, a name in `BOUNDS`.
        claim: "unchecked" for the result of float32 passes, or the claim to prove, a name in
            `ibpcore.certification.soundness.network.CLAIMS`.
        timeout: seconds after which no further rung or start of an attack begins; None for no
            limit.
        inner_slopes: whether optimised CROWN, if it is the last rung, has a second turn in which
            it searches for slopes of the inner layers, too.
        starts: random ones of the last attack, on each case that is still open.
        seed: of these.
    """

    bound: str = [*BOUNDS][-1]
    claim: str = "real"
    timeout: float | None = None
    inner_slopes: bool = True
    starts: int = 40
    seed: int = 0

    def __post_init__(self) -> None:
        bound_named(self.bound)
        if self.claim not in (claims := [UNCHECKED, *CLAIMS]):
            raise UserError(f"claim {self.claim!r} is not one of {', '.join(claims)}")
        limit = self.timeout
        if limit is not None and not (isinstance(limit, Real) and 0 < limit < math.inf):
            raise UserError(f"timeout must be seconds above 0, but is {limit!r}")
        if not isinstance(self.starts, Integral) or self.starts < 0:
            raise UserError(f"starts must be at least 0, but is {self.starts!r}")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be from 0 to 2**32 - 1, but is {self.seed!r}")

    @property
    def rungs(self) -> dict[str, BoundOptions]:
        """The bounds up to the last one to climb, the loosest first, by what reasons call them.

        Optimised CROWN may come twice, the second time with slopes of the inner layers.
        """
        found = {name: BoundOptions(name) for name in rungs(self.bound)}
        if self.bound == OPTIMISED and self.inner_slopes:
            inner = BoundOptions(OPTIMISED, inner_slopes=True, slope_steps=INNER_STEPS)
            found[f"{OPTIMISED} with inner slopes"] = inner
        return found


class Verdict(NamedTuple):
    """The answer for a property.

    Attributes:
        result: `UNSAT`, `SAT`, `UNKNOWN` or `TIMEOUT`.
        seconds: from the opening of the files.
        reason: what decided, or what was left open.
        counterexample: for `SAT`.
    """

    result: str
    seconds: float
    reason: str
    counterexample: Counterexample | None = None

    def text(self) -> str:
        """The lines that VNN-COMP expects: the result, and the counterexample."""
        found = self.counterexample
        return f"{self.result}\n" + ("" if found is None else found.text())


class Problem(NamedTuple):
    """A property of a network, and what decides it.

    Attributes:
        sound: the network's rules for the claim; None if nothing is to be proved.
        search: for counterexamples.
    """

    property: Property
    model: Classifier
    sound: SoundNetwork | None
    search: Search


def verify(
    onnx: Path, vnnlib: Path, options: VerificationOptions, device: torch.device | str = "cpu"
) -> Verdict:
    """Verifies the property in a VNN-LIB file of the network in an ONNX file.

    Args:
        onnx, vnnlib: files, which may be compressed by gzip.
        device: to compute bounds and attacks on; counterexamples are confirmed on the CPU.

    Raises:
        UserError: a file is missing, damaged or not supported, the two do not fit each other, no
            proof covers the network, or onnxruntime is missing.
        OSError: a file cannot be read.
    """
    start = time.monotonic()
    end = math.inf if options.timeout is None else start + options.timeout
    problem = _problem(onnx, vnnlib, options, torch.device(device), end)
    with full_precision():
        result, reason, found = _decided(problem, options)
    return Verdict(result, time.monotonic() - start, reason, found)


def _problem(
    onnx: Path, vnnlib: Path, options: VerificationOptions, device: torch.device, end: float
) -> Problem:
    question = read_property(vnnlib)
    model = from_onnx(onnx).eval().to(device)
    inputs, outputs = math.prod(model.in_shape), model.classes
    if (inputs, outputs) != (question.inputs, question.outputs):
        raise UserError(
            f"{vnnlib} is about {counted(question.inputs, 'input')} and"
            f" {counted(question.outputs, 'output')}, but {onnx} has {inputs} and {outputs}"
        )
    sound = None if options.claim == UNCHECKED else sound_network(model, options.claim)
    generator = torch.Generator(device).manual_seed(options.seed)
    search = Search(model, execution(onnx), generator, end)
    return Problem(question, model, sound, search)


Decision = tuple[str, str, Counterexample | None]
"""Result, reason and counterexample of a `Verdict`."""


def _decided(problem: Problem, options: VerificationOptions) -> Decision:
    open_cases, search = [*problem.property.cases], problem.search
    if not open_cases:
        return UNSAT, "no input satisfies the constraints on inputs", None
    for rung, bounds in options.rungs.items():
        found = counterexample(search, open_cases, STARTS_BETWEEN)
        if found is not None:
            return _satisfied(found)
        if time.monotonic() > search.deadline:
            return TIMEOUT, _still_open(open_cases, problem), None
        flags = refuted(problem.model, problem.sound, open_cases, bounds, search.deadline)
        open_cases = [case for case, done in zip(open_cases, flags, strict=True) if not done]
        if not open_cases:
            return UNSAT, f"by {rung}, claim: {options.claim}", None
    found = counterexample_by_lines(search, open_cases)
    found = found or counterexample(search, open_cases, options.starts)
    if found is not None:
        return _satisfied(found)
    return (
        TIMEOUT if time.monotonic() > search.deadline else UNKNOWN,
        _still_open(open_cases, problem),
        None,
    )


def _satisfied(found: Counterexample) -> Decision:
    return SAT, "by an attack, confirmed by onnxruntime", found


def _still_open(cases: Sequence[Case], problem: Problem) -> str:
    return f"{len(cases)} of {counted(len(problem.property.cases), 'case')} open"
