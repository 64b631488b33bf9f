"""A regression whose Shapley values are known, and experts trained on samples of it.

The features are correlated Gaussians, one a group; y is a quadratic form of them with noise. So
E[y | x_S] has a closed form for every subset S of the features::

    y = w'x + x'Qx + noise,  x ~ N(0, C)
    m = E[x | x_S] = C_{:S} C_SS^-1 x_S,  V = C - C_{:S} C_SS^-1 C_{S:}
    E[y | x_S] = w'm + m'Qm + trace(Q V)

and the Shapley values of that game are what an explanation on the data's own distribution is to
find. Interventional values, of features drawn apart from each other, are another game's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import maskmoe_kernels as mk
from bench.clock import own_clock

#: From more experts on, steps are what training lacks.
_MANY = 15


class GaussianTask:
    """The distribution of x and y, float64.

    Args:
        features: d, the number of features and of groups.
        correlation: Of neighbouring features; with others it falls as a power.
        noise: Standard deviation of y around its mean given x.
        seed: Of weights, interactions and signs.
    """

    def __init__(
        self, features: int, correlation: float = 0.6, noise: float = 0.3, seed: int = 0
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        apart = (torch.arange(features)[:, None] - torch.arange(features)).abs()
        signs = torch.randint(2, (features,), generator=random).double() * 2 - 1
        self.covariance = correlation**apart * signs * signs[:, None]
        self.weight = torch.randn(features, generator=random).double()
        quadratic = 0.5 * torch.randn(features, features, generator=random).double()
        self.quadratic = (quadratic + quadratic.T) / 2 / math.sqrt(features)
        self.noise = noise
        groups = {f"x{n}": 1 for n in range(features)}
        self.family = mk.SubsetFamily.powerset(groups)
        self._root = torch.linalg.cholesky(self.covariance)

    @property
    def base(self) -> float:
        """E[y]."""
        return float((self.quadratic * self.covariance).sum())

    def draw(self, rows: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """x ``(rows, d)`` and y ``(rows,)``, float32."""
        x = torch.randn(rows, len(self.weight), generator=random) @ self._root.T.float()
        noise = self.noise * torch.randn(rows, generator=random)
        return x, self.mean(x) + noise

    def mean(self, x: Tensor) -> Tensor:
        """E[y | x], ``(rows,)``, in the dtype of ``x``."""
        weight, quadratic = self.weight.to(x.dtype), self.quadratic.to(x.dtype)
        return x @ weight + ((x @ quadratic) * x).sum(-1)

    def conditional(self, x: Tensor, seen: Tensor) -> Tensor:
        """E[y | x_S] for the features that ``seen`` ``(d,)`` bool says, ``(rows,)`` float64."""
        of_seen = self.covariance[:, seen]
        regression = torch.linalg.solve(of_seen[seen], of_seen.T).T
        mean = x.double()[:, seen] @ regression.T
        rest = self.covariance - regression @ of_seen.T
        return self.mean(mean) + (self.quadratic * rest).sum()

    def game(self, x: Tensor) -> Tensor:
        """E[y | x_S] for every expert of ``family``, ``(rows, H)`` float64."""
        return torch.stack([self.conditional(x, seen) for seen in self.family.membership], -1)

    def shapley(self, x: Tensor) -> Tensor:
        """The exact Shapley values, ``(rows, d)`` float64."""
        return mk.shapley(self.game(x), self.family, self.base)


class Trained(NamedTuple):
    """Experts that learned E[y | x_S].

    Attributes:
        net: Predicts (y - base) / scale.
        base: Mean of y in the first batch.
        scale: Its standard deviation there.
        seconds: Of training.
        steps: Of training.
    """

    net: mk.InterpretableMLP
    base: float
    scale: float
    seconds: float
    steps: int

    @torch.no_grad()
    def game(self, x: Tensor) -> Tensor:
        """Predictions of all experts, ``(rows, H)`` float64."""
        return self.base + self.scale * self.net(x.float()).double()

    def shapley(self, x: Tensor) -> Tensor:
        """Shapley values of the learned game, ``(rows, d)`` float64."""
        return mk.shapley(self.game(x), self.net.family, self.base)


def train(
    task: GaussianTask,
    seconds: float,
    *,
    width: int | None = None,
    batch: int | None = None,
    rate: float = 0.01,
    steps: int | None = None,
    seed: int = 0,
) -> Trained:
    """Train all experts on fresh samples for so long; the learning rate falls to 0 as a cosine.

    Args:
        task: What to learn.
        seconds: Of training, with one thread the process's own, so that other processes disturb
            less; ``steps``, where given, is the length instead, whatever it takes.
        width: Units an expert of both hidden layers. ``None``: 16, or 8 if there are more than
            ``_MANY`` experts, whose steps cost more than a small width does.
        batch: Samples a step. ``None``: 1024, or 256 if there are so many.
        rate: First learning rate of Adam.
        steps: See ``seconds``.
        seed: Of weights and samples.
    """
    many = task.family.num_experts > _MANY
    width, batch = width or (8 if many else 16), batch or (256 if many else 1024)
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    net = mk.InterpretableMLP(task.family, [width, width], "silu")
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, fused=True)
    _, y = task.draw(1 << 16, random)
    base, scale = float(y.mean()), float(y.std())
    clock = own_clock()
    start, step, done = clock(), 0, 0.0
    while done < 1:
        x, y = task.draw(batch, random)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
        optimizer.zero_grad()
        net.expert_loss(x, (y - base) / scale, "regression").backward()
        optimizer.step()
        step += 1
        spent = clock() - start
        done = spent / seconds if steps is None else step / steps
    return Trained(net, base, scale, clock() - start, step)


def errors(found: Tensor, true: Tensor) -> dict[str, float]:
    """How far Shapley values are from the truth.

    Returns:
        ``rmse``; ``scale``, the root mean square of the true values; ``relative``, their ratio.
    """
    rmse = float((found - true).square().mean().sqrt())
    scale = float(true.square().mean().sqrt())
    return {"rmse": rmse, "scale": scale, "relative": rmse / scale}
