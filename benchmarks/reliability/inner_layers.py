"""Intervals of inner layers that linear bounds narrowed, and what layers really read.

Claim: every number that a nonlinear layer reads lies in its interval, and no f_i - f_y exceeds its
bound: in rational arithmetic for the claim `real`, in adversarial float32 executions for
`float32`; with the slopes of CROWN and with random ones. At scale 1 there are 600 networks of all
layers, with 6 images each, at corners of the ball that raise or lower some number; on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.reliability import exact, networks
from benchmarks.reliability.execution import EXECUTED, UNITS, Unit, execute
from benchmarks.reliability.networks import picker
from benchmarks.reliability.rows import Row
from benchmarks.reliability.worst_cases import float32_near
from ibpcore import Interval
from ibpcore.bounds.alpha_crown import MARGINS
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.soundness.arithmetic import ball
from ibpcore.certification.soundness.linear import Slopes
from ibpcore.certification.soundness.margins import sound_upper
from ibpcore.certification.soundness.narrowing import narrowing
from ibpcore.certification.soundness.network import CLAIMS, sound_network
from ibpcore.certification.soundness.visits import Narrow, Visit, flat
from ibpcore.certification.soundness.visits import run as run_rules
from ibpcore.nn import (
    IntervalAbs,
    IntervalConcat,
    IntervalConv2d,
    IntervalFlatten,
    IntervalHardsigmoid,
    IntervalHardswish,
    IntervalHardtanh,
    IntervalLayer,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalMaximum,
    IntervalMaxPool2d,
    IntervalMinimum,
    IntervalPReLU,
    IntervalProduct,
    IntervalReLU,
    IntervalResidual,
    IntervalSequential,
    IntervalSoftsign,
)

NETWORKS, CLASSES, CORNERS = 600, 3, 3
LANES = 64
"""Rows at once, fewer than many layers have numbers, so that these take turns."""
MIXING = (IntervalConv2d, IntervalLinear, IntervalMatMul)
FORKING = (IntervalResidual, IntervalConcat, IntervalProduct)
BENDING = (IntervalReLU, IntervalLeakyReLU, IntervalPReLU, IntervalHardtanh, IntervalMaximum)
NONLINEAR = (
    *(*BENDING, IntervalMinimum, IntervalAbs),
    *(IntervalHardswish, IntervalHardsigmoid, IntervalSoftsign, IntervalMaxPool2d),
)
"""Layers that read an interval with a number."""

Array: TypeAlias = Any
Kinds: TypeAlias = Sequence[type[IntervalLayer]]


class Case(NamedTuple):
    """A network, an image (1, C, H, W), its radius and its label.

    Attributes:
        slopes: of lower lines, see `sound_upper`; empty for those of CROWN.
    """

    model: IntervalSequential
    image: Tensor
    epsilon: float
    label: int
    slopes: dict[int, Slopes]

    @property
    def box(self) -> Interval:
        return ball(self.image.double(), torch.tensor([self.epsilon]).double(), (0.0, 1.0))

    def visits(self, claim: str, narrow: Narrow | None) -> list[Visit]:
        """Those of nonlinear rules, in order of execution."""
        found = flat(run_rules(sound_network(self.model, claim).rules, self.box, narrow=narrow))
        return [visit for visit in found if visit.number is not None]


# Networks


@torch.no_grad()
def deep(generator: torch.Generator, bending: Kinds = NONLINEAR) -> IntervalSequential:
    """Mixing and bending blocks in turn, then linear layers, with moderate weights."""
    pick = picker(generator)

    def block(kinds: Kinds) -> IntervalLayer:
        makers = networks.BLOCKS[kinds[pick(len(kinds))]]
        return makers[pick(len(makers))](lambda: IntervalSequential(block(MIXING), block(bending)))

    body = [block(kinds) for _ in range(3) for kinds in ((*MIXING, *FORKING), bending)]
    ends = (IntervalFlatten(), IntervalLinear(32, 6), IntervalReLU(), IntervalLinear(6, CLASSES))
    model = IntervalSequential(*body, *ends)
    for parameter in model.parameters():
        parameter.normal_(0, 0.5, generator=generator)
    return model.eval()


def cases(count: int, seed: int) -> Iterator[Case]:
    """Networks whose weights are moderate, or of very different size; half of them have slopes."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        model = deep(generator) if index % 3 else networks.network(generator, CLASSES)
        case = Case(model, networks.image(generator), 2.0 ** -(1 + index % 7), index % CLASSES, {})
        yield case._replace(slopes=random_slopes(case, generator)) if index % 2 else case


