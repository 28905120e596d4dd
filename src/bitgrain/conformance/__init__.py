"""The acceptance test of a backend: every registered kernel over its declared domain against the definition."""
