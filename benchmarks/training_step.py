"""A training step of every method and solver, side by side: Table 6's counterpart.

Claims: exact ACERT costs about what FastIBP does, or less, since samples that the clean
pass misclassifies need no interval pass and only undecided ones a root. Timed on networks
trained with ACERT on real data, at the start, the middle and the end of training; ratio to
`fastibp` of the same engine. The radius error is the mean of |radius - exact radius| over
all samples of the batches, as a share of the scheduled epsilon_max; the exact ones are
Brent's at a hundredth of the tolerances. `beyond` is the share of the samples whose radius
is off by more than the paper's tolerances xtol = 1e-6 and rtol = 1e-4. Where auto_LiRPA
can be imported, its FastIBP step and ACERT with two of Brent's iterations over it take
part: the same network, data and optimiser, all samples bounded in each pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import harness, lirpa
from benchmarks.networks import Stage, Subject, network_options, subjects
from ibpcore.bounds.ibp import clean_margins
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.radii import CleanSamples, Radii, RadiusStatus, ibp_radii
from ibpcore.data.batches import Batch, shuffled_batches
from ibpcore.nn.folding import clean_pass
from ibpcore.precision import full_precision, tf32_allowed
from ibpcore.roots import Brent, RootOptions
from ibpcore.training.config import TrainConfig
from ibpcore.training.loop import train_step
from ibpcore.training.methods import METHODS, CleanBatch
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
PAPER = RootOptions()
EXACT = RootOptions(xtol=1e-8, rtol=1e-6)


COMPILED = ("fastibp", "acert tracked", "acert tracked exact")


def configurations(base: TrainConfig, compile: bool) -> dict[str, TrainConfig]:
    """One a contender, all with the same network and data."""
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
    quick = replace(plain, solver="tracked", max_iterations=2, xtol=0.15 * base.epsilon_max)
    found["acert tracked 2, xtol 15 %"] = quick
    if compile:
        found |= {f"{name}, compiled": replace(found[name], compile=True) for name in COMPILED}
    return found


def exact_radii(stage: Stage, batch: Batch, epsilon: float) -> Radii:
    """Radii by the statistics of this batch, more precise than any contender's."""
    with torch.no_grad(), full_precision():
        logits, network = clean_pass(stage.state.model, batch.images, track=False)
        at_zero = clean_margins(logits, batch.labels)
        samples = CleanSamples(batch.images, batch.labels, at_zero)
        return ibp_radii(network, samples, epsilon, EXACT, BoundOptions())


def trained_radii(stage: Stage, batch: Batch, epsilon: float, config: TrainConfig) -> Tensor:
    """The radii that a contender would train at."""
    logits, network = clean_pass(stage.state.model, batch.images, track=False)
    slopes = stage.state.slopes[batch.samples]
    clean = CleanBatch(network, logits, batch.images, batch.labels, slopes)
    return METHODS[config.method](clean, epsilon, config).radii


def twice(batches: list[Batch]) -> Iterator[Batch]:
    """Each batch two times in a row, as the harness runs each step."""
    return (batch for batch in batches for _ in range(2))


def steps(
    stage: Stage, batches: list[Batch], configs: dict[str, TrainConfig]
) -> dict[str, Callable[[], None]]:
    """A function a contender, which takes its next step."""

    def stepper(config: TrainConfig) -> Callable[[], None]:
        state = copy.deepcopy(stage.state)
        state.scheduler.step = lambda *_: None  # type: ignore[method-assign]
        turn = twice(batches)

        def step() -> None:
            state.slopes.copy_(stage.state.slopes)
            train_step(state, next(turn), stage.share, config)

        return step

    return {name: stepper(config) for name, config in configs.items()}


