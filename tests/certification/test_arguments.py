"""Wrong arguments of the public functions raise a UserError of one line, from Python too."""

from pathlib import Path

import pytest
import torch
from torch import nn

import ibpcore
from ibpcore import (
    Interval,
    UserError,
    certified_margins,
    certified_radii,
    cnn7,
    convert,
    from_onnx,
    load_model,
    save_model,
    verified_radii,
)
from ibpcore.attacks.evaluation import AttackOptions
from ibpcore.attacks.pgd import pgd
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.soundness.network import sound_network
from ibpcore.data.images import ImageSet
from ibpcore.interop.exporting.onnx import to_onnx
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalSequential
from ibpcore.roots import RootOptions

NAN, INFINITY = float("nan"), float("inf")
torch.manual_seed(0)
MODEL = cnn7((1, 8, 8), 10, 1, 4).eval()
HALF = cnn7((1, 8, 8), 10, 1, 4).eval().half()
IMAGES = torch.rand(4, 1, 8, 8)
LABELS = MODEL(IMAGES).argmax(1)
RADII = certified_radii(MODEL, IMAGES, LABELS, 0.1)
ONE_CLASS = IntervalSequential(IntervalFlatten(), IntervalLinear(64, 1)).eval()
META = IMAGES.to("meta")

BAD_IMAGES = {
    "numpy": IMAGES.numpy(),
    "list": [[0.5]],
    "none": None,
    "bytes": (255 * IMAGES).byte(),
    "half": IMAGES.half(),
    "complex": IMAGES * 1j,
    "sparse": IMAGES.to_sparse(),
    "meta": META,
    "too bright": 2 * IMAGES,
    "nan": NAN * IMAGES,
    "no batch": torch.tensor(0.5),
    "vector": IMAGES[:, 0, 0, 0],
    "channels": IMAGES.expand(4, 3, 8, 8),
    "too small": IMAGES[..., :4],
}
FIT_A_BALL = {"half", "channels", "vector", "too small"}
BAD_LABELS = {
    "list": [0, 1, 2, 3],
    "none": None,
    "fractions": LABELS.float(),
    "complex": LABELS * 1j,
    "booleans": LABELS > 0,
    "fewer": LABELS[:3],
    "columns": LABELS[:, None],
    "one hot": torch.eye(10, dtype=torch.int64)[:4],
    "scalar": torch.tensor(1),
    "negative": LABELS - 10,
    "too large": LABELS + 10,
    "too large for any class": torch.full((4,), 2**63 + 5, dtype=torch.uint64),
    "unsigned and too large": torch.full((4,), 10, dtype=torch.uint16),
    "sparse": LABELS.to_sparse(),
    "meta": LABELS.to("meta"),
}
BAD_MODELS = {
    "none": None,
    "function": torch.relu,
    "weights": MODEL.state_dict(),
    "path": "model.safetensors",
    "plain layers": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
    "half": HALF,
    "one class": ONE_CLASS,
}
BAD_SETTINGS = {
    "bound": (None, "x", 3, ["ibp"]),
    "clip": (1, True, "01", (1, 0), (0, 0), (NAN, 1), (None, 1), (0, 1, 2)),
    "budget": ("x", 0, -1, 1e6),
    "elide": (None, "no", 1),
}


class Odd:
    """Of no type that is known, with the same name in every process."""

    def __repr__(self):
        return "odd"


ODD = Odd()

CALLS = {
    "certified_margins": lambda model, images, labels, **given: certified_margins(
        model, images, labels, 0.1, **given
    ),
    "certified_radii": lambda model, images, labels, **given: certified_radii(
        model, images, labels, 0.1, **given
    ),
    "verified_radii": lambda model, images, labels, **given: verified_radii(
        model, images, labels, RADII, **given
    ),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=[*CALLS])


