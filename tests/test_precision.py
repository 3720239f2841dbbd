"""Switches of float32 arithmetic: which apply inside the contexts, and what is left afterwards."""

import threading
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from ibpcore import Interval, certified_margins
from ibpcore.bounds import crown_ibp, ibp
from ibpcore.bounds.operators import RELU
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.nn import (
    IntervalConv2d,
    IntervalFlatten,
    IntervalLinear,
    IntervalReLU,
    IntervalSequential,
)
from ibpcore.nn.cnn7 import cnn7
from ibpcore.nn.folding import clean_pass, fold
from ibpcore.nn.layers import IntervalLayer
from ibpcore.precision import (
    deterministic_convolutions,
    full_precision,
    plain_convolutions,
    tf32_allowed,
)

CONTEXTS = {
    "full precision": full_precision,
    "plain convolutions": plain_convolutions,
    "deterministic convolutions": deterministic_convolutions,
    "TF32": lambda: tf32_allowed(True),
    "no TF32": lambda: tf32_allowed(False),
}
PATIENCE = 60.0


def loose_switches() -> list[tuple[object, str, object]]:
    """Owner, attribute and least exact value of every switch that is an attribute."""
    backends = torch.backends
    cudnn, mkldnn, matmul = backends.cudnn, backends.mkldnn, backends.cuda.matmul
    flags = [(cudnn, "enabled", True), (cudnn, "deterministic", False)]
    if not hasattr(cudnn, "conv"):
        return [(matmul, "allow_tf32", True), (cudnn, "allow_tf32", True), *flags]
    owners = (matmul, cudnn.conv, cudnn.rnn), (mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    return [
        (owner, "fp32_precision", value)
        for some, value in zip(owners, ("tf32", "bf16"), strict=True)
        for owner in some
    ] + flags


def state() -> list[object]:
    """The value of every switch, the last that of NNPACK."""
    nnpack = torch.backends.nnpack
    (enabled,) = nnpack.set_flags(False)  # there is no other way to read it
    nnpack.set_flags(enabled)
    return [*(getattr(owner, name) for owner, name, _ in loose_switches()), enabled]


@pytest.fixture
def loose():
    """The state in which every switch has its least exact value."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in loose_switches()]
    for owner, name, value in loose_switches():
        setattr(owner, name, value)
    yield state()
    for owner, name, value in before:
        setattr(owner, name, value)


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_leaves_no_trace(loose, name):
    with CONTEXTS[name](), CONTEXTS[name]():
        pass
    assert state() == loose
    with pytest.raises(ZeroDivisionError), CONTEXTS[name]():
        raise ZeroDivisionError
    assert state() == loose


class Held(threading.Thread):
    """A thread inside a context, from `start` until `leave` is called."""

    def __init__(self, context) -> None:
        super().__init__(daemon=True)
        self.context, self.entered, self.left = context, threading.Event(), threading.Event()

    def run(self) -> None:
        with self.context():
            self.entered.set()
            self.left.wait(PATIENCE)

    def start(self) -> None:
        super().start()
        assert self.entered.wait(PATIENCE)

    def leave(self) -> None:
        self.left.set()
        self.join(PATIENCE)
        assert not self.is_alive()


@pytest.mark.parametrize(("first", "second"), [*product(CONTEXTS, CONTEXTS)])
def test_threads_that_leave_in_the_order_in_which_they_came(loose, first, second):
    """The first one leaves while the second is still inside, which must not notice."""
    with CONTEXTS[second]():
        alone = state()
    threads = Held(CONTEXTS[first]), Held(CONTEXTS[second])
    for thread in threads:
        thread.start()
    threads[0].leave()
    assert state() == alone
    threads[1].leave()
    assert state() == loose


@pytest.mark.usefixtures("loose")
@pytest.mark.parametrize("order", [1, -1])
def test_training_with_tf32_does_not_affect_a_thread_that_certifies(order):
    with full_precision():
        exact = state()
    threads = [Held(CONTEXTS["TF32"]), Held(full_precision)]
    for thread in threads[::order]:
        thread.start()
    assert state() == exact
    threads[1].leave()
    assert state() != exact
    threads[0].leave()


def test_a_certificate_while_another_thread_leaves_full_precision(loose):
    """The margins of this thread are computed after the other one has left."""
    network, images, labels = problem()
    other, seen = Held(full_precision), []
    other.start()

    def observe(operator, x) -> None:
        if not seen:
            other.leave()
        seen.append(state())

    with full_precision():
        exact = state()
        ibp.robust_logits(fold(network), images, labels, RADII, BoundOptions(), observe)
    assert exact != loose
    assert all(values == exact for values in seen)
    assert state() == loose


# --- NNPACK -------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="torch without NNPACK")
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_plain_convolutions_avoid_winograd_by_nnpack():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(16, 32, 16, 16, generator=generator)
    weight = torch.randn(32, 32, 3, 3, generator=generator)

    def error() -> float:
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        return float((F.conv2d(x, weight, padding=1) - exact).abs().max())

    with torch.backends.mkldnn.flags(enabled=False):
        usual = error()
        with plain_convolutions():
            plain = error()
        with torch.backends.nnpack.flags(enabled=False):
            assert plain == error()
    assert plain < usual / 4


# --- autocast -----------------------------------------------------------------------------

RADII = torch.full((4,), 0.01)


def problem():
    torch.manual_seed(0)
    network = cnn7((1, 8, 8), 10, width=4, hidden=16).eval()
    images = torch.rand(4, 1, 8, 8)
    return network, images, network(images).argmax(1)


@torch.no_grad()
def passes(network, images, labels) -> dict[str, torch.Tensor]:
    """The result of every kind of bound pass, as a user may call it."""
    ball, folded = Interval.ball(images, RADII), fold(network)
    given = (folded, images, labels, RADII)
    found = {"network": network(ball).upper, "last layer": network[-1](network[:-1](ball)).upper}
    found |= {"folded": folded(ball).upper, "hidden": network[:3](ball).rad}
    for elide in (True, False):
        options = BoundOptions(elide=elide)
        for key, bound in BOUNDS.items():
            name = f"{key}, {elide}"
            found[f"margins by {name}"] = bound.margins(*given, options)
            found[f"logits by {name}"] = bound.robust_logits(*given, options)
            found[f"boxes by {name}"] = bound.box_logits(folded, ball, labels, options)
        found[f"fused, {elide}"] = crown_ibp.fused_cross_entropy(*given, options)[0]
        found[f"certified, {elide}"] = certified_margins(network, *given[1:], elide=elide)
    return found


def test_autocast_does_not_affect_any_bound_pass():
    network, images, labels = problem()
    expected = passes(network, images, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = passes(network, images, labels)
        assert network(images).dtype == torch.bfloat16  # other computations are still affected
    assert {name: x.dtype for name, x in found.items()} == dict.fromkeys(found, torch.float32)
    assert [n for n, x in found.items() if not torch.equal(x, expected[n])] == []


@torch.no_grad()
def test_a_ball_of_radius_0_gives_the_logits_under_autocast():
    network, images, _ = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        point = network(Interval.ball(images, 0.0))
    assert float((point.mid - network(images)).abs().max()) < 1e-6
    assert float(point.rad.abs().max()) == 0


def test_gradients_under_autocast():
    network, images, labels = problem()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            total = certified_margins(network, images, labels, RADII).sum()
        total.backward()
        found.append([p.grad.clone() for p in network.parameters()])
        network.zero_grad()
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backward", [False, True], ids=["outside", "inside"])
def test_a_training_step_under_autocast(backward):
    """Its clean pass is cast, its bounds are not, wherever the backward pass runs."""
    torch.manual_seed(0)
    layers = IntervalConv2d(1, 4, 3), IntervalReLU(), IntervalFlatten()
    network = IntervalSequential(*layers, IntervalLinear(144, 8), IntervalLinear(8, 3))
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])

    def gradients(enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            logits, folded = clean_pass(network, images)
            robust = ibp.robust_logits(folded, images, labels, RADII, BoundOptions())
            loss = F.cross_entropy(logits.float(), labels) + F.cross_entropy(robust, labels)
            if backward:
                loss.backward()
        if not backward:
            loss.backward()
        found = torch.cat([p.grad.flatten() for p in network.parameters()])
        network.zero_grad()
        return found

    expected = gradients(False)
    assert float((gradients(True) - expected).norm()) < 0.02 * float(expected.norm())


class Spy(IntervalLayer):
    """A ReLU that records the switches at each bound pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def operators(self):
        self.seen.append(state())
        return (RELU,)


def test_bounds_of_a_layer_use_neither_tf32_nor_bfloat16(loose):
    layer = Spy()
    IntervalSequential(layer)(Interval(mid=torch.zeros(1, 2), rad=torch.ones(1, 2)))
    assert state() == loose
    with full_precision():
        assert layer.seen == [state()]
