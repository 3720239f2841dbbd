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
BEFORE_FASTIBP = {"regularizer": 0.0, "schedule": "linear"}
ONE_STEP = {"attack_steps": 1, "attack_step_size": 10.0}
LATENT_STEPS = {"attack_steps": 10, "attack_step_size": 0.4, "attack_restarts": 3}

METHOD_PRESETS: dict[str, dict[str, Any]] = {
    "standard": {**ONE_CYCLE, "kappa": 1.0},
    "ibp": {**ADAM_STEPS, **BEFORE_FASTIBP, "kappa": 0.5, "initial_kappa": 1.0},
    "fastibp": ADAM_STEPS,
    "crown-ibp": ADAM_STEPS,
    "acert": {**ONE_CYCLE, "adaptive": True},
    "random-ibp": {**ONE_CYCLE, "random_radii": True},
    "sabr": ADAM_STEPS,
    "mtl-ibp": {**ADAM_STEPS, **ONE_STEP},
    "cc-ibp": {**ADAM_STEPS, **ONE_STEP},
    "exp-ibp": {**ADAM_STEPS, **ONE_STEP},
    "taps": {**ADAM_STEPS, **LATENT_STEPS},
    "staps": {**ADAM_STEPS, **LATENT_STEPS},
}
"""The settings of each method for all data sets, as published, except for the initialisation of
IBP and CROWN-IBP: from that of their papers, bounds explode with batch norm."""

BOUNDED = tuple(name for name in METHOD_PRESETS if name != "standard")
"""Methods with a robust loss."""
IBP_ALONE = ("ibp", "fastibp", "acert", "random-ibp")
"""Methods whose robust loss is that of the bounds alone."""
EXPRESSIVE = ("mtl-ibp", "cc-ibp", "exp-ibp")
SPLIT = ("taps", "staps")
"""Methods that attack a part of the network."""
ATTACKED = ("sabr", *EXPRESSIVE, *SPLIT)
NOT_MEANS = ("exp-ibp", *SPLIT)
"""Methods whose loss is not a mean over samples, so that no batch is split (`accumulate`)."""
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "initial_kappa": BOUNDED,
    "train_epsilon_factor": BOUNDED,
    "box_size": ("sabr", "staps"),
    "relu_shrinkage": ("sabr", *SPLIT),
    "ibp_weight": EXPRESSIVE,
    "classifier_size": SPLIT,
    "taps_weight": SPLIT,
    "attack_steps": ATTACKED,
    "attack_step_size": ATTACKED,
    "attack_restarts": ATTACKED,
    "attack_scale": EXPRESSIVE,
    "loss_fusion": ("crown-ibp",),
    "train_bound": (*IBP_ALONE, *EXPRESSIVE),
}
"""Settings that only these methods use."""

# Our choice for the digits: ten steps from three starts take several times as long and train no
# better.
SHORT_ATTACKS = {"attack_steps": 2, "attack_step_size": 2.0, "attack_restarts": 1}
PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    # Our choice: at the published 0.5 the product of the losses forgets the bounds once the attack
    # fails, in most seeds.
    ("digits", "exp-ibp"): {"ibp_weight": 0.7},
    # Our choice: with the linear schedule one of three seeds lost its radii, with the smoothed one
    # none. On the digits the smoothed one lost them with every seed.
    ("mnist", "ibp"): {"schedule": "smoothed"},
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
    ("digits", "taps"): SHORT_ATTACKS,
    ("digits", "staps"): SHORT_ATTACKS,
    # Mao et al. 2023, commands in CTBench (Mao et al. 2025), for the same epsilons. A step there
    # is 2 max(0.2, 2 / steps) of the half width of a latent box.
    ("mnist", "taps"): {
        **{"classifier_size": 2, "taps_weight": 4.0, "l1": 0.0},
        **{"attack_steps": 5, "attack_step_size": 0.8},
    },
    ("mnist", "staps"): {"box_size": 0.6, "taps_weight": 4.0, "l1": 1e-5},
    ("cifar10", "taps"): {"taps_weight": 2.0, "l1": 0.0},
    ("cifar10", "staps"): {"box_size": 0.9, "taps_weight": 2.0, "l1": 0.0},
    ("tinyimagenet", "taps"): {
        **{"taps_weight": 8.0, "kappa": 0.3, "l1": 5e-5},
        **{"attack_steps": 1, "attack_step_size": 4.0},
    },
    ("tinyimagenet", "staps"): {
        **{"box_size": 0.6, "taps_weight": 4.0, "l1": 5e-5},
        **{"attack_steps": 1, "attack_step_size": 4.0},
    },
}
"""Published settings for a data set and a method that differ from both presets, and our choices for
the digits and MNIST."""
