"""Every public function, given what is no tensor, no family or of another kind, names the argument.

An adapter a function gives good arguments. Each of them is replaced by others of wrong kinds that
hold the same numbers. The call then raises an error of this package that names the argument; or it
takes them, and returns the same.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maskmoe_kernels as mk

torch.manual_seed(0)
FAMILY = mk.SubsetFamily.powerset({"a": 2, "b": 3}, min_size=0)
SECOND = {"b": 2}
LAYOUT = mk.BlockLayout([2, 1], [2, 3], torch.tensor([[True, False], [True, True]]))
X = torch.randint(-2, 3, (4, 5)).float()
LOGITS = torch.randint(-2, 3, (4, 4)).float()
Y = torch.tensor([0.0, 1.0, 1.0, 0.0])
COUNTS = torch.tensor([True, True, False, True])
WEIGHT = torch.randint(-2, 3, (LAYOUT.num_weights,)).float()
BIAS = torch.tensor([1.0, 2.0, -1.0])
HALVES = {"first": torch.ones(2, 3, 5), "second": torch.ones(2, 3, 2)}
PADDING = {
    "first_padding": torch.zeros(2, 3, dtype=torch.bool),
    "second_padding": torch.zeros(2, 3, dtype=torch.bool),
}
STATE = torch.ones(4, 8)
SAMPLES = {"mask": COUNTS, "sample_weight": torch.tensor([1.0, 2.0, 1.0, 3.0])}
SELECTING = {"confidence": "abs", "sharpness": 1.0}
INPUTS = {
    "x": X[:, :2],
    "tables": (torch.ones(7, 3),),
    "ids": (torch.tensor([1, 2, 3, 0]),),
    "order": (-2, 0),
}

NET = mk.InterpretableMLP(FAMILY, [3])
GRU, TRANSFORMER = (
    kind(FAMILY, SECOND, width=2, layers=1)
    for kind in (mk.InterpretableGRU, mk.InterpretableTransformer)
)
LAYER = mk.MaskedLinear.from_layout(LAYOUT)
ATTENTION = mk.MaskedMultiheadAttention(FAMILY, 2, batch_first=True)
CELL = mk.MaskedGRUCell(FAMILY, 2)
RECURRENT = mk.MaskedGRU(FAMILY, 2)


def of_losses(x: str) -> dict[str, Any]:
    first = {"x": X} if x == "x" else {"logits": LOGITS}
    rest = {"target": Y, "weighting": "selection", "normalize": "batch"} | SAMPLES
    return first | rest | SELECTING


#: Name to (what is called, its arguments).
ADAPTERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "BlockLayout": (
        mk.BlockLayout,
        {
            "row_sizes": [2, 1],
            "col_sizes": [2, 3],
            "present": LAYOUT.present,
            "routes_grad": LAYOUT.present,
            "row_order": torch.tensor([1, 0, 2]),
            "col_order": torch.tensor([1, 0, 2, 3, 4]),
        },
    ),
    "BlockLayout.between": (
        mk.BlockLayout.between,
        {"rows": FAMILY, "cols": FAMILY, "row_width": 2, "col_width": 2},
    ),
    "BlockLayout.check_weight": (LAYOUT.check_weight, {"weight": WEIGHT}),
    "BlockLayout.from_mask": (
        mk.BlockLayout.from_mask,
        {"mask": LAYOUT.mask(), "grad_mask": LAYOUT.mask()},
    ),
    "BlockLayout.pack": (LAYOUT.pack, {"dense": torch.ones(3, 5)}),
    "BlockLayout.unpack": (LAYOUT.unpack, {"weight": WEIGHT}),
    "ExpertNorm": (mk.ExpertNorm, {"family": FAMILY, "width": 2}),
    "ExpertNorm.forward": (mk.ExpertNorm(FAMILY, 2), {"x": STATE}),
    "Inputs": (lambda **given: mk.Inputs(**given).joined(), INPUTS),
    "InterpretableGRU": (
        mk.InterpretableGRU,
        {
            "family": FAMILY,
            "second_groups": SECOND,
            "width": 2,
            "layers": 1,
            "first_groups": FAMILY.groups,
        },
    ),
    "InterpretableGRU.forward": (GRU, HALVES | PADDING),
    "InterpretableGRU.predict": (GRU.predict, HALVES | PADDING | SELECTING),
    "InterpretableGRU.present": (GRU.present, HALVES | PADDING),
    "InterpretableMLP": (
        mk.InterpretableMLP,
        {"family": FAMILY, "hidden": [3], "input_layout": FAMILY.input_layout(3)},
    ),
    "InterpretableMLP.expert_loss": (
        NET.expert_loss,
        {"x": X, "target": Y, "kind": "regression"} | SAMPLES,
    ),
    "InterpretableMLP.forward": (NET, {"x": X}),
    "InterpretableMLP.gem_loss": (NET.gem_loss, of_losses("x")),
    "InterpretableMLP.predict": (NET.predict, {"x": X, "missing": "skip"} | SELECTING),
    "InterpretableTransformer": (
        mk.InterpretableTransformer,
        {
            "family": FAMILY,
            "second_groups": SECOND,
            "width": 2,
            "heads": 1,
            "layers": 1,
            "feedforward": 2,
            "first_groups": FAMILY.groups,
        },
    ),
    "InterpretableTransformer.forward": (TRANSFORMER, HALVES | PADDING),
    "InterpretableTransformer.predict": (TRANSFORMER.predict, HALVES | PADDING | SELECTING),
    "InterpretableTransformer.present": (TRANSFORMER.present, HALVES | PADDING),
    "MaskedGRU": (mk.MaskedGRU, {"family": FAMILY, "hidden_size": 2, "num_layers": 2}),
    "MaskedGRU.forward": (
        RECURRENT,
        {"input": torch.ones(3, 4, 5), "hx": STATE[None], "lengths": torch.tensor([3, 1, 2, 3])},
    ),
    "MaskedGRUCell": (
        mk.MaskedGRUCell,
        {"family": FAMILY, "hidden_size": 2, "input_layout": FAMILY.input_layout(2)},
    ),
    "MaskedGRUCell.forward": (CELL, {"input": X, "hx": STATE}),
    "MaskedLinear": (
        mk.MaskedLinear,
        {
            "in_features": 5,
            "out_features": 3,
            "mask": LAYOUT.mask(),
            "grad_mask": LAYOUT.mask(),
            "activation": "relu",
        },
    ),
    "MaskedLinear.forward": (LAYER, {"x": X}),
    "MaskedLinear.from_layout": (mk.MaskedLinear.from_layout, {"layout": LAYOUT}),
    "MaskedLinear.from_linear": (
        mk.MaskedLinear.from_linear,
        {"linear": nn.Linear(5, 3), "mask": LAYOUT.mask(), "grad_mask": LAYOUT.mask()},
    ),
    "MaskedMLP": (
        mk.MaskedMLP,
        {"layouts": [FAMILY.input_layout(3), FAMILY.hidden_layout(3, 1)], "activation": "tanh"},
    ),
    "MaskedMLP.forward": (NET.layers, {"x": X}),
    "MaskedMLP.layered": (NET.layers.layered, {"x": X}),
    "MaskedMultiheadAttention": (
        mk.MaskedMultiheadAttention,
        {"family": FAMILY, "width": 2, "heads": 1, "kv_family": FAMILY, "kv_width": 2},
    ),
    "MaskedMultiheadAttention.forward": (
        ATTENTION,
        {
            "query": torch.ones(2, 3, 8),
            "key": torch.ones(2, 3, 8),
            "value": torch.ones(2, 3, 8),
            "key_padding_mask": torch.zeros(2, 3, dtype=torch.bool),
            "attn_mask": torch.zeros(3, 3, dtype=torch.bool),
        },
    ),
    "SubsetFamily": (
        mk.SubsetFamily,
        {"groups": {"a": 2, "b": 3}, "subsets": {"a": ["a"], "both": ["a", "b"]}},
    ),
    "SubsetFamily.hidden_layout": (FAMILY.hidden_layout, {"in_width": 2, "out_width": 2}),
    "SubsetFamily.input_layout": (FAMILY.input_layout, {"width": 2}),
    "SubsetFamily.powerset": (
        mk.SubsetFamily.powerset,
        {"groups": {"a": 2, "b": 3}, "min_size": 1, "max_size": 2},
    ),
    "SubsetFamily.with_top": (
        mk.SubsetFamily({"a": 1, "b": 1}, {"a": ["a"]}).with_top,
        {"name": "all"},
    ),
    "convert_": (
        mk.convert_,
        {"model": nn.Sequential(nn.Linear(2, 2)), "batch": 4, "force": True, "backend": "torch"},
    ),
    "expert_loss": (
        mk.expert_loss,
        {"predictions": LOGITS, "target": Y, "kind": "binary"} | SAMPLES,
    ),
    "gem_loss": (mk.gem_loss, of_losses("logits") | {"family": FAMILY}),
    "interactions": (mk.interactions, {"logits": LOGITS, "family": FAMILY, "dim": -1}),
    "masked_linear": (
        mk.masked_linear,
        {"x": X, "weight": WEIGHT, "bias": BIAS, "layout": LAYOUT, "activation": "tanh"},
    ),
    "mixture": (
        mk.mixture,
        {"logits": LOGITS, "family": FAMILY, "missing": "skip"} | SELECTING,
    ),
    "moebius": (mk.moebius, {"logits": LOGITS, "family": FAMILY, "dim": -1}),
    "revert_": (mk.revert_, {"model": nn.Sequential(nn.Linear(2, 2))}),
    "selection": (mk.selection, {"logits": LOGITS, "family": FAMILY} | SELECTING),
    "shapley": (
        mk.shapley,
        {"logits": LOGITS, "family": FAMILY, "method": "exact", "dim": -1},
    ),
    "sufficient": (
        mk.sufficient,
        {"logits": LOGITS, "family": FAMILY, "tolerance": 0.5, "dim": -1},
    ),
    "testing.assert_blind": (
        mk.testing.assert_blind,
        {"module": LAYER, "x": X, "visible": LAYOUT.mask()},
    ),
    "testing.assert_close_to_oracle": (
        mk.testing.assert_close_to_oracle,
        {"op": mk.masked_linear, "x": X, "weight": WEIGHT, "bias": BIAS, "layout": LAYOUT},
    ),
    "testing.assert_gradient_isolated": (
        mk.testing.assert_gradient_isolated,
        {"net": NET, "x": X, "family": FAMILY},
    ),
    "testing.dense_oracle": (
        mk.testing.dense_oracle,
        {"x": X, "weight": WEIGHT, "bias": BIAS, "layout": LAYOUT},
    ),
}
#: What modules and layouts ask of each other, with arguments that were checked before.
NO_INPUT = {
    "BlockLayout.table", "BlockLayout.weight_index", "MaskedMLP.fused",
    "MaskedGRUCell.split", "MaskedGRUCell.step",
    "MaskedLinear.register_forward_pre_hook", "MaskedLinear.register_parameter",
    "MaskedLinear.set_extra_state", "SubsetFamily.table",
}  # fmt: skip
#: What ``convert_`` makes, and nobody else.
MADE = ("ConversionRecord", "ConversionReport", "ConvertedLinear")


def public() -> set[str]:
    """Functions of ``mk.__all__``, classes, and methods that take arguments."""
    found = set()
    for name in mk.__all__:
        of = getattr(mk, name)
        if name in MADE:
            continue
        if name == "testing":
            of_testing = {n: getattr(of, n) for n in of.__all__}
            found |= {f"testing.{n}" for n, f in of_testing.items() if inspect.isfunction(f)}
        elif inspect.isfunction(of) and inspect.signature(of).parameters:
            found.add(name)
        elif inspect.isclass(of) and not issubclass(of, Exception):
            found.add(name)
            for method in dir(of):
                function = inspect.getattr_static(of, method)
                function = getattr(function, "__func__", function)
                own = inspect.isfunction(function) and "maskmoe" in function.__module__
                if own and method[0] != "_" and len(inspect.signature(function).parameters) > 1:
                    found.add(f"{name}.{method}")
    return found


def test_every_public_function_has_its_adapter():
    assert public() == set(ADAPTERS) | NO_INPUT


def wrong(value: Any) -> dict[str, Any]:
    """Kind to something in its place; where it can, it holds the same numbers."""
    kinds: dict[str, Any] = {"text": "text", "None": None}
    if isinstance(value, Tensor):
        kinds |= {"numpy": value.numpy(), "list": value.tolist(), "meta": value.to("meta")}
        kinds["another dtype"] = value.float() if value.dtype == torch.bool else value.long()
        return kinds
    if isinstance(value, str):
        return {"number": 3, "tensor": torch.ones(2)}
    if isinstance(value, (int, float)):
        return {"text": "text", "list": ["a"], "tensor": torch.ones(2, 2)}
    return kinds | {"number": 3, "list": [1.5, 2.5], "tensor": torch.ones(2, 2)}


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        fits = isinstance(found, Tensor) and found.shape == expected.shape
        return fits and (found.is_meta or torch.equal(found, expected.to(found.dtype)))
    if isinstance(expected, nn.Module):
        return type(found) is type(expected) and repr(found) == repr(expected)
    if isinstance(expected, tuple) and isinstance(found, tuple):
        return all(same(a, b) for a, b in zip(found, expected, strict=True))
    return bool(found == expected)


def is_optional(function: Callable[..., Any], argument: str) -> bool:
    found = inspect.signature(getattr(function, "forward", function)).parameters.get(argument)
    return found is None or found.default is not inspect.Parameter.empty or "None" in str(found)


def problem(name: str, argument: str, kind: str) -> str | None:
    """What is wrong with the answer to such an argument."""
    function, given = ADAPTERS[name]
    bad = given | {argument: wrong(given[argument])[kind]}
    torch.manual_seed(0)
    try:
        found = function(**bad)
    except (mk.LayoutError, mk.BackendError, mk.DataError) as error:
        return None if re.search(rf"\b{argument}\b", str(error)) else f"says {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if kind == "None" and is_optional(function, argument):
        return None
    torch.manual_seed(0)
    return None if same(found, function(**given)) else "gives another result"


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_argument_is_named(name):
    function, given = ADAPTERS[name]
    function(**given)
    found = {
        f"{argument}={kind}": problem(name, argument, kind)
        for argument, value in given.items()
        for kind in wrong(value)
    }
    assert {case: what for case, what in found.items() if what} == {}
