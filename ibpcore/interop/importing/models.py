"""Import of a foreign checkpoint as a classifier."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibpcore.choices import ORDERS
from ibpcore.errors import UserError
from ibpcore.interop.importing import parts, state_dicts
from ibpcore.interop.importing.files import is_onnx, read_checkpoint
from ibpcore.interop.importing.normalizations import (
    KNOWN_DATASETS,
    SOURCES,
    Normalization,
    is_normalizing,
    per_channel,
)
from ibpcore.interop.importing.order import by_number, without_number
from ibpcore.interop.importing.state_dicts import Found, FoundLayer, Stated
from ibpcore.interop.reading.onnx import layers_of
from ibpcore.nn import IntervalConv2d, IntervalLinear, IntervalNormalize, IntervalSequential
from ibpcore.nn.architectures import is_name, variants
from ibpcore.nn.cnn7 import CNN7, Architecture
from ibpcore.nn.grammar import LayerSequence, Residual, Weightless
from ibpcore.nn.layers import IntervalLayer
from ibpcore.nn.networks import Classifier, Network, weight_like
from ibpcore.wording import counted

NORMALIZATION = ({"mean", "std"}, {"mean", "sigma"})
"""Names of the tensors of a normalisation layer."""
HAS_NORMALIZATION = "it holds its own normalisation: leave out --mean and --std"


@dataclass(frozen=True)
class Description:
    """Facts about a checkpoint that the file does not hold, given by the user.

    Attributes:
        architecture: a name in `ARCHITECTURES`, or layers in the grammar of
            `ibpcore.nn.architectures`.
        dataset: a name in `KNOWN_DATASETS`, or None if `in_shape` is given. An ONNX file needs
            neither.
        in_shape: channels, height, width of an image.
        source: the repository whose code trained it, a name in `SOURCES`.
        mean, std: the normalisation in pixel units, one number per channel or one for all.
        crop: side of the centre crop that the network is applied to; None for no crop.
        order: a name in `ORDERS`, where the file leaves the order of its layers open.

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
    order: str | None = None

    def __post_init__(self) -> None:
        variants(self.architecture)  # raises if it is unknown
        for name, known in (
            (self.order, list(ORDERS)),
            (self.dataset, list(KNOWN_DATASETS)),
            (self.source, list(SOURCES)),
        ):
            if name is not None and name not in known:
                raise UserError(f"{name!r} is unknown: there are {', '.join(known)}")
        if self.dataset is not None and self.in_shape is not None:
            raise UserError("dataset or in_shape must be given, and not both")
        if bool(self.mean) != bool(self.std):
            raise UserError("mean and std must be given together")
        if self.has_images:
            self._check_images()

    def _check_images(self) -> None:
        channels, height, width = self.images
        if min(self.images) < 1:
            raise UserError(f"there are no images of shape {self.images}")
        if not {len(self.mean), len(self.std)} <= {0, 1, channels}:
            raise UserError(f"mean and std must have one number, or {channels}, one a channel")
        cuts = () if self.crop is None else (height - self.crop, width - self.crop)
        if self.crop == 0 or any(cut < 0 or cut % 2 for cut in cuts):
            raise UserError(f"images of {height} x {width} have no centre crop of side {self.crop}")

    @property
    def has_images(self) -> bool:
        """Whether the shape of an image is given."""
        return self.dataset is not None or self.in_shape is not None

    @property
    def images(self) -> tuple[int, int, int]:
        """Channels, height, width of an image, if it `has_images`."""
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
    """Loads a classifier from a file of another program, e.g. to certify it.

    The file may hold a state dict, a dictionary with one, a pickled module, or an ONNX network;
    no code in it is run. A network with exactly the layers of a CNN7 is returned as one, any
    other as a `Network`. The eps of batch norm is PyTorch's default, 1e-5, except in ONNX files,
    which hold it.

    Args:
        path: a file of `torch.save` or safetensors, or an ONNX file.
        said: what the file does not say about the network.

    Returns:
        the model in evaluation mode, and facts to save with it: name and SHA-256 of the file,
        and the description.

    Raises:
        UserError: the file holds no weights, or they do not fit the architecture, or their
            order is not certain, or the description is incomplete; see `from_onnx` too.
        OSError: it cannot be read.
    """
    content = Path(path).read_bytes()
    read = _from_onnx if Path(path).suffix == ".onnx" or is_onnx(content) else _from_checkpoint
    try:
        model, found = read(Path(path), content, said)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    facts = {
        "file": Path(path).name,
        "sha256": hashlib.sha256(content).hexdigest(),
        **found,
        "dataset": said.dataset,
        "source": said.source,
        "crop": said.crop,
    }
    return model.eval(), {"imported": facts}


