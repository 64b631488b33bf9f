"""Selection functions: how much each expert answers for a sample (section 3.3).

Everything is computed from the logit z, as pairs (g, log(1 - g)): once tanh saturates, 1 - g is
0 in float32 although the product over omega(i) still needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily
from maskmoe_kernels.ops.selection import schema as fused

#: A confidence by name, or any function of the logits with values in [0, 1].
Confidence = str | Callable[[Tensor], Tensor]

# Logarithms below this are products that are 0 in every floating-point type.
_LOG_FLOOR = -1e6
# Where log(1 - g) is below this, (1 - g)^2 is no digit of 1 - g in any floating-point type.
_LOG_SATURATED = -40.0


def selection(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    sharpness: float = 1.0,
) -> Tensor:
    """alpha_i = g_i * prod over j in omega(i) of (1 - g_j) (section 3.3.2).

    Args:
        logits: z, ``(*, H)``.
        family: The subsets of the H experts.
        confidence: ``"abs"`` |F|, ``"square"`` F^2, ``"smooth"`` 2|F|^4 / (1 + |F|^3),
            ``"rare"`` (see :func:`rare_positive`), where F = tanh(z); or a function of the logits,
            its values clamped to [0, 1].
        sharpness: Power to which the confidence of every expert with a larger one above it is
            raised. Larger values leave more samples to the larger experts.

    Returns:
        ``(*, H)`` in [0, 1], float32 (float64 for float64 logits). A NaN logit reaches only
        its own expert and those whose subset contains it.

    Raises:
        LayoutError: ``logits`` do not end in H, or an unknown confidence, or sharpness not above 0.
    """
    if takes_kernels(logits, family, confidence, sharpness):
        return fused.selection(logits, family, str(confidence), sharpness, own=True)
    own, above, unknown, reached = _parts(logits, family, confidence, sharpness)
    return (own * above).masked_fill(unknown | reached, torch.nan)


def deselection(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence = "abs",
    sharpness: float = 1.0,
) -> Tensor:
    """prod over j in omega(i) of (1 - g_j): selection without the expert's own confidence.

    Arguments, shape and errors as for :func:`selection`.
    """
    if takes_kernels(logits, family, confidence, sharpness):
        return fused.selection(logits, family, str(confidence), sharpness, own=False)
    _, above, _, reached = _parts(logits, family, confidence, sharpness)
    return above.masked_fill(reached, torch.nan)


def selection_of_known(
    logits: Tensor, family: SubsetFamily, confidence: Confidence, sharpness: float
) -> tuple[Tensor, Tensor]:
    """alpha in the family of the experts whose logit is known (not NaN), and who is; ``(*, H)``.

    It is 0 for experts that are unknown, and NaN where all are. Arguments and errors as for
    :func:`selection`.
    """
    check_logits(logits, family)
    check_confidence(confidence, sharpness)
    own, above, unknown, _ = _parts(logits, family, confidence, sharpness, of_known=True)
    return (own * above).masked_fill(unknown.all(-1, keepdim=True), torch.nan), ~unknown


def rare_positive(threshold: float = 0.3, power: int = 4) -> Callable[[Tensor], Tensor]:
    """Confidence for rare positives: 0 at p = ``threshold``, 1 at p = 1 (authors' MovieLens code).

    With p = sigmoid(2 z) and q = |p - t|: c = q^k / (1 + q^(k-1)) * (1 + (1-t)^(k-1)) / (1-t)^k.

    Args:
        threshold: t, the probability that carries no confidence, in (0, 0.5].
        power: k, at least 2.

    Raises:
        LayoutError: ``threshold`` or ``power`` outside its range.
    """
    if not 0 < threshold <= 0.5 or power < 2:
        raise LayoutError(
            f"threshold must be in (0, 0.5] and power at least 2, got {threshold} and {power}"
        )
    top = 1 - threshold
    scale = (1 + top ** (power - 1)) / top**power

    def confidence(logits: Tensor) -> Tensor:
        q = (torch.sigmoid(2 * logits) - threshold).abs()
        return q**power / (1 + q ** (power - 1)) * scale

    return confidence


def _log_rest(g: Tensor, far: Tensor) -> Tensor:
    # log(1 - g), never above 0: from g itself while it is small, from ``far`` near saturation.
    # The clamp changes no value; it keeps an infinite derivative out of the unused branch.
    return torch.where(g < 0.5, torch.log1p(-g.clamp(max=0.5)), far)


def _log_rest_of_abs(z: Tensor) -> Tensor:
    # 1 - tanh|z| = 2 sigmoid(-2|z|), which does not cancel.
    return math.log(2) + F.logsigmoid(-2 * z.abs())


def _abs(z: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(z).abs()
    return t, _log_rest(t, _log_rest_of_abs(z))


def _square(z: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(z).abs()
    g = t * t
    return g, _log_rest(g, _log_rest_of_abs(z) + torch.log1p(t))  # 1 - t^2 = (1 - t)(1 + t)


def _smooth(z: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(z).abs()
    cube = t**3
    g = 2 * cube * t / (1 + cube)
    # 1 + t^3 - 2 t^4 = (1 - t)(1 + t + t^2 + 2 t^3)
    ratio = torch.log1p(t + t * t + 2 * cube) - torch.log1p(cube)
    return g, _log_rest(g, _log_rest_of_abs(z) + ratio)


def _rare(z: Tensor) -> tuple[Tensor, Tensor]:
    g = rare_positive()(z)
    top = 0.7
    q = (torch.sigmoid(2 * z) - 0.3).abs()
    # With t = 0.7 and q = p - 0.3, so that t - q = 1 - p = sigmoid(-2 z):
    # t^4 (1 + q^3) - q^4 (1 + t^3) = (t - q)(t^3 + t^2 q + t q^2 + q^3 + t^3 q^3)
    factor = top**3 + top**2 * q + top * q * q + (1 + top**3) * q**3
    ratio = factor.log() - torch.log1p(q**3) - 4 * math.log(top)
    return g, _log_rest(g, F.logsigmoid(-2 * z) + ratio)


_NAMED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "abs": _abs,
    "square": _square,
    "smooth": _smooth,
    "rare": _rare,
}


def _confidence(z: Tensor, confidence: Confidence) -> tuple[Tensor, Tensor]:
    """g and log(1 - g) of every expert, ``(*, H)`` each."""
    if isinstance(confidence, str):
        return _NAMED[confidence](z)
    g = confidence(z)
    if g.shape != z.shape:
        raise LayoutError(
            f"confidence must keep the shape of the logits, {tuple(z.shape)}, its result is "
            f"{tuple(g.shape)}"
        )
    g = g.clamp(0, 1)  # rounding alone may exceed 1
    below_one = 1 - torch.finfo(g.dtype).eps / 2
    return g, torch.where(g == 1, _LOG_FLOOR, torch.log1p(-g.clamp(max=below_one)))


def _sharpened(g: Tensor, log_rest: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """g^s and log(1 - g^s) from g and log(1 - g), each with its digits wherever g lies."""
    small = g < 0.5
    tiny = torch.finfo(g.dtype).tiny
    # Clamps keep infinite derivatives out of unused branches; they change no value in use.
    log_g = torch.where(
        small,
        g.clamp(min=tiny).log(),
        torch.log1p(-log_rest.clamp(_LOG_SATURATED, -0.5).exp()),
    )
    sharp = torch.where(small, g.clamp(min=tiny) ** power, torch.exp(power * log_g))
    sharp = torch.where(g == 0, g, sharp)
    far = torch.where(
        log_rest < _LOG_SATURATED,
        log_rest + math.log(power),  # 1 - (1 - e)^s = s e for such an e
        torch.log(-torch.expm1(power * log_g)),
    )
    return sharp, _log_rest(sharp, far)


def _parts(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence,
    sharpness: float,
    of_known: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g_i, prod over omega(i) of (1 - g_j), is g_i unknown, is a factor unknown; ``(*, H)`` each.

    What is unknown (NaN) is set aside and put in at the end: a product with 0 would let it
    through to experts outside its subset, and so would the derivative of one. With ``of_known``,
    only an expert with a larger one that is known has one above it to be sharpened for.
    """
    with torch.autocast(logits.device.type, enabled=False):
        z = logits if logits.dtype == torch.float64 else logits.float()
        unknown = z.isnan()
        g, log_rest = _confidence(z.masked_fill(unknown, 0), confidence)
        unknown = unknown | g.isnan()
        if sharpness != 1:
            sharp, sharp_rest = _sharpened(g, log_rest, sharpness)
            if of_known:
                larger = (~unknown).double() @ family.table("strict", z.device) > 0
            else:
                larger = family.table("has_larger", z.device)
            g = torch.where(larger, sharp, g)
            log_rest = torch.where(larger, sharp_rest, log_rest)
        below = family.table("strict", z.device).T
        terms = log_rest.masked_fill(unknown, 0).clamp(min=_LOG_FLOOR).double()
        above = (terms @ below).exp().to(g.dtype)
        reached = unknown.double() @ below > 0
        return g.masked_fill(unknown, 0), above, unknown, reached


def takes_kernels(
    logits: Tensor, family: SubsetFamily, confidence: Confidence, sharpness: float
) -> bool:
    """Whether the fused ops compute this; else PyTorch does, with the same result.

    Raises:
        LayoutError: ``logits`` do not end in H, or sharpness is outside its range.
    """
    check_logits(logits, family)
    check_confidence(confidence, sharpness)
    return fused.obstacle(logits, confidence) is None


def check_confidence(confidence: Confidence, sharpness: float) -> None:
    """Raise LayoutError for an unknown confidence, or a sharpness outside its range."""
    if not callable(confidence) and (not isinstance(confidence, str) or confidence not in _NAMED):
        raise LayoutError(
            f"confidence must be one of {[*_NAMED]} or a function of the logits, got {confidence!r}"
        )
    if not isinstance(sharpness, (int, float)) or not 1e-6 <= sharpness <= 1e6:
        raise LayoutError(f"sharpness must be a number from 1e-6 to 1e6, got {sharpness!r}")


def check_logits(logits: Tensor, family: SubsetFamily) -> None:
    """Raise LayoutError unless ``logits`` are floating-point ``(*, H)``."""
    if not logits.is_floating_point():
        raise LayoutError(f"logits must be floating-point, got {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] != family.num_experts:
        raise LayoutError(
            f"logits must end in one value per expert, H={family.num_experts}, got "
            f"{tuple(logits.shape)}"
        )
