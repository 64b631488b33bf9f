"""Monotone rational-quadratic splines of float32 on a CPU: one pass forward, one backward."""

from maskmoe_kernels.ops.splines.autograd import (
    rational_quadratic,
    rational_quadratic_inverse,
    takes,
)
from maskmoe_kernels.ops.splines.reference import SplineForm

__all__ = ["SplineForm", "rational_quadratic", "rational_quadratic_inverse", "takes"]
