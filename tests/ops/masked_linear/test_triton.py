"""The Triton kernels' tables, launches and choices; the op itself is tested in tests/ops."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import registered_layout, transposed_layout
from maskmoe_kernels.ops import triton_support as package
from maskmoe_kernels.ops.masked_linear import torch_impl
from maskmoe_kernels.ops.masked_linear.triton import configs
from maskmoe_kernels.ops.masked_linear.triton.configs import ALL, Config, candidates, split_k_chunks
from maskmoe_kernels.ops.masked_linear.triton.packed import cut_chunks, pack_tables
from maskmoe_kernels.ops.masked_linear.triton.tiles import cut
from maskmoe_kernels.ops.triton_support import unsupported_reason
from maskmoe_kernels.testing import strategies
from tests.ops.masked_linear.test_masked_linear import LAYOUTS
from tests.ops.runners import DEVICE

triton = pytest.importorskip("triton")
from maskmoe_kernels.ops.masked_linear.triton import launch, products, tune  # noqa: E402
from maskmoe_kernels.ops.selection.triton import selection_kernels  # noqa: E402

runnable = pytest.mark.skipif(
    unsupported_reason(DEVICE) is not None, reason=str(unsupported_reason(DEVICE))
)
CHAIN = mk.SubsetFamily(
    {f"g{n}": 1 for n in range(6)}, {f"first {k}": [f"g{n}" for n in range(k)] for k in range(1, 7)}
)


# --- Tables ------------------------------------------------------------------------------


def positions(tiles):
    """(unit, feature) to the packed position that the kernels would read for it."""
    found = {}
    for tile, (weight, width, first, last) in enumerate(tiles.tiles.tolist()):
        for entry in range(first * tiles.depth, last * tiles.depth):
            chunk, k = divmod(entry, tiles.depth)
            feature = int(tiles.features[chunk, k])
            for lane, unit in enumerate(tiles.units[tile].tolist()):
                if feature < 0 or unit < 0:
                    continue
                if tiles.shared:
                    base, stride = int(tiles.bases[chunk, lane]), int(tiles.strides[tile, lane])
                    if base < 0:
                        continue
                    at = base + k * stride
                else:
                    at = weight + (entry - first * tiles.depth) * width + lane
                assert (unit, feature) not in found
                found[unit, feature] = at
    return found


cuts = st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 32]))


@given(strategies.layouts(), cuts)
def test_tiles_read_every_weight_once_and_nothing_else(layout, sizes):
    dense = layout.unpack(torch.arange(1.0, layout.num_weights + 1)).long()
    expected = {(u, f): int(dense[u, f]) - 1 for u, f in dense.nonzero().tolist()}
    tiles = cut(layout, *sizes)
    assert positions(tiles) == expected
    units = tiles.units[tiles.units >= 0]
    assert sorted(units.tolist()) == list(range(layout.out_features))


def packed_positions(layout, sizes, origin=None):
    """The same of packed tiles, whose units are those of the tiles that are not packed."""
    chunks, units = cut_chunks(layout, *sizes), cut(layout, *sizes).units
    packed = pack_tables(layout, chunks, origin)
    found, counts = {}, {}
    for tile, first, last, slot in packed.parts.tolist():
        assert slot == -1
        counts[tile] = last - first
        for chunk in range(first, last):
            for lane, k in (packed.index[chunk] >= 0).nonzero().tolist():
                key = int(units[tile, lane]), int(packed.features[chunk, k])
                assert min(key) >= 0
                assert key not in found
                found[key] = int(packed.index[chunk, lane, k])
    assert [counts[tile] for tile in range(len(units))] == chunks.counts
    return found


@given(strategies.layouts(), cuts)
def test_packed_tiles_hold_every_weight_once_and_nothing_else(layout, sizes):
    dense = layout.unpack(torch.arange(1.0, layout.num_weights + 1)).long()
    expected = {(u, f): int(dense[u, f]) - 1 for u, f in dense.nonzero().tolist()}
    assert packed_positions(layout, sizes) == expected


@given(strategies.layouts(), cuts)
def test_the_transposed_layout_reads_the_routed_weights(layout, sizes):
    of, index = transposed_layout(layout)
    routed = layout.unpack(torch.arange(1.0, layout.num_weights + 1)) * layout.grad_mask()
    expected = {(f, u): int(routed[u, f]) - 1 for u, f in routed.nonzero().tolist()}
    found = positions(cut(of, *sizes))
    assert {key: int(index[at]) for key, at in found.items()} == expected
    assert packed_positions(of, sizes, index) == expected


@given(strategies.layouts(), cuts, st.integers(1, 5), st.sampled_from([16, 32]))
def test_parts_and_items_share_out_the_work(layout, sizes, longest, features):
    tiles = cut(layout, *sizes).split(longest)
    chunks = {tile: [] for tile in range(tiles.num_tiles)}
    slots = {}
    for tile, first, last, slot in tiles.parts.tolist():
        assert last - first <= longest
        chunks[tile] += range(first, last)
        if slot >= 0:
            slots.setdefault(tile, []).append(slot)
    for tile, (_, _, first, last) in enumerate(tiles.tiles.tolist()):
        assert sorted(chunks[tile]) == list(range(first, last))
    for tile, first, last in tiles.splits.tolist():
        assert sorted(slots.pop(tile)) == list(range(first, last))
    assert not slots
    assert tiles.num_slots == sum(last - first for _, first, last in tiles.splits.tolist())
    lengths = (tiles.parts[:, 2] - tiles.parts[:, 1]).tolist()
    assert lengths == sorted(lengths, reverse=True)

    starts = set()
    seen = {tile: [] for tile in range(tiles.num_tiles)}
    for tile, at, end, is_first in tiles.weight_items(features).tolist():
        seen[tile] += tiles.features.view(-1)[at : min(at + features, end)].tolist()
        starts |= {tile} if is_first else set()
    assert starts == set(range(tiles.num_tiles))  # each sums its bias once
    for tile, (_, _, first, last) in enumerate(tiles.tiles.tolist()):
        mine = tiles.features[first:last].reshape(-1)
        assert [f for f in seen[tile] if f >= 0] == mine[mine >= 0].tolist()


@given(strategies.layouts(), cuts)
def test_grains_are_true(layout, sizes):
    """Loads as wide as a grain read what lies there, all of it or none."""
    tiles = cut(layout, *sizes)
    for table, grain in ((tiles.features, tiles.feature_grain), (tiles.units, tiles.unit_grain)):
        groups = table.view(-1, grain)
        assert not (groups[:, 0] % grain).any()
        assert (groups.diff(dim=1) == 1).all()
    grain = tiles.weight_grain
    if not tiles.shared:
        assert not (tiles.tiles[:, :2] % grain).any()
        return
    groups = tiles.bases.view(-1, grain)
    present = groups[(groups >= 0).any(1)]
    assert (present.diff(dim=1) == 1).all()
    assert not (present[:, 0] % grain).any()
    assert not (tiles.strides % grain).any()


def test_wide_blocks_are_loaded_wide():
    layout = CHAIN.hidden_layout(32, 32)
    tiles = cut(layout, 32, 32)
    assert (tiles.shared, tiles.feature_grain, tiles.unit_grain, tiles.weight_grain) == (
        False, 16, 16, 16,
    )  # fmt: skip
    together = cut(CHAIN.hidden_layout(16, 16), 64, 32)
    assert (together.shared, together.feature_grain, together.weight_grain) == (True, 16, 16)


def test_small_row_blocks_join_those_that_read_alike():
    family = mk.SubsetFamily(
        dict.fromkeys("abcd", 1),
        {"a": ["a"], "c": ["c"], "ab": ["a", "b"], "cd": ["c", "d"]},
    )
    tiles = cut(family.hidden_layout(16, 8), 16, 16)
    members = [sorted({u // 8 for u in row if u >= 0}) for row in tiles.units.tolist()]
    assert sorted(members) == [[0, 2], [1, 3]]


def test_what_tiles_would_only_pad_goes_to_pytorch():
    generator = torch.Generator().manual_seed(0)
    with pytest.warns(UserWarning, match="distinct rows"):
        fine = mk.BlockLayout.from_mask(torch.rand(700, 700, generator=generator) < 0.5)
    assert not products.products_of(fine).fits
    for layout in (CHAIN.hidden_layout(16, 16), LAYOUTS["random"], LAYOUTS["nothing"]):
        assert products.products_of(layout).fits


# --- Configurations ----------------------------------------------------------------------


@given(
    strategies.layouts(),
    st.integers(1, 1 << 20),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["ieee", "tf32", "tf32x3"]),
)
def test_at_most_four_different_candidates(layout, rows, dtype, precision):
    product = products.Product(layout)
    options = candidates(product.cut, layout, rows, dtype, precision, 132)
    assert 1 <= len(options) == len(set(options)) <= 8
    for c in options:
        assert c.lanes in (16, 32, 64, 128)
        assert c.rows in (16, 32, 64, 128)
        assert c.rows * c.lanes <= 32 * 64 * c.warps


@given(st.integers(1, 1 << 22), st.integers(1, 5000), st.integers(1, 1 << 26))
def test_slabs_stay_within_the_workspace(rows, items, sums):
    count = split_k_chunks(rows, items, sums, 132)
    assert count == 1 or (count * sums * 4 <= configs.WORKSPACE and rows // count >= 256)


WAYS = {
    "tall": Config(64, 16, 16, 1, 4, 1),
    "all parts in a program": Config(16, 16, 16, ALL, 4, 1),
    "wide": Config(16, 64, 32, 1, 4, 3),
    "two parts in a program": Config(32, 32, 16, 2, 4, 3),
    "gradients apart": Config(16, 32, 16, 1, 4, 3, apart=True),
    "formed once": Config(32, 32, 16, 1, 4, 3, formed=True, features=32),
    "formed once and apart": Config(16, 16, 32, 1, 4, 3, apart=True, formed=True, features=64),
}


def results(layout, rows, activation, kernels, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(rows, layout.in_features).to(DEVICE, dtype)
    weight = torch.randn(layout.num_weights).to(DEVICE, dtype)
    bias = torch.randn(layout.out_features).to(DEVICE, dtype)
    grad_y = torch.randn(rows, layout.out_features).to(DEVICE, dtype)
    y, z = kernels.forward(x, weight, bias, layout, activation, True)
    saved = z if z.numel() else y
    return y, *kernels.backward(grad_y, x, weight, saved, layout, activation, (True, True, True))


RAGGED = mk.BlockLayout(
    [33, 5, 16], [17, 8, 16], torch.ones(3, 3).tril().bool(), torch.eye(3).bool(),
    row_order=torch.arange(54).flip(0),
)  # fmt: skip


@runnable
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_cut_gives_the_same(way, monkeypatch):
    """Splits and split_k_chunks too: a chip with many processors and few rows has both."""
    monkeypatch.setattr(tune, "choose", lambda kind, a, b, c, options, run: _forced(options, way))
    for module in (launch, products):
        monkeypatch.setattr(module, "processors", lambda device: 40)
    monkeypatch.setattr(launch, "split_k_chunks", lambda rows, *_: 2)
    monkeypatch.setattr(products, "_SHORT", 1)
    registered_layout(RAGGED).caches.derived.clear()
    ours = results(RAGGED, 140, "gelu", launch)
    for a, b in zip(ours, results(RAGGED, 140, "gelu", torch_impl), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _forced(options, way):
    one = options()[0]
    config = WAYS[way]
    return (replace(config, parts=1), config) if isinstance(one, tuple) else config


def bits(t):
    return t.contiguous().view(torch.int32)


@runnable
@pytest.mark.parametrize(
    ("way", "few"), [("tall", False), ("tall", True), ("gradients apart", True), ("wide", False)]
)
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf], ids=str)
def test_rows_with_values_that_are_not_finite(bad, few, way, monkeypatch):
    """In shared tiles: who sees them has what the definition says; nobody else's bits change."""
    monkeypatch.setattr(tune, "choose", lambda kind, a, b, c, options, run: _forced(options, way))
    if few:
        for module in (launch, products):
            monkeypatch.setattr(module, "processors", lambda device: 400)
        monkeypatch.setattr(products, "_SHORT", 1)
    family = mk.SubsetFamily.powerset({"a": 1, "b": 1, "c": 1})
    layout = family.hidden_layout([7, 5, 8, 6, 5, 8, 3], [7, 4, 8, 6, 5, 8, 3])
    registered_layout(layout).caches.derived.clear()
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, layout.in_features), (layout.num_weights,), (layout.out_features,)]
    x, weight, bias = (torch.randn(s, generator=generator).to(DEVICE) for s in shapes)
    weight[::7] = 0
    row, column = torch.tensor([0, 3, 3, 39]), torch.tensor([2, 11, 30, 40])
    dirty = x.clone()
    dirty[row, column] = bad
    clean, _ = launch.forward(x, weight, bias, layout, "none", False)
    found, _ = launch.forward(dirty, weight, bias, layout, "none", False)
    reach = torch.zeros(40, layout.out_features, dtype=torch.bool)
    for r, c in zip(row.tolist(), column.tolist(), strict=True):
        reach[r] |= layout.mask()[:, c]
    reach = reach.to(DEVICE)
    assert reach.any()
    assert torch.equal(bits(found)[~reach], bits(clean)[~reach])
    expected, _ = torch_impl.forward(dirty, weight, bias, layout, "none", False)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert not found[reach].isfinite().any()
    # The same of grad_x, whose lanes are features and whose features are units.
    grad = torch.randn(40, layout.out_features, generator=generator).to(DEVICE)
    dirty = grad.clone()
    dirty[row, column] = bad
    needs = (True, False, False)
    of = (x, weight, clean, layout, "none", needs)
    clean_grad, bad_grad = (launch.backward(g, *of)[0] for g in (grad, dirty))
    theirs = torch_impl.backward(dirty, *of)[0]
    torch.testing.assert_close(bad_grad, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)
    same = theirs.isfinite()
    assert not same.all()
    assert torch.equal(bits(bad_grad)[same], bits(clean_grad)[same])


