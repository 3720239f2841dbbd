"""Searches for training settings, on top of Optuna."""
