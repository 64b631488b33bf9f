"""MLPs that the fused kernels are tested on, and what holds for all of them."""

import itertools
from dataclasses import replace

import torch

import maskmoe_kernels as mk
from maskmoe_kernels.testing.oracle import dense_algebra
from tests.ops.cuda_mlps import assert_close_to_reference, draw
from tests.ops.host_emulator import configure

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "relu", "leaky_relu", "gelu", "tanh", "silu")
CONFIDENCES = ("abs", "square", "smooth", "rare")
NORMALIZE = (None, "sample", "expert", "batch")

TOY = mk.SubsetFamily({"a": 2, "b": 3}, {"a": ["a"], "b": ["b"], "ab": ["a", "b"]})
PRIOR = mk.SubsetFamily(
    {"a": 3, "b": 20, "c": 1},
    {"prior": [], "a": ["a"], "abc": ["a", "b", "c"], "ab": ["a", "b"], "c": ["c"]},
)
POWER = mk.SubsetFamily.powerset({"a": 16, "b": 17, "c": 1})
CHAIN = mk.SubsetFamily(
    {"a": 5, "b": 33, "c": 16}, {"abc": ["a", "b", "c"], "a": ["a"], "ab": ["a", "b"]}
)
MANY = mk.SubsetFamily.powerset({"a": 2, "b": 1, "c": 3, "d": 1, "e": 2})
EIGHT = mk.SubsetFamily(
    {f"g{n}": width for n, width in enumerate([7, 20, 3, 16, 40])},
    {
        "0": ["g0"], "1": ["g1"], "2": ["g2", "g3"], "3": ["g0", "g1"], "4": ["g4"],
        "5": ["g0", "g1", "g4"], "6": ["g2", "g3", "g4"], "7": ["g0", "g1", "g2", "g3", "g4"],
    },
)  # fmt: skip
NCF = mk.SubsetFamily(
    {"content": 24, "user": 32, "item": 32},
    {
        "content": ["content"], "user": ["content", "user"], "item": ["content", "item"],
        "all": ["content", "user", "item"],
    },
)  # fmt: skip


def permuted():
    """A layout whose columns are permuted: groups that lie interleaved in x."""
    generator = torch.Generator().manual_seed(5)
    plain = POWER.input_layout([16, 5, 33, 1, 16, 20, 7])
    order = torch.randperm(POWER.in_features, generator=generator)
    return mk.BlockLayout(plain.row_sizes, plain.col_sizes, plain.present, col_order=order)


MLPS = {
    "toy": lambda rows, *a, **k: draw(TOY, [16, 16], rows, *a, **k),
    "ragged": lambda rows, *a, **k: draw(PRIOR, [[5, 16, 17, 40, 1], 16], rows, *a, **k),
    "chain": lambda rows, *a, **k: draw(CHAIN, [33, [1, 2, 3], 16], rows, *a, **k),
    "powerset": lambda rows, *a, **k: draw(POWER, [16, 32], rows, *a, **k),
    "eight": lambda rows, *a, **k: draw(EIGHT, [16, 16, 16], rows, *a, **k),
    "many": lambda rows, *a, **k: draw(MANY, [8], rows, *a, **k),
    "no hidden": lambda rows, *a, **k: draw(PRIOR, [], rows, *a, **k),
    "ncf": lambda rows, *a, **k: draw(
        NCF, [32, 16], rows, *a, parts=[(2, 2), (9, 6), -16, (40, 32), (300, 32)], **k
    ),
    "strict": lambda rows, *a, **k: draw(
        NCF, [16, 8], rows, *a, parts=[-24, (5, 32), (7, 32)],
        input_layout=NCF.input_layout(16, strict=True), **k
    ),
    "permuted": lambda rows, *a, **k: draw(
        POWER, [[16, 5, 33, 1, 16, 20, 7], 16], rows, *a, parts=[-10, (6, 9), -15],
        input_layout=permuted(), **k
    ),
}  # fmt: skip


