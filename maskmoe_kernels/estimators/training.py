"""The network of an estimator, and how it learns: Adam, mini-batches, early stopping."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from maskmoe_kernels.estimators.columns import MISSING, UNSEEN
from maskmoe_kernels.estimators.encoder import Codes, Encoder
from maskmoe_kernels.estimators.held_out import Look, Watch, losses_of
from maskmoe_kernels.explain.sufficient import top_expert
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.models.mlp import InterpretableMLP
from maskmoe_kernels.nn.linear import MaskedLinear

#: Without ``max_epochs``: so many passes over the data, and at least so many steps; fewer where no
#: validation rows tell when to stop. Of many rows, so many steps at the most, but some passes.
_EPOCHS, _STEPS, _BLIND_STEPS = 80, 1000, 300
_MOST_STEPS, _FEWEST_EPOCHS = 8000, 5
#: Steps between two looks at the validation rows, at least.
_LOOK_EVERY = 10
_WARM_UP = 50
#: Every so many steps the average of the weights moves, and how much of it then stays: it looks
#: back about 50 steps.
_AVERAGED_EVERY, _MEMORY = 4, 0.92
#: Rows whose values are computed at once.
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Pace:
    """How a network learns.

    Attributes:
        learning_rate: Adam's largest; it rises over 50 steps, then falls as a cosine.
        weight_decay: Decoupled from the gradient (AdamW).
        batch_size: Rows of a step.
        max_epochs: Passes over the rows; ``None``: 80, but as many as make 1000 to 8000 steps,
            and at least 5.
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

    def shares(self) -> Tensor:
        """The weight of each row, of all rows 1: ``(rows,)``, float64."""
        weight = torch.ones(len(self.codes)) if self.weight is None else self.weight
        weight = weight.to(self.target.device, torch.float64)
        return weight / weight.sum()

    def to(self, device: torch.device) -> Samples:
        """The same on a device."""
        weight = None if self.weight is None else self.weight.to(device)
        return Samples(self.codes.to(device), self.target.to(device), weight)


#: Rows that a bag trains on, and those that it holds out, by number; ``None``: it holds none out.
Split = tuple[Tensor, Tensor | None]


#: Begins a pass over rows: parts of them, each with the rows of it that each bag trains on.
Chunks = Callable[[], Iterable[tuple[Samples, Sequence[Tensor]]]]


