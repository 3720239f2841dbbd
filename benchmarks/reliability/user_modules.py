"""Random classifiers such as users write: every kind of layer, setting, container and state."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalNormalize
from ibpcore.nn.networks import Network

Shape = tuple[int, ...]
UNFIT = 0.03
"""Share of the layers that are kept although they do not take their input."""


def user_module(rng: random.Random, in_shape: Shape, classes: int) -> nn.Module:
    """A network that may have any fault; a function of the generator and of torch's seed."""
    if rng.random() < 0.05:
        return rng.choice(WHOLE)(in_shape, classes)
    parts, shape = _body(rng, in_shape)
    parts += _head(rng, shape, classes if rng.random() < 0.97 else classes + rng.choice((-1, 1)))
    module = rng.choice(CONTAINERS)(parts)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        module = rng.choice(STATES)(rng, module) or module
    return module


def _body(rng: random.Random, shape: Shape) -> tuple[list[nn.Module], Shape]:
    """Up to five random layers that take images of `shape`, and the shape of their output."""
    parts: list[nn.Module] = []
    for _ in range(rng.randrange(6)):
        layer = rng.choice(USUAL if rng.random() < 0.8 else UNUSUAL)(rng, shape)
        found = _output(layer, shape)
        if found is not None and 0 < torch.Size(found).numel() < 4000:
            shape = found
            parts.append(layer)
        elif rng.random() < UNFIT:
            parts.append(layer)
    return parts, shape


def _head(rng: random.Random, shape: Shape, classes: int) -> list[nn.Module]:
    features = torch.Size(shape).numel()
    heads: list[Callable[[], list[nn.Module]]] = [
        lambda: [nn.Flatten(), nn.Linear(features, classes, bias=rng.random() < 0.8)],
        lambda: [nn.Flatten(), nn.Linear(cast(int, np.prod(shape)), classes)],
        lambda: [nn.Flatten(), nn.Linear(features, 7), nn.ReLU(), nn.Linear(7, classes)],
        lambda: [Apply(lambda x: x.view(x.size(0), -1)), nn.Linear(features, classes)],
        lambda: [Apply(lambda x: torch.flatten(x, 1)), Own(features, classes)],
    ]
    if len(shape) == 3:
        pooled = nn.AdaptiveAvgPool2d(1)
        heads += [
            lambda: [nn.Conv2d(shape[0], classes, shape[1:]), nn.Flatten()],
            lambda: [nn.Conv2d(shape[0], classes, 1), pooled, nn.Flatten()],
            lambda: [pooled, nn.Flatten(), nn.Linear(shape[0], classes)],
            lambda: [Apply(lambda x: x.mean((2, 3))), nn.Linear(shape[0], classes)],
        ]
    made: list[nn.Module] = [nn.ReLU()] if rng.random() < 0.03 else rng.choice(heads)()
    if rng.random() < 0.1:
        last = (nn.Softmax(1), nn.ReLU(), nn.BatchNorm1d(classes), nn.Sigmoid(), nn.Identity())
        made.append(rng.choice(last))
    return made


@torch.no_grad()
def _output(layer: nn.Module, shape: Shape) -> Shape | None:
    """The shape of the output for an image of `shape`; None if the layer does not take it."""
    training = layer.training
    try:
        output = layer.eval()(torch.zeros(3, *shape))
        return tuple(output.shape[1:]) if len(output) == 3 else None
    except Exception:
        return None
    finally:
        layer.train(training)


# Containers and custom modules


