"""Pages about certificates, for a browser."""
