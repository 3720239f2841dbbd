"""Tightness of the bounds: how far certified radii are from radii at which attacks succeed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibpcore.attacks.pgd import Attacker
from ibpcore.attacks.search import Found, attempts, bisected, upwards
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.radii import certified_radii
from ibpcore.inspection.subject import Subject
from ibpcore.wording import counted

ROUNDING = 1e-4
"""An attack exceeds a bound only if it does by more than this, relative to 1 + |bound|."""


class Rises(NamedTuple):
    """How far margins rise above R(0) in balls of given radii, each (n,).

    Attributes:
        attack: the largest clean margin that an attack found, minus R(0).
        bounds: R_cert minus R(0), for each bound.
        above: for each of them, the number of samples whose attack exceeds the bound; if
            there are any, the bound is wrong.
    """

    attack: Tensor
    bounds: dict[str, Tensor]
    above: dict[str, int]

    def ratio(self, bound: str) -> float | None:
        """Local tightness: mean over the samples of attack / bound, in [0, 1].

        1 if the bound is exact and the attack optimal; None without samples. The local
        tightness of Mao et al. (2023) compares the size of the exact output box with that
        of IBP's instead, which attacks cannot determine.
        """
        rise = self.bounds[bound]
        good = (rise.isfinite() & (rise > 0)).nonzero()[:, 0]
        return float((self.attack[good] / rise[good]).mean()) if len(good) > 0 else None


class Tightness(NamedTuple):
    """Certified radii and margins of B samples compared with attacks; radii in pixel units.

    Attributes:
        radii: (B,) certified by each bound, or by IBP where that certifies more.
        attackable: (B,) the smallest radius at which an attack succeeded, 0 for
            misclassified samples, infinity if none did up to epsilon_max.
        at_radius: of the n samples with an IBP radius above 0, at that radius.
        at_epsilon_max: of all samples.
        contradictions: for each of them, the number of samples attacked at or below their
            certified radius; if there are any, the certificates are wrong.
    """

    radii: dict[str, Tensor]
    attackable: Tensor
    at_radius: Rises
    at_epsilon_max: Rises
    contradictions: dict[str, int]

    def alarms(self) -> list[str]:
        """One line for each contradiction between attacks and bounds; empty if there is none."""
        lines = [
            f"{counted(count, 'sample')} attacked within the radius certified by {name}"
            for name, count in self.contradictions.items()
            if count > 0
        ]
        for place, rises in (("radius", self.at_radius), ("epsilon_max", self.at_epsilon_max)):
            lines += [
                f"{counted(count, 'sample')} attacked above the bound by {name} at the {place}"
                for name, count in rises.above.items()
                if count > 0
            ]
        return lines

    def summary(self, epsilon_max: float) -> dict[str, Any]:
        """Means; gaps are attackable radii, capped at epsilon_max, minus certified radii.

        `area` is the area under the curve of certified accuracy from radius 0 to epsilon_max,
        divided by epsilon_max: the tightness (CR-AUC) of Jovanović et al. (2022) on this scale.
        A sample counts up to its radius, so the area is the mean radius.
        """
        reached = self.attackable.clamp(max=epsilon_max)
        places = ("radius", self.at_radius), ("epsilon_max", self.at_epsilon_max)
        return {
            "mean_radius": {name: float(r.mean()) for name, r in self.radii.items()},
            "area": {name: float(r.mean()) / epsilon_max for name, r in self.radii.items()},
            "mean_attackable_radius": float(reached.mean()),
            "attackable": int(self.attackable.isfinite().sum()),
            "mean_gap": {name: float((reached - r).mean()) for name, r in self.radii.items()},
            "local_tightness": {
                place: {name: rises.ratio(name) for name in self.radii} for place, rises in places
            },
            "mean_rise_at_epsilon_max": {
                "attack": float(self.at_epsilon_max.attack.mean()),
                **{name: float(r.mean()) for name, r in self.at_epsilon_max.bounds.items()},
            },
            "contradictions": self.contradictions,
        }


def attackable_radii(
    subject: Subject, certified: Tensor, epsilon_max: float, bisections: int, attack: Attacker
) -> Tensor:
    """(B,) float64, the smallest radius at which an attack succeeded; infinity if none did.

    Args:
        certified: (B,) radii, above which the search starts.
        bisections: number of bisections between the last failure and the first success.
    """
    exact = subject.exact()

    def misclassified(samples: Tensor, images: Tensor) -> Tensor:
        return ~(exact.at(samples)._replace(images=images.double()).at_zero() < 0)

    attempt = attempts(subject.images, subject.labels, subject.bounds.clip, attack, misclassified)
    wrong = subject.at_zero() >= 0
    found = Found(torch.where(wrong, 0.0, torch.inf).double(), subject.images)
    found, lower = upwards(found, attempt, certified.double(), epsilon_max, epsilon_max)
    return bisected(found, attempt, lower, bisections).distance


def measure_tightness(
    subject: Subject,
    bounds: Sequence[str],
    epsilon_max: float,
    bisections: int,
    attack: Attacker,
) -> Tightness:
    """Measures the `Tightness` of `bounds`, names with "ibp" among them, on all samples."""
    elide, clip = subject.bounds.elide, subject.bounds.clip
    alone = {name: name if name == "ibp" else f"ibp,{name}" for name in bounds}
    radii = {
        name: certified_radii(
            *subject.problem, epsilon_max, bound=bound, elide=elide, clip=clip
        ).radius
        for name, bound in alone.items()
    }
    contradictions = {}
    for name, radius in radii.items():
        rows = (radius > 0).nonzero()[:, 0]
        some = subject.at(rows)
        success = _worst(some, radius[rows], attack) > ROUNDING * (1 + some.at_zero().abs())
        contradictions[name] = int(success.sum())
    certified = torch.stack(list(radii.values())).amax(0)
    rows = (radii["ibp"] > 0).nonzero()[:, 0]
    return Tightness(
        radii,
        attackable_radii(subject, certified, epsilon_max, bisections, attack),
        _rises(subject.at(rows), bounds, radii["ibp"][rows], attack),
        _rises(subject, bounds, torch.full_like(certified, epsilon_max), attack),
        contradictions,
    )


@torch.no_grad()
def _rises(subject: Subject, bounds: Sequence[str], epsilons: Tensor, attack: Attacker) -> Rises:
    at_zero, attacked = subject.at_zero(), _worst(subject, epsilons, attack)
    rises, above = {}, {}
    for name in bounds:
        margin = BOUNDS[name].margins(*subject.problem, epsilons, subject.bounds)
        rises[name] = margin - at_zero
        above[name] = int((attacked > margin + ROUNDING * (1 + margin.abs())).sum())
    return Rises(attacked - at_zero, rises, above)


def _worst(subject: Subject, epsilons: Tensor, attack: Attacker) -> Tensor:
    """The largest clean margin (B,) that `attack` finds in balls of radii (B,)."""
    box = Interval.ball(subject.images, epsilons, subject.bounds.clip, check=False)
    return attack(box, subject.labels).values
