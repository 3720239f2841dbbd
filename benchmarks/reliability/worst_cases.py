"""Certificates of networks whose worst image is known, and executions that try to break them.

Claim: no margin is proved below that of the worst image, no radius up to the one at which this
image is misclassified, and no float32 execution of it within a radius with the claim `float32`
changes the class. Where f_i - f_y is monotone in every pixel, or linear, the worst image is a
corner of the ball, and its margin is computed in rational numbers. At scale 1 there are 1,200
networks of all layers, with 12 margins and 6 radii each; on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.reliability import exact, networks
from benchmarks.reliability.execution import UNITS, executed
from benchmarks.reliability.networks import LABEL, picker
from benchmarks.reliability.rows import Row
from ibpcore import certified_radii, verified_radii
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.radii import Radii
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import CLAIMS, sound_network
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalReLU, IntervalSequential

NETWORKS, CLASSES, LARGEST = 1200, 3, 0.25
PIXEL = 0.9
BOUNDS = ("ibp", "crown-ibp", "crown")


class Case(NamedTuple):
    """A network, an image (1, C, H, W), and the corners at which each f_i - f_y is largest.

    Attributes:
        model: in evaluation mode.
        image: float32 in [0, 1].
        signs: (classes, C, H, W): the sign of the change of each pixel.
        epsilon: a radius at which the margin is close to 0.
    """

    model: IntervalSequential
    image: Tensor
    signs: Any
    epsilon: float

    def margin(self, epsilon: float | Fraction) -> Fraction:
        """The largest f_i - f_y over the ball, that of an image in it."""
        lower, upper = exact.ball(self.image[0], epsilon)
        differences = []
        for i, signs in enumerate(self.signs):
            if i != LABEL:
                logits = exact.logits(self.model, np.where(signs > 0, upper, lower))
                differences.append(logits[i] - logits[LABEL])
        return max(differences)

    def corner(self, favoured: int, epsilon: float) -> Any:
        """The float32 image (C, H, W) in the ball that is nearest to its worst corner."""
        lower, upper = exact.ball(self.image[0], epsilon)
        return np.where(
            self.signs[favoured] > 0, float32_near(upper, -np.inf), float32_near(lower, np.inf)
        )


def float32_near(ends: Any, inside: float) -> Any:
    """Fractions as float32, rounded in the direction of `inside`."""
    near = ends.astype(np.float64).astype(np.float32)
    beyond = exact.fractions(torch.from_numpy(near)) > ends
    if inside > 0:
        beyond = exact.fractions(torch.from_numpy(near)) < ends
    return np.where(beyond.astype(bool), np.nextafter(near, np.float32(inside)), near)


# Networks


def monotone(generator: torch.Generator) -> Case:
    """Weights are not negative, so f_i - f_y rises with every pixel, or falls with every one."""
    model, image = (
        networks.network(generator, CLASSES, without=networks.NOT_MONOTONE),
        networks.image(generator),
    )
    signs = torch.tensor([[0.0], [1.0], [-1.0]])
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("weight", "scale", "divisor")):
                tensor.abs_()
        last = cast(IntervalLinear, model[-1]).weight
        # Rounding is monotone: these differ from the row of the label in one direction.
        last.copy_(last[LABEL] + signs * last.abs())
    corners = np.broadcast_to(signs.numpy().reshape(-1, 1, 1, 1), (CLASSES, *networks.SHAPE))
    return _balanced(Case(model, image, corners, _radius(generator)), generator)


def linear(generator: torch.Generator) -> Case:
    """Weights of any sign and no activations: f_i - f_y is linear, with rational coefficients."""
    model = networks.network(generator, CLASSES, without=networks.NOT_LINEAR)
    image, origin = networks.image(generator), np.full(networks.SHAPE, exact.ZERO)
    start = exact.logits(model, origin)
    rises = np.empty((CLASSES, *networks.SHAPE), dtype=object)
    for place in np.ndindex(*networks.SHAPE):
        one = origin.copy()
        one[place] = Fraction(1)
        rise = exact.logits(model, one) - start
        rises[:, place[0], place[1], place[2]] = rise - rise[LABEL]
    signs = np.sign(rises.astype(np.float64))
    return _balanced(Case(model, image, signs, _radius(generator)), generator)


@torch.no_grad()
def absorbing(generator: torch.Generator) -> Case:
    """Long sums, of one term above 1 and many of about half a unit in its last place.

    One after the other, those of the label are rounded away, and those of the others rounded up:
    executions come close to the largest error that a sum can have.
    """
    terms = 32 << picker(generator)(4)
    layer = IntervalLinear(terms + 1, CLASSES)
    sizes = torch.tensor([[0.85], [1.15], [1.15]]) / PIXEL
    layer.weight[:, 1:] = 2.0**-24 * (sizes + 0.02 * torch.rand(terms, generator=generator))
    layer.weight[:, 0] = 1.05 / (PIXEL - 16 / 255)
    image = torch.full((1, terms + 1), PIXEL)
    signs = (layer.weight - layer.weight[LABEL]).sign().numpy()
    return _balanced(Case(IntervalSequential(layer), image, signs, _radius(generator)), generator)


@torch.no_grad()
def cancelling(generator: torch.Generator) -> Case:
    """ReLUs that are always active, then ones of which linear bounds alone know the inputs.

    Each f_i - f_y has one of the latter, so it is monotone in its input, which is linear. Half of
    these are positive in the ball, but interval arithmetic does not know it.
    """
    pick = picker(generator)
    first, second, last = IntervalLinear(32, 8), IntervalLinear(8, CLASSES), IntervalLinear(3, 3)
    for layer in (first, second):
        layer.weight.normal_(generator=generator)
    first.bias.copy_(first.weight.abs().sum(1) + 1)
    model = IntervalSequential(
        IntervalFlatten(), first, IntervalReLU(), second, IntervalReLU(), last
    )
    image, epsilon = networks.image(generator), _radius(generator)
    rises = exact.fractions(second.weight).dot(exact.fractions(first.weight))
    reach = epsilon * torch.from_numpy(abs(rises).sum(1).astype(np.float64)).float()
    side = torch.tensor([1.1 * pick(2) for _ in range(CLASSES)])
    second.bias.copy_(side * reach - second.weight @ first(image.flatten()))
    weights = torch.diag(torch.randn(CLASSES, generator=generator))
    last.weight.copy_(torch.where(side > 0, weights, weights.abs()))
    last.weight[LABEL] = 0
    signs = np.sign(rises.astype(np.float64)) * np.sign(last.weight.diagonal().numpy())[:, None]
    signs = signs.reshape(CLASSES, *networks.SHAPE)
    return _balanced(Case(model.eval(), image, signs, epsilon), generator, "crown")


FAMILIES: dict[str, Callable[[torch.Generator], Case]] = {
    "monotone": monotone,
    "linear": linear,
    "absorbing": absorbing,
    "cancelling": cancelling,
}


def _radius(generator: torch.Generator) -> float:
    return float(torch.tensor((picker(generator)(16) + 1) / 255))


@torch.no_grad()
def _balanced(case: Case, generator: torch.Generator, bound: str = "ibp") -> Case:
    """Sets the last bias of the model such that a margin at `epsilon` is about 0.

    It is the exact one, or the one that a bound proves for the claim `float32`.
    """
    bias = cast(IntervalLinear, case.model[-1]).bias
    bias.zero_()
    margin = float(case.margin(case.epsilon))
    if picker(generator)(2):
        proved = _proved(case, "float32", BoundOptions(bound), case.epsilon)
        margin = proved if np.isfinite(proved) else margin
    bias[LABEL] = margin
    return case


def cases(count: int, seed: int) -> Iterator[tuple[str, Case]]:
    """Networks of each family in turn."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        family = list(FAMILIES)[index % len(FAMILIES)]
        yield family, FAMILIES[family](generator)


