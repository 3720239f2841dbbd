"""Interval layers, networks of them, and their model files.

Start with `layers`: each layer is its `torch.nn` twin and accepts an `Interval` too.
`folding` turns a model into the operators that `ibpcore.bounds` propagates through, and
`checkpoint` saves and loads models.
"""
