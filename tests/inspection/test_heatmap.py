"""Heatmaps: by hand, and against differences of a second implementation of the bounds."""

import io

import numpy as np
import oracle
import pytest
import torch
from PIL import Image, ImageDraw

from ibpcore import UserError, certified_margins, certified_radii
from ibpcore import nn as il
from ibpcore.bounds import crown_ibp
from ibpcore.bounds.ibp import largest_difference
from ibpcore.bounds.interval import between
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.inspection.heatmap import CHUNK, heatmaps, margin_sensitivity, peak
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import Network
from ibpcore.visualization.heatmaps import COLORS, MARGIN, beside, captioned, colored, png

STEP = 1e-6


def linear(weights, channels=1):
    """f_0 - f_1 = weights . x for images of one row; label 0 has R(0) = -weights . x."""
    layer = il.IntervalLinear(len(weights), 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights, [0.0] * len(weights)]))
    shape = (channels, 1, len(weights) // channels)
    return Network([il.IntervalFlatten(), layer], shape).eval()


def convolutional():
    """All kinds of operators: affine, channels, monotone, pooling, a sum."""
    torch.manual_seed(0)
    branch = il.IntervalSequential(il.IntervalConv2d(4, 4, 3, padding=1), il.IntervalBatchNorm(4))
    parts = [
        il.IntervalNormalize((0.5, 0.4), (0.2, 0.3)),
        il.IntervalConv2d(2, 4, 3, padding=1),
        il.IntervalReLU(),
        il.IntervalResidual(branch),
        il.IntervalLeakyReLU(0.2),
        il.IntervalMaxPool2d(2),
        il.IntervalFlatten(),
        il.IntervalLinear(16, 6),
        il.IntervalReLU(),
        il.IntervalLinear(6, 3),
    ]
    network = Network(parts, (2, 4, 4)).double()
    generator = torch.Generator().manual_seed(1)
    oracle.randomize_batch_norm(network, torch.rand(32, 2, 4, 4).double(), generator)
    return network.eval()


def some_images(count=5):
    """With pixels at both ends of the range, and near them."""
    images = torch.rand(count, 2, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    return ((images - 0.5) * 1.4 + 0.5).clamp(0, 1)


def box(images, epsilons, clip):
    """Around (B, C, H, W) by as many epsilons."""
    lower, upper = images - epsilons, images + epsilons
    low, high = (-torch.inf, torch.inf) if clip is None else clip
    return lower.clamp(min=low), upper.clamp(max=high)


def differences(margin, images, radii, clip):
    """(B, H, W) quotients of `margin(lower, upper)` in the epsilon of each pixel."""
    epsilons = radii.view(-1, 1, 1, 1).expand_as(images)
    before = margin(*box(images, epsilons, clip))
    found = torch.zeros(len(images), *images.shape[2:]).double()
    for row, column in np.ndindex(*images.shape[2:]):
        wider = epsilons.clone()
        wider[:, :, row, column] += STEP
        found[:, row, column] = (margin(*box(images, wider, clip)) - before) / STEP
    return found


def test_a_linear_network_by_hand():
    """R = -w . x + |w| . e inside; pixels of two channels change in both."""
    labels, images = torch.zeros(1).long(), torch.full((1, 2, 1, 3), 0.5).double()
    found = margin_sensitivity(
        fold(linear([1.0, -2, 0, 4, 0.5, 0], 2)),
        images,
        labels,
        torch.tensor([0.1]),
        BoundOptions(),
    )
    torch.testing.assert_close(found, torch.tensor([[[5, 2.5, 0]]]).double())


def test_no_room_by_hand():
    """At 1 with w > 0 the bad way is down and free; with w < 0 it is up, where none is left."""
    labels = torch.zeros(1).long()
    images = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.25, 0.25]).double().view(1, 1, 1, 6)
    network = fold(linear([3.0, -3, 3, -3, 1, -1]))
    for radius, last in ((0.2, [1.0, 1]), (0.25, [0.0, 1])):  # 0.25 - 0.25: at the end just now
        found = margin_sensitivity(network, images, labels, torch.tensor([radius]), BoundOptions())
        assert found.flatten().tolist() == pytest.approx([3, 0, 0, 3, *last])
    bare = margin_sensitivity(
        network, images, labels, torch.tensor([0.25]), BoundOptions(clip=None)
    )
    assert bare.flatten().tolist() == pytest.approx([3, 3, 3, 3, 1, 1])


