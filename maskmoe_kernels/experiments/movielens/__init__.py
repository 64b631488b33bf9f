"""The MovieLens experiment (section 4.2)."""

_BASELINES = ("content", "black-box")
#: How a prediction is explained, and the model for it. In the mixture, experts share the samples,
#: as in the paper; else every expert learns from every sample, so that a small one may suffice.
EXPLAINED = {"sufficient": "sufficient", "mixture": "interpretable"}
#: What is trained, by how it is explained.
MODELS = {how: (*_BASELINES, model) for how, model in EXPLAINED.items()}
EVERY_MODEL = (*_BASELINES, "interpretable", "sufficient")
#: Units of content, user, item and all in each hidden layer: as many for each, as in the paper; or
#: more for the expert that sees all, half as many as the black box has, and fewer for the others.
WIDTHS = {
    "equal": ((128,) * 4, (64,) * 4, (32,) * 4, (16,) * 4),
    "largest": ((96, 96, 96, 256), (48, 48, 48, 128), (32, 32, 32, 64), (16, 16, 16, 32)),
}
#: Log-odds within which a smaller expert may differ from the one that sees all, in explanations.
TOLERANCE = 1.0