@runnable
def test_long_tiles_are_split_where_rows_are_few(monkeypatch):
    launched = []
    real = launch.kernels.reduce_parts
    monkeypatch.setattr(launch.kernels, "reduce_parts", _Spy(real, launched))
    monkeypatch.setattr(products, "processors", lambda device: 132)
    layout = CHAIN.hidden_layout(64, 16)
    ours = results(layout, 5, "relu", launch)
    assert len(launched) == 1
    for a, b in zip(ours, results(layout, 5, "relu", torch_impl), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class _Spy:
    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(grid)
        return self.kernel[grid]


WIDE = mk.BlockLayout([256, 130], [20, 130], torch.tensor([[True, False], [True, True]]))


@runnable
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_and_exported_with_wide_experts(backend):
    """One graph; experts wider than any tile."""
    torch.manual_seed(0)
    layer = mk.MaskedLinear.from_layout(WIDE, activation="silu", backend="triton", device=DEVICE)
    x, grad_y = torch.randn(9, 150, device=DEVICE), torch.randn(9, 386, device=DEVICE)
    mk.testing.assert_close_to_oracle(
        lambda *args: mk.masked_linear(*args, backend="triton"),
        x, layer.weight.detach(), layer.bias.detach(), WIDE, "silu",
    )  # fmt: skip
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        layer.zero_grad()
        y = run(x)
        y.backward(grad_y)
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        assert torch.equal(program.module()(x), results[0][0])


@runnable
@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True),
                                   (True, False, True)])  # fmt: skip