def _from_checkpoint(
    path: Path, content: bytes, said: Description
) -> tuple[Classifier, dict[str, Any]]:
    """The model of a checkpoint, and facts about it."""
    if not said.has_images:
        raise UserError("the shape of its images is needed: give --dataset or --in-shape")
    checkpoint = read_checkpoint(content)
    found = state_dicts.found_layers(checkpoint, len(content))
    candidate, normalization = _candidate(found, said)
    if says := state_dicts.stated(checkpoint.objects):
        _check_module(candidate, says)
    model = _model(candidate, normalization, said)
    facts = {"architecture": said.architecture, "order": candidate.order}
    return model, facts | normalization._asdict()


def _from_onnx(path: Path, content: bytes, said: Description) -> tuple[Classifier, dict[str, Any]]:
    """The model of an ONNX file, and facts about it."""
    if (said.architecture, said.crop, said.order) != (Description.architecture, None, None):
        raise UserError("it is an ONNX network: leave out --architecture, --crop and --order")
    layers, shape = layers_of(path, said.images if said.has_images else None)
    normalization = Normalization()
    if not is_normalizing(layers):
        normalization = per_channel(said.normalization or normalization, shape[0])
    elif said.mean:
        raise UserError(HAS_NORMALIZATION)
    if normalization.mean:
        layers = [_normalize(normalization, weight_like(IntervalSequential(*layers))), *layers]
    model = Network(layers, shape)
    _check_classes(model.classes, said)
    return model, {"architecture": "onnx", "order": "file", **normalization._asdict()}


def _check_classes(classes: int, said: Description) -> None:
    if said.dataset is not None and classes != (known := KNOWN_DATASETS[said.dataset].classes):
        raise UserError(
            f"its last layer has {counted(classes, 'class')}, {said.dataset} has {known}"
        )


def _normalize(normalization: Normalization, like: Tensor) -> IntervalNormalize:
    """The layer, in the type of `like`."""
    normalize = IntervalNormalize(*normalization)
    normalize.mean, normalize.std = (torch.tensor(v, dtype=like.dtype) for v in normalization)
    return normalize


class Arranged(NamedTuple):
    """The layers of a file in an order.

    Attributes:
        order: its name in `ORDERS`.
        inside: the normalisation, if the file holds one.
        layers: the others.
        owners: see `parts.owners`.
    """

    order: str
    inside: list[FoundLayer]
    layers: list[FoundLayer]
    owners: dict[str, str | None]


class Candidate(NamedTuple):
    """A network that the file may hold.

    Attributes:
        order: of the layers in the file, a name in `ORDERS`.
        layers: without those that change the images.
        names: of the layers of the file, in the order of the network.
    """

    order: str
    architecture: LayerSequence
    layers: list[IntervalLayer]
    names: list[str]


def _candidate(found: Found, said: Description) -> tuple[Candidate, Normalization]:
    """The network of the file, if its order is certain, and the normalisation."""
    _check_type(found.layers)
    inside = [layer for layer in found.layers if set(layer.tensors) in NORMALIZATION]
    normalization = _normalization(inside, said)
    layers = [layer for layer in found.layers if set(layer.tensors) not in NORMALIZATION]
    name = said.architecture if is_name(said.architecture) else "the architecture"
    architectures = parts.fitting(layers, name, variants(said.architecture))
    owners = parts.owners(Found(layers, found.by_name))
    orders = {
        "file": Arranged("file", inside, layers, owners),
        "number": Arranged("number", inside, by_number(layers), owners),
    }
    if said.order is not None:
        orders = {said.order: orders[said.order]}
    elif found.by_name:
        del orders["file"]
    every = itertools.product(orders.values(), architectures)
    tried = [_tried(arranged, architecture, said) for arranged, architecture in every]
    good = [network for network in tried if isinstance(network, Candidate)]
    if not good:
        raise next(error for error in tried if isinstance(error, UserError))
    _check_order(good, sorted_layers=layers if found.by_name and said.order is None else [])
    return good[0], normalization


def _tried(
    found: Arranged, architecture: LayerSequence, said: Description
) -> Candidate | UserError:
    try:
        return _network(found, architecture, said)
    except UserError as error:
        return error


