"""``InterpretableMLP``: blind, isolated, and equal to one small MLP per expert."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from maskmoe_kernels import (
    BlockLayout,
    InterpretableMLP,
    LayoutError,
    MaskedLinear,
    SubsetFamily,
    gem_loss,
    mixture,
)
from maskmoe_kernels.testing import assert_blind, assert_gradient_isolated
from maskmoe_kernels.testing.strategies import families
from tests.arrival import assert_arrives

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("torch", "reference")
ACTIVATIONS = {
    None: nn.Identity(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "gelu": nn.GELU(),
    "tanh": nn.Tanh(),
    "silu": nn.SiLU(),
}

seeds = st.integers(0, 2**31 - 1)
activations = st.sampled_from(list(ACTIVATIONS))
backends = st.sampled_from(BACKENDS)
CUBE = SubsetFamily.powerset({"a": 2, "b": 3, "c": 1})


@st.composite
def mlps(draw, max_experts=8, dtype=torch.float32):
    """A small MLP with ragged widths, its family, and a batch for it."""
    family = draw(families(max_experts))
    widths = st.lists(
        st.sampled_from([1, 2, 3, 7]), min_size=family.num_experts, max_size=family.num_experts
    )
    hidden = draw(st.lists(st.one_of(widths, st.integers(1, 3)), max_size=2))
    torch.manual_seed(draw(seeds))
    net = InterpretableMLP(
        family, hidden, draw(activations) if hidden else None, backend=draw(backends), dtype=dtype
    )
    return net, family, torch.randn(2, family.in_features, dtype=dtype)


# --- What stays true of every module ---------------------------------------------------------


@given(mlps(max_experts=6))
def test_experts_are_blind_outside_their_subset(case):
    net, family, x = case
    assert_blind(net, x, family.visible_features())
    assert_arrives(net, x[0], family.visible_features())


@given(mlps(max_experts=12))
def test_each_loss_moves_its_own_expert(case):
    net, family, x = case
    assert_gradient_isolated(net, x, family)


@given(mlps(dtype=torch.float64))
def test_jacobian_stays_inside_the_subset(case):
    net, family, x = case
    jacobian = torch.autograd.functional.jacobian(net, x[0])
    assert not jacobian[~family.visible_features()].any()


def test_jacobian_fills_the_subset():
    torch.manual_seed(0)
    net = InterpretableMLP(CUBE, [8, 8], activation="tanh", dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(net, torch.randn(6).double())
    assert torch.equal(jacobian != 0, CUBE.visible_features())


# --- One plain MLP per expert ------------------------------------------------------------


class PerExpert(nn.Module):
    """Section 3.4.2 word by word: ``nn.Linear`` over torch.cat([h_i, *[h_j.detach() ...]])."""

    def __init__(self, net, family, activation):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        sizes = list(family.groups.values())
        member = family.membership.tolist()
        inside = family.strict.tolist()
        experts = range(family.num_experts)
        self.reads = [[n for n in range(len(sizes)) if member[i][n]] for i in experts]
        self.below = [[j for j in experts if inside[i][j]] for i in experts]
        self.group_sizes = sizes
        self.rows, self.columns, self.layers = [], [], nn.ModuleList()
        for k, layer in enumerate(net.layers):
            order = self.reads if k == 0 else [[i, *self.below[i]] for i in experts]
            self._add_layer(layer, order, sizes)
            sizes = [len(rows) for rows in self.rows[-1]]

    def _add_layer(self, layer, order, sizes):
        features = torch.arange(layer.in_features).split(sizes)
        units = torch.arange(layer.out_features).split(list(layer.layout.row_sizes))
        dense, linears, columns = layer.dense_weight().detach(), nn.ModuleList(), []
        for i, reads in enumerate(order):
            seen = torch.cat([features[j] for j in reads] or [torch.arange(0)])
            linear = nn.utils.skip_init(nn.Linear, len(seen), len(units[i]), dtype=dense.dtype)
            linear.weight.data = dense[units[i]][:, seen].clone()
            linear.bias.data = layer.bias.detach()[units[i]].clone()
            linears.append(linear)
            columns.append(seen)
        self.layers.append(linears)
        self.rows.append(units)
        self.columns.append(columns)

    def forward(self, x):
        groups = x.split(self.group_sizes, -1)
        nothing = x[..., :0]
        h = [torch.cat([nothing, *(groups[n] for n in reads)], -1) for reads in self.reads]
        for k, linears in enumerate(self.layers):
            if k > 0:
                h = [
                    torch.cat([h[i], *[h[j].detach() for j in below]], -1)
                    for i, below in enumerate(self.below)
                ]
            h = [linear(h_i) for linear, h_i in zip(linears, h, strict=True)]
            if k < len(self.layers) - 1:
                h = [self.activation(h_i) for h_i in h]
        return torch.cat(h, -1)

    def dense_gradients(self, k, grads, shape):
        """Gradients of layer k's small matrices, laid out as one dense weight and one bias."""
        weight, bias = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[0]).double()
        for i, (units, seen) in enumerate(zip(self.rows[k], self.columns[k], strict=True)):
            weight[units[:, None], seen] = grads[2 * i]
            bias[units] = grads[2 * i + 1]
        return weight, bias


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@given(mlps(max_experts=10, dtype=torch.float64), seeds)
def test_equals_one_mlp_per_expert(case, seed):
    net, family, x = case
    plain = PerExpert(net, family, net.layers[0].activation)
    grad_z = torch.randn(
        2, family.num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x.requires_grad_()
    z, expected = net(x), plain(x)
    torch.testing.assert_close(z, expected)
    grads = torch.autograd.grad(z, [x, *net.parameters()], grad_z, materialize_grads=True)
    theirs = torch.autograd.grad(expected, [x, *plain.parameters()], grad_z, materialize_grads=True)
    torch.testing.assert_close(grads[0], theirs[0])
    per_layer = 2 * family.num_experts
    for k, layer in enumerate(net.layers):
        ours = grads[1 + 2 * k : 3 + 2 * k]
        start = 1 + k * per_layer
        weight, bias = plain.dense_gradients(
            k, theirs[start : start + per_layer], layer.dense_weight().shape
        )
        torch.testing.assert_close(layer.layout.unpack(ours[0]), weight)
        torch.testing.assert_close(ours[1], bias)


def test_parameters_are_those_of_the_small_networks():
    net = InterpretableMLP(CUBE, [16, 8])
    plain = PerExpert(net, CUBE, "relu")
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in plain.parameters())


