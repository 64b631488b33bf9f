"""The definition of rational-quadratic splines, in PyTorch: any dtype, device and derivative."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SplineForm(NamedTuple):
    """What all splines of a call have in common. ``K`` is the number of bins.

    Attributes:
        bound: End of the domain, and of the range.
        slope: The least slope, in (0, 1).
        width: The least fraction of the domain that a bin takes, below ``1 / K``; 0 if squashed.
        height: The least fraction of the range, too.
        squashed: Are the parameters those of zuko's ``MonotonicRQSTransform``? With ``S =
            -log(slope)``, fractions of the domain (and of the range) that bins take are the softmax
            of ``u / (1 + 2 |u| / S)``, slopes at inner knots ``exp(t / (1 + |t| / S))``. Else they
            are those of nflows: fractions ``width + (1 - K width) softmax(u)`` (of the range, with
            ``height``), slopes ``slope + softplus(t)``.
    """

    bound: float
    slope: float
    width: float = 0.0
    height: float = 0.0
    squashed: bool = True


def rational_quadratic(
    x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, form: SplineForm
) -> tuple[Tensor, Tensor]:
    """A monotone spline of each element, and the logarithm of its slope.

    Durkan et al., "Neural Spline Flows" (2019), section 3.1. Slopes at both ends are 1; outside of
    the domain the spline is the identity.

    Args:
        x: ``(*,)``.
        widths: ``(*, K)`` parameters of ``K`` bins.
        heights: ``(*, K)``.
        derivatives: ``(*, K - 1)``.
        form: What the parameters mean.

    Returns:
        ``y`` and ``log dy/dx``, both ``(*,)``. The latter is NaN where an element or a parameter
        of it is not finite.
    """
    inside, (x0, across), (y0, up), ends = _bin(x, 0, widths, heights, derivatives, form)
    z = inside * (x - x0) / across
    ratio, log_slope = _curve(z, up / across, *ends)
    return torch.where(inside, y0 + up * ratio, x), inside * log_slope


def rational_quadratic_inverse(
    y: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, form: SplineForm
) -> tuple[Tensor, Tensor]:
    """Where :func:`rational_quadratic` has the value ``y``, and ``log dy/dx`` there, ``(*,)`` each.

    The equation is quadratic in the place within a bin (the paper's section 3.1, equations 6 to 8).
    """
    inside, (x0, across), (y0, up), ends = _bin(y, 1, widths, heights, derivatives, form)
    (d0, d1), s, above = ends, up / across, inside * (y - y0)
    bent = above * (d0 + d1 - 2 * s)
    a, b, c = up * (s - d0) + bent, up * d0 - bent, s * above
    z = 2 * c / (b + (b**2 + 4 * a * c).sqrt())
    return torch.where(inside, x0 + z * across, y), inside * _curve(z, s, d0, d1)[1]


def _knots(u: Tensor, axis: int, form: SplineForm) -> Tensor:
    """Ends of bins along x (0) or y (1), ``(*, K + 1)``, of their parameters ``(*, K)``."""
    least = (form.width, form.height)[axis]
    exponents = u / (1 - 2 * u.abs() / math.log(form.slope)) if form.squashed else u
    fractions = least + (1 - u.shape[-1] * least) * torch.softmax(exponents, -1)
    return form.bound * (2 * F.pad(fractions, (1, 0)).cumsum(-1) - 1)


def _slopes(t: Tensor, form: SplineForm) -> Tensor:
    """Slopes at all knots, ``(*, K + 1)``."""
    if form.squashed:
        inner = torch.exp(t / (1 - t.abs() / math.log(form.slope)))
    else:
        inner = form.slope + F.softplus(t)
    return F.pad(inner, (1, 1), value=1.0)


def _curve(z: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """How far up a bin its curve is at ``z``, and the logarithm of its slope."""
    q = z * (1 - z)
    divisor = s + (d0 + d1 - 2 * s) * q
    steep = s**2 * (2 * s * q + d0 * (1 - z) ** 2 + d1 * z**2) / divisor**2
    return (s * z**2 + d0 * q) / divisor, steep.log()


def _bin(
    at: Tensor, axis: int, widths: Tensor, heights: Tensor, derivatives: Tensor, form: SplineForm
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Is ``at`` inside; begin and size of its bin by x and by y; slopes at the bin's ends."""
    knots, bins = (_knots(widths, 0, form), _knots(heights, 1, form)), widths.shape[-1]
    index = (knots[axis] < at[..., None]).sum(-1, keepdim=True) - 1
    inside = ((index >= 0) & (index < bins)).squeeze(-1)
    index = index.clamp(0, bins - 1)
    (x0, x1), (y0, y1), ends = (
        (of.gather(-1, index).squeeze(-1), of.gather(-1, index + 1).squeeze(-1))
        for of in (*knots, _slopes(derivatives, form))
    )
    return inside, (x0, x1 - x0), (y0, y1 - y0), ends
