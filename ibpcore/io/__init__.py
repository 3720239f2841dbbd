"""Files that survive faults: atomic writes, journals, locks, and pickles that run no code.

Start with `files`. `journal` records the parts of long work, and `locks` keeps a folder to
one process.
"""
