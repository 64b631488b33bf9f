"""Masked MLPs and batches, drawn for a case of ``tests.fuzz.mlp``.

MLPs come from a pool that the seed draws; a case takes a copy of one, on the same layouts, and
gives it numbers of its own.
"""

import copy
import itertools
from functools import cached_property, lru_cache

import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops.masked_mlp.call import Inputs
from tests.fuzz.cases import (
    OF_BFLOAT16,
    WIDTHS,
    Draw,
    as_view,
    draw_family,
    draw_isa,
    on_threads,
)
from tests.fuzz.definition import Definition, DenseLayer, sum_rounding

POOL = 250
ACTIVATIONS = ("relu", "relu", "leaky_relu", "gelu", "tanh", "silu", None)
DTYPES = (torch.float32,) * 6 + (torch.bfloat16,) * 2 + (torch.float16,) * 3 + (torch.float64,)
BACKENDS = (None,) * 8 + ("native", "torch", "reference")


class Pooled:
    """An MLP, and what its definition looks up."""

    def __init__(self, draw):
        self.family = family = draw_family(draw)
        experts, hidden = family.num_experts, []
        for _ in range(draw.upto(3)):
            hidden.append(draw.sizes(experts, WIDTHS) if draw.chance(0.5) else draw.upto(9, 1))
        self.activation = draw.pick(ACTIVATIONS)
        first = family.input_layout(hidden[0] if hidden else 1, strict=draw.chance(0.3))
        self.net = mk.InterpretableMLP(family, hidden, self.activation, input_layout=first)
        layouts, bias = self.net.layers.layouts, draw.chance(0.85)
        #: Does a loss move its own expert alone?
        self.isolated = not draw.chance(0.15)
        if not self.isolated:
            layouts = [mk.BlockLayout(of.row_sizes, of.col_sizes, of.present) for of in layouts]
        if not (bias and self.isolated):
            self.net.layers = mk.MaskedMLP(layouts, self.activation, bias)
        self.dense = [DenseLayer(layout) for layout in layouts]


@lru_cache(maxsize=2 * POOL)
def pooled(seed, index):
    """Number ``index`` of the pool of ``seed``."""
    return Pooled(Draw(seed, index, stream=1))


