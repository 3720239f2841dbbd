"""Attacks on certificates: the radii at which they succeed, and alarms below certified ones."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from ibpcore.attacks.autoattack import autoattack_version, autoattacker
from ibpcore.attacks.pgd import Attacker, pgd_attacker
from ibpcore.attacks.search import Found, Judge, attempted, attempts, bisected, upwards
from ibpcore.bounds.checks import check_fit
from ibpcore.bounds.ibp import clean_margins
from ibpcore.certification import certificates
from ibpcore.certification.certificates import CertificateTable
from ibpcore.certification.metrics import certified_accuracy
from ibpcore.certification.summary import write_summary
from ibpcore.data.batches import as_pixels, ordered_batches
from ibpcore.data.images import Dataset, ImageSet
from ibpcore.errors import UserError
from ibpcore.io.files import write_atomic
from ibpcore.nn.checkpoint import fingerprint
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import Classifier, weight_like
from ibpcore.precision import full_precision, plain_convolutions
from ibpcore.progress import Advance, Watch, unwatched
from ibpcore.wording import counted

IMAGES_AT_ONCE = 128
LIMIT = 1.0
"""The largest radius of an attack: with clipping, every image is within that distance."""
JUST_BELOW = 0.999
"""As a share of the certified radius."""
CUT_OFF = 1e-4
"""Radii closer than that to epsilon_max, relatively, were cut off by it."""
BISECTIONS, AUTOATTACK_BISECTIONS = 5, 2
EXTRA = "pip install 'ibpcore[attack]'"


@dataclass(frozen=True)
class AttackOptions:
    """The strength of the attacks on certificates.

    Attributes:
        steps, restarts: of PGD at each radius.
        autoattack: whether to run AutoAttack too; None to run it if it is installed.
        seed: of the random starts.
    """

    steps: int = 10
    restarts: int = 3
    autoattack: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise UserError(f"{name} must be at least 1, but is {value!r}")
        if not isinstance(self.seed, Integral) or not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be from 0 to 2**32 - 1, but is {self.seed!r}")
        if self.autoattack and autoattack_version() is None:
            raise UserError(f"AutoAttack is not installed: {EXTRA}")

    def not_run(self) -> str | None:
        """The reason why AutoAttack is not run; None if it is."""
        if self.autoattack is False:
            return "not run: --no-autoattack"
        return f"not run: {EXTRA}" if autoattack_version() is None else None


@dataclass(frozen=True, eq=False)
class Alarm:
    """A wrong certificate, with an image that proves it wrong.

    Attributes:
        index, label, radius: of the certificate.
        distance: of `attacked` from `image`, at most `radius`.
        image, attacked: (C, H, W).
        logits: (classes,) of `attacked`, computed in float64.
        executed: (classes,) of `attacked`, computed in the type of the weights.
    """

    index: Tensor
    label: Tensor
    radius: Tensor
    distance: Tensor
    image: Tensor
    attacked: Tensor
    logits: Tensor
    executed: Tensor

    def __str__(self) -> str:
        return (
            f"ALARM: image {int(self.index)} of label {int(self.label)} is certified up to"
            f" {float(self.radius)!r}, but misclassified at a distance of"
            f" {float(self.distance)!r}"
        )


class Attacked(NamedTuple):
    """Results of attacks, one entry per sample, (N,) on the CPU.

    Attributes:
        distance: float64, distance of the nearest misclassified image found; 0 for samples
            that are misclassified themselves, infinity if none was found.
        by_autoattack: whether AutoAttack found it, closer than PGD did.
        alarms: the wrong certificates.
    """

    distance: Tensor
    by_autoattack: Tensor
    alarms: list[Alarm]


def check_certified(model: Classifier, dataset: Dataset, table: CertificateTable) -> None:
    """Raises UserError unless the certificates belong to this model and these test images."""
    if table.weights not in (None, fingerprint(model)):
        raise UserError(
            f"{table.path} is of other weights than the model: run ibp certify, or choose its own"
            " certificates with --certificates"
        )
    weight = weight_like(model)
    images = dataset.test.to(weight.device)
    with torch.no_grad(), full_precision():
        network = fold(model)
        check_fit(network, as_pixels(images.images[:1]).to(weight), images.labels)
        batches = ordered_batches(images, IMAGES_AT_ONCE)
        found = torch.cat([network(batch.images.to(weight)).argmax(1) for batch in batches])
    certificates.check_table(table, dataset.title, dataset.test.labels.cpu(), found.cpu())


def attack_certificates(
    model: nn.Module,
    images: ImageSet,
    table: CertificateTable,
    options: AttackOptions,
    advance: Advance | None = None,
) -> Attacked:
    """Attacks every correctly classified image, within its certified radius and above it.

    PGD at the radius and just below, then at growing radii until it succeeds, then between
    the last failure and the nearest success; AutoAttack at the radius and at two above it.
    A success is an image that the network misclassifies in float64 or, if the claim is
    about float32, in an execution in float32; what counts is its distance.

    Args:
        model: interval layers in evaluation mode, on the device of `images`.
        table: of these images.
        advance: reports the number of images done, and of alarms, after each batch.

    Raises:
        UserError: the model does not accept such images, or a layer has no rule.
    """
    dtype = weight_like(model).dtype
    parts: list[tuple[Tensor, Tensor]] = []
    alarms: list[Alarm] = []
    with torch.no_grad(), full_precision():
        network, exact = fold(model), copy.deepcopy(model).double()
        check_fit(network, as_pixels(images.images[:1]).to(dtype), images.labels)
        generator = torch.Generator(images.images.device).manual_seed(options.seed)
        attackers = [pgd_attacker(network, options.steps, options.restarts, generator)]
        if options.not_run() is None:
            attackers.append(autoattacker(network, options.seed))
        if advance is not None:
            advance(0, [])
        for pixels, labels, index in ordered_batches(images, IMAGES_AT_ONCE):
            pixels, some = pixels.to(dtype), table.at(index.tolist())
            found, by_autoattack = _attack_batch(model, exact, pixels, labels, some, attackers)
            alarms += _alarms(model, exact, pixels, some, found)
            parts.append((found.distance.cpu(), by_autoattack.cpu()))
            if advance is not None:
                done = sum(len(part[0]) for part in parts)
                said = counted(len(alarms), "alarm")
                advance(done, [said] if alarms else [])
    distance, by_autoattack = (torch.cat(column) for column in zip(*parts, strict=True))
    return Attacked(distance, by_autoattack, alarms)


def _attack_batch(
    model: nn.Module,
    exact: nn.Module,
    images: Tensor,
    labels: Tensor,
    table: CertificateTable,
    attackers: list[Attacker],
) -> tuple[Found, Tensor]:
    """The nearest successes, and (B,) whether AutoAttack, the second attacker, found them."""
    judge = _judge(model, exact, labels, table.float32.to(labels.device))
    pgd, *stronger = (
        attempts(images, labels, (0.0, 1.0) if table.clip else None, attack, judge)
        for attack in attackers
    )
    radius = table.radius.to(labels.device)
    every = torch.arange(len(labels), device=labels.device)
    wrong = judge(every, images) | (table.prediction != table.label).to(labels.device)
    found = Found(torch.where(wrong, 0.0, torch.inf).double(), images)

    for within in (JUST_BELOW * radius, radius):
        found = attempted(found, pgd, _still_certified(found, radius), within)
    found, lower = upwards(found, pgd, radius, table.epsilon_max, LIMIT)
    found = bisected(found, pgd, lower, BISECTIONS)

    before = found.distance
    for attempt in stronger:
        found = attempted(found, attempt, _still_certified(found, radius), radius)
        found = bisected(found, attempt, radius, AUTOATTACK_BISECTIONS)
    return found, found.distance < before


def _still_certified(found: Found, radius: Tensor) -> Tensor:
    """(n,) samples with a radius above 0 and no success within it so far."""
    return ((radius > 0) & (found.distance > radius)).nonzero()[:, 0]


def _judge(model: nn.Module, exact: nn.Module, labels: Tensor, float32: Tensor) -> Judge:
    """Misclassified in float64 or, where `float32` (B,) is true, in float32; NaN is wrong."""
    executed = bool(float32.any())

    def misclassified(samples: Tensor, images: Tensor) -> Tensor:
        chosen = labels[samples]
        wrong = ~(clean_margins(exact(images.double()), chosen) < 0)
        if executed:
            with plain_convolutions():
                wrong |= float32[samples] & ~(clean_margins(model(images), chosen) < 0)
        return wrong

    return misclassified


def _alarms(
    model: nn.Module, exact: nn.Module, images: Tensor, table: CertificateTable, found: Found
) -> list[Alarm]:
    """The alarms of a batch."""
    radius, distance = table.radius, found.distance.cpu()
    # A radius of 0 certifies nothing.
    rows = ((radius > 0) & (distance <= radius)).nonzero()[:, 0]
    if len(rows) == 0:
        return []
    attacked = found.images[rows.to(images.device)]
    with plain_convolutions():
        executed = model(attacked)
    columns = (
        *(table.index[rows], table.label[rows], radius[rows], distance[rows]),
        *(images[rows.to(images.device)], attacked, exact(attacked.double()), executed),
    )
    return [Alarm(*row) for row in zip(*(column.cpu() for column in columns), strict=True)]


def summarize_attacks(
    table: CertificateTable, attacked: Attacked, options: AttackOptions
) -> dict[str, Any]:
    """Shares as fractions, radii in pixel units; None if there is nothing to average.

    `gap` is attacked minus certified radius, `ratio` their quotient, for the `compared`
    images: those with a success outside a certified radius that is above 0 and not cut off
    by epsilon_max. `broken` counts the images with a success outside their radius.
    """
    radius, distance = table.radius, attacked.distance
    right = table.prediction == table.label
    whole = (radius > 0) & (radius < (1 - CUT_OFF) * table.epsilon_max)
    both = whole & distance.isfinite() & (distance > radius)
    not_run, quoted = options.not_run(), table.quoted_radii.items()
    tally = {
        "version": autoattack_version(),
        "radii": "the certified radius, and two above it",
        "nearer": int(attacked.by_autoattack.sum()),
    }
    return {
        "samples": len(radius),
        "epsilon_max": table.epsilon_max,
        "clip": table.clip,
        "correct": int(right.sum()),
        "certified": int((radius > 0).sum()),
        "attack": "PGD on the margin",
        **{name: value for name, value in asdict(options).items() if name != "autoattack"},
        "autoattack": tally if not_run is None else not_run,
        "largest_radius": LIMIT,
        "alarms": len(attacked.alarms),
        "succeeded": _mean_or_none(distance[right].isfinite().double()),
        "broken": int((distance.isfinite() & (distance > radius)).sum()),
        "compared": int(both.sum()),
        "gap": _mean_and_median((distance - radius)[both]),
        "ratio": _mean_and_median((distance / radius)[both]),
        "accuracy": _mean_or_none(right.double()),
        "certified_accuracy": {text: certified_accuracy(radius, at) for text, at in quoted},
        "empirical_accuracy": {
            text: _mean_or_none((distance > at).double()) for text, at in quoted
        },
    }


def _mean_or_none(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) > 0 else None


def _mean_and_median(values: Tensor) -> dict[str, float | None]:
    median = float(values.quantile(0.5)) if len(values) > 0 else None
    return {"mean": _mean_or_none(values), "median": median}


def attack_test_set(
    model: nn.Module,
    dataset: Dataset,
    table: CertificateTable,
    folder: Path,
    options: AttackOptions,
    *,
    facts: dict[str, Any],
    watch: Watch = unwatched,
) -> tuple[dict[str, Any], list[Alarm]]:
    """Attacks the certificates of test images; writes the table, the alarms and the summary.

    Args:
        model: in evaluation mode, on the device to compute on.
        dataset: its test images include those of the table, see `check_certified`.
        folder: receives the files.
        facts: `method`, and other entries of the summary about the model.
        watch: reports the number of images done.

    Returns:
        the summary, and the alarms.

    Raises:
        UserError: see `attack_certificates`.
        OSError: the folder cannot be written.
    """
    images = dataset.test[table.index]
    with watch("attacking", len(images)) as advance:
        images = images.to(weight_like(model).device)
        attacked = attack_certificates(model, images, table, options, advance)
    for alarm in attacked.alarms:
        content = safetensors.torch.save(vars(alarm))
        write_atomic(folder / f"alarm-{int(alarm.index)}.safetensors", content)
    # Empty where no attack succeeded.
    reached = [repr(d) if isfinite(d) else "" for d in attacked.distance.tolist()]
    rows = [row | {"attacked_radius": d} for row, d in zip(table.rows, reached, strict=True)]
    certificates.write_table(folder / certificates.CERTIFICATES, rows)
    summary = {
        **facts,
        "dataset": dataset.title,
        "certificates": str(table.path),
        **summarize_attacks(table, attacked, options),
        "ibpcore": version("ibpcore"),
    }
    write_summary(folder / certificates.SUMMARY, summary)
    return summary, attacked.alarms
