"""Time of a training step, for every method and solver: the counterpart of Table 6.

Claim: a step of exact ACERT takes about as long as one of FastIBP, or less, because
misclassified samples need no interval pass and only undecided ones need a root. Measured on
networks trained with ACERT on real data, at the start, the middle and the end of training;
nine steps of different batches, on the device that `--device` selects. `radius_error` is the
mean |radius - exact radius| over the samples of the first five batches, as a share of the
scheduled epsilon_max; exact radii come from Brent's method at a hundredth of the paper's
tolerances. `beyond` is the share of samples whose radius is off by more than the paper's
tolerances, xtol = 1e-6 and rtol = 1e-4. `operators` is the number of operators dispatched in a
step (radii, forward, backward and update; mean of four steps), see `benchmarks.counting.overhead`.
The contenders "2 % doubt" and "6 % doubt", and "leaving out" and "with all", are the two choices of
each rule from sizes in `ibpcore.training.effort`.

If auto_LiRPA can be imported, its FastIBP step and ACERT with two iterations of Brent's method over
its bounds are contenders at the end of training: same network, data and optimiser, with all samples
bounded in each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import torch
from torch import Tensor

from benchmarks import harness, lirpa
from benchmarks.counting import overhead
from benchmarks.networks import STAGES, Stage, Subject, measure_all, network_options
from ibpcore.bounds.ibp import clean_margins
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.radii import CleanSamples, Radii, RadiusStatus, ibp_radii
from ibpcore.data.batches import Batch, shuffled_batches
from ibpcore.nn.folding import clean_pass
from ibpcore.precision import full_precision, tf32_allowed
from ibpcore.roots import Brent, RootOptions
from ibpcore.training.config import TrainConfig
from ibpcore.training.effort import CHEAP_PASSES, COSTLY_PASSES
from ibpcore.training.loop import train_step
from ibpcore.training.methods import METHODS, CleanBatch, adaptive_radii
from ibpcore.training.presets import METHOD_PRESETS

ACERT: dict[str, dict[str, Any]] = {
    "acert fast": {"max_iterations": 0},
    "acert brentq 2": {"max_iterations": 2},
    "acert brentq exact": {"max_iterations": 100},
    "acert fused 2 exact": {"solver": "fused", "candidates": 2, "max_iterations": 100},
    "acert fused 8 exact": {"solver": "fused", "candidates": 8, "max_iterations": 100},
    "acert tracked 0": {"solver": "tracked", "max_iterations": 0},
    "acert tracked 1": {"solver": "tracked", "max_iterations": 1},
    "acert tracked": {"solver": "tracked"},
    "acert tracked exact": {"solver": "tracked", "max_iterations": 100, "xtol": 1e-6},
}
RULES: dict[str, dict[str, Any]] = {
    "acert tracked, 2 % doubt": {"accepted_doubt": CHEAP_PASSES},
    "acert tracked, 6 % doubt": {"accepted_doubt": COSTLY_PASSES},
    "acert tracked, leaving out": {"worth_leaving_out": True},
    "acert tracked, with all": {"worth_leaving_out": False},
}
"""Both choices of each rule in `ibpcore.training.effort`; "acert tracked" goes by the sizes."""
PAPER = RootOptions()
EXACT = RootOptions(xtol=1e-8, rtol=1e-6)
COMPILED = ("fastibp", "acert tracked", "acert tracked exact")


def configurations(base: TrainConfig, compile: bool) -> dict[str, TrainConfig]:
    """The settings of each contender; all have the same network and data."""
    plain = replace(base, solver="brentq", max_iterations=None, xtol=None)
    found = {
        method: replace(
            plain,
            method=method,
            kappa=METHOD_PRESETS[method].get("kappa", 0.0),
            adaptive=False,
        )
        for method in ("standard", "fastibp")
    }
    found |= {name: replace(plain, **given) for name, given in ACERT.items()}
    found |= dict.fromkeys(RULES, found["acert tracked"])
    quick = replace(plain, solver="tracked", max_iterations=2, xtol=0.15 * base.epsilon_max)
    found["acert tracked 2, xtol 15 %"] = quick
    if compile:
        found |= {f"{name}, compiled": replace(found[name], compile="on") for name in COMPILED}
    return found


@contextmanager
def rules_of(contender: str) -> Iterator[None]:
    """A context with the contender's choices in place of the rules, if it is one of `RULES`."""
    choices = RULES.get(contender, {})
    with ExitStack() as patches:
        for rule, choice in choices.items():
            patches.enter_context(patch.object(adaptive_radii, rule, lambda *_, c=choice: c))
        yield


