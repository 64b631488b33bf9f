"""The network of an estimator, and how it learns: Adam, mini-batches, early stopping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskmoe_kernels.estimators.columns import MISSING, UNSEEN
from maskmoe_kernels.estimators.encoder import Codes, Encoder
from maskmoe_kernels.explain.sufficient import top_expert
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models.mlp import InterpretableMLP
from maskmoe_kernels.ops.selection.api import expert_loss

#: Without ``max_epochs``: so many passes over the data, and at least so many steps; fewer where no
#: validation rows tell when to stop.
_EPOCHS, _STEPS, _BLIND_STEPS = 40, 1000, 300
#: Steps between two looks at the validation rows, at least.
_LOOK_EVERY = 10
_WARM_UP = 50
#: Rows whose values are computed at once.
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Pace:
    """How a network learns.

    Attributes:
        learning_rate: Adam's largest; it rises over 50 steps, then falls as a cosine.
        weight_decay: Decoupled from the gradient (AdamW).
        batch_size: Rows of a step.
        max_epochs: Passes over the rows; ``None``: 40, and as many as make 1000 steps.
        patience: Looks at the validation rows without a better loss before it stops.
    """

    learning_rate: float
    weight_decay: float
    batch_size: int
    max_epochs: int | None
    patience: int


@dataclass(frozen=True)
class Samples:
    """Encoded rows with what is to be learned.

    Attributes:
        codes: Of the rows.
        target: ``(rows,)``: 0 or 1, class indices, or numbers.
        weight: How often each counts, ``(rows,)``; ``None``: once.
    """

    codes: Codes
    target: Tensor
    weight: Tensor | None

    def taken(self, rows: Tensor) -> Samples:
        """The rows of these numbers."""
        weight = None if self.weight is None else self.weight[rows]
        return Samples(self.codes.taken(rows), self.target[rows], weight)

    def to(self, device: torch.device) -> Samples:
        """The same on a device."""
        weight = None if self.weight is None else self.weight.to(device)
        return Samples(self.codes.to(device), self.target.to(device), weight)


class Network(nn.Module):
    """All experts of a family on encoded rows.

    Only the smallest subsets that hold a categorical column train its embedding: an expert depends
    on what it sees, through training, too.

    Args:
        encoder: What encodes the rows.
        family: Its groups are those of the encoder.
        units: Hidden units of an expert, and of the one that sees all.
        outputs: Classes; ``None`` for one logit or number.
        seed: Of the first weights.
    """

    def __init__(
        self,
        encoder: Encoder,
        family: SubsetFamily,
        units: tuple[int, int],
        outputs: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.units = units
        widths = [units[0]] * family.num_experts
        widths[top_expert(family)] = units[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.experts = InterpretableMLP(
                family,
                [widths],
                "silu",
                outputs=outputs,
                input_layout=family.input_layout(widths, strict=True),
            )
            tables = []
            for column in encoder.tables:
                table = torch.eye(column.rows, column.width)
                if column.rows != column.width:
                    table = torch.randn(column.rows, column.width) / math.sqrt(column.width)
                table[[UNSEEN, MISSING]] = 0
                tables.append(nn.Parameter(table))
            self.tables = nn.ParameterList(tables)

    def forward(self, codes: Codes) -> Tensor:
        """Logits ``(rows, H)`` or ``(rows, H, outputs)``."""
        logits: Tensor = self.experts(self.encoder.inputs(codes, [*self.tables]))
        return logits

    def loss(self, samples: Samples, kind: str) -> Tensor:
        """Of all experts on some rows; see :func:`maskmoe_kernels.expert_loss`."""
        inputs = self.encoder.inputs(samples.codes, [*self.tables])
        return self.experts.expert_loss(inputs, samples.target, kind, samples.weight)

    @torch.no_grad()
    def values(self, codes: Codes) -> Tensor:
        """:meth:`forward` in parts, in float64."""
        parts = torch.arange(len(codes)).split(_ROWS_AT_ONCE)
        device = next(self.parameters()).device
        return torch.cat([self(codes.taken(rows).to(device)).double().cpu() for rows in parts])

    @torch.no_grad()
    def settle(self) -> None:
        """Give rows of categories that no training row had the mean of the others."""
        for table, column in zip(self.tables, self.encoder.tables, strict=True):
            share = torch.as_tensor(column.share, dtype=table.dtype, device=table.device)
            for row in (UNSEEN, MISSING):
                if share[row] == 0:
                    table[row] = share @ table / share.sum().clamp_min(1e-9)


def optimizer_of(network: Network, pace: Pace) -> torch.optim.Optimizer:
    """Adam for all parameters, embedding tables included."""
    return torch.optim.AdamW(
        network.parameters(), pace.learning_rate, weight_decay=pace.weight_decay, fused=True
    )


def run_epoch(
    network: Network,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    kind: str,
    batch_size: int,
    generator: torch.Generator,
    before_step: Callable[[], None] = lambda: None,
) -> None:
    """One pass over all rows, in an order that ``generator`` draws."""
    count = len(samples.target)
    order = torch.randperm(count, generator=generator).to(samples.target.device)
    for rows in order.tensor_split(max(1, round(count / batch_size))):
        before_step()
        batch = samples if len(rows) == count else samples.taken(rows)
        optimizer.zero_grad()
        network.loss(batch, kind).backward()
        optimizer.step()


def train(
    network: Network,
    samples: Samples,
    validation: Samples | None,
    kind: str,
    pace: Pace,
    generator: torch.Generator,
    told: Callable[[int, int, float | None], None] = lambda epoch, epochs, loss: None,
) -> list[float]:
    """Train in place; keep the weights with the best validation loss of the expert that sees all.

    Args:
        network: To be trained.
        samples: Training rows.
        validation: Rows for early stopping; ``None``: all epochs are run.
        kind: Of the loss.
        pace: See there.
        generator: Of the order of the rows.
        told: Is told of each look: epochs done, epochs at the most, validation loss.

    Returns:
        The validation loss at each look.
    """
    optimizer = optimizer_of(network, pace)
    steps = max(1, round(len(samples.target) / pace.batch_size))
    wanted = _BLIND_STEPS if validation is None else _STEPS
    epochs = pace.max_epochs or max(_EPOCHS, -(-wanted // steps))
    done = 0

    def set_rate() -> None:
        nonlocal done
        wave = 0.5 + 0.5 * math.cos(math.pi * done / (epochs * steps))
        done += 1
        optimizer.param_groups[0]["lr"] = pace.learning_rate * wave * min(1, done / _WARM_UP)

    history: list[float] = []
    kept, best, stale = None, math.inf, 0
    every = max(1, _LOOK_EVERY // steps)
    for epoch in range(1, epochs + 1):
        run_epoch(network, optimizer, samples, kind, pace.batch_size, generator, set_rate)
        if epoch % every and epoch < epochs:
            continue
        loss = None if validation is None else _top_loss(network, validation, kind)
        told(epoch, epochs, loss)
        if loss is None:
            continue
        history.append(loss)
        if loss < best - 1e-4 * abs(best) or kept is None:
            best, stale = loss, 0
            kept = {name: value.clone() for name, value in network.state_dict().items()}
        else:
            stale += 1
            if stale >= pace.patience:
                break
    if kept is not None:
        network.load_state_dict(kept)
    network.settle()
    return history


@torch.no_grad()
def _top_loss(network: Network, samples: Samples, kind: str) -> float:
    top = top_expert(network.experts.family)
    answer = network(samples.codes)[:, top : top + 1]
    outputs = network.experts.outputs
    return float(expert_loss(answer, samples.target, kind, samples.weight, outputs=outputs))
