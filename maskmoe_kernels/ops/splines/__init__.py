"""Monotone rational-quadratic splines of float32 on a CPU: one pass forward, one backward."""

from maskmoe_kernels.ops.splines.autograd import (
    rational_quadratic,
    rational_quadratic_inverse,
    takes,
)

__all__ = ["rational_quadratic", "rational_quadratic_inverse", "takes"]
