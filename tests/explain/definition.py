"""Shapley values, interactions and Moebius coefficients as they are defined, in Python's floats."""

import itertools
import math


def by_permutations(value, players):
    """The mean over all orders of what each player adds; ``value`` takes a frozenset."""
    phi = dict.fromkeys(players, 0.0)
    for order in itertools.permutations(players):
        for n, player in enumerate(order):
            before = frozenset(order[:n])
            phi[player] += value(before | {player}) - value(before)
    return {player: total / math.factorial(len(players)) for player, total in phi.items()}


def interaction(value, players, p, q):
    """The Shapley interaction index of a pair: the mean of its second difference over orders.

    In a random order of the other players and the pair as one, the pair is added to who came
    before it.
    """
    others = [player for player in players if player not in (p, q)]
    total = 0.0
    for order in itertools.permutations([*others, None]):
        before = frozenset(order[: order.index(None)])
        total += value(before | {p, q}) - value(before | {p}) - value(before | {q}) + value(before)
    return total / math.factorial(len(others) + 1)


def moebius(value, subset):
    """sum over T inside S of (-1)^(|S| - |T|) v(T)."""
    return sum(
        (-1) ** (len(subset) - size) * value(frozenset(inner))
        for size in range(len(subset) + 1)
        for inner in itertools.combinations(sorted(subset), size)
    )
