"""The settings of a model and its loss. ``commands`` imports this module, so it stays light."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maskmoe_kernels.errors import DataError

MODELS = (
    "interpretable-transformer", "interpretable-gru", "black-box-transformer", "black-box-gru",
)  # fmt: skip
#: Name -> dtype of autocast; ``None``: no autocast.
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
EMBEDDINGS = ("shared", "strict")
NORMALIZATIONS = ("none", "sample", "batch")
#: Log-odds within which a smaller expert suffices.
TOLERANCE = 1.0


@dataclass(frozen=True)
class Settings:
    """Everything that determines the weights, together with the data and :class:`Pace`.

    Attributes:
        model: One of ``MODELS``.
        width: Units per expert. A black box has as many as all eight experts together.
        heads: Attention heads per expert, of the Transformers; a black box likewise has more.
        layers: Blocks of the encoder and of the decoder; of a GRU, its layers.
        batch_size: Sessions of a step, over all processes.
        seed: Seed of the initial weights and of the order of sessions.
        precision: A key of ``PRECISIONS``. With ``bfloat16`` the forward pass runs under autocast;
            weights stay in float32.
        confidence: Confidence of the loss and the prediction; see :func:`selection`.
        sharpness: Sharpness of the loss and the prediction; see :func:`selection`.
        weighting: Weighting of the loss; see :func:`gem_loss`. With ``"uniform"`` experts are not
            mixed: the one that sees all predicts, and the smallest that suffices explains.
        embeddings: One of ``EMBEDDINGS``, of an interpretable model of sessions with users: which
            experts train the embedding of the user; see :class:`InterpretableNCF`.
        normalize: One of ``NORMALIZATIONS``; see :func:`gem_loss`, whose ``None`` is ``"none"``.

    Raises:
        ValueError: ``model``, ``precision``, ``normalize`` or ``embeddings`` is an unknown name.
    """

    model: str
    width: int = 16
    heads: int = 1
    layers: int = 3
    batch_size: int = 128
    seed: int = 0
    precision: str = "float32"
    confidence: str = "abs"
    sharpness: float = 1.0
    weighting: str = "deselection"
    normalize: str = "batch"
    embeddings: str = "shared"

    @property
    def suffices(self) -> bool:
        """Does the smallest expert that suffices explain, rather than a mixture?"""
        return self.weighting == "uniform"

    def power(self, given: float | None) -> float | None:
        """The sharpness of a prediction, where one may be given; ``None``: experts do not mix."""
        if self.suffices:
            return None
        return self.sharpness if given is None else given

    def __post_init__(self) -> None:
        for name, value, known in (
            ("model", self.model, MODELS),
            ("precision", self.precision, tuple(PRECISIONS)),
            ("normalize", self.normalize, NORMALIZATIONS),
            ("embeddings", self.embeddings, EMBEDDINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")


def weighting_of(explain: str, weighting: str | None) -> str:
    """The weighting of the loss for ``"mixture"`` or ``"sufficient"``, and the one asked for.

    Raises:
        DataError: One is asked for where every track has the same weight.
    """
    if explain == "mixture":
        return weighting or Settings.weighting
    if weighting is not None:
        raise DataError(
            f"--explain sufficient gives every track the same weight, so --weighting {weighting} "
            "has no place beside it: leave one of them out"
        )
    return "uniform"
