"""Checkpoints as other programs save them: the same logits; nothing in them run or guessed."""

import hashlib
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import run_ibp, snapshot, write_image, write_mnist
from torch import nn

from ibpcore import Interval, UserError, load_model, save_model
from ibpcore import cnn7 as ibpcore_cnn7
from ibpcore.interop.importing.models import Description, import_model
from ibpcore.interop.importing.normalizations import KNOWN_DATASETS, SOURCES
from ibpcore.nn.architectures import ARCHITECTURES
from ibpcore.nn.checkpoint import fingerprint, read_facts
from ibpcore.nn.cnn7 import CNN7
from ibpcore.nn.networks import Network

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
GREY = Description("cnn7", in_shape=(1, 8, 8), mean=(0.0,), std=(1.0,))
COLOUR = Description("cnn7", in_shape=(3, 8, 8), mean=MEAN, std=STD)


def affine(layer: nn.Module, norm: bool) -> list[nn.Module]:
    """A layer, its batch norm, a ReLU."""
    if not norm:
        return [layer, nn.ReLU()]
    kind = nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d
    return [layer, kind(layer.weight.shape[0]), nn.ReLU()]


def network(
    convolutions, linear, side, channels=1, norm=True, norm_linear=True, width=2, bias=True
) -> nn.Sequential:
    """Convolutions (kernel, stride, padding), a flatten, and linear layers to 10 classes."""
    torch.manual_seed(0)
    layers, size = [], side
    for i, (kernel, stride, padding) in enumerate(convolutions):
        out = width if i < 2 else 2 * width
        layers += affine(nn.Conv2d(channels, out, kernel, stride, padding, bias=bias), norm)
        channels, size = out, (size + 2 * padding - kernel) // stride + 1
    layers.append(nn.Flatten())
    inputs = channels * size * size
    for _ in range(linear - 1):
        layers += affine(nn.Linear(inputs, 6), norm_linear)
        inputs = 6
    return stirred(nn.Sequential(*layers, nn.Linear(inputs, 10)))


def stirred(model: nn.Module) -> nn.Module:
    """With batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def cnn7(side=8, strides=(1, 1, 2, 1, 1), **options) -> nn.Sequential:
    return network([(3, stride, 1) for stride in strides], 2, side, **options)


class Normalization(nn.Module):
    """As in CTBench and SABR: parameters of shape (1, C, 1, 1), one called sigma."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean).view(1, -1, 1, 1), requires_grad=False)
        self.sigma = nn.Parameter(torch.tensor(std).view(1, -1, 1, 1), requires_grad=False)

    def forward(self, x):
        return (x - self.mean) / self.sigma


class Layers(nn.Module):
    """The sequence of CTBench and SABR."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.epoch = None

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Slopes(nn.ReLU):
    """SABR's ReLU, with a parameter that a forward pass does not use."""

    def __init__(self, shape):
        super().__init__()
        self.deepz_lambda = nn.Parameter(-torch.ones(shape))


def normalized(model: nn.Sequential, slopes: bool = False) -> Layers:
    layers = [Normalization(MEAN, STD), *model]
    if slopes:
        layers = [Slopes((2, 8)) if isinstance(x, nn.ReLU) else x for x in layers]
    return Layers(*layers).eval()


def of_fastibp(model):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    return {**state, "epoch": 3, "best": (9.0, 9.5, 2)}


def of_bounded_module(model):
    """auto_LiRPA's numbers: parameters and buffers by node, and none for what it does not need."""
    state, number = {}, 1
    for module in model:
        for parameter in module.parameters():
            state[f"/{number}.param"] = parameter.detach()
            number += 1
        for name, buffer in module.named_buffers():
            if name != "num_batches_tracked":
                state[f"/{number}.buffer"] = buffer
                number += 1
        number += 1
    return state


def of_ctrain(model):
    optimizer = torch.optim.Adam(model.parameters())
    return {
        "epoch": 9,
        "model_state_dict": of_bounded_module(model),
        "optimizer_state_dict": optimizer.state_dict(),
        "loss": torch.tensor(0.5),
    }


def of_sabr(model):
    """A whole module with optimiser and schedule on it."""
    whole = Layers(normalized(model, slopes=True))
    whole.optimizer = torch.optim.Adam(whole.parameters(), lr=1e-9)
    whole.schedule = torch.optim.lr_scheduler.MultiStepLR(whole.optimizer, [3, 5])
    whole.optimizer.step()
    return whole


