"""What is mutated, and which tests are to notice: the fast and the sharp ones first."""

from __future__ import annotations

_TRUST = ["tests/ops/test_trust.py", "tests/fuzz/test_ops.py"]
_NEEDS = "tests/ops/masked_linear/test_needs.py"
_TILES = "tests/ops/masked_linear/test_tiles.py"
_LIFETIMES = "tests/ops/test_lifetimes.py"
_KINDS = "tests/layout/test_mask_kinds.py"
_CONVERT = "tests/nn/test_convert.py"
_OPS = ["tests/ops/masked_linear/test_masked_linear.py", "tests/ops/masked_linear/test_contract.py"]
_LINEAR = [
    _OPS[0],
    _NEEDS,
    "tests/ops/masked_linear/test_no_route.py",
    "tests/fuzz/test_layers.py",
    _OPS[1],
]
_SELECTION = [
    "tests/ops/selection/test_selection.py",
    "tests/ops/selection/test_gem.py",
    "tests/ops/selection/test_expert_loss.py",
    "tests/ops/selection/test_mixture.py",
    "tests/ops/selection/test_labels.py",
    "tests/ops/selection/test_missing.py",
]
_MLP = [
    "tests/models/test_mlp.py",
    "tests/ops/masked_mlp/test_masked_mlp.py",
    "tests/ops/masked_mlp/test_mlp_bfloat16.py",
    "tests/ops/masked_mlp/test_mlp_needs.py",
    "tests/ops/masked_mlp/test_mlp_expert_loss.py",
    "tests/ops/masked_mlp/test_range.py",
    "tests/ops/masked_mlp/test_table_gradients.py",
    "tests/fuzz/test_mlp.py",
]
_SPLINES = [
    "tests/ops/splines",
    "tests/nn/test_converted_splines.py",
    "tests/nn/test_converted_nflows_splines.py",
]
_FUSED = ["tests/ops/selection/test_triton.py", *_SELECTION, *_TRUST]
_NATIVE = ["tests/ops/test_native.py", "tests/ops/masked_linear/test_memory.py"]
_CALLED = ["tests/nn/test_interception.py", "tests/nn/test_checkpoints.py"]

#: Python files, by pattern, with their tests; the first pattern that fits counts.
PYTHON: dict[str, list[str]] = {
    "maskmoe_kernels/_compat.py": [_OPS[1], *_CALLED, "tests/nn/test_linear.py", _OPS[0]],
    "maskmoe_kernels/layout/[abcm]*s.py": [  # arguments, blocks, caches, mask_classes
        "tests/layout/test_blocks.py",
        "tests/layout/test_serialized.py",
        _KINDS,
        "tests/nn/test_linear.py",
        "tests/ops/masked_linear/test_masked_linear.py",
        *_TRUST,
        "tests/nn/test_checkpoints.py",
        _LIFETIMES,
    ],
    "maskmoe_kernels/layout/subsets.py": ["tests/layout", _SELECTION[0], *_OPS],
    "maskmoe_kernels/layout/draw.py": ["tests/layout/test_draw.py"],
    "maskmoe_kernels/layout/serialized.py": [
        "tests/layout/test_serialized.py",
        *_TRUST,
        *_OPS,
        _NATIVE[0],
        _LIFETIMES,
    ],
    "maskmoe_kernels/layout/__init__.py": [],
    "maskmoe_kernels/ops/selection/schema.py": _FUSED,
    "maskmoe_kernels/ops/selection/autograd.py": _FUSED,
    "maskmoe_kernels/ops/selection/tables.py": _FUSED,
    "maskmoe_kernels/ops/selection/*.py": _SELECTION,
    "maskmoe_kernels/layout/chain.py": [_MLP[1], "tests/nn/test_interception.py", _TRUST[0]],
    "maskmoe_kernels/ops/masked_mlp/reference.py": ["tests/ops/masked_mlp/test_reference.py"],
    "maskmoe_kernels/ops/masked_mlp/*.py": [
        *_MLP,
        *_TRUST,
        "tests/nn/test_interception.py",
        "tests/models/test_sharded.py",
    ],
    "maskmoe_kernels/ops/checks.py": [
        *_TRUST,
        "tests/models/test_sharded.py",
        "tests/ops/masked_mlp/test_masked_mlp.py",
        "tests/nn/test_interception.py",
    ],
    "maskmoe_kernels/ops/masked_linear/torch_impl.py": [
        *_LINEAR,
        "tests/ops/masked_linear/test_torch_impl.py",
        "tests/nn/test_deployment.py",
    ],
    "maskmoe_kernels/ops/masked_linear/reference.py": _LINEAR,
    "maskmoe_kernels/ops/dispatch.py": ["tests/ops/test_dispatch.py", _NATIVE[0], *_OPS],
    "maskmoe_kernels/ops/activations.py": _OPS,
    "maskmoe_kernels/ops/splines/*.py": _SPLINES,
    "maskmoe_kernels/ops/*.py": [
        *_TRUST,
        _NEEDS,
        "tests/nn/test_linear.py",
        "tests/ops/masked_linear/test_no_route.py",
        "tests/ops/masked_mlp/test_masked_mlp.py",
        *_OPS,
        "tests/ops/selection/test_triton.py",
    ],
    "maskmoe_kernels/testing/strategies.py": [],  # any other draw is as right
    "maskmoe_kernels/testing/*.py": ["tests/testing", *_OPS],
    "maskmoe_kernels/nn/interception.py": _CALLED,
    "maskmoe_kernels/nn/packing.py": [_CALLED[1]],
    "maskmoe_kernels/nn/optimizers.py": ["tests/nn/test_optimizers.py", _CONVERT],
    "maskmoe_kernels/nn/sharding.py": ["tests/distributed/test_fsdp.py"],
    "maskmoe_kernels/nn/parametrized.py": ["tests/nn/test_parametrized.py", _CALLED[0]],
    "maskmoe_kernels/nn/routed.py": ["tests/nn/test_unrouted.py"],
    "maskmoe_kernels/nn/convert.py": [_CONVERT, *_SPLINES[1:]],
    "maskmoe_kernels/nn/converted_splines.py": _SPLINES[1:],
    "maskmoe_kernels/nn/converted*.py": ["tests/nn/test_converted_networks.py", _CONVERT],
    "maskmoe_kernels/nn/foreign.py": [_CONVERT],
    "maskmoe_kernels/nn/gain.py": [_CONVERT],
    "maskmoe_kernels/nn/linear.py": [
        "tests/nn/test_parametrized.py",
        "tests/nn/test_linear.py",
        "tests/nn/test_zuko.py",
        *reversed(_CALLED),
        _KINDS,
    ],
    "maskmoe_kernels/nn/mlp.py": [
        "tests/models/test_mlp.py",
        "tests/ops/masked_mlp/test_masked_mlp.py",
        *_CALLED,
    ],
    "maskmoe_kernels/nn/attention.py": [
        "tests/nn/test_attention.py",
        "tests/models/test_transformer.py",
        *_CALLED,
    ],
    "maskmoe_kernels/nn/gru.py": ["tests/nn/test_gru.py", "tests/models/test_gru.py", *_CALLED],
    "maskmoe_kernels/nn/norm.py": [
        "tests/nn/test_norm.py",
        "tests/models/test_transformer.py",
        *_CALLED,
    ],
    "maskmoe_kernels/nn/embedding.py": [
        "tests/nn/test_embedding.py",
        "tests/models/test_ncf.py",
        "tests/ops/masked_mlp/test_table_gradients.py",
    ],
    "maskmoe_kernels/nn/stacked.py": [
        "tests/nn/test_stacked.py",
        "tests/nn/test_attention.py",
        *_CALLED,
    ],
    "maskmoe_kernels/models/mlp.py": [
        "tests/models/test_mlp.py",
        _SELECTION[4],
        "tests/ops/masked_mlp/test_masked_mlp.py",
        *_CALLED,
        "tests/models/test_sharded.py",
    ],
    "maskmoe_kernels/models/ncf.py": [
        "tests/models/test_ncf.py",
        _CALLED[0],
        "tests/ops/masked_mlp/test_table_gradients.py",
    ],
}

