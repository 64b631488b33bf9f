"""The definition of rational-quadratic splines, in PyTorch: any dtype, device and derivative."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rational_quadratic(
    x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, bound: float, slope: float
) -> tuple[Tensor, Tensor]:
    """A monotone spline of each element, and the logarithm of its slope.

    Durkan et al., "Neural Spline Flows" (2019), section 3.1, with the parameters of zuko's
    ``MonotonicRQSTransform``: with ``S = -log(slope)``, widths and heights of bins are the softmax
    of ``u / (1 + 2 |u| / S)``, slopes ``exp(t / (1 + |t| / S))`` at inner knots, 1 at both ends.
    Outside of ``[-bound, bound]`` the spline is the identity.

    Args:
        x: ``(*,)``.
        widths: ``(*, K)`` parameters of ``K`` bins.
        heights: ``(*, K)``.
        derivatives: ``(*, K - 1)``.
        bound: End of the domain, and of the range.
        slope: The least slope, in (0, 1).

    Returns:
        ``y`` and ``log dy/dx``, both ``(*,)``. The latter is NaN where an element or a parameter
        of it is not finite.
    """
    steepest = -math.log(slope)
    knots = _knots(widths, steepest, bound), _knots(heights, steepest, bound)
    inside, (x0, width), (y0, height), (d0, d1) = _bin(x, 0, knots, derivatives, steepest)
    s, z = height / width, inside * (x - x0) / width
    q = z * (1 - z)
    divisor = s + (d0 + d1 - 2 * s) * q
    y = y0 + height * (s * z**2 + d0 * q) / divisor
    steep = s**2 * (2 * s * q + d0 * (1 - z) ** 2 + d1 * z**2) / divisor**2
    return torch.where(inside, y, x), inside * steep.log()


def rational_quadratic_inverse(
    y: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor, bound: float, slope: float
) -> Tensor:
    """The ``x``, ``(*,)``, at which :func:`rational_quadratic` has the value ``y``, ``(*,)``.

    The equation is quadratic in the place within a bin (the paper's section 3.1, equations 6 to 8).
    """
    steepest = -math.log(slope)
    knots = _knots(widths, steepest, bound), _knots(heights, steepest, bound)
    inside, (x0, width), (y0, height), (d0, d1) = _bin(y, 1, knots, derivatives, steepest)
    s, above = height / width, inside * (y - y0)
    bent = above * (d0 + d1 - 2 * s)
    a, b, c = height * (s - d0) + bent, height * d0 - bent, s * above
    z = 2 * c / (b + (b**2 + 4 * a * c).sqrt())
    return torch.where(inside, x0 + z * width, y)


def _knots(u: Tensor, steepest: float, bound: float) -> Tensor:
    fractions = torch.softmax(u / (1 + 2 * u.abs() / steepest), -1)
    return bound * (2 * F.pad(fractions, (1, 0)).cumsum(-1) - 1)


def _bin(
    at: Tensor, axis: int, knots: tuple[Tensor, Tensor], derivatives: Tensor, steepest: float
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Is ``at`` inside; begin and size of its bin by x and by y; slopes at the bin's ends."""
    bins = derivatives.shape[-1] + 1
    t = F.pad(derivatives, (1, 1))
    slopes = torch.exp(t / (1 + t.abs() / steepest))
    index = (knots[axis] < at[..., None]).sum(-1, keepdim=True) - 1
    inside = ((index >= 0) & (index < bins)).squeeze(-1)
    index = index.clamp(0, bins - 1)
    (x0, x1), (y0, y1), ends = (
        (of.gather(-1, index).squeeze(-1), of.gather(-1, index + 1).squeeze(-1))
        for of in (*knots, slopes)
    )
    return inside, (x0, x1 - x0), (y0, y1 - y0), ends
