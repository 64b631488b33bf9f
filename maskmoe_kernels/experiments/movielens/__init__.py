"""The MovieLens experiment (section 4.2)."""
