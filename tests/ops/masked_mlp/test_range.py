"""The loss in one pass where numbers end: weights near zero, and a loss that is scaled."""

import copy
import itertools
import math

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.ops import native
from maskmoe_kernels.ops.masked_mlp.call import Inputs
from maskmoe_kernels.testing import dense_oracle
from tests.ops.masked_mlp.test_masked_mlp import CONFIDENCES, NORMALIZE, WEIGHTINGS, same_bits, step
from tests.ops.runners import OF_BFLOAT16

pytestmark = pytest.mark.skipif(
    native.UNSUPPORTED_REASON is not None, reason=f"{native.UNSUPPORTED_REASON}"
)

FAMILY = mk.SubsetFamily.powerset({"a": 3, "b": 2})
DENORMAL = 2.0**-149
#: What "a" leaves to "ab", down to denormals and to nothing at all.
LEFT = [1e-6, 1e-18, 1e-22, 1e-36, 1e-40, 3e-42, 0.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: How gradients come about: of weights alone, of weights and x, of experts that meet in a unit.
PATHS = ["own", "waits", "twice"]


def sure(left, dtype=torch.float32, hidden=(8, 4), isolated=True):
    """An MLP whose expert "a" is so sure that it leaves ``left`` of every sample."""
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, list(hidden), "tanh")
    with torch.no_grad():
        last = net.layers[-1]
        last.weight[: last.layout.weight_offsets[1]] = 0
        last.bias[0] = 60.0 if left == 0 else round(-4 * math.log(left / 2)) / 8
        last.bias[2] = -9
    if not isolated:
        layouts = [
            mk.BlockLayout(of.row_sizes, of.col_sizes, of.present) for of in net.layers.layouts
        ]
        other = mk.MaskedMLP(layouts, "tanh")
        other.load_state_dict(net.layers.state_dict(), strict=False)
        net.layers = other
    assert net.layers.unsupported_reason() is None
    return net.to(dtype)


def batch(rows, dtype=torch.float32):
    torch.manual_seed(rows)
    return torch.randn(rows, 5).to(dtype), torch.rand(rows).round(), torch.rand(rows) < 0.7