# --- Training --------------------------------------------------------------------------------


def trained(net, x, target, family, steps=2):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        gem_loss(net(x), target, family, weighting="deselection", normalize="expert").backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_backends_train_alike(activation):
    torch.manual_seed(0)
    nets = [
        InterpretableMLP(CUBE, [16, [3, 9, 4, 7, 8, 5, 16]], activation, backend=b).double()
        for b in BACKENDS
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    before = copy.deepcopy(nets[0].state_dict())
    x, target = torch.randn(32, 6).double(), torch.rand(32).round()
    for net in nets:
        trained(net, x, target, CUBE)
    for (name, ours), theirs in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        assert not torch.equal(ours, before[name])


def test_training_twice_gives_the_same_bits():
    torch.manual_seed(0)
    first = InterpretableMLP(CUBE, [16, 16])
    second = copy.deepcopy(first)
    x, target = torch.randn(64, 6), torch.rand(64).round()
    for net in (first, second):
        trained(net, x, target, CUBE, steps=3)
    for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_learns_what_an_expert_can_see():
    """The label is the sign of group b: the expert on b alone learns it, the one on a cannot."""
    torch.manual_seed(0)
    family = SubsetFamily.powerset({"a": 1, "b": 1})
    net = InterpretableMLP(family, [8])
    x = torch.randn(512, 2)
    target = (x[:, 1] > 0).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    for _ in range(150):
        optimizer.zero_grad()
        gem_loss(net(x), target, family, weighting="deselection").backward()
        optimizer.step()
    out = mixture(net(x), family)
    assert ((out.probability > 0.5) == target.bool()).float().mean() > 0.97
    assert out.attribution.mean(0).argmax() == 1


# --- A torch module --------------------------------------------------------------------------


def test_state_dict_round_trip_is_bitwise():
    source, target = (InterpretableMLP(CUBE, [5, [1, 2, 3, 4, 5, 6, 7]]) for _ in range(2))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(9, 6)
    assert torch.equal(source(x), target(x))


def test_copies_compute_the_same_bits():
    net = InterpretableMLP(CUBE, [5, 4], "gelu")
    x = torch.randn(9, 6)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(net(x), other(x))
        assert other.family == net.family


def test_materialises_from_meta():
    with torch.device("meta"):
        net = InterpretableMLP(CUBE, [5, 4])
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device="cpu")
    source = InterpretableMLP(CUBE, [5, 4])
    net.load_state_dict(source.state_dict())
    x = torch.randn(9, 6)
    assert torch.equal(net(x), source(x))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_any_leading_shape(shape):
    net = InterpretableMLP(CUBE, [5, 4]).double()
    x = torch.randn(*shape, 6, dtype=torch.float64)
    z = net(x)
    assert z.shape == (*shape, 7)
    for row, expected in zip(x.reshape(-1, 6), z.reshape(-1, 7), strict=True):
        torch.testing.assert_close(net(row), expected)


