"""A second implementation of interval bounds, to compare the first with.

Written from the textbook rule in float64: an interval is a lower and an upper tensor, and an
affine map takes its positive and its negative weights apart (W+ and W-). It shares no code
with `ibpcore`: off a model it reads parameters, buffers, hyper-parameters and `training`.

In training mode batch norm takes the statistics of the clean batch that travels beside the
bounds, computed here. Dropout is the identity everywhere.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class State(NamedTuple):
    """What travels through a model: bounds and the clean batch, each (B, ...), float64."""

    lower: Tensor
    upper: Tensor
    clean: Tensor


def ball(images: Tensor, epsilon, clip=(0.0, 1.0)) -> State:
    """The l-infinity ball around (B, ...) images; `epsilon` is a scalar or (B,)."""
    images = images.detach().double()
    radius = torch.as_tensor(epsilon, dtype=torch.float64).detach().expand(len(images))
    radius = radius.reshape(-1, *[1] * (images.dim() - 1))
    lower, upper = images - radius, images + radius
    if clip is not None:
        lower, upper = lower.clamp(min=clip[0]), upper.clamp(max=clip[1])
    return State(lower, upper, images)


@torch.no_grad()
def propagate(module: nn.Module, x: State) -> State:
    """`x` through `module`."""
    if isinstance(module, nn.Sequential):
        for child in module:
            x = propagate(child, x)
        return x
    if type(module).__name__ == "IntervalResidual":
        a, b = propagate(module.branch, x), propagate(module.shortcut, x)
        return State(a.lower + b.lower, a.upper + b.upper, a.clean + b.clean)
    if type(module).__name__ == "IntervalProduct":
        a, b = propagate(module.first, x), propagate(module.second, x)
        corners = torch.stack([p * q for p in (a.lower, a.upper) for q in (b.lower, b.upper)])
        return State(corners.amin(0), corners.amax(0), a.clean * b.clean)
    if type(module).__name__ == "IntervalConcat":
        parts = [propagate(branch, x) for branch in module.children()]
        return State(*(torch.cat(side, module.dim) for side in zip(*parts, strict=True)))
    if isinstance(module, nn.Conv2d):
        return _affine(module.weight, module.bias, x, lambda t, w, b: _convolution(module, t, w, b))
    if isinstance(module, nn.Conv1d):
        return _affine(module.weight, module.bias, x, lambda t, w, b: _correlated(module, t, w, b))
    if isinstance(module, nn.ConvTranspose2d):
        return _affine(module.weight, module.bias, x, lambda t, w, b: _painted(module, t, w, b))
    if type(module).__name__ == "IntervalMatMul":
        bias = torch.zeros(1) if module.bias is None else module.bias
        return _affine(module.weight, bias, x, _matrix_product)
    if isinstance(module, nn.Linear):
        return _affine(module.weight, module.bias, x, F.linear)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _batch_norm(module, x)
    if type(module).__name__ == "IntervalNormalize":
        mean, std = module.mean.double(), module.std.double()
        return _per_channel(x, 1 / std, -mean / std)
    if type(module).__name__ in ("IntervalMaximum", "IntervalMinimum"):
        constant = module.constant.double().view(-1) * torch.ones(x.clean.shape[1]).double()
        constant = constant.view(-1, *[1] * (x.clean.dim() - 2))
        greater = type(module).__name__ == "IntervalMaximum"
        return State(*(torch.where((part > constant) == greater, part, constant) for part in x))
    if isinstance(module, nn.PReLU):
        slope = module.weight.double().view(-1, *[1] * (x.clean.dim() - 2))
        signs = [torch.where(part > 0, part, slope * part) for part in x]
        crossing = (x.lower < 0) & (x.upper > 0)
        ends = torch.minimum(signs[0], signs[1])
        least = torch.where(crossing, ends.clamp(max=0), ends)
        return State(least, torch.maximum(signs[0], signs[1]), signs[2])
    if type(module).__name__ == "IntervalScale":
        scale, shift = (_placed(c, module.channels, x.clean) for c in (module.scale, module.shift))
        return _elementwise(x, lambda t: t * scale + shift)
    if type(module).__name__ == "IntervalSubtract":
        return _elementwise(x, lambda t: t - _placed(module.constant, module.channels, t))
    if type(module).__name__ == "IntervalDivide":
        return _elementwise(x, lambda t: t / _placed(module.divisor, module.channels, t))
    if type(module).__name__ in LEAST:
        return _unimodal(module, x)
    return State(*(_increasing(module, part) for part in x))


def _elementwise(x: State, function) -> State:
    """A function of each number that is monotone, though not in the same direction for all."""
    lower, upper = function(x.lower), function(x.upper)
    return State(torch.minimum(lower, upper), torch.maximum(lower, upper), function(x.clean))


def _placed(constant, channels: int, t):
    """One number, one for each channel, or numbers that broadcast."""
    constant = constant.double()
    per_channel = constant.numel() in (1, channels)
    return constant.reshape(-1, *[1] * (t.dim() - 2)) if per_channel else constant


LEAST = {
    "IntervalAbs": 0.0,
    "IntervalHardswish": -1.5,
    "IntervalSiLU": -1.27846454276107379510935873902,
    "IntervalGELU": -0.75179152469356445746,
    "IntervalMish": -1.19243121451549521214,
}
"""Where the functions that are not monotone are least; GELU of the form with tanh elsewhere."""
GELU_TANH_LEAST = -0.75246142207101625849


def _unimodal(module: nn.Module, x: State) -> State:
    """The upper end is the greater of the two values, the lower one that closest to the minimum."""
    least = LEAST[type(module).__name__]
    if getattr(module, "approximate", "") == "tanh":
        least = GELU_TANH_LEAST
    lower, upper, clean = (_increasing(module, part) for part in x)
    inside = _increasing(module, torch.tensor(least).double().clamp(x.lower, x.upper))
    return State(inside, torch.maximum(lower, upper), clean)


def margins(model: nn.Sequential, images, labels, epsilon, elide: bool, clip) -> Tensor:
    """Worst f_i - f_y over i != y, (B,): eq. 3, or with `elide` through W_i - W_y."""
    return box_margins(model, ball(images, epsilon, clip), labels, elide)


def box_margins(model: nn.Sequential, x: State, labels, elide: bool) -> Tensor:
    """`margins` over any box instead of a ball."""
    worst = _elided(model, x, labels) if elide else _separate(propagate(model, x), labels)
    true = F.one_hot(labels, worst.shape[1]).bool()
    return worst.masked_fill(true, -torch.inf).max(1).values


def _separate(logits: State, labels: Tensor) -> Tensor:
    rows = torch.arange(len(labels))
    return logits.upper - logits.lower[rows, labels][:, None]


@torch.no_grad()
def _elided(model: nn.Sequential, x: State, labels: Tensor) -> Tensor:
    *body, last = model
    for child in body:
        x = propagate(child, x)
    weight = last.weight.double()
    bias = torch.zeros(len(weight)).double() if last.bias is None else last.bias.double()
    worst = []
    for lower, upper, label in zip(x.lower, x.upper, labels, strict=True):
        difference = weight - weight[label]
        worst.append(
            difference.clamp(min=0) @ upper + difference.clamp(max=0) @ lower + (bias - bias[label])
        )
    return torch.stack(worst)


def _affine(weight: Tensor, bias: Tensor | None, x: State, operation) -> State:
    weight = weight.double()
    bias = None if bias is None else bias.double()
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    return State(
        operation(x.lower, positive, bias) + operation(x.upper, negative, None),
        operation(x.upper, positive, bias) + operation(x.lower, negative, None),
        operation(x.clean, weight, bias),
    )


def _convolution(module: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padding = module.padding
    if module.padding_mode != "zeros":
        (rows, columns), padding = padding, 0
        x = F.pad(x, (columns, columns, rows, rows), mode=module.padding_mode)
    return F.conv2d(x, weight, bias, module.stride, padding, module.dilation, module.groups)


def _matrix_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.tensordot(x, weight, 1) + (0 if bias is None else bias)


def _correlated(module: nn.Conv1d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution of rows, one place of the kernel after the other."""
    (pad,), (step,), (hole,) = module.padding, module.stride, module.dilation
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, (pad, pad), mode=mode)
    length = (x.shape[2] - hole * (weight.shape[2] - 1) - 1) // step + 1
    x = x.unflatten(1, (module.groups, -1))
    weight = weight.unflatten(0, (module.groups, -1))
    y = 0 if bias is None else bias[:, None]
    for place in range(weight.shape[3]):
        start = place * hole
        window = x[..., start : start + (length - 1) * step + 1 : step]
        y = y + torch.einsum("goi,ngil->ngol", weight[..., place], window).flatten(1, 2)
    return y