def away_from_kinks(net):
    """The same MLP in float32 without rows that have a unit too near to a kink of relu.

    There rounding decides the sign, which changes all of a row's gradient. Such rows are replaced
    by copies of one that has no such unit. In 16 bits the bounds are wide enough for them.
    """
    if net.activation not in ("relu", "leaky_relu") or net.weights[0].dtype != torch.float32:
        return net
    exact = net.to(torch.float64)
    h, magnitude = exact.inputs(), exact.inputs().abs()
    near = torch.zeros(h.shape[:-1], dtype=torch.bool)
    for k, layout in enumerate(exact.layouts[:-1]):
        bias = exact.biases[k] if exact.biases else None
        magnitude = dense_algebra(
            magnitude, exact.weights[k].abs(), None if bias is None else bias.abs(), layout
        )
        z = dense_algebra(h, exact.weights[k], bias, layout)
        near |= (z.abs() < 16 * torch.finfo(torch.float32).eps * magnitude).any(-1)
        h = dense_algebra(h, exact.weights[k], bias, layout, net.activation)
    assert near.float().mean() < 0.1, "a test of copies"
    source = torch.where(near, int((~near).nonzero()[0]), torch.arange(len(near)))
    x = None if net.x is None else net.x[source]
    return replace(net, x=x, ids=[part[source] for part in net.ids])


