"""A converted network computes what its module computes now, or says that it cannot."""

import copy
import random
from functools import cached_property
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms
from torchvision.transforms import v2

from ibpcore import (
    Interval,
    UserError,
    certified_margins,
    certified_radii,
    convert,
    load_model,
    save_model,
    verified_radii,
)
from ibpcore.certification.soundness.network import sound_network
from ibpcore.interop.exporting.onnx import to_onnx
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalSequential


class Net(nn.Module):
    """A convolution and a linear layer after any function of the input and two constants."""

    def __init__(self, function, mean, std, shape):
        super().__init__()
        self.function = function
        self.mean = self.kept(torch.full(shape, mean))
        self.std = self.kept(torch.full(shape, std))
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(64, 3)

    kept = nn.Buffer

    def forward(self, x):
        return self.fc(torch.relu(self.conv(self.function(self, x))).flatten(1))


class Frozen(Net):
    @staticmethod
    def kept(tensor):
        return nn.Parameter(tensor, requires_grad=False)


class Trained(Net):
    kept = nn.Parameter


class Plain(Net):
    """Its constants are tensors that it does not register."""

    @staticmethod
    def kept(tensor):
        return tensor


def repeated(m, x):
    mean, std = m.mean.expand(x.shape[0], -1, -1, -1), m.std.repeat(x.shape[0], 1, 1, 1)
    return (x - mean) / std


AS_IT_IS = {
    "normalised": (lambda m, x: (x - m.mean) / m.std, (1, 3, 1, 1)),
    "one number": (lambda m, x: (x - m.mean) / m.std, ()),
    "indexed": (lambda m, x: (x - m.mean[None, :, None, None]) / m.std[:, None, None], (3,)),
    "viewed": (lambda m, x: x / m.std.view(1, -1, 1, 1) - m.mean.reshape(1, 3, 1, 1), (3,)),
    "scaled": (lambda m, x: x * m.std + m.mean, (1, 3, 1, 1)),
    "subtracted from": (lambda m, x: (m.mean - x) / m.std, (3, 1, 1)),
    "an image": (lambda m, x: (x - m.mean) / m.std, (3, 6, 6)),
    "an image of a batch": (lambda m, x: (x - m.mean) / m.std, (1, 3, 6, 6)),
    "a row": (lambda m, x: (x - m.mean) * m.std, (6,)),
}
COMPUTED = {
    "guarded": (lambda m, x: (x - m.mean) / (m.std + 1e-3), (1, 3, 1, 1)),
    "as a logarithm": (lambda m, x: (x - 2 * m.mean) * torch.exp(-m.std), (3, 1, 1)),
    "of the batch": (repeated, (1, 3, 1, 1)),
    "of the same shape": (lambda m, x: x - m.mean.expand_as(x) / m.std.expand_as(x), (3, 1, 1)),
    "of the same type": (lambda m, x: (x - m.mean.to(x)) / m.std.type_as(x), (3, 1, 1)),
    "turned": (
        lambda m, x: (x - m.mean.permute(2, 0, 1)) / m.std.mean((0, 1))[:, None, None],
        (6, 6, 3),
    ),
}
USES = AS_IT_IS | COMPUTED
EARLY = ["indexed", "viewed", "guarded", "as a logarithm", "turned"]
"""Computed while the module is traced, if the tensor is a plain attribute."""
CASES = [
    (kind, name)
    for kind, names in (
        (Net, USES),
        (Frozen, USES),
        (Plain, USES.keys() - {*EARLY, "of the batch"}),
        (Trained, AS_IT_IS),
    )
    for name in sorted(names)
]


def pair(kind: type[Net], name: str) -> tuple[Net, Net]:
    """A new module, and a trained one with other weights and constants."""
    torch.manual_seed(0)
    function, shape = USES[name]
    return kind(function, 0.0, 1.0, shape).eval(), kind(function, 0.47, 0.25, shape).eval()


def load(module: Net, trained: Net, assign: bool) -> None:
    module.load_state_dict(trained.state_dict(), assign=assign)
    if isinstance(module, Plain):
        if assign:
            module.mean, module.std = trained.mean, trained.std
        else:
            module.mean.copy_(trained.mean)
            module.std.data.copy_(trained.std)