class Apply(nn.Module):
    """A function as a module, which tracing looks through."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Chain(nn.Module):
    """A list of modules in a custom forward."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Named(nn.Module):
    """A dictionary of modules in a custom forward."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"part{n}": part for n, part in enumerate(parts)})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x)
        return x


class Own(nn.Module):
    """A linear layer of two bare parameters."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, features) / features)
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Affine(nn.Module):
    """x * scale + shift by numbers, buffers or parameters of one number or one a channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, rng: random.Random, channels: int) -> None:
        super().__init__()
        for name in ("scale", "shift"):
            value = torch.rand(rng.choice((1, channels)), 1, 1) + 0.1
            kind = rng.randrange(4)
            if kind == 0:
                self.register_buffer(name, value)
            elif kind == 1:
                self.register_buffer(name, value, persistent=False)
            else:
                self.register_parameter(name, nn.Parameter(value, requires_grad=kind == 3))
        self.divides = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.divides:
            return (x - self.shift) / self.scale
        return x * self.scale + self.shift


class Residual(nn.Module):
    """branch(x) + x, or branch(x) - shortcut(x), or both after each other as channels."""

    def __init__(self, rng: random.Random, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=rng.random() < 0.5),
            rng.choice((nn.BatchNorm2d(channels), nn.ReLU(True), nn.Tanh())),
        )
        self.shortcut = rng.choice((nn.Identity(), nn.Conv2d(channels, channels, 1)))
        self.kind = rng.randrange(4)

    def forward(self, x: Tensor) -> Tensor:
        branch, shortcut = self.branch(x), self.shortcut(x)
        if self.kind == 0:
            return branch - shortcut
        if self.kind == 1:
            return torch.cat([branch, shortcut], 1)
        if self.kind == 2:
            return F.relu(branch + shortcut)
        return branch.add_(shortcut)


class Doubled(nn.Linear):
    """A layer of torch with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Listed(nn.Module):
    """A linear layer of a list of parameters, and its transpose."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3, features), torch.zeros(features)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weights[0]), self.weights[0].T, self.weights[1])


class Twice(nn.Module):
    """The same layer twice, or two layers that share their weight."""

    def __init__(self, rng: random.Random, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = rng.choice((self.first, nn.Conv2d(channels, channels, 3, padding=1)))
        if rng.random() < 0.5:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x)))


class Weightless(nn.Module):
    """Logits without a parameter: the mean of each of `classes` parts of the image."""

    def __init__(self, in_shape: Shape, classes: int) -> None:
        super().__init__()
        self.side, self.classes = in_shape[-1], classes

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).flatten(1)[:, : self.classes]


class Strange(nn.Module):
    """A forward that cannot be traced, or that computes something else in every call."""

    def __init__(self, in_shape: Shape, classes: int, kind: str) -> None:
        super().__init__()
        self.last = nn.Linear(torch.Size(in_shape).numel(), classes)
        self.kind, self.calls = kind, 0

    def forward(self, x: Tensor) -> Any:
        logits = self.last(x.flatten(1))
        if self.kind == "values":
            return logits if x.sum() > 0 else -logits
        if self.kind == "calls":
            self.calls += 1
            return logits * self.calls
        if self.kind == "noise":
            return logits + torch.rand(())
        if self.kind == "constant":
            return self.last(torch.zeros_like(x.flatten(1)))
        if self.kind == "recursion":
            return self.forward(x)
        return {"tuple": (logits, x), "dictionary": {"logits": logits}, "nothing": None}[self.kind]


def _networks(in_shape: Shape, classes: int) -> nn.Module:
    features = torch.Size(in_shape).numel()
    layers = [IntervalNormalize([0.5], [0.5]), IntervalFlatten(), IntervalLinear(features, classes)]
    return Network(layers, in_shape)


WHOLE: list[Callable[[Shape, int], nn.Module]] = [
    Weightless,
    _networks,
    lambda in_shape, classes: nn.Linear(in_shape[-1], classes),
    lambda in_shape, classes: nn.Sequential(),
    *(
        partial(Strange, kind=kind)
        for kind in ("values", "calls", "noise", "constant", "recursion", "tuple", "dictionary")
    ),
]

CONTAINERS: list[Callable[[list[nn.Module]], nn.Module]] = [
    *[lambda parts: nn.Sequential(*parts)] * 4,
    *[lambda parts: nn.Sequential(nn.Sequential(*parts[:2]), nn.Sequential(*parts[2:]))] * 2,
    *[Chain, Named, lambda parts: Chain([Chain(parts)])] * 2,
    lambda parts: nn.DataParallel(nn.Sequential(*parts)),
]


# Layers: functions of the generator and the shape of their input


def _convolution(rng: random.Random, shape: Shape) -> nn.Module:
    groups = rng.choice((1, 1, 1, shape[0]))
    return nn.Conv2d(
        shape[0],
        groups * rng.choice((1, 2, 4)),
        rng.choice((1, 2, 3, (1, 3), 9)),
        stride=rng.choice((1, 1, 2, (2, 1))),
        padding=rng.choice((0, 1, 1, (0, 2), 4)),
        dilation=rng.choice((1, 1, 1, 2)),
        groups=groups,
        bias=rng.random() < 0.7,
        padding_mode=rng.choice(("zeros", "zeros", "reflect", "replicate", "circular")),
    )


def _named_padding(rng: random.Random, shape: Shape) -> nn.Module:
    return nn.Conv2d(shape[0], 3, rng.choice((2, 3)), padding=rng.choice(("same", "valid")))


def _linear(rng: random.Random, shape: Shape) -> nn.Module:
    return nn.Linear(shape[-1], rng.choice((1, 5, shape[-1])), bias=rng.random() < 0.7)


def _batch_norm(rng: random.Random, shape: Shape) -> nn.Module:
    kind = nn.BatchNorm1d if len(shape) < 3 else nn.BatchNorm2d
    norm = kind(
        shape[0],
        eps=rng.choice((1e-5, 1e-3, 0.0, 1e-45, -1.0)),
        momentum=rng.choice((0.1, None, 0.0, 1.0)),
        affine=rng.random() < 0.7,
        track_running_stats=rng.random() < 0.7,
    )
    return norm.train(rng.random() < 0.8)


def _dropout(rng: random.Random, shape: Shape) -> nn.Module:
    kind = rng.choice((nn.Dropout, nn.Dropout, nn.Dropout2d, nn.AlphaDropout))
    return kind(rng.choice((0.0, 0.5, 1.0)), inplace=rng.random() < 0.5)


def _pool(rng: random.Random, shape: Shape) -> nn.Module:
    kernel, stride = rng.choice((1, 2, 3, (2, 1))), rng.choice((None, 1, 2, 3))
    padding, ceil = rng.choice((0, 0, 1)), rng.random() < 0.3
    pools: list[Callable[[], nn.Module]] = [
        lambda: nn.MaxPool2d(kernel, stride, padding, rng.choice((1, 2)), rng.random() < 0.1, ceil),
        lambda: nn.AvgPool2d(
            kernel, stride, padding, ceil, rng.random() < 0.5, rng.choice((None, None, 3, -2))
        ),
        lambda: nn.AdaptiveAvgPool2d(rng.choice((1, 2, 3, (None, 1)))),
        lambda: nn.AdaptiveMaxPool2d(rng.choice((1, 2))),
        lambda: nn.LPPool2d(2, 2),
        lambda: Apply(lambda x: F.max_pool2d(x, 2)),
        lambda: Apply(lambda x: F.avg_pool2d(x, 2)),
        lambda: Apply(lambda x: F.adaptive_avg_pool2d(x, 1)),
    ]
    return rng.choice(pools)()


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    *(nn.ReLU, nn.ReLU, lambda: nn.ReLU(True), nn.Sigmoid, nn.Tanh, nn.ReLU6, nn.ELU, nn.SiLU),
    *(nn.GELU, nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Mish, nn.PReLU, nn.Identity),
    *(partial(nn.LeakyReLU, slope) for slope in (0.01, 0.0, 1.5, -0.1, 1e-40, 1e38)),
    *(lambda: nn.LeakyReLU(float("nan")), lambda: nn.Softmax(1), lambda: nn.LogSoftmax(-1)),
    *(
        partial(Apply, function)
        for function in (
            *(F.relu, torch.relu, torch.tanh, torch.sigmoid, F.gelu, torch.exp, torch.abs),
            *(lambda x: x.relu_(), lambda x: x.clamp(min=0), lambda x: F.leaky_relu(x, 0.1)),
            *(lambda x: F.dropout(x, 0.5), lambda x: x * torch.sigmoid(x), lambda x: x**2),
        )
    ),
]


def _activation(rng: random.Random, shape: Shape) -> nn.Module:
    return rng.choice(ACTIVATIONS)()


def _relu(rng: random.Random, shape: Shape) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [nn.ReLU, lambda: nn.ReLU(True), lambda: Apply(F.relu)]
    return rng.choice(kinds)()


def _plain_convolution(rng: random.Random, shape: Shape) -> nn.Module:
    return nn.Conv2d(shape[0], rng.choice((2, 3)), 3, stride=rng.choice((1, 2)), padding=1)


def _plain_batch_norm(rng: random.Random, shape: Shape) -> nn.Module:
    return nn.BatchNorm1d(shape[0]) if len(shape) < 3 else nn.BatchNorm2d(shape[0])


def _shaping(rng: random.Random, shape: Shape) -> nn.Module:
    layers: list[Callable[[], nn.Module]] = [
        lambda: nn.Flatten(rng.choice((0, 1, 2)), rng.choice((-1, 2))),
        lambda: nn.Unflatten(1, (1, shape[0])),
        lambda: nn.Upsample(scale_factor=2, mode=rng.choice(("nearest", "bilinear"))),
        lambda: nn.ZeroPad2d(rng.choice((1, (0, 1, 2, 0), -1))),
        lambda: nn.ReflectionPad2d(1),
        lambda: nn.PixelShuffle(2),
        lambda: nn.PixelUnshuffle(2),
        lambda: nn.ChannelShuffle(1),
        *(
            partial(Apply, function)
            for function in (
                *(lambda x: x.flip(-1), lambda x: x.transpose(1, -1), lambda x: x[:, :, 1:]),
                *(lambda x: x[..., 0], lambda x: x.permute(0, *range(x.dim() - 1, 0, -1))),
                *(lambda x: x.reshape(len(x), -1), lambda x: x.view(x.shape[0], -1, 2)),
                *(lambda x: x[:1], lambda x: x.unsqueeze(1), lambda x: x.squeeze()),
                *(lambda x: F.pad(x, (1, 1)), lambda x: F.interpolate(x, scale_factor=2)),
                *(lambda x: x.mean(1), lambda x: x.sum(-1), lambda x: x.amax(1)),
                *(lambda x: x.contiguous(), lambda x: x.float(), lambda x: x.double()),
                *(lambda x: x.detach(), lambda x: x.half().float(), lambda x: x.clone()),
                *(lambda x: x.data, lambda x: torch.cat([x, x], 1), lambda x: torch.cat([x, x])),
            )
        ),
    ]
    return rng.choice(layers)()


def _arithmetic(rng: random.Random, shape: Shape) -> nn.Module:
    functions: list[Callable[[Tensor], Any]] = [
        *(lambda x: x * 2, lambda x: x / 0.0, lambda x: x - 0.5, lambda x: 1 - x, lambda x: -x),
        *(lambda x: x * 1e30, lambda x: x * float("nan"), lambda x: x + x, lambda x: x - x),
        *(lambda x: x * x, lambda x: x / 3, lambda x: x // 1, lambda x: x + 1j, lambda x: x > 0),
        *(lambda x: x @ torch.eye(x.shape[-1]), lambda x: x * torch.ones(8), lambda x: 0 * x),
    ]
    return Apply(rng.choice(functions))


def _norm(rng: random.Random, shape: Shape) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.GroupNorm(1, shape[0]),
        lambda: nn.LayerNorm(shape),
        lambda: nn.InstanceNorm2d(shape[0], track_running_stats=rng.random() < 0.5),
        lambda: nn.LocalResponseNorm(2),
        lambda: nn.SyncBatchNorm(shape[0]),
        lambda: nn.LazyBatchNorm2d(),
    ]
    return rng.choice(kinds)()


def _with_weights(rng: random.Random, shape: Shape) -> nn.Module:
    kinds: list[Callable[[], nn.Module]] = [
        lambda: Affine(rng, shape[0]),
        lambda: Affine(rng, shape[0]),
        lambda: Residual(rng, shape[0]),
        lambda: Residual(rng, shape[0]),
        lambda: Twice(rng, shape[0]),
        lambda: nn.ConvTranspose2d(shape[0], 2, 2, stride=2),
        lambda: nn.LazyLinear(4),
        lambda: nn.LSTM(shape[-1], 3, batch_first=True),
        lambda: Doubled(shape[-1], 4),
        lambda: Listed(shape[-1]),
        lambda: nn.Conv1d(shape[0], 2, 3),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(shape[0], 2, 3)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(shape[0], 2, 3)),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(shape[-1], shape[-1])),
    ]
    return rng.choice(kinds)()


Layer = Callable[[random.Random, Shape], nn.Module]
USUAL: list[Layer] = [_plain_convolution, _convolution, _plain_batch_norm, _linear, _pool]
USUAL += [_relu, _relu]
UNUSUAL: list[Layer] = [_activation, _batch_norm, _named_padding, _dropout, _arithmetic, _norm]
UNUSUAL += [_with_weights, _with_weights, _shaping, _shaping]


# States: functions of the generator and the module, which they change or replace


def _some_part(rng: random.Random, module: nn.Module) -> nn.Module:
    parts = [part for part in module.modules() if [*part.parameters(recurse=False)]]
    return rng.choice(parts or [module])


def _cast(rng: random.Random, module: nn.Module) -> None:
    types = (torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.float32)
    rng.choice((module, _some_part(rng, module))).to(rng.choice(types))


def _integers(rng: random.Random, module: nn.Module) -> None:
    part, kind = _some_part(rng, module), rng.choice((torch.int8, torch.int64, torch.bool))
    for name, value in [*part.named_parameters(recurse=False)]:
        setattr(part, name, nn.Parameter(value.detach().to(kind), requires_grad=False))


def _freeze(rng: random.Random, module: nn.Module) -> None:
    rng.choice((module, _some_part(rng, module))).requires_grad_(False)


def _values(rng: random.Random, module: nn.Module) -> None:
    """Weights or statistics that are not finite, huge, denormal, negative or 0."""
    part = _some_part(rng, module)
    tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
    values = (float("nan"), float("inf"), 1e30, 1e-42, -1.0, 0.0)
    with torch.no_grad():
        for tensor in rng.sample(tensors, min(len(tensors), 1)):
            if tensor.is_floating_point():
                tensor.view(-1)[: rng.choice((1, None))] = rng.choice(values)


def _replaced(rng: random.Random, module: nn.Module) -> None:
    """Weights that are views, sparse, not leaves, or made in inference mode."""
    part, kind = _some_part(rng, module), rng.randrange(6)
    for name, value in [*part.named_parameters(recurse=False)]:
        whole = value.detach().clone()
        if kind == 0:
            setattr(part, name, nn.Parameter(whole[:1].expand(whole.shape)))
        elif kind == 1:
            setattr(part, name, nn.Parameter(whole.transpose(0, -1).contiguous().transpose(0, -1)))
        elif kind == 2:
            setattr(part, name, nn.Parameter(whole.to_sparse()))
        elif kind == 3:
            del part._parameters[name]
            setattr(part, name, value * 1.0)
        elif kind == 4:
            with torch.inference_mode():
                setattr(part, name, nn.Parameter(torch.rand(whole.shape) - 0.5))
        else:
            del part._parameters[name]
            part.register_buffer(name, whole)


def _mode(rng: random.Random, module: nn.Module) -> None:
    module.train(False)
    _some_part(rng, module).train(rng.random() < 0.5)


def _hook(rng: random.Random, module: nn.Module) -> None:
    part = rng.choice([*module.modules()])
    hooks: list[Callable[[], object]] = [
        lambda: part.register_forward_hook(lambda *_: None),
        lambda: part.register_forward_pre_hook(lambda *_: None),
        lambda: part.register_full_backward_hook(lambda *_: None),
        lambda: part.register_state_dict_pre_hook(lambda *_: None),
    ]
    rng.choice(hooks)()


def _gradient_hook(rng: random.Random, module: nn.Module) -> None:
    def fails(_: Tensor) -> Tensor:
        raise RuntimeError("made to\nfail")

    def nothing(gradient: Tensor) -> Tensor:
        return gradient * float("nan")

    for weight in _some_part(rng, module).parameters(recurse=False):
        if weight.requires_grad:
            weight.register_hook(rng.choice((fails, nothing)))


def _pruned(rng: random.Random, module: nn.Module) -> None:
    part = _some_part(rng, module)
    for name, weight in [*part.named_parameters(recurse=False)][:1]:
        if not nn.parameter.is_lazy(weight) and weight.is_floating_point():
            prune.random_unstructured(part, name, 0.5)


def _differentiable_buffers(rng: random.Random, module: nn.Module) -> None:
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.requires_grad_()


def _elsewhere(rng: random.Random, module: nn.Module) -> None:
    rng.choice((module, _some_part(rng, module))).to("meta")


def _wrapped(rng: random.Random, module: nn.Module) -> nn.Module | None:
    wrappers: list[Callable[[], nn.Module]] = [
        lambda: Apply(module),
        lambda: Apply(lambda x: module(x).squeeze()),
        lambda: torch.jit.freeze(torch.jit.script(module.eval())),
        lambda: torch.fx.symbolic_trace(module),
        lambda: cast(nn.Module, torch.compile(module, backend="eager")),
        lambda: nn.Sequential(module, nn.Flatten()),
    ]
    try:
        return rng.choice(wrappers)()
    except Exception:  # torch cannot compile or trace it
        return None


STATES: list[Callable[[random.Random, nn.Module], nn.Module | None]] = [
    *(_cast, _integers, _freeze, _freeze, _values, _values, _replaced, _replaced, _mode),
    *(_hook, _gradient_hook, _elsewhere, _wrapped, _pruned, _differentiable_buffers),
]
