"""Import of checkpoints from other programs."""