# Certificates


def exact_radius(
    margin: Callable[[Fraction], Fraction], ceiling: Fraction, guesses: Sequence[Fraction] = ()
) -> Fraction:
    """The root of a piecewise linear rational `margin` that does not fall; at most `ceiling`.

    It is 0 if the margin at 0 is not negative, and `ceiling` if that there is. `guesses` near the
    root save evaluations.
    """
    low, high = Fraction(0), ceiling
    below, above = margin(low), margin(high)
    if below >= 0 or above < 0:
        return low if below >= 0 else high
    points = list(guesses)
    while True:
        point = points.pop() if points else (low + high) / 2
        if low < point < high:
            value = margin(point)
            low, below = (point, value) if value < 0 else (low, below)
            high, above = (high, above) if value < 0 else (point, value)
        # Exact as soon as there is no kink between the ends.
        root = low + (high - low) * below / (below - above)
        if not points and margin(root) == 0:
            return root


class Verdict(NamedTuple):
    """What was proved of a case, and how much of it is wrong.

    Attributes:
        exact: the rational radius, at most `LARGEST`.
        radii: those proved, by claim and bound.
        misled: the number of radii of float64 bounds, before the proof, that reach the exact one.
        margins, wrong_margins: the number of margins, and that of those below the exact one.
        wrong_radii: the number of proved radii that reach the exact one.
        executions, broken: the number of float32 executions, adversarial ones and those of
            PyTorch, and that of those above the margin proved at their radius.
        used: the largest share of the allowance for rounding that an execution took.
    """

    exact: Fraction
    radii: dict[tuple[str, str], float]
    misled: int
    margins: int
    wrong_margins: int
    wrong_radii: int
    executions: int
    broken: int
    used: float


