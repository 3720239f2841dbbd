"""Table 4 and the published settings of each method, as data."""

from __future__ import annotations

from typing import Any

from ibpcore.data.arrays import OWN


def _preset(
    epsilon_max: float, batch_size: int, epochs: int, warmup: tuple[int, int], **others: Any
) -> dict[str, Any]:
    columns = {"epsilon_max": epsilon_max, "batch_size": batch_size, "epochs": epochs}
    return {**columns, "warmup": warmup, **others}


PRESETS: dict[str, dict[str, Any]] = {
    # Table 4 and appendix B; the augmentation of the FastIBP code.
    "mnist": _preset(0.4, 128, 100, (1, 20), regularizer=0.5),
    "cifar10": _preset(8.8 / 255, 128, 200, (1, 80), regularizer=0.5, flip=True, padding=2),
    "tinyimagenet": _preset(
        1 / 255, 256, 200, (1, 80), regularizer=0.2, l1=1e-4, flip=True, padding=4
    ),
    # Our choice: small enough to train in a minute on two cores.
    "digits": _preset(0.1, 32, 30, (1, 12), regularizer=0.5, width=16, hidden=128),
    # Our choice: a cautious start for unknown images.
    "imagefolder": _preset(2 / 255, 128, 100, (1, 40), regularizer=0.5, flip=True, padding=4),
    # Without augmentation, since mirrored images may be of no class.
    OWN: _preset(2 / 255, 128, 100, (1, 40), regularizer=0.5),
}

ADAM_STEPS = {"learning_rate": 5e-4, "learning_rate_schedule": "multistep"}
ONE_CYCLE = {"learning_rate": 2e-3, "learning_rate_schedule": "onecycle"}
BEFORE_FASTIBP = {"initialization": "kaiming", "regularizer": 0.0, "schedule": "linear"}
ONE_STEP = {"attack_steps": 1, "attack_step_size": 10.0}

METHOD_PRESETS: dict[str, dict[str, Any]] = {
    "standard": {**ONE_CYCLE, "kappa": 1.0},
    "ibp": {**ADAM_STEPS, **BEFORE_FASTIBP, "kappa": 0.5, "initial_kappa": 1.0},
    "fastibp": ADAM_STEPS,
    # Not the Kaiming initialisation of its paper, from which bounds explode with batch norm.
    "crown-ibp": ADAM_STEPS,
    "acert": {**ONE_CYCLE, "adaptive": True},
    "sabr": ADAM_STEPS,
    "mtl-ibp": {**ADAM_STEPS, **ONE_STEP},
    "cc-ibp": {**ADAM_STEPS, **ONE_STEP},
    "exp-ibp": {**ADAM_STEPS, **ONE_STEP},
}
"""The settings of each method for all data sets, as published, except for CROWN-IBP's
initialisation."""

EXPRESSIVE = ("mtl-ibp", "cc-ibp", "exp-ibp")
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "box_size": ("sabr",),
    "relu_shrinkage": ("sabr",),
    "ibp_weight": EXPRESSIVE,
    "attack_steps": ("sabr", *EXPRESSIVE),
    "attack_step_size": ("sabr", *EXPRESSIVE),
    "attack_scale": EXPRESSIVE,
    "loss_fusion": ("crown-ibp",),
    "train_bound": ("ibp", "fastibp", "acert", *EXPRESSIVE),
}
"""Settings that only these methods use."""

PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    # Xu et al. 2020: it makes CROWN-IBP affordable with 200 classes.
    ("tinyimagenet", "crown-ibp"): {"loss_fusion": True},
    # Müller et al. 2023, commands in their repository, for each data set's largest epsilon.
    ("mnist", "sabr"): {"box_size": 0.6, "l1": 1e-6},
    ("cifar10", "sabr"): {"box_size": 0.7, "l1": 0.0},
    ("tinyimagenet", "sabr"): {"box_size": 0.4, "l1": 1e-6},
    # De Palma et al. 2024, commands in their repository, for the same epsilons; there are
    # none for Exp-IBP on MNIST.
    ("mnist", "mtl-ibp"): {"ibp_weight": 0.08, "l1": 1e-6},
    ("mnist", "cc-ibp"): {"ibp_weight": 0.3, "l1": 3e-6},
    ("cifar10", "mtl-ibp"): {"ibp_weight": 0.5, "l1": 1e-7},
    ("tinyimagenet", "mtl-ibp"): {"ibp_weight": 0.01, "l1": 5e-5},
    ("tinyimagenet", "cc-ibp"): {"ibp_weight": 0.01, "l1": 5e-5},
    ("tinyimagenet", "exp-ibp"): {"ibp_weight": 0.04, "l1": 5e-5},
}
"""Published settings for a data set and a method that differ from both presets."""
