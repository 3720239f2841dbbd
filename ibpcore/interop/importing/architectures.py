"""The usual networks of certified training: what a state dict does not say about them.

A state dict gives all widths and kernel sizes, and the places of batch norm. It gives neither
strides and padding nor the places of ReLUs, which here follow every layer but the last.
"""

from __future__ import annotations

from typing import NamedTuple


class Convolution(NamedTuple):
    """Side of the square kernel, stride and padding, in pixels."""

    kernel: int
    stride: int
    padding: int


class Sequential(NamedTuple):
    """Convolutions, a flatten, and linear layers.

    Attributes:
        convolutions: one or more alternatives; the size of the images decides between them.
        linear: number of linear layers, at least 1.
    """

    convolutions: tuple[tuple[Convolution, ...], ...]
    linear: int = 2


class Residual(NamedTuple):
    """A convolution, three stages of residual blocks, a flatten, and two linear layers.

    Attributes:
        kernels: sides of the kernels in a block.
        grouped: whether convolutions in blocks have groups if their kernel is wider than 1.
        shortcut: name of a block's shortcut if it is not the identity.
        head: names of the first linear layer, its batch norm, and the last linear layer.
    """

    kernels: tuple[int, ...]
    grouped: bool
    shortcut: str
    head: tuple[str, str, str]


SAME, HALF, DOWN = Convolution(3, 1, 1), Convolution(3, 2, 1), Convolution(4, 2, 1)
SMALL_CNN = (Convolution(5, 2, 2), DOWN)
MEDIUM_CNN = (SAME, DOWN, DOWN)
START = (SAME, SAME, HALF)
"""The first convolutions of the networks of Shi et al.; the others are all SAME."""

ARCHITECTURES: dict[str, Sequential | Residual] = {
    "cnn3": Sequential((SMALL_CNN,), 1),
    "cnn4": Sequential((SMALL_CNN,)),
    "cnn5": Sequential((MEDIUM_CNN,)),
    "cnn6": Sequential(((*START, SAME),)),
    # For larger images some programs use stride 2 in the fifth convolution too.
    "cnn7": Sequential(((*START, SAME, SAME), (*START, SAME, HALF))),
    "cnn8": Sequential(((*START, *[SAME] * 3),)),
    "cnn9": Sequential(((*START, *[SAME] * 4),)),
    "cnn11": Sequential(((*START, *[SAME] * 6),)),
    "cnn13": Sequential(((*START, *[SAME] * 8),)),
    "crown-ibp2": Sequential(((DOWN, DOWN),)),
    "crown-ibp3": Sequential(
        tuple((*[Convolution(side, 1, 1)] * 2, Convolution(4, 4, 0)) for side in (3, 5))
    ),
    "crown-ibp4": Sequential(((SAME, DOWN, SAME, DOWN),), 3),
    "dm-small": Sequential(((Convolution(4, 2, 0), Convolution(4, 1, 0)),)),
    "dm-medium": Sequential(((Convolution(3, 1, 0), Convolution(4, 2, 0)) * 2,), 3),
    "dm-large": Sequential(
        ((*[Convolution(3, 1, 0)] * 2, Convolution(3, 2, 0), *[Convolution(3, 1, 0)] * 2),)
    ),
    "mlp3": Sequential(((),), 3),
    "mlp5": Sequential(((),), 5),
    "wide-resnet": Residual((3, 3), False, "downsample", ("dense", "dense_bn", "fc")),
    "resnext": Residual((1, 3, 1), True, "shortcut", ("linear1", "bn_dense", "linear2")),
}
"""`crown-ibp*` are the small networks of Zhang et al. by number of convolutions (their large one is
a cnn7), `dm-*` those of Gowal et al. without padding, and the residual ones those of Shi et al."""
