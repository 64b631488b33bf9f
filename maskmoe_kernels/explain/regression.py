"""Shapley values by weighted least squares, for families that lack some subsets (KernelSHAP)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.explain.game import Game


def regression_weights(game: Game) -> Tensor:
    """phi = weights @ v of the best additive game, ``(players, columns)``, float64.

    It minimises ``sum over S of w_S (v(S) - v(none) - sum of phi over S)^2`` with
    ``w_S = (n - 1) / (C(n, |S|) |S| (n - |S|))``, subject to
    ``sum of phi = v(all) - v(none)``: a linear system, and phi is linear in v.

    Raises:
        LayoutError: No expert sees all groups, or too few subsets to tell the groups apart.
    """
    n, columns = len(game.players), len(game.coalition)
    if n == 0:
        return torch.zeros(0, columns, dtype=torch.float64, device="cpu")
    empty, whole = _ends(game)
    member, weight = _weighted(game)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64, device="cpu")
    system[:n, :n] = member.T @ (weight[:, None] * member)
    system[:n, n] = system[n, :n] = 1
    if int(torch.linalg.matrix_rank(system, hermitian=True)) <= n:
        raise LayoutError(
            f"{columns} subsets of {n} groups do not determine the Shapley values: some groups "
            "only ever occur together. Give the family experts that tell them apart"
        )
    # The right-hand side as a map of v: member.T W (v(S) - v(none)), and v(all) - v(none).
    right = torch.zeros(n + 1, columns, dtype=torch.float64, device="cpu")
    right[:n] = member.T * weight
    right[:n, empty] -= right[:n].sum(1)
    right[n, whole] += 1
    right[n, empty] -= 1
    solution: Tensor = torch.linalg.solve(system, right)
    return solution[:n]


def residual_weights(game: Game) -> Tensor:
    """What the fit leaves of each coalition, weighted: ``(columns, columns)``, float64.

    ``weights @ v`` is ``sqrt(w_S / sum of w) (v(S) - v(none) - sum of phi over S)``.
    """
    empty, _ = _ends(game)
    member, weight = _weighted(game)
    left = torch.eye(len(game.coalition), dtype=torch.float64, device="cpu")
    left[:, empty] -= 1
    left -= member @ regression_weights(game)
    total = weight.sum()
    share = weight / total if total > 0 else weight
    return left * share.sqrt()[:, None]


def _ends(game: Game) -> tuple[int, int]:
    """The columns of the empty coalition and of that of all players."""
    whole = (game.size == len(game.players)).nonzero().flatten().tolist()
    if not whole:
        raise LayoutError(
            "no expert sees all groups, and Shapley values share out what they do together: give "
            "the family one that sees all"
        )
    return int((game.size == 0).nonzero()[0]), whole[0]


def _weighted(game: Game) -> tuple[Tensor, Tensor]:
    """Who is in each coalition, in numbers, and w of each; 0 for the empty one and for all."""
    n = len(game.players)
    by_size = [
        (n - 1) / (math.comb(n, size) * size * (n - size)) if 0 < size < n else 0.0
        for size in range(n + 1)
    ]
    return game.coalition.double(), torch.tensor(by_size, dtype=torch.float64)[game.size]
