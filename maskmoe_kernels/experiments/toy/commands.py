"""``maskmoe toy``."""

from __future__ import annotations

import argparse

from rich.console import Console

from maskmoe_kernels.experiments.shared.arguments import (
    Commands,
    add_command,
    add_common,
    add_existing,
    positive,
    usable,
)

_RESULTS = ("report.json", "panels.png", "plane.png", "hasse.png")


def add_to(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add ``toy``."""
    parser = add_command(
        commands,
        "toy",
        _toy,
        "train on clusters whose right explanation is known (half a minute)",
        "Train the experts {x1}, {x2}, {x1, x2} on Gaussian clusters and show which expert\n"
        "decides where. Writes report.json and the figures into --out.",
        "maskmoe toy --task b --out runs/toy",
    )
    parser.add_argument(
        "--task",
        choices=("a", "b", "c"),
        default="b",
        help="a: four clusters, one input is enough for each; b: four more that need both "
        "inputs; c: four inputs, XOR on the last two (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=positive, help="passes of 500 steps of 256 samples (default: 30)"
    )
    parser.add_argument(
        "--explain",
        choices=("mixture", "sufficient"),
        default="mixture",
        help="mixture: the paper's rule; sufficient: every expert learns from every sample, and "
        "the smallest that agrees with the one that sees all explains (default: %(default)s)",
    )
    add_common(parser)
    add_existing(parser)


def _toy(arguments: argparse.Namespace, console: Console) -> None:
    from maskmoe_kernels.experiments.shared.existing import check_out
    from maskmoe_kernels.experiments.toy.train import run_toy

    check_out(arguments, _RESULTS)
    run_toy(
        task=arguments.task,
        seed=arguments.seed,
        out=arguments.out,
        device=usable(arguments.device),
        epochs=arguments.epochs,
        explain=arguments.explain,
        console=console,
    )
