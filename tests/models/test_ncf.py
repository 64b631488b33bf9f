"""The three MovieLens models: sizes of the paper, and who trains which embedding."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from maskmoe_kernels import LayoutError, gem_loss
from maskmoe_kernels.models import NCF, InterpretableNCF, NCFSizes
from maskmoe_kernels.testing import assert_gradient_isolated

seeds = st.integers(0, 2**31 - 1)
MOVIELENS = NCFSizes(num_users=6040, num_items=3883)
SMALL = NCFSizes(
    num_users=7,
    num_items=5,
    categories={"sex": (2, 2), "age": (3, 1)},
    num_numeric=3,
    numeric_width=2,
    embedding=4,
)
CONTENT = ("content.embeddings.sex", "content.embeddings.age", "content.numeric")
# Which experts (content, user, item, all) train a group's embedding.
TRAINED_BY = {
    "shared": {"content": [0, 1, 2, 3], "user": [1, 3], "item": [2, 3]},
    "strict": {"content": [0], "user": [1], "item": [2]},
}


def small(embeddings="shared", backend=None, hidden=(6, 5), seed=0):
    torch.manual_seed(seed)
    return InterpretableNCF(SMALL, hidden, embeddings, backend=backend).double()


def batch(shape=(9,), seed=0):
    """User, item, categories and numbers of some samples."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(0, count, shape, generator=generator) for count in (7, 5, 2, 3)]
    numeric = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    return draw[0], draw[1], torch.stack(draw[2:], -1), numeric


def count(model):
    return sum(p.numel() for p in model.parameters())


# --- Sizes -----------------------------------------------------------------------------------


def test_parameter_counts_of_the_paper():
    assert count(NCF(MOVIELENS)) == 890_583
    assert count(InterpretableNCF(MOVIELENS)) == 782_634
    assert count(NCF(MOVIELENS, personal=False)) == 189_975


@pytest.mark.parametrize("embeddings", ["shared", "strict"])
def test_embedding_modes_differ_in_training_only(embeddings):
    model, shared = small(embeddings), small("shared")
    assert count(model) == count(shared)
    shared.load_state_dict(model.state_dict())
    assert torch.equal(model(*batch()), shared(*batch()))


def test_groups_are_those_of_the_paper():
    family = InterpretableNCF(MOVIELENS).family
    assert family.groups == {"content": 32, "user": 64, "item": 64}
    assert family.names == ["content", "user", "item", "all"]
    assert family.hasse_edges() == [
        ("content", "user"), ("content", "item"), ("user", "all"), ("item", "all")
    ]  # fmt: skip


def test_embeddings_start_small():
    torch.manual_seed(0)
    for model in (NCF(MOVIELENS), InterpretableNCF(MOVIELENS)):
        for table in (model.inputs.user, model.inputs.item):
            assert table.weight.std().item() == pytest.approx(0.05, rel=0.02)


# --- Values ----------------------------------------------------------------------------------


def inputs_by_hand(model, user, item, codes, numeric, personal=True):
    state = {name: value.detach() for name, value in model.inputs.named_parameters()}
    parts = [
        state["content.embeddings.sex.weight"][codes[..., 0]],
        state["content.embeddings.age.weight"][codes[..., 1]],
        torch.tanh(numeric @ state["content.numeric.weight"].T + state["content.numeric.bias"]),
    ]
    if personal:
        parts += [state["user.weight"][user], state["item.weight"][item]]
    return torch.cat(parts, -1)


@pytest.mark.parametrize("personal", [True, False])
def test_black_box_by_hand(personal):
    torch.manual_seed(0)
    model = NCF(SMALL, (6, 5), personal).double()
    data = batch()
    h = inputs_by_hand(model, *data, personal)
    linears = [layer for layer in model.layers if isinstance(layer, torch.nn.Linear)]
    for k, linear in enumerate(linears):
        h = h @ linear.weight.T + linear.bias
        h = F.relu(h) if k < len(linears) - 1 else h
    torch.testing.assert_close(model(*data), h)
    if not personal:
        user, item, *content = data
        assert torch.equal(model(user.flip(0), item.flip(0), *content), model(*data))


