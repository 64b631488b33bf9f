"""What is mutated, and which tests are to notice: the fast and the sharp ones first."""

from __future__ import annotations

_LAYOUT = ["tests/layout"]
_OPS = ["tests/ops/test_contract.py", "tests/ops/test_masked_linear.py"]
_OBJECTIVES = [
    "tests/objectives/test_selection.py",
    "tests/objectives/test_gem.py",
    "tests/objectives/test_mixture.py",
]
_NETWORKS = ["tests/models/test_mlp.py", "tests/ops/test_networks.py",
             "tests/ops/test_network_tiles.py"]  # fmt: skip
_NATIVE = ["tests/backends/test_native.py"]

#: Python files, by pattern, with their tests; the first pattern that fits counts.
PYTHON: dict[str, list[str]] = {
    "maskmoe_kernels/layout/blocks.py": [
        "tests/layout/test_blocks.py", "tests/layout/test_plan.py", "tests/nn/test_linear.py",
        "tests/ops/test_masked_linear.py",
    ],
    "maskmoe_kernels/layout/subsets.py": ["tests/layout", _OBJECTIVES[0], *_OPS],
    "maskmoe_kernels/layout/draw.py": ["tests/layout/test_draw.py"],
    "maskmoe_kernels/layout/plan.py": ["tests/layout/test_plan.py", *_OPS, *_NATIVE],
    "maskmoe_kernels/layout/__init__.py": [],
    "maskmoe_kernels/objectives/*.py": _OBJECTIVES,
    "maskmoe_kernels/ops/objectives.py": ["tests/objectives/test_triton.py", *_OBJECTIVES],
    "maskmoe_kernels/ops/networks.py": _NETWORKS,
    "maskmoe_kernels/ops/*.py": [*_OPS, "tests/nn/test_linear.py"],
    "maskmoe_kernels/testing/strategies.py": [],  # any other draw is as right
    "maskmoe_kernels/testing/*.py": ["tests/testing", *_OPS],
    "maskmoe_kernels/backends/grouped.py": ["tests/ops/test_masked_linear.py", _OPS[0]],
    "maskmoe_kernels/backends/reference.py": ["tests/ops/test_masked_linear.py", _OPS[0]],
    "maskmoe_kernels/backends/choice.py": ["tests/backends/test_choice.py", *_NATIVE, *_OPS],
    "maskmoe_kernels/backends/activations.py": _OPS,
    "maskmoe_kernels/nn/linear.py": ["tests/nn/test_linear.py", "tests/nn/test_zuko.py"],
    "maskmoe_kernels/nn/network.py": ["tests/models/test_mlp.py", "tests/ops/test_networks.py"],
    "maskmoe_kernels/nn/attention.py": ["tests/nn/test_attention.py",
                                        "tests/models/test_transformer.py"],
    "maskmoe_kernels/nn/gru.py": ["tests/nn/test_gru.py", "tests/models/test_gru.py"],
    "maskmoe_kernels/nn/norm.py": ["tests/nn/test_norm.py", "tests/models/test_transformer.py"],
    "maskmoe_kernels/nn/embedding.py": ["tests/nn/test_embedding.py", "tests/models/test_ncf.py"],
    "maskmoe_kernels/nn/stacked.py": ["tests/nn/test_stacked.py", "tests/nn/test_attention.py"],
    "maskmoe_kernels/models/mlp.py": ["tests/models/test_mlp.py", "tests/ops/test_networks.py"],
    "maskmoe_kernels/models/ncf.py": ["tests/models/test_ncf.py"],
}  # fmt: skip

#: Files that only Triton's kernels use: their tests need its interpreter, others are held up by it.
INTERPRETED = {"maskmoe_kernels/ops/objectives.py"}

#: C++ files; those of another instruction set than this machine's are left out.
CPP: dict[str, list[str]] = {
    "csrc/cpu/masked_mlp.h": _NETWORKS,
    "csrc/cpu/network_loss.h": _NETWORKS,
    "csrc/cpu/networks.cpp": _NETWORKS,
    "csrc/cpu/sharing.h": ["tests/ops/test_masked_linear.py", *_NATIVE, *_NETWORKS],
    "csrc/cpu/confidence.h": ["tests/models/test_mlp.py", "tests/ops/test_networks.py"],
    "csrc/networks.cpp": [*_NETWORKS, "tests/ops/test_contract.py"],
    "csrc/plan.cpp": ["tests/ops/test_masked_linear.py", *_NATIVE, _OPS[0], *_NETWORKS],
    "csrc/plan.h": ["tests/ops/test_masked_linear.py", *_NATIVE, _OPS[0], *_NETWORKS],
    "csrc/registration.cpp": [*_NATIVE, *_OPS],
    "csrc/tensors.h": [*_NATIVE, *_OPS, *_NETWORKS],
    "csrc/cpu/*": ["tests/ops/test_masked_linear.py", *_NATIVE, _OPS[0], *_NETWORKS],
}
#: Which C++ files need an instruction set, by pattern.
NEEDS: dict[str, str] = {
    "csrc/cpu/*avx512*": "avx512",
    "csrc/cpu/*amx*": "amx",
}
