"""Why rows get their answers: contributions of groups, pairs, the smallest sufficient subset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from maskmoe_kernels.estimators.plots import LISTED, fact, number, shorter, waterfall
from maskmoe_kernels.estimators.tables import NUMBERS, Array, Table
from maskmoe_kernels.explain.shapley import moebius, shapley
from maskmoe_kernels.explain.sufficient import sufficient
from maskmoe_kernels.layout.subsets import SubsetFamily

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Subsets from which exact Shapley values are computed; of fewer, a fit.
_EXACT, _FITTED = "exact", "regression"


@dataclass(frozen=True)
class Rows:
    """What is explained, to be shown beside the contributions."""

    table: Table
    groups: Mapping[str, Sequence[int]]

    def shown(self, row: int, group: int) -> str:
        """What the columns of a group hold in a row, in words."""
        members = [*self.groups.values()][group]
        held = [_shown(self.table.columns[k][row]) for k in members]
        if len(members) == 1:
            return held[0]
        pairs = zip(members, held, strict=True)
        return ", ".join(f"{self.table.names[k]} {value}" for k, value in pairs)

    def data(self) -> Array:
        """``(rows, groups)``: numbers if every group is a column of numbers, else text."""
        members = [*self.groups.values()]
        if all(len(ks) == 1 and self.table.kinds[ks[0]] == NUMBERS for ks in members):
            return np.column_stack([self.table.columns[ks[0]] for ks in members])
        rows = range(self.table.rows)
        shown = [[self.shown(row, k) for k in range(len(members))] for row in rows]
        return np.array(shown, dtype=object).reshape(self.table.rows, len(members))


def _shown(value: Any) -> str:
    if value is None or value != value:
        return "missing"
    return value if isinstance(value, str) else f"{value:.6g}"


@dataclass(frozen=True)
class Explanation:
    """Of some rows. The unit is that of the answer: log-odds, or that of y.

    Attributes:
        contributions: A row for each, a column for each group: Shapley values of the game whose
            value of a subset S is the answer of expert S. Row by row, they and ``base`` sum to
            ``answer``. Of more than two classes: towards the class ``of``.
        base: The answer before any column is seen: a number; of more than two classes, ``(rows,)``.
        answer: Of the expert that sees all, ``(rows,)``.
        sufficient: Of each row, the groups of the smallest expert whose answer is within
            ``tolerance`` of that of the one that sees all.
        gap: How far it is from that, ``(rows,)``.
        tolerance: In the unit of the answer.
        of: Of more than two classes, the class that is explained, ``(rows,)``; else ``None``.
        values: All contributions, ``(rows, groups)`` or ``(rows, groups, classes)``.
        unit: In words.
        classes: Their labels, ``None`` for a regression.
    """

    contributions: pd.DataFrame
    base: float | Array
    answer: Array
    sufficient: list[tuple[str, ...]]
    gap: Array
    tolerance: float
    of: Array | None
    values: Array
    unit: str
    classes: list[Any] | None
    _rows: Rows
    _pairs: pd.DataFrame
    _bases: float | Array

    def pairs(self) -> pd.DataFrame:
        """What each pair with an expert adds beyond its two groups: ``v(gh) - v(g) - v(h) + base``.

        A row for each row, a column for each pair, named ``"g & h"``.
        """
        return self._pairs

    def words(self, row: int) -> str:
        """The smallest sufficient subset of a row in a sentence.

        Raises:
            ValueError: There is no such row.
        """
        self._check(row)
        groups = self.sufficient[row]
        at = [*self.contributions.columns]
        what = f"The answer {self._in_words(row)}"
        tolerance = number(self.tolerance)
        if len(groups) == len(at) > 1:
            return f"{what} needs all {len(at)} groups to within {tolerance} {self.unit}."
        facts = [f"{name} ({self._rows.shown(row, at.index(name))})" for name in groups]
        rests_on = _listed(facts) if len(groups) <= LISTED else self._sufficient_in_words(row)
        return (
            f"{what} rests on {rests_on}: of these alone, the model's answer differs by "
            f"{number(self.gap[row])} {self.unit} (tolerance {tolerance})."
        )

    def plot(self, row: int, ax: Axes | None = None, most: int = 10) -> Axes:
        """A waterfall from the base to the answer of a row; groups beyond ``most`` are summed.

        Args:
            row: Its position.
            ax: Where to draw; ``None``: a figure of its own.
            most: Bars at the most.

        Raises:
            ValueError: There is no such row.
        """
        self._check(row)
        names = [fact(g, self._rows.shown(row, k)) for k, g in enumerate(self.contributions)]
        base = self.base if isinstance(self.base, float) else float(self.base[row])
        title = f"{self._in_words(row)}; sufficient: {self._sufficient_in_words(row)}"
        values = self.contributions.to_numpy()[row]
        return waterfall(names, values, base, self.unit, title, ax, most)

    def to_shap(self) -> Any:
        """A ``shap.Explanation``, for shap's plots.

        Raises:
            ModuleNotFoundError: shap is not installed.
        """
        try:
            import shap
        except ModuleNotFoundError:
            raise ModuleNotFoundError("to_shap needs shap: pip install shap") from None
        count = len(self.contributions)
        base = np.broadcast_to(np.asarray(self._bases), (count, *np.shape(self._bases)))
        return shap.Explanation(
            values=self.values,
            base_values=base.copy(),
            data=self._rows.data(),
            feature_names=[*self.contributions.columns],
            output_names=None if self.values.ndim == 2 else [str(c) for c in self.classes or ()],
        )

    def to_frame(self) -> pd.DataFrame:
        """One table: contributions, base, answer and the sufficient subset of each row."""
        frame = self.contributions.copy()
        more = {
            "base": self.base,
            "answer": self.answer,
            "sufficient": [" & ".join(groups) for groups in self.sufficient],
            "gap": self.gap,
        }
        for name, values in more.items():
            frame[name if name not in frame else f"{name} (of the row)"] = values
        return frame

    def _sufficient_in_words(self, row: int) -> str:
        prefix, groups = shorter(self.sufficient[row], [*self.contributions])
        return f"{prefix}{_listed(groups)}" if groups else f"all {len(self.sufficient[row])} groups"

    def _in_words(self, row: int) -> str:
        answer = float(self.answer[row])
        if self.of is not None:
            logits = self.values[row].sum(0) + self._bases
            probability = 1 / np.exp(logits - answer).sum()
            return f"{probability:.1%} for {self.of[row]}"
        if self.classes is None:
            return number(answer)
        probability = 1 / (1 + np.exp(-answer))
        return f"{probability:.1%} for {self.classes[1]}"

    def _check(self, row: int) -> None:
        count = len(self.answer)
        if not isinstance(row, (int, np.integer)) or not -count <= row < count:
            raise ValueError(f"row must be the position of one of the {count} rows, got {row!r}")


def _listed(names: Sequence[str]) -> str:
    if len(names) < 2:
        return "".join(names) or "nothing"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def contributions_of(
    values: Tensor, family: SubsetFamily, base: float | Array, orders: Sequence[Sequence[int]]
) -> Tensor:
    """Shapley values ``(rows, G)`` or ``(rows, G, K)``, float64; they sum to answer less base.

    Exact where every subset has an expert. Else what each group adds when the groups come one by
    one, in the mean of some ``orders`` (Castro et al., 2009): what adds nothing gets nothing.
    Without orders, the weighted least-squares fit of KernelSHAP over the subsets that there are.
    """
    has_all = family.num_experts == 2**family.num_groups - 1
    start = torch.as_tensor(base, dtype=torch.float64)
    if orders and not has_all:
        names = [*family.groups]
        expert = {frozenset(members): k for k, members in enumerate(family.subsets.values())}
        phi = values.new_zeros(len(values), len(names), *values.shape[2:])
        for order in orders:
            sets = [frozenset(names[n] for n in order[: k + 1]) for k in range(len(order))]
            after = values[:, [expert[members] for members in sets]]
            before = torch.cat([start.expand_as(after[:, :1]), after[:, :-1]], dim=1)
            phi[:, list(order)] += (after - before) / len(orders)
        return phi
    dim = -1 if values.dim() == 2 else -2
    return shapley(values, family, start, method=_EXACT if has_all else _FITTED, dim=dim)


def explained(
    values: Tensor,
    family: SubsetFamily,
    base: float | Array,
    orders: Sequence[Sequence[int]],
    tolerance: float,
    chosen: Array | None,
    rows: Rows,
    index: Any,
    unit: str,
    classes: list[Any] | None,
) -> Explanation:
    """The explanation of rows whose experts answer ``values``.

    Args:
        values: ``(rows, H)`` or ``(rows, H, K)``, float64.
        family: The experts.
        base: v of no group: a number, or ``(K,)``.
        orders: See :func:`contributions_of`.
        tolerance: Of sufficiency.
        chosen: Of K classes, the position of the one to be explained, ``(rows,)``.
        rows: What is explained.
        index: Of the frames.
        unit: In words.
        classes: Labels.
    """
    phi = contributions_of(values, family, base, orders)
    many = values.dim() == 3
    # sufficient takes z, whose log-odds are 2 z; of K outputs, the log-odds themselves.
    found = sufficient(values if many else values / 2, family, tolerance, dim=-2 if many else -1)
    start = torch.as_tensor(base, dtype=torch.float64)
    added = moebius(values, family, start, dim=-2 if many else -1)
    answer = values[:, int(family.membership.sum(1).argmax())]
    row_base: float | Array = base
    own = phi
    if chosen is not None:
        each, at = torch.arange(len(values)), torch.from_numpy(chosen)
        own, added, answer = phi[each, :, at], added[each, :, at], answer[each, at]
        row_base = np.asarray(base)[chosen]
    subsets = [*family.subsets.values()]
    pairs = [k for k, members in enumerate(subsets) if len(members) == 2]
    names = [" & ".join(subsets[k]) for k in pairs]
    return Explanation(
        contributions=pd.DataFrame(own.numpy(), index=index, columns=[*family.groups]),
        base=row_base,
        answer=answer.numpy(),
        sufficient=[subsets[k] for k in found.expert.tolist()],
        gap=found.gap.numpy(),
        tolerance=tolerance,
        of=None if chosen is None else np.array(classes)[chosen],
        values=phi.numpy(),
        unit=unit,
        classes=classes,
        _rows=rows,
        _pairs=pd.DataFrame(added[:, pairs].numpy(), index=index, columns=names),
        _bases=base,
    )