@pytest.mark.parametrize("clip", [(0.0, 1.0), None])
@pytest.mark.parametrize("elide", [True, False])
def test_slopes_are_those_of_the_oracle(elide, clip):
    model, images = convolutional(), some_images()
    labels = model(images).argmax(1)
    radii = torch.tensor([0.0, 0.001, 0.01, 0.03, 0.3]).double()

    def margin(lower, upper):
        return oracle.box_margins(model, oracle.State(lower, upper, images), labels, elide)

    found = margin_sensitivity(
        fold(model), images, labels, radii, BoundOptions(elide=elide, clip=clip)
    )
    expected = differences(margin, images, radii, clip)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (found > 0.01).any(2).any(1).all()
    assert found.min() > -1e-12


@pytest.mark.parametrize("elide", [True, False])
def test_slopes_by_linear_bounds(elide):
    model, images = convolutional(), some_images()
    network, labels = fold(model), model(images).argmax(1)
    radii = torch.tensor([0.001, 0.003, 0.01, 0.03, 0.1]).double()

    def margin(lower, upper):
        ball = between(lower, upper)
        bounds = crown_ibp.box_logits(network, ball, labels, BoundOptions(elide=elide))
        return largest_difference(bounds, labels)

    found = margin_sensitivity(
        network, images, labels, radii, BoundOptions(bound="crown-ibp", elide=elide)
    )
    expected = differences(margin, images, radii, (0.0, 1.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        found,
        margin_sensitivity(network, images, labels, radii, BoundOptions(elide=elide)),
        rtol=0.1,
    )


# A search may end at other slopes for another radius.
@pytest.mark.parametrize("bound", sorted(BOUNDS.keys() - {"alpha-crown"}))
def test_the_sum_is_the_slope_of_the_margin(bound):
    model, images = convolutional(), some_images(4)
    labels, radii = model(images).argmax(1), torch.tensor([0.001, 0.005, 0.01, 0.1]).double()
    found = margin_sensitivity(fold(model), images, labels, radii, BoundOptions(bound=bound)).sum(
        (1, 2)
    )
    with torch.no_grad():
        near, far = (
            certified_margins(model, images, labels, radii + step, bound=bound)
            for step in (0, STEP)
        )
    torch.testing.assert_close(found, (far - near) / STEP, rtol=1e-4, atol=1e-5)


def test_a_share_is_what_the_radius_loses():
    """One pixel may change by d more: the radius of all shrinks by d times its share."""
    model, images = convolutional(), some_images()
    labels = model(images).argmax(1)
    radii = certified_radii(model, images, labels, 0.3, xtol=1e-14, rtol=1e-14).radius
    assert ((radii > 0) & (radii < 0.3)).all()
    maps = margin_sensitivity(fold(model), images, labels, radii, BoundOptions())
    row, column, _ = peak(maps[0])
    more = torch.zeros_like(images)
    more[:, :, row, column] = 1e-5

    def certified(radius):
        lower, upper = box(images, radius.view(-1, 1, 1, 1) + more, (0.0, 1.0))
        state = oracle.State(lower, upper, images)
        return oracle.box_margins(model, state, labels, True) < 0

    low, high = radii - 1e-4, radii.clone()
    assert certified(low).all()
    assert not certified(high)[maps[:, row, column] > 0].any()
    for _ in range(40):
        middle = (low + high) / 2
        good = certified(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    share = maps[:, row, column] / maps.sum((1, 2))
    assert share[0] > 0.05
    torch.testing.assert_close((radii - low) / 1e-5, share, rtol=1e-3, atol=1e-6)


def test_many_images_are_as_one_by_one():
    model, images = convolutional(), some_images(2 * CHUNK + 3)
    labels, radii = model(images).argmax(1), torch.linspace(0, 0.1, len(images)).double()
    found = margin_sensitivity(fold(model), images, labels, radii, BoundOptions())
    single = [
        margin_sensitivity(
            fold(model), images[i : i + 1], labels[i : i + 1], radii[i : i + 1], BoundOptions()
        )
        for i in range(len(images))
    ]
    torch.testing.assert_close(found, torch.cat(single))


def test_only_certificates_have_heatmaps():
    model = convolutional()
    data = ImageSet((255 * some_images(3)).byte(), torch.tensor([0, 1, 2]))
    radii = torch.tensor([0.01, 0.0, 0.02]).double()
    first, none, last = heatmaps(model, data, radii, BoundOptions(clip=None))
    assert none is None
    images = as_pixels(data.images).double()
    expected = margin_sensitivity(fold(model), images, data.labels, radii, BoundOptions(clip=None))
    torch.testing.assert_close(torch.stack([first, last]), expected[[0, 2]])
    assert heatmaps(model, data, torch.zeros(3), BoundOptions()) == [None] * 3


def test_nothing_wrong_is_taken():
    network, images, labels = fold(linear([1.0, 2])), torch.zeros(1, 1, 1, 2), torch.zeros(1).long()
    network_64 = images.double()
    for radius in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="radii"):
            margin_sensitivity(network, network_64, labels, torch.tensor([radius]), BoundOptions())
    with pytest.raises(UserError, match="'crawn' is not one of"):
        margin_sensitivity(network, network_64, labels, torch.zeros(1), BoundOptions(bound="crawn"))
    with pytest.raises(UserError, match=r"lie in \[0, 1\]"):
        margin_sensitivity(network, network_64 + 2, labels, torch.zeros(1), BoundOptions())


def test_the_model_stays_without_gradients():
    model, images = convolutional(), some_images(2)
    margin_sensitivity(
        fold(model), images, torch.tensor([0, 1]), torch.tensor([0.1, 0.1]), BoundOptions()
    )
    assert all(parameter.grad is None for parameter in model.parameters())


# Drawn


def test_colors_are_linear_in_the_heat():
    """Six colours stand at fifths of the largest; what is below 0 is drawn as nothing."""
    drawn = colored(torch.tensor([[0.0, 0.2, 0.4], [0.6, 1.0, -3.0]]) * 7)
    expected = [COLORS[i] for i in (0, 1, 2, 3, 5, 0)]
    assert drawn.flatten(1).T.tolist() == [list(color) for color in expected]
    half = colored(torch.tensor([[0.1, 1.0]]))[:, 0, 0]
    assert half.tolist() == [33, 5, 54]  # between the first two
    assert colored(torch.zeros(1, 2)).flatten(1).T.tolist() == [list(COLORS[0])] * 2


def test_warmer_is_lighter():
    """So that the map can be read without colours too."""
    ramp = colored(torch.linspace(0, 1, 100)[None])[:, 0].double()
    light = torch.tensor([0.2126, 0.7152, 0.0722]).double() @ ramp
    assert (light.diff() >= -0.5).all()
    assert light[-1] > 200 + light[0]


def test_the_peak_by_hand():
    assert peak(torch.tensor([[0.0, 1.0, -9.0], [3.0, 0.0, 0.0]])) == (1, 0, 0.75)
    assert peak(torch.zeros(2, 3)) == (0, 0, 0.0)


def test_an_image_beside_its_heatmap():
    image = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
    file = Image.open(io.BytesIO(png(beside(image, torch.eye(3, 4)))))
    assert (file.format, file.size) == ("PNG", (85 * 9, 85 * 3))
    pixels = np.asarray(file)[42::85, 42::85]
    assert pixels.shape == (3, 9, 3)
    assert (pixels[:, :4] == image[0].numpy()[..., None]).all()
    assert (pixels[:, 4] == 255).all()
    assert pixels[1, 6].tolist() == list(COLORS[-1])


@pytest.mark.parametrize("caption", ["class 7, certified radius 8/255", "猫\n$x$ " * 40, ""])
def test_a_caption_leaves_the_picture_as_it_is(caption):
    """Below it stand the caption, cut into lines that fit, and the scale from 0 to the largest."""
    picture = beside(torch.zeros(1, 20, 3, dtype=torch.uint8), torch.eye(20, 3))
    whole = captioned(picture, caption, 1.0)
    _, height, width = picture.shape
    assert torch.equal(whole[:, :height, :width], picture)
    assert (whole[:, :, -MARGIN:] == 255).all()
    assert (whole[:, -MARGIN // 2 :] == 255).all()
    below = whole[:, height:].reshape(3, -1).T.tolist()
    assert {COLORS[0], COLORS[-1]} <= set(map(tuple, below))


def test_the_words_of_a_caption_are_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, xy, text, *rest: drawn.append(text)
    )
    picture = beside(torch.zeros(1, 8, 8, dtype=torch.uint8), torch.eye(8))
    captioned(picture, "class Äpfel, certified radius 8/255", 2.5)
    caption = r"class \xc4pfel, certified radius 8/255"
    assert drawn == [caption, "0", "2.5  slope of the margin in each pixel"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_keeps_every_byte(channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    pixels = np.asarray(Image.open(io.BytesIO(png(image)))).reshape(5, 7, channels)
    assert (pixels == image.permute(1, 2, 0).numpy()).all()
