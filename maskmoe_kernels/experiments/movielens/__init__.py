"""The MovieLens experiment (section 4.2)."""

MODELS = ("content", "black-box", "interpretable")
