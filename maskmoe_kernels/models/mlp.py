"""The interpretable multi-layer perceptron (section 3.4)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from maskmoe_kernels.errors import LayoutError
from maskmoe_kernels.layout.blocks import BlockLayout
from maskmoe_kernels.layout.subsets import SubsetFamily, Width
from maskmoe_kernels.nn.linear import MaskedLinear
from maskmoe_kernels.objectives.gem import check_loss, gem_loss
from maskmoe_kernels.objectives.mixture import Mixture, mixture
from maskmoe_kernels.objectives.selection import Confidence, check_confidence
from maskmoe_kernels.ops import networks
from maskmoe_kernels.ops.networks import Inputs, Layers


class InterpretableMLP(nn.Module):
    """All experts of a family as one network: expert i's logit is a function of S_i alone.

    Expert i's loss moves expert i's parameters alone, although larger experts read its units.

    Args:
        family: The subsets; the input is its groups side by side.
        hidden: Units per expert of each hidden layer; each entry an int, or one per expert.
        activation: Of the hidden layers; see :func:`masked_linear`.
        input_layout: First layer's layout if not ``family.input_layout(hidden[0])``, for
            instance one that routes the gradient to the smallest subsets only.
        backend: See :func:`masked_linear`.
        device: Where to create the parameters.
        dtype: Floating-point type of the parameters.

    Raises:
        LayoutError: A width or an ``input_layout`` that does not fit the family, or an
            ``input_layout`` through which an expert sees a group outside its subset.

    Example:
        >>> family = SubsetFamily.powerset({"a": 2, "b": 3})
        >>> net = InterpretableMLP(family, hidden=[16, 16])
        >>> net(torch.randn(5, 5)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        family: SubsetFamily,
        hidden: Sequence[Width] = (16, 16),
        activation: str | None = "relu",
        *,
        input_layout: BlockLayout | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.family = family
        if not isinstance(hidden, Iterable) or isinstance(hidden, str):
            raise LayoutError(
                f"hidden must be a sequence with one entry per hidden layer, got {hidden!r}; write "
                f"[{hidden!r}] for a single layer"
            )
        widths: list[Width] = [*hidden, 1]
        default = family.input_layout(widths[0])
        if input_layout is not None:
            _refuse_unfit(input_layout, default)
        layouts = [default if input_layout is None else input_layout]
        layouts += [family.hidden_layout(a, b) for a, b in itertools.pairwise(widths)]
        last = len(layouts) - 1
        self._layouts = layouts
        self.layers = nn.Sequential(
            *(
                MaskedLinear.from_layout(
                    layout,
                    activation=None if k == last else activation,
                    backend=backend,
                    device=device,
                    dtype=dtype,
                )
                for k, layout in enumerate(layouts)
            )
        )

    def forward(self, x: Tensor | Inputs) -> Tensor:
        """Input ``(*, family.in_features)`` to logits ``(*, H)``.

        :class:`Inputs` are gathered on the way: rows of embedding tables beside dense columns.
        """
        layers = self._fused(x)
        if layers is not None:
            return networks.masked_mlp(_inputs(x), layers)
        logits: Tensor = self.layers(x.joined() if isinstance(x, Inputs) else x)
        return logits

    def gem_loss(
        self,
        x: Tensor | Inputs,
        target: Tensor,
        confidence: Confidence = "abs",
        weighting: str = "selection",
        normalize: str | None = None,
        mask: Tensor | None = None,
        sharpness: float = 1.0,
    ) -> Tensor:
        """``gem_loss(net(x), target, net.family, ...)``, in one pass where that can be done.

        Loss and gradients are then computed together, a tile of rows at a time, and no
        activation is kept for ``backward``. What a sample that ``mask`` leaves out holds, NaN
        included, reaches no gradient.

        Hooks on this module (DistributedDataParallel has some) see calls of the module only: there,
        take the loss of ``net(x)``.

        Args:
            x: As in ``forward``.
            target: y in {0, 1}, ``(*,)``.
            confidence: See :func:`selection`.
            weighting: See :func:`maskmoe_kernels.gem_loss`, as for the rest.
            normalize: What the weights are divided by.
            mask: ``(*,)`` bool, true where a sample counts.
            sharpness: See :func:`selection`.

        Raises:
            LayoutError: As :func:`maskmoe_kernels.gem_loss`.
        """
        layers = self._fused(x)
        if layers is None or not isinstance(confidence, str) or target.requires_grad:
            return gem_loss(
                self(x), target, self.family, confidence, weighting, normalize, mask, sharpness
            )
        inputs = _inputs(x)
        check_loss(inputs.shape, target, confidence, weighting, normalize, mask, sharpness)
        return networks.masked_mlp_gem(
            inputs,
            layers,
            target,
            self.family.strict,
            confidence,
            sharpness,
            weighting,
            normalize,
            mask,
        )

    @torch.no_grad()
    def predict(
        self, x: Tensor | Inputs, confidence: Confidence = "abs", sharpness: float = 1.0
    ) -> Mixture:
        """Probability ``(*,)`` and attribution ``(*, H)`` (eq. 1); no gradient is recorded.

        Raises:
            LayoutError: As :func:`mixture`.
        """
        layers = self._fused(x)
        if layers is None or not isinstance(confidence, str):
            return mixture(self(x), self.family, confidence, sharpness)
        check_confidence(confidence, sharpness)
        return Mixture(
            *networks.masked_mlp_mixture(
                _inputs(x), layers, self.family.strict, confidence, sharpness
            )
        )

    def obstacle(self) -> str | None:
        """Why the layers run one by one, in words for the user; None when they run as one op."""
        layers = [*self.layers]
        first, last = layers[0], layers[-1]
        for layer, layout in zip(layers, self._layouts, strict=False):
            if type(layer) is not MaskedLinear or layer.layout is not layout:
                return f"a layer is a {type(layer).__name__} that was not made here"
            if layer._forward_hooks or layer._forward_pre_hooks:
                return "a hook wants to see each layer"
            if layer.backend not in (None, "native"):
                return f"backend {layer.backend!r} was asked for"
            if layer is not last and layer.activation != first.activation:
                return "hidden layers differ in their activation"
            if (layer.bias is None) != (first.bias is None):
                return "some layers have a bias and some have none"
        if last.activation not in (None, "none"):
            return "the last layer has an activation"
        if self.layers._forward_hooks or self.layers._forward_pre_hooks or _has_any_global_hook():
            return "a hook wants to see each layer"
        return networks.obstacle(first.weight.dtype, first.weight.device)

    def _fused(self, x: Tensor | Inputs) -> Layers | None:
        """The layers for one op; None: they run one by one."""
        given = x.x if isinstance(x, Inputs) else x
        if networks.transformed() or self.obstacle() is not None:
            return None
        layers = [*self.layers]
        weights = [layer.weight for layer in layers]
        like = weights[0]
        fits = given is None or (given.dtype == like.dtype and given.device == like.device)
        if not fits and not torch.is_autocast_enabled(like.device.type):
            return None  # and the first layer says what is wrong
        biases = [layer.bias for layer in layers]
        activation = layers[0].activation if len(layers) > 1 else None
        return Layers(
            weights,
            [] if biases[0] is None else biases,
            [layer.layout for layer in layers],
            activation or "none",
        )

    def extra_repr(self) -> str:
        """How the layers run, for ``print(net)``."""
        reason = self.obstacle()
        return "runs as one op" if reason is None else f"runs layer by layer: {reason}"


def _inputs(x: Tensor | Inputs) -> Inputs:
    return x if isinstance(x, Inputs) else Inputs.of(x)


def _refuse_unfit(given: BlockLayout, default: BlockLayout) -> None:
    shape = (default.out_features, default.in_features)
    if (given.out_features, given.in_features) != shape:
        raise LayoutError(
            f"input_layout must be (units of the first layer, input features) = {shape}, got "
            f"{(given.out_features, given.in_features)}"
        )
    beyond = (given.mask() & ~default.mask()).nonzero()
    if beyond.numel():
        raise LayoutError(
            f"input_layout lets {len(beyond)} weights see features outside their expert's subset, "
            f"the first at (unit, feature) {tuple(beyond[0].tolist())}; take away from "
            "family.input_layout(hidden[0]), add nothing to it"
        )
