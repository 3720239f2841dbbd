"""The value type `Interval`: a box of tensors in midpoint-radius form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ibpcore.bounds.epsilons import without_text
from ibpcore.bounds.kernels import halved_
from ibpcore.bounds.options import check_clip
from ibpcore.errors import UserError, first_line


def as_radii(epsilon: Any, like: Tensor, name: str = "epsilon") -> Tensor:
    """`epsilon`, a number, text, tensor or list (...), as a tensor of `like`'s type and device.

    Raises:
        UserError: it holds something other than finite numbers of at least 0.
    """
    epsilon = without_text(epsilon, name)
    try:
        if isinstance(epsilon, Tensor) and (epsilon.is_complex() or epsilon.is_meta):
            raise TypeError(f"a tensor of type {epsilon.dtype} on {epsilon.device}")
        found = torch.as_tensor(epsilon, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{name} must be numbers in pixel units: {first_line(error)}") from None
    check_epsilon(found, name)
    return found


def check_epsilon(epsilon: Tensor, name: str = "epsilon") -> None:
    """Raises UserError unless every entry of `epsilon`, (...), is finite and not negative."""
    # `>= 0` is False for NaN, so one comparison and one finiteness test suffice.
    good = (epsilon >= 0) & epsilon.isfinite()
    if not bool(good.all()):
        first = float(epsilon[~good].flatten()[0])
        raise UserError(f"{name} must be finite and not negative, but holds {first}")


def at_least(value: float, dtype: torch.dtype) -> float:
    """The smallest number of `dtype` that is not below `value`."""
    if value in (0, 1):  # the ends of most ranges: a number of every type
        return float(value)
    rounded = torch.tensor(value, dtype=dtype)
    if float(rounded) < value:
        rounded = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=dtype))
    return float(rounded)


def outward(clip: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """The ends of the smallest range of numbers of `dtype` that contains the range `clip`."""
    return -at_least(-clip[0], dtype), at_least(clip[1], dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class Interval:
    """A box: all tensors x with |x - mid| <= rad, elementwise.

    It stores midpoint and radius instead of two ends, so that an affine map costs two products
    (eq. 16-17) and `rad >= 0` holds by construction.

    Attributes:
        mid: centre, any shape.
        rad: half width, the shape of `mid`.
    """

    mid: Tensor
    rad: Tensor

    @classmethod
    def ball(
        cls,
        images: Tensor,
        epsilon: Tensor | float | str,
        clip: tuple[float, float] | None = (0.0, 1.0),
        check: bool = True,
    ) -> Interval:
        """The l-infinity ball around `images`, intersected with the valid pixel range.

        Args:
            images: (B, ...) in pixel units.
            epsilon: radius in the same units, a scalar, a text such as "8/255", or (B,); or radii
                of pixels, of three or more dimensions, which broadcast against the images.
            clip: valid pixel range, whose ends are rounded outwards to the type of `images`;
                None for the paper's unclipped ball.
            check: validate the values of `epsilon` and `images`. On CUDA this synchronises
                the host, so callers that have validated them already, as numbers, pass False.

        Raises:
            UserError: `epsilon` has the wrong shape or is no number, negative, NaN or infinite;
                `clip` is no range; or `images` are not floating point or not within `clip`.
        """
        if check:
            check_images(images)
            check_clip(clip)
            check_range(images, clip)
            epsilon = as_radii(epsilon, images)
        epsilon = torch.as_tensor(epsilon, dtype=images.dtype, device=images.device)
        epsilon = _per_pixel(epsilon, images)
        if clip is None:
            return cls(mid=images, rad=epsilon.expand_as(images))
        low, high = outward(clip, images.dtype)
        lower, upper = (images - epsilon).clamp_min(low), (images + epsilon).clamp_max(high)
        rad = halved_(upper - lower)
        return cls(mid=lower + rad, rad=rad)

    @classmethod
    def from_bounds(cls, lower: Tensor, upper: Tensor) -> Interval:
        """The box of all x with lower <= x <= upper, widened by rounding errors, never narrowed.

        `.lower` and `.upper` may therefore lie beyond the given ends, by about an ulp. An
        infinite end has no midpoint and is refused.

        Args:
            lower, upper: (...) of at least one dimension, floating point, of one shape, type and
                device; in pixel units for a box of images.

        Raises:
            UserError: they are no such tensors, not finite, too far apart for their type, or
                `lower` is above `upper`.
        """
        check_images(lower, "lower")
        check_images(upper, "upper")
        if lower.shape != upper.shape or lower.dtype != upper.dtype or lower.device != upper.device:
            raise UserError(
                "lower and upper must have one shape, type and device, but are"
                f" {tuple(lower.shape)}, {lower.dtype}, {lower.device} and"
                f" {tuple(upper.shape)}, {upper.dtype}, {upper.device}"
            )
        if not bool((lower.isfinite() & upper.isfinite()).all()):
            raise UserError("lower and upper must be finite")
        if not bool((lower <= upper).all()):
            raise UserError("lower must not be above upper")
        mid = lower + (upper / 2 - lower / 2)  # upper - lower may overflow
        # Each difference is rounded by at most half an ulp, and exactly where it underflows.
        rad = torch.maximum(upper - mid, mid - lower) * (1 + torch.finfo(mid.dtype).eps)
        if not bool(rad.isfinite().all()):
            raise UserError(f"lower and upper are too far apart for {rad.dtype}")
        return cls(mid=mid, rad=rad)

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> None:
        """What torch calls where a plain layer is given an interval in place of a tensor."""
        raise UserError(
            "a plain torch module or function takes no Interval: call"
            " ibpcore.convert(module, in_shape) first"
        )

    @property
    def lower(self) -> Tensor:
        return self.mid - self.rad

    @property
    def upper(self) -> Tensor:
        return self.mid + self.rad

    @property
    def shape(self) -> torch.Size:
        return self.mid.shape

    def __repr__(self) -> str:
        shape, kind = tuple(self.shape), f"{self.mid.dtype}, {self.mid.device}"
        if self.mid.numel() == 0 or self.mid.is_meta:
            return f"Interval({shape}, {kind})"
        ends = self.lower.min(), self.upper.max(), self.rad.max()
        low, high, widest = (float(end.detach()) for end in ends)
        return f"Interval({shape} in [{low:.4g}, {high:.4g}], rad <= {widest:.4g}, {kind})"

    def __add__(self, other: Interval) -> Interval:
        _check_interval(other)
        return Interval(mid=self.mid + other.mid, rad=self.rad + other.rad)

    def __mul__(self, other: Interval) -> Interval:
        """The smallest interval that holds all products; their extremes are at corners."""
        _check_interval(other)
        a, b, both = self.rad * other.mid, self.mid * other.rad, self.rad * other.rad
        a, b = (a + b).abs(), (a - b).abs()
        up, down = torch.maximum(a + both, b - both), torch.maximum(b + both, a - both)
        return Interval(mid=self.mid * other.mid + (up - down) / 2, rad=(up + down) / 2)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """`function` applied to `mid` and `rad`, (...): for a reshape or an average."""
        return Interval(mid=function(self.mid), rad=function(self.rad))

    def monotone(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """The image under a non-decreasing `function` of tensors (...) (eq. 18-19)."""
        return between(function(self.lower), function(self.upper))


def between(lower: Tensor, upper: Tensor) -> Interval:
    """[lower, upper], both (...), up to rounding: for the rules, which take ends as they come.

    Nothing is checked: the caller ensures lower <= upper.
    """
    rad = (upper - lower) / 2
    return Interval(mid=lower + rad, rad=rad)


def _check_interval(other: Any) -> None:
    if not isinstance(other, Interval):
        raise UserError(
            f"an Interval is added to or multiplied by an Interval, not a {type(other).__name__}:"
            " Interval.from_bounds(x, x) is that of a tensor x"
        )


def _per_pixel(epsilon: Tensor, images: Tensor) -> Tensor:
    """`epsilon` in a shape that broadcasts against `images`, (B, ...)."""
    if epsilon.dim() == 1 and epsilon.shape == images.shape[:1]:
        return epsilon.view(-1, *[1] * (images.dim() - 1))
    pairs = zip(epsilon.shape[::-1], images.shape[::-1], strict=False)
    fits = epsilon.dim() <= images.dim() and all(a in (1, b) for a, b in pairs)
    if epsilon.dim() == 0 or (epsilon.dim() > 2 and fits):
        return epsilon
    raise UserError(
        f"epsilon must be a scalar, one value an image, ({images.shape[0]},), or values of pixels"
        f" in three or more dimensions, but has shape {tuple(epsilon.shape)} for images of shape"
        f" {tuple(images.shape)}"
    )


def check_box(box: Interval) -> None:
    """Raises UserError unless `box` holds finite images, (B, ...), and no radius below 0."""
    for part in (box.mid, box.rad):
        check_images(part)
    if box.mid.shape != box.rad.shape or box.mid.dtype != box.rad.dtype:
        raise UserError("the middle and the radius of a box must have one shape and type")
    good = box.mid.isfinite() & box.rad.isfinite() & (box.rad >= 0)
    if not bool(good.all()):
        raise UserError("a box must be finite, with no radius below 0")


def check_images(images: Any, name: str = "images") -> None:
    """Raises UserError unless `images` are a dense tensor (B, ...) of floating point numbers."""
    if not isinstance(images, Tensor):
        raise UserError(f"{name} must be a torch tensor, not {type(images).__name__}")
    if not images.is_floating_point() or images.dtype.itemsize < 2:
        # torch neither compares nor adds floats of 8 bits.
        raise UserError(
            f"{name} must be floating point, of 16 bits or more, but are {images.dtype}"
        )
    if images.dim() < 1 or images.layout is not torch.strided or images.is_meta:
        raise UserError(
            f"{name} must be (B, C, H, W) numbers in memory, but have shape {tuple(images.shape)}"
            f" and layout {images.layout} on {images.device}"
        )


def check_range(images: Tensor, clip: tuple[float, float] | None) -> None:
    """Raises UserError unless all `images` (B, ...) are finite and lie in the range `clip`."""
    low, high = clip if clip is not None else (-float("inf"), float("inf"))
    if not bool(((images >= low) & (images <= high) & images.isfinite()).all()):
        where = "be finite" if clip is None else f"lie in [{low:g}, {high:g}]"
        raise UserError(f"images must {where}; rescale them, or choose another clip range")
