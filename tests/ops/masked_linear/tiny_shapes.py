"""``python -m tests.ops.masked_linear.tiny_shapes --device cuda``: for compute-sanitizer.

Everything but our kernels stays on the CPU, where the sanitizer does not look. Exit status 1: a
result is wrong.
"""

import argparse
import sys
import traceback

import torch

import maskmoe_kernels as mk
from maskmoe_kernels.testing import assert_close_to_oracle

LATTICE = mk.SubsetFamily.powerset({"a": 3, "b": 1, "c": 5})
CHAIN = mk.SubsetFamily({"a": 2, "b": 4}, {"none": [], "a": ["a"], "ab": ["a", "b"]})
PAIR = mk.SubsetFamily.powerset({"a": 1, "b": 1})
STRIPES = torch.arange(9)[:, None] % 3 >= torch.arange(10) % 4
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
#: Layout, rows, dtype, activation.
SHAPES = (
    (PAIR.hidden_layout(1, 1), 1, F32, None),
    (PAIR.hidden_layout(16, 16), 16, F32, "relu"),
    (PAIR.hidden_layout(16, 16), 17, BF16, "gelu"),
    (PAIR.hidden_layout(33, 33), 15, F16, "silu"),
    (PAIR.hidden_layout(64, 64), 65, BF16, None),
    (PAIR.hidden_layout(64, 64), 130, F32, "tanh"),
    (PAIR.hidden_layout(128, 128), 31, F16, "leaky_relu"),
    (PAIR.hidden_layout([1, 2, 40], [40, 2, 1]), 9, F32, "gelu"),
    (LATTICE.hidden_layout(1, 1), 40, BF16, "relu"),
    (LATTICE.hidden_layout(4, 4), 7, F32, "silu"),
    (LATTICE.hidden_layout(8, 8), 64, F16, None),
    (LATTICE.hidden_layout(16, 8), 33, BF16, "tanh"),
    (LATTICE.hidden_layout([1, 7, 33, 7, 1, 16, 5], [2, 9, 1, 30, 4, 1, 3]), 19, F32, "relu"),
    (LATTICE.input_layout(12), 128, F32, None),
    (LATTICE.input_layout([3, 1, 20, 2, 17, 1, 6], strict=True), 5, BF16, "gelu"),
    (CHAIN.input_layout([2, 3, 4]), 3, F32, "leaky_relu"),
    (CHAIN.hidden_layout([2, 3, 4], [2, 3, 4]), 0, F32, "relu"),
    (CHAIN.hidden_layout(32, 32), 257, BF16, "silu"),
    (mk.BlockLayout.from_mask(STRIPES.repeat(2, 2)), 21, F32, "tanh"),
    (mk.BlockLayout([7, 1], [3, 2], torch.zeros(2, 2, dtype=torch.bool)), 4, F32, None),
)


def check(number, device):
    """One shape, forward and backward, against the oracle."""
    layout, rows, dtype, activation = SHAPES[number]
    generator = torch.Generator().manual_seed(number)
    shapes = [(rows, layout.in_features), (layout.num_weights,), (layout.out_features,)]
    inputs = [torch.randn(s, generator=generator).to(dtype) for s in shapes]

    def there_and_back(x, weight, bias, layout, activation):
        moved = (t.to(device) for t in (x, weight, bias))
        return mk.masked_linear(*moved, layout, activation).cpu()

    assert_close_to_oracle(there_and_back, *inputs, layout, activation)


def check_objectives(device):
    """Loss and mixture with their gradients, against float64 on the CPU."""
    for family in (PAIR, LATTICE, CHAIN):
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(37, family.num_experts, generator=generator)
        target = (torch.rand(37, generator=generator) < 0.5).float()
        weight = torch.randn(37, generator=generator)

        def of(logits, target, weight, family=family):
            logits = logits.detach().requires_grad_()
            loss = mk.gem_loss(logits, target, family)
            value = loss + (mk.mixture(logits, family).probability * weight).sum()
            return [value.detach(), *torch.autograd.grad(value, logits)]

        found = of(*(t.to(device) for t in (logits, target, weight)))
        expected = of(*(t.double() for t in (logits, target, weight)))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu().double(), other, rtol=1e-4, atol=1e-5)


def main(words):
    """All shapes; the number that are wrong is printed last."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.ops.masked_linear.tiny_shapes", description=__doc__
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    device = torch.device(parser.parse_args(words).device)
    checks = [(f"{n + 1} of {len(SHAPES)}: {SHAPES[n][1:]}", n) for n in range(len(SHAPES))]
    wrong = 0
    for name, number in [*checks, ("objectives", None)]:
        try:
            check_objectives(device) if number is None else check(number, device)
        except Exception:
            traceback.print_exc()
            wrong += 1
            print(f"{name}: wrong")
        else:
            print(f"{name}: right")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"{len(checks) + 1} checks, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
