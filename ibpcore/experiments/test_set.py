"""Certifies the test set of a run into its folder, and resumes where it stopped."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import CERTIFICATES, SUMMARY, write_certificates
from ibpcore.certification.certify import BATCH_SIZE, certify
from ibpcore.certification.radii import RootOptions
from ibpcore.certification.summary import summarize, write_summary
from ibpcore.data.images import Dataset, ImageSet
from ibpcore.data.sources import STANDARD_RADII
from ibpcore.distributed import SINGLE_PROCESS, Ranks, run_on_rank_zero
from ibpcore.experiments.run_folder import CURVE, JOURNALS
from ibpcore.io.files import read_json
from ibpcore.io.journal import Journal, check_settings
from ibpcore.nn.checkpoint import fingerprint
from ibpcore.nn.networks import Classifier
from ibpcore.progress import Watch, unwatched
from ibpcore.visualization.plots.curves import write_curve
from ibpcore.visualization.plots.style import figures_possible


def certify_test_set(
    model: Classifier,
    dataset: Dataset,
    folder: Path,
    *,
    epsilon_max: float,
    options: RootOptions,
    elide: bool,
    clip: bool,
    facts: dict[str, Any],
    claim: str = "real",
    bound: str = "ibp",
    watch: Watch = unwatched,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Certifies the test images; writes the table, the curve and the summary.

    Goes on where it was cut off, and does nothing where all is written already. Among
    ranks, the batches are dealt; rank 0 writes the files.

    Args:
        model: on the device to compute on.
        dataset: its test images are moved there.
        folder: gets the files; the curve only where matplotlib is. One that all ranks see.
        epsilon_max, options, elide, claim, bound: see `ibpcore.certification.certify.certify`.
        clip: keep perturbed pixels in [0, 1].
        facts: `method`, and what else the summary shall say of the model.
        watch: reports the number of images done.
        ranks: among which it is shared, each with the same model and data.

    Returns:
        the summary.

    Raises:
        UserError: see `ibpcore.certification.certify.certify`; or what the folder holds is of other
            settings.
        OSError: the folder cannot be written.
    """
    return certify_images(
        model,
        dataset,
        dataset.test,
        folder / SUMMARY,
        folder / CERTIFICATES,
        epsilon_max=epsilon_max,
        options=options,
        elide=elide,
        clip=clip,
        facts=facts,
        claim=claim,
        bound=bound,
        watch=watch,
        ranks=ranks,
    )


def certify_images(
    model: Classifier,
    dataset: Dataset,
    images: ImageSet,
    target: Path,
    table: Path | None = None,
    *,
    epsilon_max: float,
    options: RootOptions,
    elide: bool,
    clip: bool,
    facts: dict[str, Any],
    watch: Watch,
    claim: str,
    bound: str = "ibp",
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Certifies `images`, a part of `dataset`, into the summary `target`, and a table if asked."""
    settings = {
        "epsilon_max": epsilon_max,
        **asdict(options),
        "claim": claim,
        "bound": bound,
        "elide": elide,
        "clip": clip,
        "batch_size": BATCH_SIZE,
        "ibpcore": version("ibpcore"),
        "weights": fingerprint(model),
        "images": images.fingerprint(),
    }
    journal_path = target.with_name(JOURNALS[target.name])

    def complete() -> dict[str, Any] | None:
        if journal_path.exists() or not all(path.exists() for path in (target, table or target)):
            return None
        summary = read_json(target)
        check_settings(target, summary, settings)
        return dict(summary)

    if (summary := run_on_rank_zero(ranks, complete)) is not None:
        return summary
    journal = Journal(journal_path, settings, ranks)
    with watch("certifying", len(images)) as advance:
        certificates = certify(
            model.eval(),
            images.to(next(model.parameters()).device),
            epsilon_max,
            options,
            claim=claim,
            bound=bound,
            elide=elide,
            clip=(0.0, 1.0) if clip else None,
            journal=journal,
            ranks=ranks,
            advance=advance,
        )

    def written() -> dict[str, Any]:
        summary = summarize(certificates, epsilon_max, STANDARD_RADII[dataset.name])
        summary |= {"dataset": dataset.title, **facts, **settings}
        if table is not None:
            write_certificates(table, certificates, claim)
            if figures_possible():
                by = "" if bound == "ibp" else f", certified by {bound}"
                title = f"{facts['method']} on {dataset.title}{by}"
                write_curve(table.with_name(CURVE), certificates, epsilon_max, title)
        write_summary(target, summary)
        journal.remove()
        return summary

    return run_on_rank_zero(ranks, written)
