"""``torch.nn.utils`` on a packed weight: what is about a matrix gets the matrix.

A packed weight has one dimension. So torch's ``weight_norm`` would take each weight for a unit of
its own, and its ``spectral_norm`` the vector's length for the norm of the matrix. A layer keeps its
parametrizations in :class:`Parametrizations`, which puts these two between unpacking and packing.
All others see the packed weight: users' own, mostly element-wise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from maskmoe_kernels._compat import SpectralParametrization, WeightNormParametrization
from maskmoe_kernels.layout.blocks import BlockLayout


class OnMatrix(nn.Module):
    """A parametrization of the dense matrix, as one of the packed weight.

    Args:
        inner: Takes ``(out_features, in_features)``, last if it takes several tensors, and leaves
            zeros zero.
        layout: Of the packed weight.
        filled: Absent weights, by their positions in the flattened matrix, that ``inner`` gets
            as 1. They are not packed again.
    """

    def __init__(self, inner: nn.Module, layout: BlockLayout, filled: list[int]) -> None:
        super().__init__()
        self.inner = inner
        self._layout = layout
        self._filled = filled

    def forward(self, *tensors: Tensor) -> Tensor:
        """The packed weight, ``(num_weights,)``, of tensors of which the last one is packed."""
        *rest, packed = tensors
        return self._layout.pack(self.inner(*rest, self._matrix(packed)))

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Tensors of which :meth:`forward` makes ``weight``, the last one packed."""
        found: Any = self.inner.right_inverse(self._matrix(weight))  # type: ignore[operator]
        if isinstance(found, Tensor):
            return self._layout.pack(found)
        *rest, matrix = found
        return (*rest, self._layout.pack(matrix))

    def _matrix(self, packed: Tensor) -> Tensor:
        matrix = self._layout.unpack(packed)
        if not self._filled:
            return matrix
        at = torch.tensor(self._filled, device=packed.device)
        return matrix.view(-1).index_fill(0, at, 1.0).view_as(matrix)


def _on_matrix(given: nn.Module, layout: BlockLayout, weight: Callable[[], Tensor]) -> nn.Module:
    """``given``, or what it would be on the matrix; ``weight()`` is the packed weight so far."""
    if isinstance(given, WeightNormParametrization):
        return OnMatrix(given, layout, _of_units_without(layout) if given.dim == 0 else [])
    if isinstance(given, SpectralParametrization):
        with torch.no_grad():
            matrix = layout.unpack(weight())
        return OnMatrix(SpectralParametrization(matrix, eps=given.eps), layout, [])
    return given


def _of_units_without(layout: BlockLayout) -> list[int]:
    """An absent weight of each unit that has no other.

    Its norm would be 0, and the gradient of a division by it NaN.
    """
    if all(layout.row_fan_in):
        return []
    units = (~layout.mask().any(1)).nonzero().squeeze(1)
    return (units * layout.in_features).tolist()


class PackedParametrizations(ParametrizationList):
    """The parametrizations of a packed weight, one after the other."""

    _layout: BlockLayout

    def append(self, module: nn.Module) -> PackedParametrizations:
        """Add one; torch does so where there is one already."""
        super().append(_on_matrix(module, self._layout, self))
        return self


class Parametrizations(nn.ModuleDict):
    """What torch keeps as ``layer.parametrizations``: tensor name to its parametrizations.

    Args:
        layout: Of the layer's weight.
    """

    def __init__(self, layout: BlockLayout) -> None:
        super().__init__()
        self._layout = layout

    def __setitem__(self, key: str, module: nn.Module) -> None:
        if key == "weight" and isinstance(module, ParametrizationList):
            # Both keep the weight as it was among their tensors.
            whole: Any = module.original if module.is_tensor else module.original1
            put = _on_matrix(module[0], self._layout, lambda: whole)
            if put is not module[0]:
                module = ParametrizationList([put], whole, unsafe=module.unsafe)
            module.__class__ = PackedParametrizations
            module._layout = self._layout  # type: ignore[assignment]
        super().__setitem__(key, module)


def note_way_to_prune() -> None:
    """Add to the error of a pruning method that wants a matrix what to do instead."""
    error = sys.exc_info()[1]
    if error is not None:
        error.add_note(
            "The weight of this layer is packed and has one dimension. Choose units or features by "
            "a mask of the matrix, layer.dense_weight(), and pass prune.custom_from_mask(layer, "
            "'weight', layer.layout.pack(mask)); or use an unstructured method."
        )


class _OlderWeightNorm(WeightNorm):
    on_matrix: OnMatrix

    def compute_weight(self, module: nn.Module) -> Any:
        return self.on_matrix(module.weight_g, module.weight_v)


class _OlderSpectralNorm(SpectralNorm):
    layout: BlockLayout

    def reshape_weight_to_matrix(self, weight: Tensor) -> Tensor:
        return self.layout.unpack(weight)


def make_right(hook: Any, module: Any) -> None:
    """Have a hook of torch's older ``weight_norm`` or ``spectral_norm`` see the matrix.

    Args:
        hook: Any forward pre-hook; others stay as they are.
        module: A layer with packed weights, which has what the hook needs already.
    """
    if getattr(hook, "name", None) != "weight":
        return
    kind = type(hook)
    if kind is WeightNorm and hook.dim != -1:  # -1: one norm of all, in whatever order
        hook.__class__ = _OlderWeightNorm
        hook.on_matrix = _on_matrix(WeightNormParametrization(hook.dim), module.layout, Tensor)
        with torch.no_grad():
            norms, _ = hook.on_matrix.right_inverse(module.weight_v)
        module.weight_g = nn.Parameter(norms)
        module.weight = hook.compute_weight(module)
    elif kind is SpectralNorm:
        hook.__class__ = _OlderSpectralNorm
        hook.layout = module.layout
        sizes = {"weight_u": module.layout.out_features, "weight_v": module.layout.in_features}
        for name, size in sizes.items():
            vector = module.weight_orig.new_empty(size).normal_()
            setattr(module, name, nn.functional.normalize(vector.detach(), dim=0, eps=hook.eps))
