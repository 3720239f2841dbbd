"""Certificates that hold in spite of rounding; docs/soundness.md derives every inequality.

`arithmetic` is the model of floating point, `rules` what it makes of each layer, `network`
the rules of a model, `margins` their bounds, `verification` radii that are proved.
"""