def in_float64(net, x, y, **options):
    """Loss and gradients by definition; x first."""
    leaves = [t.detach().double().requires_grad_() for t in (x, *net.parameters())]
    h, parameters = leaves[0], iter(leaves[1:])
    for layer in net.layers:
        h = dense_oracle(h, next(parameters), next(parameters), layer.layout, layer.activation)
    loss = mk.gem_loss(h, y, FAMILY, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def found_by(loss_of, net, x, path):
    """Loss and gradients; that of x unless ``path`` is "own"."""
    x = x.detach().requires_grad_(path != "own")
    loss = loss_of(x)
    wanted = [*net.parameters()] if path == "own" else [x, *net.parameters()]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def by_expert(net, grads):
    """Gradients of weights and biases cut into those of each expert, those of inputs whole."""
    inputs, grads = grads[: -2 * len(net.layers)], grads[-2 * len(net.layers) :]
    cuts = [at for of in net.layers.layouts for at in (of.weight_offsets, of.row_offsets)]
    return [
        *inputs,
        *(part for g, at in zip(grads, cuts, strict=True) for part in g.tensor_split(at[1:-1])),
    ]


def check(net, x, y, path, left, **options):
    """Both forms, held to the definition: a weight is good to a few of the least denormal."""
    ours = found_by(lambda x: net.gem_loss(x, y, **options), net, x, path)
    plain = found_by(
        lambda x: mk.gem_loss(net.layers.layered(x), y, FAMILY, **options), net, x, path
    )
    true = in_float64(net, x, y, **options)
    if path == "own":
        del true[1]
    divided = options["normalize"] in ("expert", "batch")
    least = 64 * torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    floor = 64 * torch.finfo(x.dtype).eps + (4 * DENORMAL / left if divided and left else 0)
    for a, b, t in zip(*(by_expert(net, of) for of in (ours, plain, true)), strict=True):
        assert a.isfinite().all()
        error, theirs = (a.double() - t).abs().max(), (b.double() - t).abs().max()
        assert error <= 2 * theirs + floor * t.abs().max() + least, (error, theirs, t.abs().max())
    with torch.no_grad():
        assert torch.equal(net.gem_loss(x, y, **options), ours[0])
    return ours, plain


# --- Small weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("left", LEFT)
def test_weights_of_any_size_train_as_in_two_steps(left, path, isa):
    """In samples that "ab" gets wrong, and where it is right to 3e-8: tiny times tiny."""
    native.set_isa(isa)
    other = DTYPES[(LEFT.index(left) + PATHS.index(path)) % 3]
    for rows, dtype in ((70, torch.float32), (600, torch.float32), (70, other)):
        net = sure(left, dtype, isolated=path != "twice")
        x, y, mask = batch(rows, dtype)
        y = torch.zeros_like(y) if rows == 70 else y
        for normalize, kept in ((None, mask), ("sample", None), ("expert", mask), ("batch", None)):
            check(net, x, y, path, left, weighting="deselection", normalize=normalize, mask=kept)


@pytest.mark.parametrize("confidence", CONFIDENCES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_small_weights_of_every_kind(weighting, confidence):
    net = sure(1e-38)
    x, y, mask = batch(50)
    for path, sharpness, normalize in itertools.product(PATHS[:2], (0.7, 2.5), NORMALIZE[2:]):
        options = {"confidence": confidence, "sharpness": sharpness, "weighting": weighting}
        check(net, x, y, path, 1e-39, normalize=normalize, mask=mask, **options)


def test_tables_of_small_weights():
    net, (x, y, _) = sure(1e-40), batch(50)
    table, ids = torch.randn(9, 3, requires_grad=True), torch.randint(9, (50,))
    found = []
    for loss_of in (net.gem_loss, lambda of, y, **o: mk.gem_loss(net(of), y, FAMILY, **o)):
        loss = loss_of(Inputs(x[:, 3:], [table], [ids], (0, -2)), y, normalize="expert")
        found.append([loss, *torch.autograd.grad(loss, [table, *net.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_weights_that_are_all_zero_share_nothing(normalize, dtype, isa):
    """Logits of 0: nobody is confident, no sample and no expert has anything to divide by."""
    native.set_isa(isa)
    net = mk.InterpretableMLP(FAMILY, [8, 4]).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    x, y, mask = batch(40, dtype)
    for kept in (None, mask):
        loss, *grads = step(net, x, y, normalize=normalize, mask=kept)
        assert loss == 0
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("rows", [70, 5000])
def test_small_weights_of_others_move_no_bit(rows):
    """Only "ab" has small weights, and they come of features that "b" does not see."""
    x, y, _ = batch(rows)
    found = []
    for left in (0.5, 1e-36, 1e-42, 0.0):
        loss, *grads = step(sure(left), x, y, weighting="deselection", normalize="expert")
        assert loss.isfinite()
        found.append(by_expert(sure(left), grads)[2::3])
    assert all(same_bits(found[0], other) for other in found[1:])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("left", LEFT)
def test_flushed_denormals_leave_both_forms_alike(left, threads):
    """As the project's own training commands have it; what is left of a weight may be nothing."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        x, y, _ = batch(1500)
        net, normal = sure(left), left == 0 or left > 1e-35
        for normalize in NORMALIZE:
            options = {"weighting": "deselection", "normalize": normalize}
            plain = copy.deepcopy(net)
            plain.layers[0].register_forward_hook(lambda *of: None)
            pairs = zip(step(net, x, y, **options), step(plain, x, y, **options), strict=True)
            for ours, theirs in pairs:
                assert ours.isfinite().all()
                if normal:
                    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    finally:
        torch.set_flush_denormal(False)


def test_training_into_saturation_stays_with_the_layers():
    """400 steps of Adam: from the sixth on, a sum of weights is below any normal number."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    family = mk.SubsetFamily.powerset(dict.fromkeys("abcde", 4))
    nets = [mk.InterpretableMLP(family, [16])]
    nets.append(copy.deepcopy(nets[0]))
    nets[1].layers[0].register_forward_hook(lambda *of: None)
    y = torch.randint(2, (512,)).float()
    x = torch.randn(512, 20) + (4 * y - 2)[:, None]
    losses = []
    for net, steps in zip(nets, (400, 100), strict=True):
        optimizer, of = torch.optim.Adam(net.parameters(), 1e-2), []
        for _ in range(steps):
            of.append(net.gem_loss(x, y, normalize="expert"))
            optimizer.zero_grad()
            of[-1].backward()
            optimizer.step()
        assert all(p.isfinite().all() for p in net.parameters())
        losses.append(torch.stack(of).detach())
    torch.testing.assert_close(losses[0][:100], losses[1], rtol=1e-3, atol=0)
    assert losses[0][-1] < 2e-3


# --- A loss that is scaled -----------------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_scaled_loss_has_the_gradients_of_its_definition(dtype, normalize):
    """In range and in digits: float32's, rounded once, whatever the scale."""
    torch.manual_seed(0)
    if (native.isa() or "").startswith(OF_BFLOAT16):  # these round between layers
        native.set_isa(next(isa for isa in native.isas() if not isa.startswith(OF_BFLOAT16)))
    net = mk.InterpretableMLP(FAMILY, [8, 4], "tanh").to(dtype)
    x, y, _ = batch(4000, dtype)
    plain = copy.deepcopy(net)
    plain.layers[0].register_forward_hook(lambda *of: None)
    true = in_float64(net, x, y, normalize=normalize)[1:]
    info = torch.finfo(dtype)
    for scale in (2.0**-10, 1.0, 1024.0, 65536.0, 2.0**24):
        ours, theirs = (
            found_by(
                lambda x, of=of, by=scale: by * of.gem_loss(x, y, normalize=normalize), of, x, "all"
            )
            for of in (net, plain)
        )
        for a, b, t in zip(ours[1:], theirs[1:], true, strict=True):
            assert a.dtype == dtype
            t = t * scale
            assert not (a.isinf() & b.isfinite() & (t.abs() < info.max)).any()
            kept = t.abs() < info.max
            rounding = 0.51 * info.eps * t.abs() + info.smallest_normal * info.eps
            error = (a.double() - t).abs()
            assert (error <= rounding + 2e-5 * t.abs().max())[kept].all()


def skipped(net, x, y, dtype, steps=50):
    """Steps that a loss scaled by 65536, and halved where a gradient is not finite, leaves out."""
    scaler = torch.amp.GradScaler("cpu")
    # Parameters of 16 bits are scaled by hand, for a scaler takes float32 only.
    scale, count, parameters = 65536.0, 0, [*net.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float32):
            loss = net.gem_loss(x, y, normalize="expert")
        if dtype == torch.float32:
            before = scaler.get_scale()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            count += scaler.get_scale() < before
            continue
        (loss * scale).backward()
        if all(p.grad.isfinite().all() for p in parameters):
            for p in parameters:
                p.grad = p.grad.div_(scale)
            optimizer.step()
        else:
            scale, count = scale / 2, count + 1
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["autocast", "float16"])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_a_scaler_skips_no_more_steps_than_layer_by_layer(size, dtype):
    torch.manual_seed(0)
    net = mk.InterpretableMLP(FAMILY, [8, 4]).to(dtype)
    x, y, _ = batch(256, dtype)
    plain = copy.deepcopy(net)
    plain.layers[0].register_forward_hook(lambda *of: None)
    assert skipped(net, size * x, y, dtype) <= skipped(plain, size * x, y, dtype)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_keeps_float32_and_backward_rounds(dtype):
    """Asked twice, batched, and given away: each gradient is the same float32 sum, rounded once."""
    net = sure(1e-3, dtype)
    x, y, _ = batch(40, dtype)
    parameters = [getattr(of, name) for name in ("weight", "bias") for of in net.layers]
    loss = net.gem_loss(x, y)
    kept = [g.clone() for g in loss.grad_fn.grads]
    assert {g.dtype for g in kept} == {torch.float32}
    factor = torch.tensor(2.0**20)
    again = torch.autograd.grad(loss, parameters, factor, retain_graph=True)
    batched = torch.autograd.grad(
        loss, parameters, torch.stack([factor, -factor]), retain_graph=True, is_grads_batched=True
    )
    last = torch.autograd.grad(loss, parameters, factor)
    expected = [(g * factor).to(dtype) for g in kept]
    for found in (again, last, [g[0] for g in batched], [-g[1] for g in batched]):
        assert same_bits(found, expected)
