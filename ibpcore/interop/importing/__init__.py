"""Checkpoints of other programs, made models of this one."""