OUTSIDE = {
    "fastibp": of_fastibp,
    "state dict": nn.Module.state_dict,
    "DataParallel": lambda model: {"net": nn.DataParallel(model).state_dict()},
    "whole module": lambda model: model,
    "crown-ibp": lambda model: {"state_dict": [model.state_dict()], "epoch": 1},
    "ctrain": of_ctrain,
    "ctrain, plain": of_bounded_module,
}
INSIDE = {
    "ctbench": lambda model: normalized(model).state_dict(),
    "sabr": of_sabr,
    "sabr, state dict": lambda model: of_sabr(model).state_dict(),
}


def saved(content, folder: Path) -> Path:
    path = folder / "foreign.pt"
    torch.save(content, path)
    return path


def without(state, *starts):
    return {name: value for name, value in state.items() if not name.startswith(starts)}


def logits_agree(model, reference, shape, mean=(0.0,), std=(1.0,)):
    torch.manual_seed(1)
    images = torch.rand(5, *shape)
    scale = [torch.tensor(values).view(-1, 1, 1) for values in (mean, std)]
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference((images - scale[0]) / scale[1]))


@pytest.mark.parametrize("layout", OUTSIDE)
def test_layouts_that_hold_no_normalisation(tmp_path, layout):
    reference = cnn7(channels=3)
    model, facts = import_model(saved(OUTSIDE[layout](reference), tmp_path), COLOUR)
    assert type(model) is CNN7
    assert (model.in_shape, model.classes, model.training) == ((3, 8, 8), 10, False)
    assert facts["imported"]["mean"] == MEAN
    logits_agree(model, reference, (3, 8, 8), MEAN, STD)


@pytest.mark.parametrize("layout", INSIDE)
def test_layouts_that_hold_their_normalisation(tmp_path, layout):
    reference = cnn7(channels=3)
    path = saved(INSIDE[layout](reference), tmp_path)
    model, facts = import_model(path, Description(in_shape=(3, 8, 8)))
    assert type(model) is CNN7
    assert facts["imported"]["std"] == pytest.approx(STD)
    logits_agree(model, reference, (3, 8, 8), MEAN, STD)
    with pytest.raises(UserError, match="holds its own normalisation: leave out --mean"):
        import_model(path, COLOUR)


def test_a_normalisation_that_does_nothing_is_left_out(tmp_path):
    """One number for all channels, 0 and 1, as SABR has it on MNIST."""
    reference = cnn7(channels=3)
    content = Layers(Normalization(0.0, 1.0), *reference).state_dict()
    model, facts = import_model(saved(content, tmp_path), Description(in_shape=(3, 8, 8)))
    assert facts["imported"]["mean"] == ()
    assert len(model) == len(reference)
    logits_agree(model, reference, (3, 8, 8))


CONVOLUTIONS = {
    "cnn3": [(5, 2, 2), (4, 2, 1)],
    "cnn4": [(5, 2, 2), (4, 2, 1)],
    "cnn5": [(3, 1, 1), (4, 2, 1), (4, 2, 1)],
    "cnn6": [(3, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1)],
    "cnn7": [(3, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 1), (3, 1, 1)],
    "cnn8": [(3, 1, 1), (3, 1, 1), (3, 2, 1), *[(3, 1, 1)] * 3],
    "cnn9": [(3, 1, 1), (3, 1, 1), (3, 2, 1), *[(3, 1, 1)] * 4],
    "cnn11": [(3, 1, 1), (3, 1, 1), (3, 2, 1), *[(3, 1, 1)] * 6],
    "cnn13": [(3, 1, 1), (3, 1, 1), (3, 2, 1), *[(3, 1, 1)] * 8],
    "crown-ibp2": [(4, 2, 1), (4, 2, 1)],
    "crown-ibp3": [(5, 1, 1), (5, 1, 1), (4, 4, 0)],
    "crown-ibp4": [(3, 1, 1), (4, 2, 1), (3, 1, 1), (4, 2, 1)],
    "dm-small": [(4, 2, 0), (4, 1, 0)],
    "dm-medium": [(3, 1, 0), (4, 2, 0), (3, 1, 0), (4, 2, 0)],
    "dm-large": [(3, 1, 0), (3, 1, 0), (3, 2, 0), (3, 1, 0), (3, 1, 0)],
    "eran-small": [(4, 2, 0), (4, 2, 0)],
    "marabou": [(4, 2, 0), (4, 2, 0)],
    "oval-deep": [(4, 2, 1), (3, 1, 1), (3, 1, 1), (4, 2, 1)],
    "mlp1": [],
    "mlp3": [],
    "mlp5": [],
}
LINEAR = {
    **{"cnn3": 1, "crown-ibp4": 3, "dm-medium": 3, "marabou": 3},
    **{"mlp1": 1, "mlp3": 3, "mlp5": 5},
}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_sequential_architecture(tmp_path, name, norm):
    reference = network(CONVOLUTIONS[name], LINEAR.get(name, 2), 20, norm=norm, norm_linear=norm)
    said = Description(name, in_shape=(1, 20, 20), mean=(0.0,), std=(1.0,))
    model, _ = import_model(saved(reference.state_dict(), tmp_path), said)
    assert type(model) is (CNN7 if name == "cnn7" and norm else Network)
    logits_agree(model, reference, (1, 20, 20))


