"""Figures; they need matplotlib, the extra `plot`.

All functions that write raise UserError without it, and OSError if a file cannot be written.
"""