def test_interpretable_is_its_mlp_on_the_inputs():
    model, data = small(), batch()
    x = inputs_by_hand(model, *data)
    torch.testing.assert_close(model(*data), model.experts(x))
    dense = [layer.dense_weight() for layer in model.experts.layers]
    h = x
    for k, (weight, layer) in enumerate(zip(dense, model.experts.layers, strict=True)):
        h = F.linear(h, weight, layer.bias)
        h = F.relu(h) if k < len(dense) - 1 else h
    torch.testing.assert_close(model(*data), h)
    # Groups lie content, user, item: expert `user` (row block 1) sees the first 5 + 4 features.
    seen = (dense[0][6:12] != 0).any(0)
    assert seen.tolist() == [True] * 9 + [False] * 4


@given(seeds, st.sampled_from(["shared", "strict"]), st.sampled_from([torch.nan, torch.inf, 9.0]))
def test_experts_are_blind_to_embeddings_outside_their_subset(seed, embeddings, poison):
    data = batch((4,), seed)
    for group, blind in (("user", [0, 2]), ("item", [0, 1])):
        model = small(embeddings, seed=seed)
        before = model(*data)
        with torch.no_grad():
            getattr(model.inputs, group).weight.fill_(poison)
        after = model(*data)
        assert torch.equal(before[:, blind], after[:, blind])
        seeing = [i for i in range(4) if i not in blind]
        assert not torch.equal(before[:, seeing], after[:, seeing])
        if math.isnan(poison):
            assert after[:, seeing].isnan().all()


def test_other_user_or_item_changes_only_who_sees_it():
    model = small(hidden=(16,))
    user, item, codes, numeric = batch()
    before = model(user, item, codes, numeric)
    after = model((user + 1) % 7, item, codes, numeric)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])
    assert (before[:, [1, 3]] != after[:, [1, 3]]).all()
    after = model(user, (item + 1) % 5, codes, numeric)
    assert torch.equal(before[:, [0, 1]], after[:, [0, 1]])
    assert (before[:, [2, 3]] != after[:, [2, 3]]).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 4)], ids=str)
@pytest.mark.parametrize("make", [small, lambda: NCF(SMALL, (6,)).double()])
def test_any_leading_shape(make, shape):
    model, data = make(), batch(shape)
    logits = model(*data)
    rows = [t.reshape(-1, *t.shape[len(shape) :]) for t in data]
    assert logits.shape[:-1] == shape
    torch.testing.assert_close(logits.reshape(-1, logits.shape[-1]), model(*rows))


# --- Who trains what -------------------------------------------------------------------------


@given(seeds, st.sampled_from(["shared", "strict"]))
def test_embeddings_learn_from_the_experts_of_their_mode(seed, embeddings):
    model = small(embeddings, hidden=(16, 8), seed=seed % 1000)
    with torch.no_grad():
        for layer in model.experts.layers[:-1]:
            layer.bias += 10  # an expert whose units are all dead would teach nobody
    data = batch((6,), seed)
    groups = {"content": CONTENT, "user": ("user",), "item": ("item",)}
    names = {
        group: [n for n, _ in model.inputs.named_parameters() if n.startswith(prefixes)]
        for group, prefixes in groups.items()
    }
    parameters = dict(model.inputs.named_parameters())
    logits = model(*data)
    cotangent = torch.randn(logits.shape, dtype=torch.float64)
    for i in range(4):
        grads = torch.autograd.grad(
            logits[:, i], list(parameters.values()), cotangent[:, i],
            retain_graph=True, materialize_grads=True,
        )  # fmt: skip
        moved = {n for n, grad in zip(parameters, grads, strict=True) if grad.any()}
        for group, experts in TRAINED_BY[embeddings].items():
            expected = set(names[group]) if i in experts else set()
            assert moved & set(names[group]) == expected, (group, i)