class Block(nn.Module):
    """Two convolutions, or three with a grouped one between, and a shortcut where it needs one."""

    def __init__(self, inputs, outputs, stride, kind, norm):
        super().__init__()
        grouped = kind == "resnext"
        self.conv1 = nn.Conv2d(inputs, 4, 1) if grouped else nn.Conv2d(inputs, 4, 3, stride, 1)
        self.bn1 = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(4, 4, 3, stride, 1, groups=2) if grouped else nn.Identity()
        self.bn2 = nn.BatchNorm2d(4) if norm and grouped else nn.Identity()
        last, norm3 = nn.Conv2d(4, outputs, 1 if grouped else 3, 1, 0 if grouped else 1), None
        norm3 = nn.BatchNorm2d(outputs) if norm else nn.Identity()
        if grouped:
            self.conv3, self.bn3 = last, norm3
        else:
            self.conv2, self.bn2 = last, norm3
        shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride),
                nn.BatchNorm2d(outputs) if norm else nn.Identity(),
            )
        setattr(self, "shortcut" if grouped else "downsample", shortcut)

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            return torch.relu(self.bn3(self.conv3(torch.relu(y))) + self.shortcut(x))
        return torch.relu(y + self.downsample(x))


class ResidualNetwork(nn.Module):
    """Named as FastIBP's, with two blocks in each stage."""

    def __init__(self, kind, norm):
        super().__init__()
        self.names = ("dense", "dense_bn", "fc")
        if kind == "resnext":
            self.names = ("linear1", "bn_dense", "linear2")
        self.conv1 = nn.Conv2d(1, 3, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(3) if norm else nn.Identity()
        for stage, (inputs, outputs, stride) in enumerate([(3, 6, 1), (6, 6, 2), (6, 8, 2)], 1):
            first = Block(inputs, outputs, stride, kind, norm)
            stages = nn.Sequential(first, Block(outputs, outputs, 1, kind, norm))
            setattr(self, f"layer{stage}", stages)
        head = nn.Linear(8 * 2 * 2, 5), nn.BatchNorm1d(5) if norm else nn.Identity()
        for name, layer in zip(self.names, (*head, nn.Linear(5, 10)), strict=True):
            setattr(self, name, layer)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x))).flatten(1)
        dense, norm, last = (getattr(self, name) for name in self.names)
        return last(torch.relu(norm(dense(x))))


def residual(kind, norm=True):
    torch.manual_seed(0)
    return stirred(ResidualNetwork(kind, norm))


def residual_said(kind):
    return Description(kind, in_shape=(1, 7, 8), mean=(0.0,), std=(1.0,))


RESIDUAL = ("wide-resnet", "resnext")


