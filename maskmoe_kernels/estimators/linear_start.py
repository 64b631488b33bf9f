"""Where training starts: each expert is the ridge-regularised linear model of the codes it sees.

Linear in piecewise-linear codes is additive in the columns, and the penalty on the rise in every
bin makes the shape of a column smooth. On few rows this is hard to beat; so training begins there,
and stops there if held-out rows do not get better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskmoe_kernels.estimators.held_out import gain_over, losses_of
from maskmoe_kernels.estimators.tables import Array
from maskmoe_kernels.estimators.training import Network, Samples, Split
from maskmoe_kernels.ops.masked_linear.api import masked_linear

#: Penalties of the mean loss that are tried, the largest first, and the one without held-out rows.
_RIDGES = [10 ** (-k / 2) for k in range(11)]
_BLIND_RIDGE = 1e-2
#: Steps at each penalty, which begin at what the larger one found, at the most; they end where none
#: would lower the penalised loss by more than this.
_STEPS, _LITTLE = 8, 1e-5
#: Penalties without a clearly better loss of held-out rows, after which smaller ones are not tried.
_PATIENCE = 3
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
    errors: float = 1.0,
) -> Tensor:
    """Make every expert of every network a ridge regression (logistic for classes).

    Its penalty is the largest one that the rows held out by the bags do not tell from the best: a
    smaller one has to make their loss, in the mean over the bags, smaller by more than ``errors``
    standard errors. Each is solved by steps ``B <- B - (c X'X + r P)^-1 gradient``, where c bounds
    the curvature of the loss, so that none overshoots, and P has straight lines cost less than
    other shapes.

    Args:
        networks: One a bag, untrained.
        samples: All rows.
        splits: The rows that each bag trains on and holds out.
        kind: Of the loss: binary, multiclass or regression.
        base: Answer of an expert that sees nothing, ``(K,)``: in log-odds for classes.
        errors: See above; with 0, the penalty is the one with the smallest loss.

    Returns:
        The chosen penalty of each expert, ``(H,)``.
    """
    family, outputs = networks[0].experts.family, networks[0].experts.outputs or 1
    rows = min(_ROWS, _ANSWERS // (family.num_experts * outputs))
    if len(samples.target) > rows:
        return _on_some_rows(rows, networks, samples, splits, kind, base, errors)
    solver = _Solver(networks[0], samples, splits, kind, errors)
    models, chosen = solver.solved(base.repeat(family.num_experts))
    for network, weight, bias in zip(networks, *models, strict=True):
        _write(network, solver.layout.unpack(weight), bias, kind)
    return chosen


def _on_some_rows(
    rows: int,
    networks: Sequence[Network],
    samples: Samples,
    splits: Sequence[Split],
    kind: str,
    base: Tensor,
    errors: float,
) -> Tensor:
    """:func:`start_linear` on evenly spaced rows, with what is left of each bag's split."""
    taken = torch.linspace(0, len(samples.target) - 1, rows).long().to(samples.target.device)
    place = torch.full((len(samples.target),), -1, device=taken.device)
    place[taken] = torch.arange(rows, device=taken.device)
    fewer = []
    for kept, held in splits:
        own, out = place[kept], None if held is None else place[held]
        fewer.append((own[own >= 0], None if out is None else out[out >= 0]))
    return start_linear(networks, samples.taken(taken), fewer, kind, base, errors)


def _shares(rows: Tensor, weight: Tensor) -> Tensor:
    """Weights of sum 1 of some rows, and 0 of the others: ``(all rows, 1, 1)``."""
    own = torch.zeros_like(weight)
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


@dataclass(frozen=True)
class _Batch:
    """Experts whose systems are solved at once, n inputs each.

    Attributes:
        at: Where their weights are, ``(experts, K, n)``; of an input that pads, behind all others.
        own: Where their answers are, ``(experts, K)``.
        penalty: P of their inputs, ``(experts, n, n)``.
        factor: The Cholesky factor of each system, ``(experts, n + 1, n + 1)``.
    """

    at: Tensor
    own: Tensor
    penalty: Tensor
    factor: Tensor


class _Solver:
    """The linear models of all experts and bags: weights ``(bags, packed + 1)``, where the last one
    is 0 and no input's, and answers ``(bags, H * K)``.
    """

    def __init__(
        self,
        network: Network,
        samples: Samples,
        splits: Sequence[Split],
        kind: str,
        errors: float,
    ) -> None:
        self.errors, self.kind, self.outputs = errors, kind, network.experts.outputs or 1
        self.layout = network.experts.family.input_layout(self.outputs)
        self.x, self.target = network.joined(samples.codes), samples.target
        weight = torch.ones(len(self.x)) if samples.weight is None else samples.weight
        weight = weight.to(self.x)
        self.train = [_shares(kept, weight) for kept, _ in splits]
        out = [held for _, held in splits if held is not None]
        #: Inputs and targets of the rows that each bag holds out, and their weights, of sum 1.
        self.held = [(self.x[held], self.target[held]) for held in out]
        self.held_share = [weight[held] / weight[held].sum() for held in out]
        self.blind = len(self.held) < len(splits)
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
        weight = bias.new_zeros(len(bias), self.layout.num_weights + 1)
        best_weight, best_bias = weight.clone(), bias.clone()
        active = [i for i, seen in enumerate(self.seen) if len(seen) <= _WIDEST]
        chosen, stale = torch.full((len(self.seen),), math.inf), [0] * len(self.seen)
        best = self._held_out_losses(weight, bias)
        for ridge in [_BLIND_RIDGE] if self.blind else _RIDGES:
            batches = [self._batch(experts, ridge) for experts in self._of_like_size(active)]
            old = weight, bias
            for k in range(_STEPS):
                # Nesterov's: a step from where the last two point to.
                further = weight.lerp(old[0], -k / (k + 3)), bias.lerp(old[1], -k / (k + 3))
                old = weight, bias
                weight, bias, gain = self._step(*further, batches, ridge)
                if gain < _LITTLE:
                    break
            losses = self._held_out_losses(weight, bias)
            better = self._clearly_better(losses, best)
            for i in active:
                stale[i] += 1
                if better[i]:
                    for kept, new in zip(best, losses, strict=True):
                        kept[:, i] = new[:, i]
                    chosen[i], stale[i] = ridge, 0
                    own = slice(i * self.outputs, (i + 1) * self.outputs)
                    best_weight[:, self.at[i]] = weight[:, self.at[i]]
                    best_bias[:, own] = bias[:, own]
            active = [i for i in active if stale[i] < _PATIENCE]
            if not active:
                break
        return (best_weight[:, :-1], best_bias), chosen

    def _of_like_size(self, experts: Sequence[int]) -> list[list[int]]:
        """Experts whose numbers of inputs are alike, to be solved at once."""
        groups: dict[int, list[int]] = {}
        for i in experts:
            groups.setdefault(int(4 * math.log2(len(self.seen[i]) + 7)), []).append(i)
        return [*groups.values()]

    def _batch(self, experts: Sequence[int], ridge: float) -> _Batch:
        """Their systems ``c X'X + r P`` of inputs and of ones, padded with inputs that are 0."""
        most = max(len(self.seen[i]) for i in experts)
        ones = len(self.gram) - 1
        systems = torch.eye(most + 1, dtype=self.gram.dtype, device=self.x.device)
        systems = systems.repeat(len(experts), 1, 1)
        penalties = systems.new_zeros(len(experts), most, most)
        at = self.at[0].new_full((len(experts), self.outputs, most), self.layout.num_weights)
        for k, i in enumerate(experts):
            seen = self.seen[i]
            count = len(seen)
            rows = torch.cat([seen, seen.new_full((1,), ones)])
            place = torch.cat([torch.arange(count), torch.tensor([most])]).to(seen.device)
            penalties[k, :count, :count] = self.penalty[seen][:, seen]
            systems[k, place[:, None], place] = self.gram[rows][:, rows]
            at[k, :, :count] = self.at[i]
        systems[:, :-1, :-1] += ridge * penalties
        own = torch.tensor(experts, device=at.device)[:, None] * self.outputs
        own = own + torch.arange(self.outputs, device=at.device)
        return _Batch(at, own, penalties, torch.linalg.cholesky(systems))

    def _step(
        self, weight: Tensor, bias: Tensor, batches: Sequence[_Batch], ridge: float
    ) -> tuple[Tensor, Tensor, float]:
        """One step of the experts of the batches, of all bags; what it gains at the most."""
        gain = 0.0
        slopes, rises = torch.zeros_like(weight), torch.empty_like(bias)
        packed = self.layout.num_weights
        for k, share in enumerate(self.train):
            w = weight[k, :packed].requires_grad_()
            answer = masked_linear(self.x, w, bias[k], self.layout)
            z = answer.detach().unflatten(-1, (-1, self.outputs))
            wrong = (_wrong(z, self.target, self.kind) * share).flatten(1)
            (slopes[k, :packed],) = torch.autograd.grad(answer, w, wrong)
            rises[k] = wrong.sum(0)
        for batch in batches:
            of_weight = slopes[:, batch.at] + ridge * (weight[:, batch.at].double() @ batch.penalty)
            gradient = torch.cat([of_weight, rises[:, batch.own, None]], dim=-1)
            # (bags, experts, K, n) to one system an expert, with a right side for each bag and K.
            sides = gradient.permute(1, 3, 0, 2).flatten(2)
            step = torch.cholesky_solve(sides, batch.factor)
            gain = max(gain, float((step * sides).sum(1).max()) / 2)
            step = step.unflatten(2, (-1, self.outputs)).permute(2, 0, 3, 1).float()
            weight[:, batch.at] -= step[..., :-1]
            bias[:, batch.own] -= step[..., -1]
        return weight, bias, gain

    def _held_out_losses(self, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Of each bag, those of every expert on its held-out rows: ``(rows, H)``."""
        if self.blind:
            return []
        found = []
        for w, b, (x, target) in zip(weight, bias, self.held, strict=True):
            z = masked_linear(x, w[:-1], b, self.layout)
            if self.kind == "binary":
                z = z / 2  # experts answer with half the log-odds
            elif self.kind == "multiclass":
                z = z.unflatten(-1, (-1, self.outputs))
            found.append(losses_of(z, target, self.kind))
        return found

    def _clearly_better(self, losses: Sequence[Tensor], best: Sequence[Tensor]) -> list[bool]:
        """Of each expert: is the loss smaller by more than so many standard errors?"""
        if self.blind:
            return [True] * len(self.seen)
        gain, error = gain_over(losses, best, self.held_share)
        better: list[bool] = (gain > self.errors * error).tolist()
        return better


def _wrong(z: Tensor, target: Tensor, kind: str) -> Tensor:
    """The gradient of the log loss, or of half the squared error, ``(rows, H, K)``."""
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

    They come in pairs: ``relu(z) - relu(-z) = z``, and later hidden layers pass them on.
    """
    *hidden, last = network.masked_layers
    scale = 0.5 if kind == "binary" else 1.0  # there, p = sigmoid(2 z)
    outputs = network.experts.outputs or 1
    weights = [layer.dense_weight().clone() for layer in hidden]
    out = torch.zeros_like(last.dense_weight())
    one = torch.eye(outputs, device=out.device)
    for i, end in enumerate(network.ends):
        own = slice(i * outputs, (i + 1) * outputs)
        plus, minus = slice(end - 2 * outputs, end - outputs), slice(end - outputs, end)
        weights[0][plus], weights[0][minus] = dense[own], -dense[own]
        for weight in weights[1:]:
            weight[plus] = weight[minus] = 0
            weight[plus, plus] = weight[minus, minus] = one
        for layer in hidden:
            layer.bias[plus] = layer.bias[minus] = 0
        out[own, plus], out[own, minus] = scale * one, -scale * one
    for layer, weight in zip([*hidden, last], [*weights, out], strict=True):
        layer.weight.copy_(layer.layout.pack(weight))
    last.bias.copy_(bias * scale)
