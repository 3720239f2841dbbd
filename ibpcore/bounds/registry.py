"""The bounds by name. To add one: a file here, and an entry in `BOUNDS`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor

from ibpcore.bounds import crown, ibp
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions
from ibpcore.errors import UserError


class Proof(Enum):
    """How `ibpcore.certification.soundness` repeats a bound with every rounding counted."""

    INTERVAL = "interval arithmetic"
    LINEAR = "linear bounds over interval arithmetic"


class OverBalls(Protocol):
    """Bounds over l-infinity balls, whose values are unchecked.

    Args:
        images: (B, C, H, W) in pixel units.
        labels: (B,) int64.
        epsilons: (B,) in pixel units; for margins (K, B) too.
    """

    def __call__(
        self,
        network: FoldedNetwork,
        images: Tensor,
        labels: Tensor,
        epsilons: Tensor,
        options: BoundOptions,
    ) -> Tensor: ...


class OverBoxes(Protocol):
    """Bounds over any boxes of images, (B, C, H, W)."""

    def __call__(
        self, network: FoldedNetwork, box: Interval, labels: Tensor, options: BoundOptions
    ) -> Tensor: ...


@dataclass(frozen=True)
class Bound:
    """A way to bound a network, with all that other modules need to know of it.

    Attributes:
        title: in figures and tables.
        margins: R_cert (eq. 3), shaped like the epsilons; +inf where anything is not finite.
            It need not be monotone in epsilon.
        box_logits: upper bounds of f_i - f_y over boxes, (B, classes).
        robust_logits: upper bounds of f_i - f_y over balls, (B, classes), as a training loss
            sees them: this bound's alone, even where `margins` takes the lesser of two.
        proof: how its certificates are proved.
    """

    title: str
    margins: OverBalls
    box_logits: OverBoxes
    robust_logits: OverBalls
    proof: Proof


BOUNDS: dict[str, Bound] = {
    "ibp": Bound("IBP", ibp.margins, ibp.box_logits, ibp.robust_logits, Proof.INTERVAL),
    "crown-ibp": Bound(
        "CROWN-IBP", crown.margins, crown.box_logits, crown.robust_logits, Proof.LINEAR
    ),
}


def bound_named(name: str) -> Bound:
    """The bound of that name.

    Raises:
        UserError: there is none.
    """
    if name not in BOUNDS:
        raise UserError(f"bound {name!r} is not one of {', '.join(BOUNDS)}")
    return BOUNDS[name]