def exact_radii(stage: Stage, batch: Batch) -> Radii:
    """Radii with the statistics of this batch, more precise than any contender's."""
    with torch.no_grad(), full_precision():
        logits, network = clean_pass(stage.state.model, batch.images, track=False)
        at_zero = clean_margins(logits, batch.labels)
        samples = CleanSamples(batch.images, batch.labels, at_zero)
        return ibp_radii(network, samples, stage.epsilon, EXACT, BoundOptions())


def clean_batch(stage: Stage, batch: Batch) -> CleanBatch:
    """What a method receives after the clean pass."""
    logits, network = clean_pass(stage.state.model, batch.images, track=False)
    expected = stage.state.expected_slopes(batch.samples)
    parts = (network, logits, batch.images, batch.labels, expected.slopes)
    return CleanBatch(*parts, deviation=expected.deviation)


def trained_radii(stage: Stage, batch: Batch, config: TrainConfig) -> Tensor:
    """The radii at which a contender would train."""
    return METHODS[config.method](clean_batch(stage, batch), stage.epsilon, config).radii


def in_turn(batches: list[Batch], in_a_row: int = 2) -> Iterator[Batch]:
    """The batches over and over, each so often in a row: a turn of the harness is two steps."""
    return cycle(batch for batch in batches for _ in range(in_a_row))


def steps(
    stage: Stage, batches: list[Batch], configs: dict[str, TrainConfig], in_a_row: int = 2
) -> dict[str, Callable[[], None]]:
    """A function for each contender, which takes its next step; see `in_turn`."""

    def stepper(name: str, config: TrainConfig) -> Callable[[], None]:
        state = stage.another_state()
        state.scheduler.step = lambda *_: None  # type: ignore[method-assign]
        turn = in_turn(batches, in_a_row)

        def step() -> None:
            state.slopes.copy_(stage.state.slopes)
            state.trend.copy_(stage.state.trend)
            with rules_of(name):
                train_step(state, next(turn), stage.share, config)

        return step

    return {name: stepper(name, config) for name, config in configs.items()}


def lirpa_steps(
    stage: Stage, batches: list[Batch], config: TrainConfig
) -> dict[str, Callable[[], None]]:
    """The same for FastIBP and for ACERT with two iterations, over auto_LiRPA's bounds."""

    def stepper(iterations: int | None) -> Callable[[], None]:
        turn = in_turn(batches)
        net = lirpa.Lirpa(stage.state.model, batches[0].images)
        optimizer = torch.optim.Adam(net.model.parameters(), lr=0.0)

        def step() -> None:
            images, labels, _ = next(turn)
            radii = torch.full_like(images[:, 0, 0, 0], stage.epsilon)
            if iterations is not None:
                radii = lirpa_radii(net, images, labels, stage.epsilon, iterations)
            optimizer.zero_grad()
            net.loss(images, labels, radii).backward()
            torch.nn.utils.clip_grad_norm_(net.model.parameters(), config.gradient_clip)
            optimizer.step()

        return step

    return {"auto_LiRPA fastibp": stepper(None), "auto_LiRPA acert brentq 2": stepper(2)}


@torch.no_grad()
def lirpa_radii(
    net: lirpa.Lirpa, images: Tensor, labels: Tensor, epsilon: float, iterations: int
) -> Tensor:
    """(B,) radii by Brent's method over auto_LiRPA's bounds of all samples in each pass."""
    at_zero = clean_margins(net.model(images), labels)

    def margin(x: Tensor, lanes: Tensor) -> Tensor:
        every = torch.zeros_like(at_zero).index_copy(0, lanes, x)
        return net.margins(images, labels, every)[lanes]

    zero = torch.zeros_like(at_zero)
    solver = Brent(max_iterations=iterations)
    roots = solver(margin, zero, zero + epsilon, values=(at_zero, None))
    full = at_zero.sign() * roots.root.isnan() < 0
    return torch.where(full, epsilon, torch.where(at_zero < 0, roots.root, 0))


