"""The order of the layers of a file: certain, or asked for; and what the names of layers say."""

import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import run_ibp
from torch import nn

from ibpcore import UserError
from ibpcore.interop.importing.models import Description, import_model
from ibpcore.interop.importing.order import by_number, without_number
from ibpcore.interop.importing.state_dicts import FoundLayer

IMAGES = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
CNN = "conv 3x3 p1, relu, conv 3x3 p1, relu, conv 3x3 p1, relu, linear, relu, linear"
MLP = "linear, relu, linear, relu, linear"


def said(architecture: str, order: str | None = None) -> Description:
    images = {"in_shape": (1, 6, 6), "mean": (0.0,), "std": (1.0,)}
    return Description(architecture, order=order, **images)


def mlp(*names: str, hidden: int = 5) -> dict[str, nn.Module]:
    """Linear layers with these names; all but the first and last have the same shape."""
    torch.manual_seed(0)
    sizes = [36, *[hidden] * (len(names) - 1), 10]
    return {
        name: nn.Linear(*pair) for name, pair in zip(names, itertools.pairwise(sizes), strict=True)
    }


def cnn(*names: str) -> dict[str, nn.Module]:
    """Three convolutions and two linear layers with these names."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(inputs, 4, 3, padding=1) for inputs in (1, 4, 4)]
    linear = [nn.Linear(4 * 36, 5), nn.Linear(5, 10)]
    return dict(zip(names, [*convolutions, *linear], strict=True))


def state(layers: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{last}": tensor
        for name, module in layers.items()
        for last, tensor in module.state_dict().items()
    }


@torch.no_grad()
def logits(layers: dict[str, nn.Module]) -> torch.Tensor:
    x = IMAGES
    for number, module in enumerate(layers.values()):
        x = x.flatten(1) if isinstance(module, nn.Linear) else x
        x = module(torch.relu(x) if number else x)
    return x


def saved(entries: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(entries, folder / "f")
    return folder / "f"


@torch.no_grad()
def check(path: Path, description: Description, expected: torch.Tensor) -> str:
    """Checks the logits of the imported model; returns the order that was used."""
    model, facts = import_model(path, description)
    torch.testing.assert_close(model(IMAGES), expected)
    return facts["imported"]["order"]


@pytest.mark.parametrize(
    "names",
    [
        ("fc1", "fc2", "fc3"),
        ("fc1", "fc2", "fc"),
        ("layer1", "layer2", "layer4"),
        ("first", "second", "third"),
        ("l0", "l10", "l11"),
        ("net.fc1", "net.fc2", "head"),
        ("dense_1", "dense_2", "dense"),
        ("a1b2", "a1b3", "a2b1"),
        ("block.0.fc", "block.1.fc", "out"),
        ("body.0", "body.2", "head.0"),
        ("model.1", "model.3", "model.5"),
        ("x.fc3", "y.fc2", "z.fc1"),
    ],
)
def test_names_of_attributes_are_no_positions(tmp_path, names):
    layers = mlp(*names)
    assert check(saved(state(layers), tmp_path), said("mlp3"), logits(layers)) == "file"


@pytest.mark.parametrize("order", ["file", "number"])
def test_where_both_orders_fit_the_user_is_asked(tmp_path, order):
    """Convolution 3 is stored before convolution 2, of the same shape."""
    stored = cnn("conv1", "conv3", "conv2", "fc1", "fc2")
    path = saved(state(stored), tmp_path)
    asked = "conv3 is stored before conv2, but .* choose one with --order file or --order number"
    with pytest.raises(UserError, match=asked):
        import_model(path, said(CNN))
    numbered = {name: stored[name] for name in ("conv1", "conv2", "conv3", "fc1", "fc2")}
    expected = logits(stored if order == "file" else numbered)
    assert check(path, said(CNN, order), expected) == order
    assert not torch.allclose(logits(stored), logits(numbered))


def test_where_one_order_fits_it_is_taken(tmp_path):
    """The last layer is stored first."""
    layers = mlp("fc1", "fc2", "fc3")
    stored = {name: layers[name] for name in ("fc3", "fc2", "fc1")}
    assert check(saved(state(stored), tmp_path), said("mlp3"), logits(layers)) == "number"
    # And where numbers go down from the input to the output.
    layers = mlp("fc3", "fc2", "fc1")
    assert check(saved(state(layers), tmp_path), said("mlp3"), logits(layers)) == "file"


def test_places_in_a_list_that_disagree_with_the_file(tmp_path):
    layers = mlp("1", "3", "5", "7")
    stored = {name: layers[name] for name in ("1", "5", "3", "7")}
    assert check(saved(state(stored), tmp_path), said("mlp4"), logits(layers)) == "number"


def test_a_sorted_state_dict_has_no_order_but_that_of_numbers(tmp_path):
    names = [f"fc{number}" for number in range(1, 13)]
    layers = mlp(*names)
    entries = dict(sorted(state(layers).items()))
    assert list(entries)[:3] == ["fc1.bias", "fc1.weight", "fc10.bias"]
    assert check(saved(entries, tmp_path), said("mlp12"), logits(layers)) == "number"
    safetensors.torch.save_file(state(layers), tmp_path / "s")
    assert check(tmp_path / "s", said("mlp12"), logits(layers)) == "number"


@pytest.mark.parametrize("safe", [True, False])
def test_a_sorted_state_dict_without_numbers_is_asked_about(tmp_path, safe):
    """`hidden` and `inner` have the same shape, and nothing says which comes first."""
    layers = mlp("above", "inner", "hidden", "last")
    entries, path = dict(sorted(state(layers).items())), tmp_path / "f"
    safetensors.torch.save_file(entries, path) if safe else torch.save(entries, path)
    message = "sorted by name, which does not say whether above comes before hidden"
    with pytest.raises(UserError, match=message):
        import_model(path, said("mlp4"))
    by_name = {name: layers[name] for name in sorted(layers)}
    for order in ("file", "number"):
        assert check(path, said("mlp4", order), logits(by_name)) == order


def test_kinds_of_layers_tell_sorted_names_apart(tmp_path):
    layers = cnn("features.0", "features.2", "features.4", "classifier.0", "classifier.2")
    safetensors.torch.save_file(state(layers), tmp_path / "f")
    assert check(tmp_path / "f", said(CNN), logits(layers)) == "number"


def test_batch_norms_that_are_sorted_apart_from_their_layers(tmp_path):
    torch.manual_seed(0)
    layers = {
        **{"conv1": nn.Conv2d(1, 3, 3, padding=1), "bn1": nn.BatchNorm2d(3)},
        **{"conv2": nn.Conv2d(3, 3, 3, padding=1), "bn2": nn.BatchNorm2d(3)},
        "fc": nn.Linear(3 * 36, 10),
    }
    for name in ("bn1", "bn2"):
        nn.init.normal_(layers[name].weight)
        layers[name].running_var.uniform_(0.5, 2)
        layers[name].eval()
    architecture = "conv 3x3 p1, bn, relu, conv 3x3 p1, bn, relu, linear"
    with torch.no_grad():
        x = torch.relu(layers["bn1"](layers["conv1"](IMAGES)))
        x = torch.relu(layers["bn2"](layers["conv2"](x)))
        expected = layers["fc"](x.flatten(1))
    safetensors.torch.save_file(state(layers), tmp_path / "s")
    assert check(tmp_path / "s", said(architecture), expected) == "number"
    assert check(saved(state(layers), tmp_path), said(architecture), expected) == "file"
    grouped = {name: layers[name] for name in ("conv1", "conv2", "fc", "bn1", "bn2")}
    assert check(saved(state(grouped), tmp_path), said(architecture), expected) == "file"


def test_a_batch_norm_behind_another_layer_is_refused(tmp_path):
    layers = cnn("conv1", "conv2", "conv3", "fc1", "fc2")
    stored = {}
    for name, module in layers.items():
        stored[name] = module
        if name == "conv2":
            stored["bn"] = nn.BatchNorm2d(4)
    path = saved(state(stored), tmp_path)
    right = "conv 3x3 p1, relu, conv 3x3 p1, bn, relu, conv 3x3 p1, relu, linear, relu, linear"
    import_model(path, said(right))
    with pytest.raises(UserError, match="'bn': bn belongs behind conv2 in the file"):
        import_model(path, said(CNN.replace("relu", "bn, relu", 1)))


def test_batch_norms_behind_some_layers(tmp_path):
    """Their order alone would fit behind others, too."""
    layers = cnn("conv1", "conv2", "conv3", "fc1", "fc2")
    stored = {"conv1": layers["conv1"], "bn1": nn.BatchNorm2d(4), "conv2": layers["conv2"]}
    stored |= {"conv3": layers["conv3"], "bn3": nn.BatchNorm2d(4)}
    path = saved(state(stored | layers), tmp_path)
    conv = "conv 3x3 p1, relu, conv 3x3 p1, bn, relu, conv 3x3 p1, bn, relu"
    with pytest.raises(UserError, match="bn1 belongs behind conv1 in the file"):
        import_model(path, said(f"{conv}, linear, relu, linear"))
    conv = "conv 3x3 p1, bn, relu, conv 3x3 p1, relu, conv 3x3 p1, bn, relu"
    import_model(path, said(f"{conv}, linear, relu, linear"))
    with pytest.raises(UserError, match="neither all layers but the last, nor all convolutions"):
        import_model(path, said("conv 3x3 p1, bn?, relu, " * 3 + "linear, bn?, relu, linear"))


def test_batch_norms_in_a_sorted_list(tmp_path):
    """Entries 0, 1, 3, 5, 6 of an nn.Sequential: the first and third layer have one."""
    layers = {
        **{"0": nn.Conv2d(1, 4, 3, padding=1), "1": nn.BatchNorm2d(4)},
        **{"3": nn.Conv2d(4, 4, 3, padding=1), "5": nn.Conv2d(4, 4, 3, padding=1)},
        **{"6": nn.BatchNorm2d(4), "9": nn.Linear(144, 10)},
    }
    safetensors.torch.save_file(state(layers), tmp_path / "f")
    start = "conv 3x3 p1, bn, relu, conv 3x3 p1, relu, conv 3x3 p1, bn, relu, linear"
    import_model(tmp_path / "f", said(start))
    wrong = "conv 3x3 p1, relu, conv 3x3 p1, bn, relu, conv 3x3 p1, bn, relu, linear"
    with pytest.raises(UserError, match="1 belongs behind 0 in the file"):
        import_model(tmp_path / "f", said(wrong))


def test_lists_whose_layers_leave_no_room_for_relus(tmp_path):
    """As with nn.ModuleList, or a network without ReLUs: the user spells it out."""
    layers = mlp("layers.0", "layers.1", "layers.2")
    path = saved(state(layers), tmp_path)
    with pytest.raises(UserError, match=r"if ReLUs are applied between .* spell the architecture"):
        import_model(path, said("mlp3"))
    check(path, said(MLP), logits(layers))


def test_lists_of_convolutions_and_of_batch_norms(tmp_path):
    stored = {
        **{"convs.0": nn.Conv2d(1, 3, 3, padding=1), "convs.1": nn.Conv2d(3, 3, 3, padding=1)},
        **{"bns.0": nn.BatchNorm2d(3), "bns.1": nn.BatchNorm2d(3), "fc": nn.Linear(108, 10)},
    }
    for name in ("bns.0", "bns.1"):
        stored[name].running_var.uniform_(0.5, 2)
        stored[name].eval()
    with torch.no_grad():
        x = torch.relu(stored["bns.0"](stored["convs.0"](IMAGES)))
        x = torch.relu(stored["bns.1"](stored["convs.1"](x)))
        expected = stored["fc"](x.flatten(1))
    architecture = "conv 3x3 p1, bn, relu, conv 3x3 p1, bn, relu, linear"
    check(saved(state(stored), tmp_path), said(architecture), expected)


@pytest.mark.parametrize(
    "names",
    [("0", "2", "5"), ("0", "1", "3"), ("f.0", "f.3", "g.0"), ("f.0", "g.0", "g.1")],
)
def test_other_gaps_in_a_list_are_refused(tmp_path, names):
    """Something is there, or missing, that the architecture does not say."""
    layers = mlp(*names)
    with pytest.raises(UserError, match=r"would be number \d"):
        import_model(saved(state(layers), tmp_path), said("mlp3"))


def test_gaps_that_the_architecture_names(tmp_path):
    layers = mlp("0", "3", "5")
    architecture = "linear, relu, dropout, linear, relu, linear"
    check(saved(state(layers), tmp_path), said(architecture), logits(layers))


def test_a_normalisation_in_front_of_attributes(tmp_path):
    layers = mlp("fc1", "fc2")
    entries = {"mean": torch.tensor([0.5]), "std": torch.tensor([0.25]), **state(layers)}
    description = Description("mlp2", in_shape=(1, 6, 6))
    model, _ = import_model(saved(entries, tmp_path), description)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES * 0.25 + 0.5), logits(layers))
    twice = {**entries, "n.mean": torch.zeros(1), "n.sigma": torch.ones(1)}
    with pytest.raises(UserError, match="it holds two normalisations"):
        import_model(saved(twice, tmp_path), description)


def named(*names: str) -> list[FoundLayer]:
    return [FoundLayer(name, {}) for name in names]


def names_by_number(*names: str) -> list[str]:
    return [layer.name for layer in by_number(named(*names))]


def test_the_order_of_numbers():
    assert names_by_number("c10", "c9", "fc2", "fc1") == ["c9", "c10", "fc1", "fc2"]
    assert names_by_number("fc1", "c2", "fc0", "c1") == ["fc0", "fc1", "c1", "c2"]
    assert names_by_number("b1.c2", "b1.c1", "b0.x", "b0.c1") == ["b0.x", "b0.c1", "b1.c1", "b1.c2"]
    assert names_by_number("fc2", "fc1", "fc") == ["fc1", "fc2", "fc"]
    assert names_by_number("", "2", "1") == ["", "1", "2"]
    assert names_by_number("1²", "1") == ["1²", "1"]


def test_what_numbers_leave_open():
    assert without_number(named("c1", "c2", "c10")) is None
    assert without_number(named("b0.c1", "b0.c2", "b1.c1")) is None
    assert without_number(named("c1", "c2", "out")) == ("c2", "out")
    assert without_number(named("fc1", "fc")) == ("fc1", "fc")


def test_the_order_on_the_command_line(tmp_path):
    path = saved(state(mlp("fc1", "fc3", "fc2", "fc4")), tmp_path)
    command = ("import", path, "--architecture", "mlp4", "--in-shape", "1,6,6")
    command += ("--mean", "0", "--std", "1", "-o", tmp_path / "m.safetensors")
    outcome = run_ibp(*command)
    assert outcome.code == 1
    assert "choose one with --order file or --order number" in outcome.err
    assert outcome.err.count("\n") == 1
    outcome = run_ibp(*command, "--order", "number")
    assert (outcome.code, outcome.err) == (0, "")
    assert "by number" in outcome.out
