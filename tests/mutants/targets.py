"""What is mutated, and which tests are to notice: the fast and the sharp ones first."""

from __future__ import annotations

_TRUST = ["tests/ops/test_trust.py", "tests/fuzz/test_ops.py"]
_NEEDS = "tests/ops/test_needs.py"
_LIFETIMES = "tests/ops/test_lifetimes.py"
_KINDS = "tests/layout/test_mask_kinds.py"
_OPS = ["tests/ops/test_masked_linear.py", "tests/ops/test_contract.py"]
_LINEAR = [_OPS[0], _NEEDS, "tests/ops/test_no_route.py", "tests/fuzz/test_layers.py", _OPS[1]]
_OBJECTIVES = [
    "tests/objectives/test_selection.py",
    "tests/objectives/test_gem.py",
    "tests/objectives/test_mixture.py",
    "tests/objectives/test_labels.py",
    "tests/objectives/test_missing.py",
]
_NETWORKS = ["tests/models/test_mlp.py", "tests/ops/test_networks.py",
             "tests/ops/test_network_tiles.py", _NEEDS, "tests/ops/test_network_range.py",
             "tests/ops/test_table_gradients.py", "tests/fuzz/test_networks.py"]  # fmt: skip
_NATIVE = ["tests/backends/test_native.py", "tests/backends/test_memory.py"]
_CALLED = ["tests/nn/test_interception.py", "tests/nn/test_checkpoints.py"]

#: Python files, by pattern, with their tests; the first pattern that fits counts.
PYTHON: dict[str, list[str]] = {
    "maskmoe_kernels/layout/blocks.py": [
        "tests/layout/test_blocks.py", "tests/layout/test_plan.py", _KINDS,
        "tests/nn/test_linear.py", "tests/ops/test_masked_linear.py", *_TRUST,
        "tests/nn/test_checkpoints.py", _LIFETIMES,
    ],
    "maskmoe_kernels/layout/subsets.py": ["tests/layout", _OBJECTIVES[0], *_OPS],
    "maskmoe_kernels/layout/draw.py": ["tests/layout/test_draw.py"],
    "maskmoe_kernels/layout/plan.py": ["tests/layout/test_plan.py", *_TRUST, *_OPS, _NATIVE[0],
                                       _LIFETIMES],
    "maskmoe_kernels/layout/__init__.py": [],
    "maskmoe_kernels/objectives/*.py": _OBJECTIVES,
    "maskmoe_kernels/ops/objectives.py": ["tests/objectives/test_triton.py", *_OBJECTIVES,
                                          *_TRUST],
    "maskmoe_kernels/ops/networks.py": [*_NETWORKS, *_TRUST, "tests/nn/test_interception.py",
                                        "tests/models/test_sharded.py"],
    "maskmoe_kernels/ops/checks.py": [*_TRUST, "tests/models/test_sharded.py",
                                      "tests/ops/test_networks.py",
                                      "tests/nn/test_interception.py"],
    "maskmoe_kernels/ops/*.py": [*_TRUST, _NEEDS, "tests/nn/test_linear.py",
                                 "tests/ops/test_no_route.py", "tests/ops/test_networks.py",
                                 *_OPS, "tests/objectives/test_triton.py"],
    "maskmoe_kernels/testing/strategies.py": [],  # any other draw is as right
    "maskmoe_kernels/testing/*.py": ["tests/testing", *_OPS],
    "maskmoe_kernels/backends/grouped.py": [*_LINEAR, "tests/backends/test_grouped.py"],
    "maskmoe_kernels/backends/reference.py": _LINEAR,
    "maskmoe_kernels/backends/choice.py": ["tests/backends/test_choice.py", _NATIVE[0], *_OPS],
    "maskmoe_kernels/backends/activations.py": _OPS,
    "maskmoe_kernels/nn/interception.py": _CALLED,
    "maskmoe_kernels/nn/packing.py": [_CALLED[1]],
    "maskmoe_kernels/nn/linear.py": ["tests/nn/test_linear.py", "tests/nn/test_zuko.py",
                                     *reversed(_CALLED), _KINDS],
    "maskmoe_kernels/nn/network.py": ["tests/models/test_mlp.py", "tests/ops/test_networks.py",
                                      *_CALLED],
    "maskmoe_kernels/nn/attention.py": ["tests/nn/test_attention.py",
                                        "tests/models/test_transformer.py", *_CALLED],
    "maskmoe_kernels/nn/gru.py": ["tests/nn/test_gru.py", "tests/models/test_gru.py", *_CALLED],
    "maskmoe_kernels/nn/norm.py": ["tests/nn/test_norm.py", "tests/models/test_transformer.py",
                                   *_CALLED],
    "maskmoe_kernels/nn/embedding.py": ["tests/nn/test_embedding.py", "tests/models/test_ncf.py",
                                        "tests/ops/test_table_gradients.py"],
    "maskmoe_kernels/nn/stacked.py": ["tests/nn/test_stacked.py", "tests/nn/test_attention.py",
                                      *_CALLED],
    "maskmoe_kernels/models/mlp.py": ["tests/models/test_mlp.py", _OBJECTIVES[4],
                                      "tests/ops/test_networks.py", *_CALLED,
                                      "tests/models/test_sharded.py"],
    "maskmoe_kernels/models/ncf.py": ["tests/models/test_ncf.py", _CALLED[0],
                                      "tests/ops/test_table_gradients.py"],
}  # fmt: skip