class VnnBlock(nn.Module):
    def __init__(self, inputs, outputs, stride, norm):
        super().__init__()
        bn = nn.BatchNorm2d if norm else lambda channels: nn.Identity()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)
        self.bn1 = bn(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=not norm)
        self.bn2 = bn(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=not norm)
            self.shortcut = nn.Sequential(conv, bn(outputs))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class VnnNetwork(nn.Module):
    """Named as the networks of VNN-COMP's cifar10_resnet."""

    def __init__(self, stages, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, 2, 1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(2) if norm else nn.Identity()
        self.layer1 = nn.Sequential(VnnBlock(2, 4, 2, norm), VnnBlock(4, 4, 1, norm))
        self.layer2 = nn.Sequential()
        if stages == 2:
            self.layer2 = nn.Sequential(VnnBlock(4, 4, 2, norm), VnnBlock(4, 4, 1, norm))
        self.linear1 = nn.Linear(4 if stages == 2 else 16, 5)
        self.linear2 = nn.Linear(5, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.linear2(torch.relu(self.linear1(x.flatten(1))))


VNN = {"resnet2b": 1, "resnet4b": 2}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", VNN)
def test_the_residual_networks_of_vnn_comp(tmp_path, name, norm):
    torch.manual_seed(0)
    reference = stirred(VnnNetwork(VNN[name], norm))
    said = Description(name, in_shape=(1, 8, 8), mean=(0.0,), std=(1.0,))
    model, _ = import_model(saved({"state_dict": reference.state_dict()}, tmp_path), said)
    logits_agree(model, reference, (1, 8, 8))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", RESIDUAL)
def test_every_residual_architecture(tmp_path, kind, norm):
    reference = residual(kind, norm)
    state = {f"module.{name}": value for name, value in reference.state_dict().items()}
    model, _ = import_model(saved({"state_dict": state}, tmp_path), residual_said(kind))
    logits_agree(model, reference, (1, 7, 8))
    assert set(ARCHITECTURES) == {*CONVOLUTIONS, *RESIDUAL, *VNN} - {"mlp1", "mlp3", "mlp5"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "layer1.0.conv2."), "has 16 batch norms, the file has 17"),
        (lambda s: without(s, "layer2.0.bn1."), "neither all layers but the last, nor all conv"),
        (lambda s: without(s, "layer1.1."), "the file has 14 convolutions and 2 linear"),
        (lambda s: without(s, "fc."), "the file has 16 convolutions and 1 linear"),
        (lambda s: {**s, "layer4.0.weight": torch.ones(2, 2)}, "convolutions and 3 linear"),
        (lambda s: {**s, "fc.weight": torch.ones(10, 4)}, "fc.weight takes 4 features, but the"),
        (lambda s: {**s, "conv1.weight": torch.ones(3)}, "conv1 lacks running_mean"),
    ],
)
def test_residual_weights_that_do_not_fit(tmp_path, change, message):
    path = saved(change(residual("wide-resnet").state_dict()), tmp_path)
    with pytest.raises(UserError, match=message):
        import_model(path, residual_said("wide-resnet"))


def test_groups_that_do_not_divide(tmp_path):
    state = residual("resnext").state_dict()
    state["layer1.0.conv2.weight"] = torch.zeros(4, 3, 3, 3)
    message = r"conv2.weight is \(4, 3, 3, 3\), but should be \(4, 4, 3, 3\)"
    with pytest.raises(UserError, match=message):
        import_model(saved(state, tmp_path), residual_said("resnext"))


@pytest.mark.parametrize(
    "options",
    [{"norm_linear": False}, {"bias": False}, {"strides": (1, 1, 2, 1, 2)}],
    ids=["no batch norm on the linear layer", "no bias", "stride 2 in small images"],
)
def test_what_is_nearly_a_cnn7_is_a_network(tmp_path, options):
    reference = cnn7(**options)
    model, _ = import_model(saved(reference.state_dict(), tmp_path), GREY)
    assert type(model) is Network
    logits_agree(model, reference, (1, 8, 8))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_fifth_stride_of_large_images(tmp_path, stride):
    """CTRAIN's CNN7 has stride 1 at 64 pixels too, the others 2."""
    reference = cnn7(64, (1, 1, 2, 1, stride), width=1)
    said = Description(in_shape=(1, 64, 64), mean=(0.0,), std=(1.0,))
    model, _ = import_model(saved(reference.state_dict(), tmp_path), said)
    assert type(model) is (CNN7 if stride == 2 else Network)
    logits_agree(model, reference, (1, 64, 64))


def test_an_imported_cnn7_is_one_to_the_bit(tmp_path):
    reference = cnn7()
    model, _ = import_model(saved(reference.state_dict(), tmp_path), GREY)
    own = CNN7(model.architecture)
    own.load_state_dict(reference.state_dict())
    assert fingerprint(model) == fingerprint(own)


