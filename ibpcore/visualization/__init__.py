"""Figures, heatmaps and HTML pages of results.

Start with `plots/` for figures of runs (extra `plot`) and with `html/` for self-contained
pages of certificates.
"""
