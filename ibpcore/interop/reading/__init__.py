"""Networks of other tools that are read straight into interval layers: ONNX."""
