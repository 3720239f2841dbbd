"""Execution of ONNX files by onnxruntime, as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ibpcore.errors import UserError, first_line
from ibpcore.interop.exporting.onnx_graph import package
from ibpcore.io.compressed import is_packed, unpacked

TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64}
ERRORS_ONLY = 3

Execution = Callable[[Tensor], list[float]]
"""(inputs,) float32 numbers, in the order of memory -> the numbers of the output."""


def sessions() -> Callable[[bytes | str], Any]:
    """A function that makes a session of onnxruntime on the CPU, of a file's content or its path.

    Raises:
        UserError: onnxruntime is missing. The function raises errors of onnxruntime.
    """
    onnxruntime = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = ERRORS_ONLY
    return partial(
        onnxruntime.InferenceSession, sess_options=options, providers=["CPUExecutionProvider"]
    )


def execution(path: Path) -> Execution:
    """A function that runs the network in an ONNX file, which may be compressed by gzip.

    Raises:
        UserError: onnxruntime is missing, does not take the file, or the network has several
            inputs or one of another type. The function raises it if the network fails.
        OSError: the file cannot be read.
    """
    start = sessions()
    try:
        # By its path, since its weights may be in files beside it.
        session = start(unpacked(path) if is_packed(path) else str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # its exceptions have no base class of their own
        raise UserError(f"{path}: onnxruntime does not take it: {first_line(error)}") from None
    ports = session.get_inputs()
    if len(ports) != 1 or ports[0].type not in TYPES:
        found = ", ".join(port.type for port in ports)
        raise UserError(f"{path}: the network takes {found}, not one tensor of float32 or float64")
    shape = [size if isinstance(size, int) else 1 for size in ports[0].shape]

    def run(inputs: Tensor) -> list[float]:
        if inputs.numel() != math.prod(shape):
            raise UserError(f"{path}: the network takes {shape}, not {inputs.numel()} numbers")
        array = inputs.cpu().numpy().astype(TYPES[ports[0].type]).reshape(shape)
        try:
            output = session.run(None, {ports[0].name: array})[0]
        except Exception as error:
            raise UserError(f"{path}: onnxruntime cannot run it: {first_line(error)}") from None
        return [float(number) for number in output.flatten()]

    return run