def test_first_layer_may_have_its_own_layout():
    strict = CUBE.input_layout([4] * 7, strict=True)
    net = InterpretableMLP(CUBE, [4], "tanh", input_layout=strict)
    x = torch.randn(3, 6, requires_grad=True)
    for i, name in enumerate(CUBE.names):
        (grad,) = torch.autograd.grad(net(x)[:, i], x, torch.randn(3))
        seen = CUBE.visible_features()[i] if "+" not in name else torch.zeros(6, dtype=torch.bool)
        assert torch.equal((grad != 0).any(0), seen)


def test_errors_carry_the_values():
    with pytest.raises(LayoutError, match=r"7 entries, got 2: \[4, 5\]"):
        InterpretableMLP(CUBE, [[4, 5]])
    with pytest.raises(LayoutError, match="softmax"):
        InterpretableMLP(CUBE, [4], "softmax")
    with pytest.raises(LayoutError, match=r"in_features=6, got \(3, 5\)"):
        InterpretableMLP(CUBE, [4])(torch.randn(3, 5))


class Explained(nn.Module):
    """An MLP together with its mixture, as one graph."""

    def __init__(self, activation="relu", width=4):
        super().__init__()
        self.net = InterpretableMLP(CUBE, [width, 3], activation)
        mixture(torch.zeros(1, 7), CUBE)  # tests/objectives traces a family never used before

    def forward(self, x):
        return tuple(mixture(self.net(x), CUBE, "square"))


def check_compiled(model, backend):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 2, 9):
        x = torch.randn(rows, 6, requires_grad=True)
        results = []
        for run in (compiled, model):
            with torch.compiler.set_stance("default" if rows == 4 else "fail_on_recompile"):
                y = torch.cat([part.reshape(-1) for part in run(x)])
                torch.manual_seed(rows)
                grads = torch.autograd.grad(y, [x, *model.parameters()], torch.randn_like(y))
            results.append((y, *grads))
        torch.testing.assert_close(*results)


# Every width below is used once: nothing is warm from another test.


def test_compiles_whole_with_a_dynamic_batch():
    check_compiled(Explained(width=11), "aot_eager")


@pytest.mark.slow
def test_compiles_whole_with_inductor():
    """The MLP alone: what inductor calls are our ops, so this needs no C++ compiler."""
    check_compiled(InterpretableMLP(CUBE, [13, 3]), "inductor")


def swept_families(count):
    """Families of many shapes, as a search over subsets draws them."""
    for k in range(count):
        groups = {name: 1 + (k + n) % 5 for n, name in enumerate("abcd"[: 2 + k % 3])}
        subsets = {name: [name] for name in [*groups][: 1 + k % len(groups)]}
        if k % 2 and len(groups) > 2:
            subsets["ab"] = ["a", "b"]
        yield SubsetFamily(groups, {**subsets, "all": [*groups]})