def cotangent_of(net, rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    leading = (rows,) if isinstance(rows, int) else rows
    shape = (*leading, net.family.num_experts)
    return torch.randn(shape, generator=generator).to(net.weights[0].dtype)


def names(net):
    return [
        *(["x"] if net.x is not None else []),
        *(f"table {n}" for n in range(len(net.tables))),
        *(f"weight {n}" for n in range(len(net.weights))),
        *(f"bias {n}" for n in range(len(net.biases))),
    ]


def check(net, rows):
    """The logits and every gradient, held to the definition."""
    cotangent = cotangent_of(net, rows)
    exact = net.to(torch.float64)
    magnitude, magnitudes = net.magnitudes(cotangent)
    layers, kinked = len(net.layouts), net.activation in ("relu", "leaky_relu")
    assert_close_to_reference(
        "logits", net.forward(), net.dense(), exact.dense(), magnitude, layers, False
    )
    ours = net.backward(cotangent)
    plain, reference = net.dense_backward(cotangent), exact.dense_backward(cotangent.double())
    for what in zip(names(net), ours, plain, reference, magnitudes, strict=True):
        assert_close_to_reference(*what, layers, kinked)


def targets(rows, seed=2):
    """Targets and a mask."""
    generator = torch.Generator().manual_seed(seed)
    return (
        (torch.rand(rows, generator=generator) < 0.4).float(),
        torch.rand(rows, generator=generator) < 0.7,
    )


def check_gem(net, target, **options):
    """Loss and gradients, held to autograd over exact logits."""
    loss, grads = net.gem(target, **options)
    reference, exact = net.to(torch.float64).dense_gem(target, **options)
    plain_loss, plain = net.dense_gem(target, **options)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    # The sum of the losses' absolute values is the loss: they are positive.
    eps = torch.finfo(net.weights[0].dtype).eps
    allowed = 2 * (plain_loss.double() - reference).abs() + 32 * eps * reference.abs() + 1e-7
    assert (loss.double() - reference).abs() <= allowed, (loss, reference)
    for name, ours, theirs, expected in zip(names(net), grads, plain, exact, strict=True):
        norm = torch.linalg.vector_norm
        assert ours.shape == expected.shape
        assert ours.dtype == torch.float32
        bound = 2 * norm(theirs.double() - expected) + 32 * eps * norm(expected) + 1e-12
        assert norm(ours.double() - expected) <= bound, (name, options)


def check_mixture(net, confidence="abs", sharpness=1.0):
    """Prediction, alpha and shares, held to the mixture of exact logits."""
    ours = net.mixture(confidence, sharpness)
    options = (net.family, confidence, sharpness)
    exact, plain = (mk.mixture(of.dense(), *options) for of in (net.to(torch.float64), net))
    eps = torch.finfo(net.weights[0].dtype).eps
    for name, a, b, t in zip(exact._fields, ours, plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == t.shape
        if t.numel():
            error, theirs = (a.double() - t).abs().max(), (b.double() - t).abs().max()
            assert error <= 2 * theirs + 32 * eps, (name, options[1:], error, theirs)


def check_own_logits(net, confidence="abs", sharpness=1.0):
    """The two-step form, float32: p - 0.3 cancels for "rare", everything else has its digits."""
    reference = mk.mixture(net.forward().double(), net.family, confidence, sharpness)
    floor = 1e-6 if confidence == "rare" else 1e-36
    for ours, exact in zip(net.mixture(confidence, sharpness), reference, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=floor)


def everything(net, rows):
    """All that the ops return."""
    target, mask = targets(rows)
    losses = [net.gem(target, mask, normalize=kind) for kind in ("sample", "expert")]
    objective = [value for loss, grads in losses for value in (loss, *grads)]
    return [net.forward(), *net.backward(cotangent_of(net, rows)), *objective, *net.mixture()]


def check_order(net, rows):
    """The same bits twice, with threads from last to first, and with twice as many warps."""
    configure(blocks=1)
    expected, found = everything(net, rows), [everything(net, rows)]
    for alone, reverse in itertools.product((False, True), repeat=2):
        configure(blocks=1, alone=alone, reverse=reverse)
        found.append(everything(net, rows))
    for again in found:
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def check_isolated(net, rows):
    """The gradient of one expert's logits moves its own parameters and no others."""
    for i in range(net.family.num_experts):
        cotangent = torch.zeros_like(cotangent_of(net, rows))
        cotangent[:, i] = cotangent_of(net, rows)[:, i]
        own = torch.zeros(net.family.num_experts, dtype=torch.bool)
        own[i] = True
        for what, grad in zip(names(net), net.backward(cotangent), strict=True):
            if what == "x":
                seen = net.layouts[0].mask()[net.layouts[0].row_offsets[i]]
                assert (grad[:, ~seen] == 0).all()
                assert grad[:, seen].any()
            else:
                compare_experts(net, what, grad, torch.zeros_like(grad), ~own)
                assert grad.any()


def check_blind(net, rows, fill):
    """Forward, backward, objective and selection keep their bits where a group is not seen."""
    family, at = net.family, 0
    logits, target = net.forward(), (torch.arange(rows) % 2).float()
    alpha = net.mixture()[1]
    cotangent = cotangent_of(net, rows)
    before = net.backward(cotangent), net.gem(target)[1]
    for n, width in enumerate(family.groups.values()):
        blind = ~family.membership[:, n]
        x = net.x.clone()
        x[:, at : at + width] = fill
        filled = net.with_leaves([x, *net.leaves[1:]])
        assert torch.equal(filled.forward()[:, blind], logits[:, blind])
        assert torch.equal(filled.mixture()[1][:, blind], alpha[:, blind])
        after = filled.backward(cotangent), filled.gem(target)[1]
        for a, b in zip(after, before, strict=True):
            for what, *pair in zip(names(net), a, b, strict=True):
                if what != "x":
                    compare_experts(net, what, *pair, blind)
        at += width


def compare_experts(net, what, a, b, experts):
    """The parameters' gradients of some experts are equal, bit for bit."""
    kind, layer = what.split()
    layout = net.layouts[int(layer)]
    if kind == "weight":
        bounds = list(itertools.pairwise(layout.weight_offsets))
    else:
        bounds = list(itertools.pairwise(layout.row_offsets))
    for i in experts.nonzero().flatten().tolist():
        assert torch.equal(a[slice(*bounds[i])], b[slice(*bounds[i])]), (what, i)
