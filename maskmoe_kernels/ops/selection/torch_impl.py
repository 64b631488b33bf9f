"""Selection, mixture and loss in plain PyTorch: any dtype, any confidence, every transform.

Everything is computed from the logit z, as pairs (g, log(1 - g)): once tanh saturates, 1 - g is
0 in float32 although the product over the subsets of S_i still needs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.subsets import SubsetFamily

#: A confidence by name, or any function of the logits with values in [0, 1].
Confidence = str | Callable[[Tensor], Tensor]

# Logarithms below this are products that are 0 in every floating-point type.
_LOG_FLOOR = -1e6
# Where log(1 - g) is below this, (1 - g)^2 is no digit of 1 - g in any floating-point type.
_LOG_SATURATED = -40.0


def selection(
    logits: Tensor, family: SubsetFamily, confidence: Confidence, sharpness: float
) -> Tensor:
    """alpha, ``(*, H)``; see :func:`maskmoe_kernels.selection`."""
    own, product, unknown, reached = _parts(logits, family, confidence, sharpness)
    return (own * product).masked_fill(unknown | reached, torch.nan)


def deselection(
    logits: Tensor, family: SubsetFamily, confidence: Confidence, sharpness: float
) -> Tensor:
    """prod over j in omega(i) of (1 - g_j), ``(*, H)``."""
    _, product, _, reached = _parts(logits, family, confidence, sharpness)
    return product.masked_fill(reached, torch.nan)


def mixture(
    logits: Tensor,
    family: SubsetFamily,
    confidence: Confidence,
    sharpness: float,
    alpha: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Probability ``(*,)``, alpha and attribution ``(*, H)``.

    Args:
        logits: z, ``(*, H)``.
        family: The subsets of the H experts.
        confidence: See :func:`selection`.
        sharpness: See :func:`selection`.
        alpha: That of :func:`selection`. ``None``: experts whose logit is NaN are left out, and
            alpha is that of the family of the others.
    """
    if alpha is None:
        alpha, known = _selection_of_known(logits, family, confidence, sharpness)
        logits = logits.masked_fill(~known, 0)
        equal: Tensor | float = known / known.sum(-1, keepdim=True)
    else:
        equal = 1 / family.num_experts
    total = alpha.sum(-1, keepdim=True)
    nobody = total == 0
    share = torch.where(nobody, equal, alpha / total.masked_fill(nobody, 1))
    expert = torch.sigmoid(2 * logits.to(alpha.dtype))
    probability = (share * expert).sum(-1).clamp(max=1)  # shares may sum to 1 and a rounding
    return probability, alpha, share


def gem_loss(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    family: SubsetFamily,
    confidence: Confidence,
    sharpness: float,
    weighting: str,
    normalize: str | None,
    sample_weight: Tensor | None,
) -> Tensor:
    """The loss, ``()``; see :func:`maskmoe_kernels.gem_loss`.

    ``sample_weight`` has the mean 1 over the samples of ``mask``, as :func:`weighted` makes it.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    if mask is not None:
        z = z.masked_fill(~mask.unsqueeze(-1), 0)
        target = target.masked_fill(~mask, 0)
    with torch.no_grad():  # E-step: the old parameters (eq. 4)
        if weighting == "uniform":
            weight = torch.ones_like(z)
        else:
            weigh = selection if weighting == "selection" else deselection
            weight = weigh(z, family, confidence, sharpness)
    weight = _normalized(weight, normalize, mask, sample_weight)
    # (tanh z + 1) / 2 = sigmoid(2 z): the logit form keeps its gradient at saturation.
    y = target.to(z.dtype).unsqueeze(-1).expand_as(z)
    bce = F.binary_cross_entropy_with_logits(2 * z, y, reduction="none")
    return (weight * bce).sum()


def _selection_of_known(
    logits: Tensor, family: SubsetFamily, confidence: Confidence, sharpness: float
) -> tuple[Tensor, Tensor]:
    """alpha in the family of the experts whose logit is known (not NaN), and who is; ``(*, H)``.

    It is 0 for experts that are unknown, and NaN where all are.
    """
    own, product, unknown, _ = _parts(logits, family, confidence, sharpness, of_known=True)
    return (own * product).masked_fill(unknown.all(-1, keepdim=True), torch.nan), ~unknown


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


#: Name to the function from z to g and log(1 - g).
NAMED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "abs": _abs,
    "square": _square,
    "smooth": _smooth,
    "rare": _rare,
}


def _confidence(z: Tensor, confidence: Confidence) -> tuple[Tensor, Tensor]:
    """g and log(1 - g) of every expert, ``(*, H)`` each."""
    if isinstance(confidence, str):
        return NAMED[confidence](z)
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
    an expert is sharpened if a superset of its subset is that of a known expert.
    """
    with torch.autocast(logits.device.type, enabled=False):
        z = logits if logits.dtype == torch.float64 else logits.float()
        unknown = z.isnan()
        g, log_rest = _confidence(z.masked_fill(unknown, 0), confidence)
        unknown = unknown | g.isnan()
        if sharpness != 1:
            sharp, sharp_rest = _sharpened(g, log_rest, sharpness)
            if of_known:
                sharpened = (~unknown).double() @ family.table("strict", z.device) > 0
            else:
                sharpened = family.table("has_larger", z.device)
            g = torch.where(sharpened, sharp, g)
            log_rest = torch.where(sharpened, sharp_rest, log_rest)
        subsets = family.table("strict", z.device).T  # column i: the proper subsets of S_i
        terms = log_rest.masked_fill(unknown, 0).clamp(min=_LOG_FLOOR).double()
        product = (terms @ subsets).exp().to(g.dtype)
        reached = unknown.double() @ subsets > 0
        return g.masked_fill(unknown, 0), product, unknown, reached


def _normalized(
    weight: Tensor, normalize: str | None, mask: Tensor | None, sample_weight: Tensor | None
) -> Tensor:
    """Weights whose sum of products with the cross-entropies is the loss."""
    if mask is not None:
        weight = weight.masked_fill(~mask.unsqueeze(-1), 0)
    if normalize == "sample":
        weight = _divide(weight, weight.sum(-1, keepdim=True))
    if sample_weight is not None:
        weight = weight * sample_weight.to(weight.dtype).unsqueeze(-1)
    if normalize == "batch":
        return _divide(weight, weight.sum())
    if normalize == "expert":
        return _divide(weight, weight.reshape(-1, weight.shape[-1]).sum(0))
    if mask is None:
        return weight / max(weight[..., 0].numel(), 1)
    return weight / mask.sum().clamp(min=1)


def _divide(weight: Tensor, total: Tensor) -> Tensor:
    return weight / total.masked_fill(total == 0, 1)
