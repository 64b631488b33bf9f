"""Masks as they come: sparse in any format, or of a kind that holds no zeros and ones."""

import numpy as np
import pytest
import torch

import maskmoe_kernels as mk

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]]).bool()
ACCEPTED = {
    "coo": lambda m: m.to_sparse(),
    "coo, uncoalesced": lambda m: torch.sparse_coo_tensor(m.nonzero().T, m[m != 0], m.shape),
    "csr": lambda m: m.to_sparse_csr(),
    "csc": lambda m: m.to_sparse_csc(),
    "numpy": lambda m: m.numpy(),
    "list": lambda m: m.tolist(),
    "parameter": lambda m: torch.nn.Parameter(m.float()) if m.dtype == torch.float32 else m,
}
REFUSED = {
    "nested": (lambda m: torch.nested.nested_tensor([*m.float()]), "a nested tensor"),
    "jagged": (
        lambda m: torch.nested.nested_tensor([*m.float()], layout=torch.jagged),
        "a nested tensor",
    ),
    "quantized": (
        lambda m: torch.quantize_per_tensor(m.float(), 1.0, 0, torch.quint8),
        "a quantized tensor",
    ),
    "meta": (lambda m: m.to("meta"), "a meta tensor, which has no values"),
    "complex": (lambda m: m.to(torch.complex64), "a complex tensor"),
    "text": (lambda m: "mask", "an array of numbers, got 'mask'"),
    "nothing": (lambda m: object(), "an array of numbers, got <object"),
    "ragged": (lambda m: [[1, 0], [1]], r"an array of numbers, got \[\[1, 0\], \[1\]\]"),
}
# Every way in, with the name of the argument that the mask is.
WAYS = {
    "mask": lambda m: mk.MaskedLinear(4, 3, m).layout,
    "mask ": lambda m: mk.BlockLayout.from_mask(m),
    "mask  ": lambda m: mk.MaskedLinear.from_linear(torch.nn.Linear(4, 3), m).layout,
    "grad_mask": lambda m: mk.BlockLayout.from_mask(torch.ones(3, 4), m),
    "present": lambda m: mk.BlockLayout([1] * 3, [1] * 4, m),
    "routes_grad": lambda m: mk.BlockLayout([1] * 3, [1] * 4, torch.ones(3, 4).bool(), m),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ACCEPTED)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_any_format_is_accepted(kind, way, dtype):
    if dtype != torch.bool and way in ("present", "routes_grad"):
        pytest.skip("bool only")
    layout = WAYS[way](ACCEPTED[kind](MASK.to(dtype)))
    own = layout.grad_mask() if way in ("grad_mask", "routes_grad") else layout.mask()
    assert torch.equal(own, MASK)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_holds_no_values_is_refused_by_name(kind, way):
    make, message = REFUSED[kind]
    with pytest.raises(mk.LayoutError, match=rf"{way.strip()} must be .*, got|{message}") as raised:
        WAYS[way](make(MASK))
    assert str(raised.value).startswith(way.strip())


def test_entries_that_are_added_up_are_no_mask():
    twice = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 1.0], (3, 4))
    with pytest.raises(mk.LayoutError, match="mask must hold booleans or zeros and ones"):
        mk.MaskedLinear(4, 3, twice)
    assert np.array_equal(mk.BlockLayout.from_mask(MASK.numpy()).mask().numpy(), MASK.numpy())