class Case:
    """An MLP and a batch for it."""

    def __init__(self, seed, number):
        self.draw = draw = Draw(seed, number)
        fresh = draw.upto(2**31)
        draw_isa(draw, but=OF_BFLOAT16)  # these round between layers: test_mlp_bfloat16.py
        self.of = pooled(seed, draw.upto(POOL - 1))
        torch.default_generator.manual_seed(
            fresh
        )  # of layers; after the pool, which may make its own
        self.family = self.of.family
        self.dtype, self.backend = draw.pick(DTYPES), draw.pick(BACKENDS)
        if self.dtype == torch.float64 and self.backend == "native":
            self.backend = None
        self.net = copy.deepcopy(self.of.net).to(self.dtype)
        for layer in self.net.layers:
            layer.backend = self.backend
        self._fill()
        self.shape = self._leading()
        self.threads = draw.pick((1, 2, 4)) if sum(self.shape) > 50 else 1
        self.repeats = 4 if self.threads > 1 else 1  # a race shows now and then
        self.x, self.tables, self.ids, self.order = self._parts()
        self.leaves = self._leaves()

    def __str__(self):
        units = [list(layer.layout.row_sizes) for layer in self.net.layers]
        how = self.net.layers.unsupported_reason() or "as one op"
        return (
            f"{self.dtype}, {self.of.activation}, batch {tuple(self.shape)}, parts {self.order}, "
            f"{self.threads} threads, {how}, units {units}, {self.family!r}"
        )

    def _leading(self):
        if self.draw.chance(0.03):
            return (self.draw.pick((130, 700, 4000, 6000)),)
        rows = self.draw.pick((0, 1, 2, 3, 7, 8, 9, 16, 33, 60))
        return self.draw.pick(((rows,), (rows,), (rows,), (2, 3), (3, 1, 2)))

    def _fill(self):
        """Weights as they are made, and much larger or smaller; experts that are sure at once."""
        draw, layers = self.draw, [*self.net.layers]
        scale = draw.pick((1.0,) * 6 + (0.01, 3.0, 30.0, 1e3, 1e4))
        with torch.no_grad():
            for layer in layers:
                layer.reset_parameters()
                layer.weight.mul_(scale if draw.chance(0.5) else 1.0)
                if draw.chance(0.05):
                    layer.weight.zero_()
            if layers[-1].bias is not None and draw.chance(0.3):
                sure = draw.normal(self.family.num_experts) * draw.pick((3.0, 20.0, 50.0, 100.0))
                sure *= draw.flags(self.family.num_experts)
                layers[-1].bias.add_(sure.to(self.dtype))

    def _parts(self):
        """The input cut into columns and embeddings, or whole."""
        draw, width = self.draw, self.family.in_features
        scale = draw.pick((1.0, 1.0, 1.0, 0.0, 1e-3, 10.0))
        if not draw.chance(0.35 if sum(self.shape) < 1000 else 0.7):
            x = (scale * draw.normal(*self.shape, width)).to(self.dtype)
            return as_view(draw, x), [], [], [-width]
        cuts = sorted({0, width, *(draw.upto(width) for _ in range(draw.upto(3)))})
        tables, ids, order, columns = [], [], [], 0
        for size in (b - a for a, b in itertools.pairwise(cuts)):
            if draw.chance(0.3):
                order.append(-size)
                columns += size
                continue
            rows = draw.pick((1, 2, 5, 40))
            order.append(len(tables))
            tables.append(as_view(draw, draw.normal(rows, size).to(self.dtype)))
            ids.append(torch.from_numpy(draw.bits.integers(0, rows, self.shape)))
        places = [int(p) for p in draw.order(len(tables))]  # tables in any order
        order = [places[p] if p >= 0 else p for p in order]
        sorted_by = [places.index(t) for t in range(len(tables))]
        x = as_view(draw, draw.normal(*self.shape, columns).to(self.dtype)) if columns else None
        return x, [tables[t] for t in sorted_by], [ids[t] for t in sorted_by], order

    def _leaves(self):
        """(name, tensor) of what may have a gradient; some have none."""
        draw = self.draw
        given = [("x", self.x)] if self.x is not None else []
        given += [(f"tables[{t}]", table) for t, table in enumerate(self.tables)]
        for k, (name, tensor) in enumerate(given):
            given[k] = name, tensor.detach().requires_grad_(draw.chance(0.6))
        self.x = given[0][1] if self.x is not None else None
        self.tables = [tensor for name, tensor in given if name != "x"]
        frozen = 0.3 if draw.chance(0.2) else 0.0
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(not draw.chance(frozen))
            given.append((name, parameter))
        return given

    @property
    def wanted(self):
        """Names and tensors that ask for a gradient."""
        return [(name, tensor) for name, tensor in self.leaves if tensor.requires_grad]

    @property
    def input(self):
        """For the MLP: a tensor, or parts."""
        if not self.tables:
            return self.x
        return Inputs(self.x, self.tables, self.ids, self.order)

    @cached_property
    def joined(self):
        """All columns, ``(rows, in)``, float64."""
        parts = Inputs(self.x, self.tables, self.ids, self.order)
        return parts.joined().detach().double().reshape(-1, self.family.in_features)

    @property
    def one_op(self):
        return self.net.layers.fused(self.input) is not None

    def define(self, x=None):
        """The definition on ``x`` (the input), finite, with roundings of where it is computed."""
        layers = [*self.net.layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        inside = torch.float32 if self.one_op else self.dtype
        return Definition(
            self.of.dense, [layer.weight for layer in layers], biases, self.of.activation,
            self.joined if x is None else x, torch.finfo(inside).eps,
        )  # fmt: skip

    def gradients(self, definition, cotangent, off):
        """By name: (value, bound) of everything that may have a gradient."""
        (x, x_off), *rest = definition.gradients(cotangent, off)
        found = {}
        depth, start = len(self.of.dense), 0
        for k in range(depth):
            found[f"layers.{k}.weight"] = rest[k]
            found[f"layers.{k}.bias"] = rest[depth + k]
        columns = []
        for part in self.order:
            width = -part if part < 0 else self.tables[part].shape[1]
            here = slice(start, start + width)
            start += width
            if part < 0:
                columns.append((x[:, here], x_off[:, here]))
                continue
            rows, zero = self.ids[part].reshape(-1), torch.zeros(self.tables[part].shape).double()
            value, size, bound = (
                zero.index_add(0, rows, of[:, here]) for of in (x, x.abs(), x_off)
            )
            rounding = sum_rounding(len(rows), torch.finfo(self.dtype).eps)
            found[f"tables[{part}]"] = value, bound + rounding * size
        if columns:
            value, bound = (torch.cat(of, 1) for of in zip(*columns, strict=True))
            found["x"] = value.view(self.x.shape), bound.view(self.x.shape)
        return found

    def run(self, make, cotangent, threads=None):
        """``make()`` and its gradients by name; ``cotangent`` may be None where nothing has one."""
        with on_threads(self.threads):
            value = make()
        wanted = self.wanted
        if value.requires_grad != bool(wanted):
            raise AssertionError(f"requires_grad is {value.requires_grad}")
        grads = {}
        if wanted:
            with on_threads(threads or self.threads):
                found = torch.autograd.grad(value, [t for _, t in wanted], cotangent)
            grads = {name: grad for (name, _), grad in zip(wanted, found, strict=True)}
        return value.detach(), grads
