"""Models and their properties for other tools: ONNX, and VNN-LIB as VNN-COMP keeps it."""

from ibpcore.exporting.files import check_onnx, export_onnx, to_onnx
from ibpcore.exporting.vnnlib import property_text, write_benchmark

__all__ = ["check_onnx", "export_onnx", "property_text", "to_onnx", "write_benchmark"]