@torch.no_grad()
def judged(case: Case) -> Verdict:
    """Compares margins, radii and executions of a case with its worst image."""
    worst, ceiling = case.margin(case.epsilon), Fraction(LARGEST)
    margins = [
        _proved(case, claim, BoundOptions(bound, elide), case.epsilon)
        for claim, bound, elide in product(CLAIMS, BOUNDS, (True, False))
    ]
    found = {bound: _found(case, bound) for bound in BOUNDS}
    radii = {
        (claim, bound): float(_verified(case, claim, bound, found[bound]).radius)
        for claim, bound in product(CLAIMS, BOUNDS)
    }
    largest = Fraction(max(radii.values()))
    radius = exact_radius(case.margin, ceiling, [largest * (1 + Fraction(2) ** -16), largest])

    def wrong(radius_found: float) -> bool:
        return radius < ceiling and 0 < radius_found >= radius

    shares = [s for bound in BOUNDS for s in _shares(case, bound, radii["float32", bound])]
    return Verdict(
        exact=radius,
        radii=radii,
        misled=sum(wrong(float(part.radius)) for part in found.values()),
        margins=len(margins),
        wrong_margins=sum(not margin >= worst for margin in margins),
        wrong_radii=sum(map(wrong, radii.values())),
        executions=len(shares),
        broken=sum(not share <= 1 for share in shares),
        used=max(shares),
    )


def _proved(case: Case, claim: str, options: BoundOptions, epsilon: float) -> float:
    rules = sound_network(case.model, claim)
    radius = torch.tensor([epsilon], dtype=torch.float64)
    return float(sound_margins(rules, case.image, torch.tensor([LABEL]), radius, options))


def _found(case: Case, bound: str) -> Radii:
    """The radius of float64 bounds, as close to the exact one as rounding allows."""
    model, images = copy.deepcopy(case.model).double(), case.image.double()
    return certified_radii(
        model, images, torch.tensor([LABEL]), LARGEST, bound=bound, xtol=1e-15, rtol=2.0**-50
    )


def _verified(case: Case, claim: str, bound: str, found: Radii) -> Radii:
    label = torch.tensor([LABEL])
    return verified_radii(case.model, case.image, label, found, claim=claim, bound=bound)


def _shares(case: Case, bound: str, radius: float) -> Iterator[float]:
    """What executions of the worst images take of the allowance for rounding at `radius`.

    A share above 1 breaks the proof: the difference of the logits is above the margin. So do
    logits that are not finite, and a margin without an allowance.
    """
    proved, worst = _proved(case, "float32", BoundOptions(bound), radius), case.margin(radius)
    for favoured in range(CLASSES):
        if favoured == LABEL:
            continue
        corner = case.corner(favoured, radius)
        results = [executed(case.model, corner, favoured, LABEL, unit) for unit in UNITS]
        for logits in (*results, case.model(torch.from_numpy(corner)[None])[0].numpy()):
            if proved == np.inf:
                yield 0.0
            elif not (np.isfinite(logits).all() and proved > worst):
                yield np.inf
            else:
                reached = Fraction(float(logits[favoured])) - Fraction(float(logits[LABEL]))
                yield float((reached - worst) / (Fraction(proved) - worst))


def run(scale: float, seed: int, work: Path) -> list[Row]:
    """Rows for the margins, the radii and the executions of each family of networks.

    Args:
        scale: share of the cases.
        seed: of the cases.
        work: not used.
    """
    verdicts: dict[str, list[Verdict]] = {family: [] for family in FAMILIES}
    for family, case in cases(max(len(FAMILIES), int(NETWORKS * scale)), seed):
        verdicts[family].append(judged(case))
    return [row for family, found in verdicts.items() for row in _rows(family, found)]


def _rows(family: str, verdicts: list[Verdict]) -> list[Row]:
    def total(name: str) -> int:
        return sum(getattr(verdict, name) for verdict in verdicts)

    radii = [radius for verdict in verdicts for radius in verdict.radii.values()]
    certified = sum(radius > 0 for radius in radii)
    networks_of = f"{len(verdicts):,} {family} networks"
    used = max(verdict.used for verdict in verdicts)
    return [
        Row(
            f"margins of {networks_of} against their worst image",
            total("margins"),
            total("wrong_margins"),
            "",
        ),
        Row(
            f"radii of {networks_of} against the rational radius",
            len(radii),
            total("wrong_radii"),
            f"{certified:,} above 0; float64 bounds alone certify wrongly {total('misled')} times",
        ),
        Row(
            f"float32 executions of the worst images of {networks_of}",
            total("executions"),
            total("broken"),
            f"at most {100 * used:.0f} % of the allowance for rounding used",
        ),
    ]