def _painted(module: nn.ConvTranspose2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A transposed convolution: each pixel paints its kernel onto a canvas, which is cropped."""
    (rows, columns), (down, right) = weight.shape[2:], module.stride
    (low, left), (more, further), hole = module.padding, module.output_padding, module.dilation
    height, width = x.shape[2:]
    size = (height - 1) * down + hole[0] * (rows - 1) + 1 + more
    across = (width - 1) * right + hole[1] * (columns - 1) + 1 + further
    canvas = x.new_zeros(len(x), module.out_channels, size, across)
    x, weight = x.unflatten(1, (module.groups, -1)), weight.unflatten(0, (module.groups, -1))
    for i in range(rows):
        for j in range(columns):
            paint = torch.einsum("gio,ngihw->ngohw", weight[..., i, j], x)
            top, side = i * hole[0], j * hole[1]
            canvas[
                :,
                :,
                top : top + (height - 1) * down + 1 : down,
                side : side + (width - 1) * right + 1 : right,
            ] += paint.flatten(1, 2)
    canvas = canvas[:, :, low : size - low, left : across - left]
    return canvas if bias is None else canvas + bias[:, None, None]


def _batch_norm(module: nn.modules.batchnorm._BatchNorm, x: State) -> State:
    if module.training or module.running_mean is None:
        others = [d for d in range(x.clean.dim()) if d != 1]
        mean = x.clean.mean(others, keepdim=True)
        variance = ((x.clean - mean) ** 2).mean(others)
        mean = mean.flatten()
    else:
        mean, variance = module.running_mean.double(), module.running_var.double()
    scale = 1 / torch.sqrt(variance + module.eps)
    if module.affine:
        scale = scale * module.weight.double()
    shift = -mean * scale
    return _per_channel(x, scale, shift + module.bias.double() if module.affine else shift)


def _per_channel(x: State, scale: Tensor, shift: Tensor) -> State:
    shape = (1, -1) + (1,) * (x.clean.dim() - 2)
    scale, shift = scale.reshape(shape), shift.reshape(shape)
    a, b = scale * x.lower + shift, scale * x.upper + shift
    return State(torch.minimum(a, b), torch.maximum(a, b), scale * x.clean + shift)


def _increasing(module: nn.Module, x: Tensor) -> Tensor:
    """`module` on a plain tensor, for modules that keep the order of their inputs."""
    match type(module).__name__:
        case "IntervalReshape":
            return torch.stack([sample.view(module.shape) for sample in x.contiguous()])
        case "IntervalPermute":
            return torch.einsum(x, list(range(x.dim())), list(module.dims))
        case "IntervalZeroPad":
            pairs = list(zip(module.padding[::2], module.padding[1::2], strict=True))
            for dim, (before, after) in enumerate(pairs, 1):
                x = x.transpose(-dim, 0)
                parts = x.new_zeros(before, *x.shape[1:]), x, x.new_zeros(after, *x.shape[1:])
                x = torch.cat(parts).transpose(-dim, 0)
            return x
        case "IntervalSlice":
            for dim, numbers in enumerate(module.ranges, 1):
                x = x.index_select(dim, torch.arange(*numbers))
            return x
        case "IntervalIndexSelect":
            return torch.stack([x.select(module.dim, i) for i in module.indices], module.dim)
        case "IntervalUpsample":
            rows, columns = module.factors
            return x.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
        case "IntervalAbs":
            return torch.where(x < 0, -x, x)
    match module:
        case nn.ReLU():
            return x.clamp(min=0)
        case nn.LeakyReLU():
            return torch.where(x > 0, x, module.negative_slope * x)
        case nn.Sigmoid():
            return 1 / (1 + torch.exp(-x))
        case nn.Tanh():
            return torch.tanh(x)
        case nn.modules.dropout._DropoutNd():
            return x
        case nn.Hardtanh():
            return torch.where(x < module.min_val, module.min_val, x.clamp(max=module.max_val))
        case nn.Hardsigmoid():
            return (x / 6 + 0.5).clamp(0, 1)
        case nn.Hardswish():
            return torch.where(x.abs() <= 3, x * (x + 3) / 6, x.clamp(min=0))
        case nn.Softsign():
            return torch.where(x > 0, 1 - 1 / (1 + x.clamp(min=0)), 1 / (1 - x.clamp(max=0)) - 1)
        case nn.LogSigmoid():
            return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))
        case nn.Softplus():
            y = module.beta * x
            return (y.clamp(min=0) + torch.log1p(torch.exp(-y.abs()))) / module.beta
        case nn.ELU():
            return x.clamp(min=0) + module.alpha * (torch.exp(x.clamp(max=0)) - 1)
        case nn.CELU():
            return x.clamp(min=0) + module.alpha * (torch.exp(x.clamp(max=0) / module.alpha) - 1)
        case nn.SELU():
            alpha, scale = 1.67326324235437728481704, 1.05070098735548049341934
            return scale * (x.clamp(min=0) + alpha * (torch.exp(x.clamp(max=0)) - 1))
        case nn.SiLU():
            return x / (1 + torch.exp(-x))
        case nn.GELU():
            if module.approximate == "tanh":
                inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x * x * x)
                return x / (1 + torch.exp(-2 * inner))
            return x * torch.special.ndtr(x)
        case nn.Mish():
            # tanh(log(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2)
            return x * (1 - 2 / ((1 + torch.exp(x)) ** 2 + 1))
        case nn.Flatten():
            return x.flatten(module.start_dim, module.end_dim)
        case nn.AvgPool2d():
            return F.avg_pool2d(
                x,
                module.kernel_size,
                module.stride,
                module.padding,
                module.ceil_mode,
                module.count_include_pad,
                module.divisor_override,
            )
        case nn.MaxPool2d():
            return F.max_pool2d(
                x,
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                module.ceil_mode,
            )
    raise TypeError(f"the oracle does not know {type(module).__name__}")


@torch.no_grad()
def randomize_batch_norm(model: nn.Module, x: Tensor, generator: torch.Generator) -> nn.Module:
    """Random scales of both signs, and statistics near those of the batch `x`; the model in eval.

    Statistics that have nothing to do with the data would leave a net of dead neurons.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in norms:
        module.momentum, momentum = 1.0, module.momentum
        if module.affine:
            module.weight.normal_(0.5, 0.7, generator=generator)
            module.bias.normal_(0, 0.5, generator=generator)
    model.train()(x.clone())
    for module in norms:
        module.momentum = momentum
        module.num_batches_tracked.zero_()
        noise = torch.empty_like(module.running_mean).normal_(0, 0.5, generator=generator)
        module.running_mean.add_(noise * module.running_var.sqrt())
        module.running_var.mul_(torch.empty_like(noise).uniform_(0.5, 2, generator=generator))
    return model.eval()
