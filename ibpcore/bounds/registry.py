"""The bounds by name. To add one, write a module here and add an entry to `BOUNDS`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from ibpcore.bounds import alpha_crown, crown, crown_ibp, ibp
from ibpcore.bounds.chunking import backward_chunk_size, crown_chunk_size
from ibpcore.bounds.lanes import OverBoxes, lane_margins
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions
from ibpcore.errors import UserError


class Proof(Enum):
    """How `ibpcore.certification.soundness` recomputes a bound with all rounding errors."""

    INTERVAL = "interval arithmetic"
    LINEAR = "linear bounds over interval arithmetic"
    LINEAR_THROUGHOUT = "linear bounds, over inner intervals that linear bounds narrowed"


class OverBalls(Protocol):
    """Computes bounds over l-infinity balls, without checking its arguments.

    Args:
        images: (B, C, H, W) in pixel units.
        labels: (B,) int64.
        epsilons: (B,) in pixel units; for margins also (K, B).
    """

    def __call__(
        self,
        network: FoldedNetwork,
        images: Tensor,
        labels: Tensor,
        epsilons: Tensor,
        options: BoundOptions,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Bound:
    """A method of bounding networks, with everything that other modules need to use it.

    Attributes:
        title: its name in figures and tables.
        margins: R_cert (eq. 3), shaped like the epsilons; +inf where anything is not finite.
            It need not be monotone in epsilon.
        box_logits: upper bounds on f_i - f_y over boxes, (B, classes); +inf as above.
        robust_logits: upper bounds on f_i - f_y over balls, (B, classes), for training losses:
            by this bound alone, even where `margins` takes the smaller of two.
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
        "CROWN-IBP",
        partial(lane_margins, crown_ibp.box_logits, backward_chunk_size),
        crown_ibp.box_logits,
        crown_ibp.robust_logits,
        Proof.LINEAR,
    ),
    "crown": Bound(
        "CROWN",
        partial(lane_margins, crown.box_logits, crown_chunk_size),
        crown.box_logits,
        crown.robust_logits,
        Proof.LINEAR_THROUGHOUT,
    ),
    "alpha-crown": Bound(
        "optimised CROWN",
        partial(lane_margins, alpha_crown.box_logits, crown_chunk_size),
        alpha_crown.box_logits,
        alpha_crown.robust_logits,
        Proof.LINEAR_THROUGHOUT,
    ),
}
"""From the loosest, which costs least, to the tightest."""


def next_tighter(name: str) -> str | None:
    """The name of the bound that comes after this one; None if it is the tightest."""
    return dict(pairwise(BOUNDS)).get(name)


def bound_named(name: str) -> Bound:
    """The bound called `name`.

    Raises:
        UserError: there is no such bound.
    """
    if name not in [*BOUNDS]:  # a list, since a name may be unhashable
        raise UserError(f"bound {name!r} is not one of {', '.join(BOUNDS)}")
    return BOUNDS[name]
