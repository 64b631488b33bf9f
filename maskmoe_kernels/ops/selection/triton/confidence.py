"""Confidences on the device, from the logit: g, 1 - g, and the derivatives of g and log(1 - g).

The formulas of ``torch_impl``, in float32. Everything follows from e = exp(-2|z|), as
1 - tanh|z| = 2e / (1 + e) does not cancel; so 1 - g keeps its digits at saturation and a product
over omega(i) needs no logarithm. Functions expect logits without NaN, except ``known_parts``.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts: an integer of 8 bits times the first is exact.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.1219444005469057e-4)
_LOG_TINY = tl.constexpr(-87.33654)  # of the smallest normal float32
_TINY = tl.constexpr(1.1754943508222875e-38)
# "rare": threshold 0.3, power 4, top = 0.7; the factor that makes it 1 at p = 1.
_TOP = tl.constexpr(0.7)
_TOP3 = tl.constexpr(0.343)
_TOP4 = tl.constexpr(0.2401)
_RARE_SCALE = tl.constexpr(1.343 / 0.2401)


@triton.jit
def exp_negative(x):
    """exp(x) for x <= 0, also where ``tl.exp`` loses digits to the size of x."""
    n = tl.floor(tl.maximum(x, _LOG_TINY) * _LOG2_E + 0.5)
    r = (tl.maximum(x, _LOG_TINY) - n * _LN2_HIGH) - n * _LN2_LOW
    return tl.where(x < _LOG_TINY, 0.0, tl.exp2(r * _LOG2_E) * tl.exp2(n))


@triton.jit
def _twice_atanh(w):
    # |w| <= 1/3, by the series: the next term is below 1e-9 of the sum.
    s = w * w
    tail = 1.0 / 9 + s * (1.0 / 11 + s * (1.0 / 13 + s * (1.0 / 15 + s * (1.0 / 17))))
    return 2 * w * (1 + s * (1.0 / 3 + s * (1.0 / 5 + s * (1.0 / 7 + s * tail))))


@triton.jit
def log_one_plus(x):
    """log(1 + x) for x in [-0.5, 1]."""
    return _twice_atanh(x / (2 + x))


@triton.jit
def _tanh(a, e):
    # tanh a from a >= 0 and e = exp(-2a): 1 - e cancels where a is small, the series ends there.
    s = a * a
    tail = 62.0 / 2835 + s * (-1382.0 / 155925 + s * (21844.0 / 6081075))
    series = a * (1 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * tail))))
    return tl.where(a < 0.35, series, (1 - e) / (1 + e))


@triton.jit
def probabilities(z, e):
    """sigmoid(2z) and sigmoid(-2z) from z and e = exp(-2|z|)."""
    large, small = 1 / (1 + e), e / (1 + e)
    return tl.where(z > 0, large, small), tl.where(z > 0, small, large)


@triton.jit
def confidence(z, NAME: tl.constexpr):
    """g and 1 - g, both in [0, 1]."""
    e = exp_negative(-2 * tl.abs(z))
    if NAME == "rare":
        p, rest_p = probabilities(z, e)
        q = tl.abs(p - 0.3)
        cube = q * q * q
        g = q * cube / (1 + cube) * _RARE_SCALE
        factor = _TOP3 + 0.49 * q + _TOP * q * q + (1 + _TOP3) * cube
        # (t - q)(...) as in torch_impl._rare: t - q = 1 - p holds above the threshold only.
        rest = tl.where(g < 0.5, 1 - g, rest_p * factor / ((1 + cube) * _TOP4))
    else:
        t = _tanh(tl.abs(z), e)
        rest = 2 * e / (1 + e)
        if NAME == "abs":
            g = t
        elif NAME == "square":
            g = t * t
            rest *= 1 + t
        else:
            cube = t * t * t
            g = 2 * cube * t / (1 + cube)
            rest *= (1 + t + t * t + 2 * cube) / (1 + cube)
    return tl.minimum(g, 1.0), tl.minimum(rest, 1.0)


@triton.jit
def slopes(z, NAME: tl.constexpr):
    """Derivatives in z of g and of log(1 - g); the latter is bounded, also at saturation."""
    e = exp_negative(-2 * tl.abs(z))
    sign = tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0))
    if NAME == "rare":
        p, rest_p = probabilities(z, e)
        q = tl.abs(p - 0.3)
        cube = q * q * q
        side = tl.where(p > 0.3, 2.0, tl.where(p < 0.3, -2.0, 0.0)) * p
        of_q = _RARE_SCALE * cube * (4 + cube) / ((1 + cube) * (1 + cube)) * side
        g = q * cube / (1 + cube) * _RARE_SCALE
        factor = _TOP3 + 0.49 * q + _TOP * q * q + (1 + _TOP3) * cube
        rest_p_by_rest = tl.where(
            g < 0.5, rest_p / tl.maximum(1 - g, 0.5), (1 + cube) * _TOP4 / factor
        )
        return of_q * rest_p, -of_q * rest_p_by_rest
    t = _tanh(tl.abs(z), e)
    of_tanh = sign * 4 * e / ((1 + e) * (1 + e))
    if NAME == "abs":
        return of_tanh, -sign * (1 + t)
    elif NAME == "square":
        return 2 * t * of_tanh, -2 * t * sign
    else:
        cube = t * t * t
        of_t = 2 * cube * (4 + cube) / ((1 + cube) * (1 + cube))
        log_slope = of_t * (1 + t) * (1 + cube) / (1 + t + t * t + 2 * cube)
        return of_t * of_tanh, -log_slope * sign


@triton.jit
def sharpened(g, rest, power):
    """g^s and 1 - g^s from g and 1 - g, each with its digits wherever g lies."""
    log_g = tl.where(g < 0.5, tl.log(tl.maximum(g, _TINY)), log_one_plus(-tl.minimum(rest, 0.5)))
    x = power * log_g
    sharp = tl.where(g < _TINY, 0.0, exp_negative(x))
    # 1 - e^x where e^x > 0.5: its series around 0.
    y = -tl.maximum(x, -0.75)
    tail = 1.0 / 720 - y * (1.0 / 5040 - y * (1.0 / 40320 - y * (1.0 / 362880)))
    head = 1.0 / 6 - y * (1.0 / 24 - y * (1.0 / 120 - y * tail))
    near = y * (1 - y * (0.5 - y * head))
    return sharp, tl.minimum(tl.where(sharp < 0.5, 1 - sharp, near), 1.0)


@triton.jit
def sharpened_slopes(g, rest, sharp, sharp_rest, slope, log_slope, power):
    """Derivatives in z of g^s and log(1 - g^s) from those of g and log(1 - g)."""
    gain = tl.where(g < _TINY, 0.0, power * sharp / tl.maximum(g, _TINY))
    # (1 - g) / (1 - g^s), 1/s where both are 0.
    ratio = tl.where(sharp_rest < _TINY, 1 / power, rest / tl.maximum(sharp_rest, _TINY))
    return gain * slope, gain * ratio * log_slope


@triton.jit
def known_parts(z, has_superset, power, NAME: tl.constexpr, SHARP: tl.constexpr):
    """g and 1 - g, sharpened where the expert has a superset; NaN where the logit is NaN."""
    unknown = z != z
    g, rest = confidence(tl.where(unknown, 0.0, z), NAME)
    if SHARP:
        sharp, sharp_rest = sharpened(g, rest, power)
        g = tl.where(has_superset, sharp, g)
        rest = tl.where(has_superset, sharp_rest, rest)
    return tl.where(unknown, z, g), tl.where(unknown, z, rest)