def test_what_is_not_needed_is_empty(needs):
    layout = LAYOUTS["hidden"]
    x, grad_y = torch.randn(20, layout.in_features), torch.randn(20, layout.out_features)
    weight = torch.randn(layout.num_weights)
    tensors = [t.to(DEVICE) for t in (grad_y, x, weight, grad_y)]
    ours = launch.backward(*tensors, layout, "tanh", needs)
    for a, b in zip(ours, torch_impl.backward(*tensors, layout, "tanh", needs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@runnable
def test_offsets_past_two_to_the_31():
    """Rows that lie 2^30 elements apart; memory that nothing touches is never there."""
    layout = mk.BlockLayout([16, 3], [16, 5], torch.tensor([[True, False], [True, True]]))
    stride = 2**30
    room = torch.empty(2 * stride + layout.in_features, dtype=torch.float16, device=DEVICE)
    x = room.as_strided((3, layout.in_features), (stride, 1))
    x.copy_(torch.randn(3, layout.in_features))
    weight = torch.randn(layout.num_weights, dtype=torch.float16, device=DEVICE)
    y, _ = launch.forward(x, weight, None, layout, "none", False)
    expected = mk.testing.dense_oracle(x, weight, None, layout)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    grad_y = torch.randn_like(y)
    _, grad_weight, _ = launch.backward(grad_y, x, weight, y, layout, "none", (False, True, False))
    by_hand = layout.pack(grad_y.float().t() @ x.float())
    torch.testing.assert_close(grad_weight.float(), by_hand, rtol=1e-2, atol=1e-2)


# --- Choosing ----------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Choices as on a GPU whose second configuration is always the fastest."""
    calls = []

    def microseconds(choices, run):
        calls.append(len(choices))
        return [3.0, 1.0, *[2.0] * (len(choices) - 2)]

    monkeypatch.setenv("MASKMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(tune, "microseconds", microseconds)
    products.forget()
    yield calls
    products.forget()


OPTIONS = [WAYS["tall"], WAYS["wide"], WAYS["two parts in a program"]]


def chosen(
    rows=100, options=OPTIONS, layout=LAYOUTS["hidden"], dtype=torch.float32, kind="forward"
):
    x = torch.empty(rows, layout.in_features, dtype=dtype)
    return tune.choose(kind, layout, x, "ieee", lambda: options, lambda config: None)


def test_the_fastest_is_kept_for_the_process_and_on_disk(measured, tmp_path):
    assert chosen() == OPTIONS[1]
    assert chosen(rows=127) == OPTIONS[1]  # as many bits: the same choice
    assert measured == [3]
    products.forget()  # a new process
    assert chosen() == OPTIONS[1]
    assert measured == [3]
    (file,) = (tmp_path / "cache").iterdir()
    assert len(json.loads(file.read_text())) == 1


def test_each_case_is_measured_for_itself(measured):
    chosen()
    chosen(rows=128)
    chosen(dtype=torch.float16)
    chosen(layout=LAYOUTS["input"])
    chosen(kind="backward")
    assert measured == [3] * 5
    pairs = [(OPTIONS[0], OPTIONS[1]), (OPTIONS[1], OPTIONS[2])]
    assert chosen(options=pairs, kind="both") == pairs[1]
    products.forget()
    assert chosen(options=pairs, kind="both") == pairs[1]
    assert measured == [3] * 5 + [2]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"forward": 3}', "\x00\xff"])
def test_a_damaged_cache_is_measured_anew(measured, tmp_path, damage):
    chosen()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(damage)
    products.forget()
    assert chosen() == OPTIONS[1]
    assert measured == [3, 3]
    assert json.loads(file.read_text())


def test_what_is_no_longer_proposed_is_measured_anew(measured):
    chosen()
    products.forget()
    assert chosen(options=OPTIONS[2:] + OPTIONS[:1]) == OPTIONS[0]
    assert measured == [3, 2]


def test_a_folder_that_cannot_be_written_only_costs_time(measured, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("MASKMOE_CACHE", str(tmp_path / "file"))
    assert chosen() == OPTIONS[1]


@pytest.mark.parametrize("why", ["asked", "capturing", "one option"])
def test_nothing_is_measured(measured, monkeypatch, why):
    """The first choice is then kept: what a graph replays has the bits of the eager call."""
    if why == "asked":
        monkeypatch.setenv("MASKMOE_TUNE", "0")
    if why == "capturing":
        monkeypatch.setattr(tune, "is_capturing", lambda: True)
    options = OPTIONS[:1] if why == "one option" else OPTIONS
    assert chosen(options=options) == OPTIONS[0]
    monkeypatch.setattr(tune, "is_capturing", lambda: False)
    monkeypatch.delenv("MASKMOE_TUNE", raising=False)
    assert chosen(options=options) == OPTIONS[0]
    assert measured == []


def test_tables_are_not_made_during_a_capture(monkeypatch):
    layout = CHAIN.hidden_layout(5, 3)
    monkeypatch.setattr(products, "is_capturing", lambda: True)
    with pytest.raises(mk.BackendError, match="run one forward and backward of this size before"):
        results(layout, 3, "relu", launch)


# --- Reasons -----------------------------------------------------------------------------


def test_reasons_say_what_is_missing(monkeypatch):
    assert "for NVIDIA GPUs" in unsupported_reason(torch.device("mps"))
    monkeypatch.setattr("maskmoe_kernels.ops.triton_support._capability", lambda device: (7, 5))
    assert "sm_75; the kernels need sm_80 or newer" in unsupported_reason(torch.device("cuda"))
    monkeypatch.setattr("maskmoe_kernels.ops.triton_support._MISSING", "Triton is not installed")
    assert unsupported_reason(DEVICE) == "Triton is not installed"


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.0", "2.10.1", False),
        ("3.7.0", "2.4.0", True),
        ("3.10.0", "2.5.0", True),
    ],
)
def test_an_interpreter_that_numpy_stops_is_a_reason_in_words(triton, numpy, works):
    """Named, it would end in a TypeError of numpy's."""
    found = package._interpreter_reason(triton, numpy)
    assert (found is None) == works
    for word in () if works else (triton, numpy, "'numpy<2.4'"):
        assert word in found


def test_the_interpreters_reason_reaches_every_call(monkeypatch):
    monkeypatch.setattr(package, "INTERPRETED", True)
    monkeypatch.setattr(package, "_INTERPRETER", "numpy stops the interpreter")
    x = torch.ones(1, 2)
    with pytest.raises(mk.BackendError, match="'triton' cannot run: numpy stops"):
        mk.ops.dispatch.choose("masked_linear", "triton", None, (x,))
    with pytest.raises(mk.BackendError, match="cannot run: numpy stops"):
        selection_kernels.rows_of(x)


def test_the_interpreter_runs_where_it_is_named_only():
    x = torch.ones(1, 2)
    assert mk.ops.dispatch.choose("masked_linear", None, None, (x,)) != "triton"


def test_float64_named_is_refused():
    x = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(mk.BackendError, match=r"'triton' cannot run: x is torch\.float64"):
        mk.ops.dispatch.choose("masked_linear", "triton", None, (x,))
