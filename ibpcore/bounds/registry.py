"""The bounds by name. To add one, write a module here and enter it in `BOUNDS` and in
`ibpcore.choices`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from ibpcore.bounds import alpha_crown, crown, crown_ibp, ibp
from ibpcore.bounds.chunking import backward_chunk_size, chunk_size, crown_chunk_size
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.ladder import place
from ibpcore.bounds.lanes import Lanes, OverBoxes, box_margins, lane_margins
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions


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
        lanes: the number of boxes in a pass.
        proof: how its certificates are proved.
    """

    title: str
    margins: OverBalls
    box_logits: OverBoxes
    robust_logits: OverBalls
    lanes: Lanes
    proof: Proof

    def box_margins(
        self, network: FoldedNetwork, box: Interval, labels: Tensor, options: BoundOptions
    ) -> Tensor:
        """R_cert (eq. 3), (B,), over boxes (B, C, H, W) with labels (B,)."""
        return box_margins(self.box_logits, self.lanes, network, box, labels, options)


def _linear(
    title: str, over_boxes: OverBoxes, over_balls: OverBalls, lanes: Lanes, proof: Proof
) -> Bound:
    """A bound of which each ball is a box."""
    margins = partial(lane_margins, over_boxes, lanes)
    return Bound(title, margins, over_boxes, over_balls, lanes, proof)


def _boxes(network: FoldedNetwork, images: Tensor, budget: int | None) -> int:
    return chunk_size(network, images, True, 1, budget)


BOUNDS: dict[str, Bound] = {
    "ibp": Bound(
        "IBP", ibp.margins, ibp.finite_box_logits, ibp.robust_logits, _boxes, Proof.INTERVAL
    ),
    "crown-ibp": _linear(
        "CROWN-IBP",
        crown_ibp.box_logits,
        crown_ibp.robust_logits,
        backward_chunk_size,
        Proof.LINEAR,
    ),
    "crown": _linear(
        "CROWN",
        crown.box_logits,
        crown.robust_logits,
        crown_chunk_size,
        Proof.LINEAR_THROUGHOUT,
    ),
    "alpha-crown": _linear(
        "optimised CROWN",
        alpha_crown.box_logits,
        alpha_crown.robust_logits,
        crown_chunk_size,
        Proof.LINEAR_THROUGHOUT,
    ),
}
"""In the order of `ibpcore.choices.BOUNDS`."""


def bound_named(name: Any) -> Bound:
    """The bound called `name`.

    Raises:
        UserError: there is no such bound.
    """
    place(name)  # raises if it is unknown
    return BOUNDS[name]
