"""The options of `ibp train` that are settings of `TrainConfig`."""

from __future__ import annotations

import click

from ibpcore.nn.initialization import INITIALIZATIONS
from ibpcore.training.methods import METHODS
from ibpcore.training.schedules import LEARNING_RATES, SCHEDULES
from ibpcore_cli.decorators import in_group, options
from ibpcore_cli.options import (
    at_least_one,
    ball_options,
    data_option,
    data_options,
    epsilon_max_option,
    radii_option,
    solver_options,
)
from ibpcore_cli.value_types import Epochs

method_option = in_group("Method")
optimisation_option = in_group("Optimisation")
network_option = in_group("Network")

training_data_options = options(
    data_options,
    data_option("--limit-train", type=at_least_one, help="Use only this many training images."),
    data_option(
        "--validation",
        type=int,
        help="Hold out this many training images for the choice of settings. Default: 0.",
    ),
    data_option("--flip/--no-flip", default=None, help="Flip images horizontally at random."),
    data_option("--padding", type=int, help="Shift images at random by up to this many pixels."),
)

method_options = options(
    method_option(
        "--method", type=click.Choice(list(METHODS)), help="Training method. Default: acert."
    ),
    method_option(
        "--kappa",
        type=float,
        help="Weight of the standard loss, from 0 to 1. Default: 1 for standard, 0.5 for ibp, 0"
        " for other methods.",
    ),
    method_option(
        "--initial-kappa",
        type=float,
        help="Value of kappa at epsilon 0, from which it changes to --kappa as epsilon grows."
        " Default: 1 for ibp, --kappa for other methods.",
    ),
    method_option(
        "--adaptive/--no-adaptive",
        default=None,
        help="Train each image at its own certified radius; any method but standard can."
        " Default: on for acert.",
    ),
    method_option(
        "--box-size", type=float, help="Size of the boxes of sabr, as a share of the ball."
    ),
    method_option(
        "--relu-shrinkage",
        type=float,
        help="Share by which sabr lowers the upper bounds of unstable neurons. Default: 0.",
    ),
    method_option(
        "--ibp-weight",
        type=float,
        help="Weight alpha of the IBP loss in mtl-ibp, cc-ibp and exp-ibp, from 0 to 1.",
    ),
    method_option(
        "--attack-steps", type=int, help="Steps of PGD in sabr, mtl-ibp, cc-ibp and exp-ibp."
    ),
    method_option(
        "--attack-step-size", type=float, help="Size of a step of PGD, as a share of the radius."
    ),
    method_option(
        "--attack-scale",
        type=float,
        help="Radius that mtl-ibp, cc-ibp and exp-ibp attack, as a multiple of the radius of"
        " training. Default: 1.",
    ),
    method_option(
        "--loss-fusion/--no-loss-fusion",
        default=None,
        help="Bound the loss of crown-ibp as one function, which is faster with many classes.",
    ),
)

radii_options = options(
    epsilon_max_option,
    radii_option(
        "--schedule",
        type=click.Choice(list(SCHEDULES)),
        help="Schedule of epsilon during the warm-up. Default: smoothed.",
    ),
    radii_option(
        "--warmup",
        type=Epochs(),
        help="First and last epoch of the growth of epsilon, such as 1:20. Default: the share of"
        " --epochs that it has in the paper.",
    ),
    solver_options,
    ball_options,
)

optimisation_options = options(
    optimisation_option("--epochs", type=int, help="Number of passes over the training images."),
    optimisation_option("--batch-size", type=int, help="Number of images in each step."),
    optimisation_option(
        "--learning-rate", type=float, help="Largest learning rate of the optimiser Adam."
    ),
    optimisation_option(
        "--learning-rate-schedule",
        type=click.Choice(list(LEARNING_RATES)),
        help="Schedule of the learning rate over the run.",
    ),
    optimisation_option(
        "--regularizer", type=float, help="Weight of the regularisers of the warm-up."
    ),
    optimisation_option("--l1", type=float, help="Weight of the L1 norm of the weights."),
    optimisation_option(
        "--gradient-clip", type=float, help="Largest norm of the gradient. Default: 10."
    ),
    optimisation_option(
        "--accumulate",
        type=int,
        metavar="PARTS",
        help="Bound each batch in this many parts, one after the other, to save memory; batch"
        " statistics are still those of the whole batch. Default: 1.",
    ),
    optimisation_option(
        "--compile/--no-compile",
        default=None,
        help="Compile interval passes, on CUDA into CUDA graphs. This takes a minute at the start"
        " and needs a C++ compiler or Triton. Default: off.",
    ),
    optimisation_option(
        "--tf32/--no-tf32", default=None, help="Train with TF32 on CUDA. Default: on."
    ),
    optimisation_option(
        "--seed", type=int, help="Random seed for weights, shuffling and augmentation. Default: 0."
    ),
)

network_options = options(
    network_option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="Train your own network instead of a CNN7: FUNCTION(in_shape, classes) returns a"
        " classifier of supported layers, for normalised images.",
    ),
    network_option("--width", type=int, help="Number of channels of the first convolution."),
    network_option("--hidden", type=int, help="Number of units of the hidden linear layer."),
    network_option(
        "--initialization",
        type=click.Choice(list(INITIALIZATIONS)),
        help="Initialisation of the weights; own keeps the weights that --model returns."
        " Default: kaiming for ibp, ibp for other methods.",
    ),
)

training_options = options(
    training_data_options, method_options, radii_options, optimisation_options, network_options
)
