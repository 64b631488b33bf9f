"""The skip prediction experiment (section 4.3)."""
