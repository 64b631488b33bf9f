"""Confidences of experts in plain PyTorch, from their logits, as pairs (g, log(1 - g)).

Once tanh saturates, 1 - g is 0 in float32 although the product over the subsets of S_i still
needs it. For K classes, (K max p - 1) / (K - 1) is in the place of |F|; of two classes with the
logits -z and z it is |tanh z|.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels.errors import LayoutError

#: A confidence by name, or any function of the logits with values in [0, 1].
Confidence = str | Callable[[Tensor], Tensor]

#: Logarithms below this are products that are 0 in every floating-point type.
LOG_FLOOR = -1e6
# Where log(1 - g) is below this, (1 - g)^2 is no digit of 1 - g in any floating-point type.
_LOG_SATURATED = -40.0

Pair = tuple[Tensor, Tensor]


def rare_positive(threshold: float = 0.3, power: int = 4) -> Callable[[Tensor], Tensor]:
    """Confidence for rare positives: 0 at p = ``threshold``, 1 at p = 1 (authors' MovieLens code).

    With p = sigmoid(2 z) and ``q = |p - t|``: c is
    ``q^k / (1 + q^(k-1)) * (1 + (1-t)^(k-1)) / (1-t)^k``.

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


def _size(z: Tensor) -> Pair:
    """t = |tanh z| and log(1 - t), ``(*, H)``."""
    # 1 - tanh|z| = 2 sigmoid(-2|z|), which does not cancel.
    return torch.tanh(z).abs(), math.log(2) + F.logsigmoid(-2 * z.abs())


def _size_of_classes(z: Tensor) -> Pair:
    """t = (K max p - 1) / (K - 1) with p = softmax(z), and log(1 - t): ``(*, H, K)`` to ``(*, H)``.

    K max p - 1 is the sum of max p - p_k, and 1 - t = K / (K - 1) times the sum of all p but the
    largest: neither cancels.
    """
    classes, best = z.shape[-1], z.argmax(-1, keepdim=True)
    log_all = z.logsumexp(-1)
    largest = z.gather(-1, best)
    t = (largest.squeeze(-1) - log_all).exp() * -torch.expm1(z - largest).sum(-1) / (classes - 1)
    others = z.scatter(-1, best, -torch.inf).logsumexp(-1)
    return t, math.log(classes / (classes - 1)) + others - log_all


def _abs(t: Tensor, far: Tensor) -> Pair:
    return t, _log_rest(t, far)


def _square(t: Tensor, far: Tensor) -> Pair:
    g = t * t
    return g, _log_rest(g, far + torch.log1p(t))  # 1 - t^2 = (1 - t)(1 + t)


def _smooth(t: Tensor, far: Tensor) -> Pair:
    cube = t**3
    g = 2 * cube * t / (1 + cube)
    # 1 + t^3 - 2 t^4 = (1 - t)(1 + t + t^2 + 2 t^3)
    ratio = torch.log1p(t + t * t + 2 * cube) - torch.log1p(cube)
    return g, _log_rest(g, far + ratio)


def _rare(z: Tensor) -> Pair:
    g = rare_positive()(z)
    top = 0.7
    q = (torch.sigmoid(2 * z) - 0.3).abs()
    # With t = 0.7 and q = p - 0.3, so that t - q = 1 - p = sigmoid(-2 z):
    # t^4 (1 + q^3) - q^4 (1 + t^3) = (t - q)(t^3 + t^2 q + t q^2 + q^3 + t^3 q^3)
    factor = top**3 + top**2 * q + top * q * q + (1 + top**3) * q**3
    ratio = factor.log() - torch.log1p(q**3) - 4 * math.log(top)
    return g, _log_rest(g, F.logsigmoid(-2 * z) + ratio)


#: Name to the function from t and log(1 - t) to g and log(1 - g).
_OF_SIZE: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "abs": _abs,
    "square": _square,
    "smooth": _smooth,
}
#: Those of one logit an expert, and those of K.
NAMED, NAMED_OF_CLASSES = (*_OF_SIZE, "rare"), (*_OF_SIZE,)


def unknown_logits(z: Tensor, outputs: int | None) -> Tensor:
    """Whose logit is NaN, or whose probabilities are: ``(*, H)`` bool."""
    return z.isnan() if outputs is None else z.log_softmax(-1).isnan().any(-1)


def confidence_of(z: Tensor, confidence: Confidence, outputs: int | None) -> Pair:
    """g and log(1 - g) of every expert, ``(*, H)`` each; ``z`` has no unknown logit."""
    if isinstance(confidence, str):
        if outputs is not None:
            return _OF_SIZE[confidence](*_size_of_classes(z))
        return _rare(z) if confidence == "rare" else _OF_SIZE[confidence](*_size(z))
    g = confidence(z)
    shape = z.shape if outputs is None else z.shape[:-1]
    if g.shape != shape:
        raise LayoutError(
            f"confidence must return one value for each expert, {tuple(shape)}, its result is "
            f"{tuple(g.shape)}"
        )
    g = g.clamp(0, 1)  # rounding alone may exceed 1
    below_one = 1 - torch.finfo(g.dtype).eps / 2
    return g, torch.where(g == 1, LOG_FLOOR, torch.log1p(-g.clamp(max=below_one)))


def sharpened(g: Tensor, log_rest: Tensor, power: float) -> Pair:
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
