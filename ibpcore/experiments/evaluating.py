"""`ibpcore.evaluate`: certificates of a set of images, from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ibpcore.bounds.epsilons import without_text
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.radii import check_epsilon_max
from ibpcore.distributed import chosen_device
from ibpcore.errors import UserError
from ibpcore.experiments.data_folder import data_dir_for
from ibpcore.experiments.evaluation import Evaluation
from ibpcore.experiments.given import Data, test_images
from ibpcore.experiments.matching import check_match
from ibpcore.experiments.run_folder import config_from
from ibpcore.experiments.test_set import identity, measured
from ibpcore.experiments.training import Run
from ibpcore.nn.checkpoint import MODEL, load_model, model_file, read_facts
from ibpcore.nn.layers import check_converted
from ibpcore.nn.networks import Classifier, modes_kept, weight_like
from ibpcore.training.config import TrainConfig


def evaluate(
    model: Any,
    data: Data | None = None,
    epsilon_max: float | str | None = None,
    *,
    bound: str = "ibp",
    claim: str = "real",
    limit: int | None = None,
    elide: bool | None = None,
    clip: bool | None = None,
    device: str = "auto",
    data_dir: str | Path | None = None,
) -> Evaluation:
    """Certifies the test images of a data set, as `ibp certify` does; writes and prints nothing.

    Args:
        model: interval layers, which are evaluated where they are; a run of `ibpcore.train`; or
            the path of a model file or a run folder.
        data: the name of a data set, a `Dataset`, or `(images, labels)`, see `ibpcore.train`;
            None for the data set that the run or the file was trained on.
        epsilon_max: largest radius to certify, in pixel units, such as 0.3 or "8/255"; None for
            that of the training.
        bound: which bounds certify, see `ibpcore.certified_radii`.
        claim: what is proved of each radius: "real", "float32", or "unchecked" for nothing.
        limit: certify this many images, spread over all; None for all.
        elide: merge a linear last layer into the margin; None as in the training, or True.
        clip: restrict perturbed pixels to [0, 1]; None as in the training, or True.
        device: where the model in a file is loaded to: "auto", "cpu", "cuda" or
            "cuda:1".
        data_dir: folder of the named data sets; None for IBP_DATA_DIR, or else `data`.

    Raises:
        UserError: the model and the images do not fit each other, the data set has other classes
            than the run or the file, no proof covers a layer, data or epsilon_max are needed and
            missing, or an argument is invalid.
    """
    network, config = _opened(model, device)
    file = _file(model)
    if data is None and config is not None:
        data = config.dataset
    if epsilon_max is None and config is not None:
        epsilon_max = config.epsilon_max
    if data is None or epsilon_max is None:
        raise UserError("the model does not say how it was trained: give data and epsilon_max")
    own = config is not None and isinstance(data, str) and data == config.dataset
    folder = data_dir_for(data_dir, *([file.parent] if own and file else []))
    dataset = test_images(data, limit, config.image_size if config else None, folder)
    facts = read_facts(file) if dataset.classes and file else {}
    check_match("the model", network, facts, dataset)
    weight = weight_like(network)
    epsilon_max = without_text(epsilon_max, "epsilon_max")
    check_epsilon_max(epsilon_max, weight.dtype)
    bounds = _bounds(config, bound, elide, clip)
    options = CertificationOptions(float(epsilon_max), claim, bounds)
    images = dataset.test.to(weight.device)
    with modes_kept(network):
        certificates = certify(network.eval(), images, options)
    method = {"method": config.method if config else "unknown method"}
    settings = identity(network, dataset.test, options)
    return Evaluation(certificates, measured(certificates, dataset, method, settings))


def _bounds(config: TrainConfig | None, bound: str, elide: Any, clip: Any) -> BoundOptions:
    """How balls are bounded: as in the training what is None, by default if that is unknown."""
    for name, value in (("elide", elide), ("clip", clip)):
        if value is not None and type(value) is not bool:
            raise UserError(f"{name} must be True, False or None, but is {value!r}")
    usual = (config.elide, config.clip) if config else (True, True)
    merged, clipped = (b if a is None else a for a, b in zip((elide, clip), usual, strict=True))
    return BoundOptions(bound, merged, (0.0, 1.0) if clipped else None)


def _file(model: Any) -> Path | None:
    """The file of a saved model or a run; its folder may remember where the images are."""
    if isinstance(model, Run):
        return model.folder / MODEL
    return model_file(model) if isinstance(model, str | Path) else None


def _opened(model: Any, device: str) -> tuple[Classifier, TrainConfig | None]:
    """The network, and how it was trained, if that is known."""
    if isinstance(model, str | Path):
        path = model_file(model)
        network, facts = load_model(path, chosen_device(device)), read_facts(path)
        return network, config_from(facts["training"], path) if "training" in facts else None
    if isinstance(model, Run):
        return model.model, model.config
    check_converted(model)
    if not isinstance(model, Classifier):
        raise UserError(
            f"a {type(model).__name__} does not say what images it takes: call"
            " ibpcore.convert(model, in_shape) first"
        )
    return model, None