def test_float64_stays(tmp_path):
    reference = cnn7(channels=3).double()
    path = saved(reference.state_dict(), tmp_path)
    model, _ = import_model(path, COLOUR)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        difference = model(images) - reference((images - mean) / std)
    assert difference.abs().max() < 1e-12


def test_the_middle_of_an_image(tmp_path):
    reference = cnn7(8)
    said = Description(in_shape=(1, 14, 12), mean=(0.0,), std=(1.0,), crop=8)
    model, _ = import_model(saved(reference.state_dict(), tmp_path), said)
    images = torch.rand(3, 1, 14, 12)
    middle = images[:, :, 3:11, 2:10]
    assert torch.equal(model[0](images), middle)
    assert torch.equal(model[0](Interval.ball(images, 0.1)).lower, Interval.ball(middle, 0.1).lower)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(middle))


def test_the_normalisation_of_a_source():
    assert Description(dataset="mnist", source="fastibp").normalization == ((), ())
    assert Description(dataset="mnist", source="ctrain").normalization == ((0.1307,), (0.3081,))
    for source in SOURCES:
        assert Description(dataset="cifar10", source=source).normalization.std[2] == 0.2010
        assert SOURCES[source].keys() == KNOWN_DATASETS.keys()


# What does not fit


WRONG = {
    "a convolution": (
        lambda s: without(s, "12.", "13."),
        "cnn7 has 5 convolutions and 2 linear layers, the file has 4 convolutions and 2",
    ),
    "a linear layer": (
        lambda s: without(s, "19."),
        "the file has 5 convolutions and 1 linear layers",
    ),
    "what a batch norm belongs to": (
        lambda s: without(s, "12."),
        "the file has 4 convolutions and 2",
    ),
    "a statistic": (lambda s: without(s, "4.running_var"), "4 lacks running_var"),
    "statistics": (lambda s: without(s, "4.running"), "4 lacks running_mean and running_var"),
    "a bias": (lambda s: without(s, "4.bias"), "4 lacks bias"),
    "a batch norm": (
        lambda s: without(s, "4."),
        "neither all layers but the last, nor all convolutions",
    ),
    "a weight": (lambda s: without(s, "3.weight"), "3, with bias, is not a known layer"),
    "another shape": (
        lambda s: {**s, "3.bias": torch.zeros(3)},
        r"3.bias is \(3,\), but should be \(2,\)",
    ),
    "other channels": (
        lambda s: {**s, "3.weight": torch.zeros(2, 5, 3, 3)},
        r"3.weight is \(2, 5, 3, 3\), but should be \(2, 2, 3, 3\)",
    ),
    "another kernel": (
        lambda s: {**s, "3.weight": torch.zeros(2, 2, 5, 5)},
        r"3.weight is \(2, 2, 5, 5\), but should be \(2, 2, 3, 3\)",
    ),
    "other features": (
        lambda s: {**s, "16.weight": torch.zeros(6, 100)},
        "16.weight takes 100 features, but the layers before it compute 64",
    ),
    "superfluous": (
        lambda s: {**s, "20.scale": torch.ones(1)},
        "20, with scale, is not a known layer",
    ),
    "another linear layer": (
        lambda s: {**s, "21.weight": torch.ones(10, 10)},
        "the file has 5 convolutions and 3 linear layers",
    ),
    "a last batch norm": (
        lambda s: {**s, "20.running_mean": torch.ones(10), "20.running_var": torch.ones(10)},
        "cnn7 has 6 batch norms, the file has 7",
    ),
    "a second batch norm": (
        lambda s: {**s, "2.running_mean": torch.ones(2), "2.running_var": torch.ones(2)},
        "cnn7 has 6 batch norms, the file has 7",
    ),
    "a layer without weights": (
        lambda s: {name.replace("19.", "20."): value for name, value in s.items()},
        "20 would be number 19 if the architecture had",
    ),
    "no tensor": (lambda s: {**s, "3.bias": 1.0}, "its entry 3.bias is not a tensor"),
    "no name": (lambda s: {**s, 3: torch.ones(2)}, "its entry 3 is not a tensor"),
    "no number": (
        lambda s: {**s, "3.bias": torch.tensor([0.0, torch.inf])},
        "3.bias holds values that are not finite",
    ),
    "no variance": (
        lambda s: {**s, "1.running_var": -torch.ones(2)},
        "1.running_var holds variances below 0",
    ),
    "another type": (
        lambda s: {**s, "3.bias": torch.zeros(2).half()},
        "neither all float32 nor all float64",
    ),
    "nothing": (lambda s: {}, "it holds no state dict"),
    "a list": (lambda s: [s], "it holds no state dict"),
}


