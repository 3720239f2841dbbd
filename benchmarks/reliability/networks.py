"""Small random networks of every layer with a proof rule.

A layer with a new rule gets an entry in `BLOCKS` (if it is not linear, in `NOT_LINEAR` too, and in
`NONLINEAR` of `inner_layers.py`), a rule in `exact.py`, and an entry in `EXECUTED` of
`execution.py`; tests compare all of them with the rules of proofs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ibpcore.nn import (
    IntervalAbs,
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv1d,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalDivide,
    IntervalFlatten,
    IntervalHardsigmoid,
    IntervalHardswish,
    IntervalHardtanh,
    IntervalIndexSelect,
    IntervalLayer,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalMaximum,
    IntervalMaxPool2d,
    IntervalMinimum,
    IntervalNormalize,
    IntervalPermute,
    IntervalPReLU,
    IntervalProduct,
    IntervalReLU,
    IntervalReshape,
    IntervalResidual,
    IntervalScale,
    IntervalSequential,
    IntervalSlice,
    IntervalSoftsign,
    IntervalSubtract,
    IntervalUpsample,
    IntervalZeroPad,
)

SIDE, LABEL = 4, 0
SHAPE = (2, SIDE, SIDE)
"""Of images and of the output of each block."""

Body = Callable[[], IntervalLayer]
"""Makes the inside of a block that holds others."""


def _chain(*layers: IntervalLayer) -> IntervalSequential:
    return IntervalSequential(*layers)


BLOCKS: dict[type[IntervalLayer], Sequence[Callable[[Body], IntervalLayer]]] = {
    IntervalConv2d: (
        lambda body: IntervalConv2d(2, 2, 3, padding=1),
        lambda body: IntervalConv2d(2, 2, (1, 3), padding=(0, 1), groups=2, bias=False),
        lambda body: IntervalConv2d(2, 2, 3, padding=2, dilation=2),
    ),
    IntervalConv1d: (
        lambda body: _chain(
            IntervalFlatten(2),
            IntervalConv1d(2, 2, 3, padding=2, dilation=2, bias=False),
            IntervalReshape(SHAPE),
        ),
    ),
    IntervalConvTranspose2d: (
        lambda body: IntervalConvTranspose2d(2, 2, 3, padding=1),
        lambda body: _chain(
            IntervalAvgPool2d(2), IntervalConvTranspose2d(2, 2, 2, stride=2, groups=2)
        ),
    ),
    IntervalMatMul: (lambda body: IntervalMatMul(SIDE, SIDE),),
    IntervalIndexSelect: (lambda body: IntervalIndexSelect([3, 1, 1, 0], 2),),
    IntervalProduct: (
        lambda body: IntervalProduct(IntervalConv2d(2, 2, 1), _chain(IntervalReLU())),
    ),
    IntervalLinear: (
        lambda body: _chain(IntervalFlatten(), IntervalLinear(32, 32), IntervalReshape(SHAPE)),
    ),
    IntervalBatchNorm: (lambda body: IntervalBatchNorm(2),),
    IntervalNormalize: (lambda body: IntervalNormalize([0.25, 0.5], [0.3, 0.7]),),
    IntervalScale: (
        lambda body: IntervalScale(2, [0.5, -2.0], [0.1, 0.2]),
        lambda body: IntervalScale(2, 0.3, -0.1),
    ),
    IntervalSubtract: (
        lambda body: IntervalSubtract(2, [0.5, -2.0]),
        lambda body: IntervalSubtract(2, torch.linspace(-1, 1, 32).view(SHAPE)),
    ),
    IntervalDivide: (
        lambda body: IntervalDivide(2, [-0.3, 3.0]),
        lambda body: IntervalDivide(2, torch.linspace(1, 2, SIDE)),
    ),
    IntervalReLU: (lambda body: IntervalReLU(),),
    IntervalLeakyReLU: (lambda body: IntervalLeakyReLU(0.1),),
    IntervalPReLU: (lambda body: IntervalPReLU(2), lambda body: IntervalPReLU(1)),
    IntervalHardtanh: (lambda body: IntervalHardtanh(-0.125, 0.75),),
    IntervalMaximum: (lambda body: IntervalMaximum(2, [-0.3, 0.1]),),
    IntervalMinimum: (lambda body: IntervalMinimum(2, 2.5),),
    IntervalAbs: (lambda body: IntervalAbs(),),
    IntervalHardsigmoid: (lambda body: IntervalHardsigmoid(),),
    IntervalHardswish: (lambda body: IntervalHardswish(),),
    IntervalSoftsign: (lambda body: IntervalSoftsign(),),
    IntervalMaxPool2d: (
        lambda body: _chain(IntervalMaxPool2d(2), IntervalUpsample((2, 2))),
        lambda body: _chain(IntervalMaxPool2d(3, 1), IntervalUpsample((2, 2))),
    ),
    IntervalAvgPool2d: (
        lambda body: _chain(IntervalAvgPool2d(2), IntervalUpsample((2, 2))),
        lambda body: _chain(IntervalAvgPool2d(3, 1), IntervalUpsample((2, 2))),
    ),
    IntervalUpsample: (lambda body: _chain(IntervalUpsample((3, 1)), _part(3, 1)),),
    IntervalFlatten: (lambda body: _chain(IntervalFlatten(), IntervalReshape(SHAPE)),),
    IntervalReshape: (
        lambda body: _chain(IntervalReshape((SIDE, 2, SIDE)), IntervalReshape(SHAPE)),
    ),
    IntervalPermute: (lambda body: IntervalPermute((0, 1, 3, 2)),),
    IntervalZeroPad: (lambda body: _chain(IntervalZeroPad((0, SIDE, 0, 0)), _part(1, 2)),),
    IntervalSlice: (lambda body: _chain(IntervalZeroPad((1, 0, 0, 0)), _part(1, 1)),),
    IntervalResidual: (
        lambda body: IntervalResidual(body()),
        lambda body: IntervalResidual(body(), body()),
    ),
    IntervalConcat: (
        lambda body: IntervalConcat([_chain(body(), IntervalConv2d(2, 1, 1)) for _ in range(2)]),
        lambda body: _chain(IntervalConcat([_chain()] * 3), IntervalConv2d(6, 2, 1, bias=False)),
    ),
}
"""For each layer, blocks with it that keep the shape (2, 4, 4) of a sample."""
NOT_MONOTONE = frozenset({IntervalAbs, IntervalHardswish, IntervalProduct})
NOT_LINEAR = NOT_MONOTONE | {
    *(IntervalReLU, IntervalLeakyReLU, IntervalPReLU, IntervalMaxPool2d),
    *(IntervalHardtanh, IntervalMaximum, IntervalMinimum, IntervalHardsigmoid, IntervalSoftsign),
}


def _part(down: int, right: int) -> IntervalSlice:
    """The first (2, 4, 4) numbers of an image, in steps."""
    return IntervalSlice([[0, 2, 1], [0, SIDE * down, down], [0, SIDE * right, right]])


def picker(generator: torch.Generator) -> Callable[[int], int]:
    """A function of n that returns a random number below n."""
    return lambda count: int(torch.randint(count, (), generator=generator))


def network(
    generator: torch.Generator,
    classes: int = 2,
    without: Collection[type[IntervalLayer]] = (),
) -> IntervalSequential:
    """A few random blocks, then linear layers, from (2, 4, 4) to `classes`; in evaluation.

    Args:
        generator: of the blocks, the weights and the statistics.
        classes: number of logits.
        without: layers that it does not have.
    """
    pick = picker(generator)
    kinds = [kind for kind in BLOCKS if kind not in without]

    def body(depth: int) -> IntervalSequential:
        def block() -> IntervalLayer:
            kind = kinds[pick(len(kinds))]
            if depth == 0 and kind in (IntervalResidual, IntervalConcat):
                kind = IntervalConv2d
            return BLOCKS[kind][pick(len(BLOCKS[kind]))](lambda: body(depth - 1))

        return _chain(*(block() for _ in range(pick(2 + 3 * depth) + 1)))

    pools = [kind for kind in (IntervalMaxPool2d, IntervalAvgPool2d) if kind in kinds]
    pool = pools[pick(len(pools))](2, stride=2)
    active = [IntervalReLU()] if IntervalReLU in kinds and pick(2) else []
    hidden, last = IntervalLinear(8, 5), IntervalLinear(5, classes)
    model = _chain(*body(1), pool, IntervalFlatten(), hidden, *active, last)
    scatter_parameters(model, generator)
    if pick(4) == 0:  # values between the last layers are subnormal, or nearly so
        rescale(hidden, 2.0**-130)
        rescale(last, 2.0**110)
    return model.eval()


@torch.no_grad()
def rescale(layer: IntervalLinear, factor: float) -> None:
    """Multiplies the parameters of a layer."""
    for parameter in layer.parameters():
        parameter.mul_(factor)


@torch.no_grad()
def scatter_parameters(model: IntervalSequential, generator: torch.Generator) -> None:
    """Fills the parameters and statistics of a model, see `scatter`; variances not negative."""
    for name, tensor in model.state_dict().items():
        kept = name.rpartition(".")[2] in ("mean", "std")  # of normalisation
        if tensor.is_floating_point() and not kept:
            scatter(tensor, generator)
            if name.endswith("var"):
                tensor.abs_().clamp_(2.0**-20, 2.0**20)


@torch.no_grad()
def scatter(tensor: Tensor, generator: torch.Generator) -> None:
    """Fills a tensor with numbers of very different size, in pairs that almost cancel."""
    size = tensor.numel()
    spread = torch.randint(-12, 13, (size,), generator=generator)
    values = torch.randn(size, generator=generator) * 2.0**spread
    pairs = torch.randperm(size, generator=generator)[: size // 2 * 2].view(2, -1)
    close = 1 + 2.0**-20 * torch.randn(pairs.shape[1], generator=generator)
    cancel = torch.rand(pairs.shape[1], generator=generator) < 0.5
    values[pairs[1]] = torch.where(cancel, -values[pairs[0]] * close, values[pairs[1]])
    tensor.copy_(values.view_as(tensor))


def image(generator: torch.Generator) -> Tensor:
    """A random image (1, 2, 4, 4) in [0, 1], some pixels of which are at the ends."""
    pixels = torch.rand(1, *SHAPE, generator=generator)
    return torch.where(torch.rand(pixels.shape, generator=generator) < 0.2, pixels.round(), pixels)
