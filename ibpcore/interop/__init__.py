"""To and from other tools: conversion of modules, foreign checkpoints, ONNX, VNN-LIB.

Start with `conversion` for modules in memory, `importing/` for checkpoints of other
repositories, and `exporting/` for files that other tools read.
"""