def assert_same(network, module, images, tolerance=1e-5):
    """Logits, bounds and proved radii of `network` are those of `module`."""
    with torch.no_grad():
        logits = module(images.clone())
        scale = logits.abs().max()
        assert (network(images) - logits).abs().max() <= tolerance * scale
        bounds = network(Interval.ball(images, 0.0))
        assert (bounds.mid - logits).abs().max() <= tolerance * scale


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_checkpoint_that_is_loaded_later_is_followed(kind, name, assign, tmp_path):
    """Whatever the shape, the operation, and the way in which the module keeps the tensor."""
    module, trained = pair(kind, name)
    images = torch.rand(4, 3, 6, 6)
    network = convert(module, (3, 6, 6)).eval()
    assert_same(network, module, images)
    load(module, trained, assign)
    assert_same(network, trained, images)
    save_model(network, tmp_path / "m.safetensors")
    for again in (copy.deepcopy(network), load_model(tmp_path / "m.safetensors")):
        assert_same(again, trained, images)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_network_and_module_move_together(kind, name):
    module, trained = pair(kind, name)
    images = torch.rand(4, 3, 6, 6)
    network = convert(module, (3, 6, 6)).eval()
    load(module, trained, False)
    network.double()
    assert_same(network, trained.double(), images.double(), 1e-6)
    network.float()
    assert_same(network, module, images)
    if kind is not Plain:  # such tensors do not move with their module
        module.double()
        assert_same(network, module, images.double(), 1e-12)


@pytest.mark.parametrize("name", AS_IT_IS)
def test_constants_that_are_parameters_are_trained(name):
    """Their gradients through bounds reach the module."""
    module, _ = pair(Trained, name)
    network = convert(module, (3, 6, 6))
    assert {id(p) for p in module.parameters()} == {id(p) for p in network.parameters()}
    network(Interval.ball(torch.rand(2, 3, 6, 6), 0.1)).upper.sum().backward()
    assert module.mean.grad.abs().sum() > 0
    assert module.std.grad.abs().sum() > 0


@pytest.mark.parametrize("claim", ["real", "float32"])
def test_no_certificate_is_false_after_the_checkpoint_was_loaded(claim):
    """Certified images of the network stay correct in the module, at the ends of their balls."""
    module, trained = pair(Net, "normalised")
    network = convert(module, (3, 6, 6)).eval()
    module.load_state_dict(trained.state_dict())
    images, labels = torch.rand(64, 3, 6, 6), torch.randint(3, (64,))
    radii = certified_radii(network, images, labels, 0.2)
    radius = verified_radii(network, images, labels, radii, claim=claim).radius
    correct = trained(images).argmax(1) == labels
    assert ((radius > 0) <= correct).all()
    assert (radius > 0).any()
    x = images.double().requires_grad_()
    logits = trained.double()(x)
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    (gradient,) = torch.autograd.grad((others - logits.gather(1, labels[:, None])[:, 0]).sum(), x)
    worst = (images + radius.view(-1, 1, 1, 1) * gradient.sign()).clamp(0, 1)
    assert (trained(worst).argmax(1) == labels)[radius > 0].all()


def use(network, kind):
    images, labels = torch.rand(2, 3, 6, 6), torch.zeros(2).long()
    uses = {
        "logits": lambda: network(images),
        "bounds": lambda: network(Interval.ball(images, 0.1)),
        "margins": lambda: certified_margins(network, images, labels, 0.1),
        "proof": lambda: sound_network(network, "real"),
        "export": lambda: to_onnx(network),
    }
    return uses[kind]()


USED = ["logits", "bounds", "margins", "proof", "export"]


@pytest.mark.parametrize("kind", USED)
def test_a_change_that_cannot_be_followed_is_refused(kind):
    """A tensor that is no buffer was used while the module was traced, and changed since."""
    torch.manual_seed(0)
    module = Plain(lambda m, x: x - 2 * m.mean, 0.0, 1.0, (3, 1, 1)).eval()
    module.table = [torch.ones(3)]
    network = convert(module, (3, 6, 6))
    use(network, kind)
    module.mean += 0.5
    with pytest.raises(UserError, match="cannot follow"):
        use(network, kind)
    module.mean -= 0.5
    use(network, kind)
    module.table[0] = torch.zeros(3)
    with pytest.raises(UserError, match="cannot follow"):
        use(network, kind)


@pytest.mark.parametrize("name", EARLY)
def test_a_plain_tensor_that_was_used_early_is_refused_when_it_changes(name):
    module, trained = pair(Plain, name)
    network = convert(module, (3, 6, 6))
    assert_same(network, module, torch.rand(4, 3, 6, 6))
    load(module, trained, False)
    with pytest.raises(UserError, match="cannot follow"):
        network(torch.rand(4, 3, 6, 6))