def random_slopes(case: Case, generator: torch.Generator) -> dict[int, Slopes]:
    """For the rows of all places, some of them beyond what is valid."""
    shapes = [visit.x.shape[1:] for visit in case.visits("real", None)]

    def slopes(rows: int) -> Slopes:
        return {
            number: 1.5 * torch.rand(1, rows, *shape, generator=generator) - 0.25
            for number, shape in enumerate(shapes)
        }

    return {MARGINS: slopes(CLASSES), **{place: slopes(1) for place in range(len(shapes))}}


class Aim(NamedTuple):
    """A number that images and executions raise or lower.

    Attributes:
        place: it is read by this layer of the whole network, behind the last one a logit minus
            that of the label.
        number: its place in what is read.
        sign: 1 to raise it, -1 to lower it.
    """

    place: int
    number: int
    sign: int


def aims(case: Case, generator: torch.Generator) -> Iterator[Aim]:
    """Random ones, each with both signs."""
    pick = picker(generator)
    places = [i for i, layer in enumerate(case.model) if isinstance(layer, NONLINEAR)]
    for _ in range(CORNERS):
        place = [*places, len(case.model)][pick(len(places) + 1)]
        number = pick(case.model[:place](case.image).numel())
        yield from (Aim(place, number, sign) for sign in (1, -1))


def aimed(case: Case, aim: Aim, y: Tensor) -> Tensor:
    """What is to be large, of the output `y` of the layers before a place, (1, ...)."""
    other = y.flatten()[case.label] if aim.place == len(case.model) else 0
    return aim.sign * (y.flatten()[aim.number] - other)


def corner(case: Case, aim: Aim) -> Array:
    """Signs (C, H, W) of changes of the pixels."""
    image = case.image.double().requires_grad_()
    model = copy.deepcopy(case.model[: aim.place]).double()
    (rise,) = torch.autograd.grad(aimed(case, aim, model(image)), image)
    return np.where(rise[0].numpy() > 0, 1, -1)


# What layers read


class Reading(NamedTuple):
    """What nonlinear layers read, in order of execution, and the output of the last layer."""

    inputs: list[Array]
    output: Array


def exactly(model: IntervalSequential, image: Array) -> Reading:
    """In rational numbers, of an image (C, H, W)."""
    inputs: list[Array] = []
    through = exact._through

    def recorded(layer: Any, lower: Array, upper: Array) -> tuple[Array, Array]:
        if isinstance(layer, NONLINEAR):
            inputs.append(lower)
        return through(layer, lower, upper)

    with mock.patch.object(exact, "_through", recorded):
        return Reading(inputs, exact.logits(model, image))


def adversarially(
    model: IntervalSequential, image: Array, after: Callable[[Tensor], Tensor], unit: Unit
) -> Reading:
    """In a float32 execution that makes `after` of its output large."""
    inputs: list[Array] = []

    def recorded(results: Any) -> Any:
        def found(layer: Any, x: Array, unit: Unit) -> Any:
            inputs.append(x)
            return results(layer, x, unit)

        return found

    recording = {kind: recorded(EXECUTED[kind]) for kind in NONLINEAR}
    with mock.patch.dict(EXECUTED, recording), np.errstate(over="ignore", invalid="ignore"):
        output = execute(model, image, after, unit)
    return Reading(inputs, output)


class Verdict(NamedTuple):
    """What was compared of a case.

    Attributes:
        numbers, outside: those that nonlinear layers read, and how many of them are outside of
            their interval.
        bounds, exceeded: those on f_i - f_y, once for each image or execution, and how many of
            them it exceeds.
        narrowed: whether any interval is narrower than interval arithmetic makes it.
    """

    numbers: int
    outside: int
    bounds: int
    exceeded: int
    narrowed: bool


