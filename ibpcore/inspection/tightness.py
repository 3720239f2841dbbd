"""Bounds from both sides: radii certified, radii attacked, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibpcore.attacks import decaying_steps, pgd
from ibpcore.bounds import BOUNDS
from ibpcore.folding import detached
from ibpcore.inspection.subject import Subject
from ibpcore.interval import Interval
from ibpcore.radius import certified_radii

BATCH_SIZE = 64
ROUNDING = 1e-4
"""An attack is above a bound if it is so by more than this, relative to 1 + |bound|."""

Attacker = Callable[[Subject, Tensor], Tensor]
"""(subject, radii (B,)) -> the largest clean margin (B,) found in each ball; 0 or more is a
success."""


class Rises(NamedTuple):
    """How far margins rise above R(0) in balls of some radii, each (n,).

    Attributes:
        attack: the largest clean margin that an attack found, less R(0).
        bounds: R_cert less R(0), for each of `BOUNDS`.
        above: for each of them, samples at which the attack was above the bound: none, or
            the bound is wrong.
    """

    attack: Tensor
    bounds: dict[str, Tensor]
    above: dict[str, int]

    def ratio(self, bound: str) -> float | None:
        """Local tightness: mean over the samples of attack / bound, in [0, 1].

        1 where the bound is exact and the attack perfect; None without samples. Local
        tightness after Mao et al. (2023) compares sizes of output boxes instead, the
        exact one with IBP's, which no attack can tell.
        """
        rise = self.bounds[bound]
        good = (rise.isfinite() & (rise > 0)).nonzero()[:, 0]
        return float((self.attack[good] / rise[good]).mean()) if len(good) > 0 else None


class Tightness(NamedTuple):
    """What bounds and attacks say of B samples; radii in pixel units.

    Attributes:
        radii: (B,) certified, for each of `BOUNDS`.
        attackable: (B,) the smallest radius at which an attack succeeded, 0 for
            misclassified samples, infinity where none did up to epsilon_max.
        at_radius: of the n samples with an IBP radius above 0, at that radius.
        at_epsilon_max: of all samples.
        contradictions: samples attacked at or below their certified radius, for each of
            `BOUNDS`: none, or the certificates are wrong.
    """

    radii: dict[str, Tensor]
    attackable: Tensor
    at_radius: Rises
    at_epsilon_max: Rises
    contradictions: dict[str, int]

    def alarms(self) -> list[str]:
        """A line for each thing that must not be; empty if all is well."""
        lines = [
            f"{count} samples were attacked within the radius certified by {name}"
            for name, count in self.contradictions.items()
            if count > 0
        ]
        for place, rises in (("radius", self.at_radius), ("epsilon_max", self.at_epsilon_max)):
            lines += [
                f"{count} samples have an attack above the bound by {name} at their {place}"
                for name, count in rises.above.items()
                if count > 0
            ]
        return lines

    def summary(self, epsilon_max: float) -> dict[str, Any]:
        """Means; gaps are attackable less certified radii, cut off at epsilon_max."""
        reached = self.attackable.clamp(max=epsilon_max)
        return {
            "mean_radius": {name: float(r.mean()) for name, r in self.radii.items()},
            "mean_attackable_radius": float(reached.mean()),
            "attackable": int(self.attackable.isfinite().sum()),
            "mean_gap": {name: float((reached - r).mean()) for name, r in self.radii.items()},
            "local_tightness": {
                place: {name: rises.ratio(name) for name in BOUNDS}
                for place, rises in (
                    ("radius", self.at_radius),
                    ("epsilon_max", self.at_epsilon_max),
                )
            },
            "mean_rise_at_epsilon_max": {
                "attack": float(self.at_epsilon_max.attack.mean()),
                **{name: float(r.mean()) for name, r in self.at_epsilon_max.bounds.items()},
            },
            "contradictions": self.contradictions,
        }


def attacker(steps: int, restarts: int, generator: torch.Generator) -> Attacker:
    """PGD on the margin, with decaying steps from half the radius on."""

    def attack(subject: Subject, epsilons: Tensor) -> Tensor:
        network, found = detached(subject.network), []
        every = torch.arange(len(epsilons), device=epsilons.device)
        for rows in every.split(BATCH_SIZE):
            ball = Interval.ball(subject.images[rows], epsilons[rows], subject.clip, check=False)
            labels = subject.labels[rows]
            sizes = decaying_steps(steps, 0.5)
            found.append(
                pgd(network, ball, labels, sizes, restarts=restarts, generator=generator).values
            )
        return torch.cat(found)

    return attack


def attackable_radii(
    subject: Subject, certified: Tensor, epsilon_max: float, bisections: int, attack: Attacker
) -> Tensor:
    """(B,) the smallest radius at which an attack succeeded; infinity for none.

    Bisection between the certified radius and epsilon_max. An attack that fails at one
    radius may succeed at a smaller one, so the true radius may be smaller still; but every
    radius given is one at which an attack was evaluated and succeeded.

    Args:
        certified: (B,) radii below which nothing is to be found.
    """
    found = torch.where(subject.at_zero() >= 0, 0.0, torch.full_like(certified, torch.inf))
    rows = (found > 0).nonzero()[:, 0]
    limit = torch.full_like(certified, epsilon_max)
    rows = rows[attack(subject.at(rows), limit[rows]) >= 0]
    chosen, lower, upper = subject.at(rows), certified[rows], limit[rows]
    for _ in range(bisections if len(rows) > 0 else 0):
        middle = (lower + upper) / 2
        success = attack(chosen, middle) >= 0
        lower, upper = torch.where(success, lower, middle), torch.where(success, middle, upper)
    found[rows] = upper
    return found


def tightness(subject: Subject, epsilon_max: float, bisections: int, attack: Attacker) -> Tightness:
    """What `Tightness` says, of every sample."""
    radii = {
        name: certified_radii(
            subject.network,
            subject.images,
            subject.labels,
            epsilon_max,
            bound=name,
            elide=subject.elide,
            clip=subject.clip,
        ).radius
        for name in BOUNDS
    }
    contradictions = {}
    for name, radius in radii.items():
        rows = (radius > 0).nonzero()[:, 0]
        some = subject.at(rows)
        success = attack(some, radius[rows]) > ROUNDING * (1 + some.at_zero().abs())
        contradictions[name] = int(success.sum())
    certified = torch.stack(list(radii.values())).amax(0)
    rows = (radii["ibp"] > 0).nonzero()[:, 0]
    return Tightness(
        radii,
        attackable_radii(subject, certified, epsilon_max, bisections, attack),
        _rises(subject.at(rows), radii["ibp"][rows], attack),
        _rises(subject, torch.full_like(certified, epsilon_max), attack),
        contradictions,
    )


@torch.no_grad()
def _rises(subject: Subject, epsilons: Tensor, attack: Attacker) -> Rises:
    at_zero, attacked = subject.at_zero(), attack(subject, epsilons)
    bounds, above = {}, {}
    for name, bound in BOUNDS.items():
        margin = bound(
            subject.network,
            subject.images,
            subject.labels,
            epsilons,
            elide=subject.elide,
            clip=subject.clip,
        )
        bounds[name] = margin - at_zero
        above[name] = int((attacked > margin + ROUNDING * (1 + margin.abs())).sum())
    return Rises(attacked - at_zero, bounds, above)
