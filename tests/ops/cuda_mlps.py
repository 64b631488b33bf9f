"""MLPs to run the CUDA kernels on, and their definition: layers of dense algebra in float64."""

import itertools
from dataclasses import dataclass, field, replace

import torch

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import serialized_layout
from maskmoe_kernels.ops.selection.samples import weighted
from maskmoe_kernels.testing.oracle import dense_algebra


@dataclass(frozen=True)
class Mlp:
    """A family with its layers and drawn parameters."""

    family: mk.SubsetFamily
    layouts: list
    parts: list
    activation: str
    weights: list
    biases: list
    x: torch.Tensor | None
    tables: list = field(default_factory=list)
    ids: list = field(default_factory=list)
    device: str = "cpu"  # where the ops run: "cpu" is the host emulator; tensors stay here

    @property
    def leaves(self):
        """x if it is there, tables, weights, biases: in the order of the gradients."""
        x = [] if self.x is None else [self.x]
        return [*x, *self.tables, *self.weights, *self.biases]

    def with_leaves(self, leaves):
        """This MLP with other values in the order of ``leaves``."""
        left = list(leaves)
        x = None if self.x is None else left.pop(0)
        counts = [len(self.tables), len(self.weights), len(self.biases)]
        lists = [[left.pop(0) for _ in range(count)] for count in counts]
        return replace(self, x=x, tables=lists[0], weights=lists[1], biases=lists[2])

    def to(self, dtype):
        return self.with_leaves([t.detach().to(dtype) for t in self.leaves])

    def inputs(self):
        """The parts side by side, ``(*, in_features)``."""
        columns, at = [], 0
        for part in self.parts:
            if part < 0:
                columns.append(self.x[..., at : at - part])
                at -= part
            else:
                columns.append(self.tables[part][self.ids[part]])
        return torch.cat(columns, dim=-1)

    def dense(self):
        """Logits by plain PyTorch, layer by layer, in the dtype of the parameters."""
        h = self.inputs()
        for k, layout in enumerate(self.layouts):
            bias = self.biases[k] if self.biases else None
            last = k + 1 == len(self.layouts)
            h = dense_algebra(h, self.weights[k], bias, layout, None if last else self.activation)
        return h

    def on_device(self, value):
        """Tensors, and lists of them, on the device of the ops."""
        if isinstance(value, (list, tuple)):
            return [self.on_device(one) for one in value]
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    @property
    def ops(self):
        return torch.ops.maskmoe_host_emulator if self.device == "cpu" else torch.ops.maskmoe

    def arguments(self):
        """The arguments that every op takes."""
        serialized = [
            serialized_layout(layout, torch.device(self.device)) for layout in self.layouts
        ]
        ids = [layout.id for layout in self.layouts]
        given = (self.x, self.tables, self.ids, self.parts, self.weights, self.biases)
        return (*self.on_device(given), serialized, ids, self.activation)

    def forward(self):
        *inputs, activation = self.arguments()
        experts = self.family.num_experts
        return self.ops.masked_mlp(*inputs, experts, activation, False)[0].cpu()

    def backward(self, cotangent, needs=(True, True, True)):
        """Gradients in the order of ``leaves``, those that are needed."""
        *inputs, serialized, layout_ids, activation = self.arguments()
        saved = inputs[4][0].new_empty(0)
        cotangent = self.on_device(cotangent)
        grads = self.ops.masked_mlp_backward(
            cotangent, *inputs, saved, serialized, layout_ids, activation, *needs
        )
        return [grad.cpu() for grad in grads]

    def gem(
        self,
        target,
        mask=None,
        confidence="abs",
        sharpness=1.0,
        weighting="selection",
        normalize=None,
        needs=(True, True, True),
        sample_weight=None,
    ):
        """Loss and gradients."""
        strict, normalize = self.family.strict, normalize or "none"
        mask, times = weighted(mask, sample_weight)
        times = None if times is None else times.float()
        samples = self.on_device((target, mask, times, strict))
        options = (confidence, sharpness, weighting, normalize)
        loss, *grads = self.ops.masked_mlp_gem(*self.arguments(), *samples, *options, *needs)
        return loss.cpu(), [grad.cpu() for grad in grads]

    def mixture(self, confidence="abs", sharpness=1.0):
        """Probability, alpha and shares."""
        strict = self.on_device(self.family.strict)
        found = self.ops.masked_mlp_mixture(*self.arguments(), strict, confidence, sharpness)
        return [value.cpu() for value in found]

    def dense_gem(self, target, **options):
        """The same in two steps, with autograd."""
        leaves = [t.detach().clone().requires_grad_() for t in self.leaves]
        logits = self.with_leaves(leaves).dense()
        loss = mk.gem_loss(logits, target, self.family, **options)
        return loss.detach(), torch.autograd.grad(loss, leaves, materialize_grads=True)

    def dense_backward(self, cotangent):
        leaves = [t.detach().clone().requires_grad_() for t in self.leaves]
        logits = self.with_leaves(leaves).dense()
        return torch.autograd.grad(logits, leaves, cotangent, materialize_grads=True)

    def magnitudes(self, cotangent):
        """Sums of the absolute values behind the logits and behind each gradient, float64.

        A derivative of an activation counts as 1.2, plus what the rounding of its argument adds.
        """
        leaves = [t.detach().double().abs().requires_grad_() for t in self.leaves]
        of = self.with_leaves(leaves)
        h = of.inputs()
        for k, layout in enumerate(self.layouts):
            bias = of.biases[k] if of.biases else None
            h = dense_algebra(h, of.weights[k], bias, layout)
            if k + 1 < len(self.layouts) and self.activation != "none":
                square = h * h / 2
                h = 1.2 * h + (square - square.detach())
        grads = torch.autograd.grad(h, leaves, cotangent.double().abs(), materialize_grads=True)
        return h.detach(), grads


