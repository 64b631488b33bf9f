"""The CUDA kernels of the fused networks on the host: compiled by g++, warps taking turns.

Also networks to run them on, and what they should compute: layers of the float64 definition.
"""

import functools
import hashlib
import itertools
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import serialized_layout
from maskmoe_kernels.testing.oracle import dense_algebra

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
SOURCES = ("plan.cpp", "cuda/network.cpp", "cuda/room.cpp", "cuda/twin.cc")
SHARED = 227 * 1024  # bytes a block may have on an H200


def command():
    """What compiles the twin, without its output. CXX and CXXFLAGS are honoured."""
    return [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O1", "-fPIC", "-shared", "-w",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{CSRC}",
        "-isystem", str(TORCH / "include"), *shlex.split(os.environ.get("CXXFLAGS", "")),
        *(str(CSRC / name) for name in SOURCES),
        f"-L{TORCH / 'lib'}", "-ltorch_cpu",
    ]  # fmt: skip


@functools.cache
def obstacle():
    """Why there is no twin, or None; compiles it where its sources have changed."""
    call = command()
    if shutil.which(call[0]) is None:
        return f"no {call[0]} to compile the twin with"
    if not CSRC.is_dir():
        return f"no sources in {CSRC}: the suite runs against an installed wheel"
    sources = sorted([*CSRC.glob("plan.*"), *CSRC.glob("*.h"), *(CSRC / "cuda").iterdir()])
    key = hashlib.sha256(repr((call, torch.__version__)).encode())
    for source in sources:
        key.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"maskmoe-twin-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        return f"{folder} belongs to somebody else"
    library = folder / f"twin-{key.hexdigest()[:16]}.so"
    if not library.exists():
        draft = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*call, "-o", str(draft)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the twin does not compile:\n{done.stderr[:4000]}")
        draft.replace(library)
    torch.ops.load_library(str(library))
    return None


def configure(blocks=3, processors=1, shared=SHARED, backwards=False):
    """Sets how many blocks run, on how many processors, and in which order threads do."""
    torch.ops.maskmoe_twin.configure(blocks, processors, shared, backwards)


@dataclass(frozen=True)
class Network:
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
    device: str = "cpu"  # where the ops run, on the twin or on a GPU; tensors stay on the CPU

    @property
    def leaves(self):
        """x if it is there, tables, weights, biases: in the order of the gradients."""
        x = [] if self.x is None else [self.x]
        return [*x, *self.tables, *self.weights, *self.biases]

    def with_leaves(self, leaves):
        """This network with other values in the order of ``leaves``."""
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

    def there(self, value):
        """Tensors, and lists of them, on the device of the ops."""
        if isinstance(value, (list, tuple)):
            return [self.there(one) for one in value]
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    @property
    def ops(self):
        return torch.ops.maskmoe_twin if self.device == "cpu" else torch.ops.maskmoe

    def arguments(self):
        """What every op takes."""
        plans = [serialized_layout(layout, torch.device(self.device)) for layout in self.layouts]
        ids = [layout.id for layout in self.layouts]
        given = (self.x, self.tables, self.ids, self.parts, self.weights, self.biases)
        return (*self.there(given), plans, ids, self.activation)

    def forward(self):
        *inputs, activation = self.arguments()
        experts = self.family.num_experts
        return self.ops.masked_mlp(*inputs, experts, activation, False)[0].cpu()

    def backward(self, cotangent, needs=(True, True, True)):
        """Gradients in the order of ``leaves``, those that are needed."""
        *inputs, plans, layouts, activation = self.arguments()
        saved = inputs[4][0].new_empty(0)
        cotangent = self.there(cotangent)
        grads = self.ops.masked_mlp_backward(
            cotangent, *inputs, saved, plans, layouts, activation, *needs
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
    ):
        """Loss and gradients."""
        strict, normalize = self.family.strict, normalize or "none"
        samples = self.there((target, mask, strict))
        options = (confidence, sharpness, weighting, normalize)
        loss, *grads = self.ops.masked_mlp_gem(*self.arguments(), *samples, *options, *needs)
        return loss.cpu(), [grad.cpu() for grad in grads]

    def mixture(self, confidence="abs", sharpness=1.0):
        """Probability, alpha and shares."""
        strict = self.there(self.family.strict)
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

        Slopes are counted as 1.2 plus what their argument's rounding adds.
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
    """A network with random parameters.

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
    return Network(family, layouts, numbers, activation, weights, biases, x, tables, ids)


def hold(name, ours, plain, reference, magnitude, layers, kinked, eps=None):
    """|ours - ref| <= 2 |PyTorch - ref| + roundings of what is added up.

    Element by element; with kinks (relu) by norm, as a unit whose sign is luck changes all of
    its gradient, in PyTorch too. eps: of a rounding; None: of the dtype.
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
