"""Import of a foreign checkpoint as a classifier."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ibpcore.errors import UserError
from ibpcore.interop.importing import state_dicts
from ibpcore.interop.importing.architectures import ARCHITECTURES, Residual
from ibpcore.interop.importing.normalizations import KNOWN_DATASETS, SOURCES, Normalization
from ibpcore.interop.importing.parts import layers_of
from ibpcore.interop.importing.residual import residual_layers
from ibpcore.interop.importing.state_dicts import FoundLayer
from ibpcore.io.pickles import read_foreign
from ibpcore.nn import IntervalConv2d, IntervalLinear, IntervalNormalize
from ibpcore.nn.cnn7 import CNN7, Architecture
from ibpcore.nn.layers import IntervalLayer
from ibpcore.nn.networks import Classifier, Network

NORMALIZATION = ({"mean", "std"}, {"mean", "sigma"})
"""Names of the tensors of a normalisation layer."""


@dataclass(frozen=True)
class Description:
    """Facts about a checkpoint that the file does not hold, given by the user.

    Attributes:
        architecture: a name in `ARCHITECTURES`.
        dataset: a name in `KNOWN_DATASETS`, or None if `in_shape` is given.
        in_shape: channels, height, width of an image.
        source: the repository whose code trained it, a name in `SOURCES`.
        mean, std: the normalisation in pixel units, one number per channel or one for all.
        crop: side of the centre crop that the network is applied to; None for no crop.

    Raises:
        UserError: the values are incomplete, unknown or contradictory.
    """

    architecture: str = "cnn7"
    dataset: str | None = None
    in_shape: tuple[int, int, int] | None = None
    source: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop: int | None = None

    def __post_init__(self) -> None:
        for name, known in (
            (self.architecture, list(ARCHITECTURES)),
            (self.dataset, list(KNOWN_DATASETS)),
            (self.source, list(SOURCES)),
        ):
            if name is not None and name not in known:
                raise UserError(f"{name!r} is unknown: there are {', '.join(known)}")
        if (self.dataset is None) == (self.in_shape is None):
            raise UserError("describe the images: give either the data set or their shape")
        channels, height, width = self.images
        if min(self.images) < 1:
            raise UserError(f"there are no images of shape {self.images}")
        if bool(self.mean) != bool(self.std):
            raise UserError("mean and std go together")
        if not {len(self.mean), len(self.std)} <= {0, 1, channels}:
            raise UserError(f"mean and std need one entry, or one for each of {channels}")
        cuts = () if self.crop is None else (height - self.crop, width - self.crop)
        if self.crop == 0 or any(cut < 0 or cut % 2 for cut in cuts):
            raise UserError(f"images of {height} x {width} have no centre crop of side {self.crop}")

    @property
    def images(self) -> tuple[int, int, int]:
        """Channels, height, width of an image."""
        return self.in_shape or KNOWN_DATASETS[str(self.dataset)].in_shape

    @property
    def seen(self) -> tuple[int, int, int]:
        """Channels, height, width of an image after the crop."""
        return self.images if self.crop is None else (self.images[0], self.crop, self.crop)

    @property
    def normalization(self) -> Normalization | None:
        """The given normalisation, or that of the repository for the data set; None if unknown."""
        if self.mean:
            return Normalization(self.mean, self.std)
        if self.source is None or self.dataset is None:
            return None
        return SOURCES[self.source][self.dataset]


def import_model(path: str | Path, said: Description) -> tuple[Classifier, dict[str, Any]]:
    """Loads a classifier from a checkpoint of another program, e.g. to certify it.

    The file may hold a state dict, a dictionary with one, or a pickled module; no code in it is
    run. A network with exactly the layers of a CNN7 is returned as one, any other as a
    `Network`. The eps of batch norm is PyTorch's default, 1e-5.

    Args:
        path: the checkpoint.
        said: what the file does not say about the network.

    Returns:
        the model in evaluation mode, and facts to save with it: name and SHA-256 of the file,
        and the description.

    Raises:
        UserError: the file holds no weights, or they do not fit the architecture, or the
            description is incomplete.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        objects = read_foreign(content)
        model, normalization = _model(state_dicts.found_layers(objects, len(content)), said)
        _check_geometry(model, state_dicts.stated_geometry(objects), said)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    facts = {
        "file": Path(path).name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "architecture": said.architecture,
        "dataset": said.dataset,
        "source": said.source,
        "crop": said.crop,
        **normalization._asdict(),
    }
    return model.eval(), {"imported": facts}


