"""Gradients of embedding tables are the same bits twice on every path, however many threads add."""

import copy

import pytest
import torch

import maskmoe_kernels as mk
from maskmoe_kernels.models import InterpretableNCF, NCFSizes
from maskmoe_kernels.ops.masked_mlp.api import _input_grads

FAMILY = mk.SubsetFamily(
    {"a": 5, "b": 9, "c": 3}, {"a": ["a"], "ab": ["a", "b"], "all": ["a", "b", "c"]}
)
ROWS, REPEATS = 5000, 8


def inputs(dtype=torch.float32, shape=(ROWS,)):
    """Few rows of each table, each named by many samples."""
    torch.manual_seed(0)
    tables = [torch.randn(n, w).to(dtype).requires_grad_() for n, w in ((3, 5), (40, 9))]
    ids = [torch.randint(len(table), shape) for table in tables]
    return mk.Inputs(torch.randn(*shape, 3).to(dtype), tables, ids, (0, 1, -3))


def hooked(net):
    net.layers[0].register_forward_hook(lambda *args: None)
    return net


PATHS = {
    "one op": lambda: mk.InterpretableMLP(FAMILY, [8]),
    "hooked": lambda: hooked(mk.InterpretableMLP(FAMILY, [8])),
    "torch": lambda: mk.InterpretableMLP(FAMILY, [8], backend="torch"),
    "reference": lambda: mk.InterpretableMLP(FAMILY, [8], backend="reference"),
}


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("loss", ["logits", "gem"])
def test_are_the_same_bits_twice(path, loss, threads):
    torch.set_num_threads(threads)
    parts = inputs()
    torch.manual_seed(1)
    net = PATHS[path]()
    y, cotangent = torch.rand(ROWS).round(), torch.randn(ROWS, 3)

    def grads():
        if loss == "gem":
            return torch.autograd.grad(net.gem_loss(parts, y), parts.tables)
        return torch.autograd.grad(net(parts), parts.tables, cotangent)

    first = grads()
    for _ in range(REPEATS):
        for ours, again in zip(first, grads(), strict=True):
            assert torch.equal(ours, again)
    wide = copy.deepcopy(net).double()
    tables = [t.detach().double().requires_grad_() for t in parts.tables]
    x = torch.cat([tables[0][parts.ids[0]], tables[1][parts.ids[1]], parts.x.double()], -1)
    out = wide.gem_loss(x, y) if loss == "gem" else wide(x)
    true = torch.autograd.grad(out, tables, None if loss == "gem" else cotangent.double())
    for ours, theirs in zip(first, true, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("part", ["experts.layers.0", "inputs.user", "inputs"])
def test_are_the_same_bits_twice_in_ncf(part, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = InterpretableNCF(NCFSizes(6, 40, {"sex": (2, 2), "age": (7, 6)}, 3, 4, 16), [8])
    model.get_submodule(part).register_forward_hook(lambda *args: None)
    user, item, sex, age = (torch.randint(n, (ROWS,)) for n in (6, 40, 2, 7))
    data = user, item, torch.stack([sex, age], -1), torch.randn(ROWS, 3), torch.rand(ROWS).round()
    parameters = [*model.parameters()]
    first = torch.autograd.grad(model.gem_loss(*data), parameters)
    for _ in range(REPEATS):
        again = torch.autograd.grad(model.gem_loss(*data), parameters)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_are_the_same_bits_twice_in_the_op_without_kernels(dtype, threads):
    torch.set_num_threads(threads)
    parts = inputs(dtype)
    grad = torch.randn(ROWS, 17).to(dtype)
    args = grad, parts.x, [*parts.tables], [*parts.ids], [*parts.order], True, True
    first = _input_grads(*args)
    for _ in range(REPEATS):
        assert all(torch.equal(a, b) for a, b in zip(first, _input_grads(*args), strict=True))
    assert torch.equal(first[0], grad[:, 14:])
    for ours, columns, ids in zip(first[1:], (grad[:, :5], grad[:, 5:14]), parts.ids, strict=True):
        true = torch.zeros(ours.shape, dtype=torch.float64).index_add_(0, ids, columns.double())
        assert (ours - true).abs().max() <= 64 * torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_any_shape_of_ids(path, shape):
    net, parts = PATHS[path](), inputs(shape=shape)
    out = net(parts)
    assert out.shape == (*shape, 3)
    grads = torch.autograd.grad(out, parts.tables, torch.randn_like(out))
    for table, ids, grad in zip(parts.tables, parts.ids, grads, strict=True):
        named = torch.zeros(len(table), dtype=torch.bool).index_fill(0, ids.reshape(-1), True)
        assert torch.equal(grad.any(-1), named)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrong", [3, -1])
def test_ids_beyond_a_table_are_refused_on_every_path(path, wrong):
    parts = inputs()
    parts.ids[0][7] = wrong
    with pytest.raises((IndexError, RuntimeError), match=f"out of range|{wrong}"):
        PATHS[path]()(parts)
