"""The content vector against a computation by hand."""

import math

import pytest
import torch
from torch import nn

import maskmoe_kernels as mk
from maskmoe_kernels.models import InterpretableNCF, NCFSizes
from maskmoe_kernels.nn import ContentEncoder, table_of


@pytest.fixture
def encoder():
    """Two categories (3 values of width 2, 2 values of width 1), two numbers to width 2."""
    encoder = ContentEncoder({"colour": (3, 2), "size": (2, 1)}, num_numeric=2, numeric_width=2)
    state = {
        "embeddings.colour.weight": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
        "embeddings.size.weight": [[10.0], [20.0]],
        "numeric.weight": [[1.0, -1.0], [0.5, 2.0]],
        "numeric.bias": [0.0, 0.25],
    }
    encoder.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
    return encoder


def test_content_vector_by_hand(encoder):
    codes = torch.tensor([[2, 0], [0, 1]])
    numeric = torch.tensor([[0.5, 0.25], [-1.0, 0.0]])
    expected = [
        [5.0, 6.0, 10.0, math.tanh(0.25), math.tanh(0.25 + 0.5 + 0.25)],
        [1.0, 2.0, 20.0, math.tanh(-1.0), math.tanh(-0.5 + 0.25)],
    ]
    assert encoder.out_features == 5
    torch.testing.assert_close(encoder(codes, numeric), torch.tensor(expected))


def test_gradients_by_hand(encoder):
    codes = torch.tensor([[2, 0], [0, 1], [2, 1]])
    numeric = torch.tensor([[0.5, 0.25], [-1.0, 0.0], [0.0, 1.0]])
    grad = torch.tensor(
        [[1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0], [0.5, -0.5, 0.25, -1.0, 2.0]]
    )
    out = encoder(codes, numeric)
    out.backward(grad)
    colour, size = (encoder.embeddings[name].weight.grad for name in ("colour", "size"))
    # Each row of a table gets the sum over the samples that use it.
    torch.testing.assert_close(colour, torch.tensor([[6.0, 7.0], [0.0, 0.0], [1.5, 1.5]]))
    torch.testing.assert_close(size, torch.tensor([[3.0], [8.25]]))
    before_tanh = grad[:, 3:] * (1 - out.detach()[:, 3:] ** 2)
    torch.testing.assert_close(encoder.numeric.weight.grad, before_tanh.T @ numeric)
    torch.testing.assert_close(encoder.numeric.bias.grad, before_tanh.sum(0))


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)], ids=str)
def test_leading_shapes_are_samples(encoder, shape):
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack(
        [torch.randint(0, count, shape, generator=generator) for count in (3, 2)], dim=-1
    )
    numeric = torch.randn(*shape, 2, generator=generator)
    out = encoder(codes, numeric)
    assert out.shape == (*shape, 5)
    flat = [encoder(c, n) for c, n in zip(codes.view(-1, 2), numeric.view(-1, 2), strict=True)]
    expected = torch.stack(flat) if flat else torch.empty(0, 5)
    torch.testing.assert_close(out.reshape(-1, 5), expected)


def test_tables_start_small_and_the_projection_as_torch_does():
    torch.manual_seed(0)
    encoder = ContentEncoder({"many": (2000, 8)}, num_numeric=19, numeric_width=16)
    table = encoder.embeddings["many"].weight.detach()
    assert table.std() == pytest.approx(0.05, rel=0.03)
    assert abs(table.mean()) < 0.002
    assert isinstance(encoder.numeric, nn.Linear)
    assert encoder.numeric.weight.abs().max() <= 19**-0.5
    wide = ContentEncoder({"many": (2000, 8)}, 1, 1, std=0.5).embeddings["many"].weight.detach()
    assert wide.std() == pytest.approx(0.5, rel=0.03)


# --- Embeddings whose call does more than look rows up -------------------------------------------

SPECIAL = {
    "padding_idx": {"padding_idx": 1},
    "first row is padding": {"padding_idx": 0},
    "max_norm": {"max_norm": 0.5},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
}


def ncf(part, options):
    """A model with one embedding of that kind, and the same with calls of its embeddings."""
    torch.manual_seed(0)
    model = InterpretableNCF(NCFSizes(5, 4, {"sex": (2, 3), "age": (4, 2)}, 3, 4, 6), [8])
    holder = model.inputs.content.embeddings if part == "age" else model.inputs
    old = getattr(holder, part)
    new = nn.Embedding(*old.weight.shape, **options)
    setattr(holder, part, new)
    return model, new


@pytest.mark.parametrize("part", ["user", "item", "age"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_embeddings_of_ncf_train_as_their_calls_do(name, part):
    model, table = ncf(part, SPECIAL[name])
    ids = torch.tensor([0, 1, 1, 3, 1])
    codes = torch.stack([ids % 2, ids], -1)
    inputs, y = (ids, ids, codes, torch.randn(5, 3)), torch.tensor([0.0, 1, 0, 0, 1])
    before = table.weight.detach().clone()
    model.gem_loss(*inputs, y).backward()
    with torch.no_grad():
        if name == "max_norm":
            norms = table.weight.norm(dim=1)
            assert (norms[[0, 1, 3]] <= 0.5 + 1e-6).all()
            assert (norms[[0, 1, 3]] < before.norm(dim=1)[[0, 1, 3]]).all()
    found, table.weight.grad = table.weight.grad, None
    assert found.is_sparse == (name == "sparse")
    found = found.to_dense()
    if table.padding_idx is not None:
        assert not found[table.padding_idx].any()
    mk.gem_loss(model.experts.layers.layered(model.inputs(*inputs)), y, model.family).backward()
    torch.testing.assert_close(found, table.weight.grad.to_dense())
    assert found[3].any()


@pytest.mark.parametrize("name", SPECIAL)
def test_special_embeddings_have_no_table(name):
    embedding = nn.Embedding(5, 3, **SPECIAL[name])
    with pytest.raises(mk.LayoutError, match=next(iter(SPECIAL[name])) + ".*; call it, and put"):
        table_of(embedding)


def test_an_embedding_that_only_looks_up_is_its_weight():
    family = mk.SubsetFamily.powerset({"a": 3, "b": 2})
    net, embedding = mk.InterpretableMLP(family, [4]), nn.Embedding(5, 3)
    x, ids = torch.randn(6, 2), torch.tensor([0, 4, 4, 1, 2, 0])
    inputs = mk.Inputs(x, [table_of(embedding)], [ids], (0, -2))
    torch.testing.assert_close(net(inputs), net(torch.cat([embedding(ids), x], -1)))
    with pytest.raises(mk.LayoutError, match=r"tables\[0\] must be a tensor.*table_of"):
        mk.Inputs(x, [embedding], [ids], (0, -2))
    embedding.register_forward_hook(lambda *args: None)
    with pytest.raises(mk.LayoutError, match="a hook wants to see"):
        table_of(embedding)
    with pytest.raises(mk.LayoutError, match="it is a Linear"):
        table_of(nn.Linear(3, 5))