#: Files that only Triton's kernels use: their tests need its interpreter, others are held up by it.
INTERPRETED = {
    f"maskmoe_kernels/ops/selection/{name}.py" for name in ("schema", "autograd", "tables")
}

#: C++ files; those of another instruction set than this machine's are left out.
CPP: dict[str, list[str]] = {
    "csrc/cpu/masked_mlp/*ops.cpp": [*_TRUST, *_MLP],
    "csrc/cpu/masked_mlp/arguments*": [*_TRUST, *_MLP],
    "csrc/cpu/masked_mlp/*.h": _MLP,
    "csrc/cpu/masked_mlp/*.cpp": [*_MLP, *_TRUST],
    "csrc/cpu/parallel.h": [_LINEAR[0], *_NATIVE, *_MLP],
    "csrc/cpu/gradient_sums.h": [_LINEAR[0], *_NATIVE, *_MLP],
    "csrc/cpu/confidence.h": [
        "tests/models/test_mlp.py",
        "tests/ops/masked_mlp/test_masked_mlp.py",
        "tests/ops/masked_mlp/test_range.py",
    ],
    "csrc/common/checks.h": [*_TRUST, "tests/ops/masked_mlp/test_masked_mlp.py", _OPS[1]],
    "csrc/common/mlp_inputs.h": [*_TRUST, "tests/ops/masked_mlp/test_masked_mlp.py", _OPS[1]],
    "csrc/common/*layout.*": [*_TRUST, _OPS[0], _NEEDS, *_NATIVE, *_MLP, _LIFETIMES],
    "csrc/common/names.cpp": [*_TRUST, _OPS[0], *_MLP],
    "csrc/cpu/plan_lookup.cpp": [*_TRUST, _OPS[0], *_NATIVE, *_MLP, _OPS[1]],
    "csrc/cpu/*plan*": [*_TRUST, _OPS[0], _NEEDS, *_NATIVE, *_MLP, _LIFETIMES],
    "csrc/cpu/masked_linear/ops.cpp": [*_TRUST, _OPS[0], *_NATIVE, _NEEDS, _OPS[1]],
    "csrc/cpu/tensors.h": [*_TRUST, _OPS[0], *_NATIVE, *_MLP, _OPS[1]],
    "csrc/cpu/bfloat16/*": [_TILES, *_NATIVE, _OPS[0], _NEEDS, *_MLP],
    "csrc/cpu/amx/*": [_TILES, _OPS[0], *_NATIVE, _NEEDS, *_MLP],
    "csrc/cpu/splines/*": _SPLINES,
    "csrc/cpu/masked_linear/*": [_OPS[0], *_NATIVE, _NEEDS, *_MLP],
    "csrc/cpu/*": [_OPS[0], *_NATIVE, _NEEDS, *_MLP],
}
#: Which C++ files need an instruction set, by pattern.
NEEDS: dict[str, str] = {
    "csrc/cpu/*avx512*": "avx512",
    "csrc/cpu/*avx512bf16*": "avx512bf16",
    "csrc/cpu/bfloat16/*": "avx512bf16",
    "csrc/cpu/*amx*": "amx",
    "csrc/cpu/emulated*": "avx512-emulated",
}
