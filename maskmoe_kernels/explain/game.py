"""The cooperative game of a family: players are feature groups, v(S) is the logit of expert S."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from maskmoe_kernels._compat import constant_in_trace
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily

_SHOWN = 5


@dataclass(frozen=True)
class Game:
    """Which experts are the values of which coalitions.

    Attributes:
        groups: G, the number of the family's groups.
        players: The groups that play, by number. The others are in every coalition.
        coalition: Entry (k, p): is player p in the coalition whose value column k is? The columns
            are those of the logits, and after them, with ``has_base``, the empty coalition.
            ``(columns, players)``, bool.
        has_base: Is the value of the empty coalition given beside the logits?
    """

    groups: int
    players: tuple[int, ...]
    coalition: Tensor
    has_base: bool

    @cached_property
    def size(self) -> Tensor:
        """Players in each coalition, ``(columns,)``, int64."""
        return self.coalition.sum(1)

    @property
    def is_complete(self) -> bool:
        """Is every coalition there?"""
        return bool(len(self.coalition) == 2 ** len(self.players))

    def missing(self) -> list[tuple[int, ...]]:
        """Some coalitions that have no value, small ones first, as groups that play in them."""
        there = {tuple(row.nonzero().flatten().tolist()) for row in self.coalition}
        every = itertools.chain.from_iterable(
            itertools.combinations(range(len(self.players)), size)
            for size in range(len(self.players) + 1)
        )
        absent = (c for c in every if c not in there)
        return [tuple(self.players[p] for p in c) for c in itertools.islice(absent, _SHOWN)]

    def shapley_weights(self) -> Tensor:
        """phi_p = sum over columns of weight * v, ``(players, columns)``, float64.

        With n players, a coalition S has the weight (|S| - 1)! (n - |S|)! / n! for a player in
        it and -|S|! (n - |S| - 1)! / n! for one outside.
        """
        n = len(self.players)
        inside = _by_size(n, lambda s: _factorials(s - 1, n - s, n))
        outside = _by_size(n, lambda s: -_factorials(s, n - s - 1, n))
        member, size = self.coalition.T, self.size
        return torch.where(member, inside[size], outside[size])

    def interaction_weights(self) -> Tensor:
        """The same for the Shapley interaction index of pairs, ``(players, players, columns)``.

        I_pq = sum over S without p and q of |S|! (n - |S| - 2)! / (n - 1)! times
        v(S + p + q) - v(S + p) - v(S + q) + v(S). The diagonal is 0.
        """
        n = len(self.players)
        both = _by_size(n, lambda s: _factorials(s - 2, n - s, n - 1))
        one = _by_size(n, lambda s: -_factorials(s - 1, n - s - 1, n - 1))
        none = _by_size(n, lambda s: _factorials(s, n - s - 2, n - 1))
        with_p, with_q = self.coalition.T[:, None], self.coalition.T[None]
        weights = torch.where(
            with_p & with_q,
            both[self.size],
            torch.where(with_p | with_q, one[self.size], none[self.size]),
        )
        return weights * (1 - torch.eye(n, dtype=torch.float64, device="cpu"))[..., None]


def _factorials(a: int, b: int, of: int) -> float:
    """a! b! / of!; 0 where one is negative, that is, where there is no such coalition."""
    if a < 0 or b < 0:
        return 0.0
    return math.factorial(a) * math.factorial(b) / math.factorial(of)


def _by_size(n: int, weight: Callable[[int], float]) -> Tensor:
    values = [weight(size) for size in range(n + 1)]
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _made(family: SubsetFamily, has_base: bool) -> Game:
    membership = family.membership
    empty = (~membership.any(1)).nonzero().flatten().tolist()
    if has_base and empty:
        raise LayoutError(
            f"expert {family.names[empty[0]]!r} sees no group, so its logit is the value of the "
            "empty set; leave base out"
        )
    smallest = family.inclusion.all(0).nonzero().flatten().tolist()
    if not has_base and not smallest:
        raise LayoutError(
            "the value of the empty set is not known: pass base (the logit of the mean label, "
            "say), or give the family an expert of the empty subset"
        )
    inside_all = membership[smallest[0]] if not has_base else torch.zeros_like(membership[0])
    players = (~inside_all).nonzero().flatten()
    coalition = membership[:, players]
    if has_base:
        coalition = torch.cat([coalition, torch.zeros_like(coalition[:1])])
    return Game(
        family.num_groups,
        tuple(players.tolist()),
        coalition,
        has_base,
    )


@constant_in_trace
def game_of(family: SubsetFamily, has_base: bool) -> Game:
    """The game of ``family``, made once.

    Its empty coalition is the expert of the empty subset; or the value that is given; or, where
    one expert lies inside all others, that expert: its groups then play no part.

    Raises:
        LayoutError: No value for the empty coalition, or two.
    """
    return family.caches.derive(f"game {has_base}", lambda: _made(family, has_base))


def complete_game_of(family: SubsetFamily, has_base: bool) -> Game:
    """:func:`game_of`, of which every coalition has a value.

    Raises:
        LayoutError: Some have none, or as for :func:`game_of`.
    """
    game = game_of(family, has_base)
    if not game.is_complete:
        names = list(family.groups)
        fixed = [names[n] for n in range(game.groups) if n not in game.players]
        shown = [sorted([*fixed, *(names[n] for n in c)], key=names.index) for c in game.missing()]
        count = 2 ** len(game.players) - len(game.coalition)
        raise LayoutError(
            f"exact Shapley values need an expert for every subset of the groups; {count} are "
            f"missing, {shown} for instance. Add them (SubsetFamily.powerset has them all), or "
            "take method='regression', which makes do with fewer"
        )
    return game
