"""What a training step may run on a device without the host waiting for it.

Tensors on `meta` have shapes and no values, so whoever looks at one fails: as would be slow
on a GPU. How many samples are right has to be known, once a step; nothing else has.
"""

import importlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibpcore.bounds.ibp import margins
from ibpcore.bounds.operators import Relu
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.radii import CleanSamples, RootOptions, ibp_radii, indices_of
from ibpcore.data.batches import Batch
from ibpcore.nn.cnn7 import cnn7
from ibpcore.nn.folding import clean_pass
from ibpcore.roots import SOLVERS
from ibpcore.roots.base import OpenLanes
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_step
from ibpcore.training.methods import METHODS, CleanBatch
from ibpcore.training.methods.base import Searched, StepRadii
from ibpcore.training.methods.ibp import ibp_loss_at
from ibpcore.training.regularizers import activation_sums, warmup_regularizer
from ibpcore.training.state import TrainState

RADII = importlib.import_module("ibpcore.training.methods.adaptive_radii")
SAMPLES, CLASSES, OPEN = 8, 4, 5


class OnlyMeta(TorchDispatchMode):
    """Refuses tensors with values, but for single numbers, which kernels take as arguments."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs, outputs = self.strays((args, kwargs)), self.strays(result)
        held = [x for x in [*inputs, *outputs] if x.dim() > 0 and x.numel() > 0]
        assert not held, f"{function} on the CPU"
        return result

    @staticmethod
    def strays(tree) -> list[Tensor]:
        leaves = tree_leaves(tree)
        return [x for x in leaves if isinstance(x, Tensor) and x.device.type != "meta"]


@pytest.fixture
def only_meta():
    with OnlyMeta():
        yield


def test_strays_are_refused():
    """Copies to the device, results on the host, and a look at a value."""
    x = torch.ones(3, device="meta")
    with OnlyMeta():
        assert (2 * x + torch.tensor(1.0)).shape == (3,)
        with pytest.raises(AssertionError, match="on the CPU"):
            torch.ones(3)
        with pytest.raises((RuntimeError, NotImplementedError)):
            bool((x > 0).all())
        with pytest.raises((RuntimeError, NotImplementedError)):
            x.sum().item()
        with pytest.raises((RuntimeError, NotImplementedError)):
            x[x > 0]


def model() -> torch.nn.Module:
    with torch.device("meta"):
        return cnn7((1, 8, 8), CLASSES, 3, 6, (0.5,), (0.25,)).train()


def samples(dtype=torch.float32) -> Tensor:
    return torch.empty(SAMPLES, device="meta", dtype=dtype)


def rows() -> Tensor:
    """Those that are right, as far as the host knows: so many."""
    return torch.empty(OPEN, device="meta", dtype=torch.int64)


def clean_batch(net: torch.nn.Module, warmup: bool = False) -> CleanBatch:
    images = torch.empty(SAMPLES, 1, 8, 8, device="meta")
    relu_inputs = [] if warmup else None

    def observe(operator, x):
        if warmup and isinstance(operator, Relu):
            relu_inputs.append(x)

    logits, network = clean_pass(net, images, observe=observe)
    return CleanBatch(network, logits, images, samples(torch.int64), samples(), relu_inputs)


def check_gradients(net: torch.nn.Module, result, warmup: bool) -> None:
    loss = result.loss
    if warmup:
        loss = loss + warmup_regularizer(activation_sums(result.activations))
    loss.backward()
    assert loss.device.type == result.slopes.device.type == "meta"
    assert result.radii.shape == result.slopes.shape == (SAMPLES,)
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.device.type == "meta", name


WARMUP = pytest.mark.parametrize("warmup", [False, True], ids=["later", "warm-up"])


@WARMUP
@pytest.mark.parametrize("clip", [True, False], ids=["clipped", "bare"])
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.usefixtures("only_meta")
def test_fastibp_never_waits(elide, clip, warmup):
    """Clean pass, batch statistics, loss, regularisers and backward."""
    net, config = model(), make_config("digits", "fastibp", elide=elide, clip=clip)
    check_gradients(net, METHODS["fastibp"](clean_batch(net, warmup), 0.1, config), warmup)


@pytest.mark.usefixtures("only_meta")
def test_standard_training_never_waits():
    net, config = model(), make_config("digits", "standard")
    check_gradients(net, METHODS["standard"](clean_batch(net), 0.1, config), False)


@WARMUP
@pytest.mark.parametrize("method", [name for name in METHODS if name != "standard"])
@pytest.mark.usefixtures("only_meta")
def test_a_step_at_epsilon_0_never_waits(method, warmup):
    net, config = model(), make_config("digits", method, kappa=0.5)
    check_gradients(net, METHODS[method](clean_batch(net, warmup), 0.0, config), warmup)


@WARMUP
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.usefixtures("only_meta")
def test_a_loss_at_given_rows_never_waits(elide, warmup):
    """How many rows there are is known, and so how many others there are."""
    net, config = model(), make_config("digits", "acert", elide=elide)
    at = StepRadii(samples(), rows(), Searched(samples(), rows() > 0))
    check_gradients(net, ibp_loss_at(clean_batch(net, warmup), at, 0.1, config), warmup)


@pytest.mark.parametrize("budget", [None, 1], ids=["whole", "pieces"])
@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.usefixtures("only_meta")
def test_margins_at_many_radii_never_wait(elide, clip, budget):
    batch = clean_batch(model())
    radii = torch.empty(2, SAMPLES, device="meta")
    with torch.no_grad():
        values = margins(
            batch.network,
            batch.images,
            batch.labels,
            radii,
            BoundOptions(elide=elide, clip=clip, budget=budget),
        )
    assert values.shape == (2, SAMPLES)
    assert values.device.type == "meta"


@pytest.fixture
def counted(monkeypatch):
    """Lanes are taken to be open until the iterations are used up; how often that was asked."""
    asked = []

    def count(self, open_):
        asked.append(len(open_))
        return len(open_)

    monkeypatch.setattr(OpenLanes, "count", count)
    return asked


SEARCHES = [(solver, {}) for solver in SOLVERS if solver != "fused"]
SEARCHES += [("fused", {"candidates": k}) for k in (1, 2, 3, 8)]


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize(("solver", "options"), SEARCHES, ids=str)
@pytest.mark.usefixtures("only_meta")
def test_solvers_never_wait_but_for_the_count(solver, options, iterations, counted):
    batch = clean_batch(model())
    radii = ibp_radii(
        batch.network,
        CleanSamples(batch.images, batch.labels, samples()),
        0.1,
        RootOptions(solver, max_iterations=iterations, **options),
        BoundOptions(),
        rows=rows(),
    )
    assert all(part.shape == (SAMPLES,) for part in radii)
    assert all(part.device.type == "meta" for part in radii)
    assert set(counted) <= {OPEN}
    assert len(counted) >= min(iterations, 1)


@WARMUP
@pytest.mark.parametrize("iterations", [0, 1])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.usefixtures("only_meta", "counted")
def test_acert_waits_once(solver, iterations, warmup, monkeypatch):
    """For the samples that are right; stood in for here."""
    waits = []

    def stand_in(chosen: Tensor) -> Tensor:
        waits.append(chosen.shape)
        return rows()

    monkeypatch.setattr(RADII, "indices_of", stand_in)
    net = model()
    config = make_config("digits", "acert", solver=solver, max_iterations=iterations)
    check_gradients(net, METHODS["acert"](clean_batch(net, warmup), 0.1, config), warmup)
    assert waits == [(SAMPLES,)]


def test_which_samples_are_right_has_to_be_waited_for():
    """The one place: a shape that depends on values."""
    with pytest.raises(NotImplementedError):
        indices_of(samples())


@pytest.mark.parametrize("regularizer", [0.0, 0.5], ids=["later", "warm-up"])
@pytest.mark.parametrize(
    ("method", "adaptive"),
    [
        *((method, False) for method in METHODS if method != "acert"),
        *((method, True) for method in ("acert", "sabr", "mtl-ibp", "staps")),
    ],
)
@pytest.mark.usefixtures("only_meta", "counted")
def test_a_whole_step_never_waits_elsewhere(method, adaptive, regularizer, monkeypatch):
    """Memory of slopes, gradient clipping, optimiser and schedule included."""
    monkeypatch.setattr(RADII, "indices_of", lambda chosen: rows())
    config = make_config(
        "digits",
        method,
        adaptive=adaptive,
        regularizer=regularizer,
        l1=1e-4,
        solver="tracked",
        max_iterations=1,
    )
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
    memory = torch.empty(100, device="meta")
    state = TrainState(net, optimizer, schedule, memory)
    batch = Batch(
        torch.empty(SAMPLES, 1, 8, 8, device="meta"), samples(torch.int64), samples(torch.int64)
    )
    share = 0.5 if regularizer > 0 else 1.0
    for _ in range(2):
        result = train_step(state, batch, share, config)
    assert result.samples == SAMPLES
    assert [(part.shape, part.device.type) for part in result.sums] == [((), "meta")] * 4
    for parameter in net.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].device.type == "meta"
