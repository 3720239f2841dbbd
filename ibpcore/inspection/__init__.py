"""Is the assumptions firm that the theory stands on? What it supposes of a network, in numbers."""
