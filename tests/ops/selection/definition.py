"""Section 3.3 word by word, in plain loops over Python floats (or mpmath's, where those end)."""

import math

import mpmath
import torch

CONFIDENCES = ("abs", "square", "smooth", "rare")


def confidence_of(z, name, m=math):
    """g of one logit; ``m`` is ``math`` or ``mpmath``."""
    if callable(name):
        return float(name(torch.tensor(float(z), dtype=torch.float64)))
    if name == "rare":
        q = abs(1 / (1 + m.exp(-2 * z)) - _tenth(m) * 3)
        top = _tenth(m) * 7
        return q**4 / (1 + q**3) * (1 + top**3) / top**4
    f = abs(m.tanh(z))
    return {"abs": f, "square": f**2, "smooth": 2 * f**4 / (1 + f**3)}[name]


def _tenth(m):
    return m.mpf(1) / 10 if m is mpmath else 0.1


def define(row, family, confidence="abs", sharpness=1.0, m=math):
    """(alpha, product over omega(i) of (1 - g_j)) for one sample, two lists of H numbers."""
    strict = family.strict.tolist()
    count = family.num_experts
    g = [confidence_of(z, confidence, m) for z in row]
    for j in range(count):
        if sharpness != 1 and any(strict[i][j] for i in range(count)):
            g[j] = g[j] ** sharpness
    above = []
    for i in range(count):
        product = m.mpf(1) if m is mpmath else 1.0
        for j in range(count):
            if strict[i][j]:
                product *= 1 - g[j]
        above.append(product)
    return [a * b for a, b in zip(g, above, strict=True)], above


def define_all(logits, family, confidence="abs", sharpness=1.0):
    """:func:`define` for logits ``(*, H)``: alpha and the product, float64.

    A named confidence has every digit, however small the value; one of one's own has those that
    its 1 - g has.
    """
    rows = logits.detach().double().reshape(-1, family.num_experts).tolist()
    m = math if callable(confidence) else mpmath
    with mpmath.workdps(40):
        both = [
            define(
                [m.mpf(z) for z in row] if m is mpmath else row, family, confidence, sharpness, m
            )
            for row in rows
        ]
    return tuple(
        torch.tensor([[float(v) for v in pair[k]] for pair in both], dtype=torch.float64).reshape(
            logits.shape
        )
        for k in range(2)
    )