def refused(call, *args, **given):
    """The message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        call(*args, **given)
    message = str(caught.value)
    assert message.isprintable()
    assert message
    return message


@calls
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images(call, kind):
    refused(call, MODEL, BAD_IMAGES[kind], LABELS)


@calls
@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels(call, kind):
    assert "label" in refused(call, MODEL, IMAGES, BAD_LABELS[kind])


@calls
@pytest.mark.parametrize("kind", BAD_MODELS)
def test_models(call, kind):
    labels = 0 * LABELS if kind == "one class" else LABELS
    refused(call, BAD_MODELS[kind], IMAGES, labels)


@calls
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_SETTINGS.items() for value in values]
)
def test_settings(call, name, value):
    refused(call, MODEL, IMAGES, LABELS, **{name: value})


@calls
@pytest.mark.parametrize(
    "kind", ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
)
def test_labels_of_every_integer_type_count(call, kind):
    found = call(MODEL, IMAGES, LABELS.to(getattr(torch, kind)))
    expected = call(MODEL, IMAGES, LABELS)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_proof_takes_the_rules_of_a_network_with_the_same_checks():
    rules = sound_network(MODEL, "real")
    assert torch.equal(
        verified_radii(rules, IMAGES, LABELS, RADII).radius,
        verified_radii(MODEL, IMAGES, LABELS, RADII).radius,
    )
    assert "does not take images" in refused(verified_radii, rules, IMAGES[..., :4], LABELS, RADII)
    assert "labels" in refused(verified_radii, rules, IMAGES, LABELS + 10, RADII)


@pytest.mark.parametrize(
    "epsilons",
    [
        *(
            "8 of 255",
            "1/0",
            "1/2/3",
            "-0.1",
            "nan",
            None,
            {},
            ODD,
            1j,
            NAN,
            -0.1,
            INFINITY,
            1e39,
            10**400,
        ),
        *([[0.1], [0.1, 0.2]], torch.rand(3), torch.rand(1, 1, 4), torch.rand(4) * 1j),
        *(torch.rand(4, device="meta"), torch.tensor([0.1, 0.1, 0.1, NAN]), -torch.rand(2, 4)),
    ],
    ids=str,
)
def test_epsilons(epsilons):
    assert "epsilon" in refused(certified_margins, MODEL, IMAGES, LABELS, epsilons)
    assert "epsilon" in refused(Interval.ball, IMAGES, epsilons)


@pytest.mark.parametrize(
    "value",
    [
        "8 of 255",
        "1/0",
        "inf",
        "-1/255",
        None,
        [0.1],
        1j,
        NAN,
        -1,
        0,
        INFINITY,
        10**400,
        torch.rand(2),
        ODD,
    ],
    ids=str,
)
def test_epsilon_max(value):
    assert "epsilon_max must be" in refused(certified_radii, MODEL, IMAGES, LABELS, value)
    data = ImageSet((255 * IMAGES).byte(), LABELS)
    assert "epsilon_max must be" in refused(certify, MODEL, data, CertificationOptions(value))


def test_epsilons_as_texts():
    for text, number in (("8/255", 8 / 255), ("0.1", 0.1)):
        assert torch.equal(Interval.ball(IMAGES, text).rad, Interval.ball(IMAGES, number).rad)
        found, expected = (certified_margins(MODEL, IMAGES, LABELS, e) for e in (text, number))
        assert torch.equal(found, expected)
        found, expected = (certified_radii(MODEL, IMAGES, LABELS, e) for e in (text, number))
        assert torch.equal(found.radius, expected.radius)


CONVERT = r"call ibpcore\.convert\((model|module), in_shape\) first"


@pytest.mark.parametrize(
    "plain", [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.Linear(64, 10)]
)
def test_a_plain_module_is_to_be_converted_first(plain, tmp_path):
    for call in (
        lambda: certified_margins(plain, IMAGES, LABELS, 0.1),
        lambda: certified_radii(plain, IMAGES, LABELS, 0.1),
        lambda: verified_radii(plain, IMAGES, LABELS, RADII),
        lambda: save_model(plain, tmp_path / "model"),
        lambda: nn.Linear(8, 2)(Interval.ball(IMAGES, 0.1)),
        lambda: nn.ReLU()(Interval.ball(IMAGES, 0.1)),
    ):
        with pytest.raises(UserError, match=CONVERT):
            call()


@pytest.mark.parametrize(
    "given",
    [
        *({"solver": "x"}, {"solver": None}, {"solver": []}, {"xtol": "1"}, {"xtol": NAN}),
        *({"rtol": -1}, {"rtol": None}, {"max_iterations": 1.5}, {"max_iterations": "3"}),
        *({"max_iterations": -1}, {"candidates": 0}, {"candidates": 2.5}),
    ],
    ids=str,
)
def test_root_options(given):
    refused(certified_radii, MODEL, IMAGES, LABELS, 0.1, **given)
    refused(RootOptions, **given)


BAD_RADII = {
    "tensor": RADII.radius,
    "number": 0.1,
    "none": None,
    "plain tuple": tuple(RADII),
    "of another batch": certified_radii(MODEL, IMAGES[:3], LABELS[:3], 0.1),
    "nan": RADII._replace(radius=NAN * RADII.radius),
    "negative": RADII._replace(radius=RADII.radius - 1),
    "list": RADII._replace(radius=[0.1] * 4),
    "integers": RADII._replace(radius=RADII.status),
    "complex": RADII._replace(radius=1j * RADII.radius),
    "columns": RADII._replace(radius=RADII.radius[:, None]),
    "short upper": RADII._replace(upper=RADII.upper[:3]),
    "short root": RADII._replace(root=RADII.root[:3]),
    "short status": RADII._replace(status=RADII.status[:3]),
    "fractional status": RADII._replace(status=RADII.radius),
    "no evaluations": RADII._replace(evaluations=None),
    "meta": RADII._replace(radius=RADII.radius.to("meta")),
}


@pytest.mark.parametrize("kind", BAD_RADII)
def test_radii(kind):
    assert "radii" in refused(verified_radii, MODEL, IMAGES, LABELS, BAD_RADII[kind])


@pytest.mark.parametrize("claim", [None, "x", "unchecked", ["real"]], ids=str)
def test_claims(claim):
    assert "claim" in refused(verified_radii, MODEL, IMAGES, LABELS, RADII, claim=claim)


@pytest.mark.parametrize("images", [IMAGES.half(), IMAGES.double(), IMAGES[..., :4]])
def test_a_ball_that_does_not_fit_the_model(images):
    message = refused(MODEL, Interval.ball(images, 0.1))
    assert str(images.dtype) in message
    assert str(tuple(images.shape)) in message


def test_a_model_of_half_precision_and_a_ball_of_floats():
    assert "torch.float32" in refused(HALF, Interval.ball(IMAGES, 0.1))
    assert HALF(Interval.ball(IMAGES.half(), 0.1)).shape == (4, 10)


@pytest.mark.parametrize("kind", sorted(BAD_IMAGES.keys() - FIT_A_BALL))
def test_balls(kind):
    refused(Interval.ball, BAD_IMAGES[kind], 0.1)


@pytest.mark.parametrize("clip", BAD_SETTINGS["clip"], ids=str)
def test_the_range_of_a_ball(clip):
    assert "clip" in refused(Interval.ball, IMAGES, 0.1, clip=clip)


@pytest.mark.parametrize("shape", [6, None, "188", (1.0, 8, 8), (NAN, 8, 8), (1, 0, 8), {}])
def test_shapes(shape):
    assert "in_shape must be" in refused(convert, nn.Flatten(), shape)
    assert "in_shape must be" in refused(cnn7, shape, 10)


def test_a_cnn7_takes_images():
    assert "in_shape must be (channels, height, width)" in refused(cnn7, (8, 8), 10)


@pytest.mark.parametrize("module", [MODEL.state_dict(), None, nn.Linear, [], torch.relu])
def test_what_is_no_module(module):
    assert "convert takes an nn.Module, not" in refused(convert, module, (1, 8, 8))


def test_images_beyond_the_memory():
    assert "do not fit the module" in refused(convert, nn.Flatten(), (1, 10**9, 10**9))


@pytest.mark.parametrize(
    "given",
    [
        *({"classes": "10"}, {"classes": 10.0}, {"classes": 1}, {"width": 1.5}, {"width": None}),
        *({"hidden": 0}, {"mean": 0.5, "std": 0.5}, {"mean": "5", "std": "5"}),
        *({"mean": (0.5,), "std": (0.0,)}, {"mean": (0.5,), "std": (NAN,)}),
        *({"mean": (NAN,), "std": (1.0,)}, {"mean": (0.1, 0.2), "std": (1.0, 1.0)}),
        {"mean": (0.5,), "std": ()},
    ],
    ids=str,
)
def test_sizes_of_a_cnn7(given):
    refused(cnn7, **{"in_shape": (1, 8, 8), "classes": 10, "width": 1, "hidden": 4, **given})


@pytest.mark.parametrize("path", [None, 3, b"model", "a\0b", ["model"]], ids=repr)
def test_paths(path):
    assert "path of a model file" in refused(load_model, path)
    assert "path of a model file" in refused(save_model, MODEL, path)


@pytest.mark.parametrize("device", ["tpu", 3.5, None])
def test_devices(device, tmp_path):
    save_model(MODEL, tmp_path / "model")
    assert "device" in refused(load_model, tmp_path / "model", device)


@pytest.mark.parametrize("model", [None, MODEL.state_dict(), nn.Flatten(), "model", HALF])
def test_what_cannot_be_saved(model, tmp_path):
    refused(save_model, model, tmp_path / "model")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fact", [ODD, torch.rand(2), {1j: 2}, Path("x")], ids=str)
def test_facts_that_are_no_json(fact, tmp_path):
    assert "JSON" in refused(save_model, MODEL, tmp_path / "model", fact=fact)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES, LABELS),
        ((255 * IMAGES).byte(), LABELS.to(torch.uint16)),
        ((255 * IMAGES).byte(), LABELS[:3]),
        ((255 * IMAGES).byte(), LABELS[:, None]),
        ((255 * IMAGES).byte()[0], LABELS),
        (None, LABELS),
        ((255 * IMAGES).byte(), [0, 1, 2, 3]),
    ],
)
def test_sets_of_images(images, labels):
    refused(ImageSet, images, labels)


@pytest.mark.parametrize("labels", [LABELS + 10, LABELS - 10])
def test_labels_of_sets_of_images(labels):
    data = ImageSet((255 * IMAGES).byte(), labels)
    assert "labels" in refused(certify, MODEL, data, CertificationOptions(0.1))


@pytest.mark.parametrize("claim", [None, ["real"], "x"], ids=str)
def test_claims_of_certificates(claim):
    data = ImageSet((255 * IMAGES).byte(), LABELS)
    assert "claim" in refused(certify, MODEL, data, CertificationOptions(0.1, claim))


@pytest.mark.parametrize("given", [{"steps": 1.5}, {"steps": "3"}, {"restarts": 0}, {"seed": None}])
def test_attack_options(given):
    refused(AttackOptions, **given)


@pytest.mark.parametrize("kind", [k for k in BAD_LABELS if "large" not in k and k != "negative"])
def test_labels_of_an_attack(kind):
    refused(pgd, MODEL, Interval.ball(IMAGES, 0.1), BAD_LABELS[kind], (0.5,))


def test_an_attack_takes_a_box():
    assert "Interval" in refused(pgd, MODEL, IMAGES, LABELS, (0.5,))


@pytest.mark.parametrize("path", [None, 3, "", "missing.onnx", "\0"])
def test_paths_of_onnx_files(path):
    refused(from_onnx, path)


@pytest.mark.parametrize("in_shape", [5, (1,), (0, 8, 8), (1.5, 8, 8), "188", (2, 8, 8)])
def test_shapes_of_onnx_networks(tmp_path, in_shape):
    onnx_file = tmp_path / "model.onnx"
    onnx_file.write_bytes(to_onnx(MODEL))
    refused(from_onnx, onnx_file, in_shape)


def test_every_public_name_is_covered():
    """What is added to the public interface needs its wrong arguments here."""
    assert set(ibpcore.__all__) == {
        *("Interval", "RadiusStatus", "UserError", "certified_margins", "certified_radii"),
        *("cnn7", "convert", "from_onnx", "load_model", "save_model", "verified_radii"),
        *("evaluate", "load_run", "resume", "train"),  # in tests/experiments/test_from_python.py
    }
    assert BoundOptions() == BoundOptions("ibp", True, (0.0, 1.0), None, 20, False)
