"""Data sets by name, batches of them on the device, and image files outside any data set.

Start with `sources` (`load_dataset`) and `batches`.
"""
