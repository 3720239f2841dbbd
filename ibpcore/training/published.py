"""Settings that other projects published for their best networks, and our own, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ibpcore.certification.formatting import as_text
from ibpcore.errors import UserError
from ibpcore.training.presets import EXPRESSIVE, ONE_STEP, PUBLISHED, SPLIT

Settings = dict[str, Any]
NEAR = 1e-3
"""Radii that differ by this share are the same: sources give them with three digits or more."""


class Source(NamedTuple):
    """Published settings.

    Attributes:
        citation: the paper and the repository.
        settings: by data set and radius of the certificates in pixel units, then by method. They
            replace the presets of the data set and the method.
    """

    citation: str
    settings: Mapping[tuple[str, float], Mapping[str, Settings]]


def published(source: str, dataset: str, method: str, epsilon: float | None) -> Settings:
    """The settings of a source for a data set and a method.

    Args:
        source: a name in `PRESET_SOURCES`.
        epsilon: radius of the certificates, in pixel units; None for the largest one published.

    Raises:
        UserError: the source has none; the message names those that it has.
    """
    settings = PRESET_SOURCES[source].settings
    radii = sorted(radius for name, radius in settings if name == dataset)
    if not radii:
        known = ", ".join(dict.fromkeys(name for name, _ in settings))
        raise UserError(f"preset {source} has no settings for {dataset}, only for {known}")
    radius = radii[-1] if epsilon is None else min(radii, key=lambda x: abs(x - epsilon))
    if epsilon is not None and abs(radius - epsilon) > NEAR * radius:
        known, other = ", ".join(map(as_text, radii)), as_text(epsilon)
        raise UserError(
            f"preset {source} has settings for {dataset} at epsilon_max {known}, not at {other}"
        )
    methods = settings[dataset, radius]
    if method not in methods:
        known = ", ".join(methods)
        raise UserError(f"preset {source} has no {method} for {dataset}, only {known}")
    return {"epsilon_max": radius, **methods[method]}


def _run(epochs: int, warmup: tuple[int, int], drops: tuple[int, int], batch_size: int) -> Settings:
    """A run whose source gives the drops of the learning rate in epochs."""
    shares = tuple(drop / epochs for drop in drops)
    columns = {"epochs": epochs, "warmup": warmup, "batch_size": batch_size}
    return {**columns, "learning_rate_drops": shares}


def _each(common: Settings, methods: dict[str, Settings]) -> dict[str, Settings]:
    return {method: common | own for method, own in methods.items()}


def _same(dataset: str, methods: tuple[str, ...]) -> dict[str, Settings]:
    """The settings of the source that are those of `--preset paper` too."""
    return {method: PUBLISHED[dataset, method] for method in methods}


def _attack(steps: int) -> Settings:
    """CTBench's PGD: a step is max(0.25, 2 / steps) of the radius."""
    size = max(0.25, 2 / steps)
    return {"attack_steps": steps, "attack_step_size": size, "attack_restarts": 3}


def _center(steps: int) -> Settings:
    """CTBench's PGD for the centers of SABR's boxes: a step is 0.2 of the radius."""
    return {"attack_steps": steps, "attack_step_size": 0.2, "attack_restarts": 3}


def _latent(steps: int, classifier_size: int, taps_weight: float) -> Settings:
    """CTBench's attack in the latent box: a step is 2 max(0.2, 2 / steps) of its half width."""
    attack = {"attack_steps": steps, "attack_step_size": 2 * max(0.2, 2 / steps)}
    return {**attack, "classifier_size": classifier_size, "taps_weight": taps_weight}


