"""Doubts about a run that is too short, and advice after one that has learnt almost nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ibpcore.certification.metrics import near_chance
from ibpcore.data.batches import batches_per_epoch
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.presets import EXPRESSIVE
from ibpcore.wording import counted

FEW_STEPS, FEW_ADAPTIVE_STEPS = 400, 80
"""Steps of the warm-up below which runs on the digits and MNIST ended near chance or certified
almost nothing: with the scheduled epsilon for every image, and with each image's own radius."""
SHARE_AFTER = 0.2
"""Share of the epochs after the warm-up, up to which that leaves too little time."""
LOW_RATE = 1e-3
"""Learning rate below which a higher one brought short runs of narrow networks away from chance."""
LITTLE_ACR = 0.02
LOOSE_ACR = 0.5
"""Share of the accuracy below which an ACR shows that the attack in a loss outweighs its bounds."""
TOWARDS_BOUNDS = {
    **dict.fromkeys(EXPRESSIVE, "a larger --ibp-weight than {ibp_weight:g}"),
    **dict.fromkeys(("sabr", "staps"), "a larger --box-size than {box_size:g}"),
    "taps": "a smaller --taps-weight than {taps_weight:g}",
}
"""The setting of a method with attacks that gives its bounds more weight."""


def doubts(config: TrainConfig, images: int) -> Iterator[str]:
    """What is to be said before a new run on so many training images, if its warm-up is too short.

    Nothing is said of a run from a saved model, which has learnt already.
    """
    if config.method == "standard" or config.start is not None:
        return
    first, last = config.warmup
    left, steps = config.epochs - last, batches_per_epoch(images, config.batch_size)
    warm = steps * (last - first + 1)
    preset = make_config(config.dataset, config.method)
    usual = (
        f"the preset of the paper has {preset.epochs} epochs, with the warm-up"
        f" {span(preset.warmup)}"
    )
    enough = FEW_ADAPTIVE_STEPS if config.adaptive else FEW_STEPS
    if config.schedule != "none" and warm < enough:
        yield (
            f"note: epsilon grows to epsilon_max within {counted(last - first + 1, 'epoch')}"
            f" ({counted(warm, 'step')}): expect a low accuracy, or few certificates; {usual}"
        )
    elif left <= SHARE_AFTER * config.epochs:
        yield (
            f"note: {counted(config.epochs, 'epoch')} leave {counted(left, 'epoch')} after the"
            f" warm-up, at the full epsilon: expect a low accuracy; {usual}"
        )


def advice(config: TrainConfig, summary: dict[str, Any], classes: int) -> Iterator[str]:
    """What to try after a run whose accuracy is near chance, or that certifies almost nothing."""
    accuracy, acr = summary["accuracy"], summary["acr"]
    bounded = config.method != "standard"
    tries = [f"more --epochs than {config.epochs}"]
    if bounded:
        tries += [f"a longer --warmup than {span(config.warmup)}", "a smaller --epsilon-max"]
    else:
        tries.append(f"a smaller --learning-rate than {config.learning_rate:g}")
    if near_chance(accuracy, classes):
        if bounded and config.learning_rate < LOW_RATE:
            tries.append(f"a larger --learning-rate than {config.learning_rate:g}")
        if bounded and config.kappa < 1:
            tries.append(f"a larger --kappa than {config.kappa:g}")
        if bounded and not (config.adaptive or config.random_radii):
            tries.append("--adaptive")
        chance = f"{100 / classes:.3g} %"
        yield f"hint: the accuracy is near that of chance, {chance}; try {_any_of(tries)}"
    elif acr < LITTLE_ACR and bounded:
        tries += _towards_bounds(config)
        if config.kappa > 0:
            tries.append(f"a smaller --kappa than {config.kappa:g}")
        yield f"hint: almost nothing is certified; try {_any_of(tries)}"
    elif acr < LOOSE_ACR * accuracy:
        for setting in _towards_bounds(config):
            yield (
                f"hint: the bounds are loose, with an ACR of {100 * acr:.1f} % at an accuracy of"
                f" {100 * accuracy:.1f} %; try {setting}, or certify with a tighter --bound"
            )


def _any_of(tries: Sequence[str]) -> str:
    return f"{', '.join(tries[:-1])}, or {tries[-1]}"


def _towards_bounds(config: TrainConfig) -> Iterator[str]:
    if config.method in TOWARDS_BOUNDS:
        yield TOWARDS_BOUNDS[config.method].format(**config.to_dict())


def span(epochs: tuple[int, int]) -> str:
    """Epochs as options write them."""
    return f"{epochs[0]}:{epochs[1]}"
