"""Learned subsets: forward selection of the subsets that say more than their own parts do.

Level by level, candidates are the kept subsets with one group more. All candidates of a level are
trained at once, as the experts of one network, and a candidate is kept if it loses clearly less on
held-out rows than the best kept subset with one group less.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from maskmoe_kernels.estimators.encoder import Encoder
from maskmoe_kernels.estimators.held_out import Look
from maskmoe_kernels.estimators.linear_start import start_linear
from maskmoe_kernels.estimators.subsets import ERRORS, SubsetGain
from maskmoe_kernels.estimators.training import (
    Network,
    Pace,
    Samples,
    best_looks,
    look_at_constant,
)
from maskmoe_kernels.layout.subsets import SubsetFamily

#: Candidates of a level, for each group, at the most.
_CANDIDATES = 3
#: Levels beyond single groups that share what room there is.
_LEVELS = 3
#: Candidates train for so many passes over the rows, and at least so many steps.
_PASSES, _STEPS = 4, 300

Members = tuple[str, ...]


@dataclass(frozen=True)
class Candidates:
    """Trains experts of some subsets, and looks at what they lose on held-out rows.

    Attributes:
        encoder: Of the rows.
        samples: All rows.
        splits: For each bag, the rows to train on and the rows held out.
        kind: Of the loss.
        outputs: Classes; ``None`` for one logit or number.
        shape: Units of an expert in a layer, those of one that sees all, and layers.
        base: Answer of an expert that sees nothing, ``(K,)``; in log-odds for classes.
        pace: How the networks of an estimator learn.
        seed: Of weights and order of rows.
    """

    encoder: Encoder
    samples: Samples
    splits: Sequence[tuple[Tensor, Tensor]]
    kind: str
    outputs: int | None
    shape: tuple[int, int, int]
    base: Tensor
    pace: Pace
    seed: int

    def held(self) -> list[Samples]:
        """Rows that the bags hold out."""
        return [self.samples.taken(out) for _, out in self.splits]

    def looks(self, subsets: Sequence[Members]) -> dict[Members, Look]:
        """At the best moment of an expert of each of these, none of which is in another."""
        family = SubsetFamily(self.encoder.widths, {str(k): m for k, m in enumerate(subsets)})
        network = self.encoder, family, self.shape, self.outputs
        networks = [
            Network(*network, self.seed + k).to(self.samples.target.device)
            for k in range(len(self.splits))
        ]
        # The penalty of the smallest loss: a subset must not gain by a penalty that another lacks.
        start_linear(networks, self.samples, self.splits, self.kind, self.base, errors=0)
        kept = [rows for rows, _ in self.splits]
        steps = max(1, round(min(map(len, kept)) / self.pace.batch_size))
        epochs = max(_PASSES, -(-_STEPS // steps))
        pace = replace(self.pace, max_epochs=min(self.pace.max_epochs or epochs, epochs))
        found = best_looks(
            networks, lambda: [(self.samples, kept)], steps, self.held(), self.kind, pace, self.seed
        )
        return dict(zip(subsets, found, strict=True))


def selected(
    candidates: Candidates, screen: Iterable[Members], most: int | None
) -> list[SubsetGain]:
    """What forward selection found about each subset that it looked at, largest gain first.

    The gain of a subset is the held-out loss of the best kept subset with one group less, minus its
    own; single groups gain over the constant answer, and are all kept. A larger one is kept if its
    gain is more than two standard errors (of so many candidates, some are better by chance), and
    there is room. Selection ends with the first level that keeps nothing.

    Args:
        candidates: What trains them.
        screen: Pairs of groups, those most worth a look first.
        most: Experts at the most, that of all groups included; ``None``: four a group.
    """
    names = [*candidates.encoder.widths]
    room = max(0, (4 * len(names) if most is None else most) - len(names) - 1)
    a_level = -(-room // _LEVELS)
    nothing = look_at_constant(candidates.held(), candidates.base, candidates.kind)
    kept = candidates.looks([(name,) for name in names])
    gains = {members: look.gain_over(nothing) for members, look in kept.items()}
    found = [SubsetGain(members, *gain, True) for members, gain in gains.items()]
    alone = {members[0]: gain for members, (gain, _) in gains.items()}
    worth = [*screen]
    while kept and room:
        level = _next_level(alone, {members: gains[members][0] for members in kept}, worth)
        if not level:
            break
        looks = candidates.looks(level)
        smaller = {members: _best_part(members, kept) for members in level}
        gains = {members: looks[members].gain_over(smaller[members]) for members in level}
        level.sort(key=lambda members: -gains[members][0])
        clear = [m for m in level if looks[m].is_clearly_below(smaller[m], ERRORS)]
        kept = {members: looks[members] for members in clear[: min(room, a_level)]}
        room -= len(kept)
        found += [SubsetGain(members, *gains[members], members in kept) for members in level]
        worth = []
    return sorted(found, key=lambda one: -one.gain)


def _best_part(members: Members, kept: Mapping[Members, Look]) -> Look:
    """Of the kept subset with one group less that loses least."""
    parts = itertools.combinations(members, len(members) - 1)
    return min((kept[part] for part in parts if part in kept), key=Look.mean)


def _next_level(
    alone: Mapping[str, float], kept: Mapping[Members, float], screen: Sequence[Members]
) -> list[Members]:
    """Kept subsets with one group more, those that promise most, but not the set of all groups.

    Args:
        alone: Group to the gain of it alone, in the order of the groups.
        kept: Kept subset of the last level to its gain; a candidate promises what those that it
            extends have gained, and if that is equal, what its groups gain alone.
        screen: Candidates that another measure found promising; each takes turns with one of these.
    """
    order = {name: n for n, name in enumerate(alone)}
    promise: dict[Members, float] = {}
    for members, gain in kept.items():
        for name in alone:
            if name not in members and len(members) + 1 < len(alone):
                larger = tuple(sorted((*members, name), key=order.__getitem__))
                promise[larger] = promise.get(larger, 0.0) + gain
    ranked = sorted(promise, key=lambda m: (-promise[m], -sum(alone[name] for name in m)))
    turns = itertools.zip_longest((pair for pair in screen if pair in promise), ranked)
    unique = dict.fromkeys(one for turn in turns for one in turn if one is not None)
    return [*unique][: _CANDIDATES * len(alone)]
