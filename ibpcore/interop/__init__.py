"""To and from other tools: conversion of modules, foreign checkpoints, ONNX, VNN-LIB.

Start with `conversion` for modules in memory, `reading/` for ONNX files, `importing/` for
checkpoints of other repositories, and `exporting/` for files that other tools read. A module and
an ONNX file both become a trace, of which `assembly` makes nested layers.
"""
