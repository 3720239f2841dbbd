"""Passes in pieces: the same numbers as in one pass, and no more memory than was granted."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ibpcore.bounds.ibp
from ibpcore import certified_margins, cnn7
from ibpcore.bounds.chunking import chunk_size, in_chunks
from ibpcore.bounds.ibp import margins
from ibpcore.bounds.options import BoundOptions
from ibpcore.nn import (
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv2d,
    IntervalFlatten,
    IntervalLinear,
    IntervalMaxPool2d,
    IntervalProduct,
    IntervalReLU,
    IntervalResidual,
    IntervalSequential,
    IntervalSigmoid,
)
from ibpcore.nn.folding import fold

WHOLE = 2**40
SHAPES = [(1, 1), (1, 7), (7, 1), (2, 3), (3, 7), (7, 3), (16, 2), (1, 0), (5, 0)]


def problem(samples: int, radii: int, classes: int = 4):
    """A small CNN7 in float64, with margins of both signs."""
    torch.manual_seed(0)
    model = cnn7((1, 6, 6), classes, width=2, hidden=5).double().eval()
    images = torch.rand(samples, 1, 6, 6, dtype=torch.float64)
    labels = torch.arange(samples) % classes
    return model, images, labels, torch.rand(radii, samples, dtype=torch.float64) / 10


def fixed_size(monkeypatch, size: int) -> list[tuple[int, int]]:
    """Makes every piece at most `size` lanes; the shapes of the radii of the pieces to come."""
    seen = []
    one_pass = ibpcore.bounds.ibp._ibp_margins

    def spying(network, images, labels, radii, options):
        assert len(images) == len(labels) == radii.shape[1]
        seen.append(tuple(radii.shape))
        return one_pass(network, images, labels, radii, options)

    monkeypatch.setattr(ibpcore.bounds.ibp, "chunk_size", lambda *args: size)
    monkeypatch.setattr(ibpcore.bounds.ibp, "_ibp_margins", spying)
    return seen


# --- the same numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_smallest_budget_changes_nothing(shape, elide):
    model, images, labels, radii = problem(shape[1], shape[0])
    with torch.no_grad():
        whole, cut = (
            certified_margins(model, images, labels, radii, elide=elide, budget=budget)
            for budget in (WHOLE, 1)
        )
    assert whole.shape == shape
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 15, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_of_every_size(shape, size, monkeypatch):
    model, images, labels, radii = problem(shape[1], shape[0])
    whole = certified_margins(model, images, labels, radii, budget=WHOLE)
    pieces = fixed_size(monkeypatch, size)
    cut = certified_margins(model, images, labels, radii)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-13)
    lanes = [height * width for height, width in pieces]
    assert sum(lanes) == radii.numel()
    assert max(lanes, default=0) <= size


@pytest.mark.parametrize("epsilons", [0.05, torch.tensor([0.01, 0.02, 0.03]).double()], ids=str)
def test_one_radius_a_sample_in_chunks(epsilons):
    model, images, labels, _ = problem(3, 1)
    whole, cut = (
        certified_margins(model, images, labels, epsilons, budget=budget) for budget in (WHOLE, 1)
    )
    assert cut.shape == (3,)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-13)


def test_no_radii_at_all():
    model, images, labels, _ = problem(3, 1)
    radii = torch.zeros(0, 3, dtype=torch.float64)
    assert certified_margins(model, images, labels, radii).shape == (0, 3)


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("size", [1, 2, 4, 9])
def test_gradients_flow_through_pieces(size, elide, monkeypatch):
    model, images, labels, radii = problem(5, 3)
    gradients = []
    for run in ("whole", "cut"):
        if run == "cut":
            pieces = fixed_size(monkeypatch, size)
        leaves = [*model.parameters(), images.clone().requires_grad_()]
        leaves.append(radii.clone().requires_grad_())
        network = fold(model)
        values = certified_margins(network, leaves[-2], labels, leaves[-1], elide=elide)
        loss = (values * torch.linspace(-1, 2, 15, dtype=torch.float64).view(3, 5)).sin().sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    assert len(pieces) > 1
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


# --- memory that runs out -----------------------------------------------------------------


class Greedy:
    """radii + 100 * the sample's number, for which only `limit` lanes fit at a time.

    Attributes:
        tried: lanes of each call, those that failed too.
        done: lanes of each call that did not.
    """

    def __init__(self, samples: int, limit: int) -> None:
        self.offsets = 100.0 * torch.arange(samples)
        self.limit = limit
        self.tried: list[int] = []
        self.done: list[int] = []

    def __call__(self, radii: Tensor, samples: slice) -> Tensor:
        self.tried.append(radii.numel())
        if radii.numel() > self.limit:
            raise torch.OutOfMemoryError("not enough")
        self.done.append(radii.numel())
        return radii + self.offsets[samples]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 21, 64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 20), (20, 1), (3, 7), (7, 3)], ids=str)
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1000])
def test_a_piece_that_does_not_fit_is_halved(shape, size, limit):
    radii = torch.arange(float(shape[0] * shape[1])).view(shape)
    function = Greedy(shape[1], limit)
    result = in_chunks(function, radii, size)
    assert torch.equal(result, radii + 100.0 * torch.arange(shape[1]))
    # So often is a piece too large, and never again.
    failures = sum(lanes > limit for lanes in function.tried)
    halvings = 0
    while (size >> halvings) > limit:
        halvings += 1
    assert failures <= halvings
    if failures:
        last = max(i for i, lanes in enumerate(function.tried) if lanes > limit)
        assert all(lanes <= limit for lanes in function.tried[last + 1 :])
    assert all(lanes <= size for lanes in function.tried)


def test_halving_by_hand():
    """8 do not fit, 4 do: 2 samples at 2 radii at a time, and so to the end."""
    function = Greedy(7, 5)
    in_chunks(function, torch.zeros(2, 7), 8)
    assert function.tried == [8, 4, 4, 4, 2]


def test_a_failure_in_the_middle_starts_only_its_own_block_again():
    """The first block is done when memory runs out in the second part of the next."""
    calls = []

    def function(radii: Tensor, samples: slice) -> Tensor:
        calls.append((samples.start, len(radii)))
        if len(calls) == 4:
            raise torch.OutOfMemoryError("not enough")
        return radii + samples.start

    radii = torch.arange(8.0).view(4, 2)
    result = in_chunks(function, radii, 2)
    assert torch.equal(result, radii + torch.tensor([0.0, 1.0]))
    assert calls == [(0, 2), (0, 2), (1, 2), (1, 2), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_a_single_lane_that_does_not_fit_is_an_error():
    function = Greedy(3, 0)
    with pytest.raises(torch.OutOfMemoryError):
        in_chunks(function, torch.zeros(4, 3), 9)
    assert function.tried[-1] == 1
    assert function.done == []


def test_other_errors_are_not_taken_for_want_of_memory():
    calls = []

    def fails(radii: Tensor, samples: slice) -> Tensor:
        calls.append(0)
        raise RuntimeError("wrong shape")

    with pytest.raises(RuntimeError, match="wrong shape"):
        in_chunks(fails, torch.zeros(4, 3), 9)
    assert len(calls) == 1


def test_margins_survive_memory_that_runs_out(monkeypatch):
    model, images, labels, radii = problem(5, 3)
    whole = certified_margins(model, images, labels, radii)
    one_pass = ibpcore.bounds.ibp._ibp_margins

    def tight(network, images, labels, radii, options):
        if radii.numel() > 2:
            raise torch.OutOfMemoryError("not enough")
        return one_pass(network, images, labels, radii, options)

    monkeypatch.setattr(ibpcore.bounds.ibp, "_ibp_margins", tight)
    cut = certified_margins(model, images, labels, radii)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-13)


# --- memory that is kept to ---------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made while it is on, now and at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = self.storages((args, kwargs or {}))
        result = function(*args, **(kwargs or {}))
        for key, storage in self.storages(result).items():
            if key not in self.known and key not in inputs:
                self.known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    @staticmethod
    def storages(tree) -> dict:
        tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return {storage._cdata: storage for storage in storages}


def test_live_bytes_counts_what_lives():
    """4 KiB, a view of it, a second one while the first lives, and a third after that."""
    outside = torch.zeros(1024)
    with LiveBytes() as memory:
        outside.add_(1)
        outside.view(32, 32)
        assert memory.now == 0
        first = torch.ones(1024)
        view = first.view(32, 32)
        assert memory.now == 4096
        second = first + outside
        assert memory.now == 8192
        del first
        assert memory.now == 8192
        del view, second
        assert memory.now == 0
        third = torch.ones(1024)
    assert memory.peak == 8192
    del third
    assert memory.now == 0


def residual_net() -> IntervalSequential:
    branch = IntervalSequential(
        IntervalConv2d(6, 6, 3, padding=1),
        IntervalBatchNorm(6),
        IntervalReLU(),
        IntervalConv2d(6, 6, 3, padding=1),
    )
    return IntervalSequential(
        IntervalConv2d(1, 6, 3, padding=1),
        IntervalReLU(),
        IntervalResidual(branch),
        IntervalReLU(),
        IntervalAvgPool2d(2),
        IntervalFlatten(),
        IntervalLinear(96, 5),
    )


def mlp(*sizes: int) -> IntervalSequential:
    layers = [IntervalFlatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [IntervalLinear(before, after), IntervalReLU()]
    return IntervalSequential(*layers[:-1])


def pooling_net() -> IntervalSequential:
    return IntervalSequential(
        IntervalConv2d(1, 8, 3, padding=1),
        IntervalSigmoid(),
        IntervalMaxPool2d(2),
        IntervalConv2d(8, 8, 3, padding=1),
        IntervalReLU(),
        IntervalMaxPool2d(2),
        IntervalFlatten(),
        IntervalLinear(32, 5),
    )


def gated_net() -> IntervalSequential:
    gate = IntervalSequential(IntervalConv2d(8, 8, 1), IntervalSigmoid())
    return IntervalSequential(
        IntervalConv2d(1, 8, 3, padding=1),
        IntervalReLU(),
        IntervalProduct(IntervalConv2d(8, 8, 1), gate),
        IntervalFlatten(),
        IntervalLinear(512, 5),
    )


def dense_net() -> IntervalSequential:
    def grown(channels: int) -> IntervalConcat:
        new = IntervalSequential(
            IntervalBatchNorm(channels), IntervalReLU(), IntervalConv2d(channels, 4, 3, padding=1)
        )
        return IntervalConcat([IntervalSequential(), new])

    return IntervalSequential(
        IntervalConv2d(1, 4, 3, padding=1),
        grown(4),
        grown(8),
        IntervalReLU(),
        IntervalAvgPool2d(2),
        IntervalFlatten(),
        IntervalLinear(192, 5),
    )


NETWORKS = {
    "CNN7": lambda: cnn7((1, 8, 8), 5, width=4, hidden=16),
    "CNN7, colours": lambda: cnn7((3, 8, 8), 5, 4, 16, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)),
    "residual": residual_net,
    "dense": dense_net,
    "MLP, falling": lambda: mlp(64, 48, 24, 5),
    "MLP, level": lambda: mlp(64, 96, 96, 5),
    "MLP, rising": lambda: mlp(64, 100, 150, 200, 5),
    "linear": lambda: mlp(64, 5),
    "pooling": pooling_net,
    "gated": gated_net,
    "200 classes": lambda: cnn7((1, 8, 8), 200, width=4, hidden=64),
}


def measured(name, elide, clip, samples, radii, lanes) -> tuple[float, int]:
    """Peak over budget, and the lanes that a piece may have, with a budget for about `lanes`."""
    torch.manual_seed(0)
    network = fold(NETWORKS[name]().eval())
    shape = (3, 8, 8) if name == "CNN7, colours" else (1, 8, 8)
    images, labels = torch.rand(samples, *shape), torch.arange(samples) % 5
    epsilons = torch.rand(radii, samples) / 100
    with torch.no_grad():
        # |W| is kept for all passes, so it is no part of one.
        options = BoundOptions(elide=elide, clip=clip)
        margins(network, images[:1], labels[:1], epsilons[:, :1], options)
        base = 2**40
        budget = lanes * base // chunk_size(network, images, elide, radii, base)
        size = chunk_size(network, images, elide, radii, budget)
        with LiveBytes() as memory:
            margins(network, images, labels, epsilons, replace(options, budget=budget))
    return memory.peak / budget, size


@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_pass_keeps_to_its_budget(name, elide, clip):
    """16 radii of 40 samples, 100 lanes at a time, more or less: nor is it far below."""
    share, size = measured(name, elide, clip, samples=40, radii=16, lanes=100)
    assert 50 <= size <= 120
    # Without hidden layers the ball is all there is, and the bare one costs next to nothing.
    assert (0.1 if name == "linear" else 0.2) <= share <= 1.1


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "200 classes"])
def test_a_budget_of_few_lanes(name, elide):
    """Fewer lanes than there are radii: a sample's radii are cut apart.

    For 200 classes |W_i - W_y| alone takes more than a few lanes do.
    """
    share, size = measured(name, elide, (0.0, 1.0), samples=6, radii=16, lanes=5)
    assert 1 < size < 16
    assert 0.2 <= share <= 1.1


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_single_radius_keeps_to_its_budget(name, elide):
    share, _ = measured(name, elide, (0.0, 1.0), samples=200, radii=1, lanes=64)
    assert 0.2 <= share <= 1.1
