"""The MovieLens experiment (section 4.2)."""

#: The models of the paper, which are trained by default.
MODELS = ("content", "black-box", "interpretable")
#: And its network where every expert learns from every sample, so that a small one may suffice.
EVERY_MODEL = (*MODELS, "sufficient")
#: Log-odds within which a smaller expert may differ from the one that sees all, in explanations.
TOLERANCE = 1.0