# In CTBench `regularizer` is fast-reg, `kappa` is 1 minus the weight of the robust loss,
# `relu_shrinkage` is 1 minus its ReLU shrinkage, and weights of every tenth step are averaged.
POPULATION = {"precise_batch_norm": True}
CTBENCH_MNIST = {**_run(70, (1, 20), (50, 60), 256), **POPULATION}
CTBENCH_CIFAR_2 = {**_run(160, (2, 81), (120, 140), 128), **POPULATION}
CTBENCH_CIFAR_8 = {**_run(240, (2, 121), (200, 220), 128), **POPULATION}
CTBENCH_TINY = {**_run(160, (2, 81), (120, 140), 128), **POPULATION, "regularizer": 0.2}
CTBENCH_TINY_SHORT = _run(80, (2, 21), (60, 70), 128)
MNIST_AVERAGE = {"average_last": 5 / 70}
CTBENCH = Source(
    "Mao et al., CTBench: A Library and Benchmark for Certified Training, 2024, arXiv 2406.04848;"
    " github.com/eth-sri/CTBench, scripts/examples",
    {
        ("mnist", 0.1): _each(
            {**CTBENCH_MNIST, "train_epsilon_factor": 2.0, "kappa": 0.3},
            {
                "fastibp": {"l1": 2e-6},
                "crown-ibp": {"l1": 5e-6, "loss_fusion": True},
                "sabr": {"l1": 1e-6, "box_size": 0.4, **_center(10)},
                "taps": {"l1": 2e-6, **_latent(10, 3, 4.0)},
                "staps": {"l1": 5e-6, "box_size": 0.4, **_latent(10, 1, 4.0)},
                "mtl-ibp": {"l1": 1e-5, "ibp_weight": 0.02, **_attack(10), **MNIST_AVERAGE},
                "cc-ibp": {"l1": 1e-5, "ibp_weight": 0.02, **_attack(10), **MNIST_AVERAGE},
                "exp-ibp": {"l1": 1e-5, "ibp_weight": 0.02, **_attack(10), **MNIST_AVERAGE},
            },
        ),
        ("mnist", 0.3): _each(
            CTBENCH_MNIST,
            {
                "fastibp": {"l1": 2e-6, "kappa": 0.3},
                "crown-ibp": {"l1": 1e-6, "kappa": 0.3, "loss_fusion": True},
                "sabr": {"l1": 2e-6, "box_size": 0.9, **_center(5)},
                "taps": {"train_epsilon_factor": 4 / 3, **PUBLISHED["mnist", "taps"]},
                "staps": PUBLISHED["mnist", "staps"],
                "mtl-ibp": {"l1": 1e-6, "ibp_weight": 0.5, **_attack(1), **MNIST_AVERAGE},
            },
        ),
        ("cifar10", 2 / 255): _each(
            CTBENCH_CIFAR_2,
            {
                "fastibp": {"l1": 1e-6, "kappa": 0.2},
                "crown-ibp": {"l1": 3e-6, "loss_fusion": True},
                "sabr": {
                    **{"l1": 1e-6, "box_size": 0.1, "relu_shrinkage": 0.2, **_center(5)},
                    "train_epsilon_factor": 1.5,
                },
                "taps": {"l1": 2e-6, "relu_shrinkage": 0.2, **_latent(8, 5, 4.0)},
                "staps": {
                    **{"l1": 1e-6, "box_size": 0.1, "relu_shrinkage": 0.2, **_latent(8, 1, 2.0)},
                    "precise_batch_norm": False,
                },
                "mtl-ibp": {
                    **{"l1": 3e-6, "kappa": 0.1, "ibp_weight": 0.01, "attack_scale": 2.0},
                    **{**_attack(1), "average_last": 10 / 160},
                },
            },
        ),
        ("cifar10", 8 / 255): _each(
            CTBENCH_CIFAR_8,
            {
                "fastibp": {},
                "crown-ibp": {"loss_fusion": True},
                "sabr": {"box_size": 0.9, **_center(5)},
                **_same("cifar10", SPLIT),
                "mtl-ibp": {"ibp_weight": 0.6, **_attack(1), "average_last": 15 / 240},
            },
        ),
        ("tinyimagenet", 1 / 255): _each(
            CTBENCH_TINY,
            {
                "fastibp": {"l1": 1e-5},
                "crown-ibp": {"l1": 2e-5, "loss_fusion": True, "average_last": 10 / 160},
                "sabr": {"l1": 5e-5, "box_size": 0.4, **_center(1)},
                **_same("tinyimagenet", SPLIT),
                "mtl-ibp": {
                    **{"l1": 5e-5, "kappa": 0.3, "ibp_weight": 0.05, "attack_scale": 1.5},
                    **{**_attack(1), "average_last": 10 / 160},
                },
                "cc-ibp": {
                    **{"l1": 5e-5, "kappa": 0.3, "ibp_weight": 0.05},
                    **{**_attack(1), "average_last": 10 / 160},
                },
                "exp-ibp": {
                    **{**CTBENCH_TINY_SHORT, "l1": 1e-6, "ibp_weight": 0.4},
                    **{**_attack(1), "attack_restarts": 1},
                },
            },
        ),
    },
)
SMALL_STEPS = {"attack_steps": 8, "attack_step_size": 0.25}
EXPRESSIVE_LOSSES = Source(
    "De Palma et al., Expressive Losses for Verified Robustness via Convex Combinations, ICLR"
    " 2024, arXiv 2305.13991; github.com/alessandrodepalma/expressive-losses, README",
    {
        ("mnist", 0.1): _each(
            {**_run(70, (1, 20), (50, 60), 256), **ONE_STEP, "train_epsilon_factor": 2.0},
            {
                "mtl-ibp": {"ibp_weight": 0.01, "l1": 1e-5},
                "cc-ibp": {"ibp_weight": 0.1, "l1": 2e-6},
            },
        ),
        ("mnist", 0.3): _each(
            {**_run(70, (1, 20), (50, 60), 256), **ONE_STEP, "train_epsilon_factor": 1.334},
            _same("mnist", ("mtl-ibp", "cc-ibp")),
        ),
        ("cifar10", 2 / 255): _each(
            {**_run(160, (2, 81), (120, 140), 128), **SMALL_STEPS, "attack_scale": 2.1},
            {
                "mtl-ibp": {"ibp_weight": 0.004, "l1": 3e-6},
                "cc-ibp": {"ibp_weight": 0.01, "l1": 3e-6},
                "exp-ibp": {"ibp_weight": 0.095, "l1": 4e-6},
            },
        ),
        ("cifar10", 8 / 255): _each(
            {**_run(260, (2, 81), (180, 220), 128), **ONE_STEP},
            {
                "mtl-ibp": PUBLISHED["cifar10", "mtl-ibp"],
                "cc-ibp": {"ibp_weight": 0.5, "l1": 0.0},
                "exp-ibp": {"ibp_weight": 0.5, "l1": 0.0},
            },
        ),
        ("tinyimagenet", 1 / 255): _each(
            {**_run(160, (2, 81), (120, 140), 128), **ONE_STEP, "regularizer": 0.2},
            _same("tinyimagenet", EXPRESSIVE),
        ),
    },
)
# Small batches make more steps of a short run, and a small beta2 follows the gradients while
# epsilon grows. The regularisers of the warm-up change no result then, but cost time.
SHORT = {
    **{"learning_rate": 5e-3, "learning_rate_schedule": "onecycle", "regularizer": 0.0},
    **{"batch_size": 32, "beta2": 0.95, "width": 16, "hidden": 128},
}
TUNED: dict[str, Settings] = {"random-ibp": {}, "acert": {}, "fastibp": {}}
BEST = Source(
    "benchmarks/results/past-acert and presets of this repository, found at widths of 4 to 16",
    {
        ("digits", 0.1): _each(SHORT, TUNED),
        # All 60,000 images make enough steps of larger batches, which take less time.
        ("mnist", 0.4): _each({**SHORT, "batch_size": 64, "epochs": 8, "warmup": (1, 4)}, TUNED),
        ("cifar10", 8.8 / 255): _each(
            {**SHORT, "epochs": 15, "warmup": (1, 6), "padding": 0},
            TUNED | {"fastibp": {"kappa": 0.5}},
        ),
        ("tinyimagenet", 1 / 255): _each(
            {**SHORT, "epochs": 10, "warmup": (1, 4), "padding": 0}, TUNED
        ),
    },
)
PRESET_SOURCES: dict[str, Source] = {
    **{"best": BEST, "ctbench": CTBENCH},
    "expressive-losses": EXPRESSIVE_LOSSES,
}
