"""Attacks on certified classifiers: PGD, AutoAttack, and certificates tested by them.

Start with `evaluation`, which attacks the certificates of a data set; `search` finds the
smallest radius at which an attack succeeds, `pgd` and `autoattack` are the attacks.
"""
