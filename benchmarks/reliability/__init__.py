"""How often what is promised was tried, and how often it failed: docs/reliability.md."""