def _check_geometry(model: Classifier, stated: list[Any], said: Description) -> None:
    """Raises UserError if a pickled module has other strides or padding than the architecture."""
    built = [
        tuple(getattr(layer, name) for name in state_dicts.GEOMETRY)
        for layer in model.modules()
        if isinstance(layer, IntervalConv2d)
    ][said.crop is not None :]
    same = stated == built
    if isinstance(ARCHITECTURES[said.architecture], Residual):  # whose order may differ
        same = sorted(map(repr, stated)) == sorted(map(repr, built))
    if stated and not same:
        raise UserError(f"its convolutions have other strides or padding than {said.architecture}")


def _model(found: list[FoundLayer], said: Description) -> tuple[Classifier, Normalization]:
    dtype = _checked_type(found)
    inside = [layer for layer in found[:1] if set(layer.tensors) in NORMALIZATION]
    normalization = _normalization(inside, said)
    architecture, weighted = ARCHITECTURES[said.architecture], found[len(inside) :]
    layers = (
        residual_layers(weighted, architecture, said.seen)
        if isinstance(architecture, Residual)
        else layers_of(weighted, said.architecture, architecture, said.seen)
    )
    if said.dataset is not None:
        _check_classes(layers[-1], said.dataset)
    if normalization.mean:
        normalize = IntervalNormalize(*normalization)
        normalize.mean, normalize.std = (torch.tensor(v, dtype=dtype) for v in normalization)
        layers.insert(0, normalize)
    if said.crop is not None:
        layers.insert(0, _crop_layer(said, dtype))
    network = Network(layers, said.images)
    return _as_cnn7(network, normalization), normalization


def _checked_type(found: list[FoundLayer]) -> torch.dtype:
    types = set()
    for layer in found:
        for name, tensor in layer.tensors.items():
            types.add(tensor.dtype)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise UserError(f"{layer.name}.{name} holds values that are not finite")
    if types not in ({torch.float32}, {torch.float64}):
        raise UserError("its weights are neither all float32 nor all float64")
    return types.pop()


def _normalization(inside: list[FoundLayer], said: Description) -> Normalization:
    """That of the file or of the description, per channel; empty if it is the identity."""
    given = said.normalization
    if inside:
        if said.mean:
            raise UserError("it holds its own normalisation: leave mean and std out")
        tensors = {name: values.flatten().tolist() for name, values in inside[0].tensors.items()}
        mean, (std,) = tensors.pop("mean"), tensors.values()
        given = Normalization(tuple(mean), tuple(std))
    if given is None:
        raise UserError(
            "it holds no normalisation: give the code and data set that it was trained with (source"
            " and dataset), or the normalisation (mean and std; 0 and 1 for none)"
        )
    channels = said.images[0]
    if any(len(values) not in (0, 1, channels) for values in given):
        raise UserError(f"its normalisation has {len(given.mean)} channels, the images {channels}")
    if not all(value > 0 for value in given.std):
        raise UserError("a standard deviation must be above 0")
    if set(given.mean) <= {0} and set(given.std) <= {1}:
        return Normalization()
    return Normalization(*(values * channels if len(values) == 1 else values for values in given))


def _check_classes(last: IntervalLayer, dataset: str) -> None:
    classes = KNOWN_DATASETS[dataset].classes
    if isinstance(last, IntervalLinear) and last.out_features != classes:
        raise UserError(f"its last layer has {last.out_features} classes, {dataset} has {classes}")


def _crop_layer(said: Description, dtype: torch.dtype) -> IntervalLayer:
    """The centre crop as a convolution whose kernel is 1 in the middle and 0 elsewhere.

    It is exact in every arithmetic, since all but one of its products are 0.
    """
    channels, height, width = said.images
    kernel = height - said.seen[1] + 1, width - said.seen[2] + 1
    layer = IntervalConv2d(channels, channels, kernel, groups=channels, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.zero_()[:, :, kernel[0] // 2, kernel[1] // 2] = 1
    return layer


def _as_cnn7(network: Network, normalization: Normalization) -> Classifier:
    """`network` as a CNN7 if it has exactly its layers, otherwise `network` itself."""
    first = next(layer for layer in network if isinstance(layer, IntervalConv2d | IntervalLinear))
    width, hidden = first.weight.shape[0], network[-1].in_features
    with torch.device("meta"):
        twin = CNN7(Architecture(network.in_shape, network.classes, width, hidden, *normalization))
    if _kinds(twin) != _kinds(network):
        return network
    twin.load_state_dict(network.state_dict(), assign=True)
    return twin


def _kinds(model: Classifier) -> list[str]:
    """Layers with their arguments, but without the numbers of the normalisation."""
    return ["" if isinstance(layer, IntervalNormalize) else repr(layer) for layer in model]
