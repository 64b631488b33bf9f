"""An MLP in float64 dense algebra, with what rounding may do to each of its numbers.

Each bound is the usual first-order one: of a sum of products, some roundings of the sum of their
absolute values, and what its terms bring along.
"""

import torch

from maskmoe_kernels.ops.masked_linear.reference import ACTIVATIONS

# Roundings that a sum of products may be off by, in units of the sum of absolute values.
ROUNDINGS = 8
# What float32 may lose of a number that is too small for it.
SMALLEST = 3e-45


def sum_rounding(terms, eps):
    """Of a sum, in units of the sum of its absolute values; equal terms may be rounded alike."""
    return ROUNDINGS * eps * (1 + terms / 32)


class DenseLayer:
    """What is looked up once for a layout: the masks, and where packed weights belong."""

    def __init__(self, layout):
        self.shape = layout.out_features, layout.in_features
        self.index = layout.weight_index(torch.device("cpu"))
        self.routed = layout.grad_mask().double()

    def dense(self, weight):
        flat = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.float64)
        flat[self.index] = weight.detach().double()
        return flat.view(self.shape)


class Definition:
    """Forward on ``x`` ``(rows, in)`` float64, finite; ``eps`` is a rounding inside the MLP.

    Attributes:
        logits: ``(rows, out)``, float64.
        off: What rounding may change in them, same shape.
        least: What float32 may lose of a gradient as too small, where it waits to be divided.
    """

    least = SMALLEST

    def __init__(self, layers, weights, biases, activation, x, eps):
        self.layers, self.eps = layers, eps
        self.dense = [layer.dense(weight) for layer, weight in zip(layers, weights, strict=True)]
        self.inputs, self.slopes = [], []  # values and bounds, both (value, off)
        h, off = x, torch.zeros_like(x)
        for k, dense in enumerate(self.dense):
            self.inputs.append((h, off))
            z, size = h @ dense.t(), h.abs() @ dense.t().abs()
            if biases:
                z, size = z + biases[k].detach().double(), size + biases[k].detach().double().abs()
            off = off @ dense.t().abs() + ROUNDINGS * eps * size
            if k < len(layers) - 1:
                h, off = self._activated(z, off, activation)
        self.logits, self.off = z, off

    def _activated(self, z, off, activation):
        with torch.enable_grad():
            leaf = z.requires_grad_()
            h = ACTIVATIONS[activation](leaf)
        (slope,) = torch.autograd.grad(h.sum(), leaf)
        z, h = z.detach(), h.detach()
        if activation in ("relu", "leaky_relu"):
            change = (z.abs() <= off).double()
        elif activation in (None, "none"):
            change = torch.zeros_like(z)
        else:  # no second derivative is above 1
            change = (off + 4 * self.eps).clamp(max=1.2)
        self.slopes.append((slope, change))
        return h, 1.2 * off + ROUNDINGS * self.eps * h.abs()

    def gradients(self, grad, off):
        """Of x, of each weight, of each bias, as (value, bound), from a cotangent and its bound."""
        eps, over_rows = ROUNDINGS * self.eps, sum_rounding(len(grad), self.eps)
        weights, biases = [], []
        for k in reversed(range(len(self.layers))):
            h, h_off = self.inputs[k]
            bound = off.t() @ (h.abs() + h_off) + grad.abs().t() @ (h_off + over_rows * h.abs())
            bound = bound + len(grad) * self.least
            index = self.layers[k].index
            weights.insert(0, ((grad.t() @ h).view(-1)[index], bound.view(-1)[index]))
            biases.insert(0, (grad.sum(0), off.sum(0) + over_rows * grad.abs().sum(0)))
            routed = self.dense[k] * self.layers[k].routed
            off = (off + self.least) @ routed.abs() + eps * (grad.abs() @ routed.abs())
            grad = grad @ routed
            if k > 0:
                slope, change = self.slopes[k - 1]
                off = off * (slope.abs() + change) + grad.abs() * change
                grad = grad * slope
        return [(grad, off), *weights, *biases]
