"""Activations and their derivatives inside the kernels, in float32.

``exp`` is written out: the hardware's rounds its argument's product with log2(e), an error that
grows with the argument. These stay within a few units in the last place.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp(x):
    """e^x for x <= 0, float32; below -104 it is 0, and NaN stays NaN."""
    n = tl.floor(tl.maximum(x, -104.0) * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts: the product is exact
    p = 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = p * r * r + r + 1.0
    return tl.where(x < -104.0, 0.0, tl.where(x == x, p * tl.exp2(n), x))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    e = exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """Hyperbolic tangent; a series near 0, where the quotient would cancel."""
    e = exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = -5.70498872745e-3
    near = near * s + 2.06390887954e-2
    near = near * s - 5.37397155531e-2
    near = near * s + 1.33314422036e-1
    near = near * s - 3.33332819422e-1
    near = near * s * x + x
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def activate(z, NAME: tl.constexpr):
    """The activation of a pre-activation."""
    if NAME == "relu":
        z = tl.where(z <= 0, 0.0, z)  # NaN stays
    elif NAME == "leaky_relu":
        z = tl.where(z > 0, z, 0.01 * z)
    elif NAME == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif NAME == "tanh":
        z = tanh(z)
    elif NAME == "silu":
        z = z * sigmoid(z)
    return z


@triton.jit
def grad_before(grad, saved, NAME: tl.constexpr):
    """grad_z from grad_y; ``saved`` is z for gelu and silu, the output for the others."""
    if NAME == "relu":
        grad = tl.where(saved <= 0, 0.0, grad)
    elif NAME == "leaky_relu":
        grad = tl.where(saved > 0, grad, 0.01 * grad)
    elif NAME == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(saved * 0.7071067811865476))
        grad = grad * (cdf + saved * 0.3989422804014327 * exp(-0.5 * saved * saved))
    elif NAME == "tanh":
        grad = grad * (1.0 - saved * saved)
    elif NAME == "silu":
        s = sigmoid(saved)
        grad = grad * (s * (1.0 + saved * (1.0 - s)))
    return grad
