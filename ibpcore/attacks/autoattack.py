"""AutoAttack (Croce and Hein 2020) in boxes of any size, if it is installed."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ibpcore.attacks.pgd import Attack, Attacker
from ibpcore.bounds.ibp import clean_margins
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.network import FoldedNetwork, detached

HALF_WIDTH = 0.25
"""Half width of the box in AutoAttack's coordinates, exact in floating point and below 1/2."""


def autoattack_version() -> str | None:
    """Version of the package in the extra `attack`; None if it cannot be imported."""
    try:
        import pyautoattack
    except ImportError:
        return None
    return str(pyautoattack.__version__)


def autoattacker(network: FoldedNetwork, seed: int) -> Attacker:
    """AutoAttack's standard version; below four classes, only the two attacks that allow these.

    AutoAttack takes one epsilon for all images, but boxes here differ. So it works in
    coordinates in which all boxes are equal: in every pixel the midpoint is 1/2 and the half
    width `HALF_WIDTH`. Further channels of 0 and 1 hold the index of an image's box in
    binary; the perturbation is too small to change it.

    Raises:
        ImportError: AutoAttack is not installed.
    """
    from pyautoattack import AutoAttack

    # It warns of networks that make its results unreliable; here they only add to PGD's.
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    network = detached(network)

    def attack(box: Interval, labels: Tensor) -> Attack:
        bits = 2 ** torch.arange(len(labels).bit_length(), device=labels.device)
        numbers = torch.arange(len(labels), device=labels.device)
        channels = box.mid.shape[1]

        def pixels(encoded: Tensor) -> Tensor:
            rows = ((encoded[:, channels:, 0, 0] > 0.5) * bits).sum(1)
            position = (encoded[:, :channels].to(box.mid.dtype) - 0.5) / HALF_WIDTH
            return box.mid[rows] + box.rad[rows] * position

        digits = (numbers[:, None] & bits).ne(0)[:, :, None, None].float()
        middle = torch.full_like(box.mid, 0.5, dtype=torch.float32)
        encoded = torch.cat([middle, digits.expand(-1, -1, *box.mid.shape[2:])], 1)
        classes = network(box.mid[:1]).shape[1]
        # The losses of the other two attacks compare the true class with three others.
        few = {"attacks": ["apgd-ce", "square"], "version": "custom"} if classes < 4 else {}
        # It seeds torch's global generators.
        with torch.random.fork_rng([box.mid.device] if box.mid.is_cuda else []):
            adversary = AutoAttack(
                lambda x: network(pixels(x)).float(),
                eps=HALF_WIDTH,
                seed=seed,
                device=box.mid.device,
                **few,
            )
            for targeted in (adversary.apgd_targeted, adversary.fab):
                targeted.n_target_classes = min(9, classes - 1)
            found, _ = adversary.run_standard_evaluation(encoded, labels, batch_size=len(labels))
        images = pixels(found).clamp(box.lower, box.upper)
        return Attack(images, clean_margins(network(images), labels))

    return attack
