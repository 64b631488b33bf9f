"""``rational_quadratic``, its inverse and its backward as registered ops: schemas and fakes.

Their one implementation is the extension's (``csrc/cpu/splines``), of float32 on a CPU; it checks
what comes in. The elements are flat: ``(N,)``, parameters ``(N, K)`` and ``(N, K - 1)``. The first
two return ``(y, log dy/dx)`` and ``(x, log dy/dx)``, the third the gradients of ``x`` and of all
parameters of an element in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The most bins of a spline, the least slope and the least fraction of a bin that the kernels take,
#: and the most of the domain that the least fractions of all bins may be.
MAX_BINS, LEAST, MOST_FIXED = 64, 1e-6, 0.95

_LIBRARY = torch.library.Library("maskmoe", "FRAGMENT")
_OF = (
    "Tensor widths, Tensor heights, Tensor derivatives, float bound, float slope, float width=0.0,"
    " float height=0.0, bool squashed=True"
)
for _schema in (
    f"rational_quadratic(Tensor x, {_OF}) -> (Tensor, Tensor)",
    f"rational_quadratic_inverse(Tensor y, {_OF}) -> (Tensor, Tensor)",
    f"rational_quadratic_backward(Tensor? grad_y, Tensor? grad_log_slope, Tensor x, {_OF})"
    " -> (Tensor, Tensor)",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _forward_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


def _backward_fake(
    grad_y: Tensor | None, grad_log_slope: Tensor | None, x: Tensor, widths: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.numel(), 3 * widths.shape[1] - 1)


for _name, _fake in (
    ("rational_quadratic", _forward_fake),
    ("rational_quadratic_inverse", _forward_fake),
    ("rational_quadratic_backward", _backward_fake),
):
    torch.library.register_fake("maskmoe::" + _name, _fake, lib=_LIBRARY)
