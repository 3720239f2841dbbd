"""The paper's theorems hold numerically: monotone margins (A.2), implicit gradient (3.4)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore import certified_margins, certified_radii
from ibpcore.bounds.ibp import robust_logits
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.radii import RadiusStatus
from ibpcore.nn import (
    IntervalBatchNorm,
    IntervalConv2d,
    IntervalFlatten,
    IntervalLinear,
    IntervalReLU,
    IntervalSequential,
    IntervalSigmoid,
    IntervalTanh,
)
from ibpcore.nn.folding import clean_pass

CLASSES = 3


def small_net(activation: type[nn.Module], seed: int = 0) -> IntervalSequential:
    torch.manual_seed(seed)
    return IntervalSequential(
        IntervalConv2d(1, 3, 3, padding=1),
        IntervalBatchNorm(3),
        activation(),
        IntervalFlatten(),
        IntervalLinear(48, 8),
        IntervalBatchNorm(8),
        activation(),
        IntervalLinear(8, CLASSES),
    ).double()


def clusters(count: int = 60) -> tuple[Tensor, Tensor]:
    """(N, 1, 4, 4) noisy images around one prototype a class, and their labels (N,)."""
    rng = torch.Generator().manual_seed(1)
    prototypes = 0.3 + 0.4 * torch.rand(CLASSES, 1, 4, 4, generator=rng, dtype=torch.float64)
    labels = torch.arange(count) % CLASSES
    noise = torch.rand(count, 1, 4, 4, generator=rng, dtype=torch.float64) - 0.5
    return prototypes[labels] + 0.1 * noise, labels


def train(model: IntervalSequential, steps: int = 40, epsilon: float = 0.03) -> None:
    images, labels = clusters()
    radii = torch.full((len(images),), epsilon, dtype=images.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(steps):
        _, network = clean_pass(model, images)
        loss = F.cross_entropy(
            robust_logits(network, images, labels, radii, BoundOptions()), labels
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@pytest.fixture(scope="module", params=[IntervalReLU, IntervalTanh], ids=["relu", "tanh"])
def trained(request) -> IntervalSequential:
    model = small_net(request.param)
    train(model)
    return model


def assert_non_decreasing(model, elide, clip) -> None:
    images, labels = clusters(12)
    grid = torch.linspace(0, 0.6, 121, dtype=torch.float64)[:, None].expand(-1, len(images))
    with torch.no_grad():
        values = certified_margins(model, images, labels, grid, elide=elide, clip=clip)
    steps = values.diff(dim=0)
    assert float(steps.min()) >= -1e-12
    assert float((values[-1] - values[0]).min()) > 0.1


@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
def test_margins_never_fall_with_epsilon(trained, elide, clip):
    assert_non_decreasing(trained, elide, clip)


@pytest.mark.parametrize("activation", [IntervalReLU, IntervalSigmoid])
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
def test_margins_of_an_untrained_net_never_fall_with_epsilon(activation, elide):
    assert_non_decreasing(small_net(activation, seed=3).eval(), elide, (0.0, 1.0))


def test_training_at_a_radius_certifies_it(trained):
    """The trained nets of this file are not trivial: most images have a positive radius."""
    images, labels = clusters()
    certified = certified_margins(trained, images, labels, 0.03) < 0
    assert float(certified.double().mean()) > 0.8


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
def test_implicit_gradient_of_the_radius(trained, elide):
    """Thm. 3.4, dE/dw = -(dR/dw) / (dR/de) at the root, against central differences."""
    images, labels = (part[:4] for part in clusters())
    images = images.clone().requires_grad_()
    options = {"xtol": 1e-14, "rtol": 4 * torch.finfo(torch.float64).eps}

    def radii() -> Tensor:
        result = certified_radii(
            trained, images.detach(), labels, 2.0, clip=None, elide=elide, **options
        )
        assert result.status.tolist() == [RadiusStatus.CONVERGED] * len(images)
        return result.root

    epsilon = radii().requires_grad_()
    margins = certified_margins(trained, images, labels, epsilon, clip=None, elide=elide)
    (slope,) = torch.autograd.grad(margins.sum(), epsilon, retain_graph=True)
    assert float(slope.min()) > 0
    weights = [trained[0].weight, trained[1].bias, trained[4].bias, trained[7].weight, images]
    # d/dw of the sum of E over the samples.
    gradients = torch.autograd.grad((-margins / slope.detach()).sum(), weights)

    step = 1e-6
    for weight, gradient in zip(weights, gradients, strict=True):
        flat = weight.detach().view(-1)
        for place in range(0, flat.numel(), max(1, flat.numel() // 5)):
            value = float(flat[place])
            ends = []
            for moved in (value + step, value - step):
                flat[place] = moved
                ends.append(radii().sum())
            flat[place] = value
            difference = float(ends[0] - ends[1]) / (2 * step)
            assert float(gradient.view(-1)[place]) == pytest.approx(difference, rel=1e-5, abs=1e-6)


def binary_net(activation: nn.Module) -> IntervalSequential:
    torch.manual_seed(0)
    layers = IntervalFlatten(), IntervalLinear(6, 8), activation, IntervalLinear(8, 2)
    return IntervalSequential(*layers).double().eval()


def curvature(model: IntervalSequential, clip) -> tuple[Tensor, Tensor, Tensor]:
    """Inner points of a fine grid, the second differences of R there, and the image."""
    image = 0.2 + 0.6 * torch.rand(1, 1, 2, 3, dtype=torch.float64)
    grid = torch.linspace(0, 3, 2001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        values = certified_margins(model, image, torch.tensor([0]), grid, clip=clip)[:, 0]
    return grid[1:-1, 0], values.diff().diff(), image


def test_a_relu_margin_bends_only_where_a_bound_of_a_neuron_crosses_zero():
    """One hidden layer: |w x + b| = |w|_1 epsilon, at one epsilon a neuron."""
    model = binary_net(IntervalReLU())
    grid, bends, image = curvature(model, clip=None)
    with torch.no_grad():
        hidden = model[1]
        crossings = hidden(image.flatten(1))[0].abs() / hidden.weight.abs().sum(1)
    spacing = float(grid[1] - grid[0])

    at = grid[bends.abs() > 1e-10]

    assert len(at) >= 4
    distance = (at[:, None] - crossings).abs().amin(1)
    assert float(distance.max()) <= spacing * (1 + 1e-9)


def test_clipped_or_smooth_margins_do_bend_elsewhere():
    """What shows that the test above can tell."""
    clipped = curvature(binary_net(IntervalReLU()), clip=(0.0, 1.0))[1]
    straight = curvature(binary_net(IntervalReLU()), clip=None)[1]
    smooth = curvature(binary_net(IntervalSigmoid()), clip=None)[1]
    kinks = [int((bends.abs() > 1e-10).sum()) for bends in (straight, clipped, smooth)]
    assert kinks[0] < kinks[1] < 100
    assert kinks[2] > 1000
