"""The options of `ibp train` that are settings of `TrainConfig`."""

from __future__ import annotations

import click

from ibpcore.choices import (
    BOUNDS,
    COMPILE,
    INITIALIZATIONS,
    LEARNING_RATES,
    METHODS,
    PRESET_NAMES,
    SCHEDULES,
    WEIGHTS,
)
from ibpcore_cli.decorators import in_group, options
from ibpcore_cli.options import shared
from ibpcore_cli.value_types import ArchitectureType, Epochs, Values

method_option = in_group("Method")
optimisation_option = in_group("Optimisation")
network_option = in_group("Network")
held_out_option = in_group("Held-out images")

training_data_options = options(
    shared.data_options,
    shared.data_option("--limit-train", shared.at_least_one, "Use only this many training images."),
    shared.data_option(
        "--flip/--no-flip", bool, "Flip images horizontally at random.", default=None
    ),
    shared.data_option("--padding", int, "Shift images at random by up to this many pixels."),
)

method_options = options(
    method_option("--method", click.Choice(METHODS), "Training method. Default: acert."),
    method_option(
        "--preset",
        click.Choice(PRESET_NAMES),
        "Where settings come from that are not given: Table 4 of the paper and the authors'"
        " commands for each method; the best ones known for short runs of small networks; or the"
        " commands of CTBench or of Expressive Losses. Default: paper.",
    ),
    method_option(
        "--kappa",
        float,
        "Weight of the standard loss, from 0 to 1. Default: 1 for standard, 0.5 for ibp,"
        " mostly 0 for other methods.",
    ),
    method_option(
        "--initial-kappa",
        float,
        "Value of kappa at epsilon 0, from which it changes to --kappa as epsilon grows."
        " Default: 1 for ibp, --kappa for other methods.",
    ),
    method_option(
        "--adaptive/--no-adaptive",
        bool,
        "Train each image at its own certified radius; any method but standard and"
        " random-ibp can. Default: on for acert.",
        default=None,
    ),
    method_option(
        "--random-radii/--no-random-radii",
        bool,
        "Train each image that is classified correctly at a random radius up to epsilon; any"
        " method but standard and acert can. Default: on for random-ibp.",
        default=None,
    ),
    method_option(
        "--box-size", float, "Size of the boxes of sabr and staps, as a share of the ball."
    ),
    method_option(
        "--relu-shrinkage",
        float,
        "Share by which sabr, taps and staps lower the upper bounds of unstable neurons."
        " Default: 0.",
    ),
    method_option(
        "--ibp-weight",
        float,
        "Weight alpha of the IBP loss in mtl-ibp, cc-ibp and exp-ibp, from 0 to 1.",
    ),
    method_option(
        "--classifier-size",
        int,
        "Number of nonlinear layers that taps and staps attack, the last ones; IBP bounds those"
        " before them. Default: 2 for taps on mnist, 1 otherwise.",
    ),
    method_option(
        "--taps-weight",
        float,
        "Weight of the gradient of the attacked part of the loss of taps and staps, relative to"
        " that of the IBP loss.",
    ),
    method_option(
        "--attack-steps",
        int,
        "Steps of PGD in sabr, mtl-ibp, cc-ibp, exp-ibp, taps and staps.",
    ),
    method_option("--attack-step-size", float, "Size of a step of PGD, as a share of the radius."),
    method_option(
        "--attack-restarts",
        int,
        "Random starts of PGD. Default: 3 for taps and staps, but 1 on digits; 1 for"
        " other methods.",
    ),
    method_option(
        "--attack-scale",
        float,
        "Radius that mtl-ibp, cc-ibp and exp-ibp attack, as a multiple of the radius of"
        " training. Default: 1.",
    ),
    method_option(
        "--train-bound",
        click.Choice(BOUNDS),
        "Bound in the loss of ibp, fastibp, acert, random-ibp, mtl-ibp, cc-ibp or exp-ibp, and of"
        " certificates at the end; others than ibp are for small networks. Default: ibp.",
    ),
    method_option(
        "--loss-fusion/--no-loss-fusion",
        bool,
        "Bound the loss of crown-ibp as one function, which is faster with many classes.",
        default=None,
    ),
)

radii_options = options(
    shared.epsilon_max_option,
    shared.radii_option(
        "--train-epsilon-factor",
        float,
        "Train up to this multiple of --epsilon-max; certificates still go up to that. Default: 1.",
    ),
    shared.radii_option(
        "--schedule",
        click.Choice(SCHEDULES),
        "Schedule of epsilon during the warm-up. Default: smoothed.",
    ),
    shared.radii_option(
        "--warmup",
        Epochs(),
        "First and last epoch of the growth of epsilon, such as 1:20. Default: the share of"
        " --epochs that it has in the preset.",
    ),
    shared.claim_option(),
    shared.solver_options,
    shared.ball_options,
)

