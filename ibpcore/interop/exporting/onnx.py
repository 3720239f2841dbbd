"""Export to ONNX, with a comparison of the result in onnxruntime with the model."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ibpcore.errors import UserError, first_line
from ibpcore.interop.execution import sessions
from ibpcore.interop.exporting.onnx_graph import Graph, Value
from ibpcore.interop.exporting.onnx_nodes import add
from ibpcore.io.files import write_atomic
from ibpcore.nn.layers import check_supported
from ibpcore.nn.networks import Classifier, weight_like
from ibpcore.precision import full_precision

OPSET, IR_VERSION = 14, 7
"""The oldest versions in which batch normalisation cannot be mistaken for one in training."""
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4
"""Largest difference of a logit, relative to the largest logit, or absolute if that is below 1."""


@torch.no_grad()
def to_onnx(model: Classifier) -> bytes:
    """The content of an ONNX file for other verifiers and runtimes.

    Its input are images (batch, *in_shape) in [0, 1], its output logits (batch, classes).

    Args:
        model: float32, in evaluation mode.

    Raises:
        UserError: a layer cannot be exported, batch norm is in training mode, the weights are
            not float32, ONNX does not accept the network, or the package onnx is missing.
    """
    check_supported(model)
    weight = weight_like(model)
    if weight.dtype != torch.float32:
        raise UserError(f"only float32 models can be exported, but this one is {weight.dtype}")
    graph = Graph(model)
    add(graph, model, Value(INPUT, torch.zeros(1, *model.in_shape, device=weight.device)))
    graph.nodes[-1].output[0] = OUTPUT
    helper, kind = graph.onnx.helper, graph.onnx.TensorProto.FLOAT
    content = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "ibpcore",
            [helper.make_tensor_value_info(INPUT, kind, ["batch", *model.in_shape])],
            [helper.make_tensor_value_info(OUTPUT, kind, ["batch", model.classes])],
            list(graph.constants.values()),
        ),
        producer_name="ibpcore",
        producer_version=version("ibpcore"),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    try:
        graph.onnx.checker.check_model(content, full_check=True)
    except Exception as error:  # its exceptions have no base class of their own
        raise UserError(f"ONNX does not accept the network: {first_line(error)}") from None
    return bytes(content.SerializeToString())


@torch.no_grad()
def check_onnx(content: bytes, model: Classifier, images: Tensor) -> float:
    """Compares the logits of onnxruntime with those of PyTorch.

    Args:
        content: from `to_onnx` for `model`.
        images: (B, C, H, W) float32 in [0, 1], on the device of the model.

    Returns:
        the largest difference of a logit.

    Raises:
        UserError: the difference is above `TOLERANCE`, or onnxruntime is missing or cannot run
            the network.
    """
    start = sessions()
    try:
        found = torch.from_numpy(start(content).run(None, {INPUT: images.cpu().numpy()})[0])
    except Exception as error:  # its exceptions have no base class of their own
        raise UserError(f"onnxruntime cannot run the network: {first_line(error)}") from None
    with full_precision():
        expected = model(images).cpu()
    if found.shape != expected.shape:
        raise UserError(f"ONNX gives {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = float((found - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise UserError(
            f"onnxruntime and PyTorch differ by {difference:.2g} in a logit, more than the"
            f" {allowed:.2g} that rounding explains: nothing was written"
        )
    return difference


def export_onnx(model: Classifier, path: str | Path, images: Tensor) -> float:
    """Writes an ONNX file, provided that it agrees with `model` on `images`.

    Args, return value and errors are those of `to_onnx` and `check_onnx`, with one more error.

    Raises:
        OSError: the file cannot be written.
    """
    content = to_onnx(model)
    difference = check_onnx(content, model, images)
    write_atomic(Path(path), content)
    return difference