class Network(nn.Module):
    """All experts of a family on encoded rows.

    The last units of each expert in each layer, two for each output, are where it starts as a
    linear model. At first, no unit of a hidden layer reads those of another expert.

    Only the smallest subsets that hold a categorical column train its embedding: an expert depends
    on what it sees, through training, too.

    Args:
        encoder: What encodes the rows.
        family: Its groups are those of the encoder.
        shape: Hidden units of an expert in a layer, those of the one that sees all, and layers.
        outputs: Classes; ``None`` for one logit or number.
        seed: Of the first weights.
    """

    def __init__(
        self,
        encoder: Encoder,
        family: SubsetFamily,
        shape: tuple[int, int, int],
        outputs: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.shape = shape
        units, top_units, layers = shape
        linear = 2 * (outputs or 1)
        widths = [
            linear + (top_units if len(members) == family.num_groups else units)
            for members in family.subsets.values()
        ]
        #: For each expert, where its units end in each hidden layer.
        self.ends = [*itertools.accumulate(widths)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.experts = InterpretableMLP(
                family,
                [widths] * layers,
                "relu",
                outputs=outputs,
                input_layout=family.input_layout(widths, strict=True),
            )
            for layer in self.masked_layers[1:-1]:
                self._begin_apart(layer, widths)
            torch.manual_seed(0)  # all bags begin with the same embeddings
            tables = []
            for column in encoder.tables:
                table = torch.eye(column.rows, column.width)
                if column.rows != column.width:
                    table = torch.randn(column.rows, column.width) / math.sqrt(column.width)
                table[[UNSEEN, MISSING]] = 0
                tables.append(nn.Parameter(table))
            self.tables = nn.ParameterList(tables)

    @property
    def masked_layers(self) -> list[MaskedLinear]:
        """Of the experts, the first one first."""
        layers = self.experts.layers
        return [layers[k] for k in range(len(layers))]

    @staticmethod
    @torch.no_grad()
    def _begin_apart(layer: MaskedLinear, widths: Sequence[int]) -> None:
        """First weights as if each expert were a network of its own."""
        weight = torch.zeros_like(layer.dense_weight())
        for end, width in zip(itertools.accumulate(widths), widths, strict=True):
            own = weight[end - width : end, end - width : end]
            nn.init.kaiming_uniform_(own, nonlinearity="relu")
        layer.weight.copy_(layer.layout.pack(weight))

    def forward(self, codes: Codes) -> Tensor:
        """Logits ``(rows, H)`` or ``(rows, H, outputs)``."""
        logits: Tensor = self.experts(self.encoder.inputs(codes, [*self.tables]))
        return logits

    @torch.no_grad()
    def joined(self, codes: Codes) -> Tensor:
        """What the experts read, side by side: ``(rows, family.in_features)``."""
        return self.encoder.inputs(codes, [*self.tables]).joined()

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
    kept: Tensor,
    kind: str,
    batch_size: int,
    generator: torch.Generator,
    before_step: Callable[[], None] = lambda: None,
) -> None:
    """One pass over the rows ``kept``, in an order that ``generator`` draws."""
    count = len(kept)
    order = kept[torch.randperm(count, generator=generator).to(kept.device)]
    for rows in order.tensor_split(max(1, round(count / batch_size))):
        before_step()
        optimizer.zero_grad()
        network.loss(samples.taken(rows), kind).backward()
        optimizer.step()


class _Bag:
    """A network while it learns.

    Attributes:
        network: Which Adam moves.
        average: A copy that follows it: what is looked at and kept, for Adam's steps scatter.
    """

    def __init__(self, network: Network, pace: Pace, steps: int, seed: int) -> None:
        self.network, self.pace, self.steps, self.done = network, pace, steps, 0
        self.optimizer = optimizer_of(network, pace)
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(_MEMORY))
        self.average.update_parameters(network)
        self.generator = torch.Generator().manual_seed(seed)

    def learn(self, samples: Samples, rows: Tensor, kind: str) -> None:
        """One pass over these rows."""
        todo = samples, rows, kind, self.pace.batch_size, self.generator, self._before_step
        run_epoch(self.network, self.optimizer, *todo)

    def _before_step(self) -> None:
        if self.done % _AVERAGED_EVERY == 0:
            self.average.update_parameters(self.network)
        wave = 0.5 + 0.5 * math.cos(math.pi * min(1, self.done / self.steps))
        self.done += 1
        rate = self.pace.learning_rate * wave * min(1, self.done / _WARM_UP)
        self.optimizer.param_groups[0]["lr"] = rate

    @torch.no_grad()
    def losses(self, samples: Samples, kind: str, experts: slice) -> Tensor:
        """Of some of the average's experts, on each row: ``(rows, experts)``, float64."""
        answers: Tensor = self.average.module(samples.codes)[:, experts].double()
        return losses_of(answers, samples.target, kind)

    def state(self) -> dict[str, Tensor]:
        """A copy of the average's parameters."""
        return {name: value.clone() for name, value in self.average.module.state_dict().items()}


def look_at_constant(held: Sequence[Samples], answer: Tensor, kind: str) -> Look:
    """At an expert that sees nothing, and answers ``(K,)`` (in log-odds for classes)."""
    answer = (answer / 2 if kind == "binary" else answer).double()
    losses = []
    for rows in held:
        answers = answer.to(rows.target.device).expand(len(rows.codes), 1, -1)
        answers = answers if kind == "multiclass" else answers[..., 0]
        losses.append(losses_of(answers, rows.target, kind)[:, 0])
    return Look(losses, [rows.shares() for rows in held])


