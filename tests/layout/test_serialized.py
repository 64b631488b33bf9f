"""Plans: a layout as one integer tensor and back; the map that grad_x walks."""

import gc
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import maskmoe_kernels as mk
from maskmoe_kernels.layout.serialized import (
    deserialize,
    layout_of,
    serialize,
    serialized_layout,
    transposed_layout,
)
from maskmoe_kernels.testing import strategies

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")


@given(strategies.layouts())
def test_decode_inverts_encode(layout):
    serialized = serialize(layout)
    assert (serialized.dtype, serialized.dim()) == (torch.int64, 1)
    again = deserialize(serialized)
    assert again == layout
    assert torch.equal(again.mask(), layout.mask())
    assert torch.equal(again.grad_mask(), layout.grad_mask())
    weight = torch.randn(layout.num_weights)
    assert torch.equal(again.unpack(weight), layout.unpack(weight))
    assert torch.equal(serialize(again), serialized)


@given(strategies.layouts())
def test_a_layout_is_serialized_once(layout):
    serialized = serialized_layout(layout, CPU)
    assert serialized_layout(layout, CPU) is serialized
    assert layout_of(layout.id, serialized) == layout
    with pytest.raises(mk.LayoutError, match="one-dimensional int64"):  # no id stands for content
        layout_of(layout.id, torch.zeros(0, dtype=torch.int64))


@given(strategies.layouts(), strategies.layouts())
def test_ids_tell_layouts_apart(a, b):
    same = (
        (a.row_sizes, a.col_sizes) == (b.row_sizes, b.col_sizes)
        and torch.equal(a.mask(), b.mask())
        and torch.equal(a.grad_mask(), b.grad_mask())
        and torch.equal(serialize(a), serialize(b))
    )
    assert (a.id == b.id) == same
    assert 0 <= a.id < 2**63


@given(strategies.layouts(), st.integers(0, 2**16))
def test_transposed_is_the_routed_map_turned(layout, seed):
    of, index = transposed_layout(layout)
    assert torch.equal(of.mask(), layout.grad_mask().T)
    assert of.num_weights == len(index) == layout.num_routed_weights
    weight = torch.randn(layout.num_weights, generator=torch.Generator().manual_seed(seed))
    expected = torch.where(layout.grad_mask(), layout.unpack(weight), 0.0).T
    assert torch.equal(of.unpack(weight[index]), expected)


@given(strategies.layouts())
def test_transposed_twice_where_all_routes(layout):
    full = mk.BlockLayout(
        layout.row_sizes, layout.col_sizes, layout.present,
        row_order=layout.row_order, col_order=layout.col_order,
    )  # fmt: skip
    of, index = transposed_layout(full)
    back, again = transposed_layout(of)
    assert back == full
    assert torch.equal(index[again], torch.arange(full.num_weights))


@given(strategies.layouts())
def test_damaged_tensors_are_refused(layout):
    serialized = serialize(layout)
    for damaged, message in [
        (serialized[:-1], "it holds"),
        (torch.cat([serialized, serialized[:1]]), "it holds"),
        (serialized[:3], "one-dimensional int64"),
        (serialized[:5], "names"),
        (serialized.double(), r"int64 tensor, got torch\.float64"),
        (serialized[None], "one-dimensional"),
        (
            torch.cat([serialized[:1] + 1, serialized[1:]]),
            "version 2, this library reads version 1",
        ),
    ]:
        with pytest.raises(mk.LayoutError, match=message):
            deserialize(damaged)


def test_what_stands_for_nothing_is_refused():
    """A layout has one serialization: programs that differ in its bytes only would be two."""
    layout = mk.BlockLayout([3, 2], [2, 5], torch.eye(2).bool(), row_order=torch.arange(5).flip(0))
    serialized = serialize(layout)
    sizes = 5 + 2 + 2  # header, row sizes, column sizes; then a word of each mask
    for at, value in ((3, 2), (3, -1), (4, 2), (sizes, 1 << 4), (sizes + 1, 1 << 62)):
        odd = serialized.clone()
        odd[at] += value
        with pytest.raises(mk.LayoutError, match=r"stand for nothing|should hold"):
            deserialize(odd)
    assert deserialize(serialized) == layout


def test_a_forgotten_layout_is_decoded_and_a_wrong_one_refused():
    def build(size):
        return mk.BlockLayout([size, 2], [3, 5], torch.tensor([[1, 0], [1, 1]]).bool())

    layout, other = build(11), build(12)
    number, serialized, wrong = layout.id, serialize(layout), serialize(other)
    del layout
    gc.collect()
    with pytest.raises(mk.LayoutError, match=f"describes layout {other.id}.*{number}"):
        layout_of(number, wrong)
    assert layout_of(number, serialized) == build(11)


def test_ids_are_the_same_in_every_process():
    code = (
        "import torch, maskmoe_kernels as mk\n"
        "family = mk.SubsetFamily.powerset({'a': 2, 'b': 1})\n"
        "print(family.hidden_layout(3, 2).id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    family = mk.SubsetFamily.powerset({"a": 2, "b": 1})
    assert int(done.stdout) == family.hidden_layout(3, 2).id


def test_a_dead_twin_does_not_take_the_registration_with_it() -> None:
    layout = mk.BlockLayout([3, 2], [2, 5], torch.eye(2, dtype=torch.bool))
    twin = pickle.loads(pickle.dumps(layout))
    serialized = serialized_layout(layout, torch.device("cpu"))
    assert serialized_layout(twin, torch.device("cpu")) is serialized
    number = layout.id
    del twin
    gc.collect()
    assert (
        layout_of(number, serialized) is layout
    )  # not decoded: on a GPU that waits for the device
    twin = pickle.loads(pickle.dumps(layout))
    assert serialized_layout(twin, torch.device("cpu")) is serialized
    registered = weakref.ref(layout)
    del layout
    gc.collect()
    assert layout_of(number, serialized) is registered()  # kept by its twin
    assert twin == registered()