ENTRIES = {
    "forward": lambda net, x, y: net(x),
    "gem_loss": lambda net, x, y: net.gem_loss(x, y, "smooth", normalize="sample"),
    "predict": lambda net, x, y: torch.cat(net.predict(x)[1:]),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_one_graph_serves_every_family(entry):
    """The first is compiled for its sizes, the second for all sizes."""
    torch._dynamo.reset()
    call, counter = ENTRIES[entry], CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for k, family in enumerate(swept_families(20)):
        torch.manual_seed(k)
        net = InterpretableMLP(family, [3 + k % 4, 5 + k % 3])
        assert net.layers.unsupported_reason() is None
        x, y = torch.randn(7 + k % 2, family.in_features), torch.rand(7 + k % 2).round()
        results = [compiled(net, x, y), call(net, x, y)]
        torch.testing.assert_close(*results)
        if entry != "predict":
            cotangent, of = torch.randn_like(results[0]), [*net.parameters()]
            grads = [torch.autograd.grad(value, of, cotangent) for value in results]
            torch.testing.assert_close(*grads)
    assert counter.frame_count == 2


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_compiled_call_sees_that_a_layer_was_replaced(entry):
    torch._dynamo.reset()
    net = InterpretableMLP(CUBE, [4, 3])
    call = ENTRIES[entry]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(5, 6), torch.rand(5).round()
    torch.testing.assert_close(compiled(net, x, y), call(net, x, y))
    made = net.layers[1].layout
    other = BlockLayout(made.row_sizes, made.col_sizes, torch.eye(7).bool())
    net.layers[1] = MaskedLinear.from_layout(other, activation="relu")
    assert "not made here" in net.layers.unsupported_reason()
    torch.testing.assert_close(compiled(net, x, y), call(net, x, y))


def exported(width):
    model = Explained("gelu", width)
    example = torch.randn(4, 6)
    shapes = ({0: torch.export.Dim("batch")},)
    return model, torch.export.export(model, (example,), dynamic_shapes=shapes)


def test_exports_with_a_dynamic_batch():
    model, program = exported(width=17)
    for rows in (1, 4, 33):
        x = torch.randn(rows, 6)
        for ours, theirs in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_exported_program_runs_in_a_fresh_process(tmp_path):
    model, program = exported(width=19)
    x = torch.randn(5, 6)
    torch.export.save(program, tmp_path / "net.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, maskmoe_kernels\n"
        "net = torch.export.load(sys.argv[1] + '/net.pt2').module()\n"
        "out = net(torch.load(sys.argv[1] + '/x.pt'))\n"
        "torch.save([t.detach() for t in out], sys.argv[1] + '/y.pt')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(torch.load(tmp_path / "y.pt"), model(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_thousand_experts_learn():
    family = SubsetFamily.powerset({f"g{n}": 1 for n in range(10)})
    net = InterpretableMLP(family, [2])
    x, target = torch.randn(8, 10), torch.rand(8).round()
    trained(net, x, target, family, steps=1)
    shares = mixture(net(x), family).attribution
    torch.testing.assert_close(shares.sum(-1), torch.ones(8))
    hidden = x.masked_fill(~family.visible_features()[0], torch.nan)
    assert torch.equal(net(hidden)[:, 0], net(x)[:, 0])
    outside = ~family.visible_features()[0]
    assert torch.equal(net(hidden)[0].isnan(), family.visible_features()[:, outside].any(1))


def test_input_layout_may_not_show_an_expert_more_than_its_subset() -> None:
    family = SubsetFamily({"a": 2, "b": 3}, {"a": ["a"], "b": ["b"], "ab": ["a", "b"]})
    everything = BlockLayout([4] * 3, [2, 3], torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(LayoutError, match="outside their expert's subset"):
        InterpretableMLP(family, [4], input_layout=everything)
    with pytest.raises(LayoutError, match=r"input_layout must be .* \(12, 5\), got \(15, 5\)"):
        InterpretableMLP(family, [4], input_layout=family.input_layout(5))
    less = family.input_layout(4).mask()
    less[0, 0] = False
    InterpretableMLP(family, [4], input_layout=BlockLayout.from_mask(less))


def test_hidden_as_a_number_is_refused() -> None:
    family = SubsetFamily.powerset({"a": 2, "b": 3})
    with pytest.raises(LayoutError, match=r"hidden must be a sequence .* got 16; write \[16\]"):
        InterpretableMLP(family, 16)  # type: ignore[arg-type]