def test_strict_gradient_is_that_of_the_smallest_expert():
    """The whole loss gives an embedding what its one expert's part of the loss gives it."""
    model, data = small("strict", hidden=(16, 8)), batch()
    target = torch.rand(9).round().double()
    parameters = dict(model.inputs.named_parameters())

    def gradients(keep):
        logits = model(*data)
        kept = torch.zeros(4, dtype=torch.bool)
        kept[keep] = True
        # The weights stay those of all logits: only the gradient of the others is cut.
        logits = torch.where(kept, logits, logits.detach())
        loss = gem_loss(logits, target, model.family, "rare", "deselection")
        grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        return dict(zip(parameters, grads, strict=True))

    whole = gradients([0, 1, 2, 3])
    for group, expert in (("content", 0), ("user", 1), ("item", 2)):
        alone = gradients([expert])
        for name in parameters:
            if name.startswith(group):
                assert whole[name].any()
                torch.testing.assert_close(whole[name], alone[name])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_experts_learn_apart(backend):
    data = batch()
    strict = small("strict", backend)
    assert_gradient_isolated(strict, data, strict.family)
    shared = small("shared", backend)
    tables = {f"inputs.{name}" for name, _ in shared.inputs.named_parameters()}
    assert_gradient_isolated(shared, data, shared.family, shared=tables)
    with pytest.raises(AssertionError, match="inputs"):
        assert_gradient_isolated(shared, data, shared.family)


@pytest.mark.parametrize("embeddings", ["shared", "strict"])
def test_backends_train_alike(embeddings):
    models = [small(embeddings, backend, (12, 8)) for backend in ("torch", "reference")]
    models[1].load_state_dict(models[0].state_dict())
    before = copy.deepcopy(models[0].state_dict())
    data, target = batch((64,)), torch.rand(64).round()
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            loss = gem_loss(model(*data), target, model.family, "rare", "deselection", "expert")
            loss.backward()
            optimizer.step()
    for (name, ours), theirs in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        assert not torch.equal(ours, before[name])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("watched", [False, True], ids=["one op", "watched"])
def test_numbers_that_a_mask_leaves_out_reach_nothing(watched, dtype, poison):
    """Neither the loss nor a gradient, that of the projection which reads them first included."""
    model = small("strict").to(dtype)
    if watched:
        model.inputs.content.register_forward_hook(lambda *of: None)
    *ids, numeric = batch((3, 4))
    target = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).round()
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1]]).bool()

    def step(numbers):
        leaf = numbers.to(dtype).requires_grad_()
        loss = model.gem_loss(*ids, leaf, target, mask=mask)
        return loss, *torch.autograd.grad(loss, [leaf, *model.parameters()])

    loss, grad, *grads = step(numeric)
    assert grad[mask].any(-1).all()
    assert not grad[~mask].any()
    spoilt = step(numeric.masked_fill(~mask[..., None], poison))
    for a, b in zip((loss, grad, *grads), spoilt, strict=True):
        assert torch.equal(a, b)
    assert step(numeric.masked_fill(mask[..., None], torch.nan))[0].isnan()


# --- A torch module --------------------------------------------------------------------------


def test_state_dict_round_trip_is_bitwise():
    source, target = small(seed=1), small(seed=2)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(source(*batch()), target(*batch()))


def test_compiles_whole_with_a_dynamic_batch():
    torch._dynamo.reset()
    model = small("strict", hidden=(11, 3))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 2, 9):
        data = batch((rows,), rows)
        grad_z = torch.randn(rows, 4, dtype=torch.float64)
        with torch.compiler.set_stance("default" if rows == 4 else "fail_on_recompile"):
            ours = compiled(*data)
            got = torch.autograd.grad(ours, list(model.parameters()), grad_z)
        theirs = model(*data)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            got, torch.autograd.grad(theirs, list(model.parameters()), grad_z)
        )


def test_exports_with_a_dynamic_batch():
    model = small("strict", hidden=(10, 3))
    rows = torch.export.Dim("rows")
    program = torch.export.export(model, batch((4,)), dynamic_shapes=({0: rows},) * 4)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for count_rows in (1, 13):
        data = batch((count_rows,), count_rows)
        torch.testing.assert_close(loaded(*data), model(*data))


def test_errors_carry_the_values():
    with pytest.raises(LayoutError, match="'shared' or 'strict', got 'frozen'"):
        InterpretableNCF(SMALL, embeddings="frozen")