@pytest.mark.parametrize("what", WRONG)
def test_weights_that_do_not_fit(tmp_path, what):
    change, message = WRONG[what]
    path = saved(change(cnn7().state_dict()), tmp_path)
    with pytest.raises(UserError, match=f"foreign.pt: .*{message}"):
        import_model(path, GREY)


def test_auto_lirpas_numbers_that_do_not_fit(tmp_path):
    state = of_bounded_module(cnn7())
    names = list(state)
    with pytest.raises(UserError, match="layer /1 has 3 more parameters and 1 buffer"):
        import_model(saved(without(state, names[5]), tmp_path), GREY)
    with pytest.raises(UserError, match="its entry scale is superfluous"):
        import_model(saved({**state, "scale": torch.ones(1)}, tmp_path), GREY)


def test_entries_in_any_order(tmp_path):
    """Places in a sequence say the order, not the dictionary."""
    reference = cnn7()
    state = dict(reversed(reference.state_dict().items()))
    model, _ = import_model(saved(state, tmp_path), GREY)
    logits_agree(model, reference, (1, 8, 8))


def test_a_normalisation_in_any_order(tmp_path):
    reference = cnn7(channels=3)
    state = dict(reversed(normalized(reference).state_dict().items()))
    model, _ = import_model(saved(state, tmp_path), Description(in_shape=(3, 8, 8)))
    logits_agree(model, reference, (3, 8, 8), MEAN, STD)


@pytest.mark.parametrize(
    "said",
    [
        {"in_shape": (1, 8, 8), "dataset": "mnist"},
        {"dataset": "moon"},
        {"dataset": "mnist", "architecture": "cnn99"},
        {"dataset": "mnist", "source": "hearsay"},
        {"dataset": "mnist", "order": "size"},
        {"dataset": "mnist", "architecture": "conv 3"},
        {"dataset": "cifar10", "mean": (0.1, 0.2, 0.3)},
        {"dataset": "cifar10", "mean": (0.1, 0.2), "std": (1.0, 1.0)},
        {"in_shape": (1, 0, 8)},
        {"in_shape": (1, 8, 8), "crop": 9},
        {"in_shape": (1, 8, 8), "crop": 7},
        {"in_shape": (1, 8, 8), "crop": 0},
    ],
)
def test_descriptions_that_say_nothing(said):
    with pytest.raises(UserError):
        Description(**said)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (Description(in_shape=(1, 8, 8)), "it holds no normalisation: give --mean and --std"),
        (Description(in_shape=(1, 8, 8), source="ctrain"), "it holds no normalisation"),
        (Description(in_shape=(1, 8, 8), mean=(0.0,), std=(0.0,)), "must be above 0"),
        (Description(dataset="mnist", source="ctrain"), "takes 64 features"),
    ],
)
def test_what_else_must_be_said(tmp_path, said, message):
    with pytest.raises(UserError, match=message):
        import_model(saved(cnn7().state_dict(), tmp_path), said)


def test_another_number_of_classes_than_the_data_set_has(tmp_path):
    content = cnn7(28, width=1).state_dict()
    content["19.weight"], content["19.bias"] = torch.zeros(7, 6), torch.zeros(7)
    with pytest.raises(UserError, match="its last layer has 7 classes, mnist has 10"):
        import_model(saved(content, tmp_path), Description(dataset="mnist", source="fastibp"))


# Files that mean harm


class Trap:
    def __init__(self, function, marker):
        self.function, self.marker = function, marker

    def __reduce__(self):
        return self.function, (str(self.marker),)


def spring(marker):
    Path(marker).mkdir()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.mkdir, spring])
