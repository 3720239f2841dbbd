"""Models and their properties for other tools: ONNX, and VNN-LIB as VNN-COMP keeps it."""
