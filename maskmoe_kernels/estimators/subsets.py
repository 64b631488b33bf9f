"""Which subsets of the groups get an expert: all of them, or singles, pairs worth it, and all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskmoe_kernels.estimators.columns import CategoricalColumn
from maskmoe_kernels.estimators.encoder import Encoder
from maskmoe_kernels.estimators.tables import Array, Table
from maskmoe_kernels.layout.subsets import SubsetFamily

#: Up to so many groups, "auto" takes every subset.
POWER_SET = 6
#: Up to so many groups, contributions go through four orders of them, and through two.
_FOUR_ORDERS, _TWO_ORDERS = 12, 32
#: A power set of more groups than this is refused.
_LARGEST_POWER_SET = 10
#: Rows that the screen of pairs looks at, and cells that it cuts a column into.
_SCREENED, _CELLS = 10_000, 8
#: Standard deviations of noise by which a pair has to reduce the squared error.
_NOISE = 3.0
#: Standard errors by which the gain of a learned subset has to be above 0. One is too few where
#: many are looked at: of columns that say nothing, 2 in 100 pairs gain more.
ERRORS = 2.0


@dataclass(frozen=True)
class PairGain:
    """What the screen found about one pair of groups.

    Attributes:
        groups: The two.
        gain: By how much a table of both reduces the squared error that an additive model leaves,
            as a share of it, beyond what noise would.
        kept: Whether it got an expert.
    """

    groups: tuple[str, str]
    gain: float
    kept: bool


@dataclass(frozen=True)
class SubsetGain:
    """What forward selection found about one subset of the groups.

    Attributes:
        groups: In it.
        gain: By how much its expert loses less on held-out rows than that of the best kept subset
            with one group less (of a single group: than the constant answer). In nats of the log
            loss; for a regression, as a share of the variance of y.
        error: Standard error of the gain.
        kept: Whether it got an expert.
    """

    groups: tuple[str, ...]
    gain: float
    error: float
    kept: bool


def checked_groups(groups: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """Group to the positions of its columns; columns that no group names are groups of their own.

    Raises:
        ValueError: No dict of lists, a column that is not there or is in two groups.
    """
    if groups is None:
        return {name: [k] for k, name in enumerate(names)}
    if not isinstance(groups, Mapping):
        raise ValueError(
            "groups must be None or a dict of group name to a list of its columns, got "
            f"{type(groups).__name__}"
        )
    found: dict[str, list[int]] = {}
    group_of: dict[int, str] = {}
    for group, members in groups.items():
        if isinstance(members, str) or not isinstance(members, Iterable) or not [*members]:
            raise ValueError(f"groups[{group!r}] must be a list of columns, got {members!r}")
        found[str(group)] = [_position(group, column, names) for column in members]
        for k in found[str(group)]:
            if k in group_of:
                raise ValueError(
                    f"column {names[k]!r} is in the groups {group_of[k]!r} and {group!r}; a column "
                    "belongs to one group"
                )
            group_of[k] = str(group)
    for k, name in enumerate(names):
        if k not in group_of:
            if name in found:
                raise ValueError(
                    f"groups[{name!r}] has the name of a column that it does not hold; rename it"
                )
            found[name] = [k]
    return found


def _position(group: Any, column: Any, names: Sequence[str]) -> int:
    if isinstance(column, (int, np.integer)) and 0 <= column < len(names):
        return int(column)
    if column in names:
        return names.index(column)
    raise ValueError(
        f"groups[{group!r}] names {column!r}, which is no column of X: {[*names][:20]}"
    )


def family_of(widths: Mapping[str, int], chosen: Iterable[Iterable[str]]) -> SubsetFamily:
    """The family of some subsets, each once, small ones first, and one that sees all."""
    order = {name: n for n, name in enumerate(widths)}
    unique = {tuple(sorted(set(members), key=order.__getitem__)) for members in chosen}
    unique |= {tuple(widths)}
    subsets: dict[str, tuple[str, ...]] = {}
    for members in sorted(unique, key=lambda m: (len(m), [order[name] for name in m])):
        whole = len(members) == len(widths) > 1
        name = "all groups" if whole else " & ".join(members) or "none"
        while name in subsets:  # groups may have such names, too
            name += "'"
        subsets[name] = members
    return SubsetFamily(widths, subsets)


def drawn_orders(groups: int, most: int | None) -> list[list[int]]:
    """Orders in which contributions add the groups one by one, where there is no power set.

    Each comes with its reverse; for up to 12 groups there are four, for up to 32 two, else none.

    Args:
        groups: How many there are.
        most: Experts at the most: those of singles and of all count, too.
    """
    pairs = 2 if groups <= _FOUR_ORDERS else 1 if groups <= _TWO_ORDERS else 0
    if most is not None:
        pairs = min(pairs, max(0, most - groups - 1) // max(1, 2 * (groups - 2)))
    random = np.random.default_rng(0)
    forward = [random.permutation(groups).tolist() for _ in range(pairs)]
    return [order for one in forward for order in (one, one[::-1])]


def choose(
    subsets: Any,
    widths: Mapping[str, int],
    most: int | None,
    gains: Sequence[PairGain | SubsetGain],
    orders: Sequence[Sequence[int]] = (),
) -> SubsetFamily:
    """The family that the parameters ``subsets`` and ``max_experts`` ask for.

    Args:
        subsets: ``"auto"``, ``"powerset"``, ``"pairs"``, ``"singles"``, ``"forward"``, or a list of
            lists of groups.
        widths: Group to its width.
        most: Experts at the most; ``None``: any number.
        gains: Of pairs or subsets, those to be kept marked; for ``"auto"`` and ``"forward"``, as
            the next.
        orders: Of groups, whose beginnings get an expert each.

    Raises:
        ValueError: Another ``subsets``, or more experts than ``most``.
    """
    names, singles = [*widths], [(name,) for name in widths]
    if isinstance(subsets, str):
        if subsets == "powerset" or (subsets == "auto" and takes_power_set(len(names), most)):
            if len(names) > _LARGEST_POWER_SET:
                raise ValueError(
                    f"subsets='powerset' of {len(names)} groups would be {2 ** len(names) - 1:,} "
                    f"experts; join columns to at most {_LARGEST_POWER_SET} groups, or take 'auto'"
                )
            sizes = range(1, len(names) + 1)
            chosen = [m for size in sizes for m in itertools.combinations(names, size)]
        elif subsets == "pairs":
            chosen = [*singles, *itertools.combinations(names, 2)]
        elif subsets == "singles":
            chosen = [*singles]
        elif subsets in ("auto", "forward"):
            chosen = [*singles, *(found.groups for found in gains if found.kept)]
            chosen += [
                tuple(names[n] for n in order[:size])
                for order in orders
                for size in range(2, len(names))
            ]
        else:
            raise ValueError(
                "subsets must be 'auto', 'powerset', 'pairs', 'singles', 'forward' or a list of "
                f"lists of groups, got {subsets!r}"
            )
    else:
        chosen = _listed(subsets, names)
    family = family_of(widths, chosen)
    if most is not None and family.num_experts > most:
        raise ValueError(
            f"subsets={subsets if isinstance(subsets, str) else 'your list'!r} needs "
            f"{family.num_experts} experts for {len(names)} groups, and max_experts is {most}; "
            "raise it, or join columns with groups={name: [columns]}"
        )
    return family


def takes_power_set(groups: int, most: int | None) -> bool:
    """Does ``"auto"`` take every subset of so many groups?"""
    return groups <= POWER_SET and (most is None or 2**groups - 1 <= most)


def _listed(subsets: Any, names: Sequence[str]) -> list[tuple[str, ...]]:
    if not isinstance(subsets, Iterable) or not [*subsets]:
        raise ValueError(f"subsets must be a list of lists of groups, got {subsets!r}")
    chosen = []
    for members in subsets:
        if isinstance(members, str) or not isinstance(members, Iterable) or not [*members]:
            raise ValueError(
                f"subsets must be a list of lists of groups, got the entry {members!r}; write "
                f"[{members!r}]"
            )
        for name in members:
            if name not in names:
                raise ValueError(
                    f"subsets names the group {name!r}, which is not among {[*names][:20]}"
                )
        chosen.append(tuple(members))
    return chosen


# --- The screen of pairs ------------------------------------------------------------------------


def screened(
    encoder: Encoder, table: Table, target: Array, weight: Array, most: int | None
) -> list[PairGain]:
    """How much each pair of groups would add to an additive model, largest gain first.

    As FAST (Lou et al., *Accurate intelligible models with pairwise interactions*, 2013): columns
    are cut into at most 8 cells, an additive model is fitted to them by least squares, and of its
    residuals r, each pair's table of cells takes away ``sum over cells of (sum of r)^2 / weight``.
    Of that, what noise takes away is subtracted: the number of cells times the variance of r.
    Groups of several columns get the best of their columns' pairs.

    Args:
        encoder: Of these rows.
        table: Training rows.
        target: ``(rows, targets)``: a number, or 0 and 1 of each class.
        weight: ``(rows,)``.
        most: Pairs to be kept, at the most; ``None``: as many as there are groups.
    """
    if table.rows > _SCREENED:
        rows = np.linspace(0, table.rows - 1, _SCREENED).astype(np.int64)
        table, target, weight = table.taken(rows), target[rows], weight[rows]
    cells = [_cells(*pair) for pair in zip(encoder.columns, table.columns, strict=True)]
    start = np.cumsum([0, *(int(cell.max()) + 1 for cell in cells)])
    at = np.stack([cell + first for cell, first in zip(cells, start, strict=False)], axis=1)
    one_hot = np.zeros((table.rows, start[-1]), dtype=np.float32)
    np.put_along_axis(one_hot, at, 1, axis=1)
    weight = weight / weight.mean()
    weighted = one_hot * weight[:, None].astype(np.float32)
    count = (one_hot.T @ weighted).astype(np.float64)
    gain = np.zeros((len(cells), len(cells)))
    spread = np.zeros_like(gain)
    total = 0.0
    for column in target.T:
        residual = _residual(one_hot, weighted, count, column, weight)
        variance = float(weight @ residual**2 / table.rows)
        total += variance * table.rows
        sums = (one_hot * residual[:, None].astype(np.float32)).T @ weighted
        found, noise = _of_columns(sums.astype(np.float64), count, start)
        gain += found - noise * variance
        spread += np.sqrt(2 * noise) * variance
    return _ranked(gain / max(total, 1e-30), gain > _NOISE * spread, encoder, most)


def _cells(column: Any, x: Array) -> Array:
    """The cell of each row, from 0 on; missing values have one of their own."""
    if isinstance(column, CategoricalColumn):
        return np.minimum(column.ids(x), _CELLS)
    inner = column.edges[1:-1]
    if len(inner) >= _CELLS:
        inner = inner[np.linspace(0, len(inner) - 1, _CELLS - 1).astype(np.int64)]
    return np.where(np.isnan(x), len(inner) + 1, np.searchsorted(inner, x, side="right"))


def _residual(one_hot: Array, weighted: Array, count: Array, target: Array, weight: Array) -> Array:
    """What the additive least-squares fit of the cells leaves, ``(rows,)``."""
    centred = target - np.average(target, weights=weight)
    ridge = 1e-3 * len(target) * np.eye(len(count)) + 1e-6
    fit = np.linalg.solve(count + ridge, weighted.T.astype(np.float64) @ centred)
    left = centred - one_hot.astype(np.float64) @ fit
    residual: Array = left - np.average(left, weights=weight)
    return residual


def _of_columns(sums: Array, count: Array, start: Array) -> tuple[Array, Array]:
    """For each pair of columns: sum over cells of sums^2 / count, and the cells with any row."""
    there = count > 0
    explained = np.where(there, sums**2 / np.where(there, count, 1), 0)
    by_column = (np.add.reduceat(np.add.reduceat(a, start[:-1], 0), start[:-1], 1)
                 for a in (explained, there.astype(np.float64)))  # fmt: skip
    found, cells = by_column
    return found, cells


def _ranked(gain: Array, clear: Array, encoder: Encoder, most: int | None) -> list[PairGain]:
    found = []
    for a, b in itertools.combinations(encoder.groups, 2):
        at = np.ix_(encoder.groups[a], encoder.groups[b])
        found.append((float(gain[at].max()), bool(clear[at].any()), (a, b)))
    found.sort(key=lambda one: -one[0])
    limit = len(encoder.groups) if most is None else max(0, most)
    worth = [k for k, (_, is_clear, _) in enumerate(found) if is_clear][:limit]
    return [PairGain(pair, value, k in worth) for k, (value, _, pair) in enumerate(found)]