def check_lirpa(stage: Stage, batch: Batch, config: TrainConfig) -> None:
    """Raises click.ClickException unless both engines give the same robust loss."""
    net = lirpa.Lirpa(stage.state.model, batch.images)
    radii = torch.full_like(batch.images[:, 0, 0, 0], stage.epsilon)
    theirs = net.loss(batch.images, batch.labels, radii)
    ours = METHODS["fastibp"](clean_batch(stage, batch), stage.epsilon, config).loss
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise click.ClickException(f"the engines disagree: {float(ours)} and {float(theirs)}")


def training_batches(subject: Subject, count: int) -> list[Batch]:
    """Full batches of augmented training images; repeated where the data set has too few."""
    config, images = subject.config, subject.data.train.to(subject.device)
    batches = [
        batch
        for epoch in range(100, 100 + -(-count * config.batch_size // len(images)))
        for batch in shuffled_batches(
            images,
            config.batch_size,
            seed=0,
            epoch=epoch,
            flip=config.flip,
            padding=config.padding,
        )
        if len(batch.labels) == config.batch_size
    ]
    return list(islice(cycle(batches), count))


class Accuracy(NamedTuple):
    """How the contenders' radii compare with exact ones.

    Attributes:
        columns: radius_error and beyond, of every ACERT contender.
        correct, certified: shares of samples classified correctly, certified at epsilon.
    """

    columns: dict[str, dict[str, float]]
    correct: float
    certified: float


def accuracy(stage: Stage, batches: list[Batch], configs: dict[str, TrainConfig]) -> Accuracy:
    """Of the radii of all samples of these batches.

    Raises:
        click.ClickException: an exact contender disagrees with Brent's method.
    """
    exact = [exact_radii(stage, batch) for batch in batches]
    roots = torch.cat([radii.root for radii in exact])
    columns = {}
    for name, config in configs.items():
        if config.method != "acert":
            continue
        with rules_of(name):
            radii = torch.cat([trained_radii(stage, batch, config) for batch in batches])
        errors = (radii - roots).abs()
        mean = float(errors.mean()) / stage.epsilon
        if "exact" in name and mean > 1e-3:
            raise click.ClickException(f"{name} disagrees with brentq by {mean:.2g}")
        beyond = (errors > PAPER.xtol + PAPER.rtol * roots).float().mean()
        columns[name] = {"radius_error": mean, "beyond": float(beyond)}
    status = torch.cat([radii.status for radii in exact])
    return Accuracy(
        columns,
        correct=float((status != RadiusStatus.MISCLASSIFIED).float().mean()),
        certified=float((status == RadiusStatus.EPSILON_MAX).float().mean()),
    )


def measure(stage: Stage, repeats: int, compile: bool, only: tuple[str, ...]) -> list[harness.Row]:
    """The rows of one network."""
    subject = stage.subject
    # The regularisers belong to the warm-up.
    config = replace(subject.config, regularizer=0.0) if stage.share == 1 else subject.config
    configs = configurations(config, compile)
    torch.compiler.reset()  # another network's code would count against the compiler's limits
    batches = training_batches(subject, repeats)
    stage.state.model.train()
    found = accuracy(stage, batches[:5], configs)
    contenders = steps(stage, batches, configs)
    if lirpa.available() and stage.share == 1:
        check_lirpa(stage, batches[0], configs["fastibp"])
        contenders |= lirpa_steps(stage, batches, config)
    if only:
        contenders = {name: run for name, run in contenders.items() if name in {*only, "fastibp"}}
    table = harness.rows(
        harness.milliseconds(contenders, repeats, subject.device),
        "fastibp",
        **stage.facts,
        batch=config.batch_size,
        correct=found.correct,
        certified=found.certified,
    )
    unknown = {"radius_error": None}
    return [
        row
        | found.columns.get(row["contender"], unknown)
        | overhead(contenders[row["contender"]], subject.device, min(repeats, 4))
        for row in table
    ]


@click.command()
@network_options
@harness.common_options
@click.option("--only", multiple=True, help="Contenders to time beside fastibp. Default: all.")
@click.option("--compile", is_flag=True, help="Add compiled versions of some contenders.")
@click.option(
    "--stage", "chosen", multiple=True, help="start, middle or end; may be repeated. Default: all."
)
def main(only: tuple[str, ...], compile: bool, chosen: tuple[str, ...], **options: Any) -> None:
    """Compare training steps; ratios are to fastibp."""
    measure_rows = partial(measure, compile=compile, only=only)
    with tf32_allowed(True):
        measure_all("training_step", measure_rows, chosen or STAGES, **options)


if __name__ == "__main__":
    main()
