"""The bounds by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ibpcore.bounds.crown import crown_box_logits, crown_margins
from ibpcore.bounds.ibp import box_logits, margins
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.errors import UserError

BOUNDS: dict[str, Callable[..., Tensor]] = {"ibp": margins, "crown-ibp": crown_margins}


def margins_by(bound: str) -> Callable[..., Tensor]:
    """The margins of a folded network by the bound of that name, see `ibpcore.bounds.ibp.margins`.

    Raises:
        UserError: there is no such bound.
    """
    if bound not in BOUNDS:
        raise UserError(f"bound {bound!r} is not one of {', '.join(BOUNDS)}")
    return BOUNDS[bound]


def _ibp(network: FoldedNetwork, box: Interval, labels: Tensor, elide: bool) -> Tensor:
    return box_logits(network, box, labels, elide=elide)


def _crown_ibp(network: FoldedNetwork, box: Interval, labels: Tensor, elide: bool) -> Tensor:
    crown, ibp = crown_box_logits(network, box, labels, elide=elide)
    return torch.where(crown.isfinite(), torch.minimum(crown, ibp), ibp)


BOXES: dict[str, Callable[[FoldedNetwork, Interval, Tensor, bool], Tensor]] = {
    "ibp": _ibp,
    "crown-ibp": _crown_ibp,
}
"""Upper bounds of f_i - f_y over boxes, by the names of `ibpcore.bounds.registry.BOUNDS`."""
