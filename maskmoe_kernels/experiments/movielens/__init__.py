"""The MovieLens experiment (section 4.2)."""

#: The models of the paper, which are trained by default.
MODELS = ("content", "black-box", "interpretable")
#: And its network where every expert learns from every sample, so that a small one may suffice.
EVERY_MODEL = (*MODELS, "sufficient")
#: Units of content, user, item and all in each hidden layer: as many for each, as in the paper, or
#: half of the same number for the expert that sees all.
WIDTHS = {
    "equal": ((128,) * 4, (64,) * 4, (32,) * 4, (16,) * 4),
    "half": ((64, 96, 96, 256), (32, 48, 48, 128), (16, 24, 24, 64), (8, 12, 12, 32)),
}
#: Log-odds within which a smaller expert may differ from the one that sees all, in explanations.
TOLERANCE = 1.0
