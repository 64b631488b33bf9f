"""The GEM loss of CUDA MLPs at the limits of number types: small weights, float16; emulated."""

import math

import pytest
import torch

import maskmoe_kernels as mk
from tests.ops import host_emulator
from tests.ops.cuda_cases import DTYPES, NORMALIZE, TOY, targets
from tests.ops.cuda_mlps import draw
from tests.ops.host_emulator import configure

REASON = host_emulator.unsupported_reason()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("default_device"),
]
DENORMAL = 2.0**-149
NEEDS = {"weights": (False, False, True), "all": (True, True, True)}


def sure(left, rows, dtype, wrong=False):
    """ "a" leaves ``left`` of every sample to "ab", which is right to 3e-8, or ``wrong``."""
    net = draw(TOY, [16], rows, "tanh", dtype, seed=rows)
    net.weights[1][: net.layouts[1].weight_offsets[1]] = 0
    net.biases[1][0] = 60.0 if left == 0 else round(-4 * math.log(left / 2)) / 8
    net.biases[1][2] = 9.0 if wrong else -9.0
    return net


def by_expert(net, grads):
    """Gradients of weights, then of biases, cut into those of each expert; before them x's."""
    cuts = [of.weight_offsets for of in net.layouts] + [of.row_offsets for of in net.layouts]
    inputs, parameters = grads[: -len(cuts)], grads[-len(cuts) :]
    parts = zip(parameters, cuts, strict=True)
    return [*inputs, *(part for grad, at in parts for part in grad.tensor_split(at[1:-1]))]


def check(net, target, left, needs, floor, **options):
    """Held to autograd over exact logits, every expert to itself."""
    loss, grads = net.gem(target, weighting="deselection", needs=needs, **options)
    options["weighting"] = "deselection"
    exact_loss, exact = net.to(torch.float64).dense_gem(target, **options)
    plain_loss, plain = net.dense_gem(target, **options)
    if not needs[0]:
        exact, plain = exact[1:], plain[1:]
    floor += 4 * DENORMAL / left if options["normalize"] in ("expert", "batch") and left else 0
    pairs = [([loss], [plain_loss], [exact_loss])]
    pairs.append([by_expert(net, of) for of in (grads, plain, exact)])
    for a, b, t in ((a, b, t) for of in pairs for a, b, t in zip(*of, strict=True)):
        assert a.dtype == torch.float32
        assert a.isfinite().all()
        error, theirs = (a.double() - t).abs().max(), (b.double() - t).abs().max()
        assert error <= 2 * theirs + floor * t.abs().max() + 64 * DENORMAL, (error, theirs, t)


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left", [1e-6, 1e-22, 1e-36, 1e-40, 3e-42, 0.0])
def test_weights_of_any_size_train_as_in_two_steps(left, dtype, needs):
    wrong = dtype == torch.float16  # what is right to 3e-8 has no float16 gradient
    net = sure(left, 70, dtype, wrong)
    _, mask = targets(70)
    for normalize, kept in ((None, mask), ("sample", None), ("expert", mask), ("batch", None)):
        floor = 64 * torch.finfo(dtype).eps
        check(net, torch.zeros(70), left, NEEDS[needs], floor, normalize=normalize, mask=kept)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_small_float16_gradients_keep_their_digits(normalize):
    """Weights near 1e-6, unnormalised or of 2000 samples: 256 times a gradient fits float16."""
    net = draw(TOY, [16, 16], 2000, "tanh", torch.float16)
    target, mask = targets(2000)
    _, grads = net.gem(target, mask, normalize=normalize)
    exact = net.to(torch.float64).dense_gem(target, mask=mask, normalize=normalize)[1]
    for ours, expected in zip(by_expert(net, grads), by_expert(net, exact), strict=True):
        assert (ours - expected).norm() <= 4e-3 * expected.norm()


@pytest.mark.parametrize("needs", NEEDS)
def test_small_weights_of_others_move_no_bit(needs):
    found = []
    for left in (0.5, 1e-36, 1e-42, 0.0):
        net = sure(left, 70, torch.float32)
        loss, grads = net.gem(
            torch.zeros(70), weighting="deselection", normalize="expert", needs=NEEDS[needs]
        )
        assert loss.isfinite()
        found.append(by_expert(net, grads[-4:])[1::3])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("left", [1e-3, 1e-40])
def test_a_second_sweep_starts_its_sums_anew(left, blocks):
    """The same MLP twice, once with gradients of x: then the second sweep always runs."""
    configure(blocks=blocks)
    net = sure(left, 300, torch.float32)
    target, _ = targets(300)
    found = [
        net.gem(target, weighting="deselection", normalize="expert", needs=needs)
        for needs in (*NEEDS.values(), (False, False, False))
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][0], found[2][0])
    for a, b in zip(found[0][1], found[1][1][1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))


def test_zero_weights_of_a_sample_share_nothing():
    net = draw(TOY, [16], 40, "relu")
    net = net.with_leaves([net.x, *(torch.zeros_like(leaf) for leaf in net.leaves[1:])])
    loss, grads = net.gem(torch.ones(40), normalize="sample")
    assert loss == 0
    assert not any(grad.any() for grad in grads)
    assert mk.gem_loss(net.dense(), torch.ones(40), TOY, normalize="sample") == 0
