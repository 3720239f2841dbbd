"""Certified margins, radii and proofs, and certificates of whole data sets.

Start with `radii` (one batch) and `certify` (a data set); `soundness/` proves radii in spite
of rounding, and `certificates` writes and reads the table.
"""
