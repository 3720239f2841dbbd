"""Translation of layers, functions and methods of PyTorch to interval layers, by kind."""
