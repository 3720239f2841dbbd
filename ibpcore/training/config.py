"""`TrainConfig`: a typed, validated configuration of a run."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, get_args, get_type_hints

import torch

from ibpcore.bounds.epsilons import without_text
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certificates import UNCHECKED
from ibpcore.certification.soundness.network import CLAIMS
from ibpcore.choices import COMPILE, MOST_THREADS, PRESET_NAMES, WEIGHTS
from ibpcore.errors import UserError
from ibpcore.nn.architectures import variants
from ibpcore.nn.initialization import INITIALIZATIONS
from ibpcore.roots import RootOptions
from ibpcore.training.presets import METHOD_PRESETS, NOT_MEANS, ONLY_FOR, PRESETS, PUBLISHED
from ibpcore.training.published import published
from ibpcore.training.schedules import LEARNING_RATES, SCHEDULES

DEFAULT_MODEL = "cnn7"
"""The built-in network, which needs no custom code."""
SIZES = ("width", "hidden")
"""Sizes of a CNN7; custom networks have none."""

STARTED = {"model": DEFAULT_MODEL, "architecture": None, "initialization": "own"}
"""Settings of a run that starts from a saved model, which has its own network."""
DIGEST = re.compile("[0-9a-f]{64}")

COUNTS = (
    *SIZES,
    *("epochs", "batch_size", "max_iterations", "candidates"),
    *("attack_steps", "attack_restarts", "classifier_size"),
    *("inspect_every", "image_size", "accumulate", "measure_every", "patience"),
)
NOTHING_HELD_OUT: dict[str, Any] = {
    **{"validation": 0, "measure_every": None, "select_weights": "last", "patience": None},
}
"""The settings of held-out images, with their values where there are none."""

LEFT_OUT = "none"
"""Stands in files for a setting that is left out, since TOML has no null."""

LEAST_XTOL, LEAST_RTOL = torch.finfo(torch.float32).tiny, 4 * torch.finfo(torch.float32).eps
TYPE_NAMES = {
    **{int: "a whole number", float: "a finite number"},
    **{bool: "true or false", str: "a string"},
}
LARGEST = 2**22
"""The largest value of any count, so that weights have fewer than 2**63 bytes."""
SHORT_NAMES = {"lr": "learning_rate", "eps": "epsilon_max", "epsilon": "epsilon_max"}
"""What settings are often called elsewhere."""
FORMER_SETTINGS = ("bfloat16",)
"""Settings that files of former versions name. This one affected which radii were tried, but
not the bounds there."""
RECORDED = ("extended_at",)
"""What a configuration says of a run that was resumed; it cannot be chosen."""


Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is allowed, and what a message says that it must be."""
UNIT: Rule = (lambda x: 0 <= x <= 1, "in [0, 1]")
SHARE: Rule = (lambda x: 0 < x <= 1, "above 0 and at most 1")
BELOW_ONE: Rule = (lambda x: 0 <= x < 1, "from 0 to below 1")
POSITIVE: Rule = (lambda x: x > 0, "above 0")
NOT_NEGATIVE: Rule = (lambda x: x >= 0, "not negative")
AT_LEAST_ONE: Rule = (lambda x: x >= 1, "at least 1")
RULES: dict[str, Rule] = {
    **dict.fromkeys(("epsilon_max", "box_size"), SHARE),
    **dict.fromkeys(("kappa", "initial_kappa", "ibp_weight", "average_last"), UNIT),
    **dict.fromkeys(("relu_shrinkage", "beta2"), BELOW_ONE),
    **dict.fromkeys(("learning_rate", "gradient_clip", "attack_step_size"), POSITIVE),
    **dict.fromkeys(("attack_scale", "taps_weight"), POSITIVE),
    **dict.fromkeys(("regularizer", "l1", "weight_decay", "validation"), NOT_NEGATIVE),
    **dict.fromkeys((*SIZES, "epochs", "limit_train", "limit_test", "image_size"), AT_LEAST_ONE),
    **dict.fromkeys(("attack_steps", "attack_restarts", "classifier_size"), AT_LEAST_ONE),
    **dict.fromkeys(("inspect_every", "measure_every", "patience", "accumulate"), AT_LEAST_ONE),
    "batch_size": (lambda x: x >= 2, "at least 2, for batch norm"),
    "threads": (lambda x: 1 <= x <= MOST_THREADS, f"from 1 to {MOST_THREADS}"),
    "padding": (lambda x: 0 <= x <= 1024, "from 0 to 1024"),
    "seed": (lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1"),
}
"""Of settings that are checked by themselves. One that is left out is None, which is allowed."""


@dataclass(frozen=True)
class TrainConfig:
    """All settings that determine a run's final weights and its test. Epsilons in pixel units.

    Attributes:
        dataset: a name in `ibpcore.data.sources.DATASETS`, or "own" for images in memory.
        method: a name in `ibpcore.training.methods.METHODS`.
        epsilon_max: upper limit of the certified radius.
        train_epsilon_factor: training goes up to this multiple of `epsilon_max`.
        kappa: weight of the standard loss, in [0, 1] (eq. 11).
        epochs, batch_size: length of the run.
        learning_rate: the largest learning rate of AdamW.
        learning_rate_schedule: a name in `ibpcore.training.schedules.LEARNING_RATES`.
        learning_rate_drops: shares of the run after which `multistep` lowers the rate.
        weight_decay: of AdamW, for all parameters; 0 is Adam.
        beta2: decay of AdamW's mean of squared gradients, in [0, 1).
        average_last: share of the run, at its end, over whose steps the delivered weights are
            averaged; 0 to deliver those of the last step.
        precise_batch_norm: deliver batch norm statistics of all training images, without
            augmentation, in place of running ones. Averaged weights always have them.
        schedule: a name in `ibpcore.training.schedules.SCHEDULES`, for epsilon.
        warmup: first and last epoch of the epsilon schedule, from 1, both included.
        regularizer: weight lambda of the warm-up regularisers at epsilon 0.
        l1: weight of the sum of |w| over the affine layers.
        gradient_clip: largest norm of the gradient.
        model: "cnn7", or a custom `package.module:build`, see `ibpcore.training.model`.
        architecture: the layers in place of a CNN7, see `ibpcore.nn.grammar`; None for none.
        width, hidden: size of the CNN7.
        start: digest of the saved model whose architecture and weights the run starts from, see
            `ibpcore.nn.checkpoint.fingerprint`; None for a new network.
        flip, padding: augmentation, see `ibpcore.data.batches.shuffled_batches`.
        solver, candidates, xtol, rtol, max_iterations: see `RootOptions`; None for its
            defaults, but with `tracked` for at most 4 passes over the radii that may be off by
            more than 1 % of epsilon and 4 % of themselves. 0 iterations are ACERT-fast.
        compile: "on" to compile the interval passes, on CUDA as CUDA graphs where they have no
            gradient, see `ibpcore.bounds.network.compiled`; "off" not to; "auto" to choose by
            sizes when a run starts, see `ibpcore.training.compiling`.
        tf32: on CUDA, train with TF32 matrix products and convolutions.
        elide: merge the last layer into the margin.
        clip: intersect the ball with the pixel range [0, 1].
        seed: of weights, order and augmentation.
        limit_train, limit_test: number of images used; None for all.
        validation: number of the used training images to hold out for model selection.
        image_size: side to which `imagefolder` resizes and crops.
        adaptive: train each sample at its own certified radius, as `acert` always does.
        random_radii: train each sample that is classified correctly at a radius drawn uniformly
            from 0 to the scheduled epsilon, as `random-ibp` always does.
        claim: what certificates of the test images prove, see
            `ibpcore.certification.certify.CertificationOptions`.
        initialization: a name in `ibpcore.nn.initialization.INITIALIZATIONS`.
        initial_kappa: kappa at epsilon 0, from which it moves to `kappa` as epsilon grows;
            None for a constant kappa.
        box_size: size of the boxes of SABR and STAPS relative to the ball, in (0, 1].
        relu_shrinkage: fraction by which SABR, TAPS and STAPS lower the upper ends of unstable
            neurons.
        ibp_weight: alpha of MTL-IBP, CC-IBP and Exp-IBP, in [0, 1].
        classifier_size: number of nonlinear layers that TAPS and STAPS attack, the last ones, see
            `ibpcore.bounds.network.split`; the layers before them are bounded by IBP.
        taps_weight: weight w of the gradient of TAPS's loss, relative to that of the IBP loss.
        attack_steps, attack_step_size, attack_restarts: of PGD in training; the size is a
            fraction of the radius, or of the half width of a latent box.
        attack_scale: radius that MTL-IBP, CC-IBP and Exp-IBP attack, as a multiple of the
            radius trained at.
        train_bound: a name in `ibpcore.bounds.registry.BOUNDS`, of the bound in the loss;
            adaptive radii, and certificates at the end, are by all bounds up to it.
        loss_fusion: bound CROWN-IBP's loss as one function instead of one logit per class.
        accumulate: number of parts into which the interval passes of a batch are split, run
            in sequence to save memory; statistics are those of the whole batch. None for one, but
            commands choose it by the memory that is available.
        threads: number of threads on the CPU, which changes the last digits of sums; None for as
            many as torch has.
        inspect_every: number of epochs between inspections of some training images, see
            `ibpcore.inspection.report`; None for no inspection. It changes no weights.
        measure_every: number of epochs between measurements of held-out images, see
            `ibpcore.training.selection`; None for a tenth of the epochs. It changes no weights.
        select_weights: "last" or "best": those after the last epoch, or after the one with the
            highest ART on held-out images.
        patience: number of epochs after the warm-up without a higher ART on held-out images
            that end the run; None to run all epochs.
        extended_at: the epochs after which a resumed run was given another number of epochs, and
            the learning rate began its schedule anew.
    """

    dataset: str
    method: str
    epsilon_max: float
    epochs: int
    batch_size: int
    learning_rate: float
    learning_rate_schedule: str
    warmup: tuple[int, int]
    kappa: float = 0.0
    train_epsilon_factor: float = 1.0
    learning_rate_drops: tuple[float, ...] = (0.7, 0.85)
    weight_decay: float = 0.0
    beta2: float = 0.999
    average_last: float = 0.0
    precise_batch_norm: bool = False
    schedule: str = "smoothed"
    regularizer: float = 0.5
    l1: float = 0.0
    gradient_clip: float = 10.0
    width: int = 64
    hidden: int = 512
    flip: bool = False
    padding: int = 0
    solver: str = "tracked"
    max_iterations: int | None = None
    candidates: int = 8
    xtol: float | None = None
    rtol: float | None = None
    compile: str = "auto"
    tf32: bool = True
    elide: bool = True
    clip: bool = True
    seed: int = 0
    validation: int = 0
    limit_train: int | None = None
    limit_test: int | None = None
    image_size: int | None = None
    adaptive: bool = False
    random_radii: bool = False
    initialization: str = "ibp"
    initial_kappa: float | None = None
    box_size: float = 0.4
    relu_shrinkage: float = 0.0
    ibp_weight: float = 0.5
    classifier_size: int = 1
    taps_weight: float = 4.0
    attack_steps: int = 8
    attack_step_size: float = 0.5
    attack_restarts: int = 1
    attack_scale: float = 1.0
    loss_fusion: bool = False
    inspect_every: int | None = None
    measure_every: int | None = None
    select_weights: str = "last"
    patience: int | None = None
    accumulate: int | None = None
    model: str = DEFAULT_MODEL
    start: str | None = None
    threads: int | None = None
    architecture: str | None = None
    claim: str = "real"
    train_bound: str = "ibp"
    extended_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        self._check_types(hints)
        self._check_choices()
        self._check_network()
        for name, (allowed, rule) in RULES.items():
            value, optional = getattr(self, name), types.NoneType in get_args(hints[name])
            good = value is None or allowed(value)
            self._check(good, name, rule + ", or left out" * optional)
        for name in COUNTS:
            count = getattr(self, name)
            self._check(count is None or count <= LARGEST, name, f"at most {LARGEST}")
        self._check_schedules()
        self._check_held_out()
        self._check_method()
        self.root_options(self.train_epsilon)  # raises if they are invalid
        for name, least in (("xtol", LEAST_XTOL), ("rtol", LEAST_RTOL)):
            value = getattr(self, name)
            self._check(value is None or value >= least, name, f"at least {least:g}, for float32")

    def _check_choices(self) -> None:
        for name, known in (
            ("dataset", PRESETS),
            ("method", METHOD_PRESETS),
            ("schedule", SCHEDULES),
            ("learning_rate_schedule", LEARNING_RATES),
            ("initialization", INITIALIZATIONS),
            ("claim", (UNCHECKED, *CLAIMS)),
            ("select_weights", WEIGHTS),
            ("compile", COMPILE),
            ("train_bound", BOUNDS),
        ):
            self._check(getattr(self, name) in known, name, f"one of {', '.join(known)}")

    def _check_network(self) -> None:
        good = self.model == DEFAULT_MODEL or is_function(self.model)
        self._check(good, "model", "cnn7 or PACKAGE.MODULE:FUNCTION")
        if self.architecture is not None:
            variants(self.architecture)  # raises if it is not in the grammar
            self._check(self.model == DEFAULT_MODEL, "model", "left out with an architecture")
        if self.start is not None:
            self._check(DIGEST.fullmatch(self.start), "start", "a SHA-256 digest, or left out")
            for name, value in STARTED.items():
                if getattr(self, name) != value:
                    raise UserError(f"{name} can be chosen for a new network only, not a saved one")

    def _check_schedules(self) -> None:
        rule = "above 0, and epsilon_max times it at most 1"
        self._check(0 < self.train_epsilon <= 1, "train_epsilon_factor", rule)
        drops = [0, *self.learning_rate_drops, 1]
        ordered = all(a < b for a, b in pairwise(drops))
        self._check(ordered, "learning_rate_drops", "ascending shares of the run between 0 and 1")
        ordered = 1 <= self.warmup[0] <= self.warmup[1] <= self.epochs
        self._check(ordered, "warmup", "FIRST:LAST with 1 <= FIRST <= LAST <= epochs")
        marks = [0, *self.extended_at, self.epochs + 1]
        self._check(marks == sorted(set(marks)), "extended_at", "ascending epochs of the run")

    def _check_held_out(self) -> None:
        for name, value in NOTHING_HELD_OUT.items():
            if self.validation == 0 and getattr(self, name) != value:
                raise UserError(f"{name} can be given only with held-out images: --validation")

    def _check_method(self) -> None:
        """The settings that a method forces, or cannot have."""
        bounded, own, drawn = self.method != "standard", self.adaptive, self.random_radii
        self._check(bounded or self.kappa == 1, "kappa", "1 for standard")
        self._check(bounded or not own, "adaptive", "off for standard")
        self._check(self.method != "acert" or own, "adaptive", "on for acert")
        self._check(self.method != "random-ibp" or drawn, "random_radii", "on for random-ibp")
        self._check(bounded or not drawn, "random_radii", "off for standard")
        rule = "off for acert" if self.method == "acert" else "off with adaptive radii"
        self._check(not (own and drawn), "random_radii", rule)
        whole = self.accumulate in (None, 1) or self.method not in NOT_MEANS
        rule = f"1 for {self.method}, whose loss is not a mean over samples"
        self._check(whole, "accumulate", rule)
        free = self.train_bound == "ibp" or self.method in ONLY_FOR["train_bound"]
        self._check(free, "train_bound", f"ibp for {self.method}")

    def _check(self, good: object, name: str, rule: str) -> None:
        if not good:
            raise UserError(f"{name} must be {rule}, but is {getattr(self, name)!r}")

    def _check_types(self, hints: Mapping[str, Any]) -> None:
        for name, hint in hints.items():
            value = getattr(self, name)
            if name == "warmup":
                good = isinstance(value, tuple) and [type(v) for v in value] == [int, int]
                rule = "two whole numbers"
            elif name == "extended_at":
                good = isinstance(value, tuple) and all(type(v) is int for v in value)
                rule = "whole numbers"
            elif name == "learning_rate_drops":
                good = isinstance(value, tuple) and all(type(v) in (float, int) for v in value)
                good, rule = good and all(map(is_finite, value)), "numbers"
            elif isinstance(hint, types.UnionType):
                kinds = get_args(hint)
                good = type(value) in ((*kinds, int) if float in kinds else kinds)
                good = good and (float not in kinds or value is None or is_finite(value))
                rule = f"{TYPE_NAMES[kinds[0]]}, or left out"
            elif hint is float:
                good = type(value) in (float, int) and is_finite(value)
                rule = "a finite number"
            else:
                good, rule = type(value) is hint, TYPE_NAMES[hint]
            self._check(good, name, rule)

    def root_options(self, epsilon: float) -> RootOptions:
        """How the radii to train at are found, up to a scheduled `epsilon`."""
        defaults: dict[str, Any] = {}
        if self.solver == "tracked" and epsilon > 0:
            defaults = {"max_iterations": 4}
            if self.xtol is None:
                defaults |= {"xtol": max(0.01 * epsilon, LEAST_XTOL), "rtol": 0.04}
        given = {name: getattr(self, name) for name in ("xtol", "rtol", "max_iterations")}
        given = {name: value for name, value in given.items() if value is not None}
        return RootOptions(self.solver, candidates=self.candidates, **{**defaults, **given})

    @property
    def train_epsilon(self) -> float:
        """The largest radius trained at, in pixel units."""
        return self.train_epsilon_factor * self.epsilon_max

    @property
    def bound_options(self) -> BoundOptions:
        """How the balls of training and of certificates are bounded."""
        return BoundOptions(self.train_bound, self.elide, (0.0, 1.0) if self.clip else None)

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, to be saved as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Reads JSON values, where tuples are lists.

        Raises:
            UserError: a value is missing, unknown or not allowed.
        """
        values = {name: value for name, value in values.items() if name not in FORMER_SETTINGS}
        check_names(values)
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        values = {**values, **lists}
        # Older files have no `adaptive`: it was not a separate setting.
        values = {"adaptive": values.get("method") == "acert", **values}
        # In older files, passes were compiled or not: true or false.
        if isinstance(values.get("compile"), bool):
            values["compile"] = "on" if values["compile"] else "off"
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"not a training configuration: {error}") from None


def is_finite(value: float) -> bool:
    """Whether `value` is finite as a float; integers beyond all floats are not."""
    return -sys.float_info.max <= value <= sys.float_info.max


def make_config(dataset: str, method: str, **overrides: Any) -> TrainConfig:
    """The preset of a data set and a method, with any values overridden.

    If `epochs` is overridden but `warmup` is not, the warm-up keeps its fraction of the run.
    `epsilon_max` may be a text, such as "8/255".

    Args:
        dataset, method: see `TrainConfig`.
        overrides: values of `TrainConfig`; and `preset`, a name in `PRESET_NAMES`, where the
            settings come from that are not given; "paper" if it is left out.

    Raises:
        UserError: a name is unknown, a value is not allowed, or the preset has no settings for
            the data set, the method and `epsilon_max`.
    """
    preset = overrides.pop("preset", PRESET_NAMES[0])
    for key, name, known in (
        ("dataset", dataset, PRESETS),
        ("method", method, METHOD_PRESETS),
        ("preset", preset, PRESET_NAMES),
    ):
        if name not in [*known]:  # a list, since a name may be unhashable
            raise UserError(f"{key} must be one of {', '.join(known)}, but is {name!r}")
    if recorded := [name for name in RECORDED if overrides.get(name)]:
        raise UserError(f"{recorded[0]} cannot be chosen: it is what a resumed run records")
    if not is_cnn7(overrides) and (sizes := [name for name in SIZES if name in overrides]):
        raise UserError(f"{' and '.join(sizes)} can be chosen for a new cnn7 only")
    if "epsilon_max" in overrides:
        overrides["epsilon_max"] = without_text(overrides["epsilon_max"], "epsilon_max")
    usual = PRESETS[dataset] | METHOD_PRESETS[method]
    if preset == PRESET_NAMES[0]:
        usual |= PUBLISHED.get((dataset, method), {})
    else:
        epsilon = overrides.get("epsilon_max")
        number = epsilon if type(epsilon) in (float, int) else None  # others are refused below
        usual |= published(preset, dataset, method, number)
    if overrides.get("start") is not None:
        usual |= STARTED
    values = {**usual, **overrides, "dataset": dataset, "method": method}
    # Numbers of epochs outside these limits are rejected below.
    counted = type(values["epochs"]) is int and 1 <= values["epochs"] <= LARGEST
    if "warmup" not in overrides and counted:
        first, last = usual["warmup"]
        last = round(last * values["epochs"] / usual["epochs"])
        values["warmup"] = (first, max(first, last))
    return TrainConfig.from_dict(values)


def kinds_of(name: str) -> tuple[type, ...]:
    """The types of a setting's values; NoneType is one of them if it may be left out."""
    hint = get_type_hints(TrainConfig)[name]
    return get_args(hint) or (hint,)


def value_in_file(name: str, value: Any) -> Any:
    """The value of a setting that a file gives: None for `LEFT_OUT` if it may be left out."""
    return None if value == LEFT_OUT and types.NoneType in kinds_of(name) else value


def check_names(names: Iterable[str]) -> None:
    """Raises UserError for the first of the `names` that is no setting; it says what is close."""
    known = [field.name for field in fields(TrainConfig)]
    for name in names:
        if name not in known:
            short = [SHORT_NAMES[name]] if name in SHORT_NAMES else []
            close = short or get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "the names are those of a config.json"
            raise UserError(f"unknown setting {name}; {hint}")


def check_used(settings: Iterable[str], methods: Sequence[str]) -> None:
    """Raises UserError for the first setting that only methods other than these use."""
    for name in settings:
        known = ONLY_FOR.get(name, methods)
        if not set(known) & set(methods):
            raise UserError(f"{name} is for {', '.join(known)}, not for {', '.join(methods)}")


def is_cnn7(settings: Mapping[str, Any]) -> bool:
    """Whether settings, of which some may be left out, describe a new CNN7."""
    own = settings.get("model", DEFAULT_MODEL) != DEFAULT_MODEL
    return not own and settings.get("architecture") is None and settings.get("start") is None


def is_function(name: str) -> bool:
    """Whether `name` has the form of `package.module:function`."""
    module, colon, function = name.partition(":")
    parts = [*module.split("."), function]
    return colon == ":" and all(part.isidentifier() for part in parts)
