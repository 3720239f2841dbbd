"""Bound propagation through lists of operators, independent of `torch.nn.Module`.

Start with `interval` and `operators`; `ibp` and `crown` turn a `network` of operators into
margins, and `registry` lists the bounds by name.
"""
