"""Where training starts: each expert is the ridge-regularised linear model of the codes it sees.

Linear in piecewise-linear codes is additive in the columns, and the penalty on the rise in every
bin makes the shape of a column smooth. On few rows this is hard to beat; so training begins there,
and stops there if held-out rows do not get better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from maskmoe_kernels.estimators.tables import Array
from maskmoe_kernels.estimators.training import Network, Samples, Split
from maskmoe_kernels.ops.masked_linear.api import masked_linear

#: Penalties of the mean loss that are tried, the largest first, and the one without held-out rows.
_RIDGES = [10 ** (-k / 2) for k in range(11)]
_BLIND_RIDGE = 1e-2
#: Steps at each penalty, which begin at what the larger one found.
_STEPS = 8
#: Penalties without a better loss of held-out rows, after which smaller ones are not tried.
_PATIENCE = 2
#: An expert with more inputs starts as the constant answer: its system is too large to be solved.
_WIDEST = 2048
#: Rows that are looked at; fewer where there are so many answers that they would not fit.
_ROWS, _ANSWERS = 10_000, 20_000_000
#: Largest curvature of the loss, by its kind: (Böhning, *Multinomial logistic regression
#: algorithm*, 1992) for classes.
_CURVATURE = {"regression": 1.0, "binary": 0.25, "multiclass": 0.5}


def start_linear(
    networks: Sequence[Network],
    samples: Samples,
    splits: Sequence[Split],
    kind: str,
    base: Tensor,
) -> Tensor:
    """Make every expert of every network a ridge regression (logistic for classes).

    Its penalty is the one at which the rows that the bags hold out have the smallest loss, in the
    mean over the bags. Each is solved by steps ``B <- B - (c X'X + r P)^-1 gradient``, where c
    bounds the curvature of the loss, so that none overshoots, and P has straight lines cost less
    than other shapes.

    Args:
        networks: One a bag, untrained.
        samples: All rows.
        splits: The rows that each bag trains on and holds out.
        kind: Of the loss: binary, multiclass or regression.
        base: Answer of an expert that sees nothing, ``(K,)``: in log-odds for classes.

    Returns:
        The chosen penalty of each expert, ``(H,)``.
    """
    family, outputs = networks[0].experts.family, networks[0].experts.outputs or 1
    rows = min(_ROWS, _ANSWERS // (family.num_experts * outputs))
    if len(samples.target) > rows:
        return _on_some_rows(rows, networks, samples, splits, kind, base)
    solver = _Solver(networks[0], samples, splits, kind)
    models, chosen = solver.solved(base.repeat(family.num_experts))
    for network, weight, bias in zip(networks, *models, strict=True):
        _write(network, solver.layout.unpack(weight), bias, kind)
    return chosen


def _on_some_rows(rows: int, networks: Sequence[Network], samples: Samples,
                  splits: Sequence[Split], kind: str, base: Tensor) -> Tensor:  # fmt: skip
    """:func:`start_linear` on evenly spaced rows, with what is left of each bag's split."""
    taken = torch.linspace(0, len(samples.target) - 1, rows).long().to(samples.target.device)
    place = torch.full((len(samples.target),), -1, device=taken.device)
    place[taken] = torch.arange(rows, device=taken.device)
    fewer = []
    for kept, held in splits:
        own, out = place[kept], None if held is None else place[held]
        fewer.append((own[own >= 0], None if out is None else out[out >= 0]))
    return start_linear(networks, samples.taken(taken), fewer, kind, base)


def _shares(rows: Tensor | None, weight: Tensor) -> Tensor:
    """Weights of sum 1 of some rows, and 0 of the others: ``(all rows, 1, 1)``."""
    own = torch.zeros_like(weight)
    if rows is not None:
        own[rows] = weight[rows]
    return (own / own.sum().clamp_min(1e-30))[:, None, None]


def _penalty(x: Tensor, share: Tensor, lines: Array) -> Tensor:
    """P of the penalty ``r/2 B'PB``: ``(inputs, inputs)``, float64.

    Of a column that alone would be I, its standardised straight line u is penalised less, as if it
    were a column of its own beside the codes: ``P = (I + uu')^-1 = I - uu' / (1 + u'u)``.
    """
    u = torch.from_numpy(lines).to(x.device)
    column = x.double() @ u
    centred = column - (share * column).sum(0)
    u = u / (share * centred**2).sum(0).sqrt().clamp_min(1e-12)
    u = u / (1 + (u**2).sum(0)).sqrt()
    return torch.eye(len(u), dtype=u.dtype, device=u.device) - u @ u.T


class _Solver:
    """The linear models of all experts and bags: ``(bags, weights)`` packed, ``(bags, H * K)``."""

    def __init__(
        self, network: Network, samples: Samples, splits: Sequence[Split], kind: str
    ) -> None:
        self.kind, self.outputs = kind, network.experts.outputs or 1
        self.layout = network.experts.family.input_layout(self.outputs)
        self.x, self.target = network.joined(samples.codes), samples.target
        weight = torch.ones(len(self.x)) if samples.weight is None else samples.weight
        weight = weight.to(self.x)
        self.train = [_shares(kept, weight) for kept, _ in splits]
        self.held = [_shares(held, weight) for _, held in splits]
        self.blind = any(held is None for _, held in splits)
        # Of all rows and of a bag's, whose X'X is at most so many times as large.
        most = max(float(weight.sum() / weight[kept].sum()) for kept, _ in splits)
        with_one = torch.cat([self.x, self.x.new_ones(len(self.x), 1)], dim=1)
        share = (weight / weight.sum())[:, None]
        self.gram = ((with_one * share).T @ with_one).double() * _CURVATURE[kind] * most
        self.penalty = _penalty(self.x, share, network.encoder.lines())
        mask = self.layout.mask()[:: self.outputs].to(self.x.device)
        self.seen = [row.nonzero().flatten() for row in mask]
        numbers = torch.arange(self.layout.num_weights, dtype=torch.float64)
        place = self.layout.unpack(numbers).long().to(self.x.device)
        parts = place.split(self.outputs)
        #: For each expert, where its weights are in the packed vector: ``(K, inputs)``.
        self.at = [part[:, seen] for part, seen in zip(parts, self.seen, strict=True)]

    def solved(self, bias: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The best models over all penalties, and the penalty of each expert, ``(H,)``."""
        bias = bias.to(self.x).repeat(len(self.train), 1)
        weight = bias.new_zeros(len(bias), self.layout.num_weights)
        best_weight, best_bias = weight.clone(), bias.clone()
        active = [i for i, seen in enumerate(self.seen) if len(seen) <= _WIDEST]
        chosen, stale = torch.full((len(self.seen),), math.inf), [0] * len(self.seen)
        best = chosen.clone()
        for ridge in [_BLIND_RIDGE] if self.blind else _RIDGES:
            factors = [self._factor(i, ridge) for i in active]
            old = weight, bias
            for k in range(_STEPS):
                # Nesterov's: a step from where the last two point to.
                further = weight.lerp(old[0], -k / (k + 3)), bias.lerp(old[1], -k / (k + 3))
                old = weight, bias
                weight, bias = self._step(*further, active, factors, ridge)
            loss = self._held_out_loss(weight, bias)
            for i in active:
                stale[i] += 1
                if self.blind or loss[i] < best[i]:
                    best[i], chosen[i], stale[i] = loss[i], ridge, 0
                    own = slice(i * self.outputs, (i + 1) * self.outputs)
                    best_weight[:, self.at[i]] = weight[:, self.at[i]]
                    best_bias[:, own] = bias[:, own]
            active = [i for i in active if stale[i] < _PATIENCE]
            if not active:
                break
        return (best_weight, best_bias), chosen

    def _penalty_of(self, expert: int) -> Tensor:
        seen = self.seen[expert]
        own: Tensor = self.penalty[seen][:, seen]
        return own

    def _factor(self, expert: int, ridge: float) -> Tensor:
        """The Cholesky factor of ``c X'X + r P`` of the inputs of an expert, and of ones."""
        seen = torch.cat([self.seen[expert], self.seen[expert].new_full((1,), len(self.gram) - 1)])
        system = self.gram[seen][:, seen]
        system[:-1, :-1] += ridge * self._penalty_of(expert)
        factor: Tensor = torch.linalg.cholesky(system)
        return factor

    def _step(
        self,
        weight: Tensor,
        bias: Tensor,
        active: Sequence[int],
        factors: Sequence[Tensor],
        ridge: float,
    ) -> tuple[Tensor, Tensor]:
        """One step of the active experts of all bags."""
        slopes, rises = torch.empty_like(weight), torch.empty_like(bias)
        for k, share in enumerate(self.train):
            w = weight[k].requires_grad_()
            answer = masked_linear(self.x, w, bias[k], self.layout)
            z = answer.detach().unflatten(-1, (-1, self.outputs))
            wrong = (_wrong(z, self.target, self.kind) * share).flatten(1)
            (slopes[k],) = torch.autograd.grad(answer, w, wrong)
            rises[k] = wrong.sum(0)
        for i, factor in zip(active, factors, strict=True):
            at, own = self.at[i], slice(i * self.outputs, (i + 1) * self.outputs)
            of_weight = slopes[:, at] + ridge * (weight[:, at].double() @ self._penalty_of(i))
            gradient = torch.cat([of_weight, rises[:, own, None]], dim=2)
            step = torch.cholesky_solve(gradient.flatten(0, 1).T, factor).T
            step = step.reshape(gradient.shape).float()
            weight[:, at] -= step[..., :-1]
            bias[:, own] -= step[..., -1]
        return weight, bias

    def _held_out_loss(self, weight: Tensor, bias: Tensor) -> list[float]:
        """Of each expert, in the mean over the bags."""
        total = torch.zeros(len(self.seen), device=self.x.device)
        for w, b, share in zip(weight, bias, self.held, strict=True):
            z = masked_linear(self.x, w, b, self.layout).unflatten(-1, (-1, self.outputs))
            total += (losses_of(z, self.target, self.kind) * share[..., 0]).sum(0)
        return (total / len(weight)).tolist()


def losses_of(z: Tensor, target: Tensor, kind: str) -> Tensor:
    """Logits (in log-odds) or numbers ``(rows, H, K)`` to the loss of each, ``(rows, H)``."""
    if kind == "regression":
        return (z[..., 0] - target[:, None]) ** 2 / 2
    if kind == "binary":
        return functional.softplus(z[..., 0]) - z[..., 0] * target[:, None]
    return z.logsumexp(-1) - z[torch.arange(len(z)), :, target]


def _wrong(z: Tensor, target: Tensor, kind: str) -> Tensor:
    """The gradient of :func:`losses_of`, ``(rows, H, K)``."""
    if kind == "regression":
        return z - target[:, None, None]
    if kind == "binary":
        return z.sigmoid_() - target[:, None, None]
    probability = z.softmax(-1)
    probability[torch.arange(len(z)), :, target] -= 1
    return probability


@torch.no_grad()
def _write(network: Network, dense: Tensor, bias: Tensor, kind: str) -> None:
    """Let the linear units of each expert answer ``dense @ x + bias``, and the others nothing.

    They come in pairs: ``silu(z) - silu(-z) = z``.
    """
    first, last = network.experts.layers[0], network.experts.layers[1]
    scale = 0.5 if kind == "binary" else 1.0  # there, p = sigmoid(2 z)
    outputs = network.experts.outputs or 1
    into, out = first.dense_weight().clone(), torch.zeros_like(last.dense_weight())
    into_bias = first.bias.clone()
    for i, end in enumerate(network.ends):
        own = slice(i * outputs, (i + 1) * outputs)
        plus, minus = slice(end - 2 * outputs, end - outputs), slice(end - outputs, end)
        into[plus], into[minus] = dense[own], -dense[own]
        into_bias[end - 2 * outputs : end] = 0
        out[own, plus] = scale * torch.eye(outputs, device=out.device)
        out[own, minus] = -scale * torch.eye(outputs, device=out.device)
    first.weight.copy_(first.layout.pack(into))
    first.bias.copy_(into_bias)
    last.weight.copy_(last.layout.pack(out))
    last.bias.copy_(bias * scale)