def _network(found: Arranged, architecture: LayerSequence, said: Description) -> Candidate:
    """The network of an architecture with the layers of a file.

    Raises:
        UserError: they do not fit.
    """
    weights = parts.FileWeights(found.layers, architecture, found.owners)
    layers, shape = architecture.placed(said.seen, weights)
    if len(shape) != 1:
        raise UserError(f"the architecture ends with {' x '.join(map(str, shape))} values")
    _check_classes(shape[0], said)
    before = [IntervalSequential() for _ in found.inside]
    taken = [*zip(before, found.inside, strict=True), *weights.taken]
    parts.check_positions([*before, *layers], taken, apart=not is_name(said.architecture))
    return Candidate(found.order, architecture, layers, [layer.name for _, layer in weights.taken])


def _check_order(good: list[Candidate], sorted_layers: list[FoundLayer]) -> None:
    """Raises UserError unless the order of the layers is certain.

    Args:
        good: the networks that fit.
        sorted_layers: those of a file whose order says nothing.
    """
    for other in good[1:]:
        if other.names != good[0].names:
            here, there = next(
                pair for pair in zip(good[0].names, other.names, strict=True) if pair[0] != pair[1]
            )
            raise UserError(
                f"its layers fit in two orders: {here} is stored before {there}, but their numbers"
                " say the opposite; choose one with --order file or --order number"
            )
    for kind in parts.KINDS:
        same = [layer for layer in sorted_layers if parts.kind_of(layer) is kind]
        if pair := without_number(by_number(same)):
            raise UserError(
                "its entries are sorted by name, which does not say whether"
                f" {pair[0]} comes before {pair[1]}: if it does, give --order number"
            )


def _check_module(candidate: Candidate, says: Stated) -> None:
    """Raises UserError if a pickled module has other layers than the architecture."""
    built = [
        tuple(getattr(layer, name) for name in state_dicts.GEOMETRY)
        for layer in IntervalSequential(*candidate.layers).modules()
        if isinstance(layer, IntervalConv2d)
    ]
    given = says.geometry
    if any(isinstance(part, Residual) for _, part in candidate.architecture.parts):
        built, given = sorted(built, key=repr), sorted(given, key=repr)  # the order may differ
    if given != built:
        raise UserError("its convolutions have other strides or padding than the architecture")
    every = candidate.architecture.all_parts()
    known = {part.kind for part in every if isinstance(part, Weightless)}
    if others := says.kinds - known:
        raise UserError(f"it has a {min(others)}, but the architecture has none")


def _model(candidate: Candidate, normalization: Normalization, said: Description) -> Classifier:
    """The classifier of whole images."""
    layers = [*candidate.layers]
    like = weight_like(IntervalSequential(*layers))
    if normalization.mean:
        layers.insert(0, _normalize(normalization, like))
    if said.crop is not None:
        layers.insert(0, _crop_layer(said, like.dtype))
    return _as_cnn7(Network(layers, said.images), normalization)


def _check_type(found: list[FoundLayer]) -> None:
    types = set()
    for layer in found:
        for name, tensor in layer.tensors.items():
            types.add(tensor.dtype)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise UserError(f"{layer.name}.{name} holds values that are not finite")
    if types not in ({torch.float32}, {torch.float64}):
        raise UserError("its weights are neither all float32 nor all float64")


def _normalization(inside: list[FoundLayer], said: Description) -> Normalization:
    """That of the file or of the description, per channel; empty if it is the identity."""
    given = said.normalization
    if len(inside) > 1:
        raise UserError(f"it holds two normalisations, {inside[0].name} and {inside[1].name}")
    if inside:
        if said.mean:
            raise UserError(HAS_NORMALIZATION)
        tensors = {name: values.flatten().tolist() for name, values in inside[0].tensors.items()}
        mean, (std,) = tensors.pop("mean"), tensors.values()
        given = Normalization(tuple(mean), tuple(std))
    if given is None:
        raise UserError(
            "it holds no normalisation: give --mean and --std (0 and 1 for none), or --dataset and"
            " --source, the code that trained it"
        )
    return per_channel(given, said.images[0])


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
    affine = [layer for layer in network if isinstance(layer, IntervalConv2d | IntervalLinear)]
    if not affine or not isinstance(network[-1], IntervalLinear):
        return network
    width, hidden = affine[0].weight.shape[0], network[-1].in_features
    with torch.device("meta"):
        twin = CNN7(Architecture(network.in_shape, network.classes, width, hidden, *normalization))
    if _kinds(twin) != _kinds(network):
        return network
    twin.load_state_dict(network.state_dict(), assign=True)
    return twin


def _kinds(model: Classifier) -> list[str]:
    """Layers with their arguments, but without the numbers of the normalisation."""
    return ["" if isinstance(layer, IntervalNormalize) else repr(layer) for layer in model]
