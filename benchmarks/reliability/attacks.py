"""Attacks certified images within their radii.

Claim: no attack succeeds within a certified radius, for any training method. A small network of
each method is trained on MNIST if `$IBP_DATA_DIR` has it, and on the digits otherwise. Each is
certified by every bound, with and without clipping, and every certificate is attacked by PGD at
its radius, just below it, and above it; on the CPU, 200 test images at scale 1.
"""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.reliability.rows import Row
from ibpcore.attacks.evaluation import AttackOptions, attack_test_set
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certificates import CERTIFICATES, read_certificates
from ibpcore.certification.certify import CertificationOptions
from ibpcore.data.images import Dataset
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments.test_set import certify_test_set
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.loop import train_model
from ibpcore.training.methods import METHODS

TRAIN, TEST, EPOCHS = 1200, 200, 8


def run(scale: float, seed: int, work: Path) -> list[Row]:
    """A row for each method, bound and ball: certificates attacked, and those that failed.

    Args:
        scale: share of the images and epochs.
        seed: of training and attacks.
        work: existing folder for models and tables.
    """
    data_dir = Path(os.environ.get("IBP_DATA_DIR", "data"))
    name = "mnist" if (data_dir / "MNIST").is_dir() else "digits"
    train_images, test_images = max(64, int(scale * TRAIN)), max(8, int(scale * TEST))
    dataset = load_dataset(name, Request(data_dir, False, train_images, test_images))
    rows = []
    for method in METHODS:
        folder = work / method
        folder.mkdir()
        epochs = max(3, int(scale * EPOCHS))
        settings = {"width": 4, "hidden": 32, "epochs": epochs, "warmup": (1, epochs // 2 + 1)}
        # With a tenth of this rate some methods stay at chance after so few steps.
        config = make_config(name, method, seed=seed, learning_rate=5e-3, **settings)
        model = train_model(config, dataset, folder).eval()
        for bound in BOUNDS:
            rows += [_row(config, model, dataset, folder, bound, clip) for clip in (True, False)]
    return rows


def _row(
    config: TrainConfig, model: Classifier, dataset: Dataset, folder: Path, bound: str, clip: bool
) -> Row:
    kind = f"{bound}, {'clipped' if clip else 'bare'}"
    certified, attacked = (folder / f"{part} {kind}" for part in ("certified", "attacked"))
    certified.mkdir()
    attacked.mkdir()
    facts = {"method": config.method}
    certify_test_set(
        model,
        dataset,
        certified,
        CertificationOptions(
            config.epsilon_max,
            bounds=BoundOptions(bound, config.elide, (0.0, 1.0) if clip else None),
        ),
        facts=facts,
    )
    table = read_certificates(certified / CERTIFICATES)
    options = AttackOptions(autoattack=False, seed=config.seed)
    summary, alarms = attack_test_set(model, dataset, table, attacked, options, facts=facts)
    ratio = summary["ratio"]["median"]
    note = f"{dataset.title}; attacks succeeded at {100 * (summary['succeeded'] or 0):.0f} %"
    note += "" if ratio is None else f", median {ratio:.3g} of the radius"
    what = f"certificates of {config.method} ({kind}) that an attack broke"
    return Row(what, summary["certified"], len(alarms), note)