def lirpa_steps(
    stage: Stage, batches: list[Batch], config: TrainConfig
) -> dict[str, Callable[[], None]]:
    """FastIBP's step and ACERT's with two iterations, over auto_LiRPA."""
    epsilon = stage.share * config.epsilon_max

    def stepper(iterations: int | None) -> Callable[[], None]:
        turn = twice(batches)
        net = lirpa.Lirpa(stage.state.model, batches[0].images)
        optimizer = torch.optim.Adam(net.model.parameters(), lr=0.0)

        def step() -> None:
            images, labels, _ = next(turn)
            radii = torch.full_like(images[:, 0, 0, 0], epsilon)
            if iterations is not None:
                radii = lirpa_radii(net, images, labels, epsilon, iterations)
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
    """Brent's method over auto_LiRPA's bounds, all samples in each pass."""
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
    """Raises unless both engines give the same robust loss."""
    epsilon = stage.share * config.epsilon_max
    net = lirpa.Lirpa(stage.state.model, batch.images)
    theirs = net.loss(
        batch.images, batch.labels, torch.full_like(batch.images[:, 0, 0, 0], epsilon)
    )
    logits, network = clean_pass(stage.state.model, batch.images, track=False)
    clean = CleanBatch(
        network, logits, batch.images, batch.labels, stage.state.slopes[batch.samples]
    )
    ours = METHODS["fastibp"](clean, epsilon, config).loss
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
        raise click.ClickException(f"the engines disagree: {float(ours)} and {float(theirs)}")


def measure(
    subject: Subject, stage: Stage, repeats: int, compile: bool, only: tuple[str, ...]
) -> list[harness.Row]:
    """The rows of one network."""
    config = replace(subject.config, regularizer=0.0) if stage.share == 1 else subject.config
    configs = configurations(config, compile)
    torch.compiler.reset()  # another network's code would count against the compiler's limits
    epsilon = stage.share * config.epsilon_max
    images = subject.data.train.to(subject.device)
    batches = [
        batch
        for epoch in range(100, 100 + -(-repeats * config.batch_size // len(images)))
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
    batches = list(islice(cycle(batches), repeats))
    stage.state.model.train()
    looked_at = batches[: min(5, repeats)]
    exact = [exact_radii(stage, batch, epsilon) for batch in looked_at]
    roots = torch.cat([radii.root for radii in exact])
    errors = {
        name: torch.cat([trained_radii(stage, b, epsilon, c) for b in looked_at]).sub(roots).abs()
        for name, c in configs.items()
        if c.method == "acert"
    }
    mean = {name: float(error.mean()) / epsilon for name, error in errors.items()}
    for name, error in mean.items():
        if "exact" in name and error > 1e-3:
            raise click.ClickException(f"{name} disagrees with brentq by {error:.2g}")
    status = torch.cat([radii.status for radii in exact])
    contenders = steps(stage, batches, configs)
    if lirpa.available() and stage.share == 1:
        check_lirpa(stage, batches[0], configs["fastibp"])
        contenders |= lirpa_steps(stage, batches, config)
    if only:
        contenders = {name: run for name, run in contenders.items() if name in {*only, "fastibp"}}
    times = harness.milliseconds(contenders, repeats, subject.device)
    table = harness.rows(
        times,
        "fastibp",
        dataset=subject.data.title,
        stage=stage.name,
        width=config.width,
        correct=float((status != RadiusStatus.MISCLASSIFIED).float().mean()),
        certified=float((status == RadiusStatus.EPSILON_MAX).float().mean()),
    )
    for row in table:
        name = row["contender"]
        row["radius_error"] = mean.get(name)
        if name in errors:
            beyond = errors[name] > PAPER.xtol + PAPER.rtol * roots
            row["beyond"] = float(beyond.float().mean())
    return table


@click.command()
@network_options
@harness.common_options
@click.option("--only", multiple=True, help="Contenders to time beside fastibp. Default: all.")
@click.option("--compile", is_flag=True, help="Some contenders compiled too.")
@click.option("--stage", "chosen", multiple=True, help="start, middle, end. Default: all.")
def main(
    json_file: Path | None,
    quick: bool,
    device: str,
    repeats: int,
    only: tuple[str, ...],
    compile: bool,
    chosen: tuple[str, ...],
    **networks: Any,
) -> None:
    """Compare training steps; ratios are to fastibp."""
    on = harness.where(device)
    with tf32_allowed(True):
        table = [
            row
            for subject in subjects(**networks, device=on, quick=quick)
            for stage in subject.stages()
            if stage.name in (chosen or ("start", "middle", "end"))
            for row in measure(subject, stage, 2 if quick else repeats, compile, only)
        ]
    harness.report("training_step", table, on, json_file)


if __name__ == "__main__":
    main()
