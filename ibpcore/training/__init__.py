"""The training loop, its configuration, and the methods.

Start with `loop` and `loss`; `methods/` holds a file for each method, `config` and `presets`
say what a run is made of, and `state` is what is saved of it.
"""