#: Files that only Triton's kernels use: their tests need its interpreter, others are held up by it.
INTERPRETED = {"maskmoe_kernels/ops/objectives.py"}

#: C++ files; those of another instruction set than this machine's are left out.
CPP: dict[str, list[str]] = {
    "csrc/cpu/masked_mlp/*ops.cpp": [*_TRUST, *_NETWORKS],
    "csrc/cpu/masked_mlp/arguments*": [*_TRUST, *_NETWORKS],
    "csrc/cpu/masked_mlp/*.h": _NETWORKS,
    "csrc/cpu/masked_mlp/*.cpp": [*_NETWORKS, *_TRUST],
    "csrc/cpu/parallel.h": [_LINEAR[0], *_NATIVE, *_NETWORKS],
    "csrc/cpu/gradient_sums.h": [_LINEAR[0], *_NATIVE, *_NETWORKS],
    "csrc/cpu/confidence.h": [
        "tests/models/test_mlp.py",
        "tests/ops/test_networks.py",
        "tests/ops/test_network_range.py",
    ],
    "csrc/common/checks.h": [*_TRUST, "tests/ops/test_networks.py", _OPS[1]],
    "csrc/common/mlp_inputs.h": [*_TRUST, "tests/ops/test_networks.py", _OPS[1]],
    "csrc/common/*layout.*": [*_TRUST, _OPS[0], _NEEDS, *_NATIVE, *_NETWORKS, _LIFETIMES],
    "csrc/common/names.cpp": [*_TRUST, _OPS[0], *_NETWORKS],
    "csrc/cpu/plan_lookup.cpp": [*_TRUST, _OPS[0], *_NATIVE, *_NETWORKS, _OPS[1]],
    "csrc/cpu/*plan*": [*_TRUST, _OPS[0], _NEEDS, *_NATIVE, *_NETWORKS, _LIFETIMES],
    "csrc/cpu/masked_linear/ops.cpp": [*_TRUST, _OPS[0], *_NATIVE, _NEEDS, _OPS[1]],
    "csrc/cpu/tensors.h": [*_TRUST, _OPS[0], *_NATIVE, *_NETWORKS, _OPS[1]],
    "csrc/cpu/amx/*": [_OPS[0], *_NATIVE, _NEEDS, *_NETWORKS],
    "csrc/cpu/masked_linear/*": [_OPS[0], *_NATIVE, _NEEDS, *_NETWORKS],
    "csrc/cpu/*": [_OPS[0], *_NATIVE, _NEEDS, *_NETWORKS],
}
#: Which C++ files need an instruction set, by pattern.
NEEDS: dict[str, str] = {
    "csrc/cpu/*avx512*": "avx512",
    "csrc/cpu/*amx*": "amx",
}
