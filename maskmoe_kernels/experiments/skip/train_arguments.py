"""The arguments of ``maskmoe skip train``: the model, its loss, the pace and the means."""

from __future__ import annotations

import argparse

from maskmoe_kernels.experiments.shared.arguments import (
    above_zero,
    add_existing,
    natural,
    positive,
)
from maskmoe_kernels.experiments.skip.settings import (
    EMBEDDINGS,
    NORMALIZATIONS,
    PRECISIONS,
    Settings,
)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of training."""
    for add in (_add_size, _add_loss, _add_pace, _add_means):
        add(parser)


def add_workers(parser: argparse.ArgumentParser, default: int, text: str) -> None:
    """Add ``--workers``; ``text`` says what they do."""
    kind = positive if default else natural
    parser.add_argument("--workers", type=kind, default=default, metavar="N", help=text)


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--width", type=positive, default=Settings.width,
        help="units per expert; a black box has as many as all together (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--heads", type=positive, default=Settings.heads,
        help="attention heads per expert; a black box likewise (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layers", type=positive,
        help="blocks of encoder and decoder, or layers of a GRU (default: Transformer 3, GRU 1)",
    )  # fmt: skip


def _add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss of the interpretable models")
    group.add_argument(
        "--confidence", choices=("abs", "square", "smooth"), default=Settings.confidence,
        help="confidence of an expert's logit, in the loss and in predictions "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--sharpness", type=above_zero, default=Settings.sharpness,
        help="power of the confidence of smaller experts (default: 1, the paper's rule)",
    )  # fmt: skip
    group.add_argument(
        "--weighting", choices=("selection", "deselection"),
        help="weight of a track for an expert: its share of the decision, or how unsure all "
        f"smaller experts are, as in the paper (default: {Settings.weighting})",
    )  # fmt: skip
    group.add_argument(
        "--explain", choices=("mixture", "sufficient"), default="mixture",
        help="mixture: the paper's rule; sufficient: every expert learns from every track, the "
        "one that sees all predicts, and the smallest that agrees explains (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--normalize", choices=NORMALIZATIONS, default=Settings.normalize,
        help="what the weights are divided by: nothing, their sum per track, or their sum over "
        "the batch, as in the paper (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--embeddings", choices=EMBEDDINGS, default=Settings.embeddings,
        help="who trains the embedding of the user, if the schema has one: every expert that sees "
        "it, or only the smallest ones (strict) (default: %(default)s)",
    )  # fmt: skip


def _add_pace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs", type=positive, default=20,
        help="largest number of epochs (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=positive,
        help="steps of an epoch; the model is validated after each epoch (default: a pass over the "
        "data)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=positive, default=4,
        help="epochs without a better validation Acc before training stops (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", dest="batch_size", type=positive, default=Settings.batch_size,
        help="sessions a step, over all processes (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--lr", type=above_zero, default=1e-4,
        help="learning rate of Adam (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--least-lr", type=above_zero, default=1e-6,
        help="smallest rate to which it is reduced (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--plateau", type=natural, default=1,
        help="epochs without a better validation Acc before the rate is reduced (default: "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--clip", type=above_zero, default=1.0,
        help="norm to which larger gradients are scaled down, over all parameters (default: "
        "%(default)s)",
    )  # fmt: skip


def _add_means(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision", choices=tuple(PRECISIONS), default=Settings.precision,
        help="bfloat16: autocast, weights stay in float32 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument(
        "--threads", type=positive, help="threads of each process (default: torch's)"
    )
    add_workers(parser, 0, "processes that prepare batches (default: 0, the training process)")
    parser.add_argument(
        "--save-every", type=positive, default=500, metavar="STEPS",
        help="steps between checkpoints within an epoch (default: %(default)s)",
    )  # fmt: skip
    add_existing(
        parser,
        "continue the run in --out from its last checkpoint, or start where there is none: give "
        "it from the beginning where a scheduler restarts the command",
    )
