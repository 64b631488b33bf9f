"""Masked MLPs as registered ops: all layers, or loss and all gradients, in one pass.

A tile of rows goes through every layer while its activations are in the cache. Gradients flow
inside an expert only, so the loss and the backward of a tile can follow at once
(``masked_mlp_gem``): that op reads the input and writes gradients, nothing else.

The kernels are in C++ (``csrc/``), for the CPU and for NVIDIA GPUs. There is no ``triton/`` folder,
because no Triton kernel implements these ops. On a device without kernels, ``masked_mlp`` does what
``torch_mlp`` does, layer after layer. ``masked_mlp_gem`` and ``masked_mlp_mixture`` have no such
fallback: :mod:`maskmoe_kernels.ops.dispatch` says where they can be called.
"""
