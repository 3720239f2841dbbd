"""The options of each command, declared without importing torch: help and completion are quick.

`shared` holds what several commands have. The function of a command calls one of the same name in
the module beside this package, which is only then imported.
"""
