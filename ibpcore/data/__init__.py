"""Data sets by name, and device-resident batches of them."""
