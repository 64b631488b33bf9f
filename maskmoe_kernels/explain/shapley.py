"""Exact Shapley values, interactions and Moebius coefficients of a family's logits.

If every expert learned E[y | x_S] (uniform weights), the logits of a power set of groups are the
whole game v(S) on the data's own distribution. Its Shapley values are linear in v: one product
with a matrix that is made once a family and device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from maskmoe_kernels._compat import constant_in_trace, without_autocast
from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.explain.game import Game, complete_game_of, game_of
from maskmoe_kernels.explain.regression import regression_weights, residual_weights
from maskmoe_kernels.explain.values import experts_last
from maskmoe_kernels.layout.subsets import SubsetFamily

Base = float | Tensor | None
#: From so many experts on, the fast transform of a power set takes less than a product.
_FAST = 63


def shapley(
    logits: Tensor,
    family: SubsetFamily,
    base: Base = None,
    *,
    method: str = "exact",
    dim: int | None = None,
) -> Tensor:
    """Shapley values of the game v(S) = logit of expert S: what each group contributes.

    ``phi_g = sum over S without g of |S|! (G - |S| - 1)! / G! * (v(S + g) - v(S))`` (Shapley,
    1953). They sum to ``v(all groups) - v(no group)``.

    Args:
        logits: ``(*, H)``, or ``(*, H, K)`` of K outputs an expert.
        family: Its experts. Where one of them lies inside all others (MovieLens: content), the
            game is that of the remaining groups, with this expert as base; its own groups are
            part of every coalition and get 0.
        base: v of the empty set: a number, ``(*,)`` or ``(*, K)``. ``None``: the family has an
            expert for it, of the empty subset or inside all others.
        method: ``"exact"`` needs every subset. ``"regression"`` takes the subsets that there are:
            the weighted least-squares fit of an additive game (KernelSHAP: Lundberg & Lee, 2017),
            which has the same sum, and is the same where every subset is there. See
            :func:`shapley_residual` for how well it fits.
        dim: Axis of the experts in ``logits``, -1 or -2; ``None`` finds it by its size.

    Returns:
        ``(*, G)`` or ``(*, G, K)``, float32 (float64 for float64 logits), differentiable.

    Raises:
        LayoutError: Subsets are missing (the message names some), the value of the empty set is
            not known or known twice, a shape that does not fit, or an unknown method.
    """
    values, moved = experts_last(logits, family, dim)
    if method not in ("exact", "regression"):
        raise LayoutError(f"method must be 'exact' or 'regression', got {method!r}")
    phi = _of_all_groups(_apply(values, family, base, method), family, base, -1)
    return phi.transpose(-1, -2) if moved else phi


def shapley_residual(
    logits: Tensor, family: SubsetFamily, base: Base = None, *, dim: int | None = None
) -> Tensor:
    """How far the additive game of ``shapley(..., method="regression")`` is from the logits.

    The root of the mean square of ``v(S) - base - sum of phi over S``, each coalition weighted as
    the fit weighs it: 0 where groups only add up.

    Returns:
        ``(*,)`` or ``(*, K)``, in the units of the logits. Arguments and errors as for
        :func:`shapley`.
    """
    values, _ = experts_last(logits, family, dim)
    return _apply(values, family, base, "residual").square().sum(-1).sqrt()


def interactions(
    logits: Tensor, family: SubsetFamily, base: Base = None, *, dim: int | None = None
) -> Tensor:
    """Pairwise interactions of groups, which sum to the Shapley values: ``sum(-1) == shapley``.

    Entry (g, h) and entry (h, g) are half of the Shapley interaction index each (Grabisch &
    Roubens, 1999)::

        I_gh = sum over S without g and h of |S|! (G - |S| - 2)! / (G - 1)!
               * (v(S + g + h) - v(S + g) - v(S + h) + v(S))

    The diagonal has the main effects: the Shapley value less the row's interactions.

    Returns:
        ``(*, G, G)`` or ``(*, G, G, K)``, symmetric. Arguments and errors as for :func:`shapley`.
    """
    values, moved = experts_last(logits, family, dim)
    result = _apply(values, family, base, "interactions")
    count = _player_count(family, base is not None)
    result = _of_all_groups(result.unflatten(-1, (count, count)), family, base, -1)
    result = _of_all_groups(result, family, base, -2)
    return result.movedim(-3, -1) if moved else result


def moebius(
    logits: Tensor, family: SubsetFamily, base: Base = None, *, dim: int | None = None
) -> Tensor:
    """Moebius coefficients: what each subset adds beyond its proper subsets.

    ``m_i = v_i - base - sum over S_j inside S_i of m_j``, so that the coefficients of an expert
    and of all experts inside it sum to its logit. A NaN reaches the experts that contain it only.

    Args:
        logits: ``(*, H)``, or ``(*, H, K)`` of K outputs an expert.
        family: Its experts, any subsets.
        base: v of the empty set, as for :func:`shapley`. ``None``: 0, or the logit of the expert
            of the empty subset.
        dim: Axis of the experts in ``logits``, -1 or -2; ``None`` finds it by its size.

    Returns:
        ``(*, H)`` or ``(*, H, K)``, float32 (float64 for float64 logits), differentiable.

    Raises:
        LayoutError: A shape that does not fit, or a base beside an expert of the empty subset.
    """
    values, moved = experts_last(logits, family, dim)
    if base is not None:
        _check_base(family)
        values = values - _column(base, values)
    fast = family.num_experts >= _FAST and _is_power_set(family)
    found = _butterfly(values, family) if fast else _product(values, family)
    return found.transpose(-1, -2) if moved else found


# --- Linear maps of the logits ------------------------------------------------------------------


def _interaction_weights(game: Game) -> Tensor:
    half = game.interaction_weights() / 2
    main = game.shapley_weights() - half.sum(1)
    return (half + torch.diag_embed(main.T).permute(1, 2, 0)).flatten(0, 1)


#: Name to the weights of a game, ``(results, columns)``, float64.
_WEIGHTS: dict[str, Callable[[Game], Tensor]] = {
    "exact": Game.shapley_weights,
    "interactions": _interaction_weights,
    "regression": regression_weights,
    "residual": residual_weights,
}


def _apply(values: Tensor, family: SubsetFamily, base: Base, name: str) -> Tensor:
    """``weights @ v`` for each sample, ``(*, results)``; the base is the last column."""
    key = _keep_weights(family, name, base is not None, values.dtype, values.device)
    table = family.caches.tables[key]
    experts = family.num_experts
    with without_autocast(values.device):
        result = values @ table[:experts]
        if base is not None:
            result = result + _column(base, values) * table[experts]
    return result


@constant_in_trace
def _keep_weights(
    family: SubsetFamily, name: str, has_base: bool, dtype: torch.dtype, device: torch.device
) -> tuple[str, torch.device]:
    """The key of the table, which is there afterwards: a trace could not build it."""
    key = f"{name} {has_base} {dtype}"
    needs_all = name in ("exact", "interactions")

    def build() -> Tensor:
        game = complete_game_of(family, has_base) if needs_all else game_of(family, has_base)
        return _WEIGHTS[name](game).T.to(dtype)

    family.caches.table(key, device, build)
    return key, device


def _column(base: float | Tensor, values: Tensor) -> Tensor:
    """``base`` beside ``values`` ``(*, H)``: ``(*, 1)``, or something that broadcasts to it."""
    column = torch.as_tensor(base, dtype=values.dtype, device=values.device)
    shape = values.shape[:-1]
    try:
        fits = torch.broadcast_shapes(column.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise LayoutError(
            f"base must be a number or fit the logits without their experts, {tuple(shape)}, got "
            f"{tuple(column.shape)}"
        )
    return column[..., None]


def _of_all_groups(of_players: Tensor, family: SubsetFamily, base: Base, dim: int) -> Tensor:
    """Zeros for the groups that do not play, along ``dim``."""
    if _player_count(family, base is not None) == family.num_groups:
        return of_players
    key = _keep_players(family, base is not None, of_players.device)
    shape = [*of_players.shape]
    shape[dim] = family.num_groups
    return of_players.new_zeros(shape).index_copy(dim, family.caches.tables[key], of_players)


@constant_in_trace
def _player_count(family: SubsetFamily, has_base: bool) -> int:
    return len(game_of(family, has_base).players)


@constant_in_trace
def _keep_players(
    family: SubsetFamily, has_base: bool, device: torch.device
) -> tuple[str, torch.device]:
    key, players = f"players {has_base}", game_of(family, has_base).players
    family.caches.table(key, device, lambda: torch.tensor(players, dtype=torch.int64, device="cpu"))
    return key, device


# --- Moebius ------------------------------------------------------------------------------------


@constant_in_trace
def _check_base(family: SubsetFamily) -> None:
    """Raise LayoutError if the family has an expert of the empty subset."""
    if not family.membership.any(1).all():
        game_of(family, True)  # which says so


@constant_in_trace
def _is_power_set(family: SubsetFamily) -> bool:
    """Is every subset of the groups there, the empty one perhaps excepted?"""
    game = game_of(family, bool(family.membership.any(1).all()))
    return game.is_complete and len(game.players) == game.groups


def _product(values: Tensor, family: SubsetFamily) -> Tensor:
    """Coefficients of any family, as a product with the inverse of its inclusion."""
    inverse = family.caches.tables[_keep_inverse(family, values.dtype, values.device)]
    # A product with 0 would carry a NaN to experts that do not contain it.
    unknown = ~values.isfinite()
    with without_autocast(values.device):
        found = values.masked_fill(unknown, 0) @ inverse
        reached = unknown.to(inverse.dtype) @ (inverse != 0).to(inverse.dtype) > 0
    result: Tensor = found.masked_fill(reached, torch.nan)
    return result


@constant_in_trace
def _keep_inverse(
    family: SubsetFamily, dtype: torch.dtype, device: torch.device
) -> tuple[str, torch.device]:
    family.caches.table(f"moebius {dtype}", device, lambda: _inverse(family).T.to(dtype))
    return f"moebius {dtype}", device


def _inverse(family: SubsetFamily) -> Tensor:
    """The Moebius function of the subsets, ``(H, H)`` float64; its entries are whole numbers."""
    order = family.membership.sum(1).argsort(stable=True)
    triangle = family.inclusion[order][:, order].double()
    eye = torch.eye(len(order), dtype=torch.float64, device="cpu")
    solved: Tensor = torch.linalg.solve_triangular(triangle, eye, upper=False, unitriangular=True)
    back = order.argsort()
    return solved.round()[back][:, back]


def _butterfly(values: Tensor, family: SubsetFamily) -> Tensor:
    """The same for a power set: group by group, what it adds (fast Moebius transform)."""
    groups = family.num_groups
    at = family.caches.tables[_keep_order(family, values.device)]
    tree = values.new_zeros((*values.shape[:-1], 2**groups)).index_copy(-1, at, values)
    for group in range(groups):  # in place: new memory would take most of the time
        pairs = tree.unflatten(-1, (-1, 2, 2**group))
        pairs.select(-2, 1).sub_(pairs.select(-2, 0))
    return tree.index_select(-1, at)


@constant_in_trace
def _keep_order(family: SubsetFamily, device: torch.device) -> tuple[str, torch.device]:
    """Where each expert lies if bit n of the position says whether group n is in its subset."""
    bits = torch.arange(family.num_groups, device="cpu")
    key = "moebius order"
    family.caches.table(key, device, lambda: (family.membership.long() << bits).sum(1))
    return key, device
