"""The published networks, where they lie in the user's folder, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ibpcore.interop.importing.models import Description, import_model
from ibpcore.nn.checkpoint import load_model
from ibpcore.nn.networks import Classifier

MODELS = "alpha-beta-CROWN/complete_verifier/models"
NO_SCALE = ((0.0,), (1.0,))
FROM_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201))
OF_SDP = ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616))
OF_RESNETS = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
OF_OVAL = ((0.485, 0.456, 0.406), (0.225, 0.225, 0.225))
OF_COLT = ((0.1307,), (0.3081,))


@dataclass(frozen=True)
class Published:
    """A network that somebody has published, and the radius that is customary for it.

    Attributes:
        file: within the user's folder; its first part is the name of the repository.
        dataset: a name in `ibpcore.data.sources.DATASETS`.
        epsilon: in pixel units, such as "2/255".
        architecture: for `ibp import`; "" for a model file of this package.
        scale: mean and std of the normalisation in pixel units, unless the model file has it.
    """

    file: str
    dataset: str
    epsilon: str
    architecture: str = ""
    scale: tuple[Sequence[float], Sequence[float]] = NO_SCALE

    def read(self, folder: Path) -> Classifier:
        """The network, in evaluation mode.

        Raises:
            UserError: the file is not what it should be.
            OSError: it cannot be read.
        """
        path = folder / self.file
        if not self.architecture:
            return load_model(path)
        mean, std = map(tuple, self.scale)
        said = Description(self.architecture, dataset=self.dataset, mean=mean, std=std)
        return import_model(path, said)[0]


def _sdp(name: str) -> Published:
    return Published(f"{MODELS}/sdp/{name}.model", "cifar10", "2/255", "crown-ibp2", OF_SDP)


def _eran(name: str, epsilon: str, architecture: str) -> Published:
    return Published(f"{MODELS}/eran/{name}_nat.pth", "mnist", epsilon, architecture)


def _oval(name: str, architecture: str) -> Published:
    return Published(f"{MODELS}/oval/{name}.pth", "cifar10", "2/255", architecture, OF_OVAL)


def _marabou(size: str) -> Published:
    return Published(
        f"{MODELS}/marabou_cifar10/cifar_marabou_{size}.pth", "cifar10", "2/255", "marabou"
    )


def _resnet(name: str, epsilon: str) -> Published:
    return Published(f"{MODELS}/cifar10_resnet/{name}.pth", "cifar10", epsilon, name, OF_RESNETS)


def _trained(method: str) -> Published:
    return Published(f"trained/{method}/model.safetensors", "mnist", "0.1")


NETWORKS: dict[str, Published] = {
    # Eleven networks of CIFAR-10, trained by PGD or by Wong and Kolter's method.
    "sdp cnn_a_adv": _sdp("cifar_cnn_a_adv"),
    "sdp cnn_a_adv_alt": _sdp("cifar_cnn_a_adv_alt"),
    "sdp cnn_a_adv4": _sdp("cifar_cnn_a_adv4"),
    "sdp cnn_a_mix": _sdp("cifar_cnn_a_mix"),
    "sdp cnn_a_mix4": _sdp("cifar_cnn_a_mix4"),
    "eran conv_small_pgd": Published(
        f"{MODELS}/eran/cifar_conv_small_pgd.pth", "cifar10", "2/255", "eran-small", FROM_CIFAR
    ),
    "oval base": _oval("cifar_base", "crown-ibp2"),
    "oval wide": _oval("cifar_wide", "crown-ibp2"),
    "oval deep": _oval("cifar_deep", "oval-deep"),
    "resnet2b": _resnet("resnet2b", "2/255"),
    "resnet4b": _resnet("resnet4b", "1/255"),
    # Not trained to be robust, or robust to PGD alone.
    "marabou small": _marabou("small"),
    "marabou medium": _marabou("medium"),
    "marabou large": _marabou("large"),
    "sdp mnist_cnn_a_adv": Published(
        f"{MODELS}/sdp/mnist_cnn_a_adv.model", "mnist", "0.3", "crown-ibp2"
    ),
    "eran 6x100": _eran("mnist_6_100", "0.026", "mlp6"),
    "eran 6x200": _eran("mnist_6_200", "0.015", "mlp6"),
    "eran 9x100": _eran("mnist_9_100", "0.026", "mlp9"),
    "eran 9x200": _eran("mnist_9_200", "0.015", "mlp9"),
    # Trained for certificates by convex relaxations.
    "wong mnist": Published("convex_adversarial/models/mnist.pth", "mnist", "0.1", "crown-ibp2"),
    "oval mnist_wide_kw": Published(
        "oval-bab/models/mnist_wide_kw.pth", "mnist", "0.1", "crown-ibp2"
    ),
    "colt mnist_0.1": Published(
        "colt/trained_models/mnist_0.1_convmed_flat_2_2_100.pt",
        "mnist",
        "0.1",
        "conv 5x5 s2 p2, relu, conv 4x4 s2 p1, relu, linear, relu, linear",
        OF_COLT,
    ),
    # Trained here, by the commands in docs/benchmarks.md.
    "trained sabr": _trained("sabr"),
    "trained mtl-ibp": _trained("mtl-ibp"),
}
"""By name; each lies in a clone of its repository, within the user's folder."""