def draw(family, hidden, rows, activation="relu", dtype=torch.float32, *, bias=True, seed=0,
         parts=None, input_layout=None):  # fmt: skip
    """An MLP with random parameters.

    Args:
        rows: An int, or the leading shape.
        parts: As the ops take them; a table part is ``(rows of the table, width)``. None: all
            features are x's.
        input_layout: Of the first layer; None: ``family.input_layout(hidden[0])``.
    """
    generator = torch.Generator().manual_seed(seed)
    leading = (rows,) if isinstance(rows, int) else tuple(rows)

    def normal(*shape, scale=1.0):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype)

    widths = [*hidden, 1]
    layouts = [family.input_layout(widths[0]) if input_layout is None else input_layout]
    layouts += [family.hidden_layout(a, b) for a, b in itertools.pairwise(widths)]
    weights, biases = [], []
    for layout in layouts:
        fan_in = torch.tensor(layout.row_fan_in).clamp(min=1).double()
        scale = torch.cat([
            (1 / fan).sqrt().repeat(units * count)
            for fan, units, count in zip(fan_in, layout.row_sizes, layout.row_fan_in, strict=True)
        ])  # fmt: skip
        weights.append((normal(layout.num_weights).double() * scale).to(dtype))
        if bias:
            biases.append(normal(layout.out_features, scale=0.3))
    parts = [-family.in_features] if parts is None else parts
    numbers, tables, ids, columns = [], [], [], 0
    for part in parts:
        if isinstance(part, int):
            numbers.append(part)
            columns -= part
        else:
            numbers.append(len(tables))
            tables.append(normal(*part))
            ids.append(torch.randint(part[0], leading, generator=generator))
    x = normal(*leading, columns) if columns else None
    return Mlp(family, layouts, numbers, activation, weights, biases, x, tables, ids)


def assert_close_to_reference(name, ours, plain, reference, magnitude, layers, kinked, eps=None):
    """|ours - ref| <= 2 |PyTorch - ref| + the rounding errors of the sums.

    Element by element; with kinks (relu) by norm: where rounding decides the sign of a unit, all of
    its gradient changes, in PyTorch too. eps: of a rounding; None: of the dtype.
    """
    assert ours.shape == reference.shape, (name, ours.shape, reference.shape)
    if not ours.numel():
        return
    info = torch.finfo(plain.dtype)
    tiny, eps = info.smallest_normal * info.eps * 8, eps or info.eps
    error, allowed = (ours.double() - reference).abs(), (plain.double() - reference).abs() * 2
    floor = torch.where(magnitude == 0, 0.0, magnitude * eps * 4 * layers + tiny)
    assert (ours[(magnitude == 0).expand_as(ours)] == 0).all(), f"{name}: structural zeros"
    if kinked:
        norm = torch.linalg.vector_norm
        assert norm(error) <= norm(allowed) + norm(floor), (name, norm(error), norm(allowed))
        return
    worst = (error - allowed - floor).max()
    assert worst <= 0, (name, float(worst), float(error.max()), float(reference.abs().max()))