def test_nothing_in_a_file_is_run(tmp_path, function, zipped):
    marker, path = tmp_path / "sprung", tmp_path / "foreign.pt"
    content = {"model": cnn7().state_dict(), "trap": Trap(function, marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    import_model(path, GREY)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the trap itself works"


def test_whole_modules_are_not_made(tmp_path, monkeypatch):
    path = saved(of_sabr(cnn7(channels=3)), tmp_path)
    monkeypatch.setattr(Layers, "__new__", None)
    with pytest.raises(TypeError):
        torch.load(path, weights_only=False)
    model, _ = import_model(path, Description(in_shape=(3, 8, 8)))
    assert type(model) is CNN7


def test_a_whole_module_of_other_strides_is_refused(tmp_path):
    """With the stride in the first convolution instead of the third all shapes are the same."""
    whole = cnn7()
    first, _, third, *_ = (part for part in whole if isinstance(part, nn.Conv2d))
    first.stride, third.stride = third.stride, first.stride
    with pytest.raises(UserError, match="other strides or padding than the architecture"):
        import_model(saved({"model": whole}, tmp_path), GREY)


def test_the_shape_of_a_tensor_costs_nothing(tmp_path):
    state = cnn7().state_dict()
    state["16.weight"] = torch.zeros(1).expand(2**30, 2**30)
    path = saved(state, tmp_path)
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match="its tensors are larger than the file itself"):
        import_model(path, GREY)


def test_a_whole_module_of_other_activations_is_refused(tmp_path):
    """They have no weights, and would be taken for ReLUs."""
    whole = nn.Sequential(*[nn.LeakyReLU() if isinstance(x, nn.ReLU) else x for x in cnn7()])
    with pytest.raises(UserError, match="it has a LeakyReLU, but the architecture has none"):
        import_model(saved(whole, tmp_path), GREY)


def test_modules_within_themselves(tmp_path):
    """And a ReLU that is used again and again."""
    relu, reference = nn.ReLU(), cnn7()
    whole = nn.Sequential(*[relu if isinstance(x, nn.ReLU) else x for x in cnn7()])
    whole[0]._modules["again"] = whole
    model, _ = import_model(saved(whole, tmp_path), GREY)
    logits_agree(model, reference, (1, 8, 8))


def test_a_module_within_a_module_without_end(tmp_path):
    whole = nn.Identity()
    for _ in range(40):
        whole = nn.Sequential(whole)
    with pytest.raises(UserError, match="nor a module that can be read"):
        import_model(saved(whole, tmp_path), GREY)


def test_another_eps_of_a_whole_module(tmp_path):
    whole = cnn7()
    whole[1].eps = 1e-3
    with pytest.raises(UserError, match=r"1.eps is 0.001, but batch norm must have 1e-05"):
        import_model(saved(whole, tmp_path), GREY)


def test_wrappers_without_end(tmp_path):
    content = {}
    content["model"] = content
    with pytest.raises(UserError, match="its entry model is not a tensor"):
        import_model(saved(content, tmp_path), GREY)


@pytest.mark.parametrize("layout", OUTSIDE)
def test_files_before_pytorch_1_6(tmp_path, layout):
    reference, path = cnn7(channels=3), tmp_path / "old"
    torch.save(OUTSIDE[layout](reference), path, _use_new_zipfile_serialization=False)
    model, _ = import_model(path, COLOUR)
    logits_agree(model, reference, (3, 8, 8), MEAN, STD)


def test_safetensors(tmp_path):
    """Its entries are sorted: 0, 1, 10, 12, 13, ...; the numbers give the order."""
    reference = cnn7(channels=3)
    safetensors.torch.save_file(reference.state_dict(), tmp_path / "f.safetensors")
    model, facts = import_model(tmp_path / "f.safetensors", COLOUR)
    assert type(model) is CNN7
    assert facts["imported"]["order"] == "number"
    logits_agree(model, reference, (3, 8, 8), MEAN, STD)


def test_a_changed_or_truncated_file_is_an_error_or_finite(tmp_path):
    content = saved(cnn7().state_dict(), tmp_path).read_bytes()
    path, refused = tmp_path / "f", 0
    for seed in range(60):
        torch.manual_seed(seed)
        place = int(torch.randint(len(content), ()))
        bit = struct.pack("B", content[place] ^ (1 << seed % 8))
        path.write_bytes(
            content[:place] if seed % 4 == 0 else content[:place] + bit + content[place + 1 :]
        )
        try:
            model, _ = import_model(path, GREY)
        except UserError:
            refused += 1
        else:
            assert bool(model(torch.rand(1, 1, 8, 8)).isfinite().all())
    assert 15 <= refused < 60


# From the shell


def test_imported_and_certified(tmp_path):
    path, out = saved(of_fastibp(cnn7()), tmp_path), tmp_path / "model.safetensors"
    asked = ["--in-shape", "1,8,8", "--mean", "0", "--std", "1"]
    outcome = run_ibp("import", path, *asked, "-o", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert "CNN7" in outcome.out
    assert "1 x 8 x 8, 10 classes" in outcome.out
    facts = read_facts(out)["imported"]
    assert facts["file"] == "foreign.pt"
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts["architecture"] == "cnn7"
    data = ["--dataset", "digits", "--epsilon-max", "0.05"]
    outcome = run_ibp("certify", out, *data, "--limit-test", "8", "--out", tmp_path / "c")
    assert (outcome.code, outcome.err) == (0, "")
    assert len((tmp_path / "c" / "certificates.csv").read_text().splitlines()) == 1 + 8
    logits_agree(load_model(out), cnn7(), (1, 8, 8))


def test_an_imported_model_knows_its_data_set_and_radius(tmp_path, monkeypatch):
    """Those of its description: the preset's radius, which is said, unless another is given."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = ibpcore_cnn7((1, 28, 28), 10, width=1, hidden=2)
    path = saved(network.state_dict(), tmp_path)
    asked = ("--dataset", "mnist", "--source", "fastibp")
    outcome = run_ibp("import", path, *asked, "-o", "m.safetensors")
    assert outcome.out.endswith("in m.safetensors: ibp certify m.safetensors --epsilon-max 0.4\n")
    write_mnist(tmp_path / "data")
    assumed = "epsilon_max 0.4 is the preset of mnist; --epsilon-max gives another\n"
    where = ("--data-dir", "data", "--device", "cpu", "--out")
    code, out, err = run_ibp("certify", "m.safetensors", *where, "a")
    assert (code, err) == (0, "")
    assert assumed in out
    assert ", 20 test images, epsilon_max 0.4, " in out
    code, out, err = run_ibp("certify", "m.safetensors", *where, "b", "--epsilon-max", 0.1)
    assert (code, err) == (0, "")
    assert "preset" not in out
    write_image(tmp_path / "a.png", 0, (28, 28))
    assert assumed in run_ibp("predict", "a.png", "--model", "m.safetensors").out
    for strange in ("cifar100", ["mnist"], None):
        save_model(network, "s.safetensors", imported={"dataset": strange})
        code, out, err = run_ibp("certify", "s.safetensors")
        assert code == 1
        assert "s.safetensors does not say how it was trained: give --dataset" in err
    for strange in ("mnist", None):
        save_model(network, "t.safetensors", imported=strange)
        assert run_ibp("certify", "t.safetensors").code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--in-shape", "8,8"], "'8,8' is not channels,height,width"),
        (["--in-shape", "1,8,x"], "'1,8,x' is not channels,height,width"),
        (["--in-shape", "1,8,8", "--mean", "a"], "'a' is not numbers"),
        (["--in-shape", "1,8,8", "--mean", "nan", "--std", "1"], "'nan' is not numbers"),
        (["--in-shape", "1,8,8"], "it holds no normalisation"),
        ([], "the shape of its images is needed: give --dataset or --in-shape"),
        (["--dataset", "mnist", "--in-shape", "1,8,8"], "--dataset or --in-shape must be given"),
        (["--in-shape", "1,8,8", "--mean", "0"], "--mean and --std must be given together"),
        (["--in-shape", "1,8,8", "--mean", "0,1", "--std", "1"], "--mean and --std must have one"),
    ],
)
def test_a_wrong_import_is_one_line_and_leaves_nothing(tmp_path, arguments, message):
    path = saved(cnn7().state_dict(), tmp_path)
    before = snapshot(tmp_path)
    outcome = run_ibp("import", path, *arguments, "-o", tmp_path / "m.safetensors")
    assert outcome.code != 0
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    path = saved(cnn7().state_dict(), tmp_path)
    outcome = run_ibp("import", path, "--in-shape", "1,8,8", "-o", path)
    assert outcome.code == 1
    assert "already exists" in outcome.err
    torch.load(path, weights_only=True)


def test_a_checkpoint_that_is_not_there(tmp_path):
    outcome = run_ibp("import", tmp_path / "no", "--in-shape", "1,8,8", "-o", tmp_path / "m")
    assert outcome.code == 1
    assert "No such file" in outcome.err
