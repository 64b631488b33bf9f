"""The MovieLens experiment (section 4.2)."""

_BASELINES = ("content", "black-box")
#: How a prediction is explained, and the model for it. In the mixture, experts share the samples,
#: as in the paper; else every expert learns from every sample, so that a small one may suffice.
EXPLAINED = {"sufficient": "sufficient", "mixture": "interpretable"}
#: What is trained, by how it is explained.
MODELS = {how: (*_BASELINES, model) for how, model in EXPLAINED.items()}
EVERY_MODEL = (*_BASELINES, "interpretable", "sufficient")
#: Units of content, user, item and all in each hidden layer: as many for each, as in the paper, or
#: half of the same number for the expert that sees all.
WIDTHS = {
    "equal": ((128,) * 4, (64,) * 4, (32,) * 4, (16,) * 4),
    "half": ((64, 96, 96, 256), (32, 48, 48, 128), (16, 24, 24, 64), (8, 12, 12, 32)),
}
#: Log-odds within which a smaller expert may differ from the one that sees all, in explanations.
TOLERANCE = 1.0