optimisation_options = options(
    optimisation_option("--epochs", int, "Number of passes over the training images."),
    optimisation_option("--batch-size", int, "Number of images in each step."),
    optimisation_option(
        "--learning-rate", float, "Largest learning rate of the optimiser AdamW.", "--lr"
    ),
    optimisation_option(
        "--learning-rate-schedule",
        click.Choice(LEARNING_RATES),
        "Schedule of the learning rate over the run.",
    ),
    optimisation_option(
        "--learning-rate-drops",
        Values(click.FLOAT, "list"),
        "Shares of the epochs after which the schedule multistep multiplies the learning rate by"
        " 0.2. Default: 0.7,0.85.",
    ),
    optimisation_option(
        "--weight-decay",
        float,
        "Weight decay of AdamW, for all parameters. Default: 0, which is Adam.",
    ),
    optimisation_option(
        "--beta2",
        float,
        "Decay of AdamW's mean of squared gradients, from 0 to below 1. Default: 0.999.",
    ),
    optimisation_option(
        "--average-last",
        float,
        "Deliver the mean of the weights over this share of the run, at its end. Default: 0, for"
        " the weights of the last step.",
        metavar="SHARE",
    ),
    optimisation_option(
        "--precise-batch-norm/--no-precise-batch-norm",
        bool,
        "Deliver batch norm statistics of all training images in place of running ones."
        " Default: off.",
        default=None,
    ),
    optimisation_option("--regularizer", float, "Weight of the regularisers of the warm-up."),
    optimisation_option("--l1", float, "Weight of the L1 norm of the weights."),
    optimisation_option("--gradient-clip", float, "Largest norm of the gradient. Default: 10."),
    optimisation_option(
        "--accumulate",
        int,
        "Bound each batch in this many parts, one after the other, to save memory; batch"
        " statistics are still those of the whole batch. Default: as many as the memory that is"
        " available needs, 1 if it can be.",
        metavar="PARTS",
    ),
    optimisation_option(
        "--compile",
        click.Choice(COMPILE),
        "Compile interval passes, on CUDA into CUDA graphs. This takes minutes at the start and"
        " needs a C++ compiler or Triton. Default: auto, where it saves more than it costs.",
    ),
    shared.threads_option,
    optimisation_option(
        "--tf32/--no-tf32", bool, "Train with TF32 on CUDA. Default: on.", default=None
    ),
    optimisation_option(
        "--seed", int, "Random seed for weights, shuffling and augmentation. Default: 0."
    ),
)

network_options = options(
    network_option(
        "--model",
        str,
        "Train your own network instead of a CNN7: FUNCTION(in_shape, classes) returns a"
        " classifier of supported layers, for normalised images.",
        metavar="MODULE:FUNCTION",
    ),
    network_option(
        "--architecture",
        ArchitectureType(),
        "Layers to train instead of a CNN7, such as 'conv 32 3x3 s2, bn, relu, linear 128, relu,"
        " linear'; they receive normalised images.",
        metavar="LAYERS",
    ),
    network_option("--width", int, "Number of channels of the first convolution."),
    network_option("--hidden", int, "Number of units of the hidden linear layer."),
    network_option(
        "--initialization",
        click.Choice(INITIALIZATIONS),
        "Initialisation of the weights; own keeps the weights that --model returns. Default: ibp.",
    ),
)

held_out_options = options(
    held_out_option(
        "--validation",
        int,
        "Hold out this many training images for the choice of settings and of weights. Default: 0.",
    ),
    held_out_option(
        "--measure-every",
        int,
        "Measure accuracy, ACR and ART on held-out images every so many epochs, and after the"
        " last. Default: a tenth of --epochs.",
        metavar="EPOCHS",
    ),
    held_out_option(
        "--select",
        click.Choice(WEIGHTS),
        "Deliver the weights of the last epoch, or of the one with the best ART on held-out"
        " images. Default: last.",
        "select_weights",
    ),
    held_out_option(
        "--patience",
        int,
        "Stop when ART on held-out images has not risen for this many epochs after the warm-up."
        " Default: train all epochs.",
        metavar="EPOCHS",
    ),
)

training_options = options(
    training_data_options,
    method_options,
    radii_options,
    optimisation_options,
    network_options,
    held_out_options,
)