def _passes(
    bags: Sequence[_Bag],
    chunks: Chunks,
    steps: int,
    epochs: int,
    kind: str,
    told: Callable[[int, int], None],
) -> Iterator[None]:
    """Train all bags side by side; stop for a look now and then, first before any step."""
    every = max(1, _LOOK_EVERY // steps)
    for epoch in range(epochs + 1):
        for samples, kept in chunks() if epoch else ():
            for bag, rows in zip(bags, kept, strict=True):
                bag.learn(samples, rows, kind)
        if epoch % every == 0 or epoch == epochs:
            told(epoch, epochs)
            yield


def _looks(
    bags: Sequence[_Bag],
    held: Sequence[Samples],
    weights: Sequence[Tensor],
    kind: str,
    experts: slice,
) -> list[Look]:
    """A look at each of some experts."""
    losses = [bag.losses(rows, kind, experts) for bag, rows in zip(bags, held, strict=True)]
    return [Look(own, weights) for own in zip(*(one.unbind(1) for one in losses), strict=True)]


def best_looks(
    networks: Sequence[Network],
    chunks: Chunks,
    steps: int,
    held: Sequence[Samples],
    kind: str,
    pace: Pace,
    seed: int,
) -> list[Look]:
    """Train all bags side by side, in place, and watch each expert by itself.

    Args:
        networks: One a bag.
        chunks: As for :func:`train`.
        steps: Of a pass, about.
        held: What each bag holds out.
        kind: Of the loss.
        pace: Its ``max_epochs`` is a number; training ends early when no expert gets better.
        seed: Of the order of the rows.

    Returns:
        For each expert, the look at which it loses least; the first, before any step, if that is
        not clearly better.
    """
    epochs = pace.max_epochs or _EPOCHS
    bags = [_Bag(one, pace, epochs * steps, seed + k) for k, one in enumerate(networks)]
    weights = [rows.shares() for rows in held]
    watches: list[Watch] = []
    for _ in _passes(bags, chunks, steps, epochs, kind, lambda epoch, epochs: None):
        looks = _looks(bags, held, weights, kind, slice(None))
        if not watches:
            watches = [Watch(look) for look in looks]
            continue
        for watch, look in zip(watches, looks, strict=True):
            watch.sees(look)
        if all(watch.stale >= pace.patience for watch in watches):
            break
    return [watch.chosen for watch in watches]


def default_epochs(steps: int, blind: bool) -> int:
    """How many passes of so many steps are made at the most, where nothing else is said."""
    fewest = -(-(_BLIND_STEPS if blind else _STEPS) // steps)
    return max(_FEWEST_EPOCHS, fewest, min(_EPOCHS, _MOST_STEPS // steps))


def train(
    networks: Sequence[Network],
    chunks: Chunks,
    steps: int,
    held: Sequence[Samples | None],
    kind: str,
    pace: Pace,
    seed: int,
    told: Callable[[int, int], None] = lambda epoch, epochs: None,
) -> list[list[float]]:
    """Train all bags side by side, in place; keep the weights with the best held-out loss.

    That is the loss of the expert that sees all, in the mean over the bags: of few rows, a bag
    alone holds out too few to tell when to stop. The networks as they come stay as they are if
    that is not clearly better (by one standard error) than what they lose.

    Args:
        networks: One a bag.
        chunks: Begins a pass over the rows: parts of them, and for each bag the rows of a part that
            it trains on.
        steps: Of a pass, about.
        held: What each bag holds out; if one holds nothing out, all epochs are run.
        kind: Of the loss.
        pace: See there.
        seed: Of the order of the rows.
        told: Is told of each look: epochs done, epochs at the most.

    Returns:
        For each bag, the loss of its held-out rows at each look; the first before any step.
    """
    looked_at = [rows for rows in held if rows is not None]
    weights = [rows.shares() for rows in looked_at]
    blind = len(looked_at) < len(held)
    epochs = pace.max_epochs or default_epochs(steps, blind)
    bags = [_Bag(one, pace, epochs * steps, seed + k) for k, one in enumerate(networks)]
    history: list[list[float]] = [[] for _ in bags]
    states = unmoved = [bag.state() for bag in bags]
    top, watch = top_expert(networks[0].experts.family), None
    for _ in _passes(bags, chunks, steps, epochs, kind, told):
        if blind:
            continue
        (look,) = _looks(bags, looked_at, weights, kind, slice(top, top + 1))
        for losses, mean in zip(history, look.means(), strict=True):
            losses.append(mean)
        if watch is None:
            watch = Watch(look)
        elif watch.sees(look):
            states = [bag.state() for bag in bags]
        elif watch.stale >= pace.patience:
            break
    if watch is not None and watch.chosen is watch.first:
        states = unmoved
    for bag, state in zip(bags, states, strict=True):
        bag.network.load_state_dict(bag.state() if blind else state)
        bag.network.settle()
    return history