FROM_PARTS = {
    "chunks": lambda m, x: x * m.std.chunk(3)[1] + m.mean.unbind(0)[2],
    "extremes": lambda m, x: x * m.std.max(0)[0] - m.mean.topk(2, 0)[0][:1],
    "an order": lambda m, x: x - m.mean[m.mean.argsort(0).flatten()],
    "numbers": lambda m, x: x * torch.full_like(x, m.std.sum().item()),
    "a list": lambda m, x: x - x.new_tensor(m.mean.tolist()),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("name", FROM_PARTS)
def test_parts_and_numbers_of_constants_are_followed(name, assign):
    """Not as they were while the module was traced."""
    torch.manual_seed(0)
    module, trained = (Net(FROM_PARTS[name], 0.0, 1.0, (3, 1, 1)).eval() for _ in range(2))
    trained.mean.copy_(torch.rand(3, 1, 1))
    trained.std.copy_(torch.rand(3, 1, 1))
    network = convert(module, (3, 6, 6))
    load(module, trained, assign)
    assert_same(network, trained, torch.rand(4, 3, 6, 6))


NUMBERS = {
    "scale": lambda m, x: x * m.std.sum().item(),
    "shift": lambda m, x: x + (m.mean.mean().item() + 1),
    "slope": lambda m, x: nn.functional.leaky_relu(x - 0.5, m.std[0].item()),
    "limit": lambda m, x: x.clamp(min=m.mean[0].item()),
    "sizes": lambda m, x: torch.cat(x.split(m.std.flatten().int().tolist(), 1)[::-1], 1),
}


@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_python_has_read_must_not_change(name, kind):
    torch.manual_seed(0)
    module = Net(NUMBERS[name], 0.0, 1.0, (3,)).eval()
    network = convert(module, (3, 6, 6))
    use(network, kind)
    module.mean += 0.5
    module.std[0] += 1
    with pytest.raises(UserError, match="cannot follow"):
        use(network, kind)


EAGERLY = {
    "float": lambda m, x: x * float(m.std),
    "item": lambda m, x: x - m.std.item(),
    "tolist": lambda m, x: x / x.new_tensor([m.std.tolist()]),
    "bool": lambda m, x: x if m.std > 0 else -x,
}


@pytest.mark.parametrize("name", EAGERLY)
def test_plain_tensors_that_python_reads_must_not_change(name):
    """The trace shows no tensor, while those that it shows are followed."""
    module = Plain(lambda m, x: EAGERLY[name](m, x - m.mean), 0.0, 1.0, ()).eval()
    network = convert(module, (3, 6, 6))
    images = torch.rand(2, 3, 6, 6)
    module.mean += 0.3
    if name != "tolist":  # a new tensor, perhaps computed from any of them
        assert_same(network, module, images)
    module.std -= 2
    with pytest.raises(UserError, match="cannot follow"):
        network(images)


def changed_view(m, x):
    mean = m.mean.clone()
    mean[0].mul_(m.std.sum())
    return x - (mean + 0)


def limited_weight(m, x):
    m.conv.weight.data.clamp_(-1, 1)
    return x


IN_PLACE = {
    "a buffer": (lambda m, x: x * m.std.clamp_(min=0.1), "'clamp_' .* tensor of the module"),
    "its data": (lambda m, x: x * m.std.data.clamp_(min=0.1), "'clamp_' .* tensor of the module"),
    "a weight": (limited_weight, "'clamp_' .* tensor of the module"),
    "a counter": (lambda m, x: x + 0 * m.mean.add_(1), "'add_' .* tensor of the module"),
    "a view": (changed_view, "'mul_' .* what 'add' .* as another view"),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_constants_that_the_forward_changes_in_place_are_refused(name):
    """At the first numbers some of these changes have no effect."""
    function, message = IN_PLACE[name]
    module = Net(function, 0.0, 1 / 3 if name == "a view" else 1.0, (3, 1, 1)).eval()
    with pytest.raises(UserError, match=message):
        convert(module, (3, 6, 6))


def test_constants_that_come_to_differ_between_images_are_refused():
    rows = Net(lambda m, x: x - m.mean[: x.shape[0]], 0.0, 1.0, (9, 1, 1, 1)).eval()
    network = convert(rows, (3, 6, 6))
    rows.mean[1] = 1
    with pytest.raises(UserError, match="differs between the images"):
        network(torch.rand(2, 3, 6, 6))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("value", torch.zeros(3, 1, 1))


class Shared(Net):
    common = torch.zeros(3, 1, 1)


def made_equal(module):
    """Two buffers that are one tensor until they are loaded."""
    module.std = module.mean
    return module


WITHIN = {
    "objects": (
        lambda m, x: x - m.held.places[0]["mean"],
        lambda m: setattr(m, "held", SimpleNamespace(places=[{"mean": torch.zeros(3, 1, 1)}])),
        lambda m: m.held.places[0].update(mean=torch.ones(3, 1, 1)),
    ),
    "modules": (
        lambda m, x: x - m.held[0].value,
        lambda m: setattr(m, "held", [Part()]),
        lambda m: setattr(m.held[0], "value", torch.ones(3, 1, 1)),
    ),
    "classes": (
        lambda m, x: x - 2 * m.common,
        lambda m: None,
        lambda m: setattr(m, "common", torch.ones(3, 1, 1)),
    ),
    "arrays": (
        lambda m, x: x - float(m.held[0]),
        lambda m: setattr(m, "held", np.zeros(3)),
        lambda m: m.held.fill(1),
    ),
    "two names": (
        lambda m, x: x * m.mean - m.std,
        made_equal,
        lambda m: setattr(m, "std", torch.ones(())),
    ),
}


@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize("name", WITHIN)
def test_tensors_in_other_places_must_not_be_replaced(name, kind):
    function, prepare, change = WITHIN[name]
    module = Shared(function, 0.0, 1.0, ()).eval()
    prepare(module)
    network = convert(module, (3, 6, 6))
    assert_same(network, module, torch.rand(2, 3, 6, 6))
    module.load_state_dict({key: value / 2 for key, value in module.state_dict().items()})
    assert_same(network, module, torch.rand(2, 3, 6, 6))
    change(module)
    with pytest.raises(UserError, match="cannot follow"):
        use(network, kind)


def test_registered_modules_in_lists_are_followed():
    module, trained = pair(Net, "normalised")
    module.layers = [module.conv, module.fc]
    network = convert(module, (3, 6, 6))
    load(module, trained, True)
    assert_same(network, trained, torch.rand(4, 3, 6, 6))


CHANGES = {
    "another layer": lambda m: setattr(m, "fc", nn.Linear(64, 3)),
    "a hook of the module": lambda m: m.register_forward_hook(lambda m, args, out: 2 * out),
    "a hook before a layer": lambda m: m.conv.register_forward_pre_hook(lambda m, args: args[0]),
    "a parametrisation": lambda m: nn.utils.parametrizations.weight_norm(m.fc),
    "a setting": lambda m: setattr(m.conv, "padding", (1, 1)),
    "a buffer less": lambda m: delattr(m, "mean"),
    "a forward": lambda m: setattr(m, "forward", lambda x: x.flatten(1)[:, :3]),
}


@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize("name", CHANGES)
def test_a_module_that_computes_something_else_is_refused(name, kind):
    module, _ = pair(Net, "normalised")
    network = convert(module, (3, 6, 6))
    CHANGES[name](module)
    with pytest.raises(UserError):
        use(network, kind)


def test_a_network_in_double_precision_has_a_proof():
    """The numbers beside its constants have their type."""
    torch.manual_seed(0)
    module = Net(lambda m, x: (0.5 - x) * m.std + m.mean, 0.1, 0.7, (3, 1, 1)).double().eval()
    network = convert(module, (3, 6, 6))
    images = torch.rand(4, 3, 6, 6).double()
    labels = module(images).argmax(1)
    radii = certified_radii(network, images, labels, 0.1)
    assert (verified_radii(network, images, labels, radii).radius > 0).all()


@pytest.mark.parametrize("part", ["module", "network"])
def test_numbers_of_python_have_the_precision_of_the_module(part):
    torch.manual_seed(0)
    module = Net(lambda m, x: (0.1 - x / 3) * (1 / 7) * m.std, 0.1, 0.7, (3, 1, 1)).eval()
    network = convert(module, (3, 6, 6))
    (module if part == "module" else network).double()
    images = torch.rand(4, 3, 6, 6).double()
    assert_same(network, module, images, 1e-13)
    assert sound_network(network, "real")


@pytest.mark.parametrize("name", ["scaled", "as a logarithm"])
def test_copies_and_state_dicts_are_those_of_now(name):
    """Without a pass since the change."""
    module, trained = pair(Net, name)
    images = torch.rand(4, 3, 6, 6)
    network = convert(module, (3, 6, 6))
    load(module, trained, True)
    assert_same(copy.deepcopy(network), trained, images)
    load(module, trained.double(), True)
    assert {tensor.dtype for tensor in (*network.parameters(), *network.buffers())} == {
        torch.float64
    }
    network = convert(module, (3, 6, 6))
    load(module, Net(module.function, 0.3, 0.6, module.mean.shape), False)
    load(module, trained, True)
    expected = convert(trained, (3, 6, 6)).state_dict()
    assert all(torch.equal(expected[key], value) for key, value in network.state_dict().items())


def test_shallow_copies_follow_too():
    module, trained = pair(Net, "normalised")
    network = copy.copy(convert(module, (3, 6, 6)))
    load(module, trained, True)
    assert_same(network, trained, torch.rand(4, 3, 6, 6))


def test_weights_with_other_constants_than_the_module_computes_are_refused():
    """Otherwise the next pass would take those of the module."""
    module, trained = pair(Net, "as a logarithm")
    other = convert(trained, (3, 6, 6))
    network = convert(module, (3, 6, 6))
    with pytest.raises(UserError, match="load them into the module"):
        network.load_state_dict(other.state_dict())
    module, _ = pair(Net, "normalised")
    trained = pair(Net, "normalised")[1]
    network = convert(module, (3, 6, 6))
    network.load_state_dict(convert(trained, (3, 6, 6)).state_dict())
    assert_same(network, trained, torch.rand(4, 3, 6, 6))


def test_what_the_forward_itself_assigns_is_no_constant():
    def remembered(m, x):
        m.last = m.conv(x).detach()
        return x - 2 * m.mean

    module = Plain(remembered, 0.1, 1.0, (3, 1, 1)).eval()
    module.last = torch.zeros(())
    network = convert(module, (3, 6, 6))
    images = torch.rand(2, 3, 6, 6)
    assert_same(network, module, images)
    assert_same(network, module, 1 - images)


TYPED = {
    "scaled": lambda m, x: x * m.std,
    "divided": lambda m, x: x / (m.std + 3),
    "shifted": lambda m, x: m.std + x,
    "limited": lambda m, x: torch.clamp(x, max=m.std),
    "masked": lambda m, x: x * (m.std > 0.3),
}


@pytest.mark.parametrize(
    "kept", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("name", TYPED)
def test_constants_of_other_types_have_that_of_the_network(name, kept, tmp_path):
    """In half precision the reciprocal of a divisor would be wrong by 5e-4."""
    torch.manual_seed(0)
    module = Net(TYPED[name], 0.0, 1.0, (3, 1, 1)).eval()
    module.std = torch.tensor([0.3, 0.7, 1.3]).view(3, 1, 1).to(kept)
    network = convert(module, (3, 6, 6))
    images = torch.rand(4, 3, 6, 6)
    assert_same(network, module, images, 1e-6)
    module.std.copy_(torch.tensor([1.4, 0.1, 0.6]).view(3, 1, 1))
    assert_same(network, module, images, 1e-6)
    save_model(network, tmp_path / "m.safetensors")
    assert_same(load_model(tmp_path / "m.safetensors"), module, images, 1e-6)
    assert sound_network(network, "float32")
    assert to_onnx(network)


def test_a_constant_that_gets_another_type_is_refused():
    module, _ = pair(Net, "normalised")
    network = convert(module, (3, 6, 6))
    module.std = module.std.half()
    with pytest.raises(UserError, match=r"is torch.float16, but its weights torch.float32"):
        network(Interval.ball(torch.rand(1, 3, 6, 6), 0.1))


class Cached(Net):
    @cached_property
    def scale(self):
        return 1 / (self.std + 1)


class Assigned(Net):
    scale = None

    def forward(self, x):
        if self.scale is None:
            self.scale = 1 / (self.std + 1)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Cached, Assigned])
def test_constants_that_the_forward_keeps_are_refused(kind):
    """Once they are kept, they are constants like others."""
    module = kind(lambda m, x: x * m.scale, 0.0, 1.0, (3, 1, 1)).eval()
    with pytest.raises(UserError, match="keeps what 'truediv' in 'model' computes"):
        convert(module, (3, 6, 6))
    images = torch.rand(4, 3, 6, 6)
    module(images)
    network = convert(module, (3, 6, 6))
    module.std += 1
    assert_same(network, module, images)


def test_a_trace_leaves_attributes_as_they_were():
    module = Net(lambda m, x: setattr(m, "last", x.softmax(1)) or m.last, 0.0, 1.0, ()).eval()
    module.last = 7
    with pytest.raises(UserError, match="softmax"):
        convert(module, (3, 6, 6))
    assert module.last == 7


def test_another_shape_is_refused():
    module, _ = pair(Net, "normalised")
    network = convert(module, (3, 6, 6))
    module.mean = torch.zeros(1, 3, 6, 6)
    with pytest.raises(UserError, match="convert it again"):
        network(torch.rand(1, 3, 6, 6))


@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize(
    "hook", ["register_module_forward_hook", "register_module_forward_pre_hook"]
)
def test_hooks_of_all_modules_are_refused(hook, kind):
    module, _ = pair(Net, "normalised")
    network = convert(module, (3, 6, 6))
    handle = getattr(nn.modules.module, hook)(lambda *args: None)
    try:
        with pytest.raises(UserError, match="hooks of all modules"):
            convert(module, (3, 6, 6))
        if kind != "logits":  # which hooks change as in any module
            with pytest.raises(UserError, match="hooks of all modules"):
                use(network, kind)
        own = IntervalSequential(IntervalFlatten(), IntervalLinear(4, 2))
        with pytest.raises(UserError, match="hooks of all modules"):
            own(Interval.ball(torch.rand(1, 1, 2, 2), 0.1))
    finally:
        handle.remove()
    use(network, kind)


def by_numpy(m, x):
    return x + float(np.random.rand()) * 1e-3


RANDOM = {
    "randn": (lambda m, x: x + 1e-3 * torch.randn(1, 3, 1, 1), "'randn': it is random"),
    "rand": (lambda m, x: x + 1e-6 * torch.rand(x.shape), "'rand' in 'model': it is random"),
    "normal_": (lambda m, x: x + torch.empty(3, 1, 1).normal_(0, 1e-9), "'normal_': it is random"),
    "randint": (lambda m, x: x * torch.randint(1, 2, (1,)), "'randint'"),
    "randperm": (lambda m, x: x + 1e-9 * torch.randperm(6), "'randperm'"),
    "bernoulli": (lambda m, x: x * torch.bernoulli(m.std), "'bernoulli' in 'model': it is random"),
    "multinomial": (lambda m, x: x + 0 * torch.multinomial(m.std.flatten(), 1), "'multinomial'"),
    "of the image": (lambda m, x: x + 1e-9 * torch.randn_like(x), "operation 'randn_like'"),
    "dropout": (lambda m, x: nn.functional.dropout(x), "'dropout' .* pass training=self.training"),
    "dropout of a constant": (lambda m, x: x + nn.functional.dropout(m.std), "'dropout' .* random"),
    "a new layer": (lambda m, x: nn.Conv2d(3, 3, 1)(x), "cannot be traced"),
    "Python": (lambda m, x: x + random.random() * 1e-4, "not deterministic"),
    "NumPy": (by_numpy, "not deterministic"),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_operations_are_refused_by_name(name):
    function, message = RANDOM[name]
    torch.manual_seed(0)
    module = Net(function, 0.0, 1.0, (1, 3, 1, 1)).eval()
    with pytest.raises(UserError, match=message):
        convert(module, (3, 6, 6))


MEAN, STD = (0.48, 0.45, 0.41), [0.23, 0.22, 0.25]
NORMALISED = {
    "a layer": lambda: transforms.Normalize(MEAN, STD),
    "in place": lambda: transforms.Normalize(MEAN, STD, inplace=True),
    "version 2": lambda: v2.Normalize(MEAN, STD),
    "tensors": lambda: transforms.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    "one number": lambda: transforms.Normalize(0.5, 0.2),
}


@pytest.mark.parametrize("name", NORMALISED)
def test_the_normalisation_of_torchvision_is_converted(name):
    """As a layer, or hidden in a chain that is no module."""
    torch.manual_seed(0)
    transform = NORMALISED[name]()
    rest = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    images = torch.rand(4, 3, 6, 6)
    hidden = transforms.Compose([transform])
    for module in (
        nn.Sequential(transform, *rest),
        Net(lambda m, x: transform(x), 0.0, 1.0, ()),
        Net(lambda m, x: hidden(x), 0.0, 1.0, ()),
    ):
        network = convert(module.eval(), (3, 6, 6))
        assert_same(network, module, images.clone())


def test_other_transforms_are_named():
    module = nn.Sequential(transforms.Grayscale(), nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(UserError, match=r"unsupported layer '0' \(Grayscale\)"):
        convert(module, (3, 6, 6))
