"""Two checkouts of this repository, measured against each other."""