def judged(case: Case, seed: int = 0) -> Verdict:
    """Compares the intervals and bounds of a case with images at corners of its ball."""
    proofs = {claim: Proved.of(case, claim) for claim in CLAIMS}
    lower, upper = exact.ball(case.image[0], case.epsilon)
    inside = float32_near(lower, np.inf), float32_near(upper, -np.inf)
    found = []
    for aim in aims(case, torch.Generator().manual_seed(seed)):
        signs = corner(case, aim)
        reading = exactly(case.model, np.where(signs > 0, upper, lower))
        found.append(proofs["real"].compared(reading, case.label, whole=True))
        image, whole = np.where(signs > 0, *inside[::-1]), aim.place == len(case.model)
        layers = cast(IntervalSequential, copy.deepcopy(case.model[: aim.place]).double())
        after = partial(aimed, case, aim)
        readings = (adversarially(layers, image, after, unit) for unit in UNITS)
        found += [proofs["float32"].compared(part, case.label, whole) for part in readings]
    numbers, outside, bounds, exceeded = (sum(column) for column in zip(*found, strict=True))
    narrowed = any(proved.narrowed for proved in proofs.values())
    return Verdict(numbers, outside, bounds, exceeded, narrowed)


class Proved(NamedTuple):
    """What is proved of a case for a claim.

    Attributes:
        intervals: that each nonlinear layer reads, in order of execution, (1, ...).
        upper: (classes,) bounds on f_i - f_y.
        narrowed: see `Verdict`.
    """

    intervals: list[Interval]
    upper: list[float]
    narrowed: bool

    @classmethod
    @torch.no_grad()
    def of(cls, case: Case, claim: str) -> Proved:
        network, labels = sound_network(case.model, claim), torch.tensor([case.label])
        options = BoundOptions("crown")
        upper = sound_upper(network, case.box, labels, options, case.slopes)[0].tolist()
        visits, wide = (
            case.visits(claim, narrow) for narrow in (narrowing(case.slopes, LANES), None)
        )
        pairs = zip(visits, wide, strict=True)
        narrowed = any(bool((a.x.rad < 0.99 * b.x.rad).any()) for a, b in pairs)
        return cls([visit.x for visit in visits], upper, narrowed)

    def compared(self, reading: Reading, label: int, whole: bool) -> tuple[int, int, int, int]:
        """`Verdict.numbers`, `outside`, `bounds` and `exceeded` of one reading.

        Args:
            whole: the output are the logits, otherwise what the next nonlinear layer reads.
        """
        inputs = reading.inputs if whole else [*reading.inputs, reading.output]
        numbers = outside = 0
        for x, read in zip(self.intervals, inputs, strict=whole):
            numbers += read.size
            outside += _outside(x, read)
        if not whole:
            return numbers, outside, 0, 0
        logits = _fractions(reading.output)
        above = [
            i != label and bound != np.inf and not logits[i] - logits[label] <= Fraction(bound)
            for i, bound in enumerate(self.upper)
        ]
        return numbers, outside, len(above) - 1, sum(above)


def _outside(x: Interval, read: Array) -> int:
    """The number of those that are outside of an interval whose ends are numbers."""
    mid, rad = x.mid[0].flatten(), x.rad[0].flatten()
    known = (mid.isfinite() & rad.isfinite()).numpy()
    mid, rad = exact.fractions(mid[known]), exact.fractions(rad[known])
    return int((abs(_fractions(read.reshape(-1)[known]) - mid) > rad).sum())


def _fractions(values: Array) -> Array:
    """Numbers (n,) as fractions; what is not finite is beyond all of them."""
    if values.dtype == object:
        return values
    finite = np.where(np.isfinite(values), values, np.finfo(np.float64).max)
    return exact.fractions(torch.from_numpy(finite.astype(np.float64)))


def run(scale: float, seed: int, work: Path) -> list[Row]:
    """A row for what layers read and one for the differences of logits.

    Args:
        scale: share of the cases.
        seed: of the cases.
        work: not used.
    """
    count = max(2, int(NETWORKS * scale))
    verdicts = [judged(case, index) for index, case in enumerate(cases(count, seed))]
    totals = Verdict(*(sum(column) for column in zip(*verdicts, strict=True)))
    note = f"intervals of {int(totals.narrowed):,} are narrower than interval arithmetic's"
    networks_of = f"{len(verdicts):,} networks"
    return [
        Row(f"numbers read in {networks_of}", totals.numbers, totals.outside, note),
        Row(f"bounds on f_i - f_y of {networks_of}", totals.bounds, totals.exceeded, ""),
    ]
