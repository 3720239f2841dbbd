"""Certifies the test set of a run into its folder, and resumes where it stopped."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from ibpcore.certification.certificates import (
    CERTIFICATES,
    SUMMARY,
    UNCHECKED,
    read_certificates,
    write_certificates,
)
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.formatting import reported_radii
from ibpcore.certification.radii import Climbed
from ibpcore.certification.summary import check_radii, measures_of, summarize, write_summary
from ibpcore.data.images import Dataset, ImageSet
from ibpcore.data.sources import STANDARD_RADII
from ibpcore.distributed import SINGLE_PROCESS, Ranks, run_on_rank_zero
from ibpcore.errors import UserError
from ibpcore.experiments.run_folder import CURVE, JOURNALS, VALIDATION
from ibpcore.io.files import read_json
from ibpcore.io.journal import Journal, check_settings
from ibpcore.nn.checkpoint import fingerprint
from ibpcore.nn.networks import Classifier, weight_like
from ibpcore.progress import Watch, unwatched
from ibpcore.visualization.plots.curves import write_curve
from ibpcore.visualization.plots.style import figures_possible


def certify_test_set(
    model: Classifier,
    dataset: Dataset,
    folder: Path,
    options: CertificationOptions,
    *,
    facts: dict[str, Any],
    watch: Watch = unwatched,
    ranks: Ranks = SINGLE_PROCESS,
    climbed: Climbed | None = None,
) -> dict[str, Any]:
    """Certifies the test images; writes the table, the curve and the summary, and returns it.

    Interrupted work is resumed, and complete work is not repeated. The ranks share the
    batches; rank 0 writes the files, the curve only if matplotlib is installed.

    Args:
        model: on the device to compute on.
        dataset: its test images are moved there.
        folder: receives the files; accessible to all ranks.
        facts: `method`, and other facts about the model for the summary.
        watch: reports the number of images done.
        ranks: the ranks that share the work, each with the same model and data.
        climbed: see `ibpcore.certification.certify.certify`.

    Raises:
        UserError: see `ibpcore.certification.certify.certify`; or the files in the folder have
            other settings, are damaged, or were removed meanwhile.
        OSError: the folder cannot be written.
    """
    part = _Part(dataset.test, folder / SUMMARY, folder / CERTIFICATES)
    return _certify_part(model, dataset, part, options, facts, watch, ranks, climbed)


def certify_validation_set(
    model: Classifier,
    dataset: Dataset,
    folder: Path,
    options: CertificationOptions,
    *,
    facts: dict[str, Any],
    watch: Watch = unwatched,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any]:
    """`certify_test_set` for the validation images, without a proof: `validation.json` only."""
    images, options = cast(ImageSet, dataset.validation), replace(options, claim=UNCHECKED)
    part = _Part(images, folder / VALIDATION)
    return _certify_part(model, dataset, part, options, facts, watch, ranks)


class _Part(NamedTuple):
    """Images, their summary, which is written last, and their table; without one, no curve."""

    images: ImageSet
    summary: Path
    table: Path | None = None

    @property
    def journal(self) -> Path:
        return self.summary.with_name(JOURNALS[self.summary.name])

    def complete(self, settings: dict[str, Any], classes: int) -> dict[str, Any] | None:
        """The summary, if all files are complete; `settings` are entries that it must have.

        Raises UserError if a file is damaged, or has other settings.
        """
        needed = (self.summary, self.table or self.summary)
        if self.journal.exists() or not all(path.exists() for path in needed):
            return None
        summary = read_json(self.summary)
        check_settings(self.summary, summary, settings)
        measures = measures_of(summary, self.summary)
        if self.table is not None:
            table = read_certificates(self.table, classes)
            check_radii(table.radius, table.epsilon_max, measures["acr"], self.table)
            if not torch.equal(table.label, self.images.labels.cpu()):
                raise UserError(f"{self.table} is damaged: its labels are not those of the images")
        return dict(summary)


def _certify_part(
    model: Classifier,
    dataset: Dataset,
    part: _Part,
    options: CertificationOptions,
    facts: dict[str, Any],
    watch: Watch,
    ranks: Ranks,
    climbed: Climbed | None = None,
) -> dict[str, Any]:
    settings = {
        **options.record(),
        "ibpcore": version("ibpcore"),
        "weights": fingerprint(model),
        "images": part.images.fingerprint(),
    }
    known = {"samples": len(part.images), "dataset": dataset.title, "method": facts["method"]}
    complete = run_on_rank_zero(
        ranks, lambda: part.complete(settings | known, len(dataset.classes))
    )
    if complete is not None:
        return complete
    with Journal(part.journal, settings, ranks) as journal:
        with watch("certifying", len(part.images)) as advance:
            images = part.images.to(weight_like(model).device)
            how: Any = {"journal": journal, "ranks": ranks, "advance": advance, "climbed": climbed}
            certificates = certify(model.eval(), images, options, **how)

        def written() -> dict[str, Any]:
            journal.check()
            radii = reported_radii(options.epsilon_max, STANDARD_RADII[dataset.name])
            summary = summarize(certificates, options.epsilon_max, radii)
            summary |= {"dataset": dataset.title, **facts, **settings}
            if part.table is not None:
                write_certificates(part.table, certificates, options.claim)
                if figures_possible():
                    bound, curve = options.bounds.bound, part.table.with_name(CURVE)
                    by = "" if bound == "ibp" else f", certified by {bound}"
                    title = f"{facts['method']} on {dataset.title}{by}"
                    write_curve(curve, certificates, options.epsilon_max, title)
            write_summary(part.summary, summary)
            journal.remove()
            return summary

        return run_on_rank_zero(ranks, written)
