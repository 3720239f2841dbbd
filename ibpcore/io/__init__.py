"""Files that survive faults: atomic writes, journals, locks, and pickles read without running code.

Start with `files`. `journal` records the finished parts of long work, so that it can be
resumed, and `locks` reserves a folder for one process. `torch_files` reads what `torch.save`
has written, with the interpreter of `pickles`.
"""
