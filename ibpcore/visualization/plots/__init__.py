"""Figures; they need matplotlib, the extra `plot`."""
