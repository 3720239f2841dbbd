"""IBP: margins and robust logits of a folded network."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.bounds import products
from ibpcore.bounds.chunking import chunk_size, in_chunks
from ibpcore.bounds.compilation import compiled_pass
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.kernels import sums_from
from ibpcore.bounds.network import FoldedNetwork, final_linear
from ibpcore.bounds.operators import Affine, Nonlinear, Observer, Operator, Relu, run
from ibpcore.bounds.options import BoundOptions
from ibpcore.precision import without_autocast


@without_autocast
def margins(
    network: FoldedNetwork, images: Tensor, labels: Tensor, epsilons: Tensor, options: BoundOptions
) -> Tensor:
    """R_cert(x, epsilon) (eq. 3) by IBP, (B,) or (K, B) like `epsilons`; see `OverBalls`."""
    if epsilons.numel() == 0:
        return torch.zeros_like(epsilons)
    function = _ibp_margins
    if network.compiled and not torch.is_grad_enabled():
        function = compiled_pass(_ibp_margins, images.is_cuda)

    def chunk(radii: Tensor, samples: slice) -> Tensor:
        every = samples == slice(None)
        some = (images, labels) if every else (images[samples], labels[samples])
        return function(network, *some, radii, options)

    radii = len(epsilons) if epsilons.dim() == 2 else 1
    size = chunk_size(network, images, options.elide, radii, options.budget)
    return in_chunks(chunk, epsilons, size)


def _ibp_margins(
    network: FoldedNetwork, images: Tensor, labels: Tensor, radii: Tensor, options: BoundOptions
) -> Tensor:
    """Margins in a single pass, (B,) or (K, B) like `radii`."""
    monitor = FinitenessMonitor()
    bounds = _robust_logits(network, images, labels, radii, options, monitor)
    margins = largest_difference(bounds, labels)
    total = bounds.sum(-1)
    if monitor.total is not None:
        total = total + monitor.total.view_as(total)
    # 0 * inf is NaN. What is not finite is an overflow, and must not count as certified.
    margins = torch.add(margins, total, alpha=0)
    return margins.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)


def differences(logits: Tensor, labels: Tensor) -> Tensor:
    """f_i - f_y for clean logits (B, classes): the robust logits at radius 0."""
    return logits - logits.gather(1, labels[:, None])


def clean_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """R(0), (B,), from clean logits (B, classes); NaN where a logit is not finite."""
    margins = largest_difference(differences(logits, labels), labels)
    return torch.add(margins, logits.sum(1), alpha=0)  # 0 * inf is NaN


def largest_difference(values: Tensor, labels: Tensor) -> Tensor:
    """max over i != y of differences f_i - f_y: (..., B, classes) and labels (B,) to (..., B)."""
    own = labels if values.dim() == 2 else labels.expand(values.shape[:-1])
    index = own.unsqueeze(-1)
    return values.scatter(-1, index, -torch.inf).amax(-1)


@without_autocast
def robust_logits(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
    observe: Observer | None = None,
) -> Tensor:
    """Upper bounds on f_i - f_y over the balls (eq. 6 minus f_y); 0 at i = y.

    Args:
        images, labels: (B, C, H, W) in pixel units, and (B,).
        epsilons: (B,) or (K, B) in pixel units.
        observe: called with each operator and its input interval, (K * B, ...).

    Returns:
        (B, classes) or (K, B, classes).
    """
    function = _robust_logits
    if network.compiled:
        function = compiled_pass(_robust_logits, False)
    return function(network, images, labels, epsilons, options, observe)


@without_autocast
def box_logits(
    network: FoldedNetwork,
    box: Interval,
    labels: Tensor,
    options: BoundOptions,
    observe: Observer | None = None,
) -> Tensor:
    """`robust_logits` over arbitrary boxes of images (B, C, H, W), (B, classes)."""
    function = _box_logits
    if network.compiled:
        function = compiled_pass(_box_logits, False)
    return function(network, box, labels, 1, options.elide, observe)


def finite_box_logits(
    network: FoldedNetwork, box: Interval, labels: Tensor, options: BoundOptions
) -> Tensor:
    """`box_logits`, but +inf for a sample if a bound was not finite anywhere; see `OverBoxes`."""
    monitor = FinitenessMonitor()
    return monitor.checked(box_logits(network, box, labels, options, monitor))


def _robust_logits(
    network: FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilons: Tensor,
    options: BoundOptions,
    observe: Observer | None,
) -> Tensor:
    repeats = len(epsilons) if epsilons.dim() == 2 else 1
    if repeats > 1:
        images = images.expand(repeats, *images.shape).flatten(0, 1)
    ball = Interval.ball(images, epsilons.flatten(), options.clip, check=False)
    bounds = _box_logits(network, ball, labels, repeats, options.elide, observe)
    return bounds if epsilons.dim() == 1 else bounds.unflatten(0, epsilons.shape)


def _box_logits(
    network: FoldedNetwork,
    box: Interval,
    labels: Tensor,
    repeats: int,
    elide: bool,
    observe: Observer | None,
) -> Tensor:
    """(K * B, classes) for boxes (K * B, ...), K = `repeats` groups with labels (B,)."""
    operators, last = final_linear(network, elide)
    found = run(operators, box, observe)
    if last is None:
        return separate(found, products.repeated(labels, len(found.mid)))
    return elided(last, found, labels).upper


def elided(last: Affine, hidden: Interval, labels: Tensor) -> Interval:
    """(K * B, classes) bounds on (W_i - W_y) h + b_i - b_y for h in `hidden`, (K * B, H).

    `labels` are (B,).
    """
    mid, rad = products.differences(hidden.mid, hidden.rad, last.weight, last.bias, labels)
    return Interval(mid=mid, rad=rad)


def separate(logits: Interval, labels: Tensor) -> Tensor:
    """(N, classes): upper end of f_i minus lower end of f_y (eq. 3), for labels (N,)."""
    index = labels[:, None]
    return (logits.upper - logits.lower.gather(1, index)).scatter(1, index, 0.0)


class FinitenessMonitor:
    """An observer that detects, per sample, infinities and NaN in inputs of nonlinear maps.

    A map may lose them, as sigmoid(-inf) is 0, so that an overflow inside the network could result
    in a finite margin. Only `interval_relu` loses none. One sum over the elements suffices, since
    an infinity or NaN makes it non-finite.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def __call__(self, operator: Operator, x: Interval) -> None:
        if not isinstance(operator, Nonlinear) or isinstance(operator, Relu):
            return
        with torch.no_grad():  # as a decorator it would split a compiled pass
            sums = sums_from(1, x.mid) + sums_from(1, x.rad)
            self.total = sums if self.total is None else self.total + sums

    def finite(self, bounds: Tensor) -> Tensor:
        """Where all of `bounds`, (..., classes), and of what was observed was finite, (...)."""
        found = bounds.isfinite().all(-1)
        return found if self.total is None else found & self.total.isfinite().view_as(found)

    def checked(self, bounds: Tensor) -> Tensor:
        """`bounds`, (..., classes), but +inf for a sample where something was not finite.

        -inf is an overflow: it must neither count as certified nor disappear in a maximum.
        """
        return torch.where(self.finite(bounds)[..., None], bounds, torch.inf)
